"""Where accepted events wait until what they call for has been done: the settings, and what every queue does."""

import random
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from cache.keys import SeriesRef

from .complete import Gathered, Override, Rule
from .event import Event


class ArrivalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens when objects arrive.

    warm: recipes that are made ready for every series that arrived.
    namespace: the namespace that warmed tensors belong to.
    expected: whether a series of which it is known how many instances it will have waits for them, however quiet.
    quiet_s: any other series counts as complete this many seconds after its last event.
    force_s: and in any case a series does this many seconds after its first one.
    modalities: what of these three is otherwise for a modality, by its code, such as CT.
    attempts: tries before an event that the workers fail, or the origin denies, is set aside; what only has to wait,
        for an origin that is down or for room, is tried without end.
    max_pending: events that may wait; past that arrivals are refused with Retry-After.
    keep_done: events remembered after they were carried out or set aside, so that repeats of them are no work.
    keep_s: seconds they are remembered for at most.
    parallel: series that are warmed at once.
    """

    warm: tuple[str, ...] = ()
    namespace: str = "serving"
    expected: bool = True
    quiet_s: float = 5.0
    force_s: float = 300.0
    modalities: dict[str, Override] = {}
    attempts: int = 8
    max_pending: int = 1_000_000
    keep_done: int = 100_000
    keep_s: float = 7 * 86_400.0
    parallel: int = 2

    def rule(self, modality: str) -> Rule:
        """When series of this modality ("": not known) count as complete."""
        rule = Rule(self.expected, self.quiet_s, self.force_s)
        return self.modalities[modality].over(rule) if modality in self.modalities else rule


class New(msgspec.Struct, frozen=True):
    """An event of which nobody has said yet which series it belongs to; ``token`` is the queue's own."""

    event: Event
    received: float
    attempts: int = 0
    token: str = ""


class Due(msgspec.Struct, frozen=True):
    """A series whose ``events`` call for action now; ``token`` is the queue's own."""

    ref: SeriesRef
    events: tuple[Event, ...]
    gathered: Gathered
    attempts: int
    token: str = ""

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(event.id for event in self.events)


class DeadLetter(msgspec.Struct, frozen=True):
    """An event that was tried too often, why, and when it was given up (Unix seconds)."""

    event: Event
    reason: str
    at: float


class Depth(msgspec.Struct, frozen=True):
    """How many events are in each state, and when the oldest was received of those that wait (Unix seconds).

    An event is new until it is assigned to a series, then due with the others of its series, and in the end done, or
    dead when it was tried too often.
    """

    new: int = 0
    assigned: int = 0
    done: int = 0
    dead: int = 0
    oldest: float | None = None

    def waits(self, now: float) -> float:
        """For how many seconds the oldest waits."""
        return max(now - self.oldest, 0.0) if self.oldest is not None else 0.0


class ArrivalQueue(Protocol):
    """Accepted events survive any crash, of this process and of whatever the queue is kept in.

    A series is handed out to one taker at a time; taken for good when its events are done, it is handed out again when
    it failed, was put off, or its taker died. Every method raises QueueDown when the queue cannot be used now.
    Whatever implements it passes ``tests/conformance/queue.py``.
    """

    async def put(self, events: Sequence[Event], now: float) -> int:
        """Accept ``events``, durably by the time this returns; how many of them were new.

        Raises:
            Overloaded: too many wait already; none was accepted.
            QueueDown: nothing is known to be accepted. Putting them again does no harm.
        """

    async def unassigned(self, now: float, limit: int = 1000) -> list[New]:
        """The oldest events of which nobody has said yet which series they belong to."""

    async def assign(self, found: Sequence[tuple[New, Sequence[Event]]], now: float) -> None:
        """Say which series events belong to: each is replaced by ``Event`` that name study and series.

        One as a rule; one for each series, where a whole study was meant; none, where nothing is to be done.
        """

    async def unknown(self, new: New, reason: str, now: float, *, limited: bool = True) -> None:
        """Ask again later, twice as late each time, which series an event belongs to; as in ``failed``."""

    async def due(self, now: float, limit: int) -> tuple[list[Due], float | None]:
        """Take up to ``limit`` series that call for action at ``now``, and when the next thing will (Unix seconds)."""

    async def done(self, due: Due, now: float, reason: str = "") -> None:
        """What ``due`` called for has been done, or cannot be done for ``reason``."""

    async def failed(self, due: Due, reason: str, now: float, *, limited: bool = True) -> bool:
        """Try ``due`` again later, twice as late each time.

        False: it was ``limited`` and has been tried too often; it is set aside.
        """

    async def waiting(self, study: str) -> int:
        """How many events of the study's series are not carried out. Raises: as all of it."""

    async def postpone(self, due: Due, until: float) -> None:
        """Look at ``due`` again at ``until``, or when something hurries it. This was no try."""

    async def depth(self) -> Depth: ...

    async def dead(self, limit: int = 1000) -> list[DeadLetter]:
        """What was set aside, latest first."""

    async def requeue(self, ids: Sequence[str] | None, now: float) -> int:
        """Have dead letters (None: all) start again as new events; how many there were."""

    def on_news(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called when others than the caller may have made work."""

    async def ready(self) -> bool:
        """Whether events can be accepted now."""

    async def close(self) -> None:
        """Let go of it; what is not done stays."""


def pause(attempts: int) -> float:
    """Seconds before the next try: 1, 2, 4, and so on; five minutes at most."""
    return min(2.0 ** min(attempts, 10), 300.0)


def reconnect_pause(failures: int) -> float:
    """Seconds before a queue that cannot be used is tried again: 0.1, 0.2 and so on, five at most.

    No two nodes wait alike, so that what comes back is not met by all of them at once.
    """
    return min(0.1 * 2.0 ** min(failures, 10), 5.0) * random.uniform(0.5, 1.0)  # noqa: S311  # no secret


def hurries(event: Event) -> bool:
    """Whether the event may make its series due before the quiet period is over."""
    return event.complete or event.expected is not None or event.action == "restored"


def first_look(event: Event, received: float, settings: ArrivalSettings) -> float:
    """When a series has to be looked at because of this event; a look tells when it is really due."""
    if hurries(event):
        return received
    rule = settings.rule(event.modality)
    return received + min(rule.quiet_s, rule.force_s)


def pieces_of(new: New, events: Sequence[Event]) -> list[Event]:
    """What replaces ``new``: itself where it belongs to one series, else an event with an id of its own for each."""
    if len(events) == 1:
        return [msgspec.structs.replace(events[0], id=new.event.id)]
    return [msgspec.structs.replace(event, id=f"{new.event.id}/{event.series}") for event in events]
