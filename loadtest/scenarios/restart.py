"""The daemon, Triton, Redis and the bucket's gateway killed and started again, one after another, under load.

At a steady rate somebody reads instances and leases a tensor (hits), leases series that nobody has had (misses), asks a
model by reference, and announces studies. Every instance is compared with what was stored. For each restart the error
window is told, from the first to the last request that failed, by class; what does not need what is away must not fail.

    python -m loadtest.scenarios.restart [--short] [--out FILE]
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import xxhash

from loadtest import ends, scenario, servers
from loadtest.figures import say
from loadtest.generator import Load, Open, Request, evenly, mixed, run
from loadtest.measures import Track
from loadtest.outcome import Phase, Result, Table, at_most
from loadtest.stand import MIB, Daemon, Series, daemon, folder, gateway, instances, lease, make_series, program
from serving.demo.tritonserver import TritonServer

RATE: Final = 20
#: What a class of requests needs besides the daemon.
NEEDS: Final = {"hits": "", "leases": "", "misses": "gateway", "inferences": "Triton", "arrivals": "Redis"}


def restart(options: argparse.Namespace) -> Result:
    calm_s, misses = (6.0, 24) if options.short else (30.0, 120)
    missing: dict[str, str] = {}
    with folder("restart") as place, contextlib.ExitStack() as stack:
        bucket = stack.enter_context(gateway(place))
        ceph = Gateway(place)
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
        things: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
        extra = '[store]\nrevalidate = "events"\n[arrivals]\nwarm = ["volume"]\nquiet_s = 0.2\n'
        told_triton = 'url = ""'
        try:
            redis.start()
            extra += f'[redis]\nurl = "redis://127.0.0.1:{redis.port}"\ntimeout_s = 1.0\n'
            things["Redis"] = (redis.kill, redis.start)
        except RuntimeError as error:
            missing["Redis"] = str(error)[:300]
        try:
            triton.start()
            told_triton = f'url = "{triton.url}"\ngrpc = "{triton.grpc_url}"\nquarantine_s = 2.0'
            things["Triton"] = (triton.kill, triton.start)
        except Exception as error:
            missing["Triton"] = str(error)[:300]
        things["gateway"] = (ceph.kill, ceph.start)
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
        things["daemon"] = (ours.kill, ours.start)
        ours.ask("POST", "/v1/leases", {"study": hit.ref.study, "series": hit.ref.series, "recipe": "volume"})
        ours.until_written(hit.ref)
        seconds = calm_s * (2 * len(things) + 1)
        load = _load(ours, hit, others, seconds, triton="Triton" in things, redis="Redis" in things)
        away: list[tuple[str, float, float]] = []
        breaking: list[threading.Thread] = []

        def began(start: float) -> None:
            breaking.append(threading.Thread(target=_break, args=(things, calm_s, start, away)))
            breaking[0].start()

        tracks = run(load, 1, began)
        breaking[0].join()
        rows, stray = windows(tracks, away)
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
            at_most("restart: hits that failed while the daemon was there", stray, 0),
        ],
        missing=missing,
    )


def _load(ours: Daemon, hit: Series, others: list[Series], seconds: float, *, triton: bool, redis: bool) -> Load:
    exact = [
        msgspec.structs.replace(request, digest=xxhash.xxh3_64(hit.files[key].read_bytes()).hexdigest(), timeout_s=5.0)
        for request, key in zip(instances(ours.url, hit, "hits"), sorted(hit.files), strict=True)
    ]
    leases = [msgspec.structs.replace(lease(ours.url, hit.ref, "leases"), timeout_s=5.0)]
    missed = [msgspec.structs.replace(lease(ours.url, each.ref, "misses"), timeout_s=10.0) for each in others]
    loads = [
        (exact, evenly(RATE, seconds, range(len(exact)))),
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


def _break(
    things: dict[str, tuple[Callable[[], None], Callable[[], None]]],
    calm_s: float,
    start: float,
    away: list[tuple[str, float, float]],
) -> None:
    """Kill and start one after another; when, and for how long they were away."""
    for number, (name, (kill, begin)) in enumerate(things.items()):
        time.sleep(max(0.0, start + calm_s * (2 * number + 1) - time.monotonic()))
        at = time.monotonic()
        say(f"  {name} is killed")
        kill()
        time.sleep(1.0)
        try:
            begin()
        except Exception as error:
            say(f"  {name} does not come back: {error}")
        away.append((name, at - start, time.monotonic() - at))
        say(f"  {name} is back after {away[-1][2]:.1f} s")


def windows(tracks: dict[str, Track], away: list[tuple[str, float, float]]) -> tuple[list[list[Any]], int]:
    """Rows of the table, and how many hits and leases failed outside of the daemon's own absence."""
    rows: list[list[Any]] = []
    stray = 0
    for number, (name, at, gone) in enumerate(away):
        until = away[number + 1][1] if number + 1 < len(away) else float("inf")
        for track, told in tracks.items():
            failed = [w for w in told.windows if w.errors and at - 1 < w.start and w.start + 1 <= until]
            if failed:
                span = failed[-1].start + 1 - failed[0].start
                rows.append([name, round(at, 1), round(gone, 1), track, sum(w.errors for w in failed), span])
                if name != "daemon" and not NEEDS[track]:
                    stray += sum(window.errors for window in failed)
    return rows, stray


# ------------------------------------------------------------------ what is killed


class Gateway:
    """The gateway's own process; its storage stays."""

    def __init__(self, place: Path) -> None:
        self._run = place / "ceph" / "run"
        self._command: list[str] = []
        self._environment: dict[str, str] = {}
        self._again: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        pid = next(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and self._mine(entry))
        proc = Path(f"/proc/{pid}")
        self._command = [part.decode() for part in (proc / "cmdline").read_bytes().split(b"\0") if part]
        self._program = str((proc / "exe").readlink())
        pairs = (
            pair.decode(errors="replace").partition("=")
            for pair in (proc / "environ").read_bytes().split(b"\0")
            if pair
        )
        self._environment = {name: value for name, _, value in pairs}
        self._folder = str((proc / "cwd").readlink())
        os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End what was started here; the others are not ours to end."""
        if self._again is not None:
            self._again.kill()
            self._again.wait()

    def start(self) -> None:
        self._again = subprocess.Popen(
            self._command,
            executable=self._program,
            env=self._environment,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _mine(self, entry: Path) -> bool:
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            return b"radosgw" in words.split(b"\0")[0] and str(self._run.parent).encode() in words
        return False


class Redis:
    """A server that keeps what it acknowledged."""

    def __init__(self, place: Path) -> None:
        self.port = servers.free_port()
        self._place = place
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises: RuntimeError."""
        self._place.mkdir(exist_ok=True)
        command = [program("redis-server", "redis"), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "yes", "--dir", str(self._place)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while not servers.listens(self.port)():
            if time.monotonic() > end:
                raise RuntimeError("redis-server does not answer")
            time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    stop = kill


if __name__ == "__main__":
    sys.exit(scenario.main("restart", __name__, restart))
