"""kill -9 at any instant: no wrong byte afterwards, finished entries are hits, leftovers are gone, arrivals go on."""

import hashlib
import threading
from pathlib import Path

import pytest

from cache.keys import SeriesRef
from loadtest import crash
from tests.daemon import Bucket, Daemon

pytestmark = pytest.mark.service


def in_nvme(daemon: Daemon, ref: SeriesRef, kind: str = "tensor") -> bool:
    entries = daemon.ask("GET", f"/v1/studies/{ref.study}").json["entries"]
    return any(entry["tier"] == "nvme" and entry["kind"] == kind for entry in entries)


def record(key: str) -> dict[str, object]:
    return {
        "eventSource": "ceph:s3",
        "eventName": "ObjectCreated:Put",
        "eventTime": "2026-01-01T00:00:00Z",
        "s3": {"bucket": {"name": "b"}, "object": {"key": key, "size": 1, "eTag": key, "sequencer": "1"}},
    }


def test_kill_9_during_fills(tmp_path: Path, bucket: Bucket) -> None:
    """Killed in the middle of fills, several times: finished NVMe entries are hits with the right bytes, the rest is
    made again, and neither temporaries nor shared memory stay behind."""
    refs = [bucket.series(slices=40, rows=128, columns=128, seed=seed) for seed in range(6)]
    daemon = Daemon(tmp_path, {"origin": bucket.origin, "store": {"revalidate": "events"}})
    with daemon:
        right = {ref: hashlib.sha256(daemon.tensor(ref).body).hexdigest() for ref in refs}
    for path in (tmp_path / "nvme").rglob("*"):
        if path.is_file():
            path.unlink()
    finished: set[SeriesRef] = set()
    killed: list[Path] = []
    for round_ in range(4):
        daemon.start()
        for ref in finished:
            answer = daemon.tensor(ref)
            assert hashlib.sha256(answer.body).hexdigest() == right[ref]
            assert answer.headers["Voxcache-Tier"] == "nvme"
        askers = [threading.Thread(target=ask_and_forget, args=(daemon, ref)) for ref in refs]
        for asker in askers:
            asker.start()
        while not (finished := {ref for ref in refs if in_nvme(daemon, ref)}) or len(finished) < min(round_, 5):
            assert daemon.pid
        killed += daemon.arenas()
        daemon.kill()
        for asker in askers:
            asker.join()
    with daemon:
        assert not list((tmp_path / "nvme" / "tmp").iterdir())
        assert len(killed) == 4
        assert not any(path.exists() for path in killed)
        for ref in refs:
            answer = daemon.tensor(ref)
            assert hashlib.sha256(answer.body).hexdigest() == right[ref]
            assert ref not in finished or answer.headers["Voxcache-Tier"] == "nvme"


def ask_and_forget(daemon: Daemon, ref: SeriesRef) -> None:
    try:
        daemon.tensor(ref)
    except (OSError, ValueError):  # it was killed under this request, as it was meant to be
        return


def test_an_accepted_arrival_survives(tmp_path: Path, bucket: Bucket) -> None:
    """Killed right after its 202, the daemon warms the study after its restart; once only."""
    ref = bucket.series(slices=6)
    keys = [path.relative_to(bucket.path).as_posix() for path in bucket.files(ref)]
    daemon = Daemon(tmp_path, {"origin": bucket.origin, "arrivals": {"warm": ["volume"], "quiet_s": 0.5}})
    daemon.start()
    accepted = daemon.ask("POST", "/v1/arrivals/s3", {"Records": [record(key) for key in keys]})
    daemon.kill()
    assert (accepted.status, accepted.json) == (202, {"accepted": 6, "new": 6})
    with daemon:
        while not in_nvme(daemon, ref):
            assert daemon.pid
        assert daemon.tensor(ref).headers["Voxcache-Tier"] == "ram"
        again = daemon.ask("POST", "/v1/arrivals/s3", {"Records": [record(key) for key in keys]})
        assert again.json == {"accepted": 6, "new": 0}


def test_a_stop_drains(tmp_path: Path, bucket: Bucket) -> None:
    """SIGTERM ends the daemon with status 0, what was filled is on NVMe, and nothing is left in shared memory."""
    ref = bucket.series(slices=6)
    daemon = Daemon(tmp_path, {"origin": bucket.origin})
    daemon.start()
    assert daemon.tensor(ref).status == 200
    [arena] = daemon.arenas()
    assert daemon.stop() == 0
    assert not arena.exists()
    with daemon:
        assert daemon.tensor(ref).headers["Voxcache-Tier"] == "nvme"


@pytest.mark.slow
def test_a_few_rounds_of_kills(tmp_path: Path) -> None:
    """Killed under load and while it starts, a few times: no wrong byte, no overrun, and nothing for fsck to find."""
    result = crash.run(rounds=4, seed=2, folder=tmp_path)
    assert [bar for bar in result["bars"] if not bar["ok"]] == []
