"""HTTP/1.1 to an inference server, for the calls that are made most: one request at a time over connections it keeps.

A general client does more for each request than Triton takes to answer it: it makes URLs, merges headers, follows
redirects, decides how to send and how to read a body. None of that can happen in an inference on the arena. Source:
RFC 9112; Triton answers inferences with a Content-Length.
"""

import asyncio
from typing import Final, cast
from urllib.parse import urlsplit

from multidict import CIMultiDict

from cache.errors import TritonDown, TritonLost

_CONNECT_S: Final = 5.0
_LONGEST_HEAD: Final = 1 << 16
#: Bytes of a body that wait to be read before the server has to wait, and half as many when it goes on.
_BUFFER: Final = 1 << 20


class Reply:
    """An answer whose head is here. ``content`` reads its ``nbytes``, until ``release``."""

    def __init__(self, connection: "Connection", status: int, headers: CIMultiDict[str], nbytes: int) -> None:
        self.status = status
        self.headers = headers
        self.nbytes = nbytes
        self.content = connection.content
        self._connection: Connection | None = connection

    def release(self) -> None:
        """The answer is done with. Harmless when repeated."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()


class Connections:
    """Connections to one server: those that wait for nothing are used again."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = parts.scheme == "https"
        self._start = f"POST {parts.path.rstrip('/')}"
        self._rest = f" HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n"
        self.idle: list[Connection] = []
        self.open: set[Connection] = set()

    def close(self) -> None:
        """Break off what is under way."""
        for connection in list(self.open):
            connection.abort()

    async def post(self, path: str, headers: str, body: bytes) -> "Connection":
        """Send ``body`` to ``path``, which is quoted already; ``headers`` are whole lines beside those about the body.

        Returns the connection on which the reply comes, once all has been sent without waiting. Cancelled before that,
        nothing has been.

        Raises: TritonDown: it is not reachable.
        """
        # encoded before a connection is taken: what cannot be would leave that neither idle nor in use
        head = f"{self._start}{path}{self._rest}{headers}Content-Length: {len(body)}\r\n\r\n".encode("latin-1")
        connection = self.idle.pop() if self.idle else await self._connected()
        connection.send(head + body)
        return connection

    async def _connected(self) -> "Connection":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self._host, self._port, ssl=self._tls or None
                )
        except (OSError, TimeoutError) as error:
            raise TritonDown(f"Triton does not answer: {error or 'no connection in time'}") from error
        return connection


class Connection(asyncio.Protocol):
    """A connection on which one request at a time is answered."""

    def __init__(self, pool: Connections) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._asked = False  # the head of an answer is still to come
        self._waiter: asyncio.Future[None] | None = None
        self._outcome: Reply | TritonLost | None = None
        self._head = b""
        self._left = 0  # bytes of the body that are still to come
        self._keep = True
        self.content = asyncio.StreamReader(_BUFFER, self._loop)

    def send(self, request: bytes) -> None:
        self._asked, self._outcome = True, None
        self._transport.write(request)

    async def reply(self) -> Reply:
        """The answer to what was sent. Who is cancelled may ask again: the server goes on. Raises: TritonLost."""
        if self._outcome is None:
            self._waiter = self._loop.create_future()
            await self._waiter
        assert self._outcome is not None
        if isinstance(self._outcome, TritonLost):
            raise self._outcome
        return self._outcome

    def release(self) -> None:
        """Wait to be used again, if all of the answer was read."""
        if self not in self._pool.open:
            return
        if self._keep and self.content.at_eof():
            self._pool.idle.append(self)
        else:
            self.abort()

    def abort(self) -> None:
        self._transport.abort()

    # ------------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by inheritance
        self._pool.open.add(self)

    def data_received(self, data: bytes) -> None:
        if self._asked:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                if len(self._head) > _LONGEST_HEAD:
                    self.abort()
                return
            head, data, self._head = self._head[:end], self._head[end + 4 :], b""
            self._begin(head)
        elif not self._left:
            self.abort()  # nothing was asked
            return
        if len(data) > self._left:
            self._keep = False
            data = data[: self._left]
        self._left -= len(data)
        self.content.feed_data(data)
        if not self._left:
            self.content.feed_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.open.discard(self)
        if self in self._pool.idle:
            self._pool.idle.remove(self)
        lost = TritonLost(f"Triton broke off: {exc or 'the connection was closed'}")
        if self._asked:
            self._answered(lost)
        elif self._left:
            self.content.set_exception(lost)

    def _begin(self, head: bytes) -> None:
        """Read the head of an answer, and hand it to whoever waits for it."""
        try:
            first, *lines = head.decode("latin-1").split("\r\n")
            status = int(first.split(" ", 2)[1])
            fields = (line.partition(":")[::2] for line in lines)
            headers = CIMultiDict((name, value.strip()) for name, value in fields)
            nbytes = int(headers["Content-Length"])
            if nbytes < 0:
                raise ValueError(nbytes)
        except (ValueError, LookupError):
            self._answered(TritonLost("Triton broke off: its answer is none that is understood here"))
            self.abort()
            return
        self._left = nbytes
        self._keep = headers.get("Connection", "").lower() != "close"
        self.content = asyncio.StreamReader(_BUFFER, self._loop)
        self.content.set_transport(self._transport)
        self._answered(Reply(self, status, headers, nbytes))

    def _answered(self, outcome: Reply | TritonLost) -> None:
        self._asked, self._outcome = False, outcome
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
