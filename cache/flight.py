"""One owned fill for each key, with waiters that may come and go.

The fill runs in a task of its own: a caller who gives up takes only itself away, and N callers cost one fill.
Slots bound how many fills run at once; demand takes a free slot before warm-up does, and demand that joins a warm-up
moves it ahead, whatever it waits for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable
from typing import Generic, TypeVar

import msgspec

from .urgency import Slots, Urgency, working

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
T = TypeVar("T")


class FlightSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much may be under way.

    fills: fills that run at once.
    demand_only: how many of them warm-ups may not take, so that demand finds one free; less than all, in any case.
    max_waiting: fills that may queue for a slot; more are refused with Overloaded.
    """

    fills: int = 4
    demand_only: int = 1
    max_waiting: int = 1000


class _Flight(Generic[V]):
    def __init__(self, task: "asyncio.Task[V]", urgency: Urgency) -> None:
        self.task = task
        self.urgency = urgency
        self.waiters = 0
        self.landed = False


class Flights(Generic[K, V]):
    """The fills under way, by key. ``dispose`` is called once with every result, when the last waiter has left it."""

    def __init__(self, settings: FlightSettings, dispose: Callable[[V], None] = lambda _: None) -> None:
        self._slots = Slots(settings.fills, kept=settings.demand_only, max_waiting=settings.max_waiting)
        self._dispose = dispose
        self._flights: dict[K, _Flight[V]] = {}
        #: How many were begun, and how often one that another had begun was joined.
        self.begun = 0
        self.joined = 0

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    def keys(self) -> Collection[K]:
        """What is under way."""
        return self._flights.keys()

    @property
    def waiters(self) -> int:
        """Callers that wait."""
        return sum(flight.waiters for flight in self._flights.values())

    @property
    def queued(self) -> int:
        """Flights that wait for a slot."""
        return self._slots.waiting

    def urge(self, key: K, priority: int) -> None:
        """Move the fill of ``key`` ahead, if one is under way, as joining it would."""
        if (flight := self._flights.get(key)) is not None:
            flight.urgency.rise(priority)
            self._slots.grant()

    async def join(
        self, key: K, fill: Callable[[], Awaitable[V]], priority: int, take: Callable[[V], T]
    ) -> tuple[T, bool]:
        """Wait for the one fill of ``key``, started if none is under way, and take a share of its result.

        ``take`` runs while the result is still held: for a pinned entry it takes a pin of this waiter's own, so that
        nothing can evict the entry between the landing and the waking of the waiters.

        A caller that finds no value, and awaits nothing before it calls this, cannot miss one that is just admitted: a
        flight is joined until it has landed, and once it has the value is there to be found.

        Returns:
            What ``take`` made, and whether this call started the fill.

        Raises:
            Overloaded: too many fills wait for a slot. And whatever the fill raises.
        """
        flight = self._flights.get(key)
        leads = flight is None
        if flight is None:
            urgency = Urgency(priority)
            turn = self._slots.queue(urgency)
            flight = _Flight(asyncio.create_task(self._run(fill, turn, urgency)), urgency)
            self._flights[key] = flight
            self.begun += 1
            flight.task.add_done_callback(lambda _: self._landed(key))
        else:
            self.joined += 1
            self.urge(key, priority)
        flight.waiters += 1
        try:
            return take(await asyncio.shield(flight.task)), leads
        finally:
            flight.waiters -= 1
            self._leave(flight)

    async def close(self) -> None:
        """Cancel what is under way and wait for its end."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, fill: Callable[[], Awaitable[V]], turn: "asyncio.Future[None]", urgency: Urgency) -> V:
        with working(urgency):
            async with self._slots.slot(turn):
                return await fill()

    def _landed(self, key: K) -> None:
        flight = self._flights.pop(key)
        flight.landed = True
        self._leave(flight)

    def _leave(self, flight: _Flight[V]) -> None:
        # asking for the exception also marks it as seen: a failed flight that everybody left is nobody's bug
        if flight.landed and flight.waiters == 0 and not flight.task.cancelled() and flight.task.exception() is None:
            self._dispose(flight.task.result())
