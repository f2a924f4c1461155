"""Which policy a tier follows, by its settings."""

from collections.abc import Hashable
from typing import Literal, TypeVar

import msgspec

from cache.interfaces import EvictionPolicy

from .adaptive import Adaptive
from .gdsf import Gdsf
from .lru import Lru
from .s3fifo import S3Fifo
from .sieve import Sieve
from .worth import Aim

K = TypeVar("K", bound=Hashable)


class EvictionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which entries go first when room is needed.

    policy: "lru", "sieve" and "s3-fifo" look at the order of uses; "gdsf" goes by uses and worth for each byte;
        "adaptive" follows the one that has lately done best.
    aim: what "gdsf" and "adaptive" spare: "requests" that miss, "bytes" made anew, or the "cost" of that in seconds.
    """

    policy: Literal["lru", "sieve", "s3-fifo", "gdsf", "adaptive"] = "adaptive"
    aim: Aim = "cost"

    def build(self) -> EvictionPolicy[K]:
        """A new policy that holds nothing."""
        match self.policy:
            case "lru":
                return Lru()
            case "sieve":
                return Sieve()
            case "s3-fifo":
                return S3Fifo()
            case "gdsf":
                return Gdsf(self.aim)
            case "adaptive":
                return Adaptive(self.aim)
