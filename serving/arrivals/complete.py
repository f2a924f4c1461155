"""When a series has arrived: decided from what is known of it, without I/O and without a clock.

An expected count beats a quiet period, and both end at a forced deadline. What events count is only a hint of when to
look, since publishers repeat and lose them; how many objects there are, the origin says.
"""

from collections.abc import Iterable

import msgspec

from .event import Event


class Rule(msgspec.Struct, frozen=True):
    """When the series of one modality are taken for complete, as in ``ArrivalSettings``."""

    expected: bool
    quiet_s: float
    force_s: float


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is otherwise for one modality; what is unset is as for all.

    expected: as arrivals.expected.
    quiet_s: as arrivals.quiet_s.
    force_s: as arrivals.force_s.
    """

    expected: bool | None = None
    quiet_s: float | None = None
    force_s: float | None = None

    def over(self, rule: Rule) -> Rule:
        changes = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(rule, **changes)


class Gathered(msgspec.Struct, frozen=True):
    """What has arrived of a series and was not carried out yet. Times are Unix seconds of our own clock.

    ``objects`` are the events that brought one less those that took one away: no more than a hint, as an object that
    was written twice counts twice.
    """

    first: float
    last: float
    objects: int
    expected: int | None = None
    complete: bool = False
    modality: str = ""


def gathered(arrived: Iterable[tuple[Event, float]]) -> Gathered:
    """What events of one series, each with the time it was received at, come to. There is at least one."""
    events, times = zip(*arrived, strict=True)
    return Gathered(
        first=min(times),
        last=max(times),
        objects=sum(-1 if event.action == "removed" else 1 for event in events if event.key),
        expected=max((event.expected for event in events if event.expected is not None), default=None),
        complete=any(event.complete for event in events),
        modality=max(event.modality for event in events),
    )


def due_at(series: Gathered, rule: Rule) -> float:
    """From when on (Unix seconds) the series calls for action, unless something more arrives."""
    reached = rule.expected and series.expected is not None and series.objects >= series.expected
    if series.complete or reached:
        return series.last
    return min(series.last + rule.quiet_s, series.first + rule.force_s)


def look_again_at(series: Gathered, rule: Rule, objects: int, now: float) -> float | None:
    """When to look again at a series of which the origin has ``objects`` now; None: it is warmed as it is."""
    forced_at = series.first + rule.force_s
    expects = rule.expected and not series.complete and series.expected is not None
    if not expects or objects >= (series.expected or 0) or now >= forced_at:
        return None
    return min(now + max(rule.quiet_s, 1.0), forced_at)
