"""Each frame's values into their place in the volume: the codec's samples, then Modality LUT, rescale or palette.

Pixel bytes are copied once, into the volume: a codec writes straight to its slice where types are as wide.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.errors import BadSource, UnsupportedPixels

from .assemble import SlicePlan, VolumePlan
from .codecs import decode_frame, decoders
from .frames import FrameIndex, frame_spans
from .header import BIG_ENDIAN, ENCAPSULATED, NATIVE, InstanceHeader, Table, dataset_of
from .palette import Palette, palette

__all__ = ["decode_plan", "decode_slice", "decoders"]

Array = npt.NDArray[Any]


def decode_plan(objects: Sequence[memoryview], plan: VolumePlan, volume: Array, first: int = 0) -> None:
    """Decode every slice of the plan to its place; ``objects`` are the whole objects of ``plan.objects``, in order.

    ``volume`` has the dtype of ``plan.spec``, and its shape; or it is a part of that which begins with slice ``first``.

    Raises: as `decode_slice`.
    """
    at, source, slices = -1, None, volume
    for piece in plan.slices:
        if piece.object != at or source is None:
            at, header = piece.object, plan.objects[piece.object]
            source, slices = _Source(objects[at], header), volume.reshape(-1, *header.picture)
        source.decode(piece, slices[piece.at - first])


def decode_slice(data: memoryview, header: InstanceHeader, piece: SlicePlan, out: Array) -> None:
    """Decode one frame of the object ``data`` to ``out``, its slice of the volume, its values as ``piece`` says.

    Where values are not whole, they are computed in float64 and rounded once.

    Raises:
        UndecodablePixels: the codestream is broken, or is not the picture that the header describes.
        TruncatedObject: ``data`` ends before the pixel data does.
        UnsupportedPixels: nothing here decodes the transfer syntax.
    """
    _Source(data, header).decode(piece, out)


class _Source:
    """One object, of which several frames may be wanted: its header is not read again, a deflated one inflated once."""

    def __init__(self, data: memoryview, header: InstanceHeader) -> None:
        self._header = header
        self._format = header.format
        try:
            self._data = dataset_of(data, header)
            self._index = self._find(header)
        except BadSource as error:
            raise self._named(error) from error

    def _find(self, header: InstanceHeader) -> FrameIndex:
        offset, nbytes, fmt = header.pixel_offset, header.pixel_nbytes, self._format
        if header.transfer_syntax in NATIVE:
            return FrameIndex(offset, nbytes, header.frames, fmt.frame_bits, fmt.unit_bits)
        if header.transfer_syntax not in ENCAPSULATED:
            raise UnsupportedPixels("no decoder for its transfer syntax")
        if header.frame_starts:
            return FrameIndex(offset, nbytes, header.frames, starts=header.frame_starts)
        return frame_spans(self._data, offset, nbytes, fmt, header.frames)

    def decode(self, piece: SlicePlan, out: Array) -> None:
        header, fmt = self._header, self._format
        place = None
        if header.transfer_syntax not in NATIVE and not piece.table and not header.palette and out.shape == fmt.shape:
            # As wide as the samples: the codec may write here; what is left to do is done in place.
            place = out.view(fmt.dtype) if out.dtype.itemsize == fmt.dtype.itemsize else None
        try:
            frame = self._index.frame(self._data, piece.frame)
            stored = decode_frame(frame, fmt, skip_bits=self._index.skip_bits(piece.frame), out=place)
            if header.palette:
                out[...] = palette(stored, self._palette())
            elif piece.table and header.table is not None:
                out[...] = self._looked_up(stored, header.table, piece)
            elif piece.slope != 1.0 or piece.intercept != 0.0:
                _linear(stored, piece.slope, piece.intercept, out)
            elif place is None or place.dtype.kind != out.dtype.kind:
                _assign(stored, out)
        except BadSource as error:
            raise self._named(error) from error

    def _looked_up(self, stored: Array, table: Table, piece: SlicePlan) -> Array:
        """Through the Modality LUT: values before its first entry, or past its last, take that one's."""
        places = stored.astype(np.int32) * int(piece.slope) + int(piece.intercept)
        found: Array = self._values(table)[np.clip(places - table.first, 0, table.entries - 1)]
        return found

    def _values(self, table: Table) -> Array:
        # Eight-bit entries are written one or two bytes wide.
        narrow = table.bits == 8 and table.nbytes < 2 * table.entries
        dtype = "u1" if narrow else ">u2" if self._header.transfer_syntax == BIG_ENDIAN else "<u2"
        return np.frombuffer(self._bytes(table), dtype, table.entries)

    def _palette(self) -> Palette:
        first = self._header.palette[0]
        if first.segmented:
            red, green, blue = (bytes(self._bytes(table)) for table in self._header.palette)
        else:
            red, green, blue = (self._values(table).astype("<u2").tobytes() for table in self._header.palette)
        return Palette(first.entries, first.first, first.bits, red, green, blue, first.segmented)

    def _bytes(self, table: Table) -> memoryview:
        return self._data[table.offset : table.offset + table.nbytes]

    def _named(self, error: BadSource) -> BadSource:
        header = self._header
        return type(error)(f"instance {header.instance} of series {header.series}: {error}", (header.instance,))


def _assign(stored: Array, out: Array) -> None:
    # The plan has proven that every value fits, so that no sign changes in the cast.
    np.copyto(out, stored, casting="unsafe")


def _linear(stored: Array, slope: float, intercept: float, out: Array) -> None:
    if out.dtype.kind == "f":
        np.add(np.multiply(stored, slope, dtype=np.float64), intercept, out=out, casting="same_kind")
        return
    # The plan has proven that every result fits ``out``, so it does not matter if a step on the way wraps round.
    dtype = out.dtype
    same = stored.view(dtype) if stored.dtype.itemsize == dtype.itemsize else stored.astype(dtype)
    if slope == 1.0:
        np.add(same, _wrapped(intercept, dtype), out=out)
    else:
        np.multiply(same, _wrapped(slope, dtype), out=out)
        np.add(out, _wrapped(intercept, dtype), out=out)


@lru_cache(maxsize=256)  # slices of a series have the same slope and intercept as a rule
def _wrapped(value: float, dtype: np.dtype[Any]) -> Any:
    return np.array(int(value), np.int64).astype(dtype)[()]
