"""Reads of payloads: a few at a time, each under a deadline, and left behind past it with the thread it holds."""

import asyncio
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

from cache.entry import CHUNK, checksum
from cache.errors import CorruptEntry, DiskFailing
from cache.interfaces import Clock

from .disk import Disk, opened
from .watch import Watch

#: Threads that reads which were left behind may hold; past that the disk is left alone until some come back.
MOST_STUCK: Final = 16


class Job(NamedTuple):
    """What to read: consecutive chunks, by number with their checksums, of the payload at ``offset`` of ``path``.

    ``used_at`` (Unix seconds) becomes the file's access time, so that the order of use outlives a restart.
    """

    path: Path
    offset: int
    sums: Mapping[int, str]
    used_at: float


class Reading:
    """One read under way: its threads take chunks from ``todo``; ``since`` tells when each began its present one."""

    def __init__(self, job: Job, out: memoryview, lanes: int) -> None:
        self.job = job
        self.out = out
        self.todo: Iterator[int] = iter(job.sums)
        self.since = [math.inf] * lanes
        self.struck = -math.inf  # when it last struck
        self.turns: set[int] = set()  # lanes that hold one of the disk's turns
        self.left = False  # behind: nobody waits for it, and it ends after what it is at
        self.task: asyncio.Task[list[BaseException | None]]

    def when_over(self, call: Callable[[], None]) -> None:
        """Have ``call`` called once neither memory nor file are touched any more: at once, if that is so."""
        if self.task.done():
            call()
        else:
            self.task.add_done_callback(lambda _: call())


class Reads:
    """``depth`` chunks are asked of the disk at a time, over all reads."""

    def __init__(self, disk: Disk, depth: int, watch: Watch, clock: Clock) -> None:
        self._disk = disk
        self._depth = depth
        self._watch = watch
        self._clock = clock
        self._turns = asyncio.Semaphore(depth)
        self._threads = ThreadPoolExecutor(2 * depth + MOST_STUCK, "voxcache-nvme-read")
        self._reading: set[asyncio.Task[list[BaseException | None]]] = set()
        self._stuck = 0

    async def until_idle(self) -> None:
        """Return once nothing is being read."""
        while self._reading:
            await asyncio.wait(self._reading)

    @property
    def admits(self) -> bool:
        """Whether a read that may be left behind should begin at all."""
        return self._watch.admits and self._stuck < MOST_STUCK

    def start(self, job: Job, out: memoryview) -> Reading:
        """Begin to read ``job`` to ``out``."""
        reading = Reading(job, out, max(1, min(self._depth, len(job.sums))))
        reading.task = asyncio.create_task(self._all(reading))
        self._reading.add(reading.task)
        reading.task.add_done_callback(self._reading.discard)
        return reading

    async def outcome(self, reading: Reading, *, may_leave: bool) -> list[BaseException]:
        """Wait for ``reading``; what went wrong in its lanes.

        ``may_leave``: one that is late, or whose caller is cancelled, is left behind. Otherwise this neither returns
        nor raises before its end.

        Raises: DiskFailing.
        """
        try:
            while not await self._watch.in_time(reading.task, lambda: self._patience(reading, may_leave)):
                if min(reading.since) < math.inf:
                    self._watch.bad()
                if may_leave:
                    raise DiskFailing(f"a read took longer than {self._watch.deadline_s} s")
                reading.struck = self._clock.monotonic()  # nothing can take its place: it strikes at each deadline
        except BaseException:
            self._leave(reading)
            if not may_leave:
                await _ended(reading.task)
            raise
        return [outcome for outcome in reading.task.result() if outcome is not None]

    async def close(self) -> None:
        """Wait for all reads, those that were left behind included."""
        await self.until_idle()
        await asyncio.to_thread(self._threads.shutdown)

    def _patience(self, reading: Reading, may_leave: bool) -> float:
        since = min(reading.since)
        if since == math.inf:  # it waits for its turn, which comes unless the disk is left alone meanwhile
            return math.inf if self._watch.admits or not may_leave else 0.0
        return self._watch.left(max(since, reading.struck), self._watch.deadline_s)

    async def _all(self, reading: Reading) -> list[BaseException | None]:
        runs = (self._lane(reading, lane) for lane in range(len(reading.since)))
        return list(await asyncio.gather(*runs, return_exceptions=True))

    async def _lane(self, reading: Reading, lane: int) -> None:
        await self._turns.acquire()
        if reading.left:
            self._turns.release()
            return
        reading.turns.add(lane)
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._work, reading, lane)
        finally:
            if lane in reading.turns:
                self._return(reading, lane)
            else:
                self._stuck -= 1

    def _leave(self, reading: Reading) -> None:
        """Let others have the turns of a read that nobody waits for; its threads come back when the disk lets them."""
        reading.left = True
        for lane in list(reading.turns):
            self._return(reading, lane)
            self._stuck += 1

    def _return(self, reading: Reading, lane: int) -> None:
        reading.turns.discard(lane)
        self._turns.release()

    def _work(self, reading: Reading, lane: int) -> None:
        """In a thread. Raises: OSError, EOFError, CorruptEntry."""
        job = reading.job
        reading.since[lane] = self._clock.monotonic()
        first = next(iter(job.sums), 0)
        fd = opened(job.path)
        try:
            for chunk in reading.todo:
                if reading.left:
                    return
                reading.since[lane] = self._clock.monotonic()
                at = (chunk - first) * CHUNK
                read_chunk(self._disk, fd, job, chunk, reading.out[at : at + CHUNK])
            # where it cannot be kept, the order of writing does
            with contextlib.suppress(OSError):
                os.utime(fd, ns=(int(job.used_at * 1e9), os.fstat(fd).st_mtime_ns))
        finally:
            reading.since[lane] = math.inf
            os.close(fd)


def read_chunk(disk: Disk, fd: int, job: Job, chunk: int, out: memoryview) -> None:
    """One verified chunk. Raises: OSError, EOFError, CorruptEntry."""
    disk.read(fd, out, job.offset + chunk * CHUNK)
    if checksum(out) != job.sums[chunk]:
        raise CorruptEntry(f"chunk {chunk} fails its checksum")


async def _ended(reading: asyncio.Task[Any]) -> None:
    """Wait for ``reading`` through any number of cancellations."""
    while not reading.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([reading])
