"""How the daemon is doing, in one answer: for the status page, for `voxcache`, and for whoever has no Prometheus."""

import asyncio
import contextlib
import math
import platform
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from cache import __version__
from cache.entry import Entry
from cache.errors import QueueDown
from cache.interfaces import Clock
from cache.lease import Leases
from cache.nvme import NvmeTier
from cache.ram import RamTier
from cache.store import Store
from cache.workers.pool import Workers

from . import condition
from .arrivals.queue import ArrivalQueue, Depth
from .condition import HealthAnswer
from .filler import Filler
from .metrics.rolling import Counts, quantiles
from .slo import Tracked
from .slow import SlowAnswer
from .watched import Watched

#: Series that are told of, and how old what was found out about others may be.
_RECENT: Final = 20
_LOOK_S: Final = 2.0
_TOLD_S: Final = 0.5


class WindowAnswer(msgspec.Struct, frozen=True):
    """Of so many durations the quantiles and the longest, in milliseconds, to 1 %."""

    n: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


class LatencyAnswer(msgspec.Struct, frozen=True):
    """How long something took in the last minute ("1m"), five ("5m") and the last hour ("1h").

    ``of`` "request": until the tensor was at hand, by the tier ``name`` that had it;
    ``of`` "stage": the stage ``name``.
    """

    of: Literal["request", "stage"]
    name: str
    windows: dict[str, WindowAnswer]


class SloAnswer(msgspec.Struct, frozen=True):
    """An objective: at least ``target`` of what ``tier`` answers is at hand within ``threshold_ms``.

    ``budget_left``: the part of what may be slower that is left since the start, below 0 if more was. ``burn_5m``,
    ``burn_1h``: how many times as fast as it may it was used up.
    """

    name: str
    tier: str
    threshold_ms: float
    target: float
    budget_left: float
    burn_5m: float
    burn_1h: float


class TierAnswer(msgspec.Struct, frozen=True):
    """What a tier holds for a namespace."""

    tier: str
    namespace: str
    bytes: int
    budget_bytes: int
    reserved_bytes: int
    entries: int


class ArenaAnswer(msgspec.Struct, frozen=True):
    """The parts of the arena that are taken, and of what is free that is not in the largest hole."""

    utilisation: float
    fragmentation: float


class HitsAnswer(msgspec.Struct, frozen=True):
    """The parts of the answers that were held, by number, bytes and what they cost to make; null before the first."""

    requests: float | None
    bytes: float | None
    cost: float | None


class FillsAnswer(msgspec.Struct, frozen=True):
    """Fills that run, and that wait for a slot."""

    running: int
    queued: int


class ArrivalsAnswer(msgspec.Struct, frozen=True):
    """Events in the arrival queue by state, and for how many seconds the oldest waits that still does."""

    new: int = 0
    assigned: int = 0
    done: int = 0
    dead: int = 0
    oldest_s: float = 0.0


class WarmingAnswer(msgspec.Struct, frozen=True):
    """A warm-up under way: its job, what it is about ("" for several studies), entries ready of all."""

    job: str
    kind: str
    study: str
    done: int
    of: int
    failures: int


class RecentAnswer(msgspec.Struct, frozen=True):
    """A series that was asked for lately, and the tier that its entry is in now ("" for none)."""

    study: str
    series: str
    tier: str
    bytes: int
    last_use: float


class StatsAnswer(msgspec.Struct, frozen=True):
    """How the daemon is doing: what held, answered and saved, since the start unless something else is said."""

    time: float
    uptime_s: float
    version: str
    node: str
    latency: list[LatencyAnswer]
    slos: list[SloAnswer]
    tiers: list[TierAnswer]
    arena: ArenaAnswer
    hits: HitsAnswer
    saved_seconds: float
    fills: FillsAnswer
    leases: int
    arrivals: ArrivalsAnswer
    warming: list[WarmingAnswer]
    recent: list[RecentAnswer]
    health: list[HealthAnswer]
    slow: list[SlowAnswer]


class Recent:
    """The series that were asked for last. What it hears of is what a tier answered with."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], tuple[Entry, float]] = OrderedDict()

    def __call__(self, tier: str, entry: Entry) -> None:
        series = entry.key.study, entry.key.series
        self._entries[series] = entry, self._clock.now()
        self._entries.move_to_end(series)
        if len(self._entries) > _RECENT:
            self._entries.popitem(last=False)

    def latest_first(self) -> Sequence[tuple[Entry, float]]:
        return list(reversed(self._entries.values()))


class Held(NamedTuple):
    """The rooms that hold something."""

    store: Store
    ram: RamTier
    nvme: NvmeTier
    leases: Leases


class Stats:
    """Puts the answer together; what it takes time to find out is not asked more often than every few seconds.

    ``triton`` tells what of the inference servers is there.
    """

    def __init__(
        self,
        watched: Watched,
        held: Held,
        filler: Filler,
        queue: ArrivalQueue,
        workers: Workers,
        *,
        triton: Callable[[], Awaitable[Mapping[str, bool]]],
        shared_queue: bool,
        clock: Clock,
    ) -> None:
        self._metrics = watched.metrics
        self._slos = watched.slos
        self._slow = watched.slow
        self._uids = watched.uids
        self._store, self._ram, self._nvme, self._leases = held
        self._filler = filler
        self._queue = queue
        self._workers = workers
        self._triton = triton
        self._shared_queue = shared_queue
        self._clock = clock
        self._started = clock.monotonic()
        self._recent = Recent(clock)
        self._told: StatsAnswer | None = None
        self._told_at = -math.inf
        self._telling = asyncio.Lock()
        self._arrivals = ArrivalsAnswer()
        self._health: list[HealthAnswer] = []
        self._looked_at = -math.inf
        self._metrics.hear_of(self._recent)

    async def now(self) -> StatsAnswer:
        """How it is; the same for all who ask within half a second."""
        async with self._telling:
            now = self._clock.monotonic()
            if self._told is None or now - self._told_at >= _TOLD_S:
                if now - self._looked_at >= _LOOK_S:
                    await self._look()
                    self._looked_at = now
                self._told, self._told_at = self._tell(), now
            return self._told

    def _tell(self) -> StatsAnswer:
        running, queued = self._store.under_way
        return StatsAnswer(
            time=self._clock.now(),
            uptime_s=round(self._clock.monotonic() - self._started, 1),
            version=__version__,
            node=platform.node(),
            latency=self._latency(),
            slos=[self._slo(tracked) for tracked in self._slos],
            tiers=self._tiers(),
            arena=ArenaAnswer(self._ram.utilisation, self._ram.fragmentation),
            hits=HitsAnswer(*self._metrics.hits()),
            saved_seconds=self._metrics.saved_seconds,
            fills=FillsAnswer(running, queued),
            leases=len(self._leases),
            arrivals=self._arrivals,
            warming=self._warming(),
            recent=self._recently(),
            health=self._health,
            slow=self._slow.answers(),
        )

    def _latency(self) -> list[LatencyAnswer]:
        kinds: tuple[tuple[Literal["request", "stage"], str], ...] = (
            ("request", "tier_seconds"),
            ("stage", "stage_seconds"),
        )
        lately = self._metrics.lately()
        return [
            LatencyAnswer(of, name, {window: _window(each.counts) for window, each in rolling.windows.items()})
            for of, histogram in kinds
            for name, rolling in lately[histogram].items()
        ]

    def _slo(self, tracked: Tracked) -> SloAnswer:
        slo, now = tracked.slo, self._clock.monotonic()
        return SloAnswer(
            name=slo.name,
            tier=slo.tier,
            threshold_ms=slo.threshold_s * 1e3,
            target=slo.target,
            budget_left=tracked.budget_left,
            burn_5m=tracked.burn("5m", now),
            burn_1h=tracked.burn("1h", now),
        )

    def _tiers(self) -> list[TierAnswer]:
        return [
            TierAnswer(tier.name, namespace, usage.used, usage.budget, usage.reserved, usage.entries)
            for tier in (self._ram, self._nvme)
            for namespace in tier.namespaces
            for usage in (tier.usage(namespace),)
        ]

    def _warming(self) -> list[WarmingAnswer]:
        return [
            WarmingAnswer(job.id, job.kind, self._uids.shown(job.study), job.done, job.total, job.failures)
            for job in self._filler.under_way()
        ]

    def _recently(self) -> list[RecentAnswer]:
        return [
            RecentAnswer(
                study=self._uids.shown(entry.key.study),
                series=self._uids.shown(entry.key.series),
                tier="ram" if self._ram.lookup(entry.key) else "nvme" if self._nvme.lookup(entry.key) else "",
                bytes=entry.nbytes,
                last_use=at,
            )
            for entry, at in self._recent.latest_first()
        ]

    # ------------------------------------------------------------------ what has to be asked for

    async def _look(self) -> None:
        depth, checks = await asyncio.gather(self._depth(), self._triton())
        if depth is not None:
            waits = depth.waits(self._clock.now())
            self._arrivals = ArrivalsAnswer(depth.new, depth.assigned, depth.done, depth.dead, waits)
        found = (
            condition.origin(*self._metrics.origin_lately()),
            condition.triton(checks),
            condition.redis(depth is not None) if self._shared_queue else None,
            condition.disk(self._nvme.health),
            condition.workers(self._workers.alive, self._workers.busy, self._workers.seats),
        )
        self._health = [each for each in found if each is not None]

    async def _depth(self) -> Depth | None:
        with contextlib.suppress(QueueDown, TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                return await self._queue.depth()
        return None


def _window(counts: Counts) -> WindowAnswer:
    p50, p95, p99, most = (round(seconds * 1e3, 4) for seconds in quantiles(counts, (0.5, 0.95, 0.99, 1.0)))
    return WindowAnswer(int(counts.sum()), p50, p95, p99, most)
