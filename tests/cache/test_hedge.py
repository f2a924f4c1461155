"""Hedged requests: late ones are asked once more, within a budget, and nothing of them is left over."""

import asyncio

import pytest

from cache.origin.hedge import Hedge, Patience
from tests.cache.walk import Ears


class Bucket:
    """Answers each request when the test says so. ``ended``: requests that were cancelled."""

    def __init__(self) -> None:
        self.requests: list[asyncio.Future[str]] = []
        self.ended: list[int] = []
        self.asked = asyncio.Event()

    async def ask(self) -> str:
        number = len(self.requests)
        self.requests.append(asyncio.get_running_loop().create_future())
        self.asked.set()
        try:
            return await self.requests[number]
        except asyncio.CancelledError:
            self.ended.append(number)
            raise

    async def until(self, requests: int) -> None:
        """Return once so many have been made."""
        while len(self.requests) < requests:
            self.asked.clear()
            await self.asked.wait()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr("cache.origin.hedge._UNKNOWN_S", 0.01)
    return Bucket()


@pytest.fixture
def ears() -> Ears:
    return Ears()


@pytest.mark.parametrize(("first", "outcome"), [(1, "won"), (0, "lost")])
async def test_either_request_may_win(first: int, outcome: str, bucket: Bucket, ears: Ears) -> None:
    """Its answer counts, and the other request is ended by the time it does."""
    asking = asyncio.create_task(Hedge(0.05, ears).first("fetch", bucket.ask))
    await bucket.until(2)
    bucket.requests[first].set_result("answer")
    assert await asking == "answer"
    assert bucket.ended == [1 - first]
    assert ears.counts == {f"hedges/fetch/{outcome}": 1}


async def test_of_two_answers_one_is_dropped(bucket: Bucket, ears: Ears) -> None:
    """Both came at once: the one that does not count is given to whoever has to close it."""
    dropped: list[str] = []
    asking = asyncio.create_task(Hedge(0.05, ears).first("fetch", bucket.ask, dropped.append))
    await bucket.until(2)
    bucket.requests[0].set_result("first")
    bucket.requests[1].set_result("second")
    assert {await asking, *dropped} == {"first", "second"}


async def test_a_failure_waits_for_the_other(bucket: Bucket, ears: Ears) -> None:
    """One request fails: the other's answer counts. Both do: the first one's failure is told."""
    hedge = Hedge(0.05, ears)
    asking = asyncio.create_task(hedge.first("fetch", bucket.ask))
    await bucket.until(2)
    bucket.requests[0].set_exception(ConnectionError("first"))
    await asyncio.sleep(0)
    bucket.requests[1].set_result("second")
    assert await asking == "second"
    asking = asyncio.create_task(hedge.first("fetch", bucket.ask))
    await bucket.until(4)
    bucket.requests[2].set_exception(ConnectionError("third"))
    await asyncio.sleep(0)
    bucket.requests[3].set_exception(ConnectionError("fourth"))
    with pytest.raises(ConnectionError, match="third"):
        await asking
    assert ears.counts == {"hedges/fetch/won": 1, "hedges/fetch/failed": 1}


async def test_what_fails_soon_is_not_hedged(bucket: Bucket, ears: Ears, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure that comes at once is for whoever retries, after a pause."""
    monkeypatch.setattr("cache.origin.hedge._UNKNOWN_S", 3600.0)  # soon is soon on a busy machine, too
    asking = asyncio.create_task(Hedge(0.05, ears).first("fetch", bucket.ask))
    await bucket.until(1)
    bucket.requests[0].set_exception(ConnectionError("refused"))
    with pytest.raises(ConnectionError):
        await asking
    assert len(bucket.requests) == 1 and not ears.counts


async def test_a_caller_who_leaves_takes_both_along(bucket: Bucket, ears: Ears) -> None:
    asking = asyncio.create_task(Hedge(0.05, ears).first("fetch", bucket.ask))
    await bucket.until(2)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert sorted(bucket.ended) == [0, 1]


async def test_the_budget_bounds_what_is_asked_twice(bucket: Bucket, ears: Ears) -> None:
    """A bucket that is late for everybody is asked twice by few: ten that were saved up, and then one in twenty."""
    hedge = Hedge(0.05, ears)
    asking = [asyncio.create_task(hedge.first("fetch", bucket.ask)) for _ in range(100)]
    while ears.counts["hedges/fetch/denied"] < 85:
        await asyncio.sleep(0)
    await bucket.until(110)
    for request in bucket.requests:
        request.set_result("late")
    await asyncio.gather(*asking)
    assert len(bucket.requests) <= 100 + 10 + 5
    assert ears.counts["hedges/fetch/denied"] >= 85


async def test_no_budget_is_no_hedge(bucket: Bucket, ears: Ears) -> None:
    """Nobody is asked twice, and not even a task is made of the request."""
    asking = asyncio.create_task(Hedge(0.0, ears).first("fetch", bucket.ask))
    await bucket.until(1)
    bucket.requests[0].set_result("first")
    assert await asking == "first"
    assert len(bucket.requests) == 1


def test_late_is_by_what_answers_take() -> None:
    """A second before anything is known; then twice what nine of ten take, each kind by itself."""
    patience = Patience(0.05)
    assert patience.delay_s("fetch") == 1.0
    for number in range(100):
        patience.answered("fetch", 0.1 + number / 1000)
    assert patience.delay_s("fetch") == pytest.approx(2 * 0.19, abs=0.005)
    assert patience.delay_s("list") == 1.0


def test_late_is_what_it_was_for_twenty_answers() -> None:
    """Answers are looked back on every twentieth time, not at each of hundreds a second."""
    patience = Patience(0.05)
    for seconds, before, after in ((0.1, 1.0, 0.2), (3.0, 0.2, 6.0)):
        for _ in range(19):
            patience.answered("fetch", seconds)
            assert patience.delay_s("fetch") == before
        patience.answered("fetch", seconds)
        assert patience.delay_s("fetch") == after


def test_late_answers_do_not_put_off_what_is_late() -> None:
    """One in twenty takes ten seconds: that stays late, however long it goes on."""
    patience = Patience(0.05)
    for number in range(1000):
        patience.answered("fetch", 10.0 if number % 20 == 0 else 0.02)
    assert patience.delay_s("fetch") == pytest.approx(0.04)


def test_nothing_is_late_within_a_moment() -> None:
    patience = Patience(0.05)
    for _ in range(100):
        patience.answered("fetch", 0.0001)
    assert patience.delay_s("fetch") == 0.02


def test_hedges_are_paid_for_by_requests() -> None:
    """Twenty requests allow for one, and what is saved up has a bound."""
    patience = Patience(0.05)
    assert [patience.take() for _ in range(12)] == [True] * 10 + [False] * 2
    for _ in range(20):
        patience.asked()
    assert [patience.take() for _ in range(2)] == [True, False]
    for _ in range(10_000):
        patience.asked()
    assert [patience.take() for _ in range(12)] == [True] * 10 + [False] * 2
