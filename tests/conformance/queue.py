"""What every arrival queue does: the class that each implementation's tests subclass, and a machine for all orders."""

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache.errors import Overloaded
from cache.keys import SeriesRef
from serving.arrivals.complete import Override
from serving.arrivals.event import Event
from serving.arrivals.queue import ArrivalQueue, ArrivalSettings, Depth, Due

T = TypeVar("T")

A = SeriesRef("1.2.3", "1.2.3.1")
B = SeriesRef("1.2.3", "1.2.3.2")
NOW = 1_700_000_000.0


def event(number: int, key: str = "", **more: Any) -> Event:
    """Another event for each ``number``."""
    told: dict[str, Any] = {"action": "created", "key": key or f"object-{number}", "etag": "e", "size": 3} | more
    return Event(f"id-{number}", "s3", **told)


def within(event: Event, ref: SeriesRef) -> Event:
    """The event as one of this series."""
    return msgspec.structs.replace(event, study=ref.study, series=ref.series)


async def assign(queue: ArrivalQueue, ref: SeriesRef | None, now: float, limit: int = 1000) -> list[Event]:
    """Have events that wait for it belong to ``ref``."""
    found = await queue.unassigned(now, limit)
    await queue.assign([(new, [] if ref is None else [within(new.event, ref)]) for new in found], now)
    return [new.event for new in found]


async def arrive(queue: ArrivalQueue, ref: SeriesRef | None, numbers: Sequence[int], now: float, **more: Any) -> None:
    """Have events come in and be assigned."""
    await queue.put([event(number, **more) for number in numbers], now)
    await assign(queue, ref, now)


async def take(queue: ArrivalQueue, now: float) -> list[Due]:
    """All that is due at ``now``; taken."""
    dues, _ = await queue.due(now, 100)
    return dues


async def counts(queue: ArrivalQueue) -> dict[str, int]:
    """How many events are in each state that has any."""
    depth = msgspec.structs.asdict(await queue.depth())
    return {state: count for state, count in depth.items() if count and state != "oldest"}


def settings(**changes: Any) -> ArrivalSettings:
    return ArrivalSettings(**({"quiet_s": 5.0, "force_s": 60.0} | changes))


class QueueConformance(ABC):
    """Subclasses say how a queue is opened: each time the same one, as its last closing or its end has left it."""

    @abstractmethod
    def opened(self, settings: ArrivalSettings) -> AbstractAsyncContextManager[ArrivalQueue]: ...

    @pytest.fixture
    async def queue(self) -> AsyncIterator[ArrivalQueue]:
        async with self.opened(settings()) as queue:
            yield queue

    async def test_accepted_events_outlive_the_daemon(self) -> None:
        """What was accepted is there again when the queue is opened anew, in order, as it was."""
        events = [event(1, "1.2/a b+é.dcm"), event(2, modality="CT", version="v", time="2026")]
        async with self.opened(settings()) as queue:
            assert await queue.put(events, NOW) == 2
        async with self.opened(settings()) as queue:
            found = await queue.unassigned(NOW)
            assert [(new.event, new.received, new.attempts) for new in found] == [(each, NOW, 0) for each in events]
            await queue.assign([(new, [within(new.event, A)]) for new in found], NOW)
        async with self.opened(settings()) as queue:
            assert await queue.unassigned(NOW) == []
            (one,) = await take(queue, NOW + 5)
            assert (one.ref, one.gathered.first, one.attempts) == (A, NOW, 0)
            assert sorted(one.ids) == ["id-1", "id-2"]
            await queue.done(one, NOW + 5)
        async with self.opened(settings()) as queue:
            assert await take(queue, NOW + 1000) == []

    async def test_what_waits_of_a_study(self, queue: ArrivalQueue) -> None:
        """Events of its series count from their assignment until they are carried out; others' do not."""
        assert await queue.waiting(A.study) == 0
        await arrive(queue, A, [1, 2], NOW)
        await arrive(queue, B, [3], NOW)
        await arrive(queue, SeriesRef("1.9", "1.9.1"), [4], NOW)
        assert await queue.waiting(A.study) == 3
        dues = await take(queue, NOW + 5)
        assert await queue.waiting(A.study) == 3
        for due in dues:
            await queue.done(due, NOW + 5)
        assert await queue.waiting(A.study) == 0

    async def test_repeats_are_no_news(self, queue: ArrivalQueue) -> None:
        """A repeated announcement changes nothing, before and after it was carried out."""
        assert await queue.put([event(1), event(2), event(1)], NOW) == 2
        assert await queue.put([event(2), event(3)], NOW) == 1
        await assign(queue, A, NOW)
        assert await queue.put([event(3)], NOW) == 0
        (one,) = await take(queue, NOW + 5)
        await queue.done(one, NOW + 5)
        assert await queue.put([event(1), event(2)], NOW + 5) == 0
        assert await counts(queue) == {"done": 3}

    async def test_concurrent_puts(self, queue: ArrivalQueue) -> None:
        """Each of many callers at once hears how many of its own events were new."""
        results = await asyncio.gather(*(queue.put([event(n), event(n + 1)], NOW) for n in range(0, 100, 2)))
        assert results == [2] * 50
        assert await counts(queue) == {"new": 100}

    async def test_the_oldest_that_waits(self, queue: ArrivalQueue) -> None:
        """The depth tells since when the oldest event waits, assigned or not, and not of what is over."""
        assert (await queue.depth()).oldest is None
        await arrive(queue, A, [1], NOW)
        await queue.put([event(2)], NOW + 3)
        assert await queue.depth() == Depth(new=1, assigned=1, oldest=NOW)
        (one,) = await take(queue, NOW + 5)
        await queue.done(one, NOW + 5)
        assert await queue.depth() == Depth(new=1, done=1, oldest=NOW + 3)

    async def test_a_series_is_due_when_it_is_quiet(self, queue: ArrivalQueue) -> None:
        """It is due so long after its last event, and says before when that will be."""
        await arrive(queue, A, [1], NOW)
        await arrive(queue, A, [2], NOW + 3)
        await arrive(queue, B, [3], NOW + 4)
        assert await queue.due(NOW + 7.9, 100) == ([], NOW + 8)
        (one,), at = await queue.due(NOW + 8, 100)
        assert (one.ref, one.gathered.first, at) == (A, NOW, NOW + 9)
        (other,), at = await queue.due(NOW + 9, 100)
        assert (other.ref, at) == (B, None)

    async def test_a_series_that_never_rests_is_forced(self, queue: ArrivalQueue) -> None:
        """Events that keep coming put the series off until force_s after the first, no longer."""
        for second in range(0, 64, 4):
            await arrive(queue, A, [second], NOW + second)
        assert await queue.due(NOW + 59.9, 100) == ([], NOW + 60)
        (one,) = await take(queue, NOW + 60)
        assert one.ref == A

    async def test_an_expected_count_makes_it_due_at_once(self, queue: ArrivalQueue) -> None:
        """The last of the events that were to come ends the quiet period, and so does word that nothing more comes."""
        await arrive(queue, A, [1], NOW, expected=3)
        await arrive(queue, A, [2], NOW + 1)
        assert await queue.due(NOW + 1, 100) == ([], NOW + 6)
        await arrive(queue, A, [3], NOW + 2, expected=3)
        (one,) = await take(queue, NOW + 2)
        assert (one.ref, one.gathered.expected, one.gathered.objects) == (A, 3, 3)
        await arrive(queue, B, [4], NOW + 3, complete=True)
        (one,) = await take(queue, NOW + 3)
        assert (one.ref, one.gathered.complete) == (B, True)

    async def test_modalities_differ(self) -> None:
        """Each modality may have periods of its own; what it has not is as for all."""
        chosen = settings(modalities={"MR": Override(quiet_s=20.0), "CT": Override(expected=False)})
        async with self.opened(chosen) as queue:
            await arrive(queue, A, [1], NOW, modality="MR")
            await arrive(queue, B, [2], NOW, modality="CT", expected=1)
            (one,), at = await queue.due(NOW + 5, 100)
            assert (one.ref, at) == (B, NOW + 20)

    async def test_one_taker_at_a_time(self, queue: ArrivalQueue) -> None:
        """A series that was handed out is not handed out again before something became of it; others are."""
        await arrive(queue, A, [1], NOW)
        await arrive(queue, B, [2], NOW)
        first, _ = await queue.due(NOW + 5, 1)
        second, _ = await queue.due(NOW + 5, 1)
        assert {one.ref for one in (*first, *second)} == {A, B}
        await arrive(queue, A, [3], NOW + 6, complete=True)
        assert await take(queue, NOW + 100) == []

    async def test_what_comes_meanwhile_is_due_again(self, queue: ArrivalQueue) -> None:
        """Carrying out a series settles the events it was due for, not those that came since."""
        await arrive(queue, A, [1, 2], NOW)
        (one,) = await take(queue, NOW + 5)
        await arrive(queue, A, [3], NOW + 6)
        await queue.done(one, NOW + 7)
        assert await counts(queue) == {"assigned": 1, "done": 2}
        assert await queue.due(NOW + 10.9, 100) == ([], NOW + 11)
        (again,) = await take(queue, NOW + 11)
        assert (again.ids, again.gathered.first, again.attempts) == (("id-3",), NOW + 6, 0)

    async def test_put_off(self, queue: ArrivalQueue) -> None:
        """A series that was put off is looked at then, or once something hurries it; that is no try."""
        await arrive(queue, A, [1], NOW)
        (one,) = await take(queue, NOW + 5)
        await queue.postpone(one, NOW + 20)
        await arrive(queue, A, [2], NOW + 6)
        assert await queue.due(NOW + 19, 100) == ([], NOW + 20)
        (again,) = await take(queue, NOW + 20)
        assert (len(again.ids), again.attempts) == (2, 0)
        await queue.postpone(again, NOW + 40)
        await arrive(queue, A, [3], NOW + 21, complete=True)
        assert len(await take(queue, NOW + 21)) == 1

    async def test_tries_come_later_each_time_and_end(self) -> None:
        """Pauses of 1, 2, 4 … seconds; after the last try the events are set aside; new ones start afresh."""
        async with self.opened(settings(attempts=3, quiet_s=0.0)) as queue:
            await arrive(queue, A, [1], NOW)
            now = NOW
            for pause in (1, 2):
                (one,) = await take(queue, now)
                assert await queue.failed(one, "worker-died", now)
                assert await queue.due(now, 100) == ([], now + pause)
                now += pause
            (one,) = await take(queue, now)
            assert one.attempts == 2
            assert not await queue.failed(one, "worker-died", now)
            assert await queue.due(now + 1000, 100) == ([], None)
            assert await counts(queue) == {"dead": 1}
            await arrive(queue, A, [2], now)
            (one,) = await take(queue, now)
            assert one.attempts == 0

    async def test_waiting_has_no_end(self) -> None:
        """What only has to wait is tried for as long as it takes, every five minutes in the end."""
        async with self.opened(settings(attempts=2, quiet_s=0.0)) as queue:
            await arrive(queue, A, [1], NOW)
            now = NOW
            for _ in range(20):
                (one,) = await take(queue, now)
                assert await queue.failed(one, "origin-down", now, limited=False)
                _, at = await queue.due(now, 100)
                assert at is not None
                assert now < at <= now + 300
                now = at
            assert await counts(queue) == {"assigned": 1}

    async def test_events_whose_series_cannot_be_told(self) -> None:
        """They wait on their own, longer each time, while others go ahead; after the last try they are set aside."""
        async with self.opened(settings(attempts=2)) as queue:
            await queue.put([event(1), event(2)], NOW)
            first, second = await queue.unassigned(NOW)
            await queue.unknown(first, "worker-died", NOW)
            await queue.assign([(second, [within(second.event, A)])], NOW)
            assert await queue.unassigned(NOW) == []
            assert await queue.due(NOW, 100) == ([], NOW + 1)
            (again,) = await queue.unassigned(NOW + 1)
            assert (again.event, again.received, again.attempts) == (first.event, NOW, 1)
            await queue.unknown(again, "origin-down", NOW + 1, limited=False)
            (again,) = await queue.unassigned(NOW + 3)
            assert again.event == first.event
            await queue.unknown(again, "worker-died", NOW + 3)
            assert await counts(queue) == {"assigned": 1, "dead": 1}

    async def test_a_study_is_all_of_its_series(self, queue: ArrivalQueue) -> None:
        """An event of a whole study becomes one for each series, each of which is carried out on its own."""
        of_study = Event("id-9", "orthanc", "created", study=A.study, complete=True)
        await queue.put([of_study], NOW)
        (new,) = await queue.unassigned(NOW)
        await queue.assign([(new, [within(of_study, A), within(of_study, B)])], NOW)
        one, other = await take(queue, NOW)
        assert {one.ref, other.ref} == {A, B}
        assert set(one.ids).isdisjoint(other.ids)
        await queue.done(one, NOW)
        assert await counts(queue) == {"assigned": 1, "done": 2}
        assert await queue.put([of_study], NOW) == 0

    async def test_the_queue_is_bounded(self) -> None:
        """What is past the bound is refused with a hint to retry, all of a put or none; room is made by work."""
        async with self.opened(settings(max_pending=3, quiet_s=0.0)) as queue:
            assert await queue.put([event(1), event(2)], NOW) == 2
            with pytest.raises(Overloaded):
                await queue.put([event(3), event(4)], NOW)
            assert await queue.put([event(5)], NOW) == 1
            assert [new.event.id for new in await queue.unassigned(NOW)] == ["id-1", "id-2", "id-5"]
        async with self.opened(settings(max_pending=3, quiet_s=0.0)) as queue:
            with pytest.raises(Overloaded):
                await queue.put([event(6)], NOW)
            await assign(queue, None, NOW)
            assert await queue.put([event(3), event(4)], NOW) == 2

    async def test_what_is_over_is_forgotten_in_time(self) -> None:
        """Events of no series, carried out and dead ones are remembered up to a number, so all stays within bounds."""
        async with self.opened(settings(keep_done=10, quiet_s=0.0, attempts=1)) as queue:
            for first in range(0, 60, 6):
                await arrive(queue, None, range(first, first + 6), NOW)
            assert await counts(queue) == {"done": 10}
            for first in range(60, 120, 6):
                await arrive(queue, A, range(first, first + 6), NOW)
                (one,) = await take(queue, NOW)
                await (queue.failed(one, "worker-died", NOW) if first % 12 else queue.done(one, NOW))
            assert sum((await counts(queue)).values()) <= 10 + 6

    async def test_what_is_over_is_forgotten_by_age(self) -> None:
        """What was carried out or set aside longer than keep_s ago is forgotten; what waits never is."""
        async with self.opened(settings(keep_s=100.0, quiet_s=0.0, attempts=1)) as queue:
            await arrive(queue, None, [1], NOW)
            await arrive(queue, A, [2], NOW)
            (one,) = await take(queue, NOW)
            await queue.failed(one, "worker-died", NOW)
            await arrive(queue, B, [0], NOW)
            await arrive(queue, None, [3], NOW + 99)
            assert await counts(queue) == {"assigned": 1, "done": 2, "dead": 1}
            await arrive(queue, None, [4], NOW + 101)
            assert await counts(queue) == {"assigned": 1, "done": 2}
            assert await queue.put([event(0), event(1), event(3)], NOW + 101) == 1

    async def test_dead_letters(self) -> None:
        """They are kept with the reason, and start again as new events when they are told to, all or some."""
        async with self.opened(settings(attempts=1, quiet_s=0.0)) as queue:
            await arrive(queue, A, [1, 2], NOW)
            (one,) = await take(queue, NOW)
            await queue.failed(one, "worker-died", NOW)
            await queue.put([event(3)], NOW)
            (new,) = await queue.unassigned(NOW)
            await queue.unknown(new, "origin-denied", NOW + 1)
            letters = await queue.dead()
            told = {(letter.event.id, letter.reason, letter.at, letter.event.series) for letter in letters}
            assert told == {
                ("id-1", "worker-died", NOW, A.series),
                ("id-2", "worker-died", NOW, A.series),
                ("id-3", "origin-denied", NOW + 1, ""),
            }
            assert letters[0].event.id == "id-3"
            assert len(await queue.dead(1)) == 1
            assert await queue.requeue(["id-1", "id-7"], NOW + 2) == 1
            assert await counts(queue) == {"new": 1, "dead": 2}
            assert [new.attempts for new in await queue.unassigned(NOW + 2)] == [0]
            assert await queue.requeue(None, NOW + 3) == 2
            assert await queue.dead() == []
            assert await queue.put([event(1), event(2), event(3)], NOW + 3) == 0

    async def test_many_series(self, queue: ArrivalQueue) -> None:
        """They are handed out a few at a time, those that were due first before the others, each once."""
        refs = [SeriesRef("1.2", f"1.2.{number}") for number in range(100)]
        await queue.put([event(number) for number in range(100)], NOW)
        found = await queue.unassigned(NOW)
        await queue.assign([(new, [within(new.event, ref)]) for new, ref in zip(found, refs, strict=True)], NOW)
        taken: list[SeriesRef] = []
        for _ in itertools.repeat(None):
            dues, _ = await queue.due(NOW + 5, 7)
            if not dues:
                break
            assert len(dues) <= 7
            taken += [one.ref for one in dues]
            await asyncio.gather(*(queue.done(one, NOW + 5) for one in dues[:-1]))
        assert sorted(taken) == sorted(refs)


class QueueMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, an accepted event is waiting, carried out, or set aside after a try."""

    async def open(self) -> ArrivalQueue:
        raise NotImplementedError  # each kind of queue says how; abc's metaclass does not go with Hypothesis'

    async def reopened(self) -> ArrivalQueue:
        """The same queue after its daemon was started again; what had been handed out is given back."""
        await self.queue.close()
        return await self.open()

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now = NOW
        self.accepted: set[str] = set()
        self.covered: set[str] = set()  # a due that held it was carried out, or it was said to be of no series
        self.tried: set[str] = set()
        self.dues: list[Due] = []
        self.settings = ArrivalSettings(attempts=2, quiet_s=1.0, force_s=10.0)
        self.queue = self.run(self.open())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @rule(numbers=st.lists(st.integers(0, 12), min_size=1, max_size=3), complete=st.booleans())
    def put(self, numbers: list[int], complete: bool) -> None:
        self.run(self.queue.put([event(number, complete=complete) for number in numbers], self.now))
        self.accepted |= {f"id-{number}" for number in numbers}

    @rule(ref=st.sampled_from([A, B, None]), limit=st.integers(1, 4))
    def assign(self, ref: SeriesRef | None, limit: int) -> None:
        found = self.run(assign(self.queue, ref, self.now, limit))
        if ref is None:
            self.covered |= {each.id for each in found}

    @rule(limited=st.booleans())
    def unknown(self, limited: bool) -> None:
        for new in self.run(self.queue.unassigned(self.now, 1)):
            self.run(self.queue.unknown(new, "a reason", self.now, limited=limited))
            self.tried.add(new.event.id)

    @rule(limit=st.integers(1, 3))
    def due(self, limit: int) -> None:
        dues, _ = self.run(self.queue.due(self.now, limit))
        held = {due.ref for due in self.dues}
        assert not held & {due.ref for due in dues}
        self.dues += dues

    @precondition(lambda self: self.dues)
    @rule()
    def done(self) -> None:
        due = self.dues.pop()
        self.covered |= set(due.ids)
        self.run(self.queue.done(due, self.now))

    @precondition(lambda self: self.dues)
    @rule(limited=st.booleans())
    def failed(self, limited: bool) -> None:
        due = self.dues.pop()
        self.tried |= set(due.ids)
        self.run(self.queue.failed(due, "a reason", self.now, limited=limited))

    @precondition(lambda self: self.dues)
    @rule()
    def postpone(self) -> None:
        self.run(self.queue.postpone(self.dues.pop(), self.now + 5))

    @rule()
    def requeue(self) -> None:
        self.run(self.queue.requeue(None, self.now))

    @rule(seconds=st.sampled_from([0.5, 3, 400]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def reopen(self) -> None:
        # a taker that ended has tried what it held
        self.tried |= {each for due in self.dues for each in due.ids}
        self.dues = []
        self.queue = self.run(self.reopened())

    @invariant()
    def nothing_is_lost(self) -> None:
        depth = self.run(self.queue.depth())
        assert depth.new + depth.assigned + depth.done + depth.dead == len(self.accepted)
        assert {letter.event.id for letter in self.run(self.queue.dead())} <= self.tried
        assert depth.done <= len(self.covered)

    def teardown(self) -> None:
        self.carry_out_all()
        self.run(self.queue.close())
        self.loop.close()

    def carry_out_all(self) -> None:
        """In the end everything that waits can be carried out, and then nothing is left."""
        for due in self.dues:
            self.run(self.queue.done(due, self.now))
        later = self.now + 1000
        self.run(self.queue.requeue(None, later))
        while self.run(assign(self.queue, A, later)):
            pass
        while dues := self.run(take(self.queue, later + 100)):
            for one in dues:
                self.run(self.queue.done(one, later + 100))
        assert self.run(counts(self.queue)) == ({"done": len(self.accepted)} if self.accepted else {})


@asynccontextmanager
async def closing(queue: ArrivalQueue) -> AsyncIterator[ArrivalQueue]:
    """The queue, closed at the end."""
    try:
        yield queue
    finally:
        await queue.close()
