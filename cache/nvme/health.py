"""How a disk is doing, decided from how its reads or its writes went: events in, decisions out, no clock, no I/O."""

import math
from enum import IntEnum
from typing import Final

import msgspec

from cache.errors import ConfigError

#: The longest pause between two probes, by the first.
_MOST_PAUSES: Final = 64


class HealthSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a disk counts as slow, failing, or out.

    deadline_s: seconds that 4 MiB may take: a request waits no longer for a read, and asks the origin instead.
    strikes: reads (or writes) in a row, late or failed, after which the disk is left alone but for probes.
    recovery: good ones in a row after which a slow disk is healthy again.
    probe_s: seconds from a bad probe to the next; doubled each time, up to 64 times that.
    out_s: seconds without a good probe after which a failing disk counts as out.
    """

    deadline_s: float = 0.5
    strikes: int = 3
    recovery: int = 5
    probe_s: float = 1.0
    out_s: float = 60.0

    def check(self) -> None:
        """Raises: ConfigError."""
        if not (self.deadline_s > 0 and self.probe_s > 0 and self.out_s >= 0):
            raise ConfigError("nvme.health: deadline_s and probe_s must be above 0, out_s not below")
        if self.strikes < 1 or self.recovery < 1:
            raise ConfigError("nvme.health: strikes and recovery must be at least 1")


class State(IntEnum):
    """Each is worse than the one before.

    HEALTHY: all is well. SLOW: asked, but each bad one counts. FAILING: asked by probes only. OUT: likewise, for long.
    """

    HEALTHY = 0
    SLOW = 1
    FAILING = 2
    OUT = 3


class Health:
    """The state of one side of a disk, its reads or its writes. Times are seconds on any clock that never goes back.

    A bad one makes a healthy disk slow, ``strikes`` of them in a row a slow one failing, ``out_s`` without a good
    probe a failing one out. A good probe makes that slow again, where the next bad one counts as the last strike, and
    ``recovery`` good ones in a row make it healthy.
    """

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self.state = State.HEALTHY
        self._bad = 0
        self._good = 0
        self._failing_since = 0.0
        self._pause = settings.probe_s
        self._next_probe = -math.inf

    @property
    def admits(self) -> bool:
        """Whether requests may use the disk."""
        return self.state <= State.SLOW

    def good(self) -> None:
        """One came in time."""
        self._bad = 0
        self._good += 1
        if not self.admits:
            self.state = State.SLOW
            self._good = 0
            self._bad = self._settings.strikes - 1
            self._pause = self._settings.probe_s
            self._next_probe = -math.inf
        elif self._good >= self._settings.recovery:
            self.state = State.HEALTHY

    def bad(self, now: float) -> None:
        """One was late, or failed. Those that began before the disk was left alone count as probes do."""
        self._good = 0
        self._bad += 1
        if self.admits:
            self.state = State.SLOW
            if self._bad < self._settings.strikes:
                return
            self.state = State.FAILING
            self._failing_since = now
        elif now - self._failing_since >= self._settings.out_s:
            self.state = State.OUT
        if now >= self._next_probe:  # one probe that is stuck for long strikes more than once
            self._next_probe = now + self._pause
            self._pause = min(2 * self._pause, _MOST_PAUSES * self._settings.probe_s)

    def probe_in(self, now: float) -> float:
        """Seconds until the next probe is due, while the disk is left alone."""
        return max(self._next_probe - now, 0.0)
