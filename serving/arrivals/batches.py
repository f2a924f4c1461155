"""Puts that come while one is under way share the next, so that a burst costs few commits."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from cache.errors import Overloaded, QueueDown

from .event import Event

#: Events past which a batch is closed, so that no commit takes long.
_MOST: Final = 2000


class Put(msgspec.Struct, frozen=True):
    """Events that are accepted together or not at all, and when they were received."""

    events: Sequence[Event]
    received: float


#: Makes puts durable: for each how many of its events were new, or why it is refused. Raises: QueueDown.
Commit = Callable[[Sequence[Put]], Awaitable[Sequence[int | Overloaded]]]


class Batches:
    """Calls ``commit`` for one batch at a time."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._waiting: list[tuple[Put, asyncio.Future[int]]] = []
        self._task: asyncio.Task[None] | None = None

    async def put(self, events: Sequence[Event], received: float) -> int:
        """Commit ``events``, also if the caller gives up meanwhile. Raises: Overloaded, QueueDown."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((Put(events, received), done))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await asyncio.shield(done)

    async def close(self) -> None:
        """Wait for what is being committed."""
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while self._waiting:
            batch = self._next()
            results: Sequence[int | Overloaded | QueueDown]
            try:
                results = await self._commit([put for put, _ in batch])
            except QueueDown as error:
                results = [error] * len(batch)
            for (_, done), result in zip(batch, results, strict=True):
                if isinstance(result, int):
                    done.set_result(result)
                else:
                    done.set_exception(result)
        self._task = None

    def _next(self) -> list[tuple[Put, "asyncio.Future[int]"]]:
        size = count = 0
        for put, _ in self._waiting:
            count += 1
            size += len(put.events)
            if size >= _MOST:
                break
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch
