"""A real Orthanc announces what it was sent, and the study gets ready without any other call."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Bucket, Daemon
from tests.orthanc import lua, orthanc, scripts

pytestmark = pytest.mark.service


@pytest.mark.parametrize("script", scripts())
async def test_from_orthanc_to_ram(tmp_path: Path, bucket: Bucket, script: Callable[[], dict[str, Any]]) -> None:
    """Once a series is stable the shipped script tells of it, and its tensor is in RAM; deleted there, it goes here."""
    ref = bucket.series(slices=6)
    storage = tmp_path / "orthanc" / "storage"
    table = {
        "origin": {"directory": {"path": str(storage)}},
        "find": {"manifest": "", "template": "", "headers": True},
        "store": {"revalidate": "events"},
        "arrivals": {"warm": ["volume"], "quiet_s": 60.0},
        "webhooks": {"secrets": {"orthanc": {"bearer": "s3cret", "hmac": "k3y"}}},
    }
    (tmp_path / "orthanc").mkdir()
    storage.mkdir()
    with Daemon(tmp_path, table) as daemon:
        told = {"VOXCACHE_ARRIVALS": f"{daemon.url}/v1/arrivals/orthanc"}
        told |= {"VOXCACHE_TOKEN": "s3cret"} if script is lua else {"VOXCACHE_HMAC": "k3y"}
        with orthanc(tmp_path / "orthanc", told, **script()) as archive:
            for file in bucket.files(ref):
                archive.store(file)
            await until(daemon, ref.study, lambda tiers: "ram" in tiers)
            await ready(daemon, ref.study)
            answer = await asyncio.to_thread(daemon.tensor, ref)
            assert (answer.status, answer.headers["Voxcache-Tier"]) == (200, "ram")
            archive.ask("DELETE", f"/series/{archive.series(ref.series)}")
            await until(daemon, ref.study, lambda tiers: not tiers)
        posts = {"route": "/v1/arrivals/{source}"}
        assert daemon.metric("voxcache_requests_total", **posts, status="202") >= 3
        assert [daemon.metric("voxcache_requests_total", **posts, status=bad) for bad in ("400", "401")] == [0, 0]


async def ready(daemon: Daemon, study: str) -> None:
    """Return once the study says that all that it calls for is there."""
    async with asyncio.timeout(240):
        while not (await asyncio.to_thread(daemon.ask, "GET", f"/v1/studies/{study}")).json["ready"]:
            await asyncio.sleep(0.05)  # another process, which tells this only when asked


async def until(daemon: Daemon, study: str, right: Callable[[set[str]], bool]) -> None:
    """Return once the tiers that hold tensors of the study are as they should be."""
    async with asyncio.timeout(240):
        while True:
            entries = (await asyncio.to_thread(daemon.ask, "GET", f"/v1/studies/{study}")).json["entries"]
            if right({entry["tier"] for entry in entries if entry["kind"] == "tensor"}):
                return
            await asyncio.sleep(0.05)  # another process, which tells this only when asked
