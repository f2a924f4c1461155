"""What a walk answers: bytes that the caller holds until it lets go of them, and which tier they came from."""

from collections.abc import AsyncIterator
from typing import Final, Literal

import msgspec

from cache.keys import SourceObject
from cache.nvme import Payload
from cache.pack import Member
from cache.ram import Pin
from cache.stopwatch import Stages, Stopwatch

#: A socket takes no more at a time, and a slow reader holds no more in memory.
_PIECE: Final = 1 << 20


class _InRam:
    """An outcome whose bytes are pinned in the arena: they can be leased, and sent without a copy."""

    def __init__(self, pin: Pin, watch: Stopwatch | None) -> None:
        self.pin = pin
        self.entry = pin.entry
        self._watch = watch

    @property
    def stages(self) -> Stages:
        """Seconds by stage of the request so far; of a hit that was had at once there are none."""
        return {} if self._watch is None else self._watch.stages

    async def chunks(self, start: int, stop: int) -> AsyncIterator[memoryview]:
        """The payload's bytes from ``start`` to ``stop``, straight from the arena."""
        view = self.pin.view
        for at in range(start, stop, _PIECE):
            yield view[at : min(at + _PIECE, stop)]

    def copy(self) -> bytes:
        """The payload, where it is small."""
        return bytes(self.pin.view)

    def release(self) -> None:
        """Let go of the bytes. Harmless when repeated."""
        self.pin.release()


class Hit(_InRam):
    """The entry was there: in RAM, or on NVMe and now in RAM too."""

    def __init__(self, pin: Pin, watch: Stopwatch | None, tier: Literal["ram", "nvme"]) -> None:
        super().__init__(pin, watch)
        self.tier = tier


class Filled(_InRam):
    """The entry was made, for this request or for one that it joined; it is in RAM now."""

    tier: Final = "origin"


class Bypassed:
    """The entry is too large for the RAM tier: its bytes come verified from NVMe. It cannot be leased."""

    tier: Final = "bypass"

    def __init__(self, payload: Payload, watch: Stopwatch, reason: str) -> None:
        self.payload = payload
        self.entry = payload.entry
        self.reason = reason
        self._watch = watch

    @property
    def stages(self) -> Stages:
        """Seconds by stage of the request so far."""
        return self._watch.stages

    async def chunks(self, start: int, stop: int) -> AsyncIterator[memoryview]:
        """The payload's bytes from ``start`` to ``stop``, none given out before its checksum was right.

        Raises: CorruptEntry.
        """
        async for chunk in self.payload.chunks(start, stop):
            for at in range(0, len(chunk), _PIECE):
                yield chunk[at : at + _PIECE]

    def release(self) -> None:
        """Let go of the file. Harmless when repeated."""
        self.payload.release()


Outcome = Hit | Filled | Bypassed


class Instance:
    """One object of a series as the origin has it, within the series' pack, which it holds."""

    def __init__(self, pack: Outcome, source: SourceObject, member: Member) -> None:
        self.pack = pack
        self.source = source
        self.tier = pack.tier
        self._member = member

    def chunks(self, start: int, stop: int) -> AsyncIterator[memoryview]:
        """The object's bytes from ``start`` to ``stop``. Raises: as those of the pack."""
        return self.pack.chunks(self._member.offset + start, self._member.offset + stop)

    def release(self) -> None:
        """Let go of the pack. Harmless when repeated."""
        self.pack.release()


class Landed(msgspec.Struct, frozen=True):
    """What a flight brought, held until its last waiter has taken a share."""

    held: Pin | Payload
    made: bool  # by a fill, not found on NVMe
    reason: str = ""
