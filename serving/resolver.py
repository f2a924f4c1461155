"""What the doors to Triton know of the store: a reference goes in, a place in the arena comes out."""

import asyncio
from collections.abc import Sequence

import numpy as np

from cache.arena import Arena
from cache.errors import TooLarge
from cache.interfaces import Extent
from cache.keys import TensorRef
from cache.store import Bypassed, Store

from .binding import Joined, Resolved
from .config import Settings


class StoreResolver:
    """The Resolver over a store and its arena."""

    def __init__(self, store: Store, arena: Arena, settings: Settings) -> None:
        self._store = store
        self._arena = arena
        self._names = {name.lower(): name for name in (*settings.recipes, *settings.ram.namespaces)}

    async def resolve(self, ref: TensorRef) -> Resolved:
        """Raises: TooLarge for what does not fit the arena, and whatever the walk raises."""
        outcome = await self._store.get(ref)
        if isinstance(outcome, Bypassed):
            outcome.release()
            raise TooLarge(f"Triton reads from the arena only: {outcome.reason}")
        return Resolved(
            entry=outcome.entry,
            offset=outcome.pin.extent.offset,
            tier=outcome.tier,
            release=outcome.release,
        )

    async def joined(self, namespace: str, pieces: Sequence[tuple[int, int]]) -> Joined:
        """A copy of pieces of the arena (offset, length), one after another. Raises: AllPinned, TooLarge."""
        space = await self._store.scratch(namespace, sum(nbytes for _, nbytes in pieces))
        target = np.frombuffer(space.view, np.uint8)

        def copy() -> None:
            at = 0
            for offset, nbytes in pieces:
                source = np.frombuffer(self._arena.view(Extent(self._arena.path, offset, nbytes)), np.uint8)
                np.copyto(target[at : at + nbytes], source)  # NumPy lets go of the interpreter meanwhile
                at += nbytes

        copying = asyncio.create_task(asyncio.to_thread(copy))
        try:
            await asyncio.shield(copying)
        except BaseException:
            copying.add_done_callback(lambda _: space.release())  # a thread goes on when nobody waits for it
            raise
        return Joined(space.extent.offset, space.release)

    def spelled(self, name: str) -> str:
        """The recipe or namespace that a client means whose tool writes everything in lower case."""
        return self._names.get(name.lower(), name)
