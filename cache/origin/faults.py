"""An origin that fails on purpose, for tests and load tests: what it does follows from a seed, not from timing."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from cache.errors import OriginChanged, OriginDenied, OriginDown
from cache.faults import fate
from cache.interfaces import Origin
from cache.keys import SourceObject

Method = Literal["list", "read", "fetch"]
Fault = Literal["down", "denied", "changed", "truncated", "flipped", "stall"]

_FAULTS: Final[tuple[Fault, ...]] = ("down", "denied", "changed", "truncated", "flipped", "stall")


class FaultPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often what goes wrong. Shares are probabilities of a call, at most 1 in sum.

    down, denied: the call raises OriginDown or OriginDenied.
    changed: a fetch raises OriginChanged; other calls go well.
    truncated: a fetch writes half of the bytes, then raises OriginDown; other calls raise OriginDown.
    flipped: a fetch brings one wrong bit, and says nothing of it; other calls go well.
    stall: the call waits until ``resume()``, then goes well.
    delay_s: seconds that every call takes longer.
    methods: which calls are touched at all.
    times: after so many faults for one key a call for it goes well; None: no such mercy.
    """

    down: float = 0.0
    denied: float = 0.0
    changed: float = 0.0
    truncated: float = 0.0
    flipped: float = 0.0
    stall: float = 0.0
    delay_s: float = 0.0
    methods: tuple[Method, ...] = ("list", "read", "fetch")
    times: int | None = None


class FaultyOrigin:
    """``inner``, with faults; implements ``Origin``.

    The n-th call of a method for a key meets the same fate in every run with the same seed, in whatever order calls
    are made. ``plan`` may be replaced at any time. ``calls`` counts (method, key or prefix), failed calls included.
    """

    def __init__(self, inner: Origin, plan: FaultPlan | None = None, seed: int = 0) -> None:
        self.name = inner.name
        self.plan = plan or FaultPlan()
        self.calls: Counter[tuple[Method, str]] = Counter()
        self._inner = inner
        self._seed = seed
        self._faults: Counter[tuple[Method, str]] = Counter()
        self._resumed = asyncio.Event()
        self._stalled = 0
        self._stalls = asyncio.Condition()

    def count(self, method: Method) -> int:
        """How often ``method`` was called."""
        return sum(n for (called, _), n in self.calls.items() if called == method)

    def resume(self) -> None:
        """Let all calls that stall go on."""
        self._resumed.set()
        self._resumed = asyncio.Event()

    async def until_stalled(self, calls: int = 1) -> None:
        """Return once so many calls have stalled since the start."""
        async with self._stalls:
            await self._stalls.wait_for(lambda: self._stalled >= calls)

    async def list(self, prefix: str) -> Sequence[SourceObject]:
        await self._suffer("list", prefix)
        return await self._inner.list(prefix)

    async def dated(self, prefix: str) -> Sequence[tuple[SourceObject, float]]:
        await self._suffer("list", prefix)
        return await self._inner.dated(prefix)

    async def read(self, key: str, limit: int | None = None) -> bytes | None:
        await self._suffer("read", key)
        return await self._inner.read(key, limit)

    async def fetch(self, source: SourceObject, into: memoryview) -> None:
        fault = await self._suffer("fetch", source.key)
        if fault == "changed":
            raise OriginChanged(f"{source.key!r}: changed, as planned")
        if fault == "truncated":
            whole = bytearray(source.size)
            await self._inner.fetch(source, memoryview(whole))
            half = source.size // 2
            into[:half] = whole[:half]
            raise OriginDown(f"{source.key!r}: ended early, as planned")
        await self._inner.fetch(source, into)
        if fault == "flipped" and source.size:
            into[source.size // 2] ^= 0x10

    async def close(self) -> None:
        await self._inner.close()

    async def _suffer(self, method: Method, key: str) -> Fault | None:
        self.calls[method, key] += 1
        if method not in self.plan.methods:
            return None
        if self.plan.delay_s:
            await asyncio.sleep(self.plan.delay_s)
        fault = self._draw(method, key)
        if fault is None:
            return None
        self._faults[method, key] += 1
        if fault == "denied":
            raise OriginDenied(f"{method} {key!r}: denied, as planned")
        if fault == "down" or (fault == "truncated" and method != "fetch"):
            raise OriginDown(f"{method} {key!r}: down, as planned")
        if fault == "stall":
            await self._stall()
        return fault

    def _draw(self, method: Method, key: str) -> Fault | None:
        if self.plan.times is not None and self._faults[method, key] >= self.plan.times:
            return None
        shares = {fault: getattr(self.plan, fault) for fault in _FAULTS}
        return fate(shares, self._seed, method, key, self.calls[method, key])

    async def _stall(self) -> None:
        resumed = self._resumed
        async with self._stalls:
            self._stalled += 1
            self._stalls.notify_all()
        await resumed.wait()
