"""Objects in an archive: refused with the reason, or brought back once and warmed when they are there."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cache.keys import SeriesRef
from tests.daemon import Answer, Bucket, Daemon
from tests.glacier import Glacier, glacier, origin

pytestmark = [pytest.mark.service, pytest.mark.slow]

FOR_EVER = 1e6


class Cold(msgspec.Struct, frozen=True):
    """A series of four objects in an archive, and the folder of the server that holds it."""

    service: Glacier
    bucket: str
    ref: SeriesRef
    keys: tuple[str, ...]

    def table(self, **restore: Any) -> dict[str, Any]:
        return {
            "origin": origin(self.service, self.bucket),
            "store": {"revalidate": "events"},
            "arrivals": {"warm": ["volume"]},
            "restore": {"days": 1, **restore},
        }

    def restored(self) -> list[dict[str, Any]]:
        """What S3 announces when all objects are back."""
        return [
            {
                "eventSource": "aws:s3",
                "eventName": "ObjectRestore:Completed",
                "eventTime": "2026-01-02T03:04:05Z",
                "s3": {"bucket": {"name": self.bucket}, "object": {"key": key, "size": 1, "eTag": "e"}},
            }
            for key in self.keys
        ]


@pytest.fixture
async def cold(tmp_path: Path, bucket: Bucket) -> AsyncIterator[Cold]:
    async with glacier(tmp_path) as service:
        ref = bucket.series(slices=4, rows=16, columns=16)
        files = {path.relative_to(bucket.path).as_posix(): path.read_bytes() for path in bucket.files(ref)}
        name = await service.bucket()
        await service.archive(name, files)
        yield Cold(service, name, ref, tuple(files))


async def until(ask: Callable[[], Answer], right: Callable[[Answer], bool]) -> Answer:
    async with asyncio.timeout(240):
        while not right(answer := await asyncio.to_thread(ask)):
            await asyncio.sleep(0.05)  # another process, which tells this only when asked
        return answer


def ready(daemon: Daemon, ref: SeriesRef) -> Callable[[], Awaitable[Any]]:
    """Waits until the series' tensor is in RAM, without asking for the tensor."""

    def in_ram(answer: Answer) -> bool:
        return any(entry["tier"] == "ram" and entry["kind"] == "tensor" for entry in answer.json["entries"])

    return lambda: until(lambda: daemon.ask("GET", f"/v1/studies/{ref.study}"), in_ram)


async def test_refused_when_nobody_may_restore(tmp_path: Path, cold: Cold) -> None:
    """The answer is 409, and says whether somebody has asked for the objects; nothing is asked for from here."""
    with Daemon(tmp_path, cold.table()) as daemon:
        refused = await asyncio.to_thread(daemon.tensor, cold.ref)
        assert (refused.status, refused.code, refused.json["restore_requested"]) == (409, "archived", False)
        assert cold.service.asked_for == 0
        async with cold.service.client() as client:
            for key in cold.keys:
                await client.restore_object(Bucket=cold.bucket, Key=key, RestoreRequest={"Days": 1})
        refused = await asyncio.to_thread(daemon.tensor, cold.ref)
        assert (refused.status, refused.code, refused.json["restore_requested"]) == (409, "archived", True)


async def test_restored_and_warmed_when_that_is_announced(tmp_path: Path, cold: Cold) -> None:
    """It is asked for once, whoever wants it and however often; then S3 says that it is there, and it is made ready."""
    with Daemon(tmp_path, cold.table(enabled=True, expected_s=600.0, poll_s=FOR_EVER)) as daemon:
        answers = await asyncio.gather(*(asyncio.to_thread(daemon.tensor, cold.ref) for _ in range(4)))
        assert {(answer.status, answer.code) for answer in answers} == {(202, "restoring")}
        assert 1 <= int(answers[0].headers["Retry-After"]) <= 600
        put = {"Records": [record | {"eventName": "ObjectCreated:Put"} for record in cold.restored()]}
        assert (await asyncio.to_thread(daemon.ask, "POST", "/v1/arrivals/s3", put)).status == 202
        assert (await asyncio.to_thread(daemon.tensor, cold.ref)).status == 202
        inference = {"parameters": {"study": cold.ref.study, "series": cold.ref.series, "recipe": "volume"}}
        assert (await asyncio.to_thread(daemon.ask, "POST", "/v2/models/m.ref/infer", inference)).status >= 400
        assert cold.service.asked_for == len(cold.keys)
        cold.service.thaw()
        news = {"Records": cold.restored()}
        assert (await asyncio.to_thread(daemon.ask, "POST", "/v1/arrivals/s3", news)).status == 202
        await ready(daemon, cold.ref)()
        assert (await asyncio.to_thread(daemon.tensor, cold.ref)).headers["Voxcache-Tier"] == "ram"
        assert cold.service.asked_for == len(cold.keys)
        assert daemon.metric("voxcache_restores_total", what="requested") == 1


async def test_a_look_finds_what_is_not_announced(tmp_path: Path, cold: Cold) -> None:
    """Nobody says that it is there: it is looked for, also after a crash, and asked for no second time."""
    daemon = Daemon(tmp_path, cold.table(enabled=True, poll_s=0.5))
    with daemon:
        assert (await asyncio.to_thread(daemon.tensor, cold.ref)).status == 202
        await asyncio.to_thread(daemon.kill)
    with daemon:
        assert (await asyncio.to_thread(daemon.tensor, cold.ref)).status == 202
        cold.service.thaw()
        await ready(daemon, cold.ref)()
    assert cold.service.asked_for == len(cold.keys)
