"""Series of 100, 250 and 500 MB and of 1 GB, compressed and not, from everywhere they can be read.

The whole volume, decoded, and all slices one by one, in order and at random; from the bucket and from a plain directory
by a pydicom loop, and from the daemon: NVMe (after a restart), and RAM. Slices from the daemon are instances over HTTP,
and of those NVMe's first one brings the whole series. Volumes: medians of a few turns; slices: the mean of all of them,
once each.

    python -m loadtest.scenarios.series_sizes [--short] [--sizes MB,MB] [--out FILE]
"""

import argparse
import http.client
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

import obstore

from loadtest import scenario
from loadtest.figures import say
from loadtest.outcome import Result, Table
from loadtest.peers.base import get_all, read_all, volume_of
from loadtest.stand import MIB, SLICE, Bucket, Daemon, Series, daemon, folder, gateway, make_series
from voxcache_client import Client

SYNTAXES: Final = {"as it is": "1.2.840.10008.1.2.1", "HTJ2K": "1.2.840.10008.1.2.4.201"}


def series_sizes(options: argparse.Namespace) -> Result:
    sizes = [int(size) for size in (options.sizes or ("100" if options.short else "100,250,500,1000")).split(",")]
    rounds = 1 if options.short else 3
    rows: list[list[str | float | int | None]] = []
    with folder("series-sizes") as place, gateway(place) as bucket:
        for number, megabytes in enumerate(sizes):
            for form, syntax in SYNTAXES.items():
                say(f"{megabytes} MB, {form}")
                slices = round(megabytes * 1e6 / SLICE)
                source = place / f"series-{megabytes}-{form.replace(' ', '-')}"
                series = make_series(source, 0, slices=slices, seed=number, transfer_syntax=syntax)
                bucket.put(series.files)
                ram = 2 * slices * SLICE + 2 * series.nbytes + 256 * MIB
                extra = '[store]\nrevalidate = "events"'
                own = place / f"ours-{megabytes}-{form.replace(' ', '-')}"
                with daemon(own, bucket, ram=ram, nvme=2 * ram, extra=extra) as ours:
                    for where, told in measured(series, source, bucket, ours, rounds).items():
                        rows.append([f"{megabytes} MB, {form}", where, series.nbytes / 1e6, *told])
                        say(f"  {where:10} " + "  ".join("–" if each is None else f"{each:9.1f} ms" for each in told))
    columns = ["series", "from", "MB stored", "volume ms", "in order, ms a slice", "at random, ms a slice"]
    return Result(
        scenario="series-sizes",
        says="",
        short=options.short,
        parameters={"sizes MB": ", ".join(map(str, sizes)), "turns": rounds},
        tables=[
            Table("Series of all sizes", columns, rows, "Uncompressed size is that of the volume: 16 bits, 512 × 512.")
        ],
    )


def measured(series: Series, source: Path, bucket: Bucket, ours: Daemon, rounds: int) -> dict[str, list[float | None]]:
    """Milliseconds for the volume, and for a slice in order and at random, by where it is read from."""
    keys = sorted(series.files)
    mixed = random.Random(1).sample(keys, len(keys))  # noqa: S311 - an order
    store = bucket.store()

    def from_bucket(order: list[str]) -> None:
        for key in order:
            obstore.get(store, key).bytes()

    def from_directory(order: list[str]) -> None:
        for key in order:
            (source / key).read_bytes()

    found: dict[str, list[float | None]] = {
        "bucket": [
            timed(lambda: volume_of(get_all(store, keys)), rounds),
            timed(lambda: from_bucket(keys), 1, len(keys)),
            timed(lambda: from_bucket(mixed), 1, len(keys)),
        ],
        "directory": [
            timed(lambda: volume_of(read_all([source / key for key in keys])), rounds),
            timed(lambda: from_directory(keys), 1, len(keys)),
            timed(lambda: from_directory(mixed), 1, len(keys)),
        ],
    }
    numbers = {key: number for number, key in enumerate(keys)}
    base = f"/v1/studies/{series.ref.study}/series/{series.ref.series}/instances"

    def slices(order: list[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", ours.port)
        for key in order:
            connection.request("GET", f"{base}/{numbers[key]}")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
        connection.close()

    def volume() -> None:
        with Client(ours.url) as client, client.tensor(series.ref.study, series.ref.series, "volume") as tensor:
            _ = tensor.array.item(-1)

    found["first miss"] = [timed(volume, 1), None, None]
    ours.until_written(series.ref)

    def cold(work: Callable[[], object], parts: int = 1) -> float:
        ours.stop()
        ours.start()
        return timed(work, 1, parts)

    found["NVMe"] = [
        median(cold(volume) for _ in range(rounds)),
        cold(lambda: slices(keys), len(keys)),
        cold(lambda: slices(mixed), len(keys)),
    ]
    volume()
    slices(keys)
    found["RAM"] = [
        timed(volume, 10 * rounds),
        timed(lambda: slices(keys), 1, len(keys)),
        timed(lambda: slices(mixed), 1, len(keys)),
    ]
    return found


def timed(work: Callable[[], object], rounds: int, parts: int = 1) -> float:
    """The median of a few turns, in ms, for each of so many parts."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds) * 1e3 / parts


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", default="", help="MB, separated by commas")


if __name__ == "__main__":
    sys.exit(scenario.main("series-sizes", __name__, series_sizes, _options))
