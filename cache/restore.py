"""Objects that their origin keeps in an archive: each series is asked back once, and looked for until it is there."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Final, Literal

import msgspec

from .catalog import Catalog, Restore
from .errors import Archived, Restoring
from .interfaces import Archive, Availability, Clock, Observer, Origin
from .keys import Manifest, SeriesRef, SourceObject
from .origin.together import each

#: Objects that are asked about, or asked back, at the same time.
_WIDTH: Final = 16


class RestoreSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether objects are brought back from an archive, such as S3's Glacier classes, which costs money.

    enabled: ask for them; unless it is set, who wants them is told that they are archived.
    days: how long the origin keeps what it brought back.
    tier: how fast, at which price (S3 user guide, "Archive retrieval options").
    expected_s: seconds that this takes, as callers are told it.
    poll_s: seconds between looks whether it has happened; a restored event makes for one at once.
    """

    enabled: bool = False
    days: Annotated[int, msgspec.Meta(ge=1)] = 7
    tier: Literal["Expedited", "Standard", "Bulk"] = "Standard"
    expected_s: float = 18_000.0
    poll_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0


#: Told of a series that was asked back and of its source version, so that somebody looks for it again.
Asked = Callable[[SeriesRef, str], Awaitable[None]]


async def _nobody(ref: SeriesRef, version: str) -> None:
    """Nobody wants to know."""


class Restores:
    """The series that are being brought back; what was asked for is in the catalogue, so a restart asks for nothing."""

    def __init__(
        self, settings: RestoreSettings, origin: Origin, catalog: Catalog, clock: Clock, observer: Observer
    ) -> None:
        self.asked: Asked = _nobody
        self._settings = settings
        self._archive = origin if isinstance(origin, Archive) else None
        self._catalog = catalog
        self._clock = clock
        self._observer = observer
        self._asking = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def watching(self, manifest: Manifest) -> AsyncIterator[None]:
        """Around whatever reads the series' objects.

        Raises:
            Archived: some are in the archive, and are not brought back from here.
            Restoring: they are being brought back.
            OriginDenied, OriginDown: the origin would not say, or would not bring them back.
        """
        await self._check(manifest)
        try:
            yield
        except Archived as archived:
            raise await self._ask(manifest, archived) from None

    def look(self, ref: SeriesRef) -> None:
        """The origin has said something about the series: have it looked for at the next occasion."""
        if (noted := self._catalog.restore(ref)) is not None:
            self._catalog.note_restore(ref, msgspec.structs.replace(noted, look_at=0.0))

    async def _check(self, manifest: Manifest) -> None:
        noted = self._catalog.restore(manifest.ref)
        if noted is None or noted.source_version != manifest.source_version or self._archive is None:
            return
        now = self._clock.now()
        if now < noted.look_at:
            raise self._restoring(manifest, noted)
        state = await self._state(self._archive, manifest)
        if state == "restoring":
            noted = msgspec.structs.replace(noted, look_at=now + self._settings.poll_s)
            self._catalog.note_restore(manifest.ref, noted)
            raise self._restoring(manifest, noted)
        self._catalog.forget_restore(manifest.ref)
        self._observer.count("restores", ("ended",))

    async def _ask(self, manifest: Manifest, archived: Archived) -> Archived | Restoring:
        """What to raise in place of ``archived``, once all of the series has been asked for."""
        if self._archive is None:
            return archived
        if not self._settings.enabled:
            requested = await self._state(self._archive, manifest) == "restoring"
            told = (
                "a restore was requested" if requested else "no restore was requested, and restore.enabled is not set"
            )
            return Archived(f"series {manifest.ref.series} is archived: {told}", restore_requested=requested)
        async with self._asking:
            noted = self._catalog.restore(manifest.ref)
            if noted is None or noted.source_version != manifest.source_version:
                noted = await self._request(self._archive, manifest)
        return self._restoring(manifest, noted)

    async def _request(self, archive: Archive, manifest: Manifest) -> Restore:
        """Ask for all objects that are archived. Begun again after a crash, those that were asked for say so."""

        async def request(source: SourceObject) -> Availability:
            state = await archive.availability(source)
            if state == "archived":
                await archive.restore(source, self._settings.days, self._settings.tier)
            return state

        states = await each(request, manifest.objects, _WIDTH)
        now = self._clock.now()
        there = all(state == "there" for state in states)  # it has ended since the objects were read
        noted = Restore(
            source_version=manifest.source_version,
            requested_at=now,
            expected_at=now + self._settings.expected_s,
            look_at=now if there else now + self._settings.poll_s,
        )
        # first where it survives: somebody will look for it even if this ends here
        await self.asked(manifest.ref, manifest.source_version)
        self._catalog.note_restore(manifest.ref, noted)
        self._observer.count("restores", ("requested",))
        return noted

    async def _state(self, archive: Archive, manifest: Manifest) -> Availability:
        """Of the first objects that are not there; "there" if all are."""
        for start in range(0, len(manifest.objects), _WIDTH):
            states = await each(archive.availability, manifest.objects[start : start + _WIDTH], _WIDTH)
            for state in states:
                if state != "there":
                    return state
        return "there"

    def _restoring(self, manifest: Manifest, noted: Restore) -> Restoring:
        now = self._clock.now()
        expected = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(noted.expected_at))
        return Restoring(
            f"series {manifest.ref.series} is being brought back from the archive, and is expected at {expected}",
            retry_after_s=max(noted.expected_at - now, min(self._settings.poll_s, 60.0)),
            look_again_s=max(noted.look_at - now, 0.0),
        )
