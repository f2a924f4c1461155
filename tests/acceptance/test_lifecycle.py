"""Start and end: what cannot work is said at once, requests under way end well, a second signal forces the end."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.keys import SeriesRef
from serving.demo.daemon import DaemonError
from tests.conftest import ROOT
from tests.daemon import MIB, Bucket, Daemon
from tests.services import S3Proxy

pytestmark = pytest.mark.service


@pytest.fixture
def stalling(tmp_path: Path, bucket: Bucket, s3_proxy: S3Proxy) -> Iterator[tuple[Daemon, SeriesRef]]:
    """A daemon whose origin says nothing any more, and a series in there."""
    ref = bucket.series(slices=4)
    files = {path.relative_to(bucket.path).as_posix(): path.read_bytes() for path in bucket.files(ref)}
    service = s3_proxy.service
    keys = {"access_key": service.access_key, "secret_key": service.secret_key}
    origin = {"bucket": asyncio.run(service.bucket(files)), "endpoint_url": service.endpoint, **keys}
    with Daemon(tmp_path, {"origin": {"s3": origin}, "server": {"drain_s": 60.0}}) as daemon:
        s3_proxy.fail("stall", only=".dcm")
        yield daemon, ref


async def test_requests_under_way_are_answered(stalling: tuple[Daemon, SeriesRef], s3_proxy: S3Proxy) -> None:
    """Told to stop, the daemon takes no new connection but answers what it had begun, and ends with status 0."""
    daemon, ref = stalling
    asking = asyncio.create_task(asyncio.to_thread(daemon.tensor, ref))
    assert await asyncio.to_thread(s3_proxy.stalled.wait, 30)
    stopping = asyncio.create_task(asyncio.to_thread(daemon.stop))
    while "draining" not in daemon.log():
        await asyncio.sleep(0.01)  # another process, which tells this in its log alone
    s3_proxy.heal()
    assert (await asking).status == 200
    assert await stopping == 0


async def test_a_second_signal_forces_the_end(stalling: tuple[Daemon, SeriesRef], s3_proxy: S3Proxy) -> None:
    """A request that would hold the drain up for a minute is given up at the second signal; the end is as clean."""
    daemon, ref = stalling
    asking = asyncio.create_task(asyncio.to_thread(daemon.tensor, ref))
    assert await asyncio.to_thread(s3_proxy.stalled.wait, 30)
    stopping = asyncio.create_task(asyncio.to_thread(daemon.stop, 50.0))
    while "draining" not in daemon.log():
        await asyncio.sleep(0.01)  # another process, which tells this in its log alone
    daemon.signal(signal.SIGTERM)
    assert await stopping == 0
    assert not asking.done() or asking.exception() is not None
    with pytest.raises(OSError):
        await asking


async def test_shares_change_at_sighup_and_outlast_a_restart(tmp_path: Path, bucket: Bucket) -> None:
    """The daemon divides its tiers as its settings say then; wrong ones change nothing, and a restart keeps them."""

    def write(serving: float, staging: float) -> Daemon:
        shares = {"namespaces": {"serving": serving, "staging": {"reservation": staging, "ceiling": 1.0}}}
        return Daemon(tmp_path, {"origin": bucket.origin, "ram": shares, "nvme": shares})

    def reserved(daemon: Daemon) -> float:
        lines = daemon.ask("GET", "/metrics").body.decode().splitlines()
        wanted = 'voxcache_tier_reserved_bytes{namespace="staging",tier="ram"}'
        return float(next(line.split()[1] for line in lines if line.startswith(wanted)))

    async def told(daemon: Daemon, said: str) -> None:
        daemon.signal(signal.SIGHUP)
        while said not in daemon.log():
            await asyncio.sleep(0.01)  # another process, which tells this in its log alone

    ref = bucket.series(slices=4)
    with write(0.75, 0.25) as daemon:
        assert reserved(daemon) == 16 * MIB
        assert daemon.tensor(ref).status == 200
        write(0.5, 0.5)
        await told(daemon, "namespaces divided anew")
        assert reserved(daemon) == 32 * MIB
        write(0.9, 0.5)
        await told(daemon, "namespaces not divided anew")
        assert reserved(daemon) == 32 * MIB
        assert daemon.tensor(ref).headers["Voxcache-Tier"] == "ram"
    with write(0.5, 0.5) as daemon:
        assert reserved(daemon) == 32 * MIB


def test_one_daemon_a_state_directory(tmp_path: Path, bucket: Bucket) -> None:
    """A second daemon on the same state directory is refused, and the first goes on."""
    ref = bucket.series(slices=4)
    with Daemon(tmp_path, {"origin": bucket.origin}) as first:
        second = Daemon(tmp_path, {"origin": bucket.origin})
        with pytest.raises(DaemonError, match="another daemon"):
            second.start()
        assert first.tensor(ref).status == 200


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"ram": {"budget": 1 << 50}}, "shared memory"),
        ({"workers": {"plugins": ["nowhere:Op"]}}, "nowhere"),
        ({"ram": {"budget": 64 * MIB, "colour": "red"}}, "colour"),
        ({"server": {"host": "192.0.2.1"}}, "cannot listen"),
    ],
)
def test_what_cannot_work_is_said_at_start(tmp_path: Path, bucket: Bucket, table: dict[str, object], said: str) -> None:
    """The process ends with status 2 and one line that names the setting at fault."""
    Daemon(tmp_path, {"origin": bucket.origin, **table})
    command = [sys.executable, "-m", "serving.cli", "serve", "--config", str(tmp_path / "voxcache.toml")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 2
    assert said in run.stderr.splitlines()[-1]
