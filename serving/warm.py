"""Carries out the arrival queue: finds out whose events are, waits until a series is complete, has it made ready."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import msgspec

from cache.attributes import Attributes
from cache.errors import (
    Archived,
    NotFound,
    OriginError,
    Refused,
    Restoring,
    TooLarge,
    TritonError,
    UnknownStudy,
    VoxcacheError,
    WorkerFailed,
)
from cache.interfaces import Clock, Observer
from cache.keys import SeriesRef, digest
from cache.store import Store

from .arrivals.complete import look_again_at
from .arrivals.event import Event
from .arrivals.queue import ArrivalQueue, ArrivalSettings, DeadLetter, Due, New, reconnect_pause
from .filler import Filler
from .log import code_of, log_failure
from .plan import Fill

#: Objects whose series is asked for at once.
_HEADERS: Final = 16
#: Series of which it is remembered what their first object told.
_SERIES_TOLD: Final = 10_000


class Warmer:
    """Carries out the arrival queue by the plan, a few series at a time."""

    def __init__(
        self,
        settings: ArrivalSettings,
        queue: ArrivalQueue,
        store: Store,
        filler: Filler,
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._store = store
        self._filler = filler
        self._clock = clock
        self._observer = observer
        self._wake = asyncio.Event()
        self._asking = asyncio.Semaphore(_HEADERS)
        self._carrying = 0  # series that were taken from the queue
        self._restored: set[SeriesRef] = set()  # said to be there again since they were last taken
        self._told: dict[SeriesRef, tuple[str, int | None]] = {}  # modality and count, as the first object told them
        self._ready: Counter[str] = Counter()  # events that are carried out, and not noted as such yet, by study
        self._tasks: set[asyncio.Task[None]] = set()
        queue.on_news(self._wake.set)

    def start(self) -> None:
        """Begin with what was accepted before the last stop."""
        self._spawn(self._run())

    async def close(self) -> None:
        """Stop; what is not done stays in the queue."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def accept(self, events: Sequence[Event]) -> int:
        """Take events over; they are durable when this returns. Raises: Overloaded, QueueDown."""
        new = await self._queue.put(events, self._clock.now())
        self._observer.count("arrival_events", ("new",), new)
        self._observer.count("arrival_events", ("repeat",), len(events) - new)
        self._wake.set()
        return new

    async def look_for(self, ref: SeriesRef, version: str) -> None:
        """Have a series that was asked back from an archive made ready once it is there.

        Raises: Overloaded, QueueDown.
        """
        name = digest("restore", ref.study, ref.series, version, str(self._clock.now()))
        await self.accept([Event(name, "restore", "restored", study=ref.study, series=ref.series, complete=True)])

    async def waiting(self, study: str) -> int:
        """Events of the study's series that were accepted and are not carried out. Raises: QueueDown."""
        return max(await self._queue.waiting(study) - self._ready[study], 0)

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Events that were tried too often, latest first. Raises: QueueDown."""
        return await self._queue.dead(limit)

    async def requeue(self, ids: Sequence[str] | None) -> int:
        """Have dead letters (None: all) tried anew; how many there were. Raises: QueueDown."""
        count = await self._queue.requeue(ids, self._clock.now())
        self._wake.set()
        return count

    async def _run(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            try:
                at = await self._round()
                failures = 0
            except Exception as error:  # a bug must not end the work on all other arrivals
                log_failure("arrivals wait", error)
                await asyncio.sleep(reconnect_pause(failures))
                failures += 1
                continue
            timeout = None if at is None else max(at - self._clock.now(), 0.0)
            # not wait_for: until Python 3.12 it may lose a cancellation that comes together with a wake
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._wake.wait()

    async def _round(self) -> float | None:
        """Find out whose the new events are, start what is due, and say when the next thing will be."""
        while news := await self._queue.unassigned(self._clock.now()):
            found = await asyncio.gather(*(self._whose(new) for new in news))
            await self._queue.assign([each for each in found if each is not None], self._clock.now())
        free = self._settings.parallel - self._carrying
        if free == 0:
            return None  # the end of one of them wakes us
        dues, at = await self._queue.due(self._clock.now(), free)
        self._carrying += len(dues)
        for due in dues:
            self._spawn(self._carry_out(due))
        return at if len(dues) < free else None

    async def _whose(self, new: New) -> tuple[New, list[Event]] | None:
        """The event, and as which events of series it counts; None if that cannot be found out now.

        Others do not wait for it.
        """
        try:
            async with self._asking:
                placed = await self._placed(new.event)
        except Exception as error:
            await self._queue.unknown(new, code_of(error), self._clock.now(), limited=_limited(error))
            log_failure("an arrival's series is not known yet", error)
            return None
        if new.event.action == "restored":
            self._restored.update(SeriesRef(event.study, event.series) for event in placed)
        return new, placed

    async def _placed(self, event: Event) -> list[Event]:
        """The event with its series named, once for each that it concerns. Raises: OriginError, WorkerFailed."""
        if event.series:
            return [event]
        if not event.names_one:
            folder = event.folder
            found = self._store.series_in(event.study) if folder is None else self._store.series_under(folder)
            refs = await found
            if not refs and event.action != "removed":  # announced before it can be seen
                raise UnknownStudy(f"of {event.study or event.key!r}, which was announced, nothing is there")
            # how many instances there will be in all says nothing of each series
            return [
                msgspec.structs.replace(event, key="", study=ref.study, series=ref.series, expected=None)
                for ref in refs
            ]
        ref = await self._store.series_of(event.key)
        if ref is None:
            return []
        event = msgspec.structs.replace(event, study=ref.study, series=ref.series)
        listed = await self._store.expected(event.key)
        if listed is not None:  # a manifest object is none of the objects that it lists
            return [msgspec.structs.replace(event, key="", expected=listed)]
        return [await self._described(event, ref)]

    async def _described(self, event: Event, ref: SeriesRef) -> Event:
        """The event with modality and count as an object of the series tells them, where modalities differ."""
        if not self._settings.modalities or event.modality or event.action == "removed":
            return event
        if ref not in self._told:
            attributes = await self._store.attributes(ref, event.key) or Attributes()
            while len(self._told) >= _SERIES_TOLD:
                del self._told[next(iter(self._told))]
            self._told[ref] = (attributes.modality, attributes.instances or None)
        modality, instances = self._told[ref]
        expected = instances if event.expected is None else event.expected
        return msgspec.structs.replace(event, modality=modality, expected=expected)

    async def _carry_out(self, due: Due) -> None:
        self._restored.discard(due.ref)
        try:
            until = await self._unfinished(due)
            if until is not None:
                await self._queue.postpone(due, until)
            elif (error := await self._warmed(due)) is not None:
                await self._note(due, error)
            else:
                self._spawn(self._settle(due))
        except VoxcacheError as error:
            # the queue cannot be used: the series will be handed out again, but must not be tried at full speed
            log_failure("arrivals wait", error)
            await asyncio.sleep(reconnect_pause(due.attempts))
        finally:
            self._carrying -= 1
            self._wake.set()

    async def _unfinished(self, due: Due) -> float | None:
        """When to look again at a series of which more is expected than the origin has; None: it can be warmed."""
        rule = self._settings.rule(due.gathered.modality)
        if look_again_at(due.gathered, rule, 0, self._clock.now()) is None:
            return None
        self._store.changed(due.ref)
        try:
            objects = await self._store.objects(due.ref)
        except NotFound:
            objects = 0
        except Exception as error:
            # the warm-up will meet it as well, and knows what to do about it
            log_failure(
                "how much of a series has arrived cannot be told", error, study=due.ref.study, series=due.ref.series
            )
            return None
        return look_again_at(due.gathered, rule, objects, self._clock.now())

    async def _warmed(self, due: Due) -> Exception | None:
        """Make ready what the series calls for; what that failed with, if it did."""
        self._store.changed(due.ref)
        try:
            decision = await self._filler.decide(due.ref)
        except Exception as error:
            return error
        errors: list[Exception] = []

        def done(_: Fill, outcome: int | Exception | None) -> None:
            if isinstance(outcome, Exception):
                errors.append(outcome)

        who = self._filler.audit.who.arrival(due.events[0].source)
        await self._filler.make(decision.fills, done, who)
        if decision.priors and not errors:
            self._filler.warm_all(decision.priors, who)
        # one that may pass decides: there will be another try
        return min(errors, key=_lasting, default=None)

    async def _settle(self, due: Due) -> None:
        """Note that the series is done once its entries outlive a crash; ready it is before, and others go on."""
        self._observer.observe("arrival_to_ready_seconds", self._clock.now() - due.gathered.first)
        self._ready[due.ref.study] += len(due.events)
        try:
            await self._store.written(due.ref)
        finally:
            # before it is noted: no event that waits may be taken for one of these
            self._ready[due.ref.study] -= len(due.events)
            if not self._ready[due.ref.study]:
                del self._ready[due.ref.study]
        try:
            await self._queue.done(due, self._clock.now())
        except VoxcacheError as error:  # the series will be handed out again
            log_failure("arrivals wait", error)
        self._wake.set()

    async def _note(self, due: Due, error: Exception) -> None:
        """Tell the queue what ``due`` failed with."""
        if isinstance(error, Restoring):  # a restored event hurries it
            wait = 0.0 if due.ref in self._restored else error.look_again_s
            await self._queue.postpone(due, self._clock.now() + wait)
            return
        self._observer.count("warm_failures", (code_of(error),))
        again = False
        if _lasting(error):
            await self._queue.done(due, self._clock.now(), code_of(error))
        else:
            again = await self._queue.failed(due, code_of(error), self._clock.now(), limited=_limited(error))
        log_failure("warm-up failed", error, study=due.ref.study, series=due.ref.series, again=again)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _lasting(error: Exception) -> bool:
    """Another try would end the same: what is wrong lies in the request or in the objects."""
    passing = not isinstance(error, VoxcacheError) or isinstance(
        error, OriginError | Refused | TritonError | WorkerFailed
    )
    return isinstance(error, TooLarge | Archived) or not passing  # who restores objects announces them


def _limited(error: Exception) -> bool:
    """Tries must have an end: nothing says that waiting helps."""
    return not isinstance(error, VoxcacheError) or error.retry_after_s is None
