"""How an entry that is not in RAM gets there: from its file on NVMe, made of the series' objects, or as it is given."""

import contextlib
import time
from collections.abc import AsyncIterator, Iterator

from cache import __version__
from cache.entry import Entry, Lineage
from cache.errors import AllPinned, BadSource, TooLarge
from cache.interfaces import Clock, Deriver, Space
from cache.keys import Key, Manifest
from cache.nvme import NvmeSpace, NvmeTier, Payload
from cache.pack import Layout, member_name
from cache.ram import Pin, RamSpace, RamTier
from cache.recipe.chain import Recipe
from cache.stopwatch import Stopwatch

from .behind import WriteBehind
from .describe import Descriptions
from .outcome import Landed
from .packs import Pack, Packs
from .places import Places


class Filling:
    """What flights do, each for its key."""

    def __init__(
        self,
        *,
        ram: RamTier,
        nvme: NvmeTier,
        places: Places,
        behind: WriteBehind,
        packs: Packs,
        descriptions: Descriptions,
        workers: Deriver,
        clock: Clock,
        host: str,
    ) -> None:
        self._ram = ram
        self._nvme = nvme
        self._places = places
        self._behind = behind
        self._packs = packs
        self._descriptions = descriptions
        self._workers = workers
        self._clock = clock
        self._host = host

    async def load(self, key: Key, watch: Stopwatch) -> Landed:
        """From NVMe. Raises: KeyError, CorruptEntry, DiskFailing, Refused, UnknownNamespace."""
        payload = self._nvme.open_payload(key)
        try:
            with watch.stage("reserve"):
                space = await self._places.reserve(key.namespace, payload.entry.nbytes)
        except TooLarge as reason:
            return Landed(payload, made=False, reason=str(reason))
        except BaseException:
            payload.release()
            raise
        payload.release()
        with watch.stage("nvme_read"):
            # if this fails, a thread may still be at the space
            entry = await self._nvme.read_into(key, space.view, space.release)
        return Landed(self._ram.admit(entry, space), made=False)

    async def make(self, key: Key, manifest: Manifest, recipe: Recipe, watch: Stopwatch) -> Landed:
        """The tensor, of the series' pack.

        Raises: BadSource, BadRequest, OriginChanged, OriginError, Refused, UnknownNamespace, WorkerFailed.
        """
        packs = self._packs.of(key.namespace, manifest, watch)
        async with self._made(key, manifest, recipe, packs, watch) as (entry, result, reason):
            if isinstance(result, NvmeSpace):
                with watch.stage("nvme_write"):
                    await self._nvme.commit(entry, result)
                return Landed(self._opened(key), made=True, reason=reason)
            pin = self._ram.admit(entry, result)
            self._behind.write(pin)
            return Landed(pin, made=True)

    @contextlib.asynccontextmanager
    async def remade(
        self, key: Key, manifest: Manifest, recipe: Recipe, watch: Stopwatch
    ) -> AsyncIterator[tuple[Entry, memoryview]]:
        """The same, of objects that are fetched anew, for as long as the context lasts: nothing of it is kept."""
        packs = self._packs.anew(key.namespace, manifest)
        async with self._made(key, manifest, recipe, packs, watch) as (entry, result, _):
            yield entry, result.view

    async def gather(self, key: Key, manifest: Manifest, watch: Stopwatch) -> Landed:
        """The pack itself, for who reads its objects.

        Raises: OriginChanged, OriginError, Refused, UnknownNamespace.
        """
        layout = Layout.of(manifest)
        space: Space
        reason = ""
        with watch.stage("reserve"):
            try:
                space = await self._places.reserve(key.namespace, layout.nbytes)
            except TooLarge as too_large:
                reason = str(too_large)
                space = await self._nvme.reserve(key.namespace, layout.nbytes, "pack")
        try:
            entry = await self._packs.fetch(manifest, layout, key, space, arrived=lambda _: None, watch=watch)
            if isinstance(space, NvmeSpace):
                with watch.stage("nvme_write"):
                    await self._nvme.commit(entry, space)
                return Landed(self._opened(key), made=True, reason=reason)
            assert isinstance(space, RamSpace)
            pin = self._ram.admit(entry, space)
        finally:
            space.release()  # unless it was admitted
        self._behind.write(pin)
        return Landed(pin, made=True)

    def _opened(self, key: Key) -> Payload:
        """What was just written. Raises: AllPinned."""
        try:
            return self._nvme.open_payload(key)
        except KeyError:  # another's need for room was met with it before it could be pinned
            raise AllPinned(f"series {key.series} was made, and had to go before it was read") from None

    async def keep(self, entry: Entry, payload: bytes) -> Pin:
        """A copy of what was made elsewhere, pinned; it is written behind. Raises: Refused, UnknownNamespace."""
        space = await self._places.reserve(entry.key.namespace, entry.nbytes)
        try:
            space.view[:] = payload
            pin = self._ram.admit(entry, space)
        finally:
            space.release()  # unless it was admitted
        self._behind.write(pin)
        return pin

    @contextlib.asynccontextmanager
    async def _made(
        self,
        key: Key,
        manifest: Manifest,
        recipe: Recipe,
        packs: contextlib.AbstractAsyncContextManager[Pack],
        watch: Stopwatch,
    ) -> AsyncIterator[tuple[Entry, RamSpace | NvmeSpace, str]]:
        """The tensor in space of its own, and why that is not RAM."""
        start = time.perf_counter()
        async with (
            packs as pack,
            self._places.early(key.namespace) as early,
            self._workers.derivation(
                pack.space.extent, pack.layout, recipe, early.room, stored=pack.stored
            ) as derivation,
        ):
            if not pack.stored:
                pack.fetched = await self._packs.fetch(
                    manifest, pack.layout, pack.key, pack.space, arrived=derivation.arrived, watch=watch
                )
            with watch.stage("inspect"), _by_object_key(manifest):
                plan = await derivation.plan()
                await self._descriptions.note(manifest, pack.layout, pack.space)
            ready = None if recipe.steps else early.take(plan.spec.nbytes)
            async with contextlib.AsyncExitStack() as places:
                with watch.stage("reserve"):
                    result, reason = await places.enter_async_context(
                        self._places.result(key.namespace, plan.spec.nbytes, pack, early, ready)
                    )
                    volume: Space = result
                    if recipe.steps:
                        nbytes = plan.volume.spec.nbytes
                        volume = early.take(nbytes) or await self._places.intermediate(key.namespace, nbytes)
                try:
                    watch.split(
                        await derivation.derive(
                            pack.space.extent, volume.extent, result.extent if recipe.steps else None
                        )
                    )
                except BaseException:
                    watch.lap("decode")
                    raise
                finally:
                    if recipe.steps:
                        volume.release()
                lineage = Lineage(
                    source_version=manifest.source_version,
                    objects=len(manifest.objects),
                    source_bytes=sum(source.size for source in manifest.objects),
                    recipe_name=recipe.name,
                    recipe=recipe.canonical(),
                    decoders=dict(self._workers.decoders),
                    software=f"voxcache {__version__}",
                    made_at=self._clock.now(),
                    stages=watch.stages,
                    modality=plan.modality,
                    host=self._host,
                )
                yield Entry(key, plan.spec.nbytes, plan.spec, lineage, time.perf_counter() - start), result, reason


@contextlib.contextmanager
def _by_object_key(manifest: Manifest) -> Iterator[None]:
    """Name objects that are at fault as the origin does, where a worker could only name their place in the pack."""
    try:
        yield
    except BadSource as error:
        keys = {member_name(number): source.key for number, source in enumerate(manifest.objects)}
        error.instances = tuple(keys.get(name, name) for name in error.instances)
        raise
