"""What a series can be searched and planned by; whose it is, it says by a keyed hash only."""

import msgspec

from .keys import SeriesRef


class Attributes(msgspec.Struct, frozen=True):
    """What one object says of its series (PS3.3 §C.7.2, §C.7.3, §C.7.5); "" or 0 for what it does not say.

    ``patient``: 32 hex digits for Patient ID and its issuer, made with a key that only this installation has.
    ``taken_at``: Study Date and Time in Unix seconds, UTC where the object names no offset.
    ``frames``: of this object. ``instances``: Number of Series Related Instances.
    """

    patient: str = ""
    modality: str = ""
    body_part: str = ""
    description: str = ""
    station: str = ""
    taken_at: float = 0.0
    frame_of_reference: str = ""
    frames: int = 1
    instances: int = 0


class Described(msgspec.Struct, frozen=True):
    """A series of ``objects`` objects with its attributes; None until an object of this version has been read."""

    ref: SeriesRef
    objects: int
    attributes: Attributes | None

    @property
    def slices(self) -> int:
        return self.objects * (self.attributes.frames if self.attributes is not None else 1)
