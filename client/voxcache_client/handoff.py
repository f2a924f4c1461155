"""Leases by the shortest way there is: over the daemon's Unix socket once it is known, by HTTP until then.

The daemon ends what was leased on a connection together with it, so that a crash leaves nothing behind. Therefore each
such lease holds on to its connection, which closes when neither a lease nor the client needs it any more.
"""

import functools
import json
import os
import re
import select
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

from .errors import Unreachable, from_problem
from .spec import Spec
from .transport import Transport

T = TypeVar("T")

#: A reply that is a lease takes some 600 bytes.
_USUAL_REPLY: Final = 1 << 13
#: A lease as the daemon writes it: what is the lease's own comes first, the rest is the same each time. Whatever looks
#: otherwise is read as JSON in full.
_GRANTED: Final = re.compile(rb'{"id":0,"lease":{"lease":"(\w+)","expires":([\d.]+),"tier":"(\w+)",(.+)}}\n', re.DOTALL)


class _Broken(Exception):
    """The connection is over, and with it what was leased on it."""


class Link:
    """One connection to the daemon's socket. It is lent to one request at a time, so replies need no number."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._limit(timeout_s)
        self._socket.connect(path)

    def __del__(self) -> None:
        self._socket.close()

    @property
    def alive(self) -> bool:
        """Whether the daemon's end is still open. Costs about a microsecond."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return not poll.poll(0)

    def ask(self, request: bytes, timeout_s: float) -> bytes:
        """The reply to ``request``. Raises: OSError; BlockingIOError if it does not come in time."""
        self.tell(request, timeout_s)
        reply = self._socket.recv(_USUAL_REPLY)
        while not reply.endswith(b"\n"):
            more = self._socket.recv(_USUAL_REPLY)
            if not more:
                raise ConnectionResetError("the daemon closed the connection")
            reply += more
        return reply

    def tell(self, request: bytes, timeout_s: float) -> None:
        """Send what has no reply. Raises: OSError."""
        if timeout_s != self._timeout_s:
            self._limit(timeout_s)
        self._socket.sendall(request)

    def tell_at_once(self, request: bytes) -> None:
        """As ``tell``, without waiting. Raises: OSError."""
        if self._socket.send(request, socket.MSG_DONTWAIT) < len(request):
            raise BlockingIOError("the daemon does not read")

    def _limit(self, timeout_s: float) -> None:
        # the kernel's own limits: with Python's, a send that must not wait would wait all the same
        seconds = max(timeout_s, 1e-3)
        interval = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, interval)
        self._timeout_s = timeout_s


class Wanted(NamedTuple):
    """What is to be leased, as it is written on the wire."""

    study: str
    series: str
    recipe: str
    namespace: str
    ttl_s: float


class Place(NamedTuple):
    """Where a tensor lies, what it means, and where its daemon can be asked next."""

    shm: str
    offset: int
    spec: Spec
    socket: str

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Place":
        return cls(told["shm"], told["offset"], Spec(told), told.get("socket", ""))


class Grant(NamedTuple):
    """A lease as the daemon tells it: until ``expires`` (Unix seconds), and no longer than ``link`` lasts."""

    lease: str
    expires: float
    tier: str
    place: Place
    link: Link | None


def _line(**request: object) -> bytes:
    return json.dumps(request).encode() + b"\n"


# Who asks often asks for the same: then both the request and most of the reply have been there before.


@functools.lru_cache(maxsize=256)
def _lease_line(wanted: Wanted) -> bytes:
    return _line(op="lease", id=0, **wanted._asdict())


def _release_line(lease: str) -> bytes:
    return b'{"op":"release","lease":"%b"}\n' % lease.encode()


@functools.lru_cache(maxsize=256)
def _place(fields: bytes) -> Place:
    return Place.of(json.loads(b"{%b}" % fields))


def _grant(reply: bytes, link: Link) -> Grant:
    """Raises: VoxcacheError for a refusal; ValueError, KeyError or TypeError for what is no reply."""
    if granted := _GRANTED.fullmatch(reply):
        lease, expires, tier, same = granted.groups()
        return Grant(lease.decode(), float(expires), tier.decode(), _place(same), link)
    told = json.loads(reply)
    _check(told)
    return Grant(told["lease"]["lease"], told["lease"]["expires"], told["lease"]["tier"], Place.of(told["lease"]), link)


def _check(reply: Any) -> None:
    """Raises: VoxcacheError if the reply is a refusal."""
    if "lease" not in reply:
        problem = reply["problem"]
        raise from_problem(problem, problem["status"], reply.get("retry_after_s"))


class Handoff:
    """Asks one daemon for leases, from any thread. What it raises are VoxcacheErrors only.

    Each connection is lent to one request at a time, so there are as many as there were requests at once.
    """

    def __init__(self, transport: Transport) -> None:
        self.timeout_s = transport.timeout_s
        self._transport = transport
        self._path = ""
        self._idle: list[Link] = []
        self._pid = os.getpid()

    def use(self, path: str) -> None:
        """From now on ask at this socket ("" for none). Only for a daemon whose memory was seen to be on this node."""
        self._path = path

    def grant(self, wanted: Wanted) -> Grant:
        """The lease, over a connection or by HTTP."""
        link = self._take(self.timeout_s)
        if link is not None:
            try:
                return self._ask(link, _lease_line(wanted), self.timeout_s, lambda reply: _grant(reply, link))
            except _Broken:
                pass  # a daemon that was started anew says over HTTP where its socket is
        told = self._transport.call("POST", "/v1/leases", wanted._asdict())
        return Grant(told["lease"], told["expires"], str(told["tier"]), Place.of(told), None)

    def renew(self, lease: str, ttl_s: float, timeout_s: float) -> None:
        """Put the lease's end off to ``ttl_s`` seconds from now."""
        link = self._take(timeout_s)
        if link is not None:
            request = _line(op="renew", id=0, lease=lease, ttl_s=ttl_s)
            try:
                return self._ask(link, request, timeout_s, lambda reply: _check(json.loads(reply)))
            except _Broken:
                pass
        self._transport.call("POST", f"/v1/leases/{lease}/renew", {"ttl_s": ttl_s}, timeout_s)
        return None

    def release(self, lease: str, timeout_s: float) -> None:
        """Give the lease back."""
        link = self._take(timeout_s)
        if link is not None:
            try:
                link.tell(_release_line(lease), timeout_s)
            except OSError:
                self._forget()
            else:
                self._idle.append(link)
                return
        self._transport.call("DELETE", f"/v1/leases/{lease}", timeout_s=timeout_s)

    def release_at_once(self, lease: str) -> bool:
        """Give the lease back if that takes neither waiting nor a lock; whether it did. Not for a fork's child."""
        try:
            link = self._idle.pop()
        except IndexError:
            return False
        try:
            link.tell_at_once(_release_line(lease))
        except OSError:
            return False  # the connection is left to its leases: part of the line may have been sent
        self._idle.append(link)
        return True

    def close(self) -> None:
        """Drop the connections. Those with leases stay open until the last of them is given back."""
        self._idle = []

    def _ask(self, link: Link, request: bytes, timeout_s: float, read: Callable[[bytes], T]) -> T:
        try:
            reply = link.ask(request, timeout_s)
            self._idle.append(link)
            return read(reply)
        except BlockingIOError:
            # what comes too late belongs to nobody; the link goes with its last lease, if it has any
            raise Unreachable(f"no answer from {self._path} in {timeout_s:g} s", code="unreachable") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._forget()
            raise _Broken from error

    def _take(self, timeout_s: float) -> Link | None:
        """A connection for one request; None if there is no way to the socket."""
        if self._pid != os.getpid():  # a child of a fork must not talk over its parent's connections
            self._pid, self._idle = os.getpid(), []
        try:
            return self._idle.pop()
        except IndexError:
            pass
        if not self._path:
            return None
        try:
            return Link(self._path, timeout_s)
        except OSError:
            self._forget()
            return None

    def _forget(self) -> None:
        self._path, self._idle = "", []
