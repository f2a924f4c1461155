"""Five hundred studies are announced at once while others are being read.

Somebody leases a tensor and reads instances (hits) at a steady rate: first while nothing else goes on, then while all
studies are announced by webhook and warmed. Hits must hardly notice, every announcement must be taken, and every study
must be ready in the end.

    python -m loadtest.scenarios.burst [--short] [--out FILE]
"""

import argparse
import contextlib
import json
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from loadtest import scenario
from loadtest.figures import at_least, at_most, say
from loadtest.generator import Load, Open, Request, evenly, mixed, run
from loadtest.outcome import Phase, Result, Table
from loadtest.stand import MIB, Daemon, Series, daemon, folder, gateway, instances, lease, make_series

#: Leases and instances a second, each.
RATE: Final = 50
#: Hits' p99 in the burst by that of the calm.
NOTICED: Final = 2.0


def burst(options: argparse.Namespace) -> Result:
    studies, calm_s, wait_s = (60, 8.0, 60.0) if options.short else (500, 30.0, 600.0)
    with folder("burst") as place, gateway(place) as bucket:
        say(f"storing {studies} studies")
        hit = make_series(place / "series", 16, seed=0)
        others = [
            make_series(place / "series", 0, slices=16, rows=256, columns=256, seed=1 + n) for n in range(studies)
        ]
        for series in (hit, *others):
            bucket.put(series.files)
        total = sum(series.nbytes for series in (hit, *others))
        extra = '[store]\nrevalidate = "events"\n[arrivals]\nwarm = ["volume"]\nquiet_s = 0.5\n'
        with daemon(place / "ours", bucket, ram=3 * total + 256 * MIB, nvme=3 * total + 256 * MIB, extra=extra) as ours:
            hits = [lease(ours.url, hit.ref, "leases"), *instances(ours.url, hit, "instances")]
            run(Load(hits, evenly(20, 1.0, range(len(hits)))), 1)

            def reading(seconds: float) -> tuple[list[Request], Open]:
                due = evenly(RATE, seconds, [0]).due + evenly(RATE, seconds, range(1, len(hits)), seed=1).due
                return hits, Open(sorted(due))

            calm = run(mixed(reading(calm_s)), 1)
            told = {"Content-Type": "application/json"}
            announced = [
                Request("announcements", f"{ours.url}/v1/arrivals/plain", "POST", json.dumps(body).encode(), told)
                for series in others
                for body in [{"study": series.ref.study, "series": series.ref.series}]
            ]
            at_once = Open([(0.0, number) for number in range(len(announced))])
            with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
                over = threading.Event()
                stack.callback(over.set)  # the pool waits for its thread, whatever ends this block
                watching: list[Future[float]] = []

                def began(start: float) -> None:
                    watching.append(pool.submit(until_ready, ours, others, start, wait_s, over))

                stormy = run(mixed(reading(2 * calm_s), (announced, at_once)), 1, began)
                took = watching[0].result()
            warmed = sum(ready(ours, series) for series in others)
    bars = [
        at_least("burst: studies that were made ready", warmed, studies),
        at_most("burst: errors", sum(sum(of.errors.values()) for each in (calm, stormy) for of in each.values()), 0),
        *(
            at_most(
                f"burst: p99 of {name}, by the calm one",
                stormy[name].latency_ms["p99"] / calm[name].latency_ms["p99"],
                NOTICED,
            )
            for name in ("leases", "instances")
        ),
    ]
    rows: list[list[str | float | int | None]] = [[studies, warmed, took, warmed / took if took else None]]
    return Result(
        scenario="burst",
        says="",
        short=options.short,
        parameters={"studies": studies, "leases/s": RATE, "instances/s": RATE},
        phases=[Phase("calm", calm), Phase("burst", stormy)],
        tables=[Table("Warming", ["announced", "ready", "within s", "a second"], rows)],
        bars=bars,
    )


def until_ready(ours: Daemon, studies: list[Series], start: float, wait_s: float, over: threading.Event) -> float:
    """The seconds since ``start`` when the last of the studies was ready; or that were waited for.

    One study is asked for at a time, which takes the daemon much less than all of its metrics would.
    """
    left = list(studies)
    while left and not over.wait(0.1) and time.monotonic() - start <= wait_s:
        while left and ready(ours, left[-1]):
            left.pop()
    return time.monotonic() - start


def ready(ours: Daemon, study: Series) -> bool:
    """Whether everything that its arrival calls for is held."""
    return bool(ours.call("GET", f"/v1/studies/{study.ref.study}")["ready"])


if __name__ == "__main__":
    sys.exit(scenario.main("burst", __name__, burst))
