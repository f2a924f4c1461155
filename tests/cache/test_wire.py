"""The client for bodies, on real sockets: the memory holds what a server sent, or an error says why it does not."""

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.origin.wire import Answer, Wire

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Framing = Literal["length", "chunks", "close"]

PLAIN = ssl.create_default_context()
GUARD = 0xA5


@contextlib.asynccontextmanager
async def server(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """What follows ``://`` in a URL of a server that does ``serve`` with each connection."""

    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            await serve(reader, writer)
            await writer.drain()

    def began(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(connected(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listening = await asyncio.start_server(began, "127.0.0.1", 0, ssl=tls)
    try:
        host, port = listening.sockets[0].getsockname()
        yield f"{host}:{port}"
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def wire(
    tls: ssl.SSLContext = PLAIN, *, read_timeout_s: float = 60.0, proxy: str | None = None
) -> AsyncIterator[Wire]:
    client = Wire(tls=tls, connect_timeout_s=60.0, read_timeout_s=read_timeout_s, proxy=proxy)
    try:
        yield client
    finally:
        await client.close()


async def request(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


def sends(*pieces: bytes) -> Serve:
    """Answer each request with these, one after another, and keep the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)

    return serve


def once(*pieces: bytes) -> Serve:
    """Answer one request with these, and close the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.writelines(pieces)

    return serve


def answer(body: bytes, framing: Framing) -> bytes:
    match framing:
        case "length":
            return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        case "chunks":
            parts = [body[at : at + 5000] for at in range(0, len(body), 5000)]
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
            return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s0\r\nX-After: 1\r\n\r\n" % chunks
        case "close":
            return b"HTTP/1.1 200 OK\r\n\r\n" + body


OK = answer(b"whole", "length")


async def whole(answer: Answer, size: int) -> bytes:
    memory = bytearray(size)
    count = await answer.into(memoryview(memory))
    assert answer.ended and answer.received == count
    return bytes(memory[:count])


RUN: list[Callable[[Coroutine[Any, Any, None]], None]] = [asyncio.run, uvloop.run]


@pytest.mark.parametrize("run", RUN)
@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(0, 120_000) | st.integers(0, 40),
    framing=st.sampled_from(["length", "chunks", "close"]),
    cuts=st.lists(st.integers(1, 70_000), max_size=6),
    room=st.sampled_from([-1, 0, 1]),
    first=st.sampled_from([None, 0, 7]),
)
def test_every_body_in_every_framing(
    run: Callable[[Coroutine[Any, Any, None]], None],
    *,
    size: int,
    framing: Framing,
    cuts: list[int],
    room: int,
    first: int | None,
) -> None:
    """Memory of its size holds it, however it comes; one byte more stays as it was, one less says there is more."""
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    said = answer(body, framing)
    pieces = []
    for cut in cuts:
        pieces.append(said[:cut])
        said = said[cut:]
    serve = once(*pieces, said) if framing == "close" else sends(*pieces, said)

    async def check() -> None:
        async with server(serve) as place, wire() as client:
            for _ in range(2):
                with await client.get(f"http://{place}/", {}) as got:
                    start = b"" if first is None else await got.read(first)
                    assert start == body[: first or 0]
                    left = body[len(start) :]
                    memory = bytearray([GUARD]) * max(len(left) + room, 0)
                    count = await got.into(memoryview(memory))
                    assert count == len(left) or len(memory) < len(left)
                    assert memory[:count] == left[:count]
                    assert memory[count:] == bytes([GUARD]) * (len(memory) - count)
                    assert got.received == len(start) + count
                    assert got.ended == (len(memory) >= len(left))
                    assert await got.read() == left[count:]
                    assert got.ended

    run(check())


async def test_a_connection_is_used_again() -> None:
    """One connection for answers one after another, another for each at the same time; what did not end is given up."""
    connections = 0
    serve = sends(OK)

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await serve(reader, writer)

    async with server(counted) as place, wire() as client:
        url = f"http://{place}/"
        for _ in range(3):
            with await client.get(url, {}) as got:
                assert await whole(got, 5) == b"whole"
        assert connections == 1
        with await client.get(url, {}) as one, await client.get(url, {}) as two:
            assert await whole(one, 5) == await whole(two, 5) == b"whole"
        assert connections == 2
        for _ in range(2):
            with await client.get(url, {}) as got:
                assert await got.read(2) == b"wh"
                assert not got.ended
        with await client.get(url, {}) as one, await client.get(url, {}) as two:
            assert await whole(one, 5) == await whole(two, 5) == b"whole"
        assert connections == 4


async def test_a_server_that_ends_what_is_idle() -> None:
    """A request on a connection that the server has just closed is made on another; an answer that breaks is not."""
    served = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        await request(reader)
        writer.write(OK)
        await request(reader)  # the next is not answered

    async with server(serve) as place, wire() as client:
        for number in range(1, 4):
            with await client.get(f"http://{place}/", {}) as got:
                assert await whole(got, 5) == b"whole"
            assert served == number
    async with server(once(OK[:-20])) as place, wire() as client:
        with pytest.raises(ConnectionError):
            await client.get(f"http://{place}/", {})


@pytest.mark.parametrize(
    "said",
    [
        b"220 mail ready\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * (1 << 17),
        b"",
    ],
)
async def test_what_is_no_answer(said: bytes) -> None:
    async with server(once(said)) as place, wire() as client:
        with pytest.raises(ConnectionError):
            await client.get(f"http://{place}/", {})


@pytest.mark.parametrize("said", [answer(b"x" * 90_000, "length"), answer(b"x" * 90_000, "chunks")])
async def test_a_body_that_breaks_off(said: bytes) -> None:
    """What came is there and counted; the error says that it is not all."""
    async with server(once(said[:60_000])) as place, wire() as client:
        memory = bytearray(90_000)
        with await client.get(f"http://{place}/", {}) as got:
            with pytest.raises(ConnectionError):
                await got.into(memoryview(memory))
            assert 50_000 < got.received < 60_000
            assert memory.count(b"x") == got.received
            assert not got.ended


async def test_what_comes_before_an_answer_and_after_it() -> None:
    """100 and 103 are no answers; a server that talks on unasked loses its connection, and nobody reads that."""
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with server(sends(early + OK)) as place, wire() as client, asyncio.timeout(60):
        with await client.get(f"http://{place}/", {}) as got:
            assert "link" not in got.headers
            assert await whole(got, 5) == b"whole"
    async with server(sends(OK + OK)) as place, wire() as client:
        for _ in range(3):
            with await client.get(f"http://{place}/", {}) as got:
                assert await whole(got, 5) == b"whole"


@pytest.mark.parametrize("sent", [b"", OK[:10], OK[:-2]])
async def test_a_server_that_pauses(sent: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(sent)
        await reader.read()  # until the client goes

    async with server(serve) as place, wire(read_timeout_s=0.05) as client:
        with pytest.raises(TimeoutError), await client.get(f"http://{place}/", {}) as got:
            await whole(got, 5)


async def test_who_does_not_read_is_sent_no_more() -> None:
    """What nobody has asked for yet waits at the server, all but a little; then it comes, however late."""
    size, sent = 64 << 20, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await request(reader)
        writer.write(answer(b"", "length").replace(b": 0", b": %d" % size))
        piece = bytes([7]) * (1 << 20)
        while sent < size:
            writer.write(piece)
            sent += len(piece)
            await writer.drain()

    async with server(serve) as place, wire(read_timeout_s=0.2) as client:
        with await client.get(f"http://{place}/", {}) as got:
            before = -1
            while before < sent:  # the sockets' buffers are full when no more goes in
                before = sent
                await asyncio.sleep(0.3)
            assert sent < size
            memory = bytearray(size)
            assert await got.into(memoryview(memory)) == size
            assert memory.count(7) == size


@pytest.mark.parametrize("run", RUN)
def test_nothing_is_written_for_a_caller_who_has_gone(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    """Once a caller is cancelled, its memory belongs to somebody else."""

    async def check() -> None:
        more, arrived = asyncio.Event(), asyncio.Event()
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await request(reader)
            writer.write(answer(b"", "length").replace(b": 0", b": 1000000"))
            writer.write(b"x" * 400_000)
            await more.wait()
            with contextlib.suppress(OSError):
                writer.write(b"x" * 600_000)
                await writer.drain()
                await reader.read()
            ended.set()

        async with server(serve) as place, wire() as client:
            memory = bytearray(1_000_000)

            async def fetch() -> None:
                with await client.get(f"http://{place}/", {}) as got:
                    arrived.set()
                    await got.into(memoryview(memory))

            task = asyncio.create_task(fetch())
            await arrived.wait()
            while not memory.count(b"x"):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            memory[:] = bytes(len(memory))
            more.set()
            await ended.wait()
            assert not any(memory)

    run(check())


async def test_an_answer_that_was_closed_says_nothing_more() -> None:
    async with server(sends(OK)) as place, wire() as client:
        with await client.get(f"http://{place}/", {}) as got:
            assert (got.status, got.length) == (200, 5)
        with pytest.raises(ValueError, match="closed"):
            await got.read()


async def test_nobody_smuggles_a_header() -> None:
    async with wire() as client:
        with pytest.raises(ValueError, match="line break"):
            await client.get("http://127.0.0.1:1/", {"If-Match": '"a"\r\nHost: elsewhere'})
        with pytest.raises(ValueError, match="line break"):
            await client.get("http://127.0.0.1:1/ HTTP/1.1\nHost: elsewhere", {})
        with pytest.raises(ValueError, match="no place"):
            await client.get("ftp://127.0.0.1/", {})


# ------------------------------------------------------------------ TLS and proxies


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, with its key, that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + private)
    return path


def serving_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


BODY = bytes(range(256)) * 4000


@pytest.mark.parametrize("run", RUN)
def test_over_tls(run: Callable[[Coroutine[Any, Any, None]], None], certificate: Path) -> None:
    """Bodies over TLS are the same, on one connection; a server that nobody vouches for is none."""

    async def check() -> None:
        trusting = ssl.create_default_context(cafile=str(certificate))
        async with server(sends(answer(BODY, "length")), serving_tls(certificate)) as place:
            async with wire(trusting) as client:
                for _ in range(3):
                    with await client.get(f"https://{place}/", {}) as got:
                        assert await whole(got, len(BODY)) == BODY
            async with wire() as client:
                with pytest.raises(ssl.SSLCertVerificationError):
                    await client.get(f"https://{place}/", {})

    run(check())


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("refuses", [False, True])
def test_through_a_tunnel(run: Callable[[Coroutine[Any, Any, None]], None], certificate: Path, refuses: bool) -> None:
    """A proxy is asked for a tunnel to a server that speaks TLS, by whom it knows; what it sees is not read there."""
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await request(reader)
        asked.append(head)
        if refuses:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        host, _, port = head.split()[1].decode().partition(":")
        there, back = await asyncio.open_connection(host, int(port))

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))

    async def check() -> None:
        trusting = ssl.create_default_context(cafile=str(certificate))
        async with (
            server(sends(answer(BODY, "length")), serving_tls(certificate)) as place,
            server(proxy) as between,
            wire(trusting, proxy=f"http://someone:pass%20word@{between}") as client,
        ):
            if refuses:
                with pytest.raises(ConnectionRefusedError, match="407"):
                    await client.get(f"https://{place}/", {})
                return
            for _ in range(3):
                with await client.get(f"https://{place}/", {}) as got:
                    assert await whole(got, len(BODY)) == BODY
            assert len(asked) == 1
            assert asked[0].startswith(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n".encode())
            assert b"\r\nProxy-Authorization: Basic c29tZW9uZTpwYXNzIHdvcmQ=\r\n" in asked[0]

    run(check())


def test_a_proxy_of_another_kind() -> None:
    with pytest.raises(ValueError, match="no HTTP proxy"):
        Wire(tls=PLAIN, connect_timeout_s=1, read_timeout_s=1, proxy="socks5://127.0.0.1:1080")
