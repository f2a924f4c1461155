"""What caches do when it gets difficult, each before the same bucket, whose GETs are counted.

*100 misses at once* of one series: GETs for each of its objects. *Past the limit*: twice as many bytes as the limit are
asked for; the most that was used. *A changed object*: one slice is replaced in the bucket, and the series is asked for
again, now and (of voxcache) after the bucket's notification: old, new or mixed? *Killed during a fill*: kill -9 while a
series is fetched, then a new start: is what is answered right, and how soon?

    python -m loadtest.scenarios.behaviour [--short] [--only NAME,NAME] [--out FILE]
"""

import argparse
import contextlib
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from loadtest import scenario, slow
from loadtest.figures import Bar, at_most, say
from loadtest.outcome import Result, Table
from loadtest.peers.archives import Gateway
from loadtest.peers.base import Peer, Tensor, check, expected
from loadtest.peers.mounts import Rclone
from loadtest.peers.ours import OverLease
from loadtest.peers.proxies import NginxCache, Varnish
from loadtest.peers.ready import DiskCache, RedisTensors
from loadtest.stand import MIB, Bucket, Series, disk_usage, folder, gateway, make_series, rss

PEERS: Final[tuple[type[Peer], ...]] = (OverLease, Gateway, NginxCache, Varnish, Rclone, RedisTensors, DiskCache)
AT_ONCE: Final = 100
LIMIT: Final = 96 * MIB


def behaviour(options: argparse.Namespace) -> Result:
    only = [name for name in options.only.split(",") if name]
    rows: list[list[str | float | int | None]] = []
    missing: dict[str, str] = {}
    bars: list[Bar] = []
    with folder("behaviour") as place, gateway(place) as bucket, slow.before(bucket, place, 0.0, 0.0) as counted:
        series = [make_series(place / "series", 8, seed=seed) for seed in range(2 * LIMIT // (8 * MIB))]
        changed = make_series(
            place / "changed", 8, seed=99, study_uid=series[1].ref.study, series_uid=series[1].ref.series
        )
        for each in series:
            bucket.put(each.files)
        right = {each.ref.series: expected(each) for each in series}
        for kind in PEERS:
            if only and not any(part.lower() in kind.name.lower() for part in only):
                continue
            say(kind.name)
            bucket.put(series[1].files)
            try:
                told = tried(kind, place / kind.__name__, counted, bucket, series=series, changed=changed, right=right)
            except Exception as error:
                if kind is OverLease:  # it is what is tested, and no peer that may be left out
                    raise
                missing[kind.name] = f"{type(error).__name__}: {error}"[:400]
                say(f"  {missing[kind.name]}")
                continue
            rows.append([kind.name, *told])
            say("  " + "  ".join(str(each) for each in told))
            if kind is OverLease:
                bars.append(at_most("behaviour: GETs of an object for 100 misses at once", float(told[0] or 0), 1.0))
                bars.append(at_most("behaviour: bytes used, by the limit", float(told[1] or 0), 1.0))
                odd = sum(each in ("wrong", "mixed", "old") for each in told)
                bars.append(at_most("behaviour: wrong, mixed or outdated answers", odd, 0))
    columns = ["who", "GETs an object", "used, by the limit", "changed object", "after kill -9", "back after s"]
    return Result(
        scenario="behaviour",
        says="",
        short=options.short,
        parameters={"limit MiB": LIMIT // MIB, "asked for MiB": 8 * len(series), "misses at once": AT_ONCE},
        tables=[
            Table(
                "When it gets difficult",
                columns,
                rows,
                "Used: of disk where a peer keeps its content there, else of memory above what the empty process had; "
                "for voxcache the larger of arena and NVMe, each by its own limit. Changed: what the next request got; "
                "voxcache by the bucket's notification, once arrivals.quiet_s was over; the others know no such thing.",
            )
        ],
        bars=bars,
        missing=missing,
    )


def tried(
    kind: type[Peer],
    place: Path,
    counted: Bucket,
    bucket: Bucket,
    *,
    series: list[Series],
    changed: Series,
    right: dict[str, Tensor],
) -> list[str | float | int | None]:
    """One peer's row."""
    peer = kind(place, counted, LIMIT)
    with contextlib.ExitStack() as stack:
        peer.start(stack)
        at_first = rss(peer.pid) if peer.pid else 0
        before = slow.gets(counted)
        peer.at_once = 1  # a hundred callers with as many requests each would test sockets
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda _: check(peer.tensor(series[0]), right[series[0].ref.series]), range(AT_ONCE)))
        peer.at_once = 8
        gets = (slow.gets(counted) - before) / len(series[0].files)
        most = used(peer, at_first)
        for each in series[1:]:
            check(peer.tensor(each), right[each.ref.series])
            most = max(most, used(peer, at_first))
        peer.tensor(series[1])
        bucket.put(changed.files)
        if isinstance(peer, OverLease):
            notified(peer, changed)
        news = compared(peer, series[1], right[series[1].ref.series], expected(changed))
        if kind is Gateway or not peer.pid:
            return [round(gets, 2), None if kind is Gateway else round(most / LIMIT, 3), news, None, None]
        after, seconds = killed(peer, counted, stack, series[2], right[series[2].ref.series])
        return [round(gets, 2), round(most / LIMIT, 3), news, after, seconds]


def notified(peer: OverLease, series: Series) -> None:
    """As the bucket would; returns once the daemon has acted on it, which is after ``arrivals.quiet_s``.

    Raises: RuntimeError.
    """
    told = [{"study": series.ref.study, "series": series.ref.series, "key": key, "time": "1"} for key in series.files]
    peer.daemon.call("POST", "/v1/arrivals/plain", told)
    end = time.monotonic() + 30
    while any(peer.daemon.metric("voxcache_arrivals", state=state) for state in ("new", "assigned")):
        if time.monotonic() > end:
            raise RuntimeError("the daemon does not look at what it was told")
        time.sleep(0.02)  # another process, which tells this only when asked


def used(peer: Peer, at_first: int) -> int:
    """Bytes that the peer's content takes."""
    if isinstance(peer, OverLease):
        return max(int(peer.daemon.metric("voxcache_tier_bytes", tier="ram")), disk_usage(peer.place / "nvme"))
    where = peer.disk()
    return disk_usage(where) if where is not None else max(0, rss(peer.pid) - at_first) if peer.pid else 0


def compared(peer: Peer, series: Series, old: Tensor, new: Tensor) -> str:
    """Which version of the series is answered."""
    told = peer.tensor(series)
    if told.shape != old.shape:
        return "wrong"
    same_old = [bool((mine == before).all()) for mine, before in zip(told, old, strict=True)]
    same_new = [bool((mine == after).all()) for mine, after in zip(told, new, strict=True)]
    if all(same_new):
        return "new"
    if all(same_old):
        return "old"
    return "mixed" if all(o or n for o, n in zip(same_old, same_new, strict=True)) else "wrong"


def killed(
    peer: Peer, counted: Bucket, stack: contextlib.ExitStack, series: Series, right: Tensor
) -> tuple[str, float]:
    """Kill it while it fetches a series that it does not hold (or may not); what a new one answers, and when."""
    if isinstance(peer, OverLease):
        peer.daemon.forget([series.ref])

    def asking() -> None:
        with contextlib.suppress(Exception):  # it is killed under this
            peer.tensor(series)

    before = slow.gets(counted)
    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    while slow.gets(counted) == before and thread.is_alive():
        continue
    with contextlib.suppress(ProcessLookupError):
        os.kill(peer.pid, 9)
    thread.join(30)
    start = time.perf_counter()
    stack.close()
    peer.start(stack)
    told = peer.tensor(series)
    seconds = time.perf_counter() - start
    return ("right" if np.array_equal(told, right) else "wrong"), round(seconds, 2)


def _options(parser: argparse.ArgumentParser) -> Any:
    parser.add_argument("--only", default="", help="peers whose name has one of these parts")


if __name__ == "__main__":
    sys.exit(scenario.main("behaviour", __name__, behaviour, _options))
