"""GETs whose bodies land where the caller wants them.

An HTTP client hands a body out in pieces of its own making, each of which has to be copied once more. Here an answer
says its length, the caller gives the memory, and the socket is read into it: a body of half a mebibyte costs the loop
that also serves hits half of the processor time. Answers are parsed by llhttp (httptools), but for the bodies whose
length is known. Source: RFC 9110 and 9112; RFC 9110 §9.3.6 for tunnels through a proxy.
"""

import asyncio
import base64
import contextlib
import re
import ssl
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final, cast
from urllib.parse import SplitResult, unquote, urlsplit

import httptools

#: What is read at a time while nobody has said where it goes, and about what is kept of it.
_SCRATCH: Final = 16 << 10
#: Headers end within this many bytes.
_MOST_HEADERS: Final = 64 << 10
#: An idle connection is used again within so many seconds: what lies between the two may have forgotten it later on.
_IDLE_S: Final = 15.0
_PORTS: Final = {"http": 80, "https": 443}
_BREAKS: Final = re.compile(r"[\r\n\0]")


class Answer:
    """What a server says to a GET, its body yet to be read. Use it as a context; once it is over, nothing more comes.

    status, headers: as it says them, names in lower case.
    length: bytes of its body, None where it does not say.
    received: bytes of the body that have been handed out.
    ended: whether that was all of them.
    """

    def __init__(self, connection: "_Connection", done: "Callable[[_Connection], None]") -> None:
        self._connection: _Connection | None = connection
        self._done = done
        self.status = connection.status
        self.headers: Mapping[str, str] = connection.headers
        self.length = connection.length

    @property
    def received(self) -> int:
        return self._open.received

    @property
    def ended(self) -> bool:
        return self._open.ended

    async def into(self, memory: memoryview) -> int:
        """Write the body to ``memory``; the bytes written. What is larger than that is not waited for.

        Raises: OSError: the connection broke or paused for too long before the end.
        """
        return await self._open.into(memory)

    async def read(self, limit: int | None = None) -> bytes:
        """The body, or its first ``limit`` bytes. Raises: OSError, as ``into``."""
        return await self._open.read(limit)

    def close(self) -> None:
        """Have no more of it. A connection whose answer has ended is used again, any other is given up."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._done(connection)

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _open(self) -> "_Connection":
        if self._connection is None:
            raise ValueError("the answer was closed")
        return self._connection


class Wire:
    """A client that GETs over connections which it keeps; as many at a time as there are requests."""

    def __init__(
        self, *, tls: ssl.SSLContext, connect_timeout_s: float, read_timeout_s: float, proxy: str | None = None
    ) -> None:
        """``connect_timeout_s``: that a connection may take; ``read_timeout_s``: that an answer may pause; ``proxy``:
        the URL of an HTTP proxy that everything goes through, with the user's name and password where it wants them.

        Raises: ValueError: another kind of proxy.
        """
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._proxy = urlsplit(proxy if "://" in proxy else f"//{proxy}", "http") if proxy else None
        if self._proxy and (self._proxy.scheme not in _PORTS or not self._proxy.hostname):
            raise ValueError(f"{self._proxy.scheme}://{self._proxy.hostname} is no HTTP proxy")
        self._scratch = memoryview(bytearray(_SCRATCH))  # read and dealt with at once, so one does for all
        self._idle: defaultdict[str, list[_Connection]] = defaultdict(list)
        self._all: set[_Connection] = set()

    async def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """Ask for ``url``, which is sent as it is, and wait for the answer's headers. Redirects are answers.

        Raises: OSError: there is no connection, it broke, or no answer came in time. ValueError: no such request.
        """
        scheme, _, rest = url.partition("://")
        host, _, path = rest.partition("/")
        place = f"{scheme}://{host}"
        through = self._proxy if scheme == "http" else None
        lines = [f"GET {url if through else '/' + path} HTTP/1.1", f"Host: {host}", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += _authorization(through) if through else []
        if any(map(_BREAKS.search, lines)):
            raise ValueError("a URL or header with a line break")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        while True:
            connection = self._kept(place)
            kept = connection is not None
            if connection is None:
                async with asyncio.timeout(self._connect_timeout_s):
                    connection = await self._connect(urlsplit(place))
            try:
                await connection.ask(head)
            except BaseException as failure:
                connection.abort()
                # the server may have closed what it did not need for a while just as this was sent
                if kept and isinstance(failure, ConnectionError) and not connection.heard:
                    continue
                raise
            return Answer(connection, lambda connection: self._over(place, connection))

    async def close(self) -> None:
        """Give up all connections, and wait until they are gone."""
        gone = [connection.gone for connection in self._all]
        for connection in list(self._all):
            connection.abort()
        await asyncio.gather(*gone)

    # ------------------------------------------------------------------ connections

    def _kept(self, place: str) -> "_Connection | None":
        idle = self._idle[place]
        while idle:
            connection = idle.pop()
            if not connection.broken and connection.idle_s < _IDLE_S:
                return connection
            connection.abort()
        return None

    def _over(self, place: str, connection: "_Connection") -> None:
        if connection.reusable:
            self._idle[place].append(connection)
        else:
            connection.abort()

    async def _connect(self, to: SplitResult) -> "_Connection":
        loop = asyncio.get_running_loop()
        tls = self._tls if to.scheme == "https" else None
        if to.scheme not in _PORTS or to.hostname is None:
            raise ValueError(f"{to.scheme}://{to.netloc} is no place to GET from")
        connection = _Connection(loop, self._scratch, self._read_timeout_s)
        try:
            if self._proxy is None:
                await loop.create_connection(lambda: connection, to.hostname, to.port or _PORTS[to.scheme], ssl=tls)
            else:
                proxy = self._proxy
                over = self._tls if proxy.scheme == "https" else None
                port = proxy.port or _PORTS[proxy.scheme]
                await loop.create_connection(lambda: connection, proxy.hostname or "", port, ssl=over)
                if tls is not None:
                    await connection.tunnel(f"{to.hostname}:{to.port or _PORTS[to.scheme]}", _authorization(proxy))
                    await connection.encrypt(tls, to.hostname)
        except BaseException:
            connection.abort()
            raise
        self._all.add(connection)
        connection.gone.add_done_callback(lambda _: self._forget(connection))
        return connection

    def _forget(self, connection: "_Connection") -> None:
        self._all.discard(connection)
        for idle in self._idle.values():
            with contextlib.suppress(ValueError):
                idle.remove(connection)


def _authorization(proxy: SplitResult) -> list[str]:
    if proxy.username is None:
        return []
    said = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return [f"Proxy-Authorization: Basic {base64.b64encode(said.encode()).decode()}"]


class _Connection(asyncio.BufferedProtocol):
    """One connection, and the one answer that is under way on it.

    Until the caller has said where the body goes, and always where its length is not known, what arrives is parsed out
    of the scratch memory and kept, some of it at most. After that it is read to where it goes, past the parser.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, scratch: memoryview, read_timeout_s: float) -> None:
        self._loop = loop
        self._scratch = scratch
        self._read_timeout_s = read_timeout_s
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._failure: OSError | None = None
        self._last = loop.time()
        self._paused = False
        self.gone: asyncio.Future[None] = loop.create_future()
        self._begin(None)

    def _begin(self, parser: httptools.HttpResponseParser | None) -> None:
        self._parser = parser
        self._headed = False
        self._ended = False
        self._keep = False
        self._kept = bytearray()  # of the body, and handed out to nobody yet
        self._to: memoryview | None = None  # the rest of the memory that the body goes to
        self._header_bytes = 0
        self.heard = False
        self.status = 0
        self.headers: dict[str, str] = {}
        self.length: int | None = None
        self.received = 0

    # ------------------------------------------------------------------ for the client

    @property
    def broken(self) -> bool:
        return self._failure is not None or self._transport is None or self._transport.is_closing()

    @property
    def ended(self) -> bool:
        """Whether all of the body was handed out."""
        return self._ended and not self._kept

    @property
    def reusable(self) -> bool:
        return self.ended and self._keep and not self.broken

    @property
    def idle_s(self) -> float:
        return self._loop.time() - self._last

    async def ask(self, head: bytes) -> None:
        """Send a request and wait for the answer's headers. Raises: OSError."""
        if self._transport is None:
            raise self._failure or ConnectionResetError("the connection was closed")
        self._begin(httptools.HttpResponseParser(self))
        self._last = self._loop.time()
        if self._watch is None:
            self._watch = self._loop.call_later(self._read_timeout_s, self._look)
        self._transport.write(head)
        while not self._headed:
            await self._more()

    async def tunnel(self, place: str, headers: list[str]) -> None:
        """Have a proxy pass on what follows to ``place``. Raises: OSError."""
        await self.ask("\r\n".join([f"CONNECT {place} HTTP/1.1", f"Host: {place}", *headers, "\r\n"]).encode())
        if self.status != 200:
            raise ConnectionRefusedError(f"the proxy answered {self.status}")
        self._begin(None)

    async def encrypt(self, tls: ssl.SSLContext, name: str) -> None:
        """Go on over TLS with the server of this name. Raises: OSError."""
        assert self._transport is not None
        self._transport = await self._loop.start_tls(self._transport, self, tls, server_hostname=name)

    async def into(self, memory: memoryview) -> int:
        before = self.received
        try:
            while True:
                count = min(len(self._kept), len(memory))
                memory[:count] = self._kept[:count]
                del self._kept[:count]
                self.received += count
                memory = memory[count:]
                left = None if self.length is None else self.length - self.received
                if self._ended or self._kept or (left is not None and left > len(memory)):
                    return self.received - before
                if left is not None:
                    self._to = memory[:left]  # from here on the socket is read to where the body goes
                await self._more()
        finally:
            self._to = None

    async def read(self, limit: int | None) -> bytes:
        while not self._ended and (limit is None or len(self._kept) < limit):
            await self._more()
        data = bytes(self._kept[:limit])
        del self._kept[: len(data)]
        self.received += len(data)
        return data

    def abort(self) -> None:
        """Give the connection up; from now on nothing is written to anybody's memory."""
        self._fail(ConnectionAbortedError("the connection was given up"))

    # ------------------------------------------------------------------ waiting

    async def _more(self) -> None:
        """Until something has come, all of it where the body is read to where it goes. Raises: OSError."""
        self._check()
        if self._paused and self._transport is not None:
            self._paused = False
            self._last = self._loop.time()
            self._transport.resume_reading()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        self._check()

    def _check(self) -> None:
        if self._failure is not None and not self._ended:
            raise self._failure

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self) -> None:
        self._ended = True
        self._to = None
        self._unwatch()
        self._last = self._loop.time()

    def _fail(self, failure: OSError) -> None:
        self._to = None
        self._failure = self._failure or failure
        self._unwatch()
        if self._transport is not None:
            self._transport.abort()
        elif not self.gone.done():
            self.gone.set_result(None)
        self._wake()

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _look(self) -> None:
        """Whether the server has paused for too long."""
        self._watch = None
        left = self._read_timeout_s if self._paused else self._last + self._read_timeout_s - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
        else:
            self._fail(TimeoutError(f"nothing came for {self._read_timeout_s} s"))

    # ------------------------------------------------------------------ called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._failure is not None:  # given up before it was there
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._scratch if self._to is None else self._to

    def buffer_updated(self, nbytes: int) -> None:
        if self._failure is not None:
            return
        self._last = self._loop.time()
        if self._to is not None:
            self.received += nbytes
            self._to = self._to[nbytes:]
            if not len(self._to):
                self._end()
                self._wake()
            return
        self.heard = True
        if self._parser is None or self._ended:
            self._fail(ConnectionError("the server said something that nobody had asked for"))
            return
        self._header_bytes += 0 if self._headed else nbytes
        try:
            self._parser.feed_data(self._scratch[:nbytes])
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the server does not speak HTTP: {error}"))
            return
        if not self._headed and self._header_bytes > _MOST_HEADERS:
            self._fail(ConnectionError("the server's headers have no end"))
        elif len(self._kept) >= _SCRATCH and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        if self._headed and self.length is None and "transfer-encoding" not in self.headers and not self._ended:
            self._end()  # such a body ends with the connection (RFC 9112 §6.3)
            self._keep = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(exc if isinstance(exc, OSError) else ConnectionResetError("the server closed the connection"))

    # ------------------------------------------------------------------ called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._headed:  # what comes after a body is no header of it
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        if self._ended:
            self._keep = False  # it says more than it was asked: what comes next would be the answer to nothing
            return
        self.status = self._parser.get_status_code()
        if self.status < 200:  # there is more to come than this
            self.headers.clear()
            return
        self._headed = True
        self._keep = self._parser.should_keep_alive()
        length = self.headers.get("content-length", "")
        if length.isdecimal() and "transfer-encoding" not in self.headers:
            self.length = int(length)

    def on_body(self, body: bytes) -> None:
        if not self._ended:
            self._kept += body

    def on_message_complete(self) -> None:
        if self._headed:
            self._end()
