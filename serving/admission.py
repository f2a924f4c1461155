"""Which inference goes to Triton next, and which is refused before the wait for it grows."""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from cache.errors import DeadlinePassed, Overloaded

#: Where a request that names no priority stands among those that do: KServe's 1 is the most urgent.
NORMAL: Final = 1000

#: How much one more call counts in the running mean of their seconds.
_WEIGHT: Final = 0.1


class AdmissionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many inferences may be under way.

    calls: inferences that Triton is given at once, over all its servers.
    max_waiting: inferences that may wait for their turn; more are refused, with the time after which to retry.
    """

    calls: Annotated[int, msgspec.Meta(ge=1)] = 64
    max_waiting: Annotated[int, msgspec.Meta(ge=0)] = 512


class Admission:
    """Turns at Triton: the most urgent first, then the oldest."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        self._free = settings.calls
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._waiting = 0
        self._seconds = 0.0  # running mean of what a call takes

    @property
    def waiting(self) -> int:
        """Inferences that wait for their turn."""
        return self._waiting

    @property
    def under_way(self) -> int:
        """Inferences that Triton has been given."""
        return self._settings.calls - self._free

    @property
    def expected_wait_s(self) -> float:
        """About how long one more would wait."""
        return 0.0 if self._free else (self._waiting + 1) * self._seconds / self._settings.calls

    async def enter(self, priority: int = 0, deadline_s: float | None = None) -> Callable[[], None]:
        """Wait for a turn. What is returned ends it: to be called once Triton has really answered.

        ``priority`` is KServe's: 1 is the most urgent, 0 is none in particular. ``deadline_s`` is how many seconds the
        caller has left.

        Raises:
            Overloaded: too many wait, or it would wait longer than it has. ``retry_after_s`` says when to try again.
            DeadlinePassed: its turn did not come in time.
        """
        if not self._free:
            await self._wait(priority or NORMAL, deadline_s)
        else:
            self._free -= 1
        began = time.monotonic()
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                taken = time.monotonic() - began
                self._seconds += (taken - self._seconds) * (_WEIGHT if self._seconds else 1.0)
                self._give_back()

        return leave

    async def _wait(self, priority: int, deadline_s: float | None) -> None:
        wait = self.expected_wait_s
        if self._waiting >= self._settings.max_waiting:
            raise _overloaded(f"{self._waiting} inferences wait already", wait)
        if deadline_s is not None and wait > deadline_s:
            raise _overloaded(f"a turn is {wait:.3f} s away, and the caller has {max(deadline_s, 0.0):.3f} s", wait)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (priority, next(self._order), turn))
        self._waiting += 1
        try:
            async with asyncio.timeout(deadline_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # its turn came just then
                self._give_back()
            if isinstance(error, TimeoutError):
                raise DeadlinePassed("the deadline passed before Triton was free") from None
            raise
        finally:
            self._waiting -= 1
            if len(self._queue) > 2 * self._waiting + 16:  # of those who gave up, few stay in the queue
                self._queue = [each for each in self._queue if not each[2].done()]
                heapq.heapify(self._queue)

    def _give_back(self) -> None:
        while self._queue:
            turn = heapq.heappop(self._queue)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


def _overloaded(message: str, wait: float) -> Overloaded:
    refusal = Overloaded(f"{message}; retry later")
    refusal.retry_after_s = max(wait, 0.1)
    return refusal
