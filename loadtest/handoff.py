"""What handing a study over costs: a lease and a view, beside the same bytes from Redis, nginx and diskcache.

All take turns in one run, a few reads in a row, so that a busy machine is as busy for each. The peers are read as
their users read them: redis-py's and diskcache's ``get``, an HTTP response's ``read``. Beside that stand the same
reads by the shortest code there is, into one buffer that is used again and again (``…_tight``): nobody hands out data
like that, but no client could be faster. The lease is what ``Client.tensor`` does, over the hand-off socket; beside it,
the same by HTTP. Three floors: a copy of the bytes within the process, mapping them anew, and a line sent to another
process and back, which whoever asks somebody else has to wait for and diskcache, which reads files, has not. A second
part sends leases at a steady rate, whether or not the earlier ones have been answered: over the socket, by HTTP, and to
an HTTP handler that does nothing.

    python -m loadtest.handoff [--sizes 1,32,128,512] [--rounds N] [--seconds S]

Progress goes to stderr; the last line on stdout is JSON. Raw times: loadtest/results/handoff.json.
"""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import mmap
import os
import platform
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import aiohttp
import diskcache
import numpy as np
import numpy.typing as npt
import redis
import uvloop
from aiohttp import web

from cache.dicom.phantom import write_series
from voxcache_client import Client

from . import servers
from .figures import at_least, plain, quantile, say, summary
from .scenario import on_signal

RESULTS: Final = Path(__file__).resolve().parent / "results" / "handoff.json"
MIB: Final = 1 << 20
SLICE: Final = 512 * 512 * 2
ROUNDS: Final = {1: 300, 32: 60, 128: 20, 512: 5}
PEERS: Final = ("redis", "nginx", "diskcache")
IN_A_ROW: Final = 5
RATE: Final = 500
#: How many times the best peer's median must be the lease's.
BARS: Final = {"128MiB": 100, "1MiB": 1}

Bytes = npt.NDArray[np.uint8]
#: Bytes, or the tensor that they are.
Content = npt.NDArray[Any]
Reader = Callable[[], Content]


# ------------------------------------------------------------------ who is read, and how


class TightRedis:
    """GET over one connection, straight into an array (https://redis.io/docs/latest/develop/reference/protocol-spec/)."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, key: bytes, into: Bytes) -> Bytes:
        self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
        start = self._socket.recv(64)
        head, _, first = start.partition(b"\r\n")
        assert head == b"$%d" % len(into), head
        view = into.data
        view[: len(first)] = first
        _fill(self._socket.recv_into, view[len(first) :])
        end = bytearray(2)
        _fill(self._socket.recv_into, memoryview(end))
        return into


class Nginx:
    """GET over one keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)

    def get(self, name: str) -> Bytes:
        return np.frombuffer(self._ask(name).read(), np.uint8)

    def get_into(self, name: str, into: Bytes) -> Bytes:
        answer = self._ask(name)
        _fill(answer.readinto, into.data)
        answer.read()
        return into

    def _ask(self, name: str) -> http.client.HTTPResponse:
        self._connection.request("GET", f"/{name}")
        answer = self._connection.getresponse()
        assert answer.status == 200, answer.status
        return answer


def _fill(read_into: Callable[[memoryview], int], view: memoryview) -> None:
    while view:
        count = read_into(view)
        assert count, "the connection was closed"
        view = view[count:]


def _from_diskcache(cache: Any, name: str, into: Bytes) -> Bytes:
    with cache.get(name, read=True) as file:
        _fill(file.readinto, into.data)
    return into


class Echo:
    """A process that sends back what it is sent, as soon as it is there: nothing is asked of another one in less."""

    def __init__(self) -> None:
        self._socket, far = socket.socketpair()

        def echo() -> None:
            self._socket.close()
            while line := far.recv(1 << 13):
                far.sendall(line)

        self._child = servers.forked(echo)
        far.close()
        self._line = bytes(600)  # a lease takes as much

    def ask(self) -> Bytes:
        self._socket.sendall(self._line)
        return np.frombuffer(self._socket.recv(1 << 13), np.uint8)

    def close(self) -> None:
        self._socket.close()
        os.waitpid(self._child, 0)


def _mapped(path: Path) -> Bytes:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)


# ------------------------------------------------------------------ part one: turn by turn


class Study(NamedTuple):
    """A phantom whose tensor has ``mib`` MiB."""

    mib: int
    study: str
    series: str


class Readers(NamedTuple):
    """Whoever can be asked for the bytes."""

    client: Client
    http_client: Client
    redis: redis.Redis
    tight_redis: TightRedis
    nginx: Nginx
    diskcache: Any
    shared: Path
    echo: Echo

    def of(self, study: Study) -> dict[str, Reader]:
        """Store the study's bytes everywhere; then every way to read them, each having proved right once."""
        with self.client.tensor(study.study, study.series, "volume") as tensor:
            content: Bytes = tensor.array.reshape(-1).view(np.uint8).copy()
        assert len(content) == study.mib * MIB, len(content)
        name = f"{study.mib}.raw"
        (self.shared / name).write_bytes(content.data)
        self.redis.set(name, content.data)
        self.diskcache.set(name, content.tobytes())
        reused = np.zeros_like(content)  # its pages are in place

        def lease(client: Client) -> Content:
            return client.tensor(study.study, study.series, "volume").array

        def memcpy() -> Bytes:
            np.copyto(reused, content)
            return reused

        readers: dict[str, Reader] = {
            "lease": lambda: lease(self.client),
            "lease_http": lambda: lease(self.http_client),
            "redis": lambda: np.frombuffer(cast(bytes, self.redis.get(name)), np.uint8),
            "redis_tight": lambda: self.tight_redis.get(name.encode(), reused),
            "nginx": lambda: self.nginx.get(name),
            "nginx_tight": lambda: self.nginx.get_into(name, reused),
            "diskcache": lambda: np.frombuffer(self.diskcache.get(name), np.uint8),
            "diskcache_tight": lambda: _from_diskcache(self.diskcache, name, reused),
            "floor_memcpy": memcpy,
            "floor_mmap": lambda: _mapped(self.shared / name),
        }
        for reader, read in readers.items():
            reused[:] = 0
            assert np.array_equal(read().reshape(-1).view(np.uint8), content), f"{reader} gave other bytes"
        return {**readers, "floor_echo": self.echo.ask}


def turns(studies: list[Study], url: str, folder: Path, shared: Path, rounds: int | None) -> dict[str, Any]:
    """Seconds of each read, by size and reader."""
    raw: dict[str, Any] = {}
    with (
        contextlib.closing(Echo()) as echo,  # first, as it forks
        servers.redis(folder) as redis_server,
        servers.nginx(folder, shared) as nginx_server,
        diskcache.Cache(str(folder / "diskcache"), size_limit=1 << 40) as cache,
        Client(url) as client,
        Client(url, socket=False) as http_client,
    ):
        readers = Readers(
            client,
            http_client,
            redis.Redis(port=redis_server.port),
            TightRedis(redis_server.port),
            Nginx(nginx_server.port),
            cache,
            shared,
            echo,
        )
        for study in studies:
            say(f"{study.mib} MiB: filling, then turn by turn")
            raw[f"{study.mib}MiB"] = _take_turns(readers.of(study), rounds or ROUNDS.get(study.mib, 20))
    return raw


def _take_turns(readers: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    names = list(readers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-(-rounds // IN_A_ROW)):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for _ in range(IN_A_ROW):
                start = time.perf_counter()
                content = readers[name]()
                _ = content.item(0), content.item(-1)
                seconds[name].append(time.perf_counter() - start)
                del content
                time.sleep(0.002)  # a lease is given back in the background: that is not the next one's time
    for name in names:
        say(f"  {name:16} p50 {quantile(seconds[name], 0.5):10.3f} ms   p99 {quantile(seconds[name], 0.99):10.3f} ms")
    return seconds


# ------------------------------------------------------------------ part two: a steady rate


Wanted = dict[str, object]
#: Leases, and gives back after the time has been taken.
Once = Callable[[Callable[[], None]], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def by_http(url: str, wanted: Wanted) -> AsyncIterator[Once]:
    """Requests on as many connections as they need at a time."""
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def once(answered: Callable[[], None]) -> None:
            async with session.post("/v1/leases", json=wanted) as answer:
                granted = await answer.json()
                assert answer.status == 201, granted
            answered()
            async with session.delete(f"/v1/leases/{granted['lease']}") as answer:
                assert answer.status == 204

        yield once


@contextlib.asynccontextmanager
async def by_socket(url: str, wanted: Wanted) -> AsyncIterator[Once]:
    """Requests one after another on one connection, without waiting for replies in between."""
    async with aiohttp.ClientSession(url) as session, session.post("/v1/leases", json=wanted) as answer:
        path = (await answer.json())["socket"]
    reader, writer = await asyncio.open_unix_connection(path)
    awaited: dict[int, asyncio.Future[str]] = {}

    async def read() -> None:
        while line := await reader.readline():
            reply = json.loads(line)
            awaited.pop(reply["id"]).set_result(reply["lease"]["lease"])

    async def once(answered: Callable[[], None]) -> None:
        number = next(numbers)
        awaited[number] = asyncio.get_running_loop().create_future()
        writer.write(json.dumps({"op": "lease", "id": number, **wanted}).encode() + b"\n")
        lease = await awaited[number]
        answered()
        writer.write(json.dumps({"op": "release", "lease": lease}).encode() + b"\n")

    numbers = itertools.count(1)
    reading = asyncio.create_task(read())
    try:
        yield once
    finally:
        writer.close()
        await reading


async def steady(asking: contextlib.AbstractAsyncContextManager[Once], seconds: float) -> list[float]:
    """Lease and give back ``RATE`` times a second. Each latency counts from when its request was due."""
    latencies: list[float] = []
    warm_up = RATE
    async with asking as once, asyncio.TaskGroup() as group:
        start = time.perf_counter() + 0.1
        for number in range(warm_up + int(seconds * RATE)):
            due = start + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))

            def answered(due: float = due, counts: bool = number >= warm_up) -> None:
                if counts:
                    latencies.append(time.perf_counter() - due)

            group.create_task(once(answered))
    return latencies


def rates(study: Study, url: str, folder: Path, seconds: float) -> dict[str, list[float]]:
    """Latencies in seconds of the daemon, over the socket and by HTTP, and of an empty handler; two turns each."""
    wanted: Wanted = {"study": study.study, "series": study.series, "recipe": "volume", "ttl_s": 60}
    port = servers.free_port()
    command = [sys.executable, "-m", "loadtest.handoff", "--empty-handler", str(port)]
    with servers.process(command, folder / "empty.log", servers.answers(port, "/readyz")):
        ways = {
            "lease": lambda: by_socket(url, wanted),
            "lease_http": lambda: by_http(url, wanted),
            "empty_handler": lambda: by_http(f"http://127.0.0.1:{port}", wanted),
        }
        raw: dict[str, list[float]] = {name: [] for name in ways}
        for name in [*ways, *ways]:
            say(f"{RATE} leases a second: {name}")
            raw[name] += uvloop.run(steady(ways[name](), seconds / 2))
    return raw


def empty_handler(port: int) -> None:
    """An HTTP server that reads a body of the same size and gives an answer of the same size, and does nothing else."""
    granted = json.dumps({"lease": "0" * 32, "filler": "0" * 500}).encode()

    async def grant(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=201, body=granted, content_type="application/json")

    async def release(_: web.Request) -> web.Response:
        return web.Response(status=204)

    async def ready(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/leases", grant)
    app.router.add_delete("/v1/leases/{lease}", release)
    app.router.add_get("/readyz", ready)
    loop = uvloop.new_event_loop()
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, loop=loop)


# ------------------------------------------------------------------ the run


@contextlib.contextmanager
def folders() -> Iterator[tuple[Path, Path]]:
    """A folder on disk and one in memory (nginx serves from it: no disk slows it down)."""
    with (
        tempfile.TemporaryDirectory(prefix="voxcache-handoff-") as folder,
        tempfile.TemporaryDirectory(prefix="voxcache-handoff-", dir="/dev/shm") as shared,
    ):
        yield Path(folder), Path(shared)


def verdict(raw: dict[str, Any], rate: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, tails, ratios and bars."""
    sizes = {size: {name: summary(seconds) for name, seconds in by.items()} for size, by in raw.items()}
    best = {size: min(PEERS, key=lambda peer: by[peer]["p50_ms"]) for size, by in sizes.items()}
    ratio = {size: by[best[size]]["p50_ms"] / by["lease"]["p50_ms"] for size, by in sizes.items()}
    each = {size: {peer: by[peer]["p50_ms"] / by["lease"]["p50_ms"] for peer in PEERS} for size, by in sizes.items()}
    tight = {
        size: min(by[f"{peer}_tight"]["p50_ms"] for peer in PEERS) / by["lease"]["p50_ms"] for size, by in sizes.items()
    }
    bars = [at_least(f"lease_vs_best_peer_{size}", ratio[size], bar) for size, bar in BARS.items() if size in ratio]
    return {
        "benchmark": "handoff",
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()},
        "sizes": sizes,
        "best_peer": best,
        "lease_vs_best_peer": ratio,
        "lease_vs_each_peer": each,
        "lease_vs_best_peer_tight": tight,
        "lease_vs_echo": {size: by["lease"]["p50_ms"] / by["floor_echo"]["p50_ms"] for size, by in sizes.items()},
        "lease_vs_memcpy": {size: by["floor_memcpy"]["p50_ms"] / by["lease"]["p50_ms"] for size, by in sizes.items()},
        "open_loop": {"rate_per_s": RATE, **{name: summary(seconds) for name, seconds in rate.items()}},
        "bars": plain(bars),
    }


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    parser = argparse.ArgumentParser(prog="handoff", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="1,32,128,512", help="MiB, separated by commas")
    parser.add_argument("--rounds", type=int, help="reads of each size (default: fewer for larger ones)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the steady part, for each of the three")
    parser.add_argument("--empty-handler", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.empty_handler is not None:
        empty_handler(options.empty_handler)
        return 0
    sizes = [int(size) for size in options.sizes.split(",")]
    with folders() as (folder, shared):
        studies = []
        for mib in sizes:
            say(f"{mib} MiB: writing {mib * MIB // SLICE} slices")
            study, series, _ = write_series(
                folder / "origin", slices=mib * MIB // SLICE, rows=512, columns=512, seed=mib
            )
            studies.append(Study(mib, study, series))
        room = sum(sizes) * MIB
        with servers.daemon(folder, folder / "origin", ram=3 * room + 256 * MIB, nvme=4 * room + 1024 * MIB) as url:
            raw = turns(studies, url, folder, shared, options.rounds)
            rate = rates(studies[0], url, folder, options.seconds)
    result = verdict(raw, rate)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**result, "raw_s": {**raw, "open_loop": rate}}) + "\n")
    print(json.dumps(result), flush=True)
    return 0 if all(bar["ok"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
