"""A disk that fails on purpose, for tests and staging: what it does follows from a seed, not from timing."""

import errno
import os
import threading
import time
from collections import Counter
from typing import Final, Literal

import msgspec

from cache.faults import fate

from .disk import Disk

Method = Literal["read", "write", "allocate", "sync"]
Fault = Literal["error", "full", "short", "flipped", "hang"]

_FAULTS: Final[tuple[Fault, ...]] = ("error", "full", "short", "flipped", "hang")


class DiskFaultPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often what goes wrong. Shares are probabilities of a call, at most 1 in sum.

    error: the call fails with EIO.
    full: a write or an allocation fails with ENOSPC; other calls go well.
    short: a read ends early; other calls fail with EIO.
    flipped: a read brings one wrong bit, a write leaves one; other calls go well.
    hang: the call waits until ``resume()``, then goes well.
    delay_s: seconds that every call takes longer.
    methods: which calls are touched at all.
    times: after so many calls that were touched, all go well; None: no such mercy.
    """

    error: float = 0.0
    full: float = 0.0
    short: float = 0.0
    flipped: float = 0.0
    hang: float = 0.0
    delay_s: float = 0.0
    methods: tuple[Method, ...] = ("read", "write", "allocate", "sync")
    times: int | None = None


class FaultyDisk(Disk):
    """A ``Disk`` with faults. The n-th call of a method meets the same fate in every run with the same seed.

    ``plan`` may be replaced at any time. ``calls`` counts by method, ``hanging`` those that hung.
    """

    def __init__(self, plan: DiskFaultPlan | None = None, seed: int = 0, *, direct: bool = True) -> None:
        super().__init__(direct=direct)
        self.plan = plan or DiskFaultPlan()
        self.calls: Counter[Method] = Counter()
        self._seed = seed
        self._touched = 0
        self.hanging = 0
        self._changed = threading.Condition()
        self._resumed = 0

    def read(self, fd: int, out: memoryview, offset: int) -> None:
        fault = self._suffer("read")
        if fault == "short":
            super().read(fd, out[: len(out) // 2], offset)
            raise EOFError("the file ends early, as planned")
        super().read(fd, out, offset)
        if fault == "flipped" and out:
            out[len(out) // 2] ^= 0x10

    def write(self, fd: int, data: memoryview, offset: int) -> None:
        fault = self._suffer("write")
        super().write(fd, data, offset)
        if fault == "flipped" and data:
            middle = len(data) // 2
            os.pwrite(fd, bytes([data[middle] ^ 0x10]), offset + middle)

    def allocate(self, fd: int, nbytes: int) -> None:
        self._suffer("allocate")
        super().allocate(fd, nbytes)

    def sync(self, fd: int) -> None:
        self._suffer("sync")
        super().sync(fd)

    def resume(self) -> None:
        """Let all calls go on that hang, or are about to because of a plan that has been replaced."""
        with self._changed:
            self._resumed += 1
            self._changed.notify_all()

    def until_hanging(self, calls: int = 1) -> None:
        """Return once so many calls have hung since the start. It blocks: from a thread only."""
        with self._changed:
            self._changed.wait_for(lambda: self.hanging >= calls)

    def _suffer(self, method: Method) -> Fault | None:
        with self._changed:
            plan, resumed = self.plan, self._resumed
            self.calls[method] += 1
            number = self.calls[method]
            if method not in plan.methods or (plan.times is not None and self._touched >= plan.times):
                return None
            self._touched += 1
        if plan.delay_s:
            time.sleep(plan.delay_s)  # in a thread of the disk, which is to be as late as a slow disk would make it
        fault = fate({fault: getattr(plan, fault) for fault in _FAULTS}, self._seed, method, number)
        if fault == "error" or (fault == "short" and method != "read"):
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}, as planned")
        if fault == "full" and method in {"write", "allocate"}:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, as planned")
        if fault == "hang":
            with self._changed:
                self.hanging += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._resumed > resumed)
        return fault
