"""A bucket that is ten seconds late for one request in two hundred, with hedges and deadlines and without.

Hits at a steady rate, and misses beside them, each a lease of a series that nobody has had. First on the calm bucket,
then on one that is late now and then: as the daemon comes, without hedges, and with neither hedges nor a deadline that
is shorter than the bucket's lateness. Hits must not notice; what hedges save shows in the tail of the misses.

    python -m loadtest.scenarios.slow_origin [--short] [--out FILE]
"""

import argparse
import sys
from pathlib import Path
from typing import Final

from loadtest import scenario, slow
from loadtest.figures import Bar, at_most, say
from loadtest.generator import Open, evenly, mixed, run
from loadtest.measures import Track
from loadtest.outcome import Phase, Result
from loadtest.stand import MIB, Bucket, Series, daemon, folder, gateway, lease, make_series

SHARE: Final = 0.005
LATE_S: Final = 10.0
#: Hits a second.
RATE: Final = 50
#: The daemon's settings of the bucket, by phase. The default deadline is 60 s, and responses may pause for 10.
WAYS: Final = {
    "calm": "",
    "late, as it comes": "",
    "late, no hedges": "hedge = 0.0",
    "late, no hedges, no deadlines": "hedge = 0.0\ndeadline_s = 0.0\nread_timeout_s = 60.0",
    "late, a deadline of 2 s": "hedge = 0.0\ndeadline_s = 2.0",
}
#: Who is without hedges, as the bucket is: the one without deadlines takes long, so the short form has the other.
BARE: Final = {False: "late, no hedges, no deadlines", True: "late, no hedges"}
#: Misses' p99 with hedges by that without; hits' p99 on the late bucket by that on the calm one.
HEDGED: Final = 0.25
NOISE: Final = 1.5


def slow_origin(options: argparse.Namespace) -> Result:
    misses, every_s, slices = (10, 1.5, 60) if options.short else (60, 2.0, 300)
    with folder("slow-origin") as place, gateway(place) as bucket:
        say(f"storing {misses + 1} series of {slices} slices")
        hit, *others = (
            make_series(place / "series", 0, slices=slices, rows=128, columns=128, seed=seed)
            for seed in range(misses + 1)
        )
        for series in (hit, *others):
            bucket.put(series.files)
        phases = []
        notes = []
        with slow.before(bucket, place, SHARE, LATE_S) as late:
            ways = [way for way in WAYS.items() if not (options.short and way[0] == BARE[False])]
            for number, (name, settings) in enumerate(ways):
                say(f"  {name}")
                origin = bucket if name == "calm" else late
                tracks, note = phase(place / str(number), origin, settings, hit=hit, others=others, every_s=every_s)
                phases.append(Phase(name, tracks, settings.replace("\n", ", ") or "the defaults"))
                notes.append(f"{name}: {note}")
    return Result(
        scenario="slow-origin",
        says="",
        short=options.short,
        parameters={
            "late requests": f"{SHARE:.1%}",
            "late s": LATE_S,
            "slices": slices,
            "misses": misses,
            "hits/s": RATE,
        },
        phases=phases,
        bars=_bars({phase.name: phase for phase in phases}, BARE[options.short]),
        notes=notes,
    )


def phase(
    place: Path, origin: Bucket, settings: str, *, hit: Series, others: list[Series], every_s: float
) -> tuple[dict[str, Track], str]:
    """The figures of hits and misses, and how many hedges there were."""
    extra = '[store]\nrevalidate = "events"'
    total = sum(series.nbytes for series in (hit, *others))
    with daemon(
        place, origin, ram=4 * total + 256 * MIB, nvme=4 * total + 256 * MIB, extra=extra, origin_more=settings
    ) as ours:
        ours.lease(hit.ref, ttl_s=3600)
        hits = [lease(ours.url, hit.ref, "hits")]
        missed = [lease(ours.url, series.ref, "misses") for series in others]
        due = Open([(1.0 + number * every_s, number) for number in range(len(missed))])
        seconds = 1.0 + len(missed) * every_s
        tracks = run(mixed((hits, evenly(RATE, seconds, [0])), (missed, due)), 1)
        told = {how: ours.metric("voxcache_hedges_total", outcome=how) for how in ("won", "lost", "failed", "denied")}
        retries = ours.metric("voxcache_origin_retries_total")
        fetched = ours.metric("voxcache_origin_requests_total", kind="fetch", outcome="ok")
    hedges = ", ".join(f"{int(count)} {how}" for how, count in told.items())
    return tracks, f"{int(fetched)} objects fetched, hedges: {hedges}; {int(retries)} retries"


def _bars(phases: dict[str, Phase], without: str) -> list[Bar]:
    calm, hedged, bare = (phases[name].tracks for name in ("calm", "late, as it comes", without))
    misses = hedged["misses"].latency_ms["p99"] / bare["misses"].latency_ms["p99"]
    hits = hedged["hits"].latency_ms["p99"] / calm["hits"].latency_ms["p99"]
    errors = sum(sum(track.errors.values()) for track in hedged.values())
    return [
        at_most("slow origin: misses' p99 with hedges, by that without", misses, HEDGED),
        at_most("slow origin: hits' p99, by that on the calm bucket", hits, NOISE),
        at_most("slow origin: errors", errors, 0),
    ]


if __name__ == "__main__":
    sys.exit(scenario.main("slow-origin", __name__, slow_origin))
