"""CT, MR, ultrasound, mammography, tomosynthesis and pathology: few large objects, or many small ones.

Each is a series of as many objects, as large as is common in practice (below), read one by one by eight users in a
closed loop: straight from the bucket, and from a daemon that has read it before. Between them it is read for the first
time: all objects once, asked for at the same moment, of a daemon that has nothing. The bytes are random: a daemon that
serves instances does not look at them, and nothing is to be gained by compressing.

    python -m loadtest.scenarios.modalities [--short] [--out FILE]
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Final, NamedTuple

from cache.keys import SeriesRef
from loadtest import scenario
from loadtest.figures import at_most, say
from loadtest.generator import Closed, Load, Open, run
from loadtest.measures import Track
from loadtest.outcome import Phase, Result, Table
from loadtest.stand import MIB, Bucket, Series, daemon, folder, gateway, instances, objects


class Kind(NamedTuple):
    """A series as it is common: objects, their median size and the sigma of its logarithm; and who says so."""

    objects: int
    nbytes: int
    spread: float
    source: str


KINDS: Final = {
    "CT": Kind(240, 527_000, 0.0, "LIDC-IDRI (TCIA): 244 527 images of 1 018 CTs, 512 × 512 × 16 bits"),
    "MR": Kind(60, 206_000, 0.0, "docs/workload.md: 60 slices of 320 × 320 × 16 bits"),
    "US cine": Kind(
        20, 4_000_000, 0.6, "assumed: clips of some 60 frames of 800 × 600, JPEG; sizes vary with their length"
    ),
    "MG": Kind(4, 27_000_000, 0.2, "four views of 3328 × 4096 × 16 bits, as common detectors give them"),
    "DBT": Kind(4, 74_000_000, 0.3, "BCS-DBT (TCIA): 22 032 volumes in 1.6 TB, lossless, one file each"),
    "pathology": Kind(
        400, 90_000, 0.5, "assumed: tiles of 512 × 512 as single JPEGs of about 90 kB, a part of a slide"
    ),
}


#: Who has to have answered.
TIERS: Final = {"first read": "origin", "RAM": "ram"}


def modalities(options: argparse.Namespace) -> Result:
    seconds = 2.0 if options.short else 15.0
    phases: list[Phase] = []
    rows: list[list[str | float | int | None]] = []
    errors = elsewhere = 0
    with folder("modalities") as place, gateway(place) as bucket:
        for seed, (name, kind) in enumerate(KINDS.items()):
            say(f"{name}: {kind.objects} objects")
            series = made(place / "series", kind, seed, 4 if options.short else 1)
            bucket.put(series.files)
            tracks = measured(place / name.replace(" ", "-"), bucket, series, seconds)
            phases.append(Phase(name, tracks, kind.source))
            errors += sum(sum(track.errors.values()) for track in tracks.values())
            elsewhere += sum(tracks[read].n - tracks[read].tiers.get(tier, 0) for read, tier in TIERS.items())
            figures = [tracks[track].latency_ms.get("p50") for track in ("bucket", "first read", "RAM")]
            rates = [tracks[track].nbytes / 1e6 / tracks[track].seconds for track in ("bucket", "RAM")]
            rows.append([name, len(series.files), series.nbytes / 1e6, *figures, *rates])
    columns = ["series", "objects", "MB", "bucket p50 ms", "first read p50 ms", "RAM p50 ms", "bucket MB/s", "RAM MB/s"]
    return Result(
        scenario="modalities",
        says="",
        short=options.short,
        parameters={"users": 8, "seconds": seconds},
        phases=phases,
        tables=[Table("Modalities", columns, rows)],
        bars=[
            at_most("modalities: errors", errors, 0),
            at_most("modalities: first reads that were none, and others that RAM did not answer", elsewhere, 0),
        ],
        notes=[f"{name}: {kind.source}" for name, kind in KINDS.items()],
    )


def made(place: Path, kind: Kind, seed: int, part: int) -> Series:
    """A series of random bytes; of its objects one in ``part``, four at least."""
    dice = random.Random(seed)  # noqa: S311 - sizes
    ref = SeriesRef(f"1.2.826.0.1.3680043.10.1402.{seed}", f"1.2.826.0.1.3680043.10.1402.{seed}.1")
    files = {}
    for number in range(max(4, kind.objects // part)):
        key = f"{ref.study}/{ref.series}/1.2.3.{number:05d}.dcm"
        path = place / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dice.randbytes(int(kind.nbytes * dice.lognormvariate(0, kind.spread))))
        files[key] = path
    return Series(ref, files)


def measured(place: Path, bucket: Bucket, series: Series, seconds: float) -> dict[str, Track]:
    extra = '[store]\nrevalidate = "events"'
    tracks = run(Load(objects(bucket, series, "bucket"), Closed(8, seconds)), 1)
    budget = 2 * series.nbytes + 64 * MIB
    with daemon(place, bucket, ram=budget, nvme=2 * budget, extra=extra) as ours:
        first = instances(ours.url, series, "first read")
        tracks |= run(Load(first, Open([(0.0, number) for number in range(len(first))])), 1)
        tracks |= run(Load(instances(ours.url, series, "RAM"), Closed(8, seconds)), 1)
    return tracks


if __name__ == "__main__":
    sys.exit(scenario.main("modalities", __name__, modalities))
