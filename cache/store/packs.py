"""A series' pack while something is made of it: from NVMe, or object by object from the origin."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

from cache import __version__
from cache.entry import Entry, Lineage
from cache.errors import CorruptEntry, DiskFailing, OriginError
from cache.interfaces import Clock, Origin, Space
from cache.keys import Key, Manifest
from cache.nvme import NvmeTier
from cache.pack import Layout
from cache.restore import Restores
from cache.stopwatch import Stopwatch

from .behind import WriteBehind
from .places import Passing, Places


class Pack:
    """A pack in use: where it is, whether it was stored there before, and what it becomes if it was just fetched."""

    def __init__(self, key: Key, layout: Layout, space: Space, *, stored: bool) -> None:
        self.key = key
        self.layout = layout
        self.space = space
        self.stored = stored
        self.fetched: Entry | None = None


class Packs:
    """Packs to work on."""

    def __init__(
        self,
        *,
        nvme: NvmeTier,
        places: Places,
        behind: WriteBehind,
        origin: Origin,
        restores: Restores,
        clock: Clock,
        host: str,
    ) -> None:
        self._nvme = nvme
        self._places = places
        self._behind = behind
        self._origin = origin
        self._restores = restores
        self._clock = clock
        self._host = host

    @contextlib.asynccontextmanager
    async def of(self, namespace: str, manifest: Manifest, watch: Stopwatch) -> AsyncIterator[Pack]:
        """Space with the series' pack, if NVMe has it; what is fetched to it goes to NVMe after its use."""
        key, layout = Key.pack(namespace, manifest), Layout.of(manifest)
        space = stored = await self._stored(key, layout.nbytes, watch)
        if space is None:
            with watch.stage("reserve"):
                space = await self._places.intermediate(namespace, layout.nbytes)
        pack = Pack(key, layout, space, stored=stored is not None)
        try:
            yield pack
        finally:
            if pack.fetched is None:
                pack.space.release()
            else:
                self._behind.take(pack.fetched, pack.space)

    @contextlib.asynccontextmanager
    async def anew(self, namespace: str, manifest: Manifest) -> AsyncIterator[Pack]:
        """Space for the series' pack, held or not, that is for this use only."""
        layout = Layout.of(manifest)
        space = await self._places.intermediate(namespace, layout.nbytes)
        pack = Pack(Key.pack(namespace, manifest), layout, space, stored=False)
        try:
            yield pack
        finally:
            pack.space.release()

    async def fetch(
        self,
        manifest: Manifest,
        layout: Layout,
        key: Key,
        space: Space,
        *,
        arrived: Callable[[int], None],
        watch: Stopwatch,
    ) -> Entry:
        """Fill the space from the origin: the pack of this key. Each object is announced as soon as it is there."""
        start = time.perf_counter()
        payload = space.view

        async def fetch(number: int) -> None:
            member = layout.members[number]
            await self._origin.fetch(manifest.objects[number], payload[member.offset : member.offset + member.nbytes])
            layout.frame_object(payload, number)  # one at a time: all at once would hold the loop
            arrived(number)

        layout.frame_end(payload)
        with watch.stage("fetch"):
            async with self._restores.watching(manifest):
                await _all(fetch(number) for number in range(len(layout.members)))
        lineage = Lineage(
            source_version=manifest.source_version,
            objects=len(manifest.objects),
            source_bytes=sum(source.size for source in manifest.objects),
            software=f"voxcache {__version__}",
            made_at=self._clock.now(),
            host=self._host,
        )
        return Entry(key, layout.nbytes, None, lineage, time.perf_counter() - start)

    async def _stored(self, key: Key, nbytes: int, watch: Stopwatch) -> Space | None:
        await self._behind.landed(key, nbytes)  # sooner there than fetched again
        if self._nvme.lookup(key) is None:
            return None
        with watch.stage("reserve"):
            space = await self._places.intermediate(key.namespace, nbytes)
        with watch.stage("nvme_read"), contextlib.suppress(CorruptEntry, KeyError, DiskFailing):
            try:
                await self._nvme.read_into(key, space.view, space.release)
            except BaseException:
                if isinstance(space, Passing):
                    space.leave()  # a thread may still be at it
                raise
            return space
        return None


async def _all(fetches: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Have all of them done. Raises: OriginError: one failed; the others have ended too."""
    try:
        async with asyncio.TaskGroup() as group:
            for fetch in fetches:
                group.create_task(fetch)
    except* OriginError as failed:
        # one reason is enough, and it must not hide in a group: callers match on its type
        first = failed.exceptions[0]
    else:
        return
    raise first
