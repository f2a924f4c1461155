"""Everybody on the same bytes: how long until a series' tensor can be given to a model, and what that takes.

Three parts. *Time to tensor*: the first miss of a CT of 300 slices, and hits of one of 128 MiB, brought to this process
by each peer in turn. *Floors*: the least that each of our figures could be, in the same turns. *Throughput*: 8 and 64
clients at once, of single objects over HTTP with the server's processor time, and of ready tensors of 8 MiB.

    python -m loadtest.scenarios.compare [--short] [--only NAME,NAME] [--out FILE]
"""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from loadtest import floors, scenario
from loadtest.figures import Bar, at_least, at_most, quantile, say
from loadtest.generator import Closed, Load, Open, Request, run
from loadtest.outcome import Result, Table
from loadtest.peers import PEERS
from loadtest.peers.base import Peer, Tensor, check, expected
from loadtest.peers.ours import OverHttp, OverLease
from loadtest.peers.ready import DiskCache, RedisTensors
from loadtest.report import SUMMARY
from loadtest.servers import nginx
from loadtest.stand import MIB, Bucket, Series, cpu_s, disk_usage, exact, folder, gateway, make_series, rss

#: A hit by lease: so many times faster than the best peer that hands over the tensor.
HIT: Final = 100.0
#: The first miss of a series by the larger of its two floors.
MISS: Final = 1.3
#: Objects over HTTP: by nginx from the page cache, for each second of processor time.
HTTP: Final = 0.5
NGINX: Final = "nginx, page cache"
_IN_A_ROW: Final = 3


class _Sizes:
    def __init__(self, short: bool, mib: int) -> None:
        self.mib = mib
        self.misses = 3 if short else 5
        self.hits = 3 if short else 9
        self.quick_hits = 30 if short else 300
        self.seconds = 1.0 if short else 10.0


def compare(options: argparse.Namespace) -> Result:
    sizes = _Sizes(options.short, options.mib)
    only = [name for name in options.only.split(",") if name]
    missing: dict[str, str] = {}
    with folder("compare") as place, contextlib.ExitStack() as stack:
        bucket = stack.enter_context(gateway(place))
        say(f"storing a series of {sizes.mib} MiB, {sizes.misses} of {options.slices} slices, and one of 8 MiB")
        large = make_series(place / "series", sizes.mib, seed=1)
        misses = [make_series(place / "series", 0, slices=options.slices, seed=2 + n) for n in range(sizes.misses)]
        small = make_series(place / "series", 8, seed=0)
        everything = [large, *misses, small]
        for series in everything:
            bucket.put(series.files)
        limit = 2 * sum(series.nbytes for series in everything) + 256 * MIB
        peers: list[Peer] = []
        for kind in PEERS:
            if only and not any(part.lower() in kind.name.lower() for part in only):
                continue
            say(f"starting {kind.name}")
            with contextlib.ExitStack() as own:
                try:
                    peer = kind(place / kind.__name__, bucket, limit)
                    peer.start(own)
                    for series in everything:
                        peer.load(series)
                except Exception as error:
                    excused(kind, error, missing)
                    continue
                stack.push(own.pop_all())
                peers.append(peer)
        hits = hits_by(peers, large, sizes, missing)
        peers = [peer for peer in peers if peer.name not in missing]
        first_miss, floor_rows, least = beside_floors(
            peers, bucket, misses, tensor=large, place=place, sizes=sizes, missing=missing
        )
        http = over_http(peers, large, place, sizes)
        tensors = tensors_at_once(peers, small, sizes)
        summary = Table(
            SUMMARY,
            ["who", "first miss ms", "hit p50 ms", "hit p99 ms", "RAM MiB", "disk MiB"],
            [
                [
                    peer.name,
                    first * 1e3 if (first := first_miss.get(peer.name)) is not None else None,
                    quantile(hits[peer.name], 0.5),
                    quantile(hits[peer.name], 0.99),
                    rss(peer.pid) / MIB if peer.pid else None,
                    disk_usage(where) / MIB if (where := peer.disk()) is not None else None,
                ]
                for peer in peers
            ],
            f"int16 HU in this process, from objects in the bucket. First miss: {options.slices} slices of "
            f"512 × 512 that nobody has yet, median of {sizes.misses}. Hit: {sizes.mib} MiB, {sizes.hits} times, "
            f"{sizes.quick_hits} for ready tensors. RAM: resident, with all of the arena for voxcache, without the "
            "page cache for the others.",
        )
        bars = _bars(hits, first_miss, least, http)
    return Result(
        scenario="compare",
        says="",
        short=options.short,
        parameters={"tensor MiB": sizes.mib, "limit MiB": limit // MIB, "objects at a time": 32},
        tables=[summary, floor_rows, http, tensors, _settings(peers)],
        bars=bars,
        missing=missing,
    )


def _settings(peers: list[Peer]) -> Table:
    return Table("Settings", ["who", "settings"], [[peer.name, peer.settings] for peer in peers])


# ------------------------------------------------------------------ time to tensor


def hits_by(peers: list[Peer], series: Series, sizes: _Sizes, missing: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of hits, turn by turn, each of which is looked at. ``missing``: who failed, and is left out."""
    hits: dict[str, list[float]] = {peer.name: [] for peer in peers}
    right = expected(series)

    def ask(peer: Peer, into: list[float]) -> None:
        if peer.name in missing:
            return
        try:
            start = time.perf_counter()
            tensor = peer.tensor(series)
            _ = tensor.item(0), tensor.item(-1)
            into.append(time.perf_counter() - start)
            check(tensor, right)
        except Exception as error:
            excused(type(peer), error, missing)

    for peer in peers:
        ask(peer, [])
    for turn in range(-(-sizes.quick_hits // _IN_A_ROW)):
        for peer in _turned(peers, turn):
            if len(hits[peer.name]) < (sizes.hits if not peer.ready else sizes.quick_hits):
                for _ in range(_IN_A_ROW if peer.ready else 1):
                    ask(peer, hits[peer.name])
    for peer in peers:
        if hits[peer.name]:
            told = [quantile(hits[peer.name], share) for share in (0.5, 0.99)]
            say(f"  {peer.name:28} hit p50 {told[0]:9.3f} ms   p99 {told[1]:9.3f} ms")
    return hits


def excused(kind: type[Peer], error: Exception, missing: dict[str, str]) -> None:
    """Leave a peer out. Raises: the error itself, if it is ours: that is what is tested."""
    if issubclass(kind, OverLease):
        raise error
    missing[kind.name] = f"{type(error).__name__}: {error}"[:400]
    say(f"  {kind.name} is left out: {missing[kind.name]}")


def _turned(peers: list[Peer], turn: int) -> list[Peer]:
    at = turn % len(peers) if peers else 0
    return peers[at:] + peers[:at]


# ------------------------------------------------------------------ floors


def beside_floors(
    peers: list[Peer],
    bucket: Bucket,
    misses: list[Series],
    *,
    tensor: Series,
    place: Path,
    sizes: _Sizes,
    missing: dict[str, str],
) -> tuple[dict[str, float], Table, float]:
    """The first miss by peer (s), our figures beside their floors, and the larger floor of a miss (s)."""
    ours = next((peer for peer in peers if isinstance(peer, OverLease) and not isinstance(peer, OverHttp)), None)
    http = next((peer for peer in peers if isinstance(peer, OverHttp)), None)
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    say("floors, and first misses")
    for number, series in enumerate(misses):
        gets, codecs, right = floors.concurrent_get(bucket, series), floors.codec(series), expected(series)
        works: list[tuple[str, Callable[[], float] | Peer]] = [
            *((f"GET {name}", work) for name, work in gets.items()),
            *((f"codec {name}", work) for name, work in codecs.items()),
            *((f"miss {peer.name}", peer) for peer in peers if peer is not http),
        ]
        at = number * len(works) // len(misses)
        for name, work in works[at:] + works[:at]:
            if not isinstance(work, Peer):
                note(name, work())
            elif work.name not in missing:
                try:
                    note(name, _first(work, series, right))
                except Exception as error:
                    excused(type(work), error, missing)
    content = np.fromfile(next(iter(tensor.files.values())), np.uint8)
    content = np.resize(content, sizes.mib * MIB)
    raw = place / "floor.raw"
    content.tofile(raw)
    copying = floors.memcpy(content)
    with floors.Loopback(raw).running() as sends, floors.empty_handler(place) as empty:
        for _ in range(sizes.hits + 1):
            note("memcpy", copying())
            for way, send in sends.items():
                note(f"send {way}", send())
            for depth in (1, 8):
                note(f"O_DIRECT {depth}", floors.o_direct(raw, depth)())
        handler = floors.round_trips(empty, 300 if sizes.quick_hits < 100 else 3000)
    raw.unlink()
    middle = {name: median(values) for name, values in found.items()}

    def best(prefix: str) -> tuple[float, str]:
        return min((seconds, name) for name, seconds in middle.items() if name.startswith(prefix))

    get, decode = best("GET "), best("codec ")
    rows: list[list[str | float | int | None]] = []

    def row(what: str, value: float | None, floor: tuple[float, str]) -> None:
        rows.append(
            [what, None if value is None else value * 1e3, floor[0] * 1e3, value and value / floor[0], floor[1]]
        )

    least = max(get, decode)
    if ours is not None:
        row("first miss, lease", middle.get(f"miss {ours.name}"), least)
        lease = [floors.seconds(lambda: ours.tensor(tensor)) for _ in range(sizes.quick_hits)]
        row(f"RAM hit, {sizes.mib} MiB, lease", median(lease), (median(handler), "empty handler"))
        row(f"RAM hit, {sizes.mib} MiB, lease", median(lease), (middle["memcpy"], "memcpy"))
        row(f"NVMe hit, {sizes.mib} MiB, lease", nvme_hit(ours, tensor, sizes), best("O_DIRECT"))
    if http is not None:
        whole = [floors.seconds(lambda: http.tensor(tensor)) for _ in range(sizes.hits)]
        row(f"RAM hit, {sizes.mib} MiB, HTTP", median(whole), best("send"))
    rows += [
        [f"floor: {name}", seconds * 1e3, None, None, ""]
        for name, seconds in sorted(middle.items())
        if name[:5] != "miss "
    ]
    table = Table(
        "Our figures and their floors",
        ["what", "ms", "floor ms", "times", "the floor"],
        rows,
        "Medians of the same run, in turns. The floor of a miss is the larger of the fastest concurrent GET of all its "
        "objects and of the codec alone, neither of which does the other's work.",
    )
    return {name.removeprefix("miss "): s for name, s in middle.items() if name.startswith("miss ")}, table, least[0]


def _first(peer: Peer, series: Series, right: Tensor) -> float:
    start = time.perf_counter()
    tensor = peer.tensor(series)
    took = time.perf_counter() - start
    check(tensor, right)
    return took


def nvme_hit(ours: OverLease, series: Series, sizes: _Sizes) -> float | None:
    """Seconds of a lease that NVMe answers: after a restart of the daemon, each time."""
    found = []
    right = expected(series)
    ours.daemon.until_written(series.ref)
    for _ in range(2 if sizes.hits < 10 else 5):
        ours.daemon.stop()
        ours.daemon.start()
        start = time.perf_counter()
        told = ours.daemon.lease(series.ref)
        found.append(time.perf_counter() - start)
        if told["tier"] != "nvme":
            return None
        arena = np.memmap(Path("/dev/shm", told["shm"]), np.int16, "r", told["offset"], right.shape)
        check(arena, right)
    ours.pid = ours.daemon.pid
    return median(found)


# ------------------------------------------------------------------ throughput


def over_http(peers: list[Peer], series: Series, place: Path, sizes: _Sizes) -> Table:
    """Objects over HTTP at 8 and 64 clients, each server asked once for all of them before."""
    ways: list[tuple[str, list[Request], int]] = [
        (peer.name, requests, peer.pid) for peer in peers if (requests := peer.requests(series))
    ]
    rows: list[list[str | float | int | None]] = []
    for peer in peers:
        if type(peer) is OverLease:
            proven(peer, series)
    with contextlib.ExitStack() as stack:
        pages = place / "pages"
        pages.mkdir()
        for key, path in series.files.items():
            shutil.copy(path, pages / Path(key).name)
        (place / "nginx-pages").mkdir()
        for name, (port, pid) in {
            NGINX: stack.enter_context(nginx(place / "nginx-pages", pages)),
            "floor: aiohttp, from memory": stack.enter_context(floors.pages(place, pages)),
        }.items():
            base = f"http://127.0.0.1:{port}"
            ways.append((name, [Request("instances", f"{base}/{Path(key).name}") for key in series.files], pid))
        for name, requests, pid in ways:
            try:
                run(Load(requests, Closed(8, 1.0, in_order=True)), 1)
                told: dict[int, Any] = {}
                for users in (8, 64):
                    before = cpu_s(pid)
                    track = run(Load(requests, Closed(users, sizes.seconds)), 2)["instances"]
                    spent = cpu_s(pid) - before
                    told[users] = (
                        track.rate,
                        track.latency_ms.get("p99"),
                        track.n / spent if spent else None,
                        track.errors,
                    )
                    say(f"  {name:28} {users:3} clients {track.rate:8.0f} a second, {track.errors or ''}")
            except (RuntimeError, KeyError) as error:
                if name == OverLease.name:
                    raise
                say(f"  {name}: {error!r}")
                continue
            errors = sum(sum(each[3].values()) for each in told.values())
            rows.append([name, told[8][0], told[64][0], told[8][1], told[64][1], told[8][2], told[64][2], errors])
    columns = [
        "who",
        "a second, 8",
        "a second, 64",
        "p99 ms, 8",
        "p99 ms, 64",
        "per core-second, 8",
        "per core-second, 64",
        "errors",
    ]
    return Table(
        "Objects of 512 KiB over HTTP",
        columns,
        rows,
        f"{sizes.seconds:g} s of closed-loop clients on the same machine, every object asked for before. Per "
        "core-second: requests answered for each second of processor time of the server and its processes. The floor: "
        "a handler in the daemon's framework that only sends.",
    )


def proven(ours: OverLease, series: Series) -> None:
    """Raises: RuntimeError: an object that is served is not the very one in the bucket."""
    requests = exact(ours.daemon.url, series, "instances")
    track = run(Load(requests, Open([(0.0, number) for number in range(len(requests))])), 1)["instances"]
    if track.errors or track.n != len(requests):
        raise RuntimeError(f"of {len(requests)} objects {track.n} are right: {track.errors}")


def tensors_at_once(peers: list[Peer], series: Series, sizes: _Sizes) -> Table:
    """Ready tensors of 8 MiB a second, by threads of one process, which is where an inference service has them."""
    rows: list[list[str | float | int | None]] = []
    right = expected(series)
    ends = right.item(0), right.item(-1)
    for peer in peers:
        if type(peer) not in (OverLease, OverHttp, RedisTensors, DiskCache):
            continue
        told = []
        for clients in (8, 64):
            over = time.perf_counter() + sizes.seconds

            def client(_: int, over: float = over, peer: Peer = peer) -> int:
                done = 0
                while time.perf_counter() < over:
                    # the whole of it would cost as much as the hand-over does: its ends are looked at
                    tensor = peer.tensor(series)
                    assert (tensor.item(0), tensor.item(-1)) == ends, "another tensor than the objects have"
                    done += 1
                return done

            check(peer.tensor(series), right)
            with ThreadPoolExecutor(clients) as pool:
                start = time.perf_counter()
                done = sum(pool.map(client, range(clients)))
                told.append(done / (time.perf_counter() - start))
        rows.append([peer.name, *told, told[0] * 8 * MIB / 1e6])
        say(f"  {peer.name:28} tensors of 8 MiB: {told[0]:8.0f} and {told[1]:8.0f} a second")
    return Table("Ready tensors of 8 MiB", ["who", "a second, 8 threads", "a second, 64 threads", "MB/s, 8"], rows)


# ------------------------------------------------------------------ bars


def _bars(hits: dict[str, list[float]], first_miss: dict[str, float], least: float, http: Table) -> list[Bar]:
    bars = []
    ready = {name: quantile(hits[name], 0.5) for name in (RedisTensors.name, DiskCache.name) if hits.get(name)}
    ours = OverLease.name
    if ready and hits.get(ours):
        best = min(ready, key=ready.__getitem__)
        value = ready[best] / quantile(hits[ours], 0.5)
        bars.append(at_least("hit, times faster than the best peer with the same tensor", value, HIT, best))
    if ours in first_miss:
        bars.append(at_most("first miss, by its floor", first_miss[ours] / least, MISS))
        others = {name: seconds for name, seconds in first_miss.items() if name != ours}
        if others:
            best = min(others, key=others.__getitem__)
            value = others[best] / first_miss[ours]
            bars.append(at_least("first miss, times faster than the fastest peer", value, 1.0, best))
    rates = {row[0]: row for row in http.rows}
    if ours in rates:
        bars.append(at_most("errors of objects over HTTP", float(rates[ours][7] or 0), 0))
    if ours in rates and NGINX in rates:
        mine, theirs = rates[ours][5], rates[NGINX][5]
        if isinstance(mine, float) and isinstance(theirs, float):
            bars.append(
                at_least("objects over HTTP per core-second, by nginx from the page cache", mine / theirs, HTTP)
            )
    return bars


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="peers whose name has one of these parts")
    parser.add_argument("--mib", type=int, default=128, help="size of the tensor of the hits (default: 128)")
    parser.add_argument("--slices", type=int, default=300, help="of the series that are missed (default: 300)")


if __name__ == "__main__":
    sys.exit(scenario.main("compare", __name__, compare, _options))
