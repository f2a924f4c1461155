"""Hedged requests: a second one for a request that takes unusually long, and the first answer counts.

A bucket answers nearly always soon, and now and then seconds later; a series needs hundreds of answers, so it nearly
always waits for one of the latter. The remedy is Dean and Barroso's ("The Tail at Scale", CACM 56(2), 2013): ask once
more when a request is later than most are. How late that is follows from the answers themselves, and how often it may
be done from a budget, so that a bucket which is slow for everybody is not asked twice by everybody.
"""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from cache.interfaces import Observer

#: Late is twice what nine of ten of the last answers took. (A quantile nearer to 1 would follow the late ones
#: themselves, once they are more than the rest of it.)
_SHARE: Final = 0.9
_TIMES: Final = 2.0
#: Answers that are looked back on; after how many it is looked, which is how many there must be.
_LAST: Final = 256
_ENOUGH: Final = 20
#: Seconds: what counts as late before enough is known, and what never does.
_UNKNOWN_S: Final = 1.0
_LEAST_S: Final = 0.02
#: Hedges that may be saved up: a few late answers may come at once.
_SAVED: Final = 10.0

_Result = TypeVar("_Result")


class Patience:
    """How long to wait for an answer, and whether another request may be made for it. Pure."""

    def __init__(self, budget: float) -> None:
        """``budget``: hedges that each request allows for."""
        self._budget = budget
        self._saved = _SAVED if budget else 0.0
        self._took: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LAST))
        self._answered: Counter[str] = Counter()
        self._delays: dict[str, float] = {}

    def delay_s(self, kind: str) -> float:
        """Seconds after which a request of this kind is late."""
        return self._delays.get(kind, _UNKNOWN_S)

    def asked(self) -> None:
        """A request was made that nobody had made before."""
        self._saved = min(self._saved + self._budget, _SAVED)

    def answered(self, kind: str, seconds: float) -> None:
        """So long a request has taken until it was answered, by itself or by its hedge."""
        took = self._took[kind]
        took.append(seconds)
        self._answered[kind] += 1
        if self._answered[kind] % _ENOUGH == 0:
            late = sorted(took)[int(_SHARE * len(took))]
            self._delays[kind] = max(_TIMES * late, _LEAST_S)

    def take(self) -> bool:
        """Whether one more may be made, which is then paid for."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


class Hedge:
    """Asks, and once more where that takes long. ``budget``: hedges for each request; 0 for none at all."""

    def __init__(self, budget: float, observer: Observer) -> None:
        self._on = budget > 0
        self._patience = Patience(budget)
        self._observer = observer

    async def first(
        self, kind: str, ask: Callable[[], Awaitable[_Result]], drop: Callable[[_Result], None] = lambda _: None
    ) -> _Result:
        """The first good answer; if there is none, the failure of the first. Nothing of it runs after that.

        ``ask`` is called twice at most, and must do no harm the second time; ``drop`` gets an answer that comes too
        late. Counts ``hedges`` by kind and outcome: "won", "lost", "failed" (both did), "denied" (the budget is spent).
        """
        if not self._on:
            return await ask()
        loop = asyncio.get_running_loop()
        start = loop.time()
        self._patience.asked()
        requests: list[asyncio.Future[_Result]] = [asyncio.ensure_future(ask())]
        try:
            await asyncio.wait(requests, timeout=self._patience.delay_s(kind))
            if not requests[0].done():
                if self._patience.take():
                    requests.append(asyncio.ensure_future(ask()))
                else:
                    self._observer.count("hedges", (kind, "denied"))
            answer = await self._one_of(kind, requests)
            self._patience.answered(kind, loop.time() - start)
            return answer
        finally:
            if requests:
                await _end(requests, drop)

    async def _one_of(self, kind: str, requests: "list[asyncio.Future[_Result]]") -> _Result:
        """The answer of whichever is first, taken out of ``requests``; of two that fail, the first's failure."""
        hedged = len(requests) > 1
        waiting = set(requests)
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            good = [
                number for number, request in enumerate(requests) if request in done and request.exception() is None
            ]
            if good:
                if hedged:
                    self._observer.count("hedges", (kind, "won" if good[0] else "lost"))
                return requests.pop(good[0]).result()
            if not waiting:
                if hedged:
                    self._observer.count("hedges", (kind, "failed"))
                return requests[0].result()  # raises


async def _end(requests: "list[asyncio.Future[_Result]]", drop: Callable[[_Result], None]) -> None:
    """Have none of them run any more, and nothing kept of them."""
    for request in requests:
        request.cancel()
    for outcome in await asyncio.gather(*requests, return_exceptions=True):
        if not isinstance(outcome, BaseException):
            drop(outcome)
