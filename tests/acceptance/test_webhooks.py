"""The webhooks of a running daemon under what nobody would send, and under more than it can take at a time."""

import asyncio
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from serving.arrivals.sources import SOURCES
from tests.daemon import Bucket, Daemon

pytestmark = [pytest.mark.service, pytest.mark.slow]

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_nothing_that_follows_the_description_breaks_it(tmp_path: Path, daemon: Daemon) -> None:
    """Requests made up from the OpenAPI description, right and wrong ones, get no 5xx and only answers it tells of."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{daemon.url}/openapi.json"),
            *("--include-path-regex", "^/v1/arrivals/", "--mode", "all", "--checks", CHECKS),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "1", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"Selected: {len(SOURCES) + 1}/" in done.stdout  # each source, and the question that precedes CloudEvents
    assert daemon.metric("voxcache_arrival_events_total", news="new") > 0


async def test_a_burst_is_taken_without_loss(tmp_path: Path, bucket: Bucket) -> None:
    """Of 10 000 events posted at full speed each is taken once; what is too much at a time is told to come again."""
    posts = [
        b'{"Records":[' + b",".join(record(f"1.2/1.2.{post}/{n}.dcm") for n in range(20)) + b"]}" for post in range(500)
    ]
    table = {"origin": bucket.origin, "webhooks": {"max_bytes": 4 * len(posts[0])}, "arrivals": {"quiet_s": 600.0}}
    shed = 0
    with Daemon(tmp_path, table) as daemon:

        async def send(session: aiohttp.ClientSession, body: bytes) -> None:
            nonlocal shed
            while True:
                async with session.post(f"{daemon.url}/v1/arrivals/s3", data=body) as answer:
                    if answer.status == 202:
                        assert await answer.json() == {"accepted": 20, "new": 20}
                        return
                    assert (answer.status, answer.headers["Retry-After"]) == (429, "2")
                    shed += 1

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=32)) as session:
            await asyncio.gather(*(send(session, body) for body in posts))
        assert shed > 0
        assert daemon.metric("voxcache_arrival_events_total", news="new") == 10_000
        assert daemon.metric("voxcache_arrival_events_total", news="repeat") == 0


def record(key: str) -> bytes:
    """One record of a notification of an S3 store."""
    return (
        b'{"eventName":"ObjectCreated:Put","eventTime":"2026-01-02T03:04:05Z","s3":{"bucket":{"name":"dicom"},'
        b'"object":{"key":"' + key.encode() + b'","size":525312,"eTag":"d41d8cd98f00b204e9800998ecf8427e"}}}'
    )
