"""Palettes: from indices to colours, whether the tables are written out or in segments (PS3.3 §C.7.9)."""

from collections.abc import Iterator
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from cache.errors import UndecodablePixels, UnsupportedPixels

Array = npt.NDArray[Any]

_DISCRETE: Final = 0
_LINEAR: Final = 1
_INDIRECT: Final = 2


class Palette(msgspec.Struct, frozen=True):
    """Palette Color Lookup Tables (PS3.3 §C.7.9): the descriptor's three numbers and each table's data, in little
    endian; ``segmented``: this is in segments (§C.7.9.2)."""

    entries: int
    first: int
    bits: int
    red: bytes
    green: bytes
    blue: bytes
    segmented: bool = False


def palette(indices: Array, lut: Palette) -> Array:
    """The colours of ``indices``, shape (…, 3), uint8 or uint16 as the tables have it (PS3.3 §C.7.6.3.1.5).

    Indices below the first entry take its colour, those beyond the last take that one's.

    Raises:
        UndecodablePixels: the tables are not as long as their descriptor says, or of no such width.
        UnsupportedPixels: a 16-bit table refers to its own segments: the standard counts bytes, others count words.
    """
    entries = lut.entries or 1 << 16  # what 16 bits cannot say
    if lut.bits not in (8, 16) or not 0 < entries <= 1 << 16:
        raise UndecodablePixels(f"a palette of {lut.entries} entries of {lut.bits} bits")
    read = _expanded if lut.segmented else _table
    tables = [read(data, entries, lut.bits) for data in (lut.red, lut.green, lut.blue)]
    places = np.clip(indices.astype(np.int64) - lut.first, 0, entries - 1)
    colours: Array = np.stack(tables, axis=-1)[places]
    return colours


def _table(data: bytes, entries: int, bits: int) -> Array:
    if bits == 8 and entries <= len(data) <= entries + 1:
        return np.frombuffer(data, np.uint8, entries)
    if len(data) != entries * 2:
        raise UndecodablePixels("a palette that is not as long as its descriptor says")
    # 8-bit entries, each in a word of its own, are against the standard, but common
    return np.frombuffer(data, "<u2", entries).astype(np.uint8 if bits == 8 else np.uint16)


def _expanded(data: bytes, entries: int, bits: int) -> Array:
    """The table that segments stand for: values as they are, lines between two, and earlier segments once more."""
    table: list[int] = []
    words = np.frombuffer(data[: len(data) // (bits // 8) * (bits // 8)], np.uint8 if bits == 8 else "<u2").tolist()
    for opcode, values in _segments(words, 0, bits):
        if opcode == _INDIRECT and bits == 16:
            raise UnsupportedPixels("a palette of 16 bits that refers to its own segments")
        again = [(opcode, values)] if opcode != _INDIRECT else _referred(words, values)
        for kind, part in again:
            _add(table, kind, part)
            if len(table) > entries:
                raise UndecodablePixels("a palette with more entries than its descriptor says")
    if len(table) != entries:
        raise UndecodablePixels("a palette with fewer entries than its descriptor says")
    return np.array(table, np.uint8 if bits == 8 else np.uint16)


def _segments(words: list[int], at: int, bits: int) -> Iterator[tuple[int, list[int]]]:
    """From ``at`` on each segment's opcode, and its length followed by its values (§C.7.9.2.1 to .3)."""
    end = len(words)
    while at + 1 < end:  # a byte to spare makes the length even
        opcode, length = words[at], words[at + 1]
        if opcode not in (_DISCRETE, _LINEAR, _INDIRECT) or length == 0:
            raise UndecodablePixels("a palette of unknown segments")
        values = length if opcode == _DISCRETE else 1 if opcode == _LINEAR else 32 // bits
        if at + 2 + values > end:
            raise UndecodablePixels("a palette whose last segment is cut short")
        yield opcode, words[at + 1 : at + 2 + values]
        at += 2 + values


def _referred(words: list[int], values: list[int]) -> Iterator[tuple[int, list[int]]]:
    """The segments that an indirect one names: how many, and the first one's offset in bytes."""
    count, *offset = values
    at = int.from_bytes(bytes(offset), "little")
    for number, (opcode, part) in enumerate(_segments(words, at, 8)):
        if number == count:
            return
        if opcode == _INDIRECT:
            raise UndecodablePixels("a palette whose segments refer to each other")
        yield opcode, part


def _add(table: list[int], opcode: int, values: list[int]) -> None:
    length, *rest = values
    if opcode == _DISCRETE:
        table += rest
        return
    if not table:
        raise UndecodablePixels("a palette that begins with a line from nowhere")
    before, last = table[-1], rest[0]
    step = (last - before) / length
    table += np.around(np.linspace(before + step, last, length)).astype(int).tolist()
