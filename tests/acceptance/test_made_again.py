"""A running daemon makes tensors again, and finds what somebody has written to them."""

from pathlib import Path

import pytest

from cache.keys import SeriesRef
from serving import cli
from tests.daemon import Bucket, Daemon

pytestmark = pytest.mark.service


def made_again(daemon: Daemon, ref: SeriesRef, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and output of `voxcache verify`."""
    status = cli.main(["verify", ref.study, "--url", daemon.url])
    return status, capsys.readouterr().out


def test_what_was_written_to_is_found_and_made_anew(
    tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    """Untouched it is the same; written to in shared memory it is set aside, loudly, and the next answer is right."""
    ref = bucket.series()
    with Daemon(tmp_path, {"origin": bucket.origin}) as daemon:
        right = daemon.tensor(ref).body
        daemon.until_written(ref)
        status, told = made_again(daemon, ref, capsys)
        assert (status, told.split()[:2]) == (0, ["same", "volume"])

        assert cli.main(["explain", ref.study, "--url", daemon.url]) == 0
        explained = capsys.readouterr().out
        entries = daemon.ask("GET", f"/v1/studies/{ref.study}/lineage").json["entries"]
        [host] = {each["entry"]["lineage"]["host"] for each in entries}
        assert f" on {host} by voxcache" in explained
        assert "8 objects" in explained and "recipe" in explained and "decoders" in explained

        asked = {"study": ref.study, "series": ref.series, "recipe": "volume"}
        lease = daemon.ask("POST", "/v1/leases", asked).json
        with Path("/dev/shm", lease["shm"]).open("r+b") as arena:
            arena.seek(lease["offset"])
            arena.write(b"\xff")
        assert daemon.tensor(ref).body != right
        status, told = made_again(daemon, ref, capsys)
        assert (status, told.split()[0]) == (1, "WRONG")
        assert "Not reproduced" in told and "in ram" in told
        answer = daemon.tensor(ref)
        assert (answer.body, answer.headers["Voxcache-Tier"]) == (right, "nvme")
        assert "an entry is not what its objects make" in daemon.log()
    records = "".join(path.read_text() for path in (tmp_path / "state" / "audit").iterdir())
    assert '"code":"quarantine"' in records
