"""What gauges read of the rooms when they are scraped."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from cache.errors import QueueDown
from cache.interfaces import Clock, Usage
from cache.lease import Leases
from cache.nvme import NvmeTier
from cache.ram import RamTier
from cache.store import Store
from cache.workers.pool import Workers

from .arrivals.queue import ArrivalQueue, Depth
from .front import Front
from .metrics import Metrics, Reading
from .price import PriceSettings, storage_cost

#: Seconds between two counts of the studies that are in use, and entries that are looked at in one turn of the loop.
_COUNT_EVERY_S = 60.0
_AT_ONCE = 1000
#: Ages of leases in seconds, by what those are called that are younger.
_AGES = {"1m": 60.0, "10m": 600.0, "1h": 3600.0}


def read_tiers(metrics: Metrics, ram: RamTier, nvme: NvmeTier) -> None:
    """Each tier's use, by namespace."""

    def reading(value: Callable[[Usage], int]) -> Reading:
        return lambda: [
            ((tier.name, namespace), float(value(tier.usage(namespace))))
            for tier in (ram, nvme)
            for namespace in tier.namespaces
        ]

    metrics.read("tier_bytes", reading(lambda usage: usage.used))
    metrics.read("tier_budget_bytes", reading(lambda usage: usage.budget))
    metrics.read("tier_reserved_bytes", reading(lambda usage: usage.reserved))
    whole = {tier.name: tier.usage for tier in (ram, nvme)}
    metrics.read("tier_taken_bytes", lambda: [((name,), float(usage().used)) for name, usage in whole.items()])
    metrics.read("tier_limit_bytes", lambda: [((name,), float(usage().budget)) for name, usage in whole.items()])
    metrics.read("arena_utilisation", lambda: [((), ram.utilisation)])
    metrics.read("arena_fragmentation", lambda: [((), ram.fragmentation)])
    metrics.read("tier_entries", reading(lambda usage: usage.entries))
    metrics.read("nvme_state", lambda: [((side,), float(state)) for side, state in nvme.health.items()])


def read_work(metrics: Metrics, store: Store, leases: Leases, workers: Workers, front: Front) -> None:
    """What is under way."""

    def ages() -> dict[str, int]:
        counts = dict.fromkeys((*_AGES, "older"), 0)
        for age in leases.ages():
            counts[next((name for name, limit in _AGES.items() if age < limit), "older")] += 1
        return counts

    def busy() -> dict[str, int]:
        return {"busy": workers.busy, "idle": workers.seats - workers.busy}

    metrics.read("leases", lambda: [((age,), float(count)) for age, count in ages().items()])
    metrics.read("workers", lambda: [((state,), float(count)) for state, count in busy().items()])
    metrics.read("fills_running", lambda: [((), float(store.under_way[0]))])
    metrics.read("fills_queued", lambda: [((), float(store.under_way[1]))])
    metrics.read("fills_waiters", lambda: [((), float(store.shared.waiters))])
    metrics.read("fills", lambda: [((), float(store.shared.begun))])
    metrics.read("fill_joins", lambda: [((), float(store.shared.joined))])
    servers = front.triton.servers
    metrics.read("triton_calls", lambda: [((), float(sum(server.calls for server in servers)))])
    metrics.read("triton_quarantined", lambda: [((), float(sum(server.quarantined for server in servers)))])
    metrics.read("inferences_waiting", lambda: [((), float(front.admission.waiting))])
    metrics.read("client_regions", lambda: [((), float(len(front.regions)))])


def read_arrivals(metrics: Metrics, queue: ArrivalQueue, clock: Clock) -> Callable[[], Awaitable[None]]:
    """The arrival queue; returns what looks at it, which is to be called before a scrape."""
    depth: Depth | None = None

    async def look() -> None:
        nonlocal depth
        # what was seen last is told while the queue does not answer: other metrics must not wait for it
        with contextlib.suppress(QueueDown, TimeoutError):
            async with asyncio.timeout(2.0):
                depth = await queue.depth()

    def states() -> list[tuple[tuple[str, ...], float]]:
        if depth is None:
            return []
        counts = {"new": depth.new, "assigned": depth.assigned, "done": depth.done, "dead": depth.dead}
        return [((state,), float(count)) for state, count in counts.items()]

    metrics.read("arrivals", states)
    metrics.read("arrival_oldest_seconds", lambda: [((), depth.waits(clock.now()) if depth is not None else 0.0)])
    return look


async def count_active(metrics: Metrics, ram: RamTier, nvme: NvmeTier, prices: PriceSettings, clock: Clock) -> None:
    """Count once a minute the studies that are in use, and what each of them costs. It never ends."""
    active = 0
    metrics.read("active_studies", lambda: [((), float(active))])
    cost = storage_cost(prices, ram.usage().budget, nvme.usage().budget)
    metrics.read("study_storage_cost", lambda: [((), cost / max(active, 1))])
    while True:
        since = clock.now() - prices.active_s
        seen: set[str] = set()
        for tier in (ram, nvme):
            for number, resident in enumerate(tier.residents()):
                if resident.last_use >= since:
                    seen.add(resident.key.study)
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)  # the loop serves hits meanwhile
        active = len(seen)
        await asyncio.sleep(_COUNT_EVERY_S)
