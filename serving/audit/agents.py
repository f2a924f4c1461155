"""Who does it, as far as the daemon can tell: what a proxy in front says, the peer's address, or the kernel."""

import functools
import socket
import struct
from typing import Any, Final
from urllib.parse import unquote

from aiohttp import web

from .record import Agent

#: pid, uid and gid of the process at the other end of a Unix socket (unix(7), SO_PEERCRED).
_CREDENTIALS: Final = struct.Struct("3i")
_LONGEST_NAME: Final = 200


class Agents:
    """Names agents. ``header``: where a proxy tells who asks, "" for nowhere."""

    def __init__(self, header: str = "") -> None:
        self._header = header.lower()

    def http(self, request: web.Request) -> Agent:
        """Whoever sent an HTTP request."""
        name = request.headers.get(self._header, "") if self._header else ""
        return _agent("http", name, request.remote or "")

    def grpc(self, context: Any) -> Agent:
        """Whoever made a gRPC call."""
        name = ""
        if self._header:
            name = next((str(value) for key, value in context.invocation_metadata() or () if key == self._header), "")
        return _called(context.peer(), name)

    def connection(self, peer: socket.socket) -> Agent:
        """Whoever is at the other end of a Unix socket: the kernel vouches for it."""
        pid, uid, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return Agent("socket", f"uid {uid}, process {pid}")

    def arrival(self, source: str, address: str = "") -> Agent:
        """A source of arrivals, by its name in the settings and routes, and from where it calls."""
        return _agent("arrival", source, address)


@functools.lru_cache(maxsize=4096)  # the same clients ask again and again
def _agent(via: str, name: str, address: str) -> Agent:
    return Agent(via, name[:_LONGEST_NAME], address)


@functools.lru_cache(maxsize=4096)
def _called(peer: str, name: str) -> Agent:
    _, _, place = unquote(peer).partition(":")
    return _agent("grpc", name, place.rpartition(":")[0].strip("[]"))
