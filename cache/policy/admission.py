"""What is worth a write to NVMe, decided without I/O: a disk wears out by its writes."""

from collections import OrderedDict
from typing import Final, Literal

from cache.interfaces import WriteAdmission
from cache.keys import Key

Admission = Literal["all", "second-use"]


class All:
    """A WriteAdmission that takes everything."""

    def admits(self, key: Key, size: int) -> bool:
        return True


class SecondUse:
    """A WriteAdmission that takes what is made again: it left RAM, and was wanted after all.

    What is read once is never written. ``remembered`` keys are known again.
    """

    def __init__(self, remembered: int = 65_536) -> None:
        self._remembered: Final = remembered
        self._made: OrderedDict[Key, None] = OrderedDict()

    def admits(self, key: Key, size: int) -> bool:
        if key in self._made:
            del self._made[key]
            return True
        self._made[key] = None
        if len(self._made) > self._remembered:
            self._made.popitem(last=False)
        return False


def write_admission(name: Admission) -> WriteAdmission:
    """The one that a setting names."""
    return All() if name == "all" else SecondUse()
