"""Which objects a series consists of: as the catalogue remembers while that may be trusted, else as the origin says."""

import asyncio
from collections.abc import Callable

from cache.catalog import Catalog
from cache.errors import NotFound, VoxcacheError
from cache.flight import Flights, FlightSettings
from cache.interfaces import Clock, Observer
from cache.keys import Manifest, SeriesRef
from cache.origin.find import Finder
from cache.stopwatch import Stopwatch
from cache.urgency import Priority

from .settings import StoreSettings


class Listings:
    """Manifests. ``superseded`` hears of a series whose only version is that one now; None: it is gone."""

    def __init__(
        self,
        *,
        settings: StoreSettings,
        flights: FlightSettings,
        catalog: Catalog,
        finder: Finder,
        clock: Clock,
        observer: Observer,
        superseded: Callable[[SeriesRef, str | None], None],
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._finder = finder
        self._clock = clock
        self._observer = observer
        self._superseded = superseded
        self._flights: Flights[SeriesRef, Manifest] = Flights(flights)
        self._asked: dict[SeriesRef, bool] = {}  # listings under way; True: the series changed since they began
        self._refreshes: dict[SeriesRef, asyncio.Task[None]] = {}

    def trusted(self, ref: SeriesRef) -> Manifest | None:
        """The recorded manifest if it may be used as it is; one that is due for a check gets that in the background."""
        if self._settings.revalidate == "request":
            return None
        recorded = self._catalog.recorded(ref)
        if recorded is None or recorded.validated_at <= 0:
            return None
        age = self._clock.now() - recorded.validated_at
        if self._settings.revalidate == "interval" and age > self._settings.revalidate_s:
            self._refresh_behind(ref)
        return recorded.manifest

    async def current(self, ref: SeriesRef, watch: Stopwatch, priority: int) -> Manifest:
        """The manifest that answers are made by. Raises: UnknownStudy, EmptySeries, BadManifest, OriginError."""
        manifest = self.trusted(ref)
        if manifest is not None:
            return manifest
        with watch.stage("list"):
            return await self._list(ref, priority)

    async def recorded(self, ref: SeriesRef, priority: int) -> Manifest:
        """The series as it was last listed, unless it is said to have changed; for what need not be up to date."""
        recorded = self._catalog.recorded(ref)
        if recorded is not None and recorded.validated_at > 0:
            return recorded.manifest
        return await self._list(ref, priority)

    def changed(self, ref: SeriesRef) -> None:
        """The origin has said that this series changed: no listing that was begun before is believed any more."""
        self._catalog.invalidate(ref)
        if ref in self._asked:
            self._asked[ref] = True

    @property
    def refreshing(self) -> bool:
        """Whether any series is listed in the background."""
        return bool(self._refreshes)

    async def close(self) -> None:
        """Cancel all that is under way."""
        await self._flights.close()
        refreshes = list(self._refreshes.values())
        for task in refreshes:
            task.cancel()
        await asyncio.gather(*refreshes, return_exceptions=True)

    async def _list(self, ref: SeriesRef, priority: int) -> Manifest:
        manifest, _ = await self._flights.join(ref, lambda: self._ask(ref), priority, lambda listed: listed)
        return manifest

    async def _ask(self, ref: SeriesRef) -> Manifest:
        try:
            manifest = await self._listed(ref)
        except NotFound:
            # deleted at the origin: it must not be answered from here any longer
            self._catalog.forget(ref)
            self._superseded(ref, None)
            raise
        before = self._catalog.recorded(ref)
        self._catalog.record(manifest, self._clock.now())
        if before is not None and before.manifest.source_version != manifest.source_version:
            self._superseded(ref, manifest.source_version)
        return manifest

    async def _listed(self, ref: SeriesRef) -> Manifest:
        """The series as the origin lists it; again if it was said to have changed meanwhile."""
        try:
            while True:
                self._asked[ref] = False
                try:
                    manifest = await self._finder.manifest(ref)
                except NotFound:
                    if not self._asked[ref]:
                        raise
                else:
                    if not self._asked[ref]:
                        return manifest
        finally:
            del self._asked[ref]

    def _refresh_behind(self, ref: SeriesRef) -> None:
        if ref not in self._refreshes:
            task = self._refreshes[ref] = asyncio.create_task(self._refresh(ref))
            task.add_done_callback(lambda _: self._refreshes.pop(ref))

    async def _refresh(self, ref: SeriesRef) -> None:
        try:
            await self._list(ref, Priority.WARM)
        except VoxcacheError as error:
            # what is held stays right for the version it names; the next request past the interval tries again
            self._observer.count("revalidation_failures", (error.code,))
