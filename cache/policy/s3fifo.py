"""S3-FIFO: a small queue to prove oneself in, a large one to stay, a ghost of what failed (Yang et al., SOSP'23)."""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

#: The large queue's part of all bytes, and what the ghost remembers of them.
_MAIN: Final = 0.9
_GHOST: Final = 0.9
#: Uses in the small queue that make a key move to the large one.
_PROVED: Final = 2
#: More uses than that are not counted in the large queue.
_MOST: Final = 3


class _Entry:
    __slots__ = ("size", "uses")

    def __init__(self, size: int) -> None:
        self.size = size
        self.uses = 0


class S3Fifo(Generic[K]):
    """An EvictionPolicy with quick demotion: what is used once only passes through a tenth of the bytes.

    The parameters are the paper's; shares are taken of the bytes that are held.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[K, _Entry] = OrderedDict()
        self._main: OrderedDict[K, _Entry] = OrderedDict()
        self._ghost: OrderedDict[K, int] = OrderedDict()
        self._ghost_bytes = 0
        self._main_bytes = 0
        self._bytes = 0

    def admitted(self, key: K, size: int, cost: float, now: float) -> None:
        entry = _Entry(size)
        self._bytes += size
        known = self._ghost.pop(key, None)
        if known is None:
            self._small[key] = entry
        else:
            self._ghost_bytes -= known
            self._main[key] = entry
            self._main_bytes += size

    def restored(self, entries: Sequence[tuple[K, int, float, float]]) -> None:
        for entry in entries:
            self.admitted(*entry)

    def used(self, key: K, now: float) -> None:
        (self._small.get(key) or self._main[key]).uses += 1

    def evicted(self, key: K) -> None:
        self._settle()
        entry = self._small.get(key)
        most = _GHOST * self._whole()
        if entry is not None and entry.size <= most:
            self._ghost[key] = entry.size
            self._ghost_bytes += entry.size
        self.removed(key)
        while self._ghost_bytes > most:
            self._ghost_bytes -= self._ghost.popitem(last=False)[1]

    def removed(self, key: K) -> None:
        entry = self._small.pop(key, None)
        if entry is None:
            entry = self._main.pop(key)
            self._main_bytes -= entry.size
        self._bytes -= entry.size

    def _whole(self) -> float:
        """The bytes that the queues have their parts of: those held, for what a tier may hold can change."""
        return self._bytes

    def _settle(self) -> None:
        """Promote and reinsert until the next victim heads its queue, as ``victims`` does without a trace."""
        if self._main_bytes <= _MAIN * self._whole():
            while self._small:
                key, entry = next(iter(self._small.items()))
                if entry.uses < _PROVED:
                    return
                del self._small[key]
                entry.uses = 0
                self._main[key] = entry
                self._main_bytes += entry.size
        while self._main:
            key, entry = next(iter(self._main.items()))
            if not entry.uses:
                return
            entry.uses = min(entry.uses, _MOST) - 1
            self._main.move_to_end(key)

    def victims(self) -> Iterator[K]:
        # as _settle goes, on the side: looking changes nothing
        total, in_main = self._whole(), self._main_bytes
        small, main = iter(self._small.items()), iter(self._main.items())
        again: deque[tuple[K, int, int]] = deque()  # promoted and reinserted: their size, and the uses they have left

        def from_small() -> tuple[K, int] | None:
            nonlocal in_main
            for key, entry in small:
                if entry.uses < _PROVED:
                    return key, entry.size
                again.append((key, entry.size, 0))
                in_main += entry.size
            return None

        def from_main() -> tuple[K, int] | None:
            nonlocal in_main
            queue = chain(((key, entry.size, entry.uses) for key, entry in main), _popped(again))
            for key, size, uses in queue:
                if not uses:
                    in_main -= size
                    return key, size
                again.append((key, size, min(uses, _MOST) - 1))
            return None

        while victim := (from_small() if in_main <= _MAIN * total else None) or from_main():
            key, size = victim
            total -= size
            yield key


def _popped(queue: deque[T]) -> Iterator[T]:
    while queue:
        yield queue.popleft()
