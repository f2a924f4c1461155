"""How durations were distributed in the last minute, five minutes and hour: a high-dynamic-range histogram each.

The bits of a floating-point number are its bin: the exponent and the six leading bits of the fraction, so 64 bins
between a number and its double, each 1.6 % wide at most (the layout of HdrHistogram). NumPy finds the bins of many
durations at once, as recording one at a time in Python takes longer than the rest of a hit.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

#: Seconds a window reaches back, and how many parts it is moved on by.
WINDOWS: Final = {"1m": (60.0, 6), "5m": (300.0, 10), "1h": (3600.0, 12)}

_SHIFT: Final = 52 - 6
_FIRST: Final = int(np.float64(2.0**-20).view(np.int64)) >> _SHIFT  # a microsecond
_LAST: Final = int(np.float64(2.0**12).view(np.int64)) >> _SHIFT  # an hour and more
BINS: Final = _LAST - _FIRST
_EDGES: Final = (np.arange(_FIRST, _LAST + 1, dtype=np.int64) << _SHIFT).view(np.float64)
_MIDDLES: Final = (_EDGES[:-1] + _EDGES[1:]) / 2

Counts = npt.NDArray[np.int64]


def binned(seconds: npt.NDArray[np.float64]) -> Counts:
    """How many of ``seconds`` fall into each bin."""
    bins = np.clip((seconds.view(np.int64) >> _SHIFT) - _FIRST, 0, BINS - 1)
    return np.bincount(bins, minlength=BINS)


class Window:
    """Sums over the last ``seconds``, moved on ``parts`` times in these."""

    def __init__(self, seconds: float, parts: int, width: int) -> None:
        self._part_s = seconds / parts
        self._parts = np.zeros((parts, width), np.int64)
        self._now = 0
        self.counts: Counts = np.zeros(width, np.int64)

    def add(self, counts: Counts, now: float) -> None:
        """Add what happened up to ``now``, in seconds of a clock that never goes back."""
        self.move(now)
        self._parts[self._now % len(self._parts)] += counts
        self.counts += counts

    def move(self, now: float) -> None:
        """Leave behind what is too long ago ``now``."""
        reached = int(now / self._part_s)
        for part in range(max(self._now + 1, reached - len(self._parts) + 1), reached + 1):
            gone = self._parts[part % len(self._parts)]
            self.counts -= gone
            gone[:] = 0
        self._now = max(self._now, reached)


class Rolling:
    """The distribution of one kind of duration in each window."""

    def __init__(self) -> None:
        self.windows = {name: Window(seconds, parts, BINS) for name, (seconds, parts) in WINDOWS.items()}

    def add(self, seconds: npt.NDArray[np.float64], now: float) -> None:
        """Add durations that ended about ``now``."""
        counts = binned(seconds)
        for window in self.windows.values():
            window.add(counts, now)

    def move(self, now: float) -> None:
        for window in self.windows.values():
            window.move(now)


def quantiles(counts: Counts, shares: tuple[float, ...]) -> list[float]:
    """The nearest-rank quantiles in seconds, to 0.8 %; of nothing they are 0."""
    reached = np.cumsum(counts)
    if not reached[-1]:
        return [0.0] * len(shares)
    ranks = np.maximum(np.ceil(np.array(shares) * reached[-1]), 1)
    return [float(middle) for middle in _MIDDLES[np.searchsorted(reached, ranks)]]
