"""One fill for N callers, whoever leaves; demand before warm-up; nothing leaks."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cache.errors import OriginDown, Overloaded
from cache.flight import Flights, FlightSettings
from cache.urgency import Lines, Priority, Slots, Urgency, current, working


class Fill:
    """A fill that lands when it is told to, and counts its runs."""

    def __init__(self, result: str = "value") -> None:
        self.result = result
        self.runs = 0
        self.started = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self) -> str:
        self.runs += 1
        self.started.set()
        await self.go.wait()
        return self.result


async def test_many_callers_cost_one_fill() -> None:
    """A hundred concurrent callers get the result of one run, and one of them is told it led."""
    flights: Flights[str, str] = Flights(FlightSettings())
    fill = Fill()
    calls = [asyncio.create_task(flights.join("k", fill, Priority.DEMAND, str.upper)) for _ in range(100)]
    await fill.started.wait()
    fill.go.set()
    results = await asyncio.gather(*calls)
    assert fill.runs == 1
    assert {value for value, _ in results} == {"VALUE"}
    assert sum(leads for _, leads in results) == 1
    assert len(flights) == 0


async def test_the_first_caller_may_leave() -> None:
    """Cancelling the caller that started the fill takes neither the fill nor the others down."""
    flights: Flights[str, str] = Flights(FlightSettings())
    fill = Fill()
    first = asyncio.create_task(flights.join("k", fill, Priority.DEMAND, str))
    await fill.started.wait()
    second = asyncio.create_task(flights.join("k", fill, Priority.DEMAND, str))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    fill.go.set()
    assert await second == ("value", False)
    assert fill.runs == 1


@pytest.mark.parametrize("cancelled", [0, 1, 3])
async def test_a_result_is_disposed_of_once(cancelled: int) -> None:
    """Whoever stays or leaves, the result is disposed of exactly once, after the last taker."""
    trace: list[str] = []
    disposed = asyncio.Event()

    def dispose(_: str) -> None:
        trace.append("disposed")
        disposed.set()

    flights: Flights[str, str] = Flights(FlightSettings(), dispose)
    fill = Fill()
    calls = [
        asyncio.create_task(flights.join("k", fill, Priority.DEMAND, lambda v: trace.append("taken"))) for _ in range(3)
    ]
    await fill.started.wait()
    for call in calls[:cancelled]:
        call.cancel()
    await asyncio.sleep(0)
    fill.go.set()
    await asyncio.gather(*calls, return_exceptions=True)
    await disposed.wait()
    assert trace == ["taken"] * (3 - cancelled) + ["disposed"]


async def test_a_failure_reaches_every_waiter_and_is_not_kept() -> None:
    """All waiters get the error; the next caller starts afresh."""
    flights: Flights[str, str] = Flights(FlightSettings())

    async def fails() -> str:
        raise OriginDown("no answer")

    calls = [flights.join("k", fails, Priority.DEMAND, str) for _ in range(3)]
    assert [type(e) for e in await asyncio.gather(*calls, return_exceptions=True)] == [OriginDown] * 3
    fill = Fill()
    fill.go.set()
    assert await flights.join("k", fill, Priority.DEMAND, str) == ("value", True)


async def test_demand_goes_before_warm_up() -> None:
    """With one slot, what demand waits for goes first: its own fill, and the warm one it joined; of both the older."""
    flights: Flights[str, str] = Flights(FlightSettings(fills=1))
    order: list[str] = []
    gate = Fill()

    def fill(name: str) -> Callable[[], Awaitable[str]]:
        async def run() -> str:
            order.append(name)
            return name

        return run

    blocker = asyncio.create_task(flights.join("blocker", gate, Priority.DEMAND, str))
    await gate.started.wait()
    calls = [
        asyncio.create_task(flights.join(name, fill(name), priority, str))
        for name, priority in [
            ("warm 1", Priority.WARM),
            ("warm 2", Priority.WARM),
            ("demand", Priority.DEMAND),
            ("warm 2", Priority.DEMAND),
        ]
    ]
    await asyncio.sleep(0)
    assert flights.queued == 3
    gate.go.set()
    await asyncio.gather(blocker, *calls)
    assert order == ["warm 2", "demand", "warm 1"]


async def test_the_queue_is_bounded() -> None:
    """Past the bound a new fill is refused with Retry-After; joining one under way is not."""
    flights: Flights[str, str] = Flights(FlightSettings(fills=1, max_waiting=1))
    fill = Fill()
    running = asyncio.create_task(flights.join("a", fill, Priority.DEMAND, str))
    await fill.started.wait()
    queued = asyncio.create_task(flights.join("b", fill, Priority.DEMAND, str))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await flights.join("c", fill, Priority.DEMAND, str)
    assert refused.value.retry_after_s
    joined = asyncio.create_task(flights.join("a", fill, Priority.DEMAND, str))
    fill.go.set()
    assert [value for value, _ in await asyncio.gather(running, queued, joined)] == ["value"] * 3


async def test_closing_ends_what_is_under_way() -> None:
    """Close cancels running and queued fills and leaves none behind; the slot of a cancelled ticket is not lost."""
    flights: Flights[str, str] = Flights(FlightSettings(fills=1))
    fill = Fill()
    calls = [asyncio.create_task(flights.join(name, fill, Priority.DEMAND, str)) for name in "ab"]
    await fill.started.wait()
    await flights.close()
    assert {type(e) for e in await asyncio.gather(*calls, return_exceptions=True)} == {asyncio.CancelledError}
    again = Fill()
    again.go.set()
    assert await flights.join("a", again, Priority.DEMAND, str) == ("value", True)


async def test_one_slot_is_kept_for_demand() -> None:
    """Warm-ups leave a slot free: demand starts at once, and a waiting warm-up takes that slot once demand joins it."""
    flights: Flights[str, str] = Flights(FlightSettings(fills=2))
    warm, waiting, demand = Fill("warm"), Fill("waiting"), Fill("demand")
    calls = [asyncio.create_task(flights.join("warm", warm, Priority.WARM, str))]
    calls.append(asyncio.create_task(flights.join("waiting", waiting, Priority.WARM, str)))
    await warm.started.wait()
    assert flights.queued == 1
    calls.append(asyncio.create_task(flights.join("demand", demand, Priority.DEMAND, str)))
    await demand.started.wait()
    demand.go.set()
    calls.append(asyncio.create_task(flights.join("waiting", waiting, Priority.DEMAND, str)))
    await waiting.started.wait()
    assert not warm.go.is_set()
    warm.go.set()
    waiting.go.set()
    assert [value for value, _ in await asyncio.gather(*calls)] == ["warm", "waiting", "demand", "waiting"]
    assert (waiting.runs, warm.runs) == (1, 1)


async def test_joining_raises_a_running_fill() -> None:
    """All that a running warm-up still waits for is as urgent as the demand that joined it."""
    flights: Flights[str, str] = Flights(FlightSettings())
    go = asyncio.Event()
    seen: list[int] = []

    async def part() -> None:
        seen.append(current().value)
        await go.wait()
        seen.append(current().value)

    async def fill() -> str:
        await asyncio.gather(part())
        return "value"

    warm = asyncio.create_task(flights.join("k", fill, Priority.WARM, str))
    while not seen:
        await asyncio.sleep(0)
    demand = asyncio.create_task(flights.join("k", fill, Priority.DEMAND, str))
    await asyncio.sleep(0)
    go.set()
    assert [value for value, _ in await asyncio.gather(warm, demand)] == ["value"] * 2
    assert seen == [Priority.WARM, Priority.DEMAND]


async def test_slots_go_to_the_most_urgent() -> None:
    """The most urgent gets a slot first, as urgent as it is by then; of equals the oldest."""
    slots = Slots(1)
    order: list[str] = []

    async def take(name: str) -> None:
        async with slots.slot():
            order.append(name)

    low, high, raised = Urgency(50), Urgency(20), Urgency(60)
    async with slots.slot():
        tasks = []
        for name, urgency in [("low", low), ("high 1", high), ("raised", raised), ("high 2", high)]:
            with working(urgency):
                tasks.append(asyncio.create_task(take(name)))
        await asyncio.sleep(0)
        raised.rise(10)
        gone = asyncio.create_task(take("gone"))
        await asyncio.sleep(0)
        gone.cancel()
    await asyncio.gather(*tasks)
    assert order == ["raised", "high 1", "high 2", "low"]
    assert slots.waiting == 0


def test_nothing_is_taken_from_empty_lines() -> None:
    """Lines that hold nothing say so."""
    lines: Lines[int] = Lines()
    assert lines.first is None
    with pytest.raises(LookupError):
        lines.take()
