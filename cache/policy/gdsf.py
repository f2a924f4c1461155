"""GreedyDual-Size with Frequency: what is worth least by the byte goes first (Cherkasova, HP Labs 1998)."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from .worth import Aim, worth

K = TypeVar("K", bound=Hashable)


class _Entry:
    __slots__ = ("density", "number", "priority", "uses")

    def __init__(self, density: float, uses: int = 0, priority: float = 0.0, number: int = 0) -> None:
        self.density = density
        self.uses = uses
        self.priority = priority
        self.number = number


def once(uses: int) -> float:
    """However often, it counts as once: GreedyDual-Size (Cao and Irani, USITS'97)."""
    return 1.0


def proved(uses: int) -> float:
    """What was made and not used since counts little, many uses no more than a few: demotion as quick as S3-FIFO's."""
    return 0.1 if uses == 1 else min(uses, 3)


class Gdsf(Generic[K]):
    """An EvictionPolicy by priority = floor + uses × worth / size; the floor is the last victim's priority.

    ``count`` says what so many uses count, the making of the entry included.
    """

    def __init__(self, aim: Aim = "cost", *, count: Callable[[int], float] = float) -> None:
        self._aim = aim
        self._count = count
        self._entries: dict[K, _Entry] = {}
        self._heap: list[tuple[float, int, K]] = []  # outdated ones among them, known by their number
        self._numbers = itertools.count()
        self._floor = 0.0

    def admitted(self, key: K, size: int, cost: float, now: float) -> None:
        self._entries[key] = _Entry(worth(self._aim, size, cost) / max(size, 1))
        self.used(key, now)

    def restored(self, entries: Sequence[tuple[K, int, float, float]]) -> None:
        first = self._count(1)
        for number, (key, size, cost, _) in enumerate(entries):
            density = worth(self._aim, size, cost) / max(size, 1)
            self._entries[key] = _Entry(density, 1, first * density, number)
        self._numbers = itertools.count(len(entries))
        self._heap = [(entry.priority, entry.number, key) for key, entry in self._entries.items()]
        heapify(self._heap)

    def used(self, key: K, now: float) -> None:
        entry = self._entries[key]
        entry.uses += 1
        entry.priority = self._floor + self._count(entry.uses) * entry.density
        entry.number = next(self._numbers)
        heappush(self._heap, (entry.priority, entry.number, key))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [each for each in self._heap if self._current(each)]
            heapify(self._heap)

    def evicted(self, key: K) -> None:
        self._floor = max(self._floor, self._entries[key].priority)
        self.removed(key)

    def removed(self, key: K) -> None:
        del self._entries[key]
        while self._heap and not self._current(self._heap[0]):
            heappop(self._heap)

    def _current(self, each: tuple[float, int, K]) -> bool:
        entry = self._entries.get(each[2])
        return entry is not None and entry.number == each[1]

    def victims(self) -> Iterator[K]:
        # a heap in order, unchanged: what comes next is the least of those reached, and leads to two more
        heap = self._heap
        reached = [(heap[0], 0)] if heap else []
        while reached:
            each, at = heappop(reached)
            for below in range(2 * at + 1, min(2 * at + 3, len(heap))):
                heappush(reached, (heap[below], below))
            if self._current(each):
                yield each[2]
