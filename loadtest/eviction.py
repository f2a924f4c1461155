"""Eviction policies on request traces: ours beside libcachesim's, and beside what no policy could do better.

The traces are the public ones (``$VOXCACHE_TESTDATA/traces``, oracleGeneral), the radiology workload (docs/workload.md)
and synthetic families that nothing was tuned on. At each share of the working set, three miss ratios: of requests, of
bytes, and of the seconds that making the missed entries takes. GDSF and adaptive are run with each as their aim. Where
a trace tells no cost, it is what the origin takes: time to the first byte, then bandwidth. The bound is Belady's
minimum where sizes are equal, else PFOO-L (Berger et al., SIGMETRICS 2018).

libcachesim's S3-FIFO differs from its paper: until the first eviction it lets what does not fit the small queue into
the large one, it never holds what is larger than the small queue, its queues have parts of the capacity, not of what is
held, and what is asked for leaves the ghost before there is room for it. Its GDSF makes room after it has let something
in, which then goes at once if it is worth least. So ours are compared with these added.

    python -m loadtest.eviction [--quick] [--only PART] [--jobs N]

Progress goes to stderr; the last line on stdout is JSON. All figures: loadtest/results/eviction.json and .svg.
"""

import argparse
import heapq
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import imagecodecs
import libcachesim
import numpy as np
import numpy.typing as npt

from cache.interfaces import EvictionPolicy
from cache.policy.adaptive import Adaptive
from cache.policy.gdsf import Gdsf
from cache.policy.lru import Lru
from cache.policy.s3fifo import S3Fifo
from cache.policy.sieve import Sieve
from cache.policy.simulation import Simulation
from cache.policy.worth import Aim, worth

from . import workload
from .figures import Bar, at_most, plain, say

ROOT: Final = Path(__file__).resolve().parent
RESULTS: Final = ROOT / "results"
TRACES: Final = Path(os.environ.get("VOXCACHE_TESTDATA", ROOT.parent.parent / "shared" / "data")) / "traces"
SHARES: Final = (0.01, 0.1)
AIMS: Final[tuple[Aim, ...]] = get_args(Aim)
#: Requests a trace is brought down to by --quick, by leaving out objects.
QUICK: Final = 40_000
#: The bars: how far ours may be from libcachesim's, and adaptive from the best.
AGREE: Final = 0.002
WITHIN: Final = 1.02

_ORACLE: Final = np.dtype([("time", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next", "<i8")])

Array = npt.NDArray[Any]


class Trace(NamedTuple):
    """Requests in order: an object's number, its bytes, and the seconds a miss takes."""

    name: str
    key: Array
    size: Array
    cost: Array

    @property
    def equal(self) -> bool:
        return bool((self.size == self.size[0]).all())

    def capacity(self, share: float) -> int:
        """Bytes of so much of the working set, each object counted once, as large as it first was."""
        _, first = np.unique(self.key, return_index=True)
        return int(self.size[first].sum() * share)

    def sampled(self, requests: int) -> "Trace":
        """About so many requests: all of some objects, none of the others."""
        if len(self.key) <= requests:
            return self
        # Knuth's multiplicative hash: numbers of objects are often consecutive
        chosen = (self.key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40) < (requests << 24) // len(self.key)
        return Trace(self.name, self.key[chosen], self.size[chosen], self.cost[chosen])


# ------------------------------------------------------------------ traces


def fetched(size: Array) -> Array:
    """Seconds that the origin takes for objects of these sizes."""
    return workload.FIRST_BYTE + size / workload.FETCH


def public(path: Path) -> Trace:
    found = np.frombuffer(imagecodecs.zstd_decode(path.read_bytes()), _ORACLE)
    size = found["size"].astype(np.int64)
    return Trace(path.name.partition(".")[0], found["key"].astype(np.uint64), size, fetched(size))


def radiology() -> Trace:
    found = workload.requests(workload.Workload())
    return Trace("radiology", found["key"], found["size"].astype(np.int64), found["cost"])


def synthetic(family: str) -> Trace:
    """One family of loads, with sizes over three magnitudes."""
    rng = np.random.default_rng(2026)

    def zipf(requests: int, objects: int, exponent: float) -> Array:
        weights = 1 / np.arange(1, objects + 1) ** exponent
        return rng.choice(objects, requests, p=weights / weights.sum())

    def recent(requests: int, mean: float) -> Array:
        history: list[int] = []
        for fresh, back in zip(rng.random(requests) < 0.4, rng.exponential(mean, requests).astype(int), strict=True):
            history.append(len(history) if fresh or not history else history[-1 - min(back, len(history) - 1)])
        return np.array(history)

    match family:
        case "zipf":
            key = zipf(60_000, 6000, 0.9)
        case "loop":
            key = np.tile(np.arange(4000), 15)
        case "scans":  # a load of its own, and between its parts a scan over what is never asked for again
            parts = [zipf(4000, 5000, 0.9) for _ in range(12)]
            scans = [5000 + 1500 * number + np.arange(1500) for number in range(12)]
            key = np.concatenate([part for pair in zip(parts, scans, strict=True) for part in pair])
        case "shift":  # what is popular changes
            key = np.concatenate([1000 * number + zipf(5000, 5000, 1.0) for number in range(12)])
        case "recent":
            key = recent(60_000, 300)
        case "day and night":  # a load that recency suits, and one that it does not, in turns
            turns = []
            for number in range(4):
                turns += [10**6 * (number + 1) + recent(10_000, 300), np.tile(np.arange(2000), 4)]
            key = np.concatenate(turns)
        case _:
            raise ValueError(family)
    objects, key = np.unique(key, return_inverse=True)
    sizes = np.clip(1000 * (1 + rng.pareto(1.3, len(objects))), 1000, 10**6).astype(np.int64)
    return Trace(family, key.astype(np.uint64), sizes[key], fetched(sizes[key]))


FAMILIES: Final = ("zipf", "loop", "scans", "shift", "recent", "day and night")


@cache
def load(name: str, quick: bool) -> Trace:
    if name == "radiology":
        trace = radiology()
    elif name in FAMILIES:
        trace = synthetic(name)
    else:
        trace = public(next(TRACES.glob(f"{name}.oracleGeneral*")))
    return trace.sampled(QUICK) if quick else trace


# ------------------------------------------------------------------ who plays


class LibraryS3Fifo(S3Fifo[int]):
    """Our S3-FIFO with what libcachesim's does otherwise than the paper, but for what it never holds."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._filling = True
        self._came_back = False

    def asked(self, key: int) -> None:
        """Before each request: whom the ghost knows leaves it."""
        size = self._ghost.pop(key, None)
        self._came_back = size is not None
        self._ghost_bytes -= size or 0

    def _whole(self) -> float:
        return self._capacity

    def admitted(self, key: int, size: int, cost: float, now: float) -> None:
        full = self._filling and self._bytes - self._main_bytes >= int(self._capacity * 0.1)
        if full or self._came_back:
            self._ghost[key] = 0  # whom the ghost knows goes to the large queue
        super().admitted(key, size, cost, now)

    def evicted(self, key: int) -> None:
        self._filling = False
        super().evicted(key)


Play = Callable[[int, int, float], bool]


def simulated(policy: EvictionPolicy[int], capacity: int) -> Play:
    request = Simulation(policy, capacity).request
    return lambda key, size, cost: request(key, size, cost, 0.0)


def s3_fifo_as_theirs(capacity: int) -> Play:
    policy = LibraryS3Fifo(capacity)
    request, small = Simulation(policy, capacity).request, int(capacity * 0.1)

    def play(key: int, size: int, cost: float) -> bool:
        policy.asked(key)
        return size < small and request(key, size, cost, 0.0)

    return play


def gdsf_as_theirs(capacity: int) -> Play:
    """Our GDSF, room being made once the new one is in."""
    policy = Gdsf[int]("requests")
    sizes: dict[int, int] = {}
    held = 0

    def play(key: int, size: int, cost: float) -> bool:
        nonlocal held
        if key in sizes:
            policy.used(key, 0.0)
            return True
        if size <= capacity:
            policy.admitted(key, size, cost, 0.0)
            sizes[key] = size
            held += size
        while held > capacity:
            victim = next(policy.victims())
            policy.evicted(victim)
            held -= sizes.pop(victim)
        return False

    return play


def libcachesims(kind: Callable[..., Any], capacity: int) -> Play:
    peer = kind(capacity, hashpower=18)
    asked = libcachesim.Request()

    def play(key: int, size: int, cost: float) -> bool:
        asked.obj_id, asked.obj_size = key, size
        return bool(peer.get(asked))

    return play


#: Ours by name; those that weigh entries are made for an aim.
OURS: Final[dict[str, Callable[[Aim], EvictionPolicy[int]]]] = {
    "lru": lambda _: Lru(),
    "sieve": lambda _: Sieve(),
    "s3-fifo": lambda _: S3Fifo(),
    "gdsf": Gdsf,
    "adaptive": Adaptive,
}
AIMED: Final = ("gdsf", "adaptive")
THEIRS: Final = {
    "libcachesim LRU": libcachesim.LRU,
    "libcachesim SIEVE": libcachesim.Sieve,
    "libcachesim S3-FIFO": libcachesim.S3FIFO,
    "libcachesim GDSF": libcachesim.GDSF,
}
#: Ours with what theirs do otherwise.
AS_THEIRS: Final = {"s3-fifo as theirs": s3_fifo_as_theirs, "gdsf as theirs": gdsf_as_theirs}
#: Ours that have to agree with theirs.
TWINS: Final = {
    "lru": "libcachesim LRU",
    "sieve": "libcachesim SIEVE",
    "s3-fifo as theirs": "libcachesim S3-FIFO",
    "gdsf as theirs": "libcachesim GDSF",
}
#: They do not hold all that fits: nothing larger than a tenth of the cache, or nothing that is worth least of all.
REFUSING: Final = (*AS_THEIRS, "libcachesim S3-FIFO", "libcachesim GDSF")
BOUND: Final = "bound"


def player(name: str, aim: Aim, capacity: int) -> Play:
    if name in THEIRS:
        return libcachesims(THEIRS[name], capacity)
    if name in AS_THEIRS:
        return AS_THEIRS[name](capacity)
    return simulated(OURS[name](aim), capacity)


Ratios = dict[Aim, float]


def played(trace: Trace, play: Play) -> Ratios:
    """The miss ratios of requests, bytes and cost."""
    hits = [
        play(*request) for request in zip(trace.key.tolist(), trace.size.tolist(), trace.cost.tolist(), strict=True)
    ]
    return missed(trace, ~np.array(hits, bool))


def missed(trace: Trace, misses: Array) -> Ratios:
    weights = {"requests": np.ones(len(misses)), "bytes": trace.size.astype(float), "cost": trace.cost}
    return {aim: float(weights[aim][misses].sum() / weights[aim].sum()) for aim in AIMS}


# ------------------------------------------------------------------ what no policy could do better


def next_requests(key: Array) -> Array:
    """For each request the index of the next one for its object; the number of requests if there is none."""
    order = np.argsort(key, kind="stable")
    following = np.full(len(key), len(key))
    again = key[order[1:]] == key[order[:-1]]
    following[order[:-1][again]] = order[1:][again]
    return following


def belady(trace: Trace, entries: int) -> Ratios:
    """What is needed latest goes, be it what just came (Belady 1966): the least misses where sizes are equal."""
    due: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    misses = np.zeros(len(trace.key), bool)
    for number, (key, after) in enumerate(zip(trace.key.tolist(), next_requests(trace.key).tolist(), strict=True)):
        misses[number] = key not in due
        due[key] = after
        heapq.heappush(latest, (-after, key))
        while len(due) > entries:
            minus_due, victim = heapq.heappop(latest)
            if due.get(victim) == -minus_due:
                del due[victim]
    return missed(trace, misses)


def pfoo(trace: Trace, capacity: int) -> Ratios:
    """PFOO-L: of all times an object could be kept until its next request, those that take the least bytes × requests
    for what they spare, as many as the capacity allows on average rather than at each instant."""
    after = next_requests(trace.key)
    again = np.flatnonzero(after < len(trace.key))
    taken = (after[again] - again) * trace.size[again].astype(float)
    ratios: Ratios = {}
    for aim in AIMS:
        worths = np.array([worth(aim, *each) for each in zip(trace.size.tolist(), trace.cost.tolist(), strict=True)])
        spared = worths[after[again]]
        order = np.argsort(taken / spared, kind="stable")
        kept = order[np.cumsum(taken[order]) <= capacity * len(trace.key)]
        ratios[aim] = float(1 - spared[kept].sum() / worths.sum())
    return ratios


# ------------------------------------------------------------------ the run


class Job(NamedTuple):
    trace: str
    share: float
    policy: str
    aim: Aim | None  # None: for all that it does not matter to


def run(job: Job, quick: bool) -> tuple[Job, Ratios, float]:
    """The miss ratios the job is for, and the seconds it took."""
    start = time.perf_counter()
    trace = load(job.trace, quick)
    capacity = trace.capacity(job.share)
    if job.policy == BOUND:
        ratios = belady(trace, capacity // int(trace.size[0])) if trace.equal else pfoo(trace, capacity)
    else:
        ratios = played(trace, player(job.policy, job.aim or "requests", capacity))
    if job.aim is not None:
        ratios = {job.aim: ratios[job.aim]}
    return job, ratios, time.perf_counter() - start


def jobs(names: list[str], quick: bool) -> Iterator[Job]:
    for name in names:
        equal = load(name, quick).equal
        for share in SHARES:
            for policy in (BOUND, *TWINS, *OURS, *THEIRS):
                if policy in AIMED and not equal:
                    yield from (Job(name, share, policy, aim) for aim in AIMS)
                else:
                    yield Job(name, share, policy, None)


#: Trace, share and aim → miss ratio by policy.
Table = dict[tuple[str, float, Aim], dict[str, float]]


def measured(names: list[str], quick: bool, workers: int) -> Table:
    table: Table = {}
    # the longest first, so that none of them is left for the end
    todo = sorted(set(jobs(names, quick)), key=lambda job: len(load(job.trace, quick).key), reverse=True)
    with ProcessPoolExecutor(workers) as pool:
        running = [pool.submit(run, job, quick) for job in todo]
        for done, finished in enumerate(as_completed(running), 1):
            job, ratios, seconds = finished.result()
            for aim, ratio in ratios.items():
                table.setdefault((job.trace, job.share, aim), {})[job.policy] = ratio
            figures = "  ".join(f"{aim} {ratio:.4f}" for aim, ratio in ratios.items())
            say(f"{done:4}/{len(todo)}  {job.trace:22} {job.share:4.0%}  {job.policy:20} {seconds:6.1f} s   {figures}")
    order = [(name, share, aim) for name in names for share in SHARES for aim in AIMS]
    return {place: table[place] for place in order if place in table}


def bars(table: Table) -> list[dict[str, Any]]:
    """Agreement with libcachesim's, and how close adaptive comes to the best of all others, ours and theirs."""
    found: list[Bar] = []
    for mine, peer in TWINS.items():
        apart = max(abs(row[mine] - row[peer]) for (_, _, aim), row in table.items() if aim != "cost")
        found.append(at_most(f"{mine} beside {peer}", apart, AGREE))
    for kind, named in (("traces", False), ("synthetic", True)):
        # small caches gain by refusing what is large, which a cache cannot that hands out what it holds
        left_out = REFUSING if named else ()
        over = [over_best(row, left_out) for (name, _, _), row in table.items() if (name in FAMILIES) == named]
        if over:
            found.append(at_most(f"adaptive / best, {kind}", max(over), WITHIN))
    for (name, share, aim), row in table.items():
        if name == "radiology" and aim == "cost":
            found.append(at_most(f"adaptive / best, radiology cost {share:.0%}", over_best(row), 1))
    return plain(found)


def over_best(row: dict[str, float], left_out: Iterable[str] = ()) -> float:
    others = row.keys() - {"adaptive", BOUND, *left_out}
    return row["adaptive"] / min(row[policy] for policy in others)


# ------------------------------------------------------------------ the picture


def picture(table: Table) -> str:
    """The table as SVG: a row for each trace, share and aim, a column for each policy, the best of a row darkest."""
    columns = [BOUND, *OURS, *THEIRS]
    left, width, height, top = 250, 96, 22, 92
    total = left + width * len(columns) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{top + height * len(table) + 14}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<text x="12" y="24" font-size="15" font-weight="bold">Miss ratios</text>',
        '<text x="12" y="44" fill="#555">Darker is nearer to the best of its row. Sizes are shares of the working set. '
        "gdsf and adaptive have the row’s aim.</text>",
    ]
    for number, policy in enumerate(columns):
        words = policy.split(" ")
        for line, word in enumerate(words):
            y = top - 8 - 14 * (len(words) - 1 - line)
            lines.append(f'<text x="{left + width * number + width / 2}" y="{y}" text-anchor="middle">{word}</text>')
    for at, ((name, share, aim), row) in enumerate(table.items()):
        y = top + height * at
        lines.append(f'<text x="12" y="{y + 15}">{name}, {share:.0%}, {aim}</text>')
        ratios = [row[policy] for policy in columns[1:]]
        best, worst = min(ratios), max(ratios)
        for number, policy in enumerate(columns):
            nearness = 0.0 if policy == BOUND or worst == best else (worst - row[policy]) / (worst - best)
            x = left + width * number
            weight = ' font-weight="bold"' if row[policy] == best and policy != BOUND else ""
            lines.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}" fill="#2a7f9e" '
                f'fill-opacity="{0.75 * nearness:.3f}"/><text x="{x + width / 2}" y="{y + 15}" text-anchor="middle"'
                f"{weight}>{row[policy]:.4f}</text>"
            )
    return "\n".join([*lines, "</svg>\n"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="eviction", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"traces brought down to some {QUICK} requests")
    parser.add_argument("--only", default="", help="traces whose name has this part")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    options = parser.parse_args()
    start = time.perf_counter()
    files = sorted(path.name.partition(".")[0] for path in TRACES.glob("*.oracleGeneral*"))
    if not files:
        say(f"no traces in {TRACES}: set VOXCACHE_TESTDATA; only what is made here is played")
    names = [name for name in (*files, "radiology", *FAMILIES) if options.only in name]
    table = measured(names, options.quick, options.jobs)
    report: dict[str, Any] = {
        "benchmark": "eviction",
        "quick": options.quick,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()},
        "requests": {name: len(load(name, options.quick).key) for name in names},
        "misses": [
            {"trace": name, "share": share, "of": aim, "ratio": row} for (name, share, aim), row in table.items()
        ],
        "bars": bars(table),
    }
    if not (options.quick or options.only):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "eviction.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / "eviction.svg").write_text(picture(table))
    print(json.dumps(report))
    return 0 if all(bar["ok"] for bar in report["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
