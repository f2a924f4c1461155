"""One side of the disk under watch: deadlines that pass strike against its health, and probes go on where it is bad."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from cache.interfaces import Clock

from .health import Health, HealthSettings, State

#: Hears a side ("read" or "write") and its new state.
Told = Callable[[str, State], None]


class Watch:
    """The health of the disk's reads, or of its writes. ``probe`` tries one, in a thread; it raises OSError."""

    def __init__(
        self, side: str, settings: HealthSettings, clock: Clock, probe: Callable[[], None], told: Told | None
    ) -> None:
        self.deadline_s: Final = settings.deadline_s
        self._side = side
        self._clock = clock
        self._health = Health(settings)
        self._probe = probe
        self._told = told
        # a thread of its own: those that move payloads may all be stuck
        self._thread = ThreadPoolExecutor(1, f"voxcache-nvme-probe-{side}")
        self._probing: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        return self._health.state

    @property
    def admits(self) -> bool:
        """Whether requests may use this side of the disk."""
        return self._health.admits

    def good(self) -> None:
        """One came in time."""
        before = self.state
        self._health.good()
        self._tell(before)

    def bad(self) -> None:
        """One was late, or failed."""
        before = self.state
        self._health.bad(self._clock.monotonic())
        self._tell(before)
        if not self.admits and self._probing is None:
            self._probing = asyncio.create_task(self._until_admitted())

    async def in_time(self, work: "asyncio.Future[Any]", patience: Callable[[], float]) -> bool:
        """Wait for ``work``; False as soon as ``patience``, the seconds it may still take, is used up."""
        while not work.done():
            left = patience()
            if left <= 0:
                return False
            # a deadline may have moved by then, and a clock that is not the machine's does not wake anybody
            await asyncio.wait([work], timeout=min(left, self.deadline_s))
        return True

    def left(self, since: float, allowed: float) -> float:
        """What is left of ``allowed`` seconds that began at ``since`` on the monotonic clock."""
        return since + allowed - self._clock.monotonic()

    async def close(self) -> None:
        """Probe no more, once the one that is under way has ended. Harmless when repeated."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])
        await asyncio.to_thread(self._thread.shutdown)

    async def _until_admitted(self) -> None:
        try:
            while not self.admits:
                await asyncio.sleep(self._health.probe_in(self._clock.monotonic()))
                if await self._try():
                    self.good()
        finally:
            self._probing = None

    async def _try(self) -> bool:
        """Probe once, and say whether that went well. Each deadline that passes meanwhile strikes as a failure does."""
        attempt = asyncio.get_running_loop().run_in_executor(self._thread, self._probe)
        attempt.add_done_callback(lambda done: done.cancelled() or done.exception())  # if nobody asks any more
        late = False
        while not await self.in_time(attempt, partial(self.left, self._clock.monotonic(), self.deadline_s)):
            self.bad()
            late = True
        if attempt.exception() is not None:
            self.bad()
            return False
        return not late

    def _tell(self, before: State) -> None:
        if self.state != before and self._told is not None:
            self._told(self._side, self.state)
