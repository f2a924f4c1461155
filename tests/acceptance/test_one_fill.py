"""N concurrent misses cost one set of origin GETs and one decode, whoever leaves."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from cache.keys import SeriesRef
from tests.daemon import Bucket, Daemon
from tests.services import Mode, S3Proxy

pytestmark = pytest.mark.service

SLICES = 12


@pytest.fixture
async def served(tmp_path: Path, bucket: Bucket, s3_proxy: S3Proxy) -> AsyncIterator[tuple[Daemon, SeriesRef]]:
    """A daemon before the counting proxy before the gateway, and one series in there."""
    ref = bucket.series(slices=SLICES)
    files = {path.relative_to(bucket.path).as_posix(): path.read_bytes() for path in bucket.files(ref)}
    service = s3_proxy.service
    name = await service.bucket(files)
    s3_proxy.counts.clear()
    origin = {"bucket": name, "endpoint_url": service.endpoint, "access_key": service.access_key, "hedge": 0.0}
    table = {
        "origin": {"s3": origin | {"secret_key": service.secret_key}},
        "find": {"manifest": ""},
        "store": {"revalidate": "events"},
    }
    daemon = Daemon(tmp_path, table)
    await asyncio.to_thread(daemon.start)
    try:
        yield daemon, ref
    finally:
        await asyncio.to_thread(daemon.stop)


async def test_a_hundred_misses_cost_one_fill(served: tuple[Daemon, SeriesRef], s3_proxy: S3Proxy) -> None:
    """A hundred callers, the first of which hangs up while the origin stalls: one GET an object, one decode."""
    daemon, ref = served
    path = f"/v1/studies/{ref.study}/series/{ref.series}/tensors/volume"
    s3_proxy.fail("stall", only=".dcm")
    place = urlsplit(daemon.url)
    first = socket.create_connection((place.hostname or "", place.port or 0))
    first.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert await asyncio.to_thread(s3_proxy.stalled.wait, 30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> tuple[int, bytes, str]:
            async with session.get(daemon.url + path) as answer:
                return answer.status, await answer.read(), answer.headers["Voxcache-Tier"]

        asking = [asyncio.create_task(ask()) for _ in range(99)]
        first.close()
        while daemon.metric("voxcache_requests_total", status="499") < 1:  # the daemon has seen the first one leave
            await asyncio.sleep(0.01)  # another process, which tells this only when asked
        s3_proxy.heal()
        answers = await asyncio.gather(*asking)
    assert {status for status, _, _ in answers} == {200}
    assert len({body for _, body, _ in answers}) == 1
    assert s3_proxy.gets(".dcm") == SLICES
    assert s3_proxy.lists() == 1
    assert daemon.metric("voxcache_stage_seconds_count", stage="decode") == 1


async def test_origin_faults_are_typed(served: tuple[Daemon, SeriesRef], s3_proxy: S3Proxy) -> None:
    """Denied is 502, down is 503 with Retry-After, each with its type; healed, the same request is served."""
    daemon, ref = served
    denied, down = (502, "origin-denied"), (503, "origin-down")
    modes: tuple[tuple[Mode, tuple[int, str]], ...] = (("403", denied), ("503", down), ("drop", down))
    for mode, expected in modes:
        s3_proxy.fail(mode, only=".dcm")
        answer = await asyncio.to_thread(daemon.tensor, ref)
        assert (answer.status, answer.code) == expected
        assert ("Retry-After" in answer.headers) == (expected[0] == 503)
    s3_proxy.heal()
    assert (await asyncio.to_thread(daemon.tensor, ref)).status == 200


async def test_a_body_cut_short_is_fetched_again(served: tuple[Daemon, SeriesRef], s3_proxy: S3Proxy) -> None:
    """Bodies that end early are asked for once more, and the volume is whole."""
    daemon, ref = served
    s3_proxy.fail("cut", only=".dcm", times=3)
    assert (await asyncio.to_thread(daemon.tensor, ref)).status == 200
    assert s3_proxy.gets(".dcm") == SLICES + 3
