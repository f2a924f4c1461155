"""Sends HTTP requests, each due at a time of its own or as fast as so many users can, from several processes.

**Open loop**: requests come when they come, whether or not earlier ones were answered, as a hospital's do. **Closed
loop**: each user sends the next request when the last one is answered, as a batch job does. Both measure from when a
request was due (`loadtest.measures`). What is sent is plain data, so a run can be handed to processes, and kept.
"""

import asyncio
import base64
import contextlib
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, Final, Literal

import aiohttp
import msgspec
import uvloop
import xxhash
from yarl import URL

from .figures import say
from .measures import Answer, Recorder, Snapshot, Track, server_timing, together

#: Seconds that processes may take to start, and between then and the first request.
_START_S: Final = 60.0
_LEAD_S: Final = 0.2
#: Seconds that answers may take when nothing more is sent; what is not there by then is an error.
_GRACE_S: Final = 30.0
_SAY_S: Final = 5.0
_READY: Final = b"R"


class Request(msgspec.Struct, frozen=True):
    """One request. ``then``: "release" gives back the lease that it brings, after it was measured.

    ``digest``: XXH3-64 (hex) that its body must have; "" for any. ``nbytes``: how long it must be; -1 for any.
    ``timeout_s``: when whoever sent it gives up.
    """

    track: str
    url: str
    method: Literal["GET", "POST", "DELETE", "HEAD"] = "GET"
    body: bytes = b""
    headers: dict[str, str] = {}
    then: Literal["", "release"] = ""
    digest: str = ""
    nbytes: int = -1
    timeout_s: float = 120.0


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Open loop: pairs of the second at which a request is due and its place in the list of requests."""

    due: list[tuple[float, int]]


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """Closed loop: ``users`` for ``seconds``, each with requests drawn by ``weights`` (all alike if empty).

    ``in_order``: each user walks through the list instead, from a place of its own. ``think_s``: mean of the pause
    (exponential) between an answer and the next request.
    """

    users: int
    seconds: float
    weights: list[float] = []
    in_order: bool = False
    think_s: float = 0.0


class Load(msgspec.Struct, frozen=True):
    """What to send, and when."""

    requests: list[Request]
    way: Open | Closed
    seed: int = 0

    @property
    def seconds(self) -> float:
        if isinstance(self.way, Closed):
            return self.way.seconds
        return max((due for due, _ in self.way.due), default=0.0)


class _Share(msgspec.Struct, frozen=True):
    """One process's part of a load."""

    load: Load
    number: int
    of: int


Ask = Callable[[Request], Awaitable[Answer]]


def evenly(rate: float, seconds: float, choices: Sequence[int], seed: int = 0) -> Open:
    """``rate`` requests a second at equal distances, drawn from ``choices``."""
    draw = random.Random(seed)  # noqa: S311 - a schedule
    return Open([(number / rate, draw.choice(choices)) for number in range(int(rate * seconds))])


def poisson(rate: float, seconds: float, choices: Sequence[int], seed: int = 0) -> Open:
    """As independent callers come: ``rate`` a second on average, with exponential gaps, drawn from ``choices``."""
    draw = random.Random(seed)  # noqa: S311 - a schedule
    due: list[tuple[float, int]] = []
    at = draw.expovariate(rate)
    while at < seconds:
        due.append((at, draw.choice(choices)))
        at += draw.expovariate(rate)
    return Open(due)


def mixed(*loads: tuple[Sequence[Request], Open]) -> Load:
    """Several open loops at once."""
    requests: list[Request] = []
    due: list[tuple[float, int]] = []
    for some, way in loads:
        due += [(at, number + len(requests)) for at, number in way.due]
        requests += some
    return Load(requests, Open(sorted(due)))


# ------------------------------------------------------------------ within one process


async def _asked(request: Request, ask: Ask, recorder: Recorder, start: float, due: float) -> Answer:
    """What came of a request, which is noted once, whatever it was: also that nothing came before it was cancelled."""
    sent = time.monotonic() - start
    answer = Answer(error="unanswered")
    try:
        answer = await ask(request)
    finally:
        recorder.note(request.track, due, sent, time.monotonic() - start, answer)
    return answer


async def _end(tasks: Collection[asyncio.Task[Any]], most_s: float) -> None:
    """Return when all have ended; those that have not after ``most_s`` are cancelled. Raises: what one of them did."""
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=most_s)
        for task in late:
            task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


async def open_loop(load: Load, way: Open, ask: Ask, recorder: Recorder, start: float) -> None:
    """Send each request when it is due; return when all are answered, or ``_GRACE_S`` after the last was sent."""
    under_way: set[asyncio.Task[Answer]] = set()
    failed: list[asyncio.Task[Answer]] = []

    def over(task: asyncio.Task[Answer]) -> None:
        under_way.discard(task)
        if not task.cancelled() and task.exception() is not None:
            failed.append(task)

    for due, number in way.due:
        if (wait := start + due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        elif len(under_way) % 64 == 0:
            await asyncio.sleep(0)  # late already: what is under way must go on all the same
        request = load.requests[number]
        task = asyncio.create_task(_asked(request, ask, recorder, start, due))
        under_way.add(task)
        task.add_done_callback(over)
    await _end([*failed, *under_way], _GRACE_S)


async def closed_loop(
    load: Load, way: Closed, ask: Ask, recorder: Recorder, start: float, *, first: int = 0, step: int = 1
) -> None:
    """Users ``first``, ``first + step``, … send one request after another until the time is over."""
    end = start + way.seconds
    if (wait := start - time.monotonic()) > 0:
        await asyncio.sleep(wait)

    async def user(number: int) -> None:
        draw = random.Random(f"{load.seed}/{number}")  # noqa: S311 - a schedule
        at = len(load.requests) * number // way.users
        while (now := time.monotonic()) < end:
            if way.in_order:
                request = load.requests[at % len(load.requests)]
                at += 1
            else:
                [request] = draw.choices(load.requests, way.weights or None)
            answer = await _asked(request, ask, recorder, start, now - start)
            if way.think_s:
                await asyncio.sleep(draw.expovariate(1 / way.think_s))
            elif answer.error:
                await asyncio.sleep(0.01)  # a server that is away must not be asked in a loop that never rests

    users = [asyncio.create_task(user(number)) for number in range(first, way.users, step)]
    await _end(users, end - time.monotonic() + _GRACE_S)


class Http:
    """Asks over connections that are kept, as many as are needed at a time."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._releases: set[asyncio.Task[None]] = set()  # leases on their way back: no part of what is measured

    async def drained(self) -> None:
        """Return once all leases are given back, or after 5 s."""
        if self._releases:
            await asyncio.wait(self._releases, timeout=5)

    async def __call__(self, request: Request) -> Answer:
        """What came of it; everything that can go wrong on the way is an answer with an error."""
        try:
            async with asyncio.timeout(request.timeout_s):
                return await self._ask(request)
        except TimeoutError:
            return Answer(error="timeout")
        except (aiohttp.ClientError, OSError) as error:
            return Answer(error=type(error).__name__)
        except (KeyError, ValueError) as error:  # no lease in it, no JSON, a Server-Timing that is none
            return Answer(error=f"malformed: {type(error).__name__}")

    async def _ask(self, request: Request) -> Answer:
        async with self._session.request(
            request.method,
            URL(request.url, encoded=True),
            data=request.body or None,
            headers=request.headers,
            allow_redirects=False,
        ) as answer:
            nbytes = 0
            digest = xxhash.xxh3_64() if request.digest else None
            kept = bytearray() if request.then else None
            async for chunk in answer.content.iter_any():
                nbytes += len(chunk)
                if digest is not None:
                    digest.update(chunk)
                if kept is not None:
                    kept += chunk
            if answer.status >= 300:
                return Answer(error=str(answer.status))
            if digest is not None and digest.hexdigest() != request.digest:
                return Answer(error="wrong bytes")
            if request.nbytes not in (-1, nbytes):
                return Answer(error="wrong length")
            told = Answer(
                nbytes,
                answer.headers.get("Voxcache-Tier", ""),
                server_timing(answer.headers.get("Server-Timing", "")),
            )
        if kept is not None:
            lease = msgspec.json.decode(bytes(kept))["lease"]
            task = asyncio.create_task(self._release(f"{request.url}/{lease}"))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)
        return told

    async def _release(self, url: str) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with self._session.delete(URL(url, encoded=True)):
                pass


async def _work(share: _Share, start: float) -> Snapshot:
    load = share.load
    recorder = Recorder(load.seconds)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    connector = aiohttp.TCPConnector(limit=0, force_close=False)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
        read_bufsize=1 << 20,
    ) as session:
        ask = Http(session)

        async def tell() -> None:
            while True:
                await asyncio.sleep(_SAY_S)
                done, errors = recorder.counted
                now = time.monotonic() - start
                mine = "" if share.of == 1 else f" (1 of {share.of} processes)"
                say(f"    {now:5.0f} s of {load.seconds:.0f}: {done} answered, {errors} errors{mine}")

        telling = asyncio.create_task(tell()) if share.number == 0 else None
        if isinstance(load.way, Open):
            mine = Open(load.way.due[share.number :: share.of])
            await open_loop(load, mine, ask, recorder, start)
        else:
            await closed_loop(load, load.way, ask, recorder, start, first=share.number, step=share.of)
        if telling is not None:
            telling.cancel()
        await ask.drained()
    return recorder.snapshot()


# ------------------------------------------------------------------ all processes


def run(load: Load, processes: int = 1, began: Callable[[float], None] = lambda _: None) -> dict[str, Track]:
    """Send the load; the figures by track. ``began`` is told when it does, on the monotonic clock.

    Raises: RuntimeError: a process failed, or did not end in time.
    """
    command = [sys.executable, "-m", "loadtest.generator"]
    started = []
    limit = load.seconds + 3 * _GRACE_S
    try:
        for number in range(processes):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            started.append(process)
            assert process.stdin is not None
            process.stdin.write(base64.b64encode(msgspec.msgpack.encode(_Share(load, number, processes))) + b"\n")
            process.stdin.flush()
        for process in started:
            _until_ready(process)
        # the machine's monotonic clock is the same for all its processes
        start = time.monotonic() + _LEAD_S
        for process in started:
            assert process.stdin is not None
            process.stdin.write(f"{start}\n".encode())
            process.stdin.flush()
        began(start)
        snapshots = []
        for process in started:
            told, _ = process.communicate(timeout=max(1.0, start + limit - time.monotonic()))
            if process.returncode:
                raise RuntimeError(f"a process of the load generator ended with {process.returncode}")
            snapshots.append(msgspec.msgpack.decode(told, type=Snapshot))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the load did not end within {limit:.0f} s") from None
    finally:
        for process in started:
            process.kill()
            process.wait()
    return together(snapshots, load.seconds)


def _until_ready(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout is not None
    there, _, _ = select.select([process.stdout], [], [], _START_S)
    if not there or os.read(process.stdout.fileno(), 1) != _READY:
        raise RuntimeError("a process of the load generator does not start")


def main() -> int:
    share = msgspec.msgpack.decode(base64.b64decode(sys.stdin.buffer.readline()), type=_Share)
    os.write(sys.stdout.fileno(), _READY)
    start = float(sys.stdin.buffer.readline())
    sys.stdout.buffer.write(msgspec.msgpack.encode(uvloop.run(_work(share, start))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
