"""Writing to NVMe behind the answer: what is worth it, how much may wait, when its turn is, and when it has landed."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, Final

from cache.entry import Entry
from cache.errors import Refused, VoxcacheError
from cache.interfaces import Observer, Space
from cache.keys import Key, SeriesRef
from cache.nvme import NvmeSpace, NvmeTier
from cache.policy.admission import write_admission
from cache.ram import Pin

from .settings import StoreSettings

#: Bytes of an entry that holds up nothing while it waits to be written, and how many such may wait for one other.
_SMALL: Final = 64 << 10
_SMALL_FOR_ONE: Final = 100
#: Seconds without a fill after which there is none under way: requests that follow each other leave gaps.
_QUIET_S: Final = 0.1


class WriteBehind:
    """Entries on their way to NVMe. Each holds its RAM until it is there, or will not get there.

    A write takes memory bandwidth and a core from whatever else goes on. So it lets fills go first, unless it has been
    patient for long enough, many writes wait, or somebody waits for it or for the RAM that it holds.
    """

    def __init__(self, settings: StoreSettings, nvme: NvmeTier, observer: Observer) -> None:
        self._settings = settings
        self._admission = write_admission(settings.write_admission)
        self._nvme = nvme
        self._observer = observer
        self._tasks: dict[asyncio.Task[None], asyncio.Event] = {}  # with what lets each begin
        self._small: set[asyncio.Task[None]] = set()  # those of them that hold little RAM
        self._landing: dict[Key, asyncio.Task[None]] = {}
        self._fills = 0
        self._quiet: asyncio.TimerHandle | None = None  # set once the last fill has ended, until it is taken for quiet

    @contextlib.contextmanager
    def let_first(self) -> Iterator[None]:
        """A fill, for as long as the block lasts."""
        self._fills += 1
        if self._quiet is not None:
            self._quiet.cancel()
            self._quiet = None
        try:
            yield
        finally:
            self._fills -= 1
            if not self._fills:
                self._quiet = asyncio.get_running_loop().call_later(_QUIET_S, self._calm)

    def write(self, pin: Pin) -> None:
        """Write what was admitted to RAM, if it is worth it and few others wait. It is pinned once more until then."""
        if not self._worth_a_write(pin.entry):
            return
        small = pin.entry.nbytes <= _SMALL
        waiting = len(self._small) / _SMALL_FOR_ONE if small else len(self._tasks) - len(self._small)
        if waiting >= self._settings.write_behind:
            self._observer.count("write_behind_skipped")
            return
        mine = pin.share()
        task = self._land(mine.entry.key, self._nvme.write(mine.entry, mine.view), mine)
        if small:
            self._small.add(task)
            task.add_done_callback(self._small.discard)

    def take(self, entry: Entry, space: Space) -> None:
        """Write what is in no tier yet, if it is worth it; its space is given back then."""
        if isinstance(space, NvmeSpace):  # it has been written already
            self._land(entry.key, self._nvme.commit(entry, space), space)
        elif self._worth_a_write(entry):
            self._land(entry.key, self._nvme.write(entry, space.view), space)
        else:
            space.release()

    def keys(self) -> Iterable[Key]:
        """What is on its way."""
        return self._landing

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._tasks)

    @property
    def frees_ram(self) -> bool:
        """Whether RAM will be free soon: something holds it, and not for as long as a failing disk may take."""
        return self.busy and self._nvme.takes_writes

    def hurry(self) -> None:
        """Have all that waits begin, for the RAM that it holds."""
        for turn in self._tasks.values():
            turn.set()

    async def progress(self) -> None:
        """Return once something that is on its way has ended."""
        self.hurry()
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def landed(self, key: Key, nbytes: int) -> None:
        """Wait for the entry, of so many bytes, if it is on its way; no longer than a disk that is well takes."""
        if (landing := self._landing.get(key)) is not None:
            self._tasks[landing].set()
            await self._nvme.awaited(landing, nbytes)

    async def written(self, ref: SeriesRef) -> None:
        """Return once what was made of the series is on NVMe, where it outlives a crash, or will not get there."""
        while landing := [task for key, task in self._landing.items() if key.ref == ref]:
            for task in landing:
                self._tasks[task].set()
            await asyncio.wait(landing)

    async def close(self, grace_s: float) -> None:
        """Give what is on its way ``grace_s`` seconds, then cancel it."""
        if self._quiet is not None:
            self._quiet.cancel()
        self.hurry()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _worth_a_write(self, entry: Entry) -> bool:
        worth = self._admission.admits(entry.key, entry.nbytes)
        if not worth:
            self._observer.count("write_behind_declined")
        return worth

    def _calm(self) -> None:
        self._quiet = None
        self.hurry()

    def _land(self, key: Key, work: Coroutine[Any, Any, object], space: Space | Pin) -> asyncio.Task[None]:
        def landed(done: asyncio.Task[None]) -> None:
            del self._tasks[done]
            if self._landing.get(key) is done:
                del self._landing[key]

        turn = asyncio.Event()
        if not self._fills and self._quiet is None:
            turn.set()
        task = asyncio.create_task(self._keep(turn, work, space))
        self._landing[key] = task
        self._tasks[task] = turn
        task.add_done_callback(landed)
        if len(self._tasks) - len(self._small) > self._settings.write_behind // 2:
            self.hurry()
        return task

    async def _keep(self, turn: asyncio.Event, work: Coroutine[Any, Any, object], space: Space | Pin) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(turn.wait(), self._settings.write_behind_patience_s)
            if await work is False:  # the tier has no room, or its disk takes nothing
                raise Refused("not written")
        except VoxcacheError as error:
            self._observer.count("write_behind_failures", (error.code,))
            if isinstance(error, Refused):
                self._observer.count("admissions_refused", ("nvme", error.code))
        finally:
            work.close()  # it may never have begun
            space.release()
