"""What the functional groups of a multi-frame object say of each of its frames (PS3.3 §C.7.6.16).

A group's sequence stands in the shared groups or in those of each frame; a frame's own wins. Only the macros that
place a frame, turn its samples into values, or tell it from another at the same place are looked at.
"""

import math
import struct
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from cache.errors import UnsupportedPixels

from .elements import Element, Elements

SHARED: Final = 0x52009229
PER_FRAME: Final = 0x52009230

#: An object of more frames is read as one without functional groups: its frames can be had, a volume cannot.
MOST_FRAMES: Final = 1 << 16

#: No patient lies farther than this from the origin, in millimetres. It also keeps all geometry finite.
FARTHEST_MM: Final = 1e6

#: Attributes that tell apart slices lying at the same place: several volumes in one series (PS3.3 §C.8.3.1, §C.7.6.16).
DISTINGUISHING: Final = (
    "EchoNumbers",
    "EchoTime",
    "InversionTime",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "TriggerTime",
    "DiffusionBValue",
    "AcquisitionNumber",
    "ImageType",
    "StackID",
    "ReferencedSegmentNumber",
)

#: Macro → its attributes that are read, each with its value representation (PS3.3 §C.7.6.16.2, §C.8.13.5, §C.8.20.3).
_MACROS: Final[Mapping[int, Mapping[int, tuple[str, str]]]] = {
    0x00209113: {0x00200032: ("position", "DS")},
    0x00209116: {0x00200037: ("orientation", "DS")},
    0x00289110: {0x00280030: ("pixel_spacing", "DS"), 0x00180088: ("spacing_between_slices", "DS")},
    0x00289145: {0x00281053: ("slope", "DS"), 0x00281052: ("intercept", "DS"), 0x00281054: ("rescale_type", "CS")},
    0x00409096: {
        0x00409225: ("real_slope", "FD"),
        0x00409224: ("real_intercept", "FD"),
        0x00409212: ("real_table", "FD"),
        0x004008EA: ("real_units", "SQ"),
    },
    0x00209111: {
        0x00209128: ("TemporalPositionIndex", "UL"),
        0x00209156: ("AcquisitionNumber", "US"),
        0x00209056: ("StackID", "SH"),
    },
    0x00189114: {0x00189082: ("EchoTime", "FD")},
    0x00189117: {0x00189087: ("DiffusionBValue", "FD")},
    0x00189118: {0x00209153: ("TriggerTime", "FD")},
    0x00189226: {0x00089007: ("ImageType", "CS")},
    0x00189329: {0x00089007: ("ImageType", "CS")},
    0x0062000A: {0x0062000B: ("ReferencedSegmentNumber", "US")},
}
_BINARY: Final = {"FD": "d", "UL": "I", "US": "H"}


class Linear(msgspec.Struct, frozen=True, array_like=True):
    """A linear mapping from stored values to something else, which ``units`` names."""

    slope: float
    intercept: float
    units: str = ""


class FrameGroups(msgspec.Struct, frozen=True, array_like=True):
    """One frame: as `cache.dicom.header.InstanceHeader` has it of an object with one frame; None for what is absent."""

    position: tuple[float, float, float] | None = None
    orientation: tuple[float, float, float, float, float, float] | None = None
    pixel_spacing: tuple[float, float] | None = None
    spacing_between_slices: float | None = None
    rescale: Linear | None = None
    real_world: Linear | None = None
    distinguishing: tuple[str, ...] = ("",) * len(DISTINGUISHING)


_Found = dict[str, Any]


def read_groups(elements: Elements, sequences: Mapping[int, Element], frames: int) -> tuple[FrameGroups, ...]:
    """One for each of ``frames`` frames, from the two top-level sequences by their tags.

    None at all where the groups do not describe just these frames, or there are more than MOST_FRAMES.

    Raises:
        NotDicom, TruncatedObject: the sequences are none.
        UnsupportedPixels: a number in them is none.
    """
    if PER_FRAME not in sequences or frames > MOST_FRAMES:
        return ()
    shared: _Found = {}
    if SHARED in sequences:
        for begin, end in elements.items(sequences[SHARED]):
            shared |= _macros(elements, begin, end)
    groups: list[FrameGroups] = []
    for begin, end in elements.items(sequences[PER_FRAME]):
        if len(groups) == frames:
            return ()
        groups.append(_frame(shared | _macros(elements, begin, end)))
    return tuple(groups) if len(groups) == frames else ()


def read_real_world(elements: Elements, sequence: Element) -> Linear | None:
    """The only item of a Real World Value Mapping Sequence, if it is linear (PS3.3 §C.7.6.16.2.11)."""
    return _real_world(_macro(elements, sequence))


def _frame(found: _Found) -> FrameGroups:
    spacing = _tuple(found, "spacing_between_slices", 1)
    return FrameGroups(
        position=_tuple(found, "position", 3),  # type: ignore[arg-type]  # the count is checked there
        orientation=_tuple(found, "orientation", 6),  # type: ignore[arg-type]  # likewise
        pixel_spacing=_tuple(found, "pixel_spacing", 2),  # type: ignore[arg-type]  # likewise
        spacing_between_slices=None if spacing is None else spacing[0],
        rescale=_rescale(found),
        real_world=_real_world(found),
        distinguishing=tuple(str(found.get(keyword, "")) for keyword in DISTINGUISHING),
    )


def _macros(elements: Elements, begin: int, end: int) -> _Found:
    found: _Found = {}
    for macro in elements.walk(begin, end):
        if macro.tag in _MACROS:
            found |= _macro(elements, macro)
    return found


def _macro(elements: Elements, macro: Element) -> _Found:
    """The attributes of a macro's only item. Where it has several, nothing says which one counts."""
    found: _Found = {}
    known = _MACROS[macro.tag]
    for number, (begin, end) in enumerate(elements.items(macro)):
        if number:
            return {}
        for element in elements.walk(begin, end, macro.encoding):
            if element.tag in known:
                name, vr = known[element.tag]
                found[name] = _code(elements, element) if vr == "SQ" else _value(elements, element, vr)
    return found


def _value(elements: Elements, element: Element, vr: str) -> object:
    """Numbers as a tuple of floats, what distinguishes as text."""
    raw = elements.value(element)
    if vr in _BINARY:
        size = struct.calcsize(_BINARY[vr])
        order = "<" if element.encoding.little else ">"
        numbers = struct.unpack(f"{order}{len(raw) // size}{_BINARY[vr]}", raw[: len(raw) // size * size])
        if vr == "FD" and element.tag >> 16 == 0x0040:
            return tuple(numbers)
        return "\\".join(f"{number:.10g}" for number in numbers)
    text = raw.decode("ascii", "replace").strip(" \0")
    if vr != "DS":
        return "\\".join(part.strip(" \0") for part in text.split("\\"))
    try:
        return tuple(float(part) for part in text.split("\\")) if text else ()
    except ValueError as error:
        raise UnsupportedPixels("a number in its functional groups is none") from error


def _code(elements: Elements, sequence: Element) -> str:
    """Code Value of a coded entry (PS3.3 §8.1)."""
    for begin, end in elements.items(sequence):
        for element in elements.walk(begin, end, sequence.encoding):
            if element.tag == 0x00080100:
                return elements.value(element).decode("ascii", "replace").strip(" \0")
    return ""


def _tuple(found: _Found, name: str, count: int) -> tuple[float, ...] | None:
    value = found.get(name)
    if not isinstance(value, tuple) or len(value) != count:
        return None
    return value if all(abs(number) <= FARTHEST_MM for number in value) else None


def _rescale(found: _Found) -> Linear | None:
    if not found.get("slope") and not found.get("intercept"):
        return None
    # An empty or zero slope maps everything to one value: it says nothing, and is read as absent, as highdicom does.
    slope, intercept = _number(found, "slope") or 1.0, _number(found, "intercept") or 0.0
    return Linear(slope, intercept, str(found.get("rescale_type", "")))


def _real_world(found: _Found) -> Linear | None:
    if not found.get("real_slope") or not found.get("real_intercept") or "real_table" in found:
        return None
    return Linear(_number(found, "real_slope"), _number(found, "real_intercept"), str(found.get("real_units", "")))


def _number(found: _Found, name: str) -> float:
    value = found.get(name)
    number = float(value[0]) if isinstance(value, tuple) and value else 0.0
    if not math.isfinite(number):
        raise UnsupportedPixels("a rescale in its functional groups is no number")
    return number
