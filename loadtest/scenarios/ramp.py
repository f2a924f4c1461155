"""From 1 to 100 users, each of whom downloads images one after another as fast as they come.

In turn: straight from the bucket's gateway, from Orthanc, from a daemon that has nothing, from one that has read all of
it before, and, as a ceiling, from nginx that has the files. The images are the same: CT slices of 512 KiB of several
studies. Users come by Locust, evenly over the time that a phase takes: four minutes, which makes twenty in all, or 20
seconds in the short form.

    python -m loadtest.scenarios.ramp [--short] [--seconds S] [--users N] [--studies N] [--out FILE]
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from loadtest import scenario
from loadtest.figures import Bar, at_least, at_most, say
from loadtest.generator import Request
from loadtest.measures import Snapshot, Track, together
from loadtest.outcome import ROOT, Phase, Result, Table
from loadtest.peers.archives import Orthanc
from loadtest.servers import nginx
from loadtest.stand import MIB, cpu_s, daemon, folder, gateway, instances, make_series, objects

#: What nobody who serves the same users can do better than.
CEILING: Final = "nginx, page cache"
#: Requests of the warm daemon by those of the gateway, and of Orthanc, in the same time.
BARS: Final = {"gateway": 5.0, "Orthanc": 3.0}


def ramp(options: argparse.Namespace) -> Result:
    seconds = options.seconds or (20.0 if options.short else 240.0)
    missing: dict[str, str] = {}
    phases: list[Phase] = []
    spent: dict[str, float] = {}

    def run(name: str, requests: list[Request], pid: int, says: str) -> None:
        say(f"  {name}: 1 to {options.users} users in {seconds:.0f} s")
        before = cpu_s(pid)
        track = users(place, requests, options.users, seconds)
        spent[name] = cpu_s(pid) - before
        phases.append(Phase(name, {"images": track}, says))

    with folder("ramp") as place, contextlib.ExitStack() as stack:
        bucket = stack.enter_context(gateway(place))
        say(f"storing {options.studies} studies of 100 images")
        made = [make_series(place / "series", 0, slices=100, seed=seed) for seed in range(options.studies)]
        for series in made:
            bucket.put(series.files)
        run(
            "gateway",
            [r for s in made for r in objects(bucket, s, "images")],
            bucket.pid,
            "Ceph's gateway, nothing between",
        )
        with contextlib.ExitStack() as own:
            try:
                orthanc = Orthanc(place / "orthanc", bucket, 0)
                orthanc.start(own)
                for series in made:
                    orthanc.load(series)
                requests = [msgspec.structs.replace(r, track="images") for s in made for r in orthanc.requests(s)]
                run("Orthanc", requests, orthanc.pid, Orthanc.settings)
            except (RuntimeError, OSError) as error:
                missing["Orthanc"] = str(error)[:400]
        total = sum(series.nbytes for series in made)
        extra = '[store]\nrevalidate = "events"'
        with daemon(place / "ours", bucket, ram=2 * total + 256 * MIB, nvme=3 * total + 256 * MIB, extra=extra) as ours:
            requests = [r for s in made for r in instances(ours.url, s, "images")]
            run("voxcache, cold", requests, ours.pid, "nothing in RAM or on NVMe at the start")
            run("voxcache, warm", requests, ours.pid, "everything in RAM at the start")
        # the images' files lie there already, and in the page cache
        root = place / "series"
        server = stack.enter_context(nginx(place, root))
        files = [path.relative_to(root) for series in made for path in series.files.values()]
        base = f"http://127.0.0.1:{server.port}"
        run(
            CEILING,
            [Request("images", f"{base}/{path}") for path in files],
            server.pid,
            "files, by sendfile: what these users can read at most, on these cores",
        )
    return Result(
        scenario="ramp",
        says="",
        short=options.short,
        parameters={"users": options.users, "seconds": seconds, "studies": options.studies, "image KiB": 513},
        phases=phases,
        tables=[_table(phases, spent)],
        bars=_bars({phase.name: phase.tracks["images"] for phase in phases}),
        missing=missing,
    )


def users(place: Path, requests: list[Request], most: int, seconds: float) -> Track:
    """The figures of Locust's users. Raises: RuntimeError: it failed, in whole or in part, or did not end in time."""
    out = place / "locust"
    out.mkdir(exist_ok=True)
    for old in out.iterdir():
        old.unlink()
    (place / "requests.json").write_bytes(msgspec.json.encode(requests))
    environment = os.environ | {
        "LOADTEST_USERS": str(most),
        "LOADTEST_SECONDS": str(seconds),
        "LOADTEST_REQUESTS": str(place / "requests.json"),
        "LOADTEST_OUT": str(out),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "client"))),
    }
    command = [str(Path(sys.executable).parent / "locust"), "-f", str(ROOT / "loadtest" / "locustfile.py")]
    command += ["--headless", "--only-summary", "--loglevel", "WARNING", "--exit-code-on-error", "0"]
    workers = max(1, len(os.sched_getaffinity(0)) // 2)
    command += ["--processes", str(workers)]
    started = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        status = started.wait(seconds + 120)
        _until_gone(started.pid, 20.0)  # its other processes write their figures after it
    except subprocess.TimeoutExpired:
        raise RuntimeError("Locust did not end in time") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    told = [msgspec.msgpack.decode(file.read_bytes(), type=Snapshot) for file in out.iterdir()]
    if status or len(told) != workers:
        raise RuntimeError(f"Locust ended with {status}; of its {workers} processes {len(told)} lasted until the end")
    found = together(told, seconds)
    if "images" not in found:
        raise RuntimeError("Locust's users have asked for nothing")
    return found["images"]


def _until_gone(group: int, most_s: float) -> None:
    """Return once no process of the group is left, or after so many seconds."""
    end = time.monotonic() + most_s
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)  # they are no children of ours: nobody tells when they end


def _table(phases: list[Phase], spent: dict[str, float]) -> Table:
    rows: list[list[str | float | int | None]] = []
    for phase in phases:
        track = phase.tracks["images"]
        told = track.latency_ms
        cpu = spent[phase.name] / track.n * 1e3 if track.n else None
        errors = sum(track.errors.values())
        rows.append(
            [phase.name, track.n, track.nbytes / 1e9, told.get("p50"), told.get("p95"), told.get("p99"), cpu, errors]
        )
    columns = ["from", "images", "GB", "p50 ms", "p95 ms", "p99 ms", "server CPU ms an image", "errors"]
    return Table("All of the ramp", columns, rows)


def _bars(tracks: dict[str, Track]) -> list[Bar]:
    warm = tracks["voxcache, warm"]
    bars = [
        at_least(
            f"ramp: images, by those of {name}",
            warm.n / tracks[name].n,
            bar,
            f"{CEILING}: {tracks[CEILING].n / tracks[name].n:.2f}",
        )
        for name, bar in BARS.items()
        if name in tracks and tracks[name].n
    ]
    errors = sum(sum(tracks[name].errors.values()) for name in ("voxcache, cold", "voxcache, warm"))
    return [*bars, at_most("ramp: errors", errors, 0)]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=0.0, help="of each phase (default: 240, short: 20)")
    parser.add_argument("--users", type=int, default=100, help="in the end (default: 100)")
    parser.add_argument("--studies", type=int, default=8, help="of 100 images each (default: 8)")


if __name__ == "__main__":
    sys.exit(scenario.main("ramp", __name__, ramp, _options))
