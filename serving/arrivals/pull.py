"""Origins that cannot call are asked: what is new becomes events, and how far they were asked survives any crash."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from cache.interfaces import Observer
from serving.log import code_of, log_failure

from .cursors import Cursors
from .event import Event, Taker

#: Seconds between tries while it fails: at first, and at most.
_PAUSE_S: Final = (1.0, 300.0)
#: Events that are handed over together: the queue has to take all of them or none.
_AT_ONCE: Final = 1000


class Found(msgspec.Struct, frozen=True):
    """What one look has brought: events, the cursor from which to go on, and in how many seconds that is to be."""

    events: Sequence[Event]
    cursor: str
    wait_s: float


class Pull(Protocol):
    """One way of asking an origin what is new."""

    name: str

    async def look(self, cursor: str) -> Found:
        """What is new since ``cursor`` ("" at the very first). Raises: VoxcacheError: it cannot be asked now."""

    def taken(self) -> None:
        """The events of the last look were taken over."""

    async def close(self) -> None: ...


class Puller:
    """Looks again and again, each way at its own pace.

    Events are taken over before the cursor is noted: after a crash some come again, and are known as repeats.
    """

    def __init__(
        self,
        pulls: Sequence[Pull],
        taker: Taker,
        cursors: Cursors,
        observer: Observer,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._pulls = pulls
        self._taker = taker
        self._cursors = cursors
        self._observer = observer
        self._chance = chance
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run(pull)) for pull in self._pulls]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pull in self._pulls:
            await pull.close()

    async def _run(self, pull: Pull) -> None:
        failures = 0
        while True:
            try:
                wait_s = await self.step(pull)
                failures = 0
            except Exception as error:
                self._observer.count("pulls", (pull.name, code_of(error)))
                log_failure("an origin cannot be asked what is new", error, pull=pull.name)
                wait_s = pause_s(failures)
                failures += 1
            # no two nodes, and no two ways, ask in step
            await asyncio.sleep(wait_s * (1 - self._chance() / 4))

    async def step(self, pull: Pull) -> float:
        """One look; in how many seconds the next is due. Raises: VoxcacheError."""
        cursor = self._cursors.get(pull.name)
        found = await pull.look(cursor)
        for start in range(0, len(found.events), _AT_ONCE):
            await self._taker.accept(found.events[start : start + _AT_ONCE])
        pull.taken()
        if found.cursor != cursor:
            await self._cursors.set(pull.name, found.cursor)
        self._observer.count("pulls", (pull.name, "ok"))
        return found.wait_s


def pause_s(failures: int) -> float:
    """Seconds before a try that follows on so many failures."""
    first, most = _PAUSE_S
    return min(first * 2.0 ** min(failures, 10), most)
