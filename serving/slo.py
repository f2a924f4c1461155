"""Service level objectives: how much of what may be slow was, and how fast that is being used up."""

from collections.abc import Iterable
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from .metrics import Metrics
from .metrics.rolling import WINDOWS, Window

_LOOKED_AT: Final = ("5m", "1h")


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One objective: of requests that a tier answers, at least a part has its tensor at hand in time.

    name: what it is called, in metrics too.
    tier: "ram", "nvme", "origin" (a miss) or "bypass".
    threshold_s: seconds that such a request may take, before its tensor is sent or a model runs on it.
    target: the part of the requests that has to be so fast; the rest is the error budget.
    """

    name: str
    tier: Literal["ram", "nvme", "origin", "bypass"]
    threshold_s: Annotated[float, msgspec.Meta(gt=0)]
    target: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.99


class Tracked:
    """An objective and what has been seen of it."""

    def __init__(self, slo: Slo) -> None:
        self.slo = slo
        self.requests = 0
        self.slow = 0
        self._windows = {name: Window(*WINDOWS[name], width=2) for name in _LOOKED_AT}

    def add(self, seconds: npt.NDArray[np.float64], now: float) -> None:
        """Requests that were answered about ``now``, a time of a clock that never goes back."""
        slow = int(np.count_nonzero(seconds > self.slo.threshold_s))
        self.requests += len(seconds)
        self.slow += slow
        for window in self._windows.values():
            window.add(np.array([len(seconds), slow]), now)

    @property
    def budget_left(self) -> float:
        """The part of the error budget since the start that is left: 1 is all of it, below 0 more than it was used."""
        return 1 - self._burn(self.requests, self.slow)

    def burn(self, window: str, now: float) -> float:
        """How many times as fast as it may the budget was used up in "5m" or "1h": 1 uses up exactly all of it."""
        self._windows[window].move(now)
        requests, slow = self._windows[window].counts
        return self._burn(int(requests), int(slow))

    def _burn(self, requests: int, slow: int) -> float:
        return slow / requests / (1 - self.slo.target) if requests else 0.0


def track(slos: Iterable[Slo], metrics: Metrics) -> list[Tracked]:
    """Follow the objectives from now on, in metrics too."""
    tracked = [Tracked(slo) for slo in slos]
    for each in tracked:
        metrics.hear(each.slo.tier, each.add)
    metrics.read("slo_requests", lambda: [((each.slo.name,), float(each.requests)) for each in tracked])
    metrics.read("slo_slow_requests", lambda: [((each.slo.name,), float(each.slow)) for each in tracked])
    metrics.read("slo_target", lambda: [((each.slo.name,), each.slo.target) for each in tracked])
    return tracked
