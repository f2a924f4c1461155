"""Whether an entry is what its lineage says: made again of the objects in the origin, and compared byte by byte."""

import asyncio
import time
from typing import Literal

import msgspec
import numpy as np

from cache.catalog import Catalog
from cache.entry import CHUNK
from cache.errors import CorruptEntry, NotFound, VoxcacheError
from cache.interfaces import Observer
from cache.keys import Key
from cache.nvme import NvmeTier
from cache.ram import RamTier
from cache.stopwatch import Stopwatch
from cache.urgency import Priority, Urgency, working

from .fill import Filling
from .wanted import Recipes


class Verified(msgspec.Struct, frozen=True):
    """What came of it. "untold": it could not be made again, ``why`` says the reason.

    ``different``: the tiers whose bytes were other ones; it is gone from there.
    """

    key: Key
    outcome: Literal["same", "different", "untold"]
    why: str = ""
    different: tuple[str, ...] = ()
    seconds: float = 0.0


class Verifier:
    """Makes entries again, one at a time, in room that nobody else uses; nothing goes for it, and nothing is kept."""

    def __init__(
        self, *, recipes: Recipes, ram: RamTier, nvme: NvmeTier, catalog: Catalog, filling: Filling, observer: Observer
    ) -> None:
        self._recipes = recipes
        self._ram = ram
        self._nvme = nvme
        self._catalog = catalog
        self._filling = filling
        self._observer = observer
        self._turn = asyncio.Lock()

    async def verify(self, key: Key) -> Verified:
        """Make the entry again and compare. What differs is given to nobody any more. Raises: NotFound: not held."""
        start = time.perf_counter()
        entry = self._ram.lookup(key) or self._nvme.lookup(key)
        if entry is None:
            raise NotFound(f"nothing is held of series {key.series} with ETag {key.digest}")
        if key.kind != "tensor":
            return Verified(key, "untold", f"of kind {key.kind}: only tensors are made again")
        manifest = self._catalog.manifest_of(key.ref, key.source_version)
        if manifest is None:
            return Verified(key, "untold", "the catalogue does not remember its objects")
        known = self._recipes.get(entry.lineage.recipe_name)
        if known is None or known.key(key.namespace, manifest, None) != key:
            return Verified(key, "untold", "its recipe, or a decoder, is another one now")
        try:
            with working(Urgency(Priority.SPARE)):
                async with (
                    self._turn,
                    self._filling.remade(key, manifest, known.tensor, Stopwatch(self._observer)) as (made, view),
                ):
                    different = await self._compared(key, view) if made.spec == entry.spec else ("ram", "nvme")
        except VoxcacheError as error:
            return Verified(key, "untold", f"{error.code}: {error}", seconds=time.perf_counter() - start)
        for tier in different:
            _ = self._ram.condemn(key) if tier == "ram" else await self._nvme.condemn(key)
        return Verified(
            key, "different" if different else "same", different=different, seconds=time.perf_counter() - start
        )

    async def _compared(self, key: Key, made: memoryview) -> tuple[str, ...]:
        """The tiers that hold other bytes than were made."""
        different = []
        if (pin := self._ram.hold(key)) is not None:
            with pin:
                for at in range(0, made.nbytes, CHUNK):
                    if not _same(pin.view[at : at + CHUNK], made[at : at + CHUNK]):
                        different.append("ram")
                        break
                    await asyncio.sleep(0)  # the loop serves hits meanwhile
        if (payload := self._nvme.hold(key)) is not None:
            at = 0
            same = True
            try:
                async for chunk in payload.chunks():
                    same = same and _same(chunk, made[at : at + chunk.nbytes])
                    at += chunk.nbytes
            except CorruptEntry:  # it fails its own checksum, and has been set aside
                same = False
            finally:
                payload.release()
            if not same:
                different.append("nvme")
        return tuple(different)


def _same(one: memoryview, other: memoryview) -> bool:
    return bool(np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)))
