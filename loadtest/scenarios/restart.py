"""The daemon, Triton, Redis and the bucket's gateway killed and started again, one after another, under load.

At a steady rate somebody reads instances and leases a tensor (hits), leases series that nobody has had (misses), asks a
model by reference, and announces studies. Every instance is compared with what was stored. For each restart the error
window is told, from the first to the last request that failed, by class; what does not need what is away must not fail.

    python -m loadtest.scenarios.restart [--short] [--out FILE]
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import urlsplit

import msgspec

from loadtest import ends, scenario, servers
from loadtest.figures import at_most, say
from loadtest.generator import Load, Open, Request, evenly, mixed, run
from loadtest.measures import Track, Window, window_width
from loadtest.outcome import Phase, Result, Table
from loadtest.stand import MIB, Bucket, Daemon, Series, daemon, exact, folder, gateway, lease, make_series, program
from serving.demo.tritonserver import TritonServer

RATE: Final = 20
#: What a class of requests needs besides the daemon.
NEEDS: Final = {"hits": "", "leases": "", "misses": "gateway", "inferences": "Triton", "arrivals": "Redis"}


class Thing(Protocol):
    """What can be killed, and started again: ``start`` returns once it answers."""

    def kill(self) -> None: ...
    def start(self) -> None: ...


class Away(NamedTuple):
    """Who was killed when (seconds since the load began), and for how long it did not answer."""

    name: str
    at: float
    seconds: float


def restart(options: argparse.Namespace) -> Result:
    calm_s, misses = (6.0, 24) if options.short else (30.0, 120)
    missing: dict[str, str] = {}
    with folder("restart") as place, contextlib.ExitStack() as stack:
        bucket = stack.enter_context(gateway(place))
        ceph = Gateway(place, bucket)
        stack.callback(ceph.stop)
        say(f"storing {misses + 1} series")
        hit = make_series(place / "series", 8, seed=0)
        others = [make_series(place / "series", 0, slices=16, rows=128, columns=128, seed=1 + n) for n in range(misses)]
        for series in (hit, *others):
            bucket.put(series.files)
        redis = Redis(place / "redis")
        stack.callback(redis.stop)
        triton = TritonServer(place / "triton.log", [ends.build(place, {"ends": ""})])
        stack.callback(triton.stop)
        things: dict[str, Thing] = {}
        extra = '[store]\nrevalidate = "events"\n[arrivals]\nwarm = ["volume"]\nquiet_s = 0.2\n'
        told_triton = 'url = ""'
        try:
            redis.start()
            extra += f'[redis]\nurl = "redis://127.0.0.1:{redis.port}"\ntimeout_s = 1.0\n'
            things["Redis"] = redis
        except RuntimeError as error:
            missing["Redis"] = str(error)[:300]
        try:
            triton.start()
            told_triton = f'url = "{triton.url}"\ngrpc = "{triton.grpc_url}"\nquarantine_s = 2.0'
            things["Triton"] = triton
        except Exception as error:
            missing["Triton"] = str(error)[:300]
        things["gateway"] = ceph
        total = sum(series.nbytes for series in (hit, *others))
        running = daemon(
            place / "ours",
            bucket,
            ram=3 * total + 256 * MIB,
            nvme=3 * total + 256 * MIB,
            extra=extra,
            triton=told_triton,
        )
        ours = stack.enter_context(running)
        things["daemon"] = ours
        ours.lease(hit.ref)
        ours.until_written(hit.ref)
        seconds = calm_s * (2 * len(things) + 1)
        load = _load(ours, hit, others, seconds, triton="Triton" in things, redis="Redis" in things)
        away: list[Away] = []
        over = threading.Event()
        pool = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(over.set)  # nothing is started again once this block ends
        breaking: list[Future[None]] = []

        def began(start: float) -> None:
            breaking.append(pool.submit(_break, things, calm_s, start, away, over))

        tracks = run(load, 1, began)
        breaking[0].result()
        rows, stray = windows(tracks, away, window_width(load.seconds))
        wrong = sum(
            track.errors.get("wrong bytes", 0) + track.errors.get("wrong length", 0) for track in tracks.values()
        )
        for row in rows:
            say("  " + "  ".join(str(cell) for cell in row))
    return Result(
        scenario="restart",
        says="",
        short=options.short,
        parameters={"requests/s": RATE, "seconds": seconds, "killed": ", ".join(things)},
        phases=[Phase("all of it", tracks)],
        tables=[
            Table(
                "Error windows",
                ["killed", "at s", "back after s", "class", "errors", "first to last error, s"],
                rows,
                "Whole seconds: a request counts where it was due. No row: no request of that class failed.",
            )
        ],
        bars=[
            at_most("restart: wrong bytes", wrong, 0),
            at_most("restart: requests that failed while what they need was there", stray, 0),
        ],
        missing=missing,
    )


def _load(ours: Daemon, hit: Series, others: list[Series], seconds: float, *, triton: bool, redis: bool) -> Load:
    hits = exact(ours.url, hit, "hits", timeout_s=5.0)
    leases = [msgspec.structs.replace(lease(ours.url, hit.ref, "leases"), timeout_s=5.0)]
    missed = [msgspec.structs.replace(lease(ours.url, each.ref, "misses"), timeout_s=10.0) for each in others]
    loads = [
        (hits, evenly(RATE, seconds, range(len(hits)))),
        (leases, evenly(RATE, seconds, [0])),
        (missed, Open([(number * seconds / len(missed), number) for number in range(len(missed))])),
    ]
    json_type = {"Content-Type": "application/json"}
    if triton:
        data = {
            "name": "REFERENCE",
            "shape": [1],
            "datatype": "BYTES",
            "data": [f"{hit.ref.study}/{hit.ref.series}/volume"],
        }
        body = json.dumps({"inputs": [data]}).encode()
        asked = [Request("inferences", f"{ours.url}/v2/models/ends.ref/infer", "POST", body, json_type, timeout_s=5.0)]
        loads.append((asked, evenly(RATE, seconds, [0])))
    if redis:
        told = json.dumps({"study": hit.ref.study, "series": hit.ref.series}).encode()
        posted = [Request("arrivals", f"{ours.url}/v1/arrivals/plain", "POST", told, json_type, timeout_s=5.0)]
        loads.append((posted, evenly(RATE / 4, seconds, [0])))
    return mixed(*loads)


def _break(things: dict[str, Thing], calm_s: float, start: float, away: list[Away], over: threading.Event) -> None:
    """Kill and start one after another; when, and for how long they were away. Raises: what a start raises."""
    for number, (name, thing) in enumerate(things.items()):
        # in the middle of a second: who was asked shortly before is in the same window
        if over.wait(max(0.0, start + calm_s * (2 * number + 1) + 0.5 - time.monotonic())):
            return
        at = time.monotonic()
        say(f"  {name} is killed")
        thing.kill()
        over.wait(1.0)
        thing.start()
        away.append(Away(name, at - start, time.monotonic() - at))
        say(f"  {name} is back after {away[-1].seconds:.1f} s")


def windows(tracks: dict[str, Track], away: list[Away], width: float) -> tuple[list[list[Any]], int]:
    """Rows of the table, and how many requests failed although all that they need was there.

    A row has the windows, so many seconds wide, before whose end its thing was the last to be killed.
    """
    rows: list[list[Any]] = []
    stray = 0
    for track, of in tracks.items():
        failed: dict[Away, list[Window]] = {}
        for window in of.windows:
            if window.errors:
                end = window.start + width
                last = next((gone for gone in reversed(away) if gone.at < end), Away("nothing yet", 0.0, 0.0))
                failed.setdefault(last, []).append(window)
                if not any(since < end and window.start < until for since, until in _excuses(track, away)):
                    stray += window.errors
        for gone, some in failed.items():
            errors = sum(window.errors for window in some)
            span = some[-1].start + width - some[0].start
            rows.append([gone.name, round(gone.at, 1), round(gone.seconds, 1), track, errors, span])
    return sorted(rows, key=lambda row: float(row[1])), stray


def _excuses(track: str, away: list[Away]) -> Iterator[tuple[float, float]]:
    """From when until when requests of a class may fail.

    The daemon is ready when it answers: hits need no more. What the others need is itself again after a while, as pools
    and pauses have it, and at the latest when the next one is killed.
    """
    for number, gone in enumerate(away):
        if not NEEDS[track]:
            until = gone.at + gone.seconds
        else:
            until = away[number + 1].at if number + 1 < len(away) else math.inf
        if gone.name == "daemon" or gone.name == NEEDS[track]:
            yield gone.at, until


# ------------------------------------------------------------------ what is killed


class Gateway:
    """The gateway's own process; its storage stays."""

    def __init__(self, place: Path, bucket: Bucket) -> None:
        self._pid = bucket.pid
        self._ready = servers.answers(urlsplit(bucket.endpoint).port or 0, "/")
        self._log = place / "radosgw.log"
        self._stack = contextlib.ExitStack()

    def kill(self) -> None:
        proc = Path(f"/proc/{self._pid}")
        command = [part.decode() for part in (proc / "cmdline").read_bytes().split(b"\0") if part]
        pairs = (proc / "environ").read_bytes().decode(errors="replace").split("\0")
        self._again = command, dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        os.kill(self._pid, signal.SIGKILL)

    def start(self) -> None:
        """Return once it answers. Raises: RuntimeError."""
        command, environment = self._again
        running = servers.process(command, self._log, self._ready, environment)
        self._pid = self._stack.enter_context(running).pid

    def stop(self) -> None:
        """End what was started here; the others are not ours to end."""
        self._stack.close()


class Redis:
    """A server that keeps what it acknowledged."""

    def __init__(self, place: Path) -> None:
        self.port = servers.free_port()
        self._place = place
        self._stack = contextlib.ExitStack()
        self._pid = 0

    def start(self) -> None:
        """Return once it answers. Raises: RuntimeError."""
        program("redis-server", "redis")
        self._place.mkdir(exist_ok=True)
        running = servers.redis(self._place, "--appendonly", "yes", port=self.port)
        self._pid = self._stack.enter_context(running).pid

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        self._stack.close()


if __name__ == "__main__":
    sys.exit(scenario.main("restart", __name__, restart))
