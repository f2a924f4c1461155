"""A day of the radiology workload in an arena that is full: how much of it stays in use."""

from typing import Any

import pytest

from cache.arena import Extents
from cache.interfaces import EvictionPolicy
from cache.policy.choice import EvictionSettings
from loadtest.workload import Workload, requests

GIB = 1 << 30


class FullArena:
    """The extents and the policy of a RAM tier, without its memory; some entries are held by leases."""

    def __init__(self, nbytes: int, leases: int) -> None:
        self.extents = Extents(nbytes)
        self.policy: EvictionPolicy[int] = EvictionSettings().build()
        self.places: dict[int, int] = {}
        self.keys: dict[int, int] = {}
        self.leased: list[int] = []
        self.leases = leases

    @property
    def used(self) -> float:
        return 1 - self.extents.free_bytes / self.extents.nbytes

    def ask(self, key: int, size: int, cost: float, now: float) -> None:
        if key in self.places:
            self.policy.used(key, now)
        else:
            expendable = (self.places[each] for each in self.policy.victims() if each not in self.leased)
            window = self.extents.to_free(size, expendable)
            assert window is not None
            for offset in window:
                gone = self.keys.pop(offset)
                del self.places[gone]
                self.policy.evicted(gone)
                self.extents.free(offset)
            place = self.extents.allocate(size)
            assert place is not None
            self.places[key] = place
            self.keys[place] = key
            self.policy.admitted(key, size, cost, now)
        self.leased = [*self.leased, key][-self.leases :]


@pytest.mark.slow
@pytest.mark.parametrize("gib", [16, 64])
def test_a_day_leaves_little_unused(gib: int) -> None:
    """Once 95 % of the arena are taken, with the last ten entries leased, never less than 90 % are."""
    arena = FullArena(gib * GIB, leases=10)
    day: Any = requests(Workload(days=1))
    used: list[float] = []
    for request in day:
        arena.ask(int(request["key"]), int(request["size"]), float(request["cost"]), float(request["time"]))
        if used or arena.used >= 0.95:
            used.append(arena.used)
    assert len(used) > len(day) / 2
    assert min(used) >= 0.9
    assert arena.extents.check() == []
