"""Mutations that keep a DICOM object one: elements are changed, with the lengths around them in order, or not at all.

Bytes changed at random mostly break the first length they hit, and nothing behind it is ever reached.
"""

import random
import struct
import zlib
from collections.abc import Callable
from typing import Final, NamedTuple

Mutate = Callable[[bytes], bytes]

_LONG: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_DEFLATED: Final = b"1.2.840.10008.1.2.1.99\0"
_TEXT: Final = tuple(
    b"0|1|-1|2|3|8|16|32|255|65535|65536|2147483648|1e308|-1e308|1e-308|nan|inf|1e5|0.5|1\\0\\0\\0\\1\\0|0\\0\\0|1\\1|"
    b"\\|CT|PT|MONOCHROME1|PALETTE COLOR|RGB|YBR_FULL|YBR_FULL_422|ISO_IR 192|\xff\xfe|1.2.840.10008.1.2.5|".split(b"|")
)
_SHORTS: Final = (0, 1, 2, 3, 7, 8, 12, 15, 16, 31, 32, 64, 255, 256, 4095, 32767, 32768, 65535)
_LENGTHS: Final = (0, 1, 7, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)


class _Span(NamedTuple):
    """An element: header at ``at``, value from ``begin`` to ``end``; the field of ``width`` bytes before it is its
    length."""

    at: int
    begin: int
    end: int
    width: int


def mutated(data: bytes, seed: int, mutate: Mutate) -> bytes:
    """The object with one to three changes; ``mutate`` changes plain bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.2:
        return mutate(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        data = _inflated(data, chance, mutate) or _once(data, chance, mutate)
    return data


def _inflated(data: bytes, chance: random.Random, mutate: Mutate) -> bytes | None:
    """The same within a deflated dataset (PS3.5 §A.5)."""
    spans = [span for span in _spans(data, 132) if data[span.at : span.at + 2] == b"\2\0"]
    if not spans or _DEFLATED not in data[132 : spans[-1].end] or chance.random() < 0.1:
        return None
    start = spans[-1].end
    try:
        dataset = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], 1 << 20)
    except zlib.error:
        return None
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return data[:start] + deflater.compress(_once(dataset, chance, mutate, 0)) + deflater.flush()


def _once(  # noqa: PLR0911 - one for each kind of change
    data: bytes, chance: random.Random, mutate: Mutate, start: int = 132
) -> bytes:
    spans = _spans(data, start)
    if not spans:
        return mutate(data)
    span = chance.choice(spans)
    value = data[span.begin : span.end]
    match chance.randrange(8):
        case 0:
            return data[: span.at] + data[span.end :]
        case 1:
            other = chance.choice(spans)
            return data[: other.at] + data[span.at : span.end] + data[other.at :]
        case 2:
            length = chance.choice(_LENGTHS) & (1 << 8 * span.width) - 1
            return data[: span.begin - span.width] + length.to_bytes(span.width, "little") + data[span.begin :]
        case 3:
            return _with(data, span, value[: chance.randrange(len(value) + 1)])
        case 4:
            return _with(data, span, struct.pack("<H", chance.choice(_SHORTS)) * max(1, len(value) // 2))
        case 5:
            text = chance.choice(_TEXT)
            return _with(data, span, text + b" " * (len(text) % 2))
        case 6:
            return data[: chance.randrange(span.at, span.end + 1)]
        case _:
            return _with(data, span, mutate(value))


def _with(data: bytes, span: _Span, value: bytes) -> bytes:
    value = value[: (1 << 8 * span.width) - 2]
    if data[span.begin - span.width : span.begin] == b"\xff" * span.width:
        return data[: span.begin] + value + data[span.end :]
    length = len(value).to_bytes(span.width, "little")
    return data[: span.begin - span.width] + length + value + data[span.end :]


def _spans(data: bytes, start: int) -> list[_Span]:
    """The elements and items from ``start`` on, as far as they can be walked; sequences and fragments from inside."""
    spans: list[_Span] = []
    at = start
    while at + 8 <= len(data) and len(spans) < 4096:
        width = 4
        begin = at + 8
        if data[at + 4 : at + 6].isupper() and data[at : at + 2] != b"\xfe\xff":
            if data[at + 4 : at + 6] in _LONG:
                begin = at + 12
            else:
                width = 2
        length = int.from_bytes(data[begin - width : begin], "little")
        nested = data[at + 4 : at + 6] == b"SQ" or length == 0xFFFFFFFF
        if begin + length > len(data) and not nested:
            return spans
        end = begin if nested else begin + length
        spans.append(_Span(at, begin, end, width))
        at = end
    return spans
