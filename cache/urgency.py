"""How urgent the work in hand is: it travels with the task that does it, and may rise while the work waits.

Whatever hands out a scarce thing (slots for fills, requests to the origin, workers) asks here who goes first. So
demand that joins a warm-up moves ahead all that is still to be done for it, wherever it waits.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from enum import IntEnum
from typing import Final, Generic, TypeVar

from .errors import Overloaded

T = TypeVar("T")


class Priority(IntEnum):
    """Lower goes first. What is planned may take any number above DEMAND."""

    DEMAND = 0
    WARM = 10
    SPARE = 10_000  # takes no room from anything, and stands back for all


class Urgency:
    """The priority of one piece of work and of all that is done for it, as it is now."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def rise(self, priority: int) -> None:
        """Be at least as urgent as ``priority``."""
        self.value = min(self.value, priority)

    @property
    def waits_for_demand(self) -> bool:
        return self.value > Priority.DEMAND

    @property
    def displaces_nothing(self) -> bool:
        return self.value >= Priority.SPARE


_CURRENT: ContextVar[Urgency] = ContextVar("urgency")
#: What is no part of a fill serves somebody who waits; nothing is more urgent, so it never changes.
_DEMAND: Final = Urgency(Priority.DEMAND)


def current() -> Urgency:
    """The urgency of the work that this task, or the one that started it, does."""
    return _CURRENT.get(_DEMAND)


@contextlib.contextmanager
def working(urgency: Urgency) -> Iterator[None]:
    """What is done in here, and in tasks started in here, is that urgent."""
    token = _CURRENT.set(urgency)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Lines(Generic[T]):
    """What waits, in a line for each Urgency: taken from the most urgent line, of equals from the oldest."""

    def __init__(self) -> None:
        self._lines: dict[Urgency, deque[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line

    def put(self, item: T, urgency: Urgency) -> None:
        self._lines.setdefault(urgency, deque()).append(item)

    @property
    def first(self) -> Urgency | None:
        """Whose turn it is; None if nothing waits."""
        return min(self._lines, key=lambda urgency: urgency.value, default=None)

    def take(self) -> T:
        """Raises: LookupError: nothing waits."""
        urgency = self.first
        if urgency is None:
            raise LookupError("nothing waits")
        line = self._lines[urgency]
        item = line.popleft()
        if not line:
            del self._lines[urgency]
        return item


class Slots:
    """``count`` slots, given to the most urgent first, then to the oldest. ``kept`` of them are for demand only."""

    def __init__(self, count: int, *, kept: int = 0, max_waiting: int | None = None) -> None:
        self._free = count
        self._kept = max(0, min(kept, count - 1))
        self._max_waiting = max_waiting
        self._queue: Lines[asyncio.Future[None]] = Lines()

    @property
    def waiting(self) -> int:
        return sum(not turn.done() for turn in self._queue)

    def queue(self, urgency: Urgency) -> "asyncio.Future[None]":
        """A place in the queue, to be handed to ``slot``. Raises: Overloaded."""
        if self._max_waiting is not None and len(self._queue) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} fills wait already; retry later")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put(turn, urgency)
        self.grant()
        return turn

    @contextlib.asynccontextmanager
    async def slot(self, turn: "asyncio.Future[None] | None" = None) -> AsyncIterator[None]:
        """Wait for a slot, from a place in the queue taken before or from a new one, and hold it."""
        turn = turn or self.queue(current())
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._return()
            raise
        try:
            yield
        finally:
            self._return()

    def grant(self) -> None:
        """Give out what is free; to be called when somebody who waits has become more urgent."""
        while (urgency := self._queue.first) is not None:
            if self._free <= (self._kept if urgency.waits_for_demand else 0):
                return
            turn = self._queue.take()
            if not turn.done():
                self._free -= 1
                turn.set_result(None)

    def _return(self) -> None:
        self._free += 1
        self.grant()
