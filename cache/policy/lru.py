"""Least recently used goes first: the order to measure every other policy against, and hard to beat."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Lru(Generic[K]):
    """An EvictionPolicy that looks at the order of uses alone."""

    def __init__(self) -> None:
        self._order: OrderedDict[K, None] = OrderedDict()

    def admitted(self, key: K, size: int, cost: float, now: float) -> None:
        self._order[key] = None

    def restored(self, entries: Sequence[tuple[K, int, float, float]]) -> None:
        for entry in entries:
            self.admitted(*entry)

    def used(self, key: K, now: float) -> None:
        self._order.move_to_end(key)

    def evicted(self, key: K) -> None:
        del self._order[key]

    def removed(self, key: K) -> None:
        del self._order[key]

    def victims(self) -> Iterator[K]:
        return iter(self._order)
