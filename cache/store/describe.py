"""What series are of: their attributes, as the catalogue has them, or read from the first bytes of an object."""

import contextlib

from cache.attributes import Attributes, Described
from cache.catalog import Catalog
from cache.errors import BadSource
from cache.interfaces import Deriver, Origin, Space
from cache.keys import Manifest, SeriesRef
from cache.origin.find import HEADER_BYTES, read_head
from cache.pack import Layout
from cache.restore import Restores
from cache.urgency import Priority, Urgency, working

from .listings import Listings


class Descriptions:
    """Attributes by series. ``patient_key`` hashes what identifies patients."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        listings: Listings,
        origin: Origin,
        workers: Deriver,
        restores: Restores,
        patient_key: bytes,
    ) -> None:
        self._catalog = catalog
        self._listings = listings
        self._origin = origin
        self._workers = workers
        self._restores = restores
        self._patient_key = patient_key

    async def describe(self, ref: SeriesRef, priority: int = Priority.WARM) -> Described:
        """The series with its attributes; they are read from the first bytes of an object if they are not known yet.

        Raises: UnknownStudy, EmptySeries, BadManifest, OriginError, WorkerFailed.
        """
        manifest = await self._listings.recorded(ref, priority)
        found = self._catalog.described(ref) or Described(ref, len(manifest.objects), None)
        if found.attributes is not None:
            return found
        with working(Urgency(priority)), contextlib.suppress(BadSource):
            async with self._restores.watching(manifest):
                attributes = await read_head(self._origin, manifest.objects[0].key, self._described)
            if attributes is not None:
                self._catalog.describe(ref, manifest.source_version, attributes)
                return Described(ref, found.objects, attributes)
        return found

    async def attributes(self, ref: SeriesRef, object_key: str) -> Attributes | None:
        """What the series is of: as the catalogue knows, else as the object says; None if it says nothing.

        Raises: OriginError, WorkerFailed.
        """
        known = self._catalog.described(ref)
        if known is not None and known.attributes is not None:
            return known.attributes
        with working(Urgency(Priority.WARM)), contextlib.suppress(BadSource):
            return await read_head(self._origin, object_key, self._described)
        return None

    async def note(self, manifest: Manifest, layout: Layout, pack: Space) -> None:
        """Note what the series is of, if that is not known, while its objects are at hand."""
        known = self._catalog.described(manifest.ref)
        if known is not None and known.attributes is None:
            first = layout.members[0]
            head = bytes(pack.view[first.offset : first.offset + min(first.nbytes, HEADER_BYTES[0])])
            with contextlib.suppress(BadSource):
                self._catalog.describe(manifest.ref, manifest.source_version, await self._described(head))

    async def _described(self, head: bytes) -> Attributes:
        return await self._workers.describe(head, self._patient_key)
