"""A cache without bytes: what a policy would hold, and what it would miss."""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from cache.interfaces import EvictionPolicy

K = TypeVar("K", bound=Hashable)


class Simulation(Generic[K]):
    """Entries of at most ``capacity`` bytes together under ``policy``; the capacity may change between requests."""

    def __init__(self, policy: EvictionPolicy[K], capacity: int = 0) -> None:
        self.policy = policy
        self.capacity = capacity
        self.bytes = 0
        self.sizes: dict[K, int] = {}
        self.gone: list[K] = []  # what the last miss pushed out

    def request(self, key: K, size: int, cost: float, now: float) -> bool:
        """Whether it hits. What misses is held from then on, unless it alone is above the capacity."""
        if key in self.sizes:
            self.policy.used(key, now)
            return True
        self.gone = []
        if size <= self.capacity:
            while self.bytes + size > self.capacity:
                victim = next(self.policy.victims())
                self.policy.evicted(victim)
                self.bytes -= self.sizes.pop(victim)
                self.gone.append(victim)
            self.policy.admitted(key, size, cost, now)
            self.sizes[key] = size
            self.bytes += size
        return False

    def restore(self, entries: Sequence[tuple[K, int, float, float]]) -> None:
        """Begin with these, which are no requests."""
        self.policy.restored(entries)
        self.sizes = {key: size for key, size, _, _ in entries}
        self.bytes = self.capacity = sum(self.sizes.values())

    def remove(self, key: K) -> None:
        """Drop the key if it is held."""
        if key in self.sizes:
            self.policy.removed(key)
            self.bytes -= self.sizes.pop(key)
