"""As much of protobuf's wire format as it takes to look into a message without copying its tensors.

Source: Protocol Buffers, "Encoding". In concatenated messages the last value of a single field counts, and repeated
fields are appended: so what is written behind a message changes it without reading it.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

from cache.errors import BadRequest

#: The wire type of strings, bytes and messages.
BYTES: Final = 2
_FIXED: Final = {1: 8, 5: 4}


class Field(msgspec.Struct, frozen=True):
    """A field of a message: it takes ``start`` to ``stop``, its content (of strings, bytes, messages) from ``at``."""

    number: int
    kind: int
    start: int
    at: int
    stop: int


def fields(message: bytes | memoryview) -> Iterator[Field]:
    """The fields of a message, not looked into. Raises: BadRequest if that is none."""
    at = 0
    end = len(message)
    while at < end:
        start = at
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == BYTES:
            size, at = _varint(message, at)
            stop = at + size
        elif kind == 0:
            _, stop = _varint(message, at)
        elif kind in _FIXED:
            stop = at + _FIXED[kind]
        else:
            raise BadRequest("a field of a kind that no message here has")
        if stop > end:
            raise BadRequest("the message ends within a field")
        yield Field(tag >> 3, kind, start, at, stop)
        at = stop


def written(number: int, content: bytes) -> bytes:
    """A field that holds a string, bytes or a message."""
    return b"".join((_as_varint(number << 3 | BYTES), _as_varint(len(content)), content))


def _varint(message: bytes | memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    try:
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
            if shift > 63:
                raise BadRequest("a number longer than a message can have")
    except IndexError:
        raise BadRequest("the message ends within a number") from None


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
