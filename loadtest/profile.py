"""Where the daemon's time goes: flame graphs by py-spy while it serves hits, or makes tensors of what the bucket has.

    python -m loadtest.profile hit|miss [--seconds S] [--out FOLDER]

``hit``: leases and instances as fast as eight users ask, a graph for each. ``miss``: series of 100 slices that nobody
has, one a second, with the workers. The folder (loadtest/results) gets profile-*.svg, the graphs, and profile-*.json,
the functions in which most time was spent themselves; the last line on stdout is JSON with the same.
"""

import argparse
import functools
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from .figures import say
from .generator import Closed, Load, Open, Request, run
from .outcome import ROOT, Profile
from .scenario import on_signal
from .stand import MIB, Daemon, daemon, folder, gateway, instances, lease, make_series

RESULTS: Final = Path(__file__).resolve().parent / "results"


def recorded(ours: Daemon, name: str, seconds: float, load: Callable[[], Any], out: Path) -> Profile:
    """py-spy on the daemon while ``load`` goes on: a flame graph in ``out``, and the functions that took most.

    Raises: RuntimeError: py-spy may not look at processes here.
    """
    raw, graph = ours.place / f"{name}.raw", out / f"profile-{name}.svg"
    told = {}
    for form, file in (("raw", raw), ("flamegraph", graph)):
        command = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(ours.pid), "--subprocesses"]
        command += [
            "--duration",
            str(int(seconds)),
            "--rate",
            "200",
            "--format",
            form,
            "--output",
            str(file),
            "--nonblocking",
        ]
        spy = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            told = load()
            _, said = spy.communicate(timeout=seconds + 60)
        finally:
            spy.kill()
            spy.wait()
        if spy.returncode or not file.exists():
            raise RuntimeError(f"py-spy: {said.decode(errors='replace')[-400:]}")
    # graphs are shown to others, to whom it means nothing where this checkout is
    drawn = graph.read_text()
    for path in (out, ours.place, ROOT):
        drawn = drawn.replace(f"{path}/", "")
    graph.write_text(drawn)
    own: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        own[stack.rsplit(";", 1)[-1]] += int(count)
    total = own.total() or 1
    track = next(iter(told.values()))
    say(f"  {name}: {track.rate:.0f} a second; {graph}")
    return Profile(name, graph.name, {function: round(count / total, 3) for function, count in own.most_common(12)})


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    parser = argparse.ArgumentParser(prog="profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("hit", "miss"))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each graph (default: 15)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where graphs go (default: loadtest/results)")
    options = parser.parse_args()
    seconds, out = options.seconds, options.out
    out.mkdir(parents=True, exist_ok=True)
    profiles: list[Profile] = []
    with folder("profile") as place, gateway(place) as bucket:
        count = 1 if options.what == "hit" else max(4, int(seconds))
        say(f"storing {count} series of 100 slices")
        made = [make_series(place / "series", 0, slices=100, seed=seed) for seed in range(count)]
        for series in made:
            bucket.put(series.files)
        total = sum(series.nbytes for series in made)
        extra = '[store]\nrevalidate = "events"'
        with daemon(place / "ours", bucket, ram=3 * total + 256 * MIB, nvme=3 * total + 256 * MIB, extra=extra) as ours:
            if options.what == "hit":
                ways: dict[str, list[Request]] = {
                    "hit-lease": [lease(ours.url, made[0].ref, "leases")],
                    "hit-instance": instances(ours.url, made[0], "instances"),
                }
                for name, requests in ways.items():
                    run(Load(requests, Closed(1, 1.0)), 1)
                    load = Load(requests, Closed(8, seconds))
                    profiles.append(recorded(ours, name, seconds, functools.partial(run, load, 1), out))
            else:
                requests = [lease(ours.url, series.ref, "misses") for series in made]

                def missing() -> Any:
                    ours.forget([series.ref for series in made])
                    return run(Load(requests, Open([(float(number), number) for number in range(len(requests))])), 1)

                profiles.append(recorded(ours, "miss", seconds, missing, out))
    told = msgspec.json.encode(profiles)
    (out / f"profile-{options.what}.json").write_bytes(told + b"\n")
    print(json.dumps({"benchmark": f"profile-{options.what}", "profiles": json.loads(told), "bars": []}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
