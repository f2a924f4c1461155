"""Where frames lie, and what their values are, in RT doses and reconstructed NM: objects that say so in their own way.

They have no functional groups; what is read here takes the place of these.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from .elements import Element, Elements
from .groups import FARTHEST_MM, MOST_FRAMES, FrameGroups, Linear

RT_DOSE: Final = "1.2.840.10008.5.1.4.1.1.481.2"
NM: Final = "1.2.840.10008.5.1.4.1.1.20"

DETECTORS: Final = 0x00540022
_SLICES: Final = 0x00540080
_DOSE_UNITS: Final = 0x30040002
_OFFSETS: Final = 0x3004000C
_SCALING: Final = 0x3004000E
_POSITION: Final = 0x00200032
_ORIENTATION: Final = 0x00200037
#: What is read in place for this.
GRID_TAGS: Final = frozenset({DETECTORS, _SLICES, _DOSE_UNITS, _OFFSETS, _SCALING})

#: Planes that Grid Frame Offset Vector may give z coordinates of: transverse, rows along x.
_TRANSVERSE: Final = ((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0))

_Place = tuple[float, float, float]
_Orientation = tuple[float, float, float, float, float, float]
Frames = tuple[FrameGroups, ...]


def dose_frames(elements: Elements, parts: Mapping[int, Element], frames: int, first: FrameGroups) -> Frames:
    """The planes of an RT dose, by its Grid Frame Offset Vector (PS3.3 §C.8.8.3.2); none if it does not tell.

    Beginning with 0 it holds distances along the normal, beginning with the first plane's z coordinates of transverse
    planes. ``first``: what the object says of its first plane.
    """
    offsets = _numbers(elements, parts.get(_OFFSETS))
    position, orientation = first.position, first.orientation
    if offsets is None or len(offsets) != frames or position is None or orientation is None or frames > MOST_FRAMES:
        return ()
    if offsets[0] == 0:
        return _frames(_along(position, orientation, offsets), orientation, first.pixel_spacing)
    if offsets[0] != position[2] or orientation not in _TRANSVERSE:
        return ()
    return _frames([(position[0], position[1], z) for z in offsets], orientation, first.pixel_spacing)


def reconstructed_frames(elements: Elements, parts: Mapping[int, Element], frames: int, first: FrameGroups) -> Frames:
    """The slices of an NM object of one reconstructed volume; none if it is another kind, or does not tell.

    Its only detector says where the first one lies (PS3.3 §C.8.4.11), Slice Vector which slice a frame is (§C.8.4.8),
    Spacing Between Slices how far they are apart, negative in front of the first one (§C.8.4.15).
    """
    numbers = _words(elements, parts.get(_SLICES))
    place = _detector(elements, parts.get(DETECTORS))
    between = first.spacing_between_slices
    if place is None or not between or len(numbers) != frames or frames > MOST_FRAMES:
        return ()
    position, orientation = place
    places = _along(position, orientation, [(number - 1) * between for number in numbers])
    return _frames(places, orientation, first.pixel_spacing)


def dose_values(elements: Elements, parts: Mapping[int, Element]) -> Linear | None:
    """From stored values to a dose: Dose Grid Scaling and Dose Units (PS3.3 §C.8.8.3)."""
    scaling = _numbers(elements, parts.get(_SCALING))
    if scaling is None or len(scaling) != 1 or not scaling[0] > 0:
        return None
    units = elements.value(parts[_DOSE_UNITS]) if _DOSE_UNITS in parts else b""
    return Linear(scaling[0], 0.0, {b"GY": "Gy"}.get(units.strip(b" \0"), ""))


def _detector(elements: Elements, sequence: Element | None) -> tuple[_Place, _Orientation] | None:
    """Image Position and Image Orientation (Patient) of the only item."""
    items = list(elements.items(sequence)) if sequence is not None else []
    if sequence is None or len(items) != 1:
        return None
    inner = {element.tag: element for element in elements.walk(*items[0], sequence.encoding)}
    position, orientation = (_numbers(elements, inner.get(tag)) for tag in (_POSITION, _ORIENTATION))
    if position is None or orientation is None or (len(position), len(orientation)) != (3, 6):
        return None
    return position, orientation  # type: ignore[return-value]  # their lengths were checked


def _along(position: _Place, orientation: _Orientation, distances: Sequence[float]) -> list[_Place]:
    """Places at ``distances`` from the first one along the normal of rows and columns."""
    a, b, c, d, e, f = orientation
    x, y, z = position
    return [(x + s * (b * f - c * e), y + s * (c * d - a * f), z + s * (a * e - b * d)) for s in distances]


def _frames(places: Sequence[_Place], orientation: _Orientation, spacing: tuple[float, float] | None) -> Frames:
    if any(abs(value) > FARTHEST_MM for place in places for value in place):
        return ()
    return tuple(FrameGroups(position=place, orientation=orientation, pixel_spacing=spacing) for place in places)


def _numbers(elements: Elements, element: Element | None) -> tuple[float, ...] | None:
    """Decimal strings; None where one is no number within reason."""
    if element is None:
        return None
    try:
        numbers = tuple(float(part) for part in elements.value(element).decode("ascii").strip(" \0").split("\\"))
    except ValueError:
        return None
    return numbers if all(math.isfinite(number) and abs(number) <= FARTHEST_MM for number in numbers) else None


def _words(elements: Elements, element: Element | None) -> tuple[int, ...]:
    raw = elements.value(element) if element is not None else b""
    order = "<" if element is None or element.encoding.little else ">"
    return struct.unpack(f"{order}{len(raw) // 2}H", raw[: len(raw) // 2 * 2])
