"""Where each frame lies in an object's pixel data, so that frame N is found without touching those before it.

The index is made of offset tables where the object has them, else by one pass over the fragments' headers. It is small,
and travels as JSON. Pixel bytes are never looked at, but for the first few of each fragment where nothing else tells
where frames begin.
"""

import struct
from collections.abc import Iterator
from typing import Final

import msgspec
import numpy as np

from cache.errors import TruncatedObject, UndecodablePixels

from .codecs import NATIVE_SYNTAXES, RLE, FrameFormat

_ITEM: Final = 0xE000FFFE  # the tag (FFFE,E000) as a little-endian word
_HEADER: Final = struct.Struct("<II")
#: SOI followed by any marker (JPEG, JPEG-LS), SOC followed by SIZ (JPEG 2000).
_STARTS: Final = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")


class FrameIndex(msgspec.Struct, frozen=True):
    """The pixel data's place in the object (``offset``, ``nbytes``), and each frame's place in it.

    Plain samples: frame N begins N × ``frame_bits`` bits after ``offset``, in units of ``unit_bits``. Fragments:
    ``frame_bits`` is 0, and ``starts`` holds the offset of the first fragment of each frame from ``offset``.
    """

    offset: int
    nbytes: int
    frames: int
    frame_bits: int = 0
    unit_bits: int = 8
    starts: tuple[int, ...] = ()

    def frame(self, data: memoryview, number: int) -> memoryview:
        """The bytes of one frame of the object ``data`` (inflated, if it is deflated), numbered from 0.

        A view, unless the frame lies in several fragments, which are joined. Plain samples may begin within the first
        byte: see `skip_bits`.

        Raises:
            IndexError: there is no such frame.
            TruncatedObject: ``data`` ends before the frame does.
            UndecodablePixels: the fragments are not where an offset table says.
        """
        if not 0 <= number < self.frames:
            raise IndexError(f"no frame {number} of {self.frames}")
        if self.frame_bits:
            first, end = _span(number, self.frame_bits, self.unit_bits)
            if self.offset + end > len(data) or end > self.nbytes:
                raise TruncatedObject("the pixel data ends early")
            return data[self.offset + first : self.offset + end]
        end = self.offset + (self.starts[number + 1] if number + 1 < self.frames else self.nbytes)
        parts = [data[at : at + nbytes] for at, nbytes in _fragments(data, self.offset + self.starts[number], end)]
        if not parts:
            raise UndecodablePixels("a frame without a fragment")
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def skip_bits(self, number: int) -> int:
        """Bits at the beginning of `frame` that belong to the frame before: one-bit frames share bytes."""
        return number * self.frame_bits % self.unit_bits


def frame_spans(
    data: memoryview,
    offset: int,
    nbytes: int,
    fmt: FrameFormat,
    frames: int,
    *,
    extended: tuple[bytes, bytes] | None = None,
) -> FrameIndex:
    """Index ``frames`` frames in the pixel data of ``data``: ``nbytes`` bytes at ``offset``.

    Encapsulated pixel data begins with the item of its basic offset table and comes without its closing delimiter
    (PS3.5 §A.4). ``extended``: the values of Extended Offset Table and Extended Offset Table Lengths, little-endian
    (PS3.3 §C.7.6.3.1.8). A lone frame needs no table, so none is believed.

    Raises:
        TruncatedObject: ``data`` ends before the pixel data does, or that before its frames.
        UndecodablePixels: a table lies, or nothing tells which fragments belong to which frame.
    """
    if offset < 0 or nbytes < 0 or frames < 1 or offset + nbytes > len(data):
        raise TruncatedObject("the pixel data ends early")
    if fmt.transfer_syntax in NATIVE_SYNTAXES:
        if _span(frames - 1, fmt.frame_bits, fmt.unit_bits)[1] > nbytes:
            raise TruncatedObject("the pixel data is shorter than its frames")
        return FrameIndex(offset, nbytes, frames, fmt.frame_bits, fmt.unit_bits)
    table_nbytes = _item(data, offset, offset + nbytes)
    first = 8 + table_nbytes
    if frames == 1:
        starts: tuple[int, ...] = (first,)
    elif extended is not None:
        starts = _extended(extended, first, nbytes, frames)
    elif table_nbytes:
        starts = _checked(data[offset + 8 : offset + first], "<u4", first, nbytes, frames)
    else:
        starts = tuple(at - offset for at in _found(data, offset + first, offset + nbytes, fmt, frames))
    return FrameIndex(offset, nbytes, frames, starts=starts)


def _span(number: int, frame_bits: int, unit_bits: int) -> tuple[int, int]:
    """First byte and end of the whole units that hold a frame of plain samples."""
    first, end = number * frame_bits // unit_bits, -(-(number + 1) * frame_bits // unit_bits)
    return first * unit_bits // 8, end * unit_bits // 8


def _item(data: memoryview, at: int, end: int) -> int:
    """Length of the item at ``at``, which ends by ``end``."""
    if at + 8 > end:
        raise TruncatedObject("the pixel data ends within a fragment's header")
    tag, nbytes = _HEADER.unpack_from(data, at)
    if tag != _ITEM:
        raise UndecodablePixels("its pixel data is no sequence of fragments, or an offset table points into one")
    if at + 8 + nbytes > end:
        raise TruncatedObject("a fragment ends after the frame it belongs to")
    return int(nbytes)


def _fragments(data: memoryview, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Offset and length of each fragment between two offsets, which are those of items."""
    if end > len(data):
        raise TruncatedObject("the pixel data ends early")
    while at < end:
        nbytes = _item(data, at, end)
        yield at + 8, nbytes
        at += 8 + nbytes


def _extended(extended: tuple[bytes, bytes], first: int, nbytes: int, frames: int) -> tuple[int, ...]:
    offsets, lengths = extended
    starts = _checked(memoryview(offsets), "<u8", first, nbytes, frames)
    if len(lengths) != 8 * frames:
        raise UndecodablePixels("the extended offset table has another number of lengths than of frames")
    # A frame is one fragment here, and its length may count the byte that makes it even or not.
    spans = np.diff(np.array([*starts, nbytes], np.int64)) - 8
    counted = np.frombuffer(lengths, "<u8")
    if (counted > nbytes).any() or ((spans - counted.astype(np.int64)) // 2).any():
        raise UndecodablePixels("the extended offset table's lengths are not those of its frames")
    return starts


def _checked(table: memoryview, dtype: str, first: int, nbytes: int, frames: int) -> tuple[int, ...]:
    """Offsets from the first fragment, in a table (PS3.5 §A.4), as offsets from the pixel data's beginning."""
    if len(table) != frames * np.dtype(dtype).itemsize:
        raise UndecodablePixels("the offset table has another number of offsets than there are frames")
    offsets = np.frombuffer(table, dtype)
    if offsets[0] != 0 or (offsets[1:] <= offsets[:-1]).any() or offsets[-1] >= nbytes - first:
        raise UndecodablePixels("the offset table's offsets are not those of frames that follow each other")
    return tuple((offsets.astype(np.int64) + first).tolist())


def _found(data: memoryview, begin: int, end: int, fmt: FrameFormat, frames: int) -> list[int]:
    """Without a table: one fragment a frame, or else each frame begins where a codestream does."""
    places = [at for at, _ in _fragments(data, begin, end)]
    if len(places) > frames and fmt.transfer_syntax != RLE:
        places = [at for at in places if bytes(data[at : at + 8]).startswith(_STARTS)]
    if len(places) != frames or places[0] != begin + 8:
        raise UndecodablePixels("its fragments do not tell where its frames begin")
    return [at - 8 for at in places]
