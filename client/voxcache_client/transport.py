"""HTTP with the standard library: one keep-alive connection a thread, answers as JSON or straight into an array."""

import http.client
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from .errors import Unreachable, from_answer

#: A dropped idle connection shows as one of these, before any byte of an answer.
_DROPPED: Final = (http.client.RemoteDisconnected, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
_LONGEST_LINE: Final = 1 << 16


class _Answer(http.client.HTTPResponse):
    """An answer whose head becomes a plain dict, names in lower case. The standard library's parser of e-mail headers
    alone takes as long as the daemon does to grant a lease.
    """

    def begin(self) -> None:
        """Read the head (RFC 9112 §4 to §6), after which the body can be read as usual."""
        line = self._line()
        if not line:
            raise http.client.RemoteDisconnected("the connection was closed without an answer")
        if not re.match(rb"HTTP/1\.[01] \d{3}\b", line):
            raise http.client.BadStatusLine(repr(line[:80]))
        self.version = 10 if line.startswith(b"HTTP/1.0") else 11
        self.status = int(line[9:12])
        self.head: dict[str, str] = {}
        while line := self._line().rstrip(b"\r\n"):
            name, _, value = line.partition(b":")
            self.head[name.decode("latin-1").lower()] = value.strip().decode("utf-8", "replace")
            if len(self.head) > 200:
                raise http.client.HTTPException("more than 200 headers")
        self.chunked = self.head.get("transfer-encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.length = None if self.chunked or "content-length" not in self.head else int(self.head["content-length"])
        if self.status in (204, 304):
            self.length = 0
        endless = self.length is None and not self.chunked
        self.will_close = endless or self.version == 10 or "close" in self.head.get("connection", "").lower()

    def _line(self) -> bytes:
        line: bytes = self.fp.readline(_LONGEST_LINE + 1)
        if len(line) > _LONGEST_LINE:
            raise http.client.LineTooLong("header line")
        return line


class _Link:
    """A thread's connection. It is closed when the thread, or the transport, is gone."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self.connection = connection
        self.pid = os.getpid()

    def __del__(self) -> None:
        self.connection.close()


class Transport:
    """Requests to one daemon, from any thread. All of them raise VoxcacheErrors only."""

    def __init__(self, url: str, token: str | None, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// address")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._base = parts.hostname, parts.port, parts.path.rstrip("/")
        place = parts.netloc.rpartition("@")[2]
        self._fixed = f"Host: {place}\r\nAccept-Encoding: identity\r\n"
        if token is not None:
            self._fixed += f"Authorization: Bearer {token}\r\n"
        if not re.fullmatch(r"[!-~]*", place + self._base + (token or "")):
            raise ValueError("blanks and control characters cannot be part of an address or a token")
        self._url = f"{parts.scheme}://{place}{self._base}"
        self._links = threading.local()
        self.timeout_s = timeout_s

    def call(
        self, method: str, path: str, content: Mapping[str, object] | None = None, timeout_s: float | None = None
    ) -> Any:
        """The JSON answer to a request, or None if the answer is empty."""
        body = None if content is None else json.dumps(content).encode()
        answer = self._ask(method, path, "application/json", body, timeout_s)
        try:
            received = answer.read()
            return json.loads(received) if received else None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._broken(error) from error

    def fetch(self, path: str, size: Callable[[dict[str, str]], int]) -> tuple[dict[str, str], npt.NDArray[np.uint8]]:
        """The headers (names in lower case) and the body of a GET.

        The body goes from the socket into the array it stays in; ``size`` tells its bytes, from the headers.
        """
        answer = self._ask("GET", path, "application/octet-stream", None, None)
        try:
            body = np.empty(size(answer.head), np.uint8)
            rest = body.data
            while rest:
                count = answer.readinto(rest)
                if not count:
                    raise http.client.IncompleteRead(b"", len(rest))
                rest = rest[count:]
            if answer.read(1):
                raise http.client.HTTPException(f"more than {len(body)} bytes came")
        except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
            raise self._broken(error) from error
        return answer.head, body

    def close(self) -> None:
        """Drop the connections of all threads. The next request makes a new one."""
        self._links = threading.local()

    def _ask(self, method: str, path: str, accept: str, body: bytes | None, timeout_s: float | None) -> _Answer:
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._fixed}Accept: {accept}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            answer = self._send(f"{head}\r\n".encode() + (body or b""), timeout_s or self.timeout_s)
            if answer.status < 300 and answer.status != 202:  # not yet: its objects are on their way from an archive
                return answer
            received = answer.read()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._broken(error) from error
        raise from_answer(answer.status, answer.head.get("retry-after"), received)

    def _send(self, request: bytes, timeout: float) -> _Answer:
        link = self._link(timeout)  # held until the answer has begun: close() may take it from the thread
        connection = link.connection
        reused = connection.sock is not None
        try:
            return self._exchange(connection, request)
        except _DROPPED:
            if not reused:
                raise
        # The daemon closed a connection that had been idle. A second failure is no longer that.
        connection.close()
        return self._exchange(connection, request)

    def _exchange(self, connection: http.client.HTTPConnection, request: bytes) -> _Answer:
        if connection.sock is None:
            connection.connect()
        connection.sock.sendall(request)  # head and body at once: the daemon wakes up once, not twice
        answer = _Answer(connection.sock)
        answer.begin()
        if answer.will_close:
            connection.close()  # the answer holds the socket for as long as it is read
        return answer

    def _link(self, timeout: float) -> _Link:
        link: _Link | None = getattr(self._links, "link", None)
        if link is None or link.pid != os.getpid():  # a child of a fork must not talk over its parent's socket
            link = self._links.link = _Link(self._kind(self._host, self._port, timeout=timeout))
        connection = link.connection
        if connection.sock is not None and connection.timeout != timeout:
            connection.sock.settimeout(timeout)
        connection.timeout = timeout
        return link

    def _broken(self, error: Exception) -> Unreachable:
        self._links.link = None  # half of an answer may still be in it
        reason = str(error) or type(error).__name__
        return Unreachable(f"no complete answer from {self._url}: {reason}", code="unreachable")
