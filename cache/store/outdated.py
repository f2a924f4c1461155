"""Versions of series that another has replaced: they go from both tiers once nobody holds or makes them."""

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import Final

from cache.catalog import Catalog
from cache.interfaces import Tier
from cache.keys import PACK_FORM, Key, SeriesRef

#: Seconds between two looks at whether outdated entries are held still.
_LOOK_S: Final = 1.0

#: Entries that are gone through before others have a turn.
_AT_ONCE: Final = 200


class Outdated:
    """What is to go from the tiers. ``under_way`` tells which entries are being made or written."""

    def __init__(self, tiers: tuple[Tier, ...], catalog: Catalog, under_way: Callable[[], Iterable[Key]]) -> None:
        self._tiers = tiers
        self._catalog = catalog
        self._under_way = under_way
        self._keys: set[Key] = set()
        self._dropping: asyncio.Task[None] | None = None

    def drop_versions(self, ref: SeriesRef, keep: str | None) -> None:
        """Drop other versions of the series than ``keep``: at once, or as soon as nobody holds or makes them."""
        there = itertools.chain.from_iterable(tier.keys() for tier in self._tiers)
        held = {key for key in there if key.ref == ref and key.source_version != keep}
        made = {key for key in self._under_way() if key.ref == ref and key.source_version != keep}
        packs = {Key(key.namespace, "pack", key.study, key.series, key.source_version, PACK_FORM) for key in made}
        self._drop_in_time(held | made | packs)

    async def drop_all(self) -> None:
        """Drop what a series has had another version since, and an end of the daemon has kept from going."""
        for tier in self._tiers:
            for number, key in enumerate(list(tier.keys())):
                current = self._catalog.recorded(key.ref)
                if current is not None and current.manifest.source_version != key.source_version:
                    self._drop_in_time([key])
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)

    @property
    def keys(self) -> frozenset[Key]:
        """What is to go, and is still held or made."""
        return frozenset(self._keys)

    async def close(self) -> None:
        """Look no more; what is left goes after the next start."""
        if self._dropping is not None:
            self._dropping.cancel()
            await asyncio.gather(self._dropping, return_exceptions=True)

    def _drop_in_time(self, keys: Iterable[Key]) -> None:
        self._keys.update(keys)
        self._drop_free()
        if self._keys and self._dropping is None:
            self._dropping = asyncio.create_task(self._drop_later())

    async def _drop_later(self) -> None:
        while self._keys:
            await asyncio.sleep(_LOOK_S)
            self._drop_free()
        self._dropping = None

    def _drop_free(self) -> None:
        """Drop what nobody holds of what is outdated."""
        made = {(key.ref, key.source_version) for key in self._under_way()}
        for key in list(self._keys):
            current = self._catalog.recorded(key.ref)
            if current is not None and current.manifest.source_version == key.source_version:  # it is so again
                self._keys.discard(key)
                continue
            tiers = [tier for tier in self._tiers if tier.lookup(key) is not None]
            # no short cut: what is held in one tier is to go from the other
            held = [tier for tier in tiers if not tier.evict(key)]
            if not held and (key.ref, key.source_version) not in made:
                self._keys.discard(key)
