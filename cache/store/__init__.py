"""The walk: from a reference to bytes that a caller may hold. The only room that knows more than one tier.

    get ─ manifest ─ key ─┬─ RAM ───────────────────────────────────────────── pin
                          └─ flight ─┬─ NVMe ─ read into an extent ─────────── admit, pin
                                     └─ pack (NVMe, or the origin) ─ workers ─ admit, pin ─ NVMe, behind

An embedding is one step more: what its recipe makes before the model is got by this same walk, and the encoder runs the
model on it.

Workers begin with the objects that are there while others are still being fetched. Everything large lives in space that
a tier has reserved: the pack while it is fetched and decoded, the volume between decode and recipe, the result. What
the RAM tier is too small for is made in a file of the NVMe tier and served from there: that is a bypass.
"""

from .outcome import Bypassed, Filled, Hit, Instance, Outcome
from .settings import StoreSettings
from .verify import Verified
from .walk import Store

__all__ = ["Bypassed", "Filled", "Hit", "Instance", "Outcome", "Store", "StoreSettings", "Verified"]
