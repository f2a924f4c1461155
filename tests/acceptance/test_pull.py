"""Origins that announce nothing: a real Orthanc, a real bucket and a directory are asked; what is new gets ready."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_orthanc import until
from tests.daemon import Bucket, Daemon
from tests.glacier import origin
from tests.orthanc import orthanc
from tests.services import S3Service

pytestmark = [pytest.mark.service, pytest.mark.slow]


async def test_from_a_silent_orthanc(tmp_path: Path, bucket: Bucket) -> None:
    """Its changes are polled; what it went through while the daemon was down is seen after the restart."""
    first, second = bucket.series(slices=3), bucket.series(slices=3, seed=1)
    storage = tmp_path / "orthanc" / "storage"
    storage.mkdir(parents=True)
    with orthanc(tmp_path / "orthanc", {}) as archive:
        table: dict[str, Any] = {
            "origin": {"directory": {"path": str(storage)}},
            "find": {"manifest": "", "template": "", "headers": True},
            "store": {"revalidate": "events"},
            "arrivals": {"warm": ["volume"], "quiet_s": 60.0},
            "pull": {"orthanc": {"url": f"http://127.0.0.1:{archive.port}", "interval_s": 0.2}},
        }
        daemon = Daemon(tmp_path, table)
        with daemon:
            for file in bucket.files(first):
                archive.store(file)
            await until(daemon, first.study, lambda tiers: "ram" in tiers)
            await asyncio.to_thread(daemon.kill)
        for file in bucket.files(second):
            archive.store(file)
        with daemon:
            await until(daemon, second.study, lambda tiers: "ram" in tiers)
            assert daemon.metric("voxcache_arrival_events_total", news="new") == 1  # the first is not told again


async def test_from_a_silent_bucket(tmp_path: Path, bucket: Bucket, s3: S3Service) -> None:
    """New objects are found by listing, and the series they make is warmed."""
    ref = bucket.series(slices=3)
    name = await s3.bucket()
    table = {
        "origin": origin(s3, name),
        "store": {"revalidate": "events"},
        "arrivals": {"warm": ["volume"]},
        "pull": {"listing": {"interval_s": 0.2}},
    }
    with Daemon(tmp_path, table) as daemon:
        await s3.put(name, {path.relative_to(bucket.path).as_posix(): path.read_bytes() for path in bucket.files(ref)})
        await until(daemon, ref.study, lambda tiers: "ram" in tiers)
        async with asyncio.timeout(240):  # the first of them may have been listed, and warmed, before the last
            while await asyncio.to_thread(daemon.metric, "voxcache_arrival_events_total", news="new") < 3:
                await asyncio.sleep(0.05)  # another process, which tells this only when asked
        assert daemon.metric("voxcache_arrival_events_total", news="new") == 3


async def test_what_nobody_announced_is_found(tmp_path: Path, bucket: Bucket) -> None:
    """A study, a late slice and a deletion of which no event came are found by comparing."""
    ref = bucket.series(slices=3)
    table = {
        "origin": bucket.origin,
        "store": {"revalidate": "events"},
        "arrivals": {"warm": ["volume"]},
        "pull": {"reconcile": {"interval_s": 0.2}},
    }

    with Daemon(tmp_path, table) as daemon:
        await until(daemon, ref.study, lambda tiers: "ram" in tiers)
        before = (await asyncio.to_thread(daemon.tensor, ref)).headers["ETag"]
        bucket.series(slices=4, study_uid=ref.study, series_uid=ref.series)
        async with asyncio.timeout(240):
            # it may be refused while it is being written
            while (answer := await asyncio.to_thread(daemon.tensor, ref)).headers.get("ETag", before) == before:
                await asyncio.sleep(0.05)  # another process, which tells this only when asked
        assert answer.status == 200
        for path in bucket.files(ref):
            path.unlink()
        await until(daemon, ref.study, lambda tiers: not tiers)
        assert (await asyncio.to_thread(daemon.tensor, ref)).status == 404
