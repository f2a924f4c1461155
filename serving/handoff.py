"""Leases over a Unix socket: the shortest way from a program on this node to the arena.

Lines of JSON either way. A tensor that is in RAM is answered as its line is read, without a task. What was leased on a
connection ends with it, so a program that crashes leaves no pin behind.
"""

import asyncio
import contextlib
import grp
import os
import socket
import stat
import time
from pathlib import Path
from typing import Annotated, Final, cast

import msgspec
from aiohttp import web

from cache.errors import BadRequest, ConfigError, Overloaded, VoxcacheError
from cache.stopwatch import Stopwatch, timing

from .api.problem import Problem, problem_of
from .audit import Agent
from .leasing import LeaseAnswer, LeaseRequest, Lessor
from .log import logger
from .recorder import Recorder

#: What a request line may take, in bytes.
LONGEST_LINE: Final = 64 << 10
#: Requests of one connection that may wait for a tensor at a time.
MOST_WAITING: Final = 64
#: What the kernel takes for a path (unix(7): 108 bytes with the zero at its end).
_LONGEST_PATH: Final = 107
_ROUTE: Final = "handoff"


class Lease(LeaseRequest, frozen=True, kw_only=True, tag_field="op", tag="lease"):
    """Lease a tensor. ``id`` comes back in the reply: replies may come in another order than requests."""

    id: int


class Renew(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="renew"):
    """Put a lease's end off."""

    id: int
    lease: str
    ttl_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="release"):
    """Give a lease back. This has no reply, nothing could be done about one that is over already."""

    lease: str


class Granted(msgspec.Struct, frozen=True):
    """The reply to what worked."""

    id: int
    lease: LeaseAnswer


class Failed(msgspec.Struct, frozen=True, omit_defaults=True):
    """The reply to what did not; ``id`` is 0 where the request told none. ``retry_after_s``: where waiting helps."""

    id: int
    problem: Problem
    retry_after_s: float | None = None


class _Numbered(msgspec.Struct):
    id: int = 0


_requests: Final = msgspec.json.Decoder(Lease | Renew | Release)
_encoder: Final = msgspec.json.Encoder()


class Handoff:
    """The listening socket and its connections."""

    def __init__(self, lessor: Lessor, recorder: Recorder, *, drain_s: float) -> None:
        self.lessor = lessor
        self.draining = False
        self.connections: set[_Connection] = set()
        self.recorder = recorder
        self._drain_s = drain_s
        self._deadline = 0.0
        self._path: Path
        self._server: asyncio.Server

    async def listen(self, path: Path, group: str | None, app: web.Application) -> None:
        """Listen at ``path``, for this user and ``group`` (mode 0660), until ``app`` drains.

        From then on there are no new leases, and those under way have ``drain_s`` seconds. A socket that nobody
        listens at any more is replaced.

        Raises:
            ConfigError: the path is too long, is taken by something else, or cannot be made.
        """
        self._path = path
        bound = _bound(path, group)
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: _Connection(self), sock=bound)
        app.on_shutdown.append(self._refuse)
        app.on_cleanup.append(self._drain)

    async def close(self) -> None:
        """End every connection. Leases end with the ledger then, once nothing is written to the arena any more."""
        self._stop_listening()
        waiting = self._waiting()
        for connection in list(self.connections):
            connection.abort()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _refuse(self, app: web.Application) -> None:
        self.draining = True
        self._deadline = time.monotonic() + self._drain_s
        self._stop_listening()

    async def _drain(self, app: web.Application) -> None:
        if waiting := self._waiting():
            await asyncio.wait(waiting, timeout=max(0.0, self._deadline - time.monotonic()))

    def _waiting(self) -> list[asyncio.Task[None]]:
        return [task for connection in self.connections for task in connection.waiting]

    def _stop_listening(self) -> None:
        if self._server.is_serving():
            self._server.close()
            self._path.unlink(missing_ok=True)


class _Connection(asyncio.Protocol):
    """One program that asks."""

    def __init__(self, handoff: Handoff) -> None:
        self.waiting: set[asyncio.Task[None]] = set()
        self._handoff = handoff
        self._lessor = handoff.lessor
        self._recorder = handoff.recorder
        self._held: set[str] = set()  # the leases that were granted here
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._who: Agent

    def abort(self) -> None:
        """End it at once, without its leases."""
        self._held = set()
        self._transport.abort()
        self._end()

    # -- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._who = self._lessor.audit.who.connection(transport.get_extra_info("socket"))
        self._handoff.connections.add(self)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._answer(line)
        if len(self._rest) > LONGEST_LINE:
            # it cannot be told any more where the next request begins
            self._fail(0, BadRequest(f"a request is one line of at most {LONGEST_LINE} bytes"), self._recorder.begin())
            self._transport.close()

    def pause_writing(self) -> None:
        # who does not read its replies is not listened to: they would pile up here
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    # -- requests

    def _answer(self, line: bytes) -> None:
        began = time.perf_counter()
        try:
            request = _requests.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._fail(_number(line), BadRequest(f"the line is no request: {error}"), self._begun(began))
            return
        if isinstance(request, Release):
            self._release(request)
            return
        try:
            if isinstance(request, Renew):
                watch = self._begun(began)
                self._say(Granted(request.id, self._lessor.renew(request.lease, request.ttl_s)), "ram", 200, watch)
            else:
                self._lease(request, began)
        except Exception as error:
            self._fail(request.id, error, self._begun(began))

    def _begun(self, moment: float) -> Stopwatch:
        """The stopwatch of a request that was read at ``moment``: what is answered at once does without one."""
        watch = self._recorder.begin()
        watch.times[0] = moment
        return watch

    def _lease(self, request: Lease, began: float) -> None:
        if self._handoff.draining:
            raise Overloaded("the daemon is about to stop")
        times = [began]
        answer = self._lessor.grant_at_once(request, self._held, self._who, times)
        if answer is not None:
            # the event loop sends once it has called us: whoever waits for the reply need not wait for the counting too
            self._transport.write(_encoder.encode(Granted(request.id, answer)) + b"\n")
            self._loop.call_soon(self._recorder.at_once, times, request.study)
            return
        if len(self.waiting) >= MOST_WAITING:
            raise Overloaded(f"{MOST_WAITING} requests of this connection wait already")
        task = asyncio.create_task(self._wait(request, self._begun(began)))
        self.waiting.add(task)
        task.add_done_callback(self.waiting.discard)

    async def _wait(self, request: Lease, watch: Stopwatch) -> None:
        timing(watch)
        try:
            answer = await self._lessor.grant(request, self._who, self._held)
        except Exception as error:
            self._fail(request.id, error, watch)
        else:
            self._say(Granted(request.id, answer), answer.tier, 201, watch)

    def _release(self, request: Release) -> None:
        try:
            self._lessor.release(request.lease)
        except VoxcacheError as error:
            self._recorder.untimed(_ROUTE, problem_of(error).status)
        else:
            self._recorder.untimed(_ROUTE, 204)

    def _fail(self, number: int, error: Exception, watch: Stopwatch) -> None:
        if not isinstance(error, VoxcacheError):
            logger().error("request broke", route=_ROUTE, exc_info=error)
            error = VoxcacheError("voxcache failed in a way it does not know; its log says more")
        problem = problem_of(error)
        if problem.status >= 500:
            logger().warning("request failed", route=_ROUTE, code=error.code, detail=str(error))
        self._say(Failed(number, problem, error.retry_after_s), "none", problem.status, watch)

    def _say(self, reply: Granted | Failed, tier: str, status: int, watch: Stopwatch) -> None:
        self._transport.write(_encoder.encode(reply) + b"\n")
        self._loop.call_soon(self._recorder.answered, _ROUTE, tier, status, watch)

    def _end(self) -> None:
        self._handoff.connections.discard(self)
        for task in self.waiting:
            task.cancel()
        for lease in list(self._held):
            self._lessor.release(lease)


def _number(line: bytes) -> int:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(line, type=_Numbered).id
    return 0


def _bound(path: Path, group: str | None) -> socket.socket:
    """A socket at ``path`` that nobody can connect to yet: only to listen lets them in. Raises: ConfigError."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(
            f'server.socket: {path} has more than {_LONGEST_PATH} bytes; set a shorter one, or "" for none'
        )
    with contextlib.ExitStack() as undo:
        made = undo.enter_context(socket.socket(socket.AF_UNIX))
        try:
            _remove_stale(path)
            made.bind(str(path))
            undo.callback(path.unlink)
            path.chmod(0o660)
            if group is not None:
                os.chown(path, -1, grp.getgrnam(group).gr_gid)
        except KeyError:
            raise ConfigError(f"there is no group {group!r} to share {path} with") from None
        except OSError as error:
            raise ConfigError(f"server.socket: {path} cannot be made: {error.strerror}") from error
        undo.pop_all()
    return made


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"server.socket: {path} is there already, and no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise ConfigError(f"server.socket: another process listens at {path}")
