"""What warming costs those who don't wait for it: a study ready by its arrival, hits and misses during a flood.

Three parts over one daemon, each against its own floor in the same run, turn by turn. **Arrival**: from its receipt to
``ready``, less the quiet period, beside the same fill on demand. **Hits**: leases of a tensor in RAM at a steady rate,
whether or not the earlier ones have been answered, in windows with and without a flood of warm-ups, and in windows in
which programs that do nothing but count keep every core as busy as workers do, which is what a flood costs at least.
**Miss**: a fill that somebody waits for, with and without that flood.

    python -m loadtest.warm [--slices N] [--rounds N] [--flood N] [--seconds S]

Progress goes to stderr; the last line on stdout is JSON. Raw times: loadtest/results/warm.json.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop

from cache.dicom.phantom import write_series
from cache.keys import SeriesRef
from cache.workers.pool import WorkerSettings

from . import servers
from .figures import at_most, metric, plain, say, summary
from .scenario import on_signal

RESULTS: Final = Path(__file__).resolve().parent / "results" / "warm.json"
MIB: Final = 1 << 20
QUIET_S: Final = 0.5
RATE: Final = 200
#: Of the studies that make the flood: 2 MB each.
FLOOD_SLICES: Final = 16
FLOOD_ROWS: Final = 256
BARS: Final = {"arrival_vs_demand": 1.1, "hits_p99_flood_vs_quiet": 2.0, "miss_flood_vs_idle": 1.5}


class Daemon:
    """The daemon's API, as far as it is needed here."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        async with self._session.request(method, path, json=body) as answer:
            told = await answer.read()
            assert answer.status < 300, (path, answer.status, told)
            return json.loads(told) if told else None

    async def lease(self, ref: SeriesRef) -> float:
        """Seconds a lease took; it is given back after that."""
        wanted = {"study": ref.study, "series": ref.series, "recipe": "volume", "ttl_s": 60}
        start = time.perf_counter()
        granted = await self.ask("POST", "/v1/leases", wanted)
        seconds = time.perf_counter() - start
        await self.ask("DELETE", f"/v1/leases/{granted['lease']}")
        return seconds

    async def forget(self, refs: Sequence[SeriesRef]) -> None:
        """Have nothing of these held, once what is being written has been."""
        for ref in refs:
            while (await self.ask("GET", f"/v1/studies/{ref.study}"))["entries"]:
                await self.ask("DELETE", f"/v1/studies/{ref.study}")
                await asyncio.sleep(0.01)
        await asyncio.sleep(QUIET_S)  # files are unlinked in the background: that is nobody's fill

    async def arrived(self, ref: SeriesRef, at: str) -> float:
        """Seconds from the event's receipt, which is before its 202, until the study is ready.

        The daemon's own clock tells: to ask again and again would take time from what is asked for.
        """
        before = await self._to_ready()
        await self.ask("POST", "/v1/arrivals/plain", {"study": ref.study, "series": ref.series, "time": at})
        await asyncio.sleep(QUIET_S)
        while not (await self.ask("GET", f"/v1/studies/{ref.study}"))["ready"]:  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.05)
        return await self._to_ready() - before

    async def _to_ready(self) -> float:
        """Seconds that arrivals took until they were ready, all together."""
        async with self._session.get("/metrics") as answer:
            return metric(await answer.text(), "voxcache_arrival_to_ready_seconds_sum")

    async def flood(self, refs: Sequence[SeriesRef]) -> "asyncio.Task[int]":
        """Begin to warm all of these, none of which is held; the entries that were made, once they are."""
        await self.forget(refs)
        tensors = [f"{ref.study}/{ref.series}/volume" for ref in refs]
        job = await self.ask("POST", "/v1/warm", {"tensors": tensors})

        async def ended() -> int:
            while not job["ended"]:
                await asyncio.sleep(0.1)
                job.update(await self.ask("GET", f"/v1/warm/{job['id']}"))
            assert not job["failures"], job
            return int(job["done"]) - int(job["ready"])

        return asyncio.create_task(ended())


async def arrivals(daemon: Daemon, ref: SeriesRef, rounds: int) -> dict[str, list[float]]:
    """Seconds to the study's tensor: by its arrival, less the quiet period, and on demand."""
    seconds: dict[str, list[float]] = {"arrival": [], "demand": []}
    for number in range(rounds + 1):
        await daemon.forget([ref])
        arrival = await daemon.arrived(ref, str(number)) - QUIET_S
        await daemon.forget([ref])
        demand = await daemon.lease(ref)
        if number:  # the first one finds everything cold
            seconds["arrival"].append(arrival)
            seconds["demand"].append(demand)
            say(f"  arrival {arrival * 1e3:7.1f} ms   on demand {demand * 1e3:7.1f} ms")
    return seconds


async def steady(daemon: Daemon, ref: SeriesRef, seconds: float) -> list[float]:
    """Lease ``RATE`` times a second. Each latency counts from when its request was due."""
    latencies: list[float] = []

    async def once(due: float) -> None:
        granted = await daemon.ask(
            "POST", "/v1/leases", {"study": ref.study, "series": ref.series, "recipe": "volume", "ttl_s": 60}
        )
        latencies.append(time.perf_counter() - due)
        await daemon.ask("DELETE", f"/v1/leases/{granted['lease']}")

    start = time.perf_counter() + 0.05
    async with asyncio.TaskGroup() as group:
        for number in range(int(seconds * RATE)):
            due = start + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(once(due))
    return latencies


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Every core is kept busy by a program as far behind the daemon as workers are."""
    count = ["nice", "-n", str(WorkerSettings().nice), sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(count) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


async def hits(
    daemon: Daemon, ref: SeriesRef, flood: Sequence[SeriesRef], rounds: int, seconds: float
) -> tuple[dict[str, list[float]], int]:
    """Latencies of hits: undisturbed, on busy cores, in a flood; and how many entries the floods made meanwhile."""
    latencies: dict[str, list[float]] = {"quiet": [], "busy": [], "flood": []}
    made = 0
    await daemon.lease(ref)
    await steady(daemon, ref, 1.0)
    for _ in range(rounds):
        await daemon.forget(flood)
        latencies["quiet"] += await steady(daemon, ref, seconds)
        with busy_cores():
            latencies["busy"] += await steady(daemon, ref, seconds)
        flooding = await daemon.flood(flood)
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0 and not flooding.done():
            latencies["flood"] += await steady(daemon, ref, min(left, 0.5))
        made += await flooding
        for name, found in latencies.items():
            say(f"  hits, {name:6} {summary(found)}")
    return latencies, made


async def misses(daemon: Daemon, ref: SeriesRef, flood: Sequence[SeriesRef], rounds: int) -> dict[str, list[float]]:
    """Seconds of a fill on demand: when nothing else goes on, and in the middle of a flood."""
    seconds: dict[str, list[float]] = {"idle": [], "flood": []}
    for _ in range(rounds):
        await daemon.forget([ref, *flood])
        seconds["idle"].append(await daemon.lease(ref))
        await daemon.forget([ref])
        flooding = await daemon.flood(flood)
        await asyncio.sleep(0.3)
        seconds["flood"].append(await daemon.lease(ref))
        assert not flooding.done(), "the flood was over before the miss: give it more studies"
        await flooding
        say(f"  miss, idle {seconds['idle'][-1] * 1e3:7.1f} ms   in the flood {seconds['flood'][-1] * 1e3:7.1f} ms")
    return seconds


async def measure(url: str, study: SeriesRef, flood: Sequence[SeriesRef], options: argparse.Namespace) -> Any:
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        daemon = Daemon(session)
        say(f"a study of {options.slices} slices, by its arrival and on demand")
        arrived = await arrivals(daemon, study, options.rounds)
        say(f"a miss, idle and during a flood of {len(flood)} studies")
        missed = await misses(daemon, study, flood, options.rounds)
        say(f"{RATE} hits a second, quiet and during a flood of {len(flood)} studies")
        hit, made = await hits(daemon, study, flood, options.rounds, options.seconds)
        return {"arrival": arrived, "miss": missed, "hits": hit, "made_during_hits": made}


def verdict(raw: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, tails, ratios and bars."""
    median = {
        part: {name: statistics.median(seconds) for name, seconds in raw[part].items()} for part in ("arrival", "miss")
    }
    latencies = {name: summary(seconds) for name, seconds in raw["hits"].items()}
    values = {
        "arrival_vs_demand": median["arrival"]["arrival"] / median["arrival"]["demand"],
        "hits_p99_flood_vs_quiet": latencies["flood"]["p99_ms"] / latencies["quiet"]["p99_ms"],
        "miss_flood_vs_idle": median["miss"]["flood"] / median["miss"]["idle"],
    }
    floors = {"hits_p99_busy_vs_quiet": latencies["busy"]["p99_ms"] / latencies["quiet"]["p99_ms"]}
    return {
        "benchmark": "warm",
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()},
        "load_average": os.getloadavg(),
        "slices": options.slices,
        "flood": options.flood,
        "median_s": median,
        "hits": {"rate_per_s": RATE, **latencies, "made_meanwhile": raw["made_during_hits"]},
        "floors": floors,
        "bars": plain(at_most(name, values[name], bar) for name, bar in BARS.items()),
    }


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    parser = argparse.ArgumentParser(prog="warm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slices", type=int, default=300, help="of the study that is waited for (default: 300)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each part (default: 5)")
    parser.add_argument("--flood", type=int, default=200, help="studies that are warmed meanwhile (default: 200)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a window of hits (default: 4)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="voxcache-warm-") as name:
        folder = Path(name)
        say(f"writing a study of {options.slices} slices, and {options.flood} of {FLOOD_SLICES}")
        origin = folder / "origin"
        study = SeriesRef(*write_series(origin, slices=options.slices, seed=1)[:2])
        flood = [
            SeriesRef(*write_series(origin, slices=FLOOD_SLICES, rows=FLOOD_ROWS, columns=FLOOD_ROWS, seed=seed)[:2])
            for seed in range(2, options.flood + 2)
        ]
        own = options.slices * 512 * 512 * 2
        all_of_it = own + options.flood * FLOOD_SLICES * FLOOD_ROWS * FLOOD_ROWS * 2
        extra = f"""
        [store]
        revalidate = "events"
        [arrivals]
        warm = ["volume"]
        quiet_s = {QUIET_S}
        """
        with servers.daemon(
            folder, origin, ram=3 * own + 2 * all_of_it, nvme=3 * all_of_it + 1024 * MIB, extra=extra
        ) as url:
            raw = uvloop.run(measure(url, study, flood, options))
    result = verdict(raw, options)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**result, "raw_s": raw}) + "\n")
    print(json.dumps(result), flush=True)
    return 0 if all(bar["ok"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
