"""Adaptive: what the policy that has lately done best would hold.

No policy wins on every load, and a load changes with the hour. So each of several experts runs a simulation of its own
over the same requests, in as many bytes as are really held: it misses what would have been missed, had that expert been
in charge (as Waldspurger et al. choose parameters, *Miniature Simulations*, ATC'17). What is held moves towards what
the best one simulates: first goes what that one does not hold.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Final, Generic, TypeVar

from cache.interfaces import EvictionPolicy

from .gdsf import Gdsf, once, proved
from .lru import Lru
from .s3fifo import S3Fifo
from .sieve import Sieve
from .simulation import Simulation
from .worth import Aim, worth

K = TypeVar("K", bound=Hashable)

#: For how many requests misses count, by entry held, and at least.
MEMORY: Final = 16
SHORTEST: Final = 2000
#: Uses that are noted before the experts hear of them: a hit need not wait for all that they make of it.
NOTED: Final = 64
#: How much less the best has to have missed than the leader to take over: a change costs something.
MARGIN: Final = 0.003


class _Expert(Generic[K]):
    def __init__(self, policy: EvictionPolicy[K]) -> None:
        self.simulation = Simulation(policy)
        self.loss = 0.0


class Adaptive(Generic[K]):
    """An EvictionPolicy that follows the expert whose misses were worth least to the ``aim``, late ones counting more.

    The experts: recency (LRU), quick demotion (SIEVE, S3-FIFO), and worth by the byte (GreedyDual-Size) with frequency,
    without it, and with quick demotion.
    """

    def __init__(self, aim: Aim = "cost") -> None:
        self._aim = aim
        weighing: list[EvictionPolicy[K]] = [Gdsf(aim, count=count) for count in (float, once, proved)]
        policies: list[EvictionPolicy[K]] = [Lru(), Sieve(), S3Fifo(), *weighing]
        self._experts = [_Expert(policy) for policy in policies]
        self._leader = self._experts[0]
        self._held: dict[K, tuple[int, float]] = {}
        self._noted: list[tuple[K, float]] = []
        self._gain = 1.0
        self._bytes = 0
        self._capacity = 0
        self._full = False  # something had to go since the last one came
        self._surplus: OrderedDict[K, None] = OrderedDict()  # held, though the leader's simulation does not hold it

    def admitted(self, key: K, size: int, cost: float, now: float) -> None:
        self._catch_up()
        self._held[key] = size, cost
        self._bytes += size
        self._capacity = self._bytes if self._full else max(self._bytes, self._capacity)
        self._full = False
        for expert in self._experts:
            expert.simulation.capacity = self._capacity
        self._learn(key, size, cost, now)

    def restored(self, entries: Sequence[tuple[K, int, float, float]]) -> None:
        self._held = {key: (size, cost) for key, size, cost, _ in entries}
        self._bytes = self._capacity = sum(size for size, _ in self._held.values())
        for expert in self._experts:
            expert.simulation.restore(entries)

    def used(self, key: K, now: float) -> None:
        self._noted.append((key, now))
        if len(self._noted) >= NOTED:
            self._catch_up()

    def evicted(self, key: K) -> None:
        self._catch_up()
        self._full = True
        self._bytes -= self._held.pop(key)[0]
        self._surplus.pop(key, None)

    def removed(self, key: K) -> None:
        self._catch_up()
        self._bytes -= self._held.pop(key)[0]
        self._surplus.pop(key, None)
        for expert in self._experts:
            expert.simulation.remove(key)

    def victims(self) -> Iterator[K]:
        self._catch_up()
        yield from self._surplus
        simulation = self._leader.simulation
        yield from (key for key in simulation.policy.victims() if key in self._held)

    def _catch_up(self) -> None:
        """Have the experts hear of the uses noted, in the order in which they were."""
        noted, self._noted = self._noted, []
        for key, now in noted:
            self._learn(key, *self._held[key], now)

    def _learn(self, key: K, size: int, cost: float, now: float) -> None:
        # rather than all that was lost counting less with each request, what is lost counts more
        self._gain *= 1 + 1 / max(SHORTEST, MEMORY * len(self._held))
        missing = [expert for expert in self._experts if not expert.simulation.request(key, size, cost, now)]
        if not missing:
            return
        for expert in missing:
            expert.loss += self._gain * worth(self._aim, size, cost)
        if self._leader in missing:
            self._surplus.update((each, None) for each in self._leader.simulation.gone if each in self._held)
        best = min(self._experts, key=lambda expert: expert.loss)
        if best.loss < self._leader.loss * (1 - MARGIN):
            self._leader = best
            self._surplus = OrderedDict((each, None) for each in self._held if each not in best.simulation.sizes)
        elif key in self._leader.simulation.sizes:
            self._surplus.pop(key, None)
        else:
            self._surplus[key] = None
        if self._gain > 1e100:  # long before it is too large a number
            for expert in self._experts:
                expert.loss /= self._gain
            self._gain = 1.0
