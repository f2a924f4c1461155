"""What it costs that the daemon watches itself, and whether it tells the truth.

    agree     the p99 of one run, by tier: as the load's own samples have it, as the daemon's rolling histogram has it
              (/v1/stats), and as a real Prometheus has it, which scrapes the daemon
    cost      RAM hits on a daemon that counts, times, traces and keeps everything, with a Prometheus that scrapes it
              every fifteen seconds, beside one that does none of it: turn by turn, by the hand-off socket and HTTP

    python -m loadtest.observe [--parts agree,cost] [--rounds N] [--hits N]

The requests of ``agree`` are leases over an origin that takes 100 ms for each of its answers, so that what is measured
is the daemon, and not how soon this process wakes. Progress goes to stderr; the last line on stdout is JSON. Raw times:
loadtest/results/observe.json.
"""

import argparse
import asyncio
import contextlib
import http.client
import http.server
import itertools
import json
import math
import os
import platform
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import uvloop

from cache.dicom.phantom import write_series
from serving.demo.daemon import DaemonProcess

from . import servers
from .figures import Bar, at_least, at_most, plain, quantile, say, summary
from .scenario import on_signal

RESULTS: Final = Path(__file__).resolve().parent / "results" / "observe.json"
MIB: Final = 1 << 20
PARTS: Final = ("agree", "cost")

AT_MOST_APART: Final = 0.05
LEAST_THROUGHPUT: Final = 0.95
MOST_P99: Final = 1.1

MISSES: Final = 200
#: Requests that wait for an answer at a time, one after another.
CONCURRENCY: Final = (4, 16, 32)
#: In a turn, over each way: requests one after another, and as many at a time as WINDOW.
ALONE: Final = {"socket": 400, "http": 150}
TOGETHER: Final = {"socket": 1600, "http": 300}
WINDOW: Final = 16


class Study(NamedTuple):
    """A phantom to ask for."""

    study: str
    series: str

    def lease(self, ttl_s: float) -> dict[str, object]:
        return {"study": self.study, "series": self.series, "recipe": "volume", "ttl_s": ttl_s}


def phantoms(folder: Path, count: int) -> list[Study]:
    found = []
    for seed in range(count):
        study, series, _ = write_series(folder, slices=3, rows=64, columns=64, seed=seed)
        found.append(Study(study, series))
    return found


# ------------------------------------------------------------------ Prometheus


class Prometheus:
    """What a real one answers."""

    def __init__(self, port: int) -> None:
        self._port = port

    def value(self, query: str) -> float | None:
        """The one value of an instant query; None if it has none yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", "/api/v1/query?" + urllib.parse.urlencode({"query": query}))
            found = json.loads(connection.getresponse().read())["data"]["result"]
        finally:
            connection.close()
        return float(found[0]["value"][1]) if found else None


@contextlib.contextmanager
def prometheus(folder: Path, url: str, every_s: int) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the daemon at ``url``."""
    port = servers.free_port()
    config = folder / "prometheus.yml"
    target = urllib.parse.urlsplit(url).netloc
    config.write_text(
        f"global: {{scrape_interval: {every_s}s}}\n"
        f"scrape_configs: [{{job_name: voxcache, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with servers.process(command, folder / "prometheus.log", servers.answers(port, "/-/ready")):
        yield Prometheus(port)


# ------------------------------------------------------------------ agree


async def leases(url: str, wanted: Sequence[Study], at_a_time: int, tier: str) -> list[float]:
    """Seconds of a lease on each of ``wanted``, all of which ``tier`` must answer."""
    taken: list[float] = []
    todo = iter(wanted)

    async def ask(session: aiohttp.ClientSession) -> None:
        for study in todo:
            start = time.perf_counter()
            async with session.post("/v1/leases", json=study.lease(0.2)) as answer:
                granted = await answer.json()
            taken.append(time.perf_counter() - start)
            assert granted["tier"] == tier, granted

    async with (
        aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(at_a_time):
            group.create_task(ask(session))
    return taken


def agree(folder: Path, hits: int) -> dict[str, Any]:
    """The p99 in milliseconds by tier, as each of the three tells it, and the raw seconds."""
    say(f"agree: {MISSES} misses, {hits} hits")
    studies = phantoms(folder / "origin", MISSES)
    faults = '[store]\nrevalidate = "request"\n[leases]\ngrace_s = 0.1\n[faults.origin]\ndelay_s = 0.1'
    raw: dict[str, list[float]] = {"ram": []}
    with (
        servers.daemon(folder, folder / "origin", ram=128 * MIB, nvme=512 * MIB, extra=faults) as url,
        prometheus(folder, url, every_s=1) as prom,
    ):
        raw["origin"] = uvloop.run(leases(url, studies, 2, "origin"))
        for at_a_time in CONCURRENCY:
            say(f"  {at_a_time} at a time")
            wanted = list(itertools.islice(itertools.cycle(studies), hits // len(CONCURRENCY)))
            raw["ram"] += uvloop.run(leases(url, wanted, at_a_time, "ram"))
        for tier, seconds in raw.items():
            deadline = time.monotonic() + 60
            while prom.value(f'sum(voxcache_tier_seconds_count{{tier="{tier}"}})') != len(seconds):
                assert time.monotonic() < deadline, "Prometheus has not seen all requests"
                time.sleep(0.2)  # it scrapes when it does, and tells this only when asked
        query = 'histogram_quantile(0.99, sum by (le) (voxcache_tier_seconds_bucket{{tier="{}"}}))'
        scraped = {tier: prom.value(query.format(tier)) for tier in raw}
        stats = _get(url, "/v1/stats")
    inside = {each["name"]: each["windows"]["1h"] for each in stats["latency"] if each["of"] == "request"}
    told: dict[str, Any] = {}
    for tier, seconds in raw.items():
        assert inside[tier]["n"] == len(seconds)
        p99 = {
            "samples": quantile(seconds, 0.99),
            "in_process": inside[tier]["p99_ms"],
            "prometheus": (scraped[tier] or math.nan) * 1e3,
        }
        told[tier] = {"n": len(seconds), "p99_ms": p99, "apart": max(p99.values()) / min(p99.values()) - 1}
        say(f"  {tier}: {', '.join(f'{name} {ms:.2f} ms' for name, ms in p99.items())}")
    return {"tiers": told, "raw_s": raw}


def _get(url: str, path: str) -> Any:
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


# ------------------------------------------------------------------ cost


class BySocket:
    """Leases over the hand-off socket."""

    def __init__(self, url: str, study: Study) -> None:
        self._line = json.dumps({"op": "lease", "id": 1, **study.lease(60)}).encode() + b"\n"
        first = ByHttp(url, study).grant()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(first["socket"])
        self._replies = self._socket.makefile("rb")

    def alone(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self._socket.sendall(self._line)
            reply = self._replies.readline()
            seconds.append(time.perf_counter() - start)
            self._release([reply])
        return seconds

    def together(self, count: int) -> float:
        """How many a second."""
        start = time.perf_counter()
        for _ in range(count // WINDOW):
            self._socket.sendall(self._line * WINDOW)
            self._release([self._replies.readline() for _ in range(WINDOW)])
        return count / (time.perf_counter() - start)

    def _release(self, replies: list[bytes]) -> None:
        told = [{"op": "release", "lease": json.loads(reply)["lease"]["lease"]} for reply in replies]
        self._socket.sendall(b"".join(json.dumps(each).encode() + b"\n" for each in told))


class ByHttp:
    """Leases by HTTP, over one connection."""

    def __init__(self, url: str, study: Study) -> None:
        place = urllib.parse.urlsplit(url)
        self._connection = http.client.HTTPConnection(place.hostname or "", place.port)
        self._body = json.dumps(study.lease(60))

    def grant(self) -> Any:
        self._connection.request("POST", "/v1/leases", self._body)
        answer = self._connection.getresponse()
        granted = json.loads(answer.read())
        assert answer.status == 201, granted
        return granted

    def alone(self, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            granted = self.grant()
            seconds.append(time.perf_counter() - start)
            self._release(granted)
        return seconds

    def together(self, count: int) -> float:
        """How many a second, one after another: HTTP answers one at a time on a connection."""
        start = time.perf_counter()
        for _ in range(count):
            self._release(self.grant())
        return count / (time.perf_counter() - start)

    def _release(self, granted: Any) -> None:
        self._connection.request("DELETE", f"/v1/leases/{granted['lease']}")
        self._connection.getresponse().read()


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """Where spans may be sent."""

    class Take(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Take)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


ALL_OFF: Final = "[observe]\nrecord = false\nslow_kept = 0\n[log]\nslow_ms = 1e9\n[audit]\nenabled = false"


def cost(folder: Path, rounds: int) -> dict[str, Any]:
    """RAM hits by way and by whether the daemon watches itself: latencies, and how many a second."""
    origin = folder / "origin"
    [study] = phantoms(origin, 1)
    sides: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        spans = stack.enter_context(collector())
        for side, extra in (("on", f'[tracing]\nendpoint = "{spans}"'), ("off", ALL_OFF)):
            place = folder / side
            place.mkdir()
            config = servers.settings(place, origin, ram=64 * MIB, nvme=256 * MIB, extra=extra)
            daemon = stack.enter_context(DaemonProcess(config, place / "voxcache.log"))
            if side == "on":
                stack.enter_context(prometheus(place, daemon.url, every_s=15))
            sides[side] = {
                "http": ByHttp(daemon.url, study),
                "socket": BySocket(daemon.url, study),
                "pid": daemon.pid,
            }
        return {way: _turns(way, sides, rounds) for way in ALONE}


def _turns(way: str, sides: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    raw: dict[str, Any] = {side: {"alone_s": [], "per_s": [], "cpu_s": []} for side in sides}
    for turn in range(rounds + 1):
        for side in sorted(sides, reverse=bool(turn % 2)):
            before = _cpu_s(sides[side]["pid"])
            alone, per_s = sides[side][way].alone(ALONE[way]), sides[side][way].together(TOGETHER[way])
            if turn:  # the first is to get warm
                raw[side]["alone_s"] += alone
                raw[side]["per_s"].append(per_s)
                raw[side]["cpu_s"].append((_cpu_s(sides[side]["pid"]) - before) / (ALONE[way] + TOGETHER[way]))
    for side, seen in raw.items():
        p50, p99 = (quantile(seen["alone_s"], share) for share in (0.5, 0.99))
        say(f"  {way} {side:3}: p50 {p50:.3f} ms, p99 {p99:.3f} ms, {statistics.median(seen['per_s']):.0f} a second")
    return raw


def _cpu_s(pid: int) -> float:
    """Seconds that the process's threads have run (proc(5), schedstat): what others do on the machine is none of it."""
    return sum(int(each.read_text().split()[0]) for each in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


# ------------------------------------------------------------------ the run


def verdict(raw: dict[str, Any]) -> dict[str, Any]:
    """Figures and bars."""
    bars: list[Bar] = []
    figures: dict[str, Any] = {}
    if "agree" in raw:
        figures["agree"] = raw["agree"]["tiers"]
        bars += [at_most(f"p99_apart_{tier}", told["apart"], AT_MOST_APART) for tier, told in figures["agree"].items()]
    if "cost" in raw:
        figures["cost"] = {}
        for way, sides in raw["cost"].items():
            told = {
                side: {**summary(seen["alone_s"]), "per_s": statistics.median(seen["per_s"])}
                for side, seen in sides.items()
            }
            # neighbours in time are as disturbed as each other: each turn is compared with its own
            pairs = zip(sides["on"]["per_s"], sides["off"]["per_s"], strict=True)
            throughput = statistics.median(on / off for on, off in pairs)
            p99 = told["on"]["p99_ms"] / told["off"]["p99_ms"]
            p50 = told["on"]["p50_ms"] / told["off"]["p50_ms"]
            cpu_us = {side: statistics.median(seen["cpu_s"]) * 1e6 for side, seen in sides.items()}
            figures["cost"][way] = {**told, "throughput": throughput, "p50": p50, "p99": p99, "cpu_us": cpu_us}
            bars.append(at_least(f"throughput_{way}", throughput, LEAST_THROUGHPUT))
            bars.append(at_most(f"p99_{way}", p99, MOST_P99))
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()}
    return {"benchmark": "observe", "machine": machine, **figures, "bars": plain(bars)}


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    parser = argparse.ArgumentParser(prog="observe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each side in the second part")
    parser.add_argument("--hits", type=int, default=3000, help="hits in the first part")
    options = parser.parse_args()
    parts: dict[str, Callable[[Path], Any]] = {
        "agree": lambda folder: agree(folder, options.hits),
        "cost": lambda folder: cost(folder, options.rounds),
    }
    raw: dict[str, Any] = {}
    for part in options.parts.split(","):
        with tempfile.TemporaryDirectory(prefix="voxcache-observe-") as folder:
            raw[part] = parts[part](Path(folder))
    result = verdict(raw)
    RESULTS.write_text(json.dumps({**result, "raw": raw}) + "\n")
    print(json.dumps(result), flush=True)
    return 0 if all(bar["ok"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
