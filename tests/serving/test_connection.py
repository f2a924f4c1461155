"""HTTP to an inference server, against a server that says what a test has it say."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from cache.errors import TritonDown, TritonLost
from serving.connection import Connection, Connections

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nX: y\r\n\r\nbody"


class Server:
    """Answers every request with the next of ``says``; after an empty one it closes the connection."""

    def __init__(self, *says: bytes) -> None:
        self.says = list(says)
        self.go = asyncio.Event()
        self.go.set()
        self.connections = 0
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while self.says:
                self.requests.append(await reader.readuntil(b"question"))
                await self.go.wait()
                writer.write(said := self.says.pop(0))
                if not said.endswith(b"body"):
                    break
            else:
                await reader.read()
        writer.close()


@contextlib.asynccontextmanager
async def talking(server: Server) -> AsyncIterator[Connections]:
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        connections = Connections(f"http://{host}:{port}/base/")
        yield connections
        connections.close()


async def ask(connections: Connections) -> Connection:
    return await connections.post("/v2", "A: b\r\n", b"question")


async def test_a_connection_whose_answer_was_read_is_used_again() -> None:
    """Answers come whole, and one connection does for all that are asked one after another."""
    server = Server(OK, OK)
    async with talking(server) as connections:
        for _ in range(2):
            reply = await (await ask(connections)).reply()
            assert (reply.status, reply.headers["X"], await reply.content.read()) == (200, "y", b"body")
            reply.release()
            reply.release()
        assert server.connections == 1
    assert server.requests[0].startswith(b"POST /base/v2 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert server.requests[0].endswith(b"A: b\r\nContent-Length: 8\r\n\r\nquestion")


async def test_a_connection_whose_answer_was_not_read_is_closed() -> None:
    """What is left of one answer is never taken for the next."""
    server = Server(OK, OK)
    async with talking(server) as connections:
        (await (await ask(connections)).reply()).release()
        assert await (await (await ask(connections)).reply()).content.read() == b"body"
        assert server.connections == 2


async def test_who_is_cancelled_may_ask_again() -> None:
    """The server goes on: its answer is there for whoever asks for it next."""
    server = Server(OK)
    server.go.clear()
    async with talking(server) as connections:
        connection = await ask(connections)
        waiting = asyncio.create_task(connection.reply())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        server.go.set()
        assert await (await connection.reply()).content.read() == b"body"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"x" * 100_000,
    ],
)
async def test_what_is_no_answer_is_a_broken_connection(said: bytes) -> None:
    """It ends early, has no length, or is no HTTP: nobody knows whether the server reads still."""
    async with talking(Server(said)) as connections:
        connection = await ask(connections)
        with pytest.raises(TritonLost):
            await connection.reply()


async def test_half_a_body_is_never_taken_for_a_whole_one() -> None:
    """The connection ends within it: whoever reads is told."""
    async with talking(Server(OK[:-2])) as connections:
        reply = await (await ask(connections)).reply()
        with pytest.raises(TritonLost):
            await reply.content.read()


async def test_a_server_that_is_not_there_is_down() -> None:
    """Nothing was sent then."""
    async with talking(Server()) as connections:
        pass
    with pytest.raises(TritonDown):
        await ask(connections)
