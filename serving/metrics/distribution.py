"""What a histogram holds of one set of label values: counts by bucket, their sum, exemplars."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .rolling import Counts, Rolling

Seconds = npt.NDArray[np.float64]


class Exemplar(NamedTuple):
    """A request that fell into a bucket: its trace, its seconds, and when that was (Unix seconds)."""

    trace: str
    seconds: float
    at: float


class Held(NamedTuple):
    """A copy of what a distribution holds, which may be read elsewhere. The last count is of what is in no bucket."""

    counts: Counts
    sum: float
    exemplars: dict[int, Exemplar]


class Distribution:
    """Durations in seconds. ``rolling``: how they were distributed lately, where that is wanted."""

    __slots__ = ("_array", "_bounds", "_counts", "_exemplars", "_sum", "_waiting", "record", "rolling")

    def __init__(self, bounds: Sequence[float], rolling: Rolling | None = None) -> None:
        self._bounds = bounds
        self._array = np.array(bounds)
        self._counts: Counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0
        self._exemplars: dict[int, Exemplar] = {}
        self._waiting: list[float] = []
        #: Notes one duration, which counts once this is settled.
        self.record = self._waiting.append
        self.rolling = rolling

    def example(self, example: Exemplar) -> None:
        """Remember one that was recorded, in the place of the last one of its bucket."""
        self._exemplars[bisect.bisect_left(self._bounds, example.seconds)] = example

    def add(self, seconds: Seconds, now: float) -> None:
        """Count durations that ended about ``now``, on a clock that never goes back."""
        self._counts += np.bincount(np.searchsorted(self._array, seconds), minlength=len(self._counts))
        self._sum += float(seconds.sum())
        if self.rolling is not None:
            self.rolling.add(seconds, now)

    def settle(self, now: float) -> None:
        """Count what was recorded, and leave behind what is too long ago ``now``."""
        if self.rolling is not None:
            self.rolling.move(now)
        if self._waiting:
            self.add(np.array(self._waiting), now)
            self._waiting.clear()

    def held(self) -> Held:
        return Held(self._counts.copy(), self._sum, self._exemplars.copy())
