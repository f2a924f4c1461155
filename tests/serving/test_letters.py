"""Dead letters over HTTP and at the command line: they can be seen, and tried anew."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.typedefs import Handler

from cache.errors import VoxcacheError, WorkerDied
from serving import cli
from serving.api.letters import DeadLetters
from serving.api.problem import problem
from tests.conformance.queue import A
from tests.serving.test_arrivals import FakeStore, of, until, warming

Client = TestClient[web.Request, web.Application]


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except VoxcacheError as error:
        return problem(error)


@pytest.fixture
def store() -> FakeStore:
    """The workers die of its series A, once."""
    store = FakeStore()
    store.faults = [WorkerDied("died")]
    return store


@pytest.fixture
async def client(tmp_path: Path, store: FakeStore) -> AsyncIterator[Client]:
    """A client of the routes, where one event was tried too often."""
    async with warming(tmp_path / "arrivals.sqlite", store, attempts=1) as (warmer, queue):
        await warmer.accept([of(A, 1)])
        await until(queue, dead=1)
        app = web.Application(middlewares=[problems])
        app.add_routes(DeadLetters(warmer, 1 << 20).routes())
        async with TestClient(TestServer(app)) as client:
            yield client


async def letters(client: Client, query: str = "") -> list[tuple[str, str]]:
    """The id of each, and why it is dead."""
    answer: ClientResponse = await client.get("/v1/dead-letters" + query)
    return [(letter["event"]["id"], letter["reason"]) for letter in (await answer.json())["letters"]]


async def test_over_http(client: Client, store: FakeStore) -> None:
    """They are told with their reason, and go away once they are tried anew, all or by id."""
    assert await letters(client) == await letters(client, "?limit=1") == [("id-1", "worker-died")]
    answer = await client.post("/v1/dead-letters", json={"ids": ["id-7"]})
    assert (answer.status, await answer.json()) == (200, {"requeued": 0})
    answer = await client.post("/v1/dead-letters")
    assert await answer.json() == {"requeued": 1}
    assert await letters(client) == []
    while store.gets < 2:
        await asyncio.sleep(0.001)  # the warmer's tasks bring it about, and tell nobody


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1", ""])
async def test_a_limit_that_is_none(client: Client, limit: str) -> None:
    """It is the caller's fault, and said to be."""
    answer = await client.get(f"/v1/dead-letters?limit={limit}")
    assert answer.status == 400


async def test_at_the_command_line(client: Client, store: FakeStore, capsys: pytest.CaptureFixture[str]) -> None:
    """The command lists them, a line each, and has them tried anew."""
    url = str(client.make_url(""))
    assert await asyncio.to_thread(cli.main, ["dead-letters", "--url", url]) == 0
    assert capsys.readouterr().out.split() == ["id-1", "worker-died", "s3", "created", f"{A.study}/{A.series}/1.dcm"]
    assert await asyncio.to_thread(cli.main, ["dead-letters", "--requeue", "id-1", "--url", url]) == 0
    assert "1 arrivals are tried anew" in capsys.readouterr().out
    while store.gets < 2:
        await asyncio.sleep(0.001)  # the warmer's tasks bring it about, and tell nobody
