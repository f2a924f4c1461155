"""The slowest requests of the last hour, with what each stage of them took."""

import heapq
import itertools
import math

import msgspec

from cache.interfaces import Clock
from cache.stopwatch import Stopwatch

from .uids import Uids

_HOUR_S = 3600.0


class SlowAnswer(msgspec.Struct, frozen=True):
    """One of the slowest requests of the last hour: when it ended (Unix seconds), and milliseconds by stage.

    ``study`` is shown as ``log.uids`` says. ``trace``: the trace that the client named.
    """

    time: float
    route: str
    tier: str
    status: int
    ms: float
    stages: dict[str, float]
    study: str | None = None
    trace: str | None = None


class Slow:
    """Keeps ``kept`` of them. A request that takes no longer than ``floor`` seconds need not be told of."""

    def __init__(self, kept: int, uids: Uids, clock: Clock) -> None:
        self.floor = 0.0 if kept else math.inf
        self._kept = kept
        self._uids = uids
        self._clock = clock
        self._heap: list[tuple[float, int, SlowAnswer]] = []
        self._numbers = itertools.count()

    def add(self, route: str, tier: str, status: int, watch: Stopwatch) -> None:
        """A request has ended."""
        seconds = watch.seconds
        if seconds <= self.floor:
            return
        answer = SlowAnswer(
            time=self._clock.now(),
            route=route,
            tier=tier,
            status=status,
            ms=round(seconds * 1e3, 3),
            stages={name: round(taken * 1e3, 3) for name, taken in watch.stages.items()},
            study=self._uids.shown(watch.study) or None,
            trace=watch.trace or None,
        )
        heapq.heappush(self._heap, (seconds, next(self._numbers), answer))
        if len(self._heap) > self._kept:
            heapq.heappop(self._heap)
        self._lift()

    def forget(self) -> None:
        """Leave behind what is longer ago than an hour; to be called every second or so."""
        since = self._clock.now() - _HOUR_S
        if any(answer.time < since for _, _, answer in self._heap):
            self._heap = [each for each in self._heap if each[2].time >= since]
            heapq.heapify(self._heap)
        self._lift()

    def answers(self) -> list[SlowAnswer]:
        """The slowest first."""
        self.forget()
        return [answer for _, _, answer in sorted(self._heap, reverse=True)]

    def _lift(self) -> None:
        full = len(self._heap) >= self._kept
        self.floor = math.inf if not self._kept else self._heap[0][0] if full else 0.0
