"""The origin's own listing, asked for what its notifications have not told, or for want of any."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import msgspec

from cache.catalog import Current
from cache.interfaces import Clock
from cache.keys import Manifest, SeriesRef, SourceObject
from cache.origin.find import Survey

from .event import Action, Event
from .post import KEY_BYTES, made
from .pull import Found

#: Series that are compared in one go: the loop serves hits meanwhile.
_TURN: Final = 256


class ListingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Listing what was written since the last look, for an origin that announces nothing.

    interval_s: seconds between looks; 0: none.
    prefix: of the keys that are listed.
    overlap_s: seconds before the last mark that are listed again, for clocks that differ and for objects that show
        late: a multipart upload bears the time at which it was begun.
    """

    interval_s: float = 0.0
    prefix: str = ""
    overlap_s: float = 900.0


class ReconcileSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Comparing all that the origin has with all that is known of it, for publishers that lose events.

    interval_s: seconds between comparisons; 0: none.
    lookback_s: a series that is not known counts as new if its youngest object is no older; what an archive held
        before is left alone.
    """

    interval_s: float = 0.0
    lookback_s: float = 86_400.0


class NewObjects:
    """A Pull by prefix; its cursor is the youngest time (Unix seconds, the origin's clock) that was seen."""

    name = "listing"

    def __init__(
        self,
        settings: ListingSettings,
        dated: Callable[[str], Awaitable[Sequence[tuple[SourceObject, float]]]],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._dated = dated
        self._clock = clock
        self._told: set[str] = set()  # ids of what the overlap would bring again
        self._telling: set[str] = set()  # the same, once what was found is taken over

    async def look(self, cursor: str) -> Found:
        """An event for each object written since the mark. Raises: OriginDenied, OriginDown."""
        mark = float(cursor) if cursor else self._clock.now()
        since = mark - self._settings.overlap_s
        events = []
        telling: set[str] = set()
        for source, at in await self._dated(self._settings.prefix):
            if at < since or not 0 < len(source.key.encode()) <= KEY_BYTES:
                continue
            mark = max(mark, at)
            identity = (source.key, source.etag, repr(at))
            event = made("listing", "created", identity, key=source.key, etag=source.etag, size=source.size)
            telling.add(event.id)
            if event.id not in self._told:
                events.append(event)
        self._telling = telling
        return Found(events, repr(mark), self._settings.interval_s)

    def taken(self) -> None:
        self._told = self._telling

    async def close(self) -> None:
        return


class Reconciler:
    """A Pull over everything; its cursor is when it looked last (Unix seconds)."""

    name = "reconcile"

    def __init__(
        self,
        settings: ReconcileSettings,
        survey: Callable[[], Awaitable[Survey]],
        known: Callable[[], Mapping[SeriesRef, Current]],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._survey = survey
        self._known = known
        self._clock = clock

    async def look(self, cursor: str) -> Found:
        """An event for each series that is not what it is known as. Raises: OriginDenied, OriginDown."""
        now = self._clock.now()
        interval_s = self._settings.interval_s
        if cursor and 0 <= now - float(cursor) < interval_s:
            return Found([], cursor, interval_s - (now - float(cursor)))
        since = now - self._settings.lookback_s
        known = self._known()  # before the listing: what is noted meanwhile is no difference
        events = await differences(await self._survey(), known, since)
        return Found(events, repr(now), interval_s)

    def taken(self) -> None:
        return

    async def close(self) -> None:
        return


async def differences(survey: Survey, known: Mapping[SeriesRef, Current], since: float) -> list[Event]:
    """What the origin has and is not known, and what is known and is not there. Ids hold both sides of a difference.

    ``since``: series that are not known, and objects whose series is not known, count from then on.
    """
    events = []
    for number, (ref, objects) in enumerate(survey.series.items()):
        if number % _TURN == _TURN - 1:
            await asyncio.sleep(0)
        was = known.get(ref)
        if was is None and survey.newest[ref] >= since:
            events.append(_event("created", ref, Manifest.of(ref, objects).source_version))
        elif was is not None and was.validated_at > 0:
            version = Manifest.of(ref, objects).source_version
            if version != was.source_version:
                events.append(_event("changed", ref, was.source_version, repr(was.validated_at), version))
    for ref, was in known.items():
        if ref not in survey.series and ref not in survey.described and was.validated_at > 0:
            events.append(_event("removed", ref, was.source_version, repr(was.validated_at)))
    for source, at in survey.others:
        if at >= since and len(source.key.encode()) <= KEY_BYTES:
            identity = (source.key, source.etag, repr(at))
            events.append(made("reconcile", "created", identity, key=source.key, etag=source.etag, size=source.size))
    return events


def _event(action: Action, ref: SeriesRef, *identity: str) -> Event:
    return made(
        "reconcile",
        action,
        (action, ref.study, ref.series, *identity),
        study=ref.study,
        series=ref.series,
        complete=action == "removed",
    )
