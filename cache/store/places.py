"""Where a fill puts its bytes: RAM, where what passes through makes way for results, and beyond it files on NVMe."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from cache.errors import AllPinned, DiskFailing, Refused, TooLarge
from cache.interfaces import Extent, Observer, Space
from cache.nvme import NvmeSpace, NvmeTier
from cache.ram import RamSpace, RamTier
from cache.urgency import current

from .behind import WriteBehind
from .warmups import WARMED_ON_NVME, WarmUps


class Movable(Protocol):
    """An intermediate that can go on from another place than where it is."""

    space: Space


class _Count(NamedTuple):
    """How an intermediate ends to be counted: as what a fill holds, and as bytes of RAM; both once at most."""

    left: Callable[[], None]
    over: Callable[[], None]


class Passing:
    """RAM for an intermediate: counted until it is released, or turns out to be no intermediate."""

    def __init__(self, space: RamSpace, count: _Count) -> None:
        self.extent = space.extent
        self.view = space.view
        self._space = space
        self._count: _Count | None = count

    def leave(self) -> None:
        """The fill has no more use for it, and something else holds it until it is released: a read that is late.

        That may take as long as a disk hangs, so nobody who needs RAM waits for it any more.
        """
        if self._count is not None:
            self._count.left()

    def keep(self) -> RamSpace:
        """The space, for what will be admitted."""
        if self._count is not None:
            self._count.over()
            self._count = None
        return self._space

    def release(self) -> None:
        if self._count is not None:
            self.keep().release()


class Early:
    """RAM for a volume whose objects are still being fetched, if it can be had at once: nobody has to wait for it."""

    def __init__(self, reserve: Callable[[int], Passing]) -> None:
        self._reserve = reserve
        self._space: Passing | None = None

    def room(self, nbytes: int) -> Extent | None:
        """Where to decode to; None: wait until all is known."""
        with contextlib.suppress(Refused):
            self._space = self._reserve(nbytes)
        return None if self._space is None else self._space.extent

    def take(self, nbytes: int) -> Passing | None:
        """The space, the caller's from now on, if it is of the size that it should be; else nobody's."""
        if self._space is not None and self._space.extent.nbytes != nbytes:
            self.release()
        space, self._space = self._space, None
        return space

    def release(self) -> bool:
        """Give the space back. True if there was one."""
        space, self._space = self._space, None
        if space is not None:
            space.release()
        return space is not None


class Places:
    """Space for fills. A fill that waits for some holds no RAM by then, so no two can wait for each other."""

    def __init__(
        self, ram: RamTier, nvme: NvmeTier, behind: WriteBehind, warm_ups: WarmUps, observer: Observer
    ) -> None:
        self._ram = ram
        self._nvme = nvme
        self._behind = behind
        self._warm_ups = warm_ups
        self._observer = observer
        self._passing: Counter[str] = Counter()  # bytes of RAM that intermediates take, by namespace
        self._unfinished: Counter[str] = Counter()  # RAM spaces that fills hold, by namespace
        self._finished = asyncio.Event()  # the next of them is given back or admitted

    @property
    def passing(self) -> int:
        """Bytes of RAM that intermediates take."""
        return self._passing.total()

    async def reserve(self, namespace: str, nbytes: int) -> RamSpace:
        """RAM, once entries that only wait to be written have been. Raises: Refused, UnknownNamespace."""
        while True:
            try:
                return self._ram_space(namespace, nbytes)
            except AllPinned:
                if not self._behind.frees_ram or current().waits_for_demand:  # a warm-up has NVMe to go to
                    raise
                await self._behind.progress()

    @contextlib.asynccontextmanager
    async def result(
        self, namespace: str, nbytes: int, pack: Movable, early: Early, ready: Passing | None
    ) -> AsyncIterator[tuple[RamSpace | NvmeSpace, str]]:
        """Space for a result: what is ``ready``, RAM, or for what RAM is too small for a file on NVMe, with the reason.

        What only passes through RAM makes way for a result: what this fill decoded early is given up, its pack moves
        to NVMe, and what other fills hold is waited for.

        Raises: Refused, UnknownNamespace.
        """
        space: RamSpace | NvmeSpace | None = None if ready is None else ready.keep()
        reason = ""
        while space is None:
            try:
                space = await self.reserve(namespace, nbytes)
            except TooLarge as too_large:
                reason = str(too_large)
                space = await self._nvme.reserve(namespace, nbytes, "tensor")
            except AllPinned:
                if early.release():
                    continue
                if current().waits_for_demand:
                    reason = WARMED_ON_NVME
                    space = await self._nvme.reserve(namespace, nbytes, "tensor")
                    break
                if isinstance(pack.space, Passing):
                    await self._move_out(namespace, pack)
                elif self._unfinished[namespace]:
                    await self._finished.wait()
                else:
                    raise
        self._unfinished[namespace] += 1
        try:
            yield space, reason
        finally:
            space.release()
            self._finish(namespace)

    async def intermediate(self, namespace: str, nbytes: int) -> Space:
        """Space for an intermediate: RAM while intermediates take less than half of the share, else a file on NVMe.

        Without that bound the packs of a few fills could take all of RAM, and none of them could place its result.

        Raises: Refused, UnknownNamespace.
        """
        if self._may_pass(namespace, nbytes):
            with contextlib.suppress(AllPinned):
                return await self._pass(namespace, nbytes)
        try:
            return await self._nvme.reserve(namespace, nbytes, "pack")
        except (TooLarge, AllPinned, DiskFailing) as refusal:
            try:
                return await self._pass(namespace, nbytes)
            except TooLarge:  # for RAM; whether it is too large for NVMe, or comes at a bad time, NVMe has said
                raise refusal from None

    @contextlib.asynccontextmanager
    async def early(self, namespace: str) -> AsyncIterator[Early]:
        """Whoever decodes early may ask it for room; what nobody has taken by the end is given back."""

        def reserve(nbytes: int) -> Passing:
            if not self._may_pass(namespace, nbytes):
                raise AllPinned("intermediates have their part of RAM already")
            with self._counted(namespace, nbytes) as count:
                return Passing(self._ram_space(namespace, nbytes), count)

        early = Early(reserve)
        try:
            yield early
        finally:
            early.release()

    async def scratch(self, namespace: str, nbytes: int) -> Space:
        """RAM for bytes that are put together for one use: an intermediate until it is released, and bounded as those.

        Raises: AllPinned, TooLarge, UnknownNamespace.
        """
        budget = self._ram.usage(namespace).budget
        if nbytes * 2 > budget:
            raise TooLarge(f"{nbytes} bytes for one use are more than half of what namespace {namespace!r} has of RAM")
        if (self._passing[namespace] + nbytes) * 2 > budget:
            raise AllPinned(f"intermediates take half of namespace {namespace!r} already")
        return await self._pass(namespace, nbytes)

    async def _move_out(self, namespace: str, movable: Movable) -> None:
        """Let it go on from a file on NVMe, and give its RAM back. Raises: Refused."""
        before = movable.space
        after = await self._nvme.reserve(namespace, before.extent.nbytes, "pack")
        try:
            # NumPy lets go of the interpreter while it copies; a slice of a memoryview would not
            source, target = (np.frombuffer(view, np.uint8) for view in (before.view, after.view))
            await asyncio.to_thread(np.copyto, target, source)
        except BaseException:
            after.release()
            raise
        movable.space = after
        before.release()

    def _finish(self, namespace: str) -> None:
        """A fill holds something no more."""
        self._unfinished[namespace] -= 1
        self._wake()

    def _wake(self) -> None:
        """Wake who waits for RAM that another fill held."""
        self._finished.set()
        self._finished = asyncio.Event()

    def _may_pass(self, namespace: str, nbytes: int) -> bool:
        return (self._passing[namespace] + nbytes) * 2 <= self._ram.usage(namespace).budget

    async def _pass(self, namespace: str, nbytes: int) -> Space:
        # counted while it still waits for its bytes: others that decide meanwhile must know of it
        with self._counted(namespace, nbytes) as count:
            return Passing(await self.reserve(namespace, nbytes), count)

    @contextlib.contextmanager
    def _counted(self, namespace: str, nbytes: int) -> Iterator[_Count]:
        """Count the bytes as passing through RAM until what this gives says otherwise; no more if this raises."""
        held = True

        def left() -> None:
            nonlocal held
            if held:
                held = False
                self._finish(namespace)

        def over() -> None:
            self._passing[namespace] -= nbytes
            left()
            self._wake()

        self._passing[namespace] += nbytes
        self._unfinished[namespace] += 1
        if self._passing[namespace] * 8 > self._ram.usage(namespace).budget * 3:
            self._behind.hurry()  # packs that wait to be written are intermediates, too, and may take half at most
        try:
            yield _Count(left, over)
        except BaseException:
            over()
            raise

    def _ram_space(self, namespace: str, nbytes: int) -> RamSpace:
        """RAM that can be had at once; for a warm-up, within its share. Raises: Refused, UnknownNamespace."""
        try:
            self._warm_ups.check(namespace, nbytes)
            return self._ram.reserve(namespace, nbytes)
        except Refused as refusal:
            self._observer.count("admissions_refused", ("ram", refusal.code))
            raise
