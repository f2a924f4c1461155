"""The attributes of an everyday object in a tenth of the time: little endian, plain values, nothing unusual.

Whatever is unusual, broken or cut short is left to pydicom, which takes its time; so this never refuses anything, and
where it answers, it answers what pydicom would.
"""

import math
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from cache.errors import BadSource

from .elements import LONG, SHORT, UNDEFINED, Elements, Encoding

IMPLICIT: Final = "1.2.840.10008.1.2"
_SYNTAX: Final = 0x00020010
_HEAD: Final = struct.Struct("<HH2sH")
_HEAD_IMPLICIT: Final = struct.Struct("<HHI")
_LENGTH: Final = struct.Struct("<I")
_US: Final = struct.Struct("<H")
_TEXTS: Final = frozenset((b"CS", b"LO", b"SH", b"UI"))
_OFFSET_TABLES: Final = 0x7FE00001
_PIXELS: Final = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))


class Attribute(NamedTuple):
    """An attribute to read: ``text`` ones as they are written, others as the numbers that their VR makes them."""

    keyword: str
    vr: bytes
    text: bool


class Quick(NamedTuple):
    """What was found: the values by keyword, every top-level tag, and the pixels' tag, VR, offset and length."""

    transfer_syntax: str
    start: int
    values: dict[str, Any]
    seen: set[int]
    pixels: tuple[int, str | None, int, int]


def read_quickly(data: memoryview, attributes: Mapping[int, Attribute]) -> Quick | None:
    """The object's ``attributes`` (by tag), or None if anything about it is not as simple as it could be."""
    try:
        return _read(data, attributes)
    except (ValueError, IndexError, struct.error, BadSource):
        return None


def _read(data: memoryview, attributes: Mapping[int, Attribute]) -> Quick:
    syntax, start = _meta(data)
    encoding = Encoding(implicit=syntax == IMPLICIT)
    _expect(not (encoding.implicit and bytes(data[start + 4 : start + 6]).isupper()))  # says one thing, is another
    elements = Elements(data, encoding)
    values: dict[str, Any] = {}
    seen: set[int] = set()
    at, last = start, 0
    while True:
        tag, vr, at, length = _element(data, at, encoding.implicit)
        _expect(tag > last)
        seen.add(tag)
        last = tag
        if tag >= _OFFSET_TABLES:
            _expect(tag in _PIXELS and (length == UNDEFINED or at + length <= len(data)))
            return Quick(syntax, start, values, seen, (tag, vr.decode("ascii") or None, at, length))
        if length == UNDEFINED:
            _expect(vr in (b"", b"SQ"))
            at = elements.sequence_end(at, len(data)) + 8
            continue
        if (wanted := attributes.get(tag)) is not None:
            _expect(vr in (b"", wanted.vr))
            value = _value(bytes(data[at : at + length]), wanted)
            if value is not None:
                values[wanted.keyword] = value
        at += length


def _meta(data: memoryview) -> tuple[str, int]:
    """Transfer Syntax UID, and where the dataset begins (PS3.10 §7.1)."""
    _expect(bytes(data[128:132]) == b"DICM")
    at, syntax = 132, ""
    while data[at] == 2 and data[at + 1] == 0:
        tag, _, at, length = _element(data, at, False)
        if tag == _SYNTAX:
            syntax = bytes(data[at : at + length]).decode("ascii").strip(" \0")
        at += length
    return syntax, at


def _element(data: memoryview, at: int, implicit: bool) -> tuple[int, bytes, int, int]:
    """Tag, VR (b"" if implicit), where the value begins, and its length (PS3.5 §7.1)."""
    if implicit:
        group, element, length = _HEAD_IMPLICIT.unpack_from(data, at)
        return group << 16 | element, b"", at + 8, length
    group, element, vr, length = _HEAD.unpack_from(data, at)
    if vr in SHORT:
        return group << 16 | element, vr, at + 8, length
    _expect(vr in LONG)
    return group << 16 | element, vr, at + 12, _LENGTH.unpack_from(data, at + 8)[0]


def _value(raw: bytes, wanted: Attribute) -> Any:
    """Text, a number, or a list of several; None for an empty value. Raises: ValueError: it is something else."""
    if wanted.vr == b"US":
        return _US.unpack(raw)[0]
    text = raw.decode("ascii").rstrip(" \0")
    if not text:
        return None
    parts: list[Any] = [part.strip(" ") for part in text.split("\\")]
    if wanted.vr in (b"DS", b"IS"):
        numbers = [float(part) if wanted.vr == b"DS" else int(part) for part in parts]
        _expect(all(map(math.isfinite, numbers)))
        parts = parts if wanted.text else numbers
    else:
        _expect(wanted.vr in _TEXTS and text.isprintable())
    return parts if len(parts) > 1 else parts[0]


def _expect(usual: bool) -> None:
    if not usual:
        raise ValueError("left to pydicom")
