"""From references to inputs that lie in the arena, pinned until Triton is done with them: the same for both doors."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import msgspec

from cache.entry import Entry
from cache.errors import BadRequest
from cache.keys import TensorRef
from cache.stopwatch import Stopwatch, current, timing

from .references import Asked, Given, Reference, batched, named
from .triton import Bound, ModelMetadata, Triton


class Resolved(msgspec.Struct, frozen=True):
    """A tensor that lies pinned at ``offset`` of the arena until ``release`` is called; ``tier`` had it."""

    entry: Entry
    offset: int
    tier: str
    release: Callable[[], None]


class Joined(msgspec.Struct, frozen=True):
    """Bytes that were put together at ``offset`` of the arena, until ``release`` is called."""

    offset: int
    release: Callable[[], None]


class Resolver(Protocol):
    """What the doors know of the store."""

    async def resolve(self, ref: TensorRef) -> Resolved:
        """The tensor, pinned in the arena. Raises: what the walk raises."""

    async def joined(self, namespace: str, pieces: Sequence[tuple[int, int]]) -> Joined:
        """A copy of pieces of the arena (offset, length), one after another. Raises: AllPinned, TooLarge."""

    def spelled(self, name: str) -> str:
        """The recipe or namespace that a client means whose tool writes everything in lower case."""


class Binding(msgspec.Struct, frozen=True):
    """A request's tensors by input, pinned until ``release``, and which tier had them."""

    bound: dict[str, Bound]
    release: Callable[[], None]
    tier: str
    entries: tuple[Entry, ...]


class Binder:
    """Finds out what requests name, and has it in the arena."""

    def __init__(self, triton: Triton, resolver: Resolver) -> None:
        self._triton = triton
        self._resolver = resolver

    def asked(
        self, metadata: ModelMetadata, given: Sequence[Given], parameters: Mapping[str, object], *, by_ref: bool
    ) -> Asked:
        """See ``references.named``."""
        virtual = self._triton.settings.virtual(metadata.name)
        return named(metadata, virtual, given, parameters, by_ref=by_ref, spelled=self._resolver.spelled)

    async def bind(self, metadata: ModelMetadata, references: Mapping[str, Sequence[Reference]]) -> Binding:
        """Have all that is named in the arena. What a request names several times is found once.

        Raises:
            BadRequest: it does not fit the model. And whatever the walk raises.
        """
        if len(references) == 1:
            [(name, refs)] = references.items()
            if len(refs) == 1 and any(each.name == name for each in metadata.inputs):
                return await self._bind_one(name, refs[0])
        wanted = {each.name: each for each in metadata.inputs}
        for name in references:
            if name not in wanted:
                raise BadRequest(f"{metadata.name!r} has no input {name!r}")
        with ExitStack() as pins:
            found = await self._resolved({ref.want for refs in references.values() for ref in refs}, pins)
            bound = {}
            for name, refs in references.items():
                parts = []
                for ref in refs:
                    at = found[ref.want]
                    assert at.entry.spec is not None  # only packs have none, and no reference means a pack
                    spec, skipped = ref.within(at.entry.spec)
                    parts.append(Bound(spec, at.offset + skipped))
                if len(parts) > 1:
                    spec = batched(parts, wanted[name])
                    parts = [Bound(spec, await self._in_one_piece(refs[0].want.namespace, parts, pins))]
                bound[name] = parts[0]
            tier = _slowest(at.tier for at in found.values())
            return Binding(bound, pins.pop_all().close, tier, tuple(at.entry for at in found.values()))

    async def _bind_one(self, name: str, ref: Reference) -> Binding:
        """The same for one tensor, which is what nearly all requests name."""
        at = await self._resolver.resolve(ref.want)
        try:
            assert at.entry.spec is not None  # only packs have none, and no reference means a pack
            spec, skipped = ref.within(at.entry.spec)
        except BaseException:
            at.release()
            raise
        return Binding({name: Bound(spec, at.offset + skipped)}, at.release, at.tier, (at.entry,))

    async def _resolved(self, wants: set[TensorRef], pins: ExitStack) -> dict[TensorRef, Resolved]:
        """Every tensor that is wanted, found side by side. Those found are released even if others cannot be."""

        async def resolve(want: TensorRef) -> Resolved:
            resolved = await self._resolver.resolve(want)
            pins.callback(resolved.release)
            return resolved

        async def beside(want: TensorRef) -> tuple[Resolved, Stopwatch]:
            its = watch.beside()
            timing(its)
            return await resolve(want), its

        if len(wants) == 1:  # no task for it: a hit takes less time than a task does
            [want] = wants
            return {want: await resolve(want)}
        ordered = list(wants)
        watch = current()
        tasks = [asyncio.create_task(beside(want)) for want in ordered]
        try:
            found = await asyncio.gather(*tasks)
            # they went on at the same time: the one that took longest is what the request waited for
            watch.join(max((its for _, its in found), key=lambda its: its.seconds))
            return {want: resolved for want, (resolved, _) in zip(ordered, found, strict=True)}
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _in_one_piece(self, namespace: str, parts: Sequence[Bound], pins: ExitStack) -> int:
        """Where the parts lie one after another: where they are, if they do so already, else in a copy."""
        pieces = [(part.offset, part.spec.nbytes) for part in parts]
        if all(at + nbytes == after for (at, nbytes), (after, _) in itertools.pairwise(pieces)):
            return pieces[0][0]
        joined = await self._resolver.joined(namespace, pieces)
        pins.callback(joined.release)
        return joined.offset


_TIERS = ("ram", "nvme", "origin")


def _slowest(tiers: Iterable[str]) -> str:
    return max(tiers, key=lambda tier: _TIERS.index(tier) if tier in _TIERS else len(_TIERS))
