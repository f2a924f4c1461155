"""A radiology department's morning (docs/workload.md), as fast as the machine can bear it: whose tail is it?

The workload model says which series are asked for, by whom and when: models as studies arrive, the first read, priors,
and the nightly scan of research in the namespace ``staging``. Here it asks a daemon before a real bucket, in
less time: each series is a synthetic one of a few sizes, announced before it is asked for. The tail of the interactive
class is what counts. Meanwhile the daemon's memory outside the arena is watched, which must not grow.

    python -m loadtest.scenarios.reading_room [--short] [--seconds S] [--out FILE]
"""

import argparse
import json
import sys
import threading
import time
from statistics import median
from typing import Final

import numpy as np

from loadtest import scenario
from loadtest.figures import Bar, at_most, say
from loadtest.generator import Open, Request, mixed, run
from loadtest.outcome import Phase, Result, Table
from loadtest.stand import MIB, Daemon, Series, daemon, folder, gateway, lease, make_series
from loadtest.workload import HOUR, Workload, requests

#: Growth of memory outside the arena over the last half of the run.
GROWTH: Final = 0.05
#: Slices of the series that stand for those of the model, small to large.
SLICES: Final = (8, 16, 32, 64)
_RECIPES: Final = """
[recipes.grid]
version = 1
ops = [{ op = "volume" }, { op = "crop_pad", shape = [32, 128, 128], fill = -1024 }, { op = "cast", dtype = "float32" }]
[store]
revalidate = "events"
[arrivals]
warm = ["volume"]
quiet_s = 0.2
"""


def reading_room(options: argparse.Namespace) -> Result:
    seconds = options.seconds or (40.0 if options.short else 900.0)
    most = 40 if options.short else 300
    with folder("reading-room") as place, gateway(place) as bucket:
        say(f"storing {most} series")
        made = [
            make_series(place / "series", 0, slices=SLICES[seed % len(SLICES)], rows=256, columns=256, seed=seed)
            for seed in range(most)
        ]
        for series in made:
            bucket.put(series.files)
        total = sum(series.nbytes for series in made)
        running = daemon(
            place / "ours",
            bucket,
            ram=total // 2 + 256 * MIB,
            nvme=2 * total + 256 * MIB,
            extra=_RECIPES,
            namespaces="serving = 0.7, staging = 0.3",
        )
        with running as ours:
            asked, due = morning(ours.url, made, seconds)
            say(f"{len(due.due)} requests in {seconds:.0f} s")
            with Memory(ours) as memory:
                tracks = run(mixed((asked, due)), 2)
    series_count = len({request.body for request in asked})
    return Result(
        scenario="reading-room",
        says="",
        short=options.short,
        parameters={"seconds": seconds, "requests": len(due.due), "tensors": series_count, "series": most},
        phases=[Phase("the morning", tracks)],
        tables=[memory.table()],
        bars=_bars(memory, sum(sum(track.errors.values()) for track in tracks.values())),
        notes=[
            "Bytes and times are smaller than a department's: rates are not, by the number of cores this machine has."
        ],
    )


def _bars(memory: "Memory", errors: int) -> list[Bar]:
    return [
        at_most("reading-room: errors", errors, 0),
        at_most("reading-room: growth of memory outside the arena in the last half", memory.growth(), GROWTH),
    ]


def morning(url: str, made: list[Series], seconds: float) -> tuple[list[Request], Open]:
    """The requests, and when each is due: the model's from seven in the morning on, until all series are taken."""
    trace = requests(Workload(days=2, studies=200))
    trace = trace[trace["time"] >= 7 * HOUR]
    places: dict[int, int] = {}
    kept: list[tuple[float, int, int, bool]] = []
    for time_s, key, _, _, batch in trace:
        place = places.setdefault(int(key) // 3, len(places))  # a series has three forms, numbered in a row
        if place < len(made):
            kept.append((float(time_s), place, int(key) % 3, bool(batch)))
    first, last = kept[0][0], float(np.quantile([each[0] for each in kept], 0.98))
    kept = [each for each in kept if each[0] <= last]
    speed = (last - first) / seconds
    asked: list[Request] = []
    numbers: dict[tuple[int, int, bool], int] = {}
    due: list[tuple[float, int]] = []
    announced: set[int] = set()
    for time_s, place, form, batch in kept:
        ref = made[place].ref
        at = (time_s - first) / speed
        if place not in announced and not batch:
            announced.add(place)
            body = json.dumps({"study": ref.study, "series": ref.series}).encode()
            due.append((max(at - 2.0, 0.0), len(asked)))
            asked.append(
                Request("arrivals", f"{url}/v1/arrivals/plain", "POST", body, {"Content-Type": "application/json"})
            )
        name = (place, min(form, 1), batch)
        if name not in numbers:
            numbers[name] = len(asked)
            recipe = "volume" if form == 0 else "grid"
            track, namespace = ("staging", "staging") if batch else ("interactive", "serving")
            asked.append(lease(url, ref, track, recipe, namespace=namespace))
        due.append((at, numbers[name]))
    return asked, Open(sorted(due))


class Memory(threading.Thread):
    """The daemon's resident bytes outside the arena, every other second while the block lasts."""

    def __init__(self, ours: Daemon) -> None:
        super().__init__(daemon=True)
        self._ours = ours
        self._over = threading.Event()
        self.samples: list[tuple[float, int]] = []

    def run(self) -> None:
        start = time.monotonic()
        while not self._over.wait(1.0):
            self.samples.append((time.monotonic() - start, self._ours.rss_outside_arena()))

    def __enter__(self) -> "Memory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def growth(self) -> float:
        """Over the last half: the median of its last quarter by that of its first, less one."""
        half = [nbytes for _, nbytes in self.samples[len(self.samples) // 2 :]]
        quarter = max(1, len(half) // 4)
        return median(half[-quarter:]) / median(half[:quarter]) - 1

    def table(self) -> Table:
        step = max(1, len(self.samples) // 20)
        rows: list[list[str | float | int | None]] = [[round(at), nbytes / MIB] for at, nbytes in self.samples[::step]]
        return Table("Memory outside the arena", ["s", "MiB"], rows, "RssAnon and RssFile of the daemon's own process.")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=0.0, help="of the run (default: 900, short: 40)")


if __name__ == "__main__":
    sys.exit(scenario.main("reading-room", __name__, reading_room, _options))
