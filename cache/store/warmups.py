"""What warm-ups put into RAM that nobody has used yet: how much of it there may be, and what must not go for it."""

from collections.abc import Callable
from typing import Final

from cache.errors import AllPinned
from cache.interfaces import Clock
from cache.keys import Key
from cache.policy.warmup import outranks, within_share
from cache.ram import RamTier
from cache.urgency import current

from .settings import StoreSettings

#: Why a result is on NVMe only, though RAM may have room for it.
WARMED_ON_NVME: Final = "it was warmed, and there was no RAM for a warm-up"


class WarmUps:
    """The warmed entries that wait for their first use."""

    def __init__(self, settings: StoreSettings, ram: RamTier, clock: Clock) -> None:
        self._settings = settings
        self._ram = ram
        self._clock = clock
        self._unused: set[Key] = set()
        #: A request has used the entry. Every hit calls it, so there is no method around it.
        self.used: Callable[[Key], None] = self._unused.discard

    def made(self, key: Key) -> None:
        """A warm-up has made the entry."""
        self._unused.add(key)

    def check(self, namespace: str, nbytes: int) -> None:
        """Raises: AllPinned: what is done now is a warm-up, and they have their share already."""
        if current().waits_for_demand:
            held = [entry for key in self._unused if (entry := self._ram.lookup(key)) is not None]
            self._unused.intersection_update([entry.key for entry in held])
            taken = sum(entry.nbytes for entry in held if entry.key.namespace == namespace)
            if not within_share(taken, nbytes, self._ram.usage(namespace).budget, self._settings.warm_share):
                raise AllPinned(f"warm-ups have their share of namespace {namespace!r}, store.warm_share, already")

    def outranked(self, key: Key, last_use: float) -> bool:
        """Whether the entry must stay because what is done now is only a warm-up, or less."""
        urgency = current()
        return urgency.displaces_nothing or (
            urgency.waits_for_demand and outranks(last_use, self._clock.now(), self._settings.warm_use_s)
        )
