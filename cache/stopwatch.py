"""The time of one request, stage after stage: it travels with the task that answers the request.

A stage is what has happened since the stage before it ended, so stages leave no gap, and their sum is the request's
time. To end one is to note its name and the time: hits have microseconds for all of it.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

from .interfaces import Observer

#: Seconds by stage.
Stages = dict[str, float]


class Lap(NamedTuple):
    """One stage: when it began and ended, on the clock of ``time.perf_counter``."""

    stage: str
    began: float
    ended: float


class Stopwatch:
    """Takes the time.

    ``names``: the stages that have ended, in their order; ``times``: when the request began, and when each of them
    ended. ``hand_at``: which of these is when what was asked for was at hand, 0 for none. ``study``: whose it is, ""
    for none. ``trace``: the trace that the request is part of, "" for none; ``told``: what others that are asked for it
    are told of that, by name.

    The observer is told of each stage, where there is one; of a request's, whoever records requests tells.
    """

    __slots__ = ("_observer", "hand_at", "names", "study", "times", "told", "trace")

    def __init__(self, observer: Observer | None = None) -> None:
        self.names: list[str] = []
        self.times = [time.perf_counter()]
        self.hand_at = 0
        self.study = ""
        self.trace = ""
        self.told: tuple[tuple[str, str], ...] = ()
        self._observer = observer

    @property
    def seconds(self) -> float:
        """From the start to the end of the last stage."""
        return self.times[-1] - self.times[0]

    @property
    def stages(self) -> Stages:
        """Seconds of each stage; those of one that came again are added up."""
        stages: Stages = {}
        times = iter(self.times)
        began = next(times)
        for name, ended in zip(self.names, times, strict=True):
            stages[name] = stages.get(name, 0.0) + ended - began
            began = ended
        return stages

    def laps(self) -> Iterator[Lap]:
        """Each stage by itself."""
        return itertools.starmap(Lap, zip(self.names, self.times, self.times[1:], strict=False))

    def lap(self, stage: str) -> None:
        """A stage ends here."""
        now = time.perf_counter()
        if self._observer is not None:
            self._observer.stage(stage, now - self.times[-1])
        self.names.append(stage)
        self.times.append(now)

    def hand(self, stage: str) -> None:
        """A stage ends here, and with it what was asked for is at hand."""
        self.lap(stage)
        self.hand_at = len(self.names)

    def at_hand(self) -> None:
        """What was asked for was at hand at the end of the last stage."""
        self.hand_at = len(self.names)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done in here is a stage, however it ends."""
        try:
            yield
        finally:
            self.lap(name)

    def split(self, stages: Stages) -> None:
        """The time since the last stage was that of these, in their order; what they leave is the last one's."""
        end = time.perf_counter()
        for number, (name, seconds) in enumerate(stages.items(), 1):
            now = end if number == len(stages) else min(self.times[-1] + seconds, end)
            if self._observer is not None:
                self._observer.stage(name, now - self.times[-1])
            self.names.append(name)
            self.times.append(now)

    def end(self, observer: Observer) -> None:
        """The request is over. What goes on in its name, as a fill does that others may want, ``observer`` is told."""
        self._observer = observer

    def beside(self) -> "Stopwatch":
        """Another one, for something that is done for the same request at the same time as other things."""
        watch = Stopwatch()
        watch.study, watch.trace, watch.told = self.study, self.trace, self.told
        return watch

    def join(self, other: "Stopwatch") -> None:
        """The time since the last stage was that of another one, whose end is when what was asked for was at hand."""
        self.split(other.stages)
        self.at_hand()


_CURRENT: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


def current(observer: Observer | None = None) -> Stopwatch:
    """The stopwatch of the request that this task answers; where it answers none, a new one that tells ``observer``."""
    return _CURRENT.get() or Stopwatch(observer)


def timing(watch: Stopwatch) -> None:
    """What this task does from now on, and tasks that it starts, is for the request that ``watch`` times."""
    _CURRENT.set(watch)
