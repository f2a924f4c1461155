"""What models made of tensors, and who those models are."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection
from typing import Final

import msgspec

from cache.arena import aligned
from cache.entry import Entry, Lineage, ModelIdentity
from cache.errors import BadRequest, CorruptEntry, TooLarge, UnknownModel
from cache.interfaces import Clock, Encoder, Tier, Usage
from cache.keys import Key
from cache.nvme import NvmeTier
from cache.ram import RamTier
from cache.recipe.chain import Infer
from cache.stopwatch import Stopwatch

from .fill import Filling
from .outcome import Bypassed, Landed, Outcome
from .wanted import Recipes, Wanted

#: Entries that are gone through before others have a turn.
_AT_ONCE: Final = 200

#: The part of RAM, and of a namespace's, that is left free by what is put there unasked: one in so many.
_SPARE: Final = 10


class Embeddings:
    """The entries that recipes make which end in a model."""

    def __init__(
        self, *, recipes: Recipes, encoder: Encoder, ram: RamTier, nvme: NvmeTier, filling: Filling, clock: Clock
    ) -> None:
        self._recipes = recipes
        self._encoder = encoder
        self._ram = ram
        self._nvme = nvme
        self._filling = filling
        self._clock = clock

    async def encode(self, wanted: Wanted, model: ModelIdentity, tensor: Outcome, watch: Stopwatch) -> Landed:
        """Run the model on the tensor, which is released.

        Raises: BadRequest, ModelChanged, TritonError, Refused, UnknownNamespace.
        """
        recipe = wanted.known.recipe
        assert recipe.infer is not None  # or there would be no model
        source = tensor.entry
        assert source.spec is not None  # only packs have none
        if isinstance(tensor, Bypassed):
            tensor.release()
            raise TooLarge(f"models are given what is in the arena only: {tensor.reason}")
        start = time.perf_counter()
        with watch.stage("triton"):
            made = await self._encoder.encode(recipe.infer, model, source.spec, tensor.pin.extent, tensor.release)
        seconds = time.perf_counter() - start
        lineage = msgspec.structs.replace(
            source.lineage,
            recipe_name=recipe.name,
            recipe=recipe.canonical(),
            made_at=self._clock.now(),
            stages=watch.stages,
            model=model,
        )
        entry = Entry(wanted.key, made.spec.nbytes, made.spec, lineage, source.cost_s + seconds)
        return Landed(await self._filling.keep(entry, made.data), made=True)

    async def model(self, name: str, version: str = "") -> ModelIdentity:
        """The model of that name that recipes end in.

        Raises:
            UnknownModel: none does, or not in that version.
            BadRequest: they end in several versions of it, and none is named.
            TritonError: it is not known who it is, and nobody says.
        """
        asked = {infer for _, infer in self._recipes.encoding()}
        found = {
            self._encoder.known(infer) or await self._encoder.identify(infer) for infer in asked if infer.model == name
        }
        matching = [model for model in found if version in ("", model.version)]
        if not matching:
            raise UnknownModel(f"no recipe ends in model {name!r}" + (f" version {version}" if version else ""))
        if len(matching) > 1:
            versions = ", ".join(sorted(model.version for model in matching))
            raise BadRequest(f"recipes end in versions {versions} of model {name!r}: name one")
        return matching[0]

    async def held(self, model: ModelIdentity, namespace: str) -> AsyncIterator[list[tuple[Entry, bytes]]]:
        """A copy of every embedding by ``model`` in either tier, some at a time, with turns for others in between.

        To be looked at is no use of an entry. What lies on NVMe alone is put into RAM where that has room to spare.

        Raises: UnknownNamespace.
        """
        digests = {
            each.digest(model) for each, infer in self._recipes.encoding() if self._encoder.known(infer) == model
        }

        def wanted(key: Key) -> bool:
            return key.kind == "embedding" and key.namespace == namespace and key.recipe in digests

        mine = self._ram.usage(namespace)
        seen: set[Key] = set()
        in_ram = self._ram.keys()
        for at in range(0, len(in_ram), _AT_ONCE):
            found = [held for key in in_ram[at : at + _AT_ONCE] if wanted(key) and (held := self._ram.peek(key))]
            seen.update(entry.key for entry, _ in found)
            yield [(entry, bytes(view)) for entry, view in found]
            await asyncio.sleep(0)
        spare = _spare(mine)
        on_nvme = self._nvme.keys()
        for at in range(0, len(on_nvme), _AT_ONCE):
            keys = [key for key in on_nvme[at : at + _AT_ONCE] if key not in seen and wanted(key)]
            read = [held for held in await asyncio.gather(*map(self._read, keys)) if held is not None]
            yield read
            for entry, payload in read:
                if aligned(entry.nbytes) <= min(spare, _spare(self._ram.usage())):
                    spare -= aligned(entry.nbytes)
                    await self._ram.write(entry, memoryview(payload))
            await asyncio.sleep(0)

    def last_models(self) -> dict[Infer, ModelIdentity]:
        """Who the models of the recipes were when the newest of their embeddings that are held were made."""
        asked = {each.recipe.canonical(): infer for each, infer in self._recipes.encoding()}
        newest: dict[Infer, Lineage] = {}
        for key in self._nvme.keys() if asked else ():
            entry = self._nvme.lookup(key) if key.kind == "embedding" else None
            infer = asked.get(entry.lineage.recipe) if entry is not None else None
            if entry is not None and infer is not None:
                before = newest.setdefault(infer, entry.lineage)
                newest[infer] = max(before, entry.lineage, key=lambda lineage: lineage.made_at)
        return {infer: lineage.model for infer, lineage in newest.items() if lineage.model is not None}

    async def drop_made_by(self, models: Collection[ModelIdentity]) -> None:
        """Drop what nobody holds of what these models made: they are not served any more."""
        tiers: tuple[Tier, ...] = (self._ram, self._nvme)
        for tier in tiers:
            for number, key in enumerate(tier.keys()):
                entry = tier.lookup(key) if key.kind in ("embedding", "result") else None
                if entry is not None and entry.lineage.model in models:
                    tier.evict(key)
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)

    async def _read(self, key: Key) -> tuple[Entry, bytes] | None:
        """From NVMe; None if it is gone by now, or good for nothing: it is made again when it is asked for."""
        entry = self._nvme.lookup(key)
        if entry is None:
            return None
        payload = bytearray(entry.nbytes)
        with contextlib.suppress(CorruptEntry, KeyError):
            await self._nvme.read_into(key, memoryview(payload))
            return entry, bytes(payload)
        return None


def _spare(usage: Usage) -> int:
    """Bytes that may be taken unasked."""
    return usage.budget - usage.budget // _SPARE - usage.used
