"""SIEVE: a hand that passes over what was used since it came by, and takes what was not (Zhang et al., NSDI'24)."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Sieve(Generic[K]):
    """An EvictionPolicy that moves nothing on a use.

    The paper's one queue is cut at the hand: ``_ahead`` is what the hand has yet to look at, the oldest first, and
    ``_behind`` what it let stay. The values tell whether a key was used since.
    """

    def __init__(self) -> None:
        self._ahead: OrderedDict[K, bool] = OrderedDict()
        self._behind: OrderedDict[K, bool] = OrderedDict()

    def admitted(self, key: K, size: int, cost: float, now: float) -> None:
        self._ahead[key] = False

    def restored(self, entries: Sequence[tuple[K, int, float, float]]) -> None:
        for entry in entries:
            self.admitted(*entry)

    def used(self, key: K, now: float) -> None:
        (self._ahead if key in self._ahead else self._behind)[key] = True

    def evicted(self, key: K) -> None:
        # the hand moves now, up to the first it would take: so looking at victims changes nothing
        while True:
            first = next(iter(self._ahead))
            if not self._ahead.pop(first):
                self._ahead[first] = False
                self._ahead.move_to_end(first, last=False)
                break
            self._behind[first] = False
            self._turn()
        self.removed(key)

    def removed(self, key: K) -> None:
        if self._ahead.pop(key, None) is None:
            del self._behind[key]
        self._turn()

    def _turn(self) -> None:
        """Past the newest, the hand begins again at the oldest."""
        if not self._ahead:
            self._ahead, self._behind = self._behind, self._ahead

    def victims(self) -> Iterator[K]:
        for used in (False, True):
            for part in (self._ahead, self._behind):
                yield from (key for key, was_used in part.items() if was_used == used)
