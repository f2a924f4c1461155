"""One piece of work over many items, a bounded number at a time, ending as one: all results or one bare error."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from cache.errors import VoxcacheError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


async def each(work: Callable[[_Item], Awaitable[_Result]], items: Iterable[_Item], width: int) -> list[_Result]:
    """The results of ``work`` in the items' order, at most ``width`` at a time.

    The first failure cancels the rest; when this returns or raises, nothing of it runs any more.

    Raises:
        VoxcacheError: the first that ``work`` raised, not wrapped in a group: callers match on its type.
    """
    results: dict[int, _Result] = {}
    left = enumerate(items)

    async def lane() -> None:
        for number, item in left:
            results[number] = await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(width):
                group.create_task(lane())
    except* VoxcacheError as failed:
        first = failed.exceptions[0]
    else:
        return [results[number] for number in sorted(results)]
    raise first
