"""What is noted of every request, whichever door it came by."""

import time
from collections.abc import Mapping
from typing import Final

from cache.stopwatch import Stages, Stopwatch

from .log import logger
from .metrics import AT_ONCE, Metrics
from .slow import Slow
from .tracing import Tracing

_NOTHING: Final[Mapping[str, str]] = {}


class Recorder:
    """Counts answers, keeps the slowest of them, and logs what took ``slow_ms`` milliseconds or more."""

    def __init__(self, metrics: Metrics, slow: Slow, tracing: Tracing, slow_ms: float) -> None:
        self._metrics = metrics
        self._slow = slow
        self._tracing = tracing
        self._slow_s = slow_ms / 1e3

    def begin(self, told: Mapping[str, str] = _NOTHING) -> Stopwatch:
        """A request begins now. ``told``: what its client says with it, by lower-case name; traces are looked for."""
        return self._tracing.begin(told)

    def part(self, watch: Stopwatch) -> Stopwatch:
        """One of the many requests that an endless one is made of begins now: its stages are counted as they end."""
        part = watch.beside()
        part.end(self._metrics)
        return part

    def answered(
        self, route: str, tier: str, status: int, watch: Stopwatch, code: str = "", *, endless: bool = False
    ) -> None:
        """A request was answered. ``tier``: which had its tensor, "none" for none.

        ``endless``: it lasted as long as its client wanted, so its seconds mean nothing.
        """
        watch.lap("response")
        if self._tracing.spans:
            self._tracing.end(watch, route, tier, status)
        if endless:
            self._metrics.untimed(route, status)
            return
        self._metrics.request(route, tier, status, watch)
        watch.end(self._metrics)
        self._kept(route, tier, status, watch, code)

    def _kept(self, route: str, tier: str, status: int, watch: Stopwatch, code: str) -> None:
        seconds = watch.seconds
        if seconds > self._slow.floor:
            self._slow.add(route, tier, status, watch)
        if seconds >= self._slow_s:
            stages = {name: round(taken * 1e3, 1) for name, taken in watch.stages.items()}
            logger().info(
                "slow request",
                route=route,
                tier=tier,
                status=status,
                code=code,
                ms=round(seconds * 1e3, 1),
                stages=stages,
                study=watch.study,
                trace=watch.trace,
            )

    def at_once(self, times: list[float], study: str) -> None:
        """The hand-off socket has answered with what is in RAM: when that began, was found, and was leased.

        It is what is asked most, and takes so little that even a stopwatch would be felt.
        """
        now = time.perf_counter()
        times.append(now)
        self._metrics.at_once(times)
        seconds = now - times[0]
        if seconds > self._slow.floor or seconds >= self._slow_s:
            watch = Stopwatch()
            watch.names, watch.times, watch.study = list(AT_ONCE), times, study
            self._kept("handoff", "ram", 201, watch, "")

    def untimed(self, route: str, status: int) -> None:
        """A request was answered that nobody waits for."""
        self._metrics.untimed(route, status)


class Idle(Recorder):
    """Notes nothing."""

    def __init__(self) -> None:
        self._watch = _Stopped()

    def begin(self, told: Mapping[str, str] = _NOTHING) -> Stopwatch:
        return self._watch

    def part(self, watch: Stopwatch) -> Stopwatch:
        return watch

    def answered(
        self, route: str, tier: str, status: int, watch: Stopwatch, code: str = "", *, endless: bool = False
    ) -> None:
        return

    def at_once(self, times: list[float], study: str) -> None:
        return

    def untimed(self, route: str, status: int) -> None:
        return


class _Stopped(Stopwatch):
    """One for all requests: it takes no time."""

    __slots__ = ()

    def lap(self, stage: str) -> None:
        return

    def hand(self, stage: str) -> None:
        return

    def split(self, stages: Stages) -> None:
        return

    def beside(self) -> Stopwatch:
        return self
