"""Where the values of a dataset lie, found by walking it in place: nothing is converted, nothing is copied.

It serves what pydicom would parse whole, however deep, to answer a question about a few values: functional groups,
lookup tables. Its work is bounded by the bytes there are, its depth by `DEEPEST`.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from cache.errors import NotDicom, TruncatedObject

#: Sequences within sequences: no standard IOD comes near.
DEEPEST: Final = 16

UNDEFINED: Final = 0xFFFFFFFF
_ITEM: Final = 0xFFFEE000
_ITEM_END: Final = 0xFFFEE00D
_SEQUENCE_END: Final = 0xFFFEE0DD
#: Value representations whose length has two bytes (PS3.5 §7.1.2, table 7.1-2).
SHORT: Final = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())


class Encoding(NamedTuple):
    """How a transfer syntax encodes the dataset (PS3.5 Annex A)."""

    implicit: bool = False
    little: bool = True


class Element(NamedTuple):
    """One element: its value is ``data[begin:end]``; of undefined length, up to its delimiter."""

    tag: int
    vr: bytes  # b"" where the encoding is implicit
    begin: int
    end: int
    encoding: Encoding  # of what a sequence holds


class Elements:
    """The dataset ``data``, in one encoding."""

    def __init__(self, data: memoryview, encoding: Encoding) -> None:
        self._data = data
        self._encoding = encoding

    def walk(self, begin: int, end: int, encoding: Encoding | None = None, depth: int = 0) -> Iterator[Element]:
        """The elements between ``begin`` and ``end``, in order.

        Raises:
            TruncatedObject: one reaches past ``end``.
            NotDicom: these bytes are no dataset, or sequences are nested without end.
        """
        encoding = encoding or self._encoding
        at = begin
        while at < end:
            element, at = self._element(at, end, encoding, depth)
            if element is None:
                return
            yield element

    def items(self, sequence: Element) -> Iterator[tuple[int, int]]:
        """Where the items of a sequence begin and end (PS3.5 §7.5)."""
        at = sequence.begin
        while at < sequence.end:
            tag, length = self._header(at, sequence.end, sequence.encoding)
            if tag != _ITEM:
                return
            at += 8
            stop = at + length if length != UNDEFINED else self._item_end(at, sequence.end, sequence.encoding, 1)
            if stop > sequence.end:
                raise TruncatedObject("an item of a sequence ends early")
            yield at, stop
            at = stop if length != UNDEFINED else stop + 8

    def value(self, element: Element) -> bytes:
        return bytes(self._data[element.begin : element.end])

    def sequence_end(self, begin: int, end: int) -> int:
        """Where the delimiter of the sequence lies whose items begin at ``begin``. Raises: as `walk`."""
        return self._sequence_end(begin, end, self._encoding, 0)

    def _element(self, at: int, end: int, encoding: Encoding, depth: int) -> tuple[Element | None, int]:
        """The element at ``at`` and where the next one begins; None at the end of an item."""
        tag, length = self._header(at, end, encoding)
        if tag >> 16 == 0xFFFE:
            return None, at
        vr = b""
        at += 8
        if not encoding.implicit:
            vr = bytes(self._data[at - 4 : at - 2])
            if vr in SHORT:
                length = self._number(at - 2, 2, encoding)
            elif vr in LONG:
                if at + 4 > end:
                    raise TruncatedObject("an element ends early")
                length = self._number(at, 4, encoding)
                at += 4
            else:
                raise NotDicom("an element of an unknown value representation")
        inner = encoding
        if length != UNDEFINED:
            stop = after = at + length
        else:
            if vr == b"UN":
                inner = Encoding(implicit=True)  # PS3.5 §6.2.2, note 2
            stop = self._sequence_end(at, end, inner, depth + 1)
            after = stop + 8
        if after > end:
            raise TruncatedObject("an element ends early")
        return Element(tag, vr, at, stop, inner), after

    def _sequence_end(self, at: int, end: int, encoding: Encoding, depth: int) -> int:
        """Where the delimiter of the sequence whose items begin at ``at`` lies."""
        while True:
            tag, length = self._header(at, end, encoding)
            if tag == _SEQUENCE_END:
                return at
            if tag != _ITEM:
                raise NotDicom("a sequence of something else than items")
            at += 8
            at = at + length if length != UNDEFINED else self._item_end(at, end, encoding, depth) + 8

    def _item_end(self, at: int, end: int, encoding: Encoding, depth: int) -> int:
        """Where the delimiter of the item that begins at ``at`` lies."""
        if depth > DEEPEST:
            raise NotDicom(f"sequences nested more than {DEEPEST} deep")
        while True:
            element, after = self._element(at, end, encoding, depth)
            if element is None:
                if self._header(at, end, encoding)[0] != _ITEM_END:
                    raise NotDicom("an item without its delimiter")
                return at
            at = after

    def _header(self, at: int, end: int, encoding: Encoding) -> tuple[int, int]:
        """The tag at ``at``, and the four bytes behind it as a number."""
        if at + 8 > end:
            raise TruncatedObject("an element ends early")
        group, element = self._number(at, 2, encoding), self._number(at + 2, 2, encoding)
        return group << 16 | element, self._number(at + 4, 4, encoding)

    def _number(self, at: int, nbytes: int, encoding: Encoding) -> int:
        return int.from_bytes(self._data[at : at + nbytes], "little" if encoding.little else "big")
