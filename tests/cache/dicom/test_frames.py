"""Frame N is what it would be alone, found by table or by item headers; tables that lie are refused."""

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate, encapsulate_extended

from cache.dicom.codecs import RLE, FrameFormat, decode_frame
from cache.dicom.frames import FrameIndex, frame_spans
from cache.errors import BadSource, TruncatedObject, UndecodablePixels
from loadtest.encoders import HTJ2K_SYNTAXES, JPEG_2000, JPEG_LOSSLESS_SYNTAXES, JPEG_LS, encode

from .conftest import Array

LITTLE = "1.2.840.10008.1.2.1"
BIG = "1.2.840.10008.1.2.2"
SYNTAXES = (RLE, JPEG_LOSSLESS_SYNTAXES[1], JPEG_LS, JPEG_2000, HTJ2K_SYNTAXES[0])


def form(syntax: str, rows: int = 32, columns: int = 32, **changes: Any) -> FrameFormat:
    fmt = FrameFormat(syntax, rows, columns, 1, "MONOCHROME2", 0, 16, 16, signed=False)
    return msgspec.structs.replace(fmt, **changes)


def made(fmt: FrameFormat, frames: int) -> tuple[list[Array], list[bytes]]:
    random = np.random.default_rng(frames)
    pictures = [random.integers(0, 4096, fmt.shape, fmt.dtype) for _ in range(frames)]
    return pictures, [encode(picture, fmt)[0] for picture in pictures]


def value_of(frames: list[bytes], has_bot: bool, fragments: int = 1) -> bytes:
    """Items without the closing delimiter, as the header finds them."""
    value: bytes = encapsulate(frames, fragments_per_frame=fragments, has_bot=has_bot)
    return value.removesuffix(b"\xfe\xff\xdd\xe0\0\0\0\0")


def travelled(index: FrameIndex) -> FrameIndex:
    return msgspec.json.decode(msgspec.json.encode(index), type=FrameIndex)


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("has_bot", [True, False])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_each_frame_is_what_it_would_be_alone(syntax: str, has_bot: bool, fragments: int) -> None:
    """By basic offset table or without one, in one fragment or in several; the index survives its journey."""
    fragments = 1 if syntax == RLE else fragments  # a frame of RLE is one fragment (PS3.5 §A.4.2)
    fmt = form(syntax)
    pictures, frames = made(fmt, 4)
    data = memoryview(b"before" + value_of(frames, has_bot, fragments) + b"behind")
    index = travelled(frame_spans(data, 6, len(data) - 12, fmt, 4))
    for number in (2, 0, 3, 1):
        assert index.skip_bits(number) == 0
        assert np.array_equal(decode_frame(index.frame(data, number), fmt), pictures[number])
    for number in (-1, 4):
        with pytest.raises(IndexError):
            index.frame(data, number)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_extended_offset_table_finds_frames(syntax: str) -> None:
    """Extended offsets and lengths are enough."""
    fmt = form(syntax)
    pictures, frames = made(fmt, 3)
    value, offsets, lengths = encapsulate_extended(frames)
    data = memoryview(value.removesuffix(b"\xfe\xff\xdd\xe0\0\0\0\0"))
    index = frame_spans(data, 0, len(data), fmt, 3, extended=(offsets, lengths))
    for number, picture in enumerate(pictures):
        assert np.array_equal(decode_frame(index.frame(data, number), fmt), picture)


def test_a_frame_is_found_without_those_before_it() -> None:
    """With a table, bytes of other frames may be anything: they are not read."""
    fmt = form(JPEG_LS)
    pictures, frames = made(fmt, 5)
    value = bytearray(value_of(frames, has_bot=True))
    index = frame_spans(memoryview(value), 0, len(value), fmt, 5)
    start = index.starts[3]
    value[8 + 20 : start] = b"\xaa" * (start - 28)
    value[index.starts[4] :] = b"\xaa" * (len(value) - index.starts[4])
    again = frame_spans(memoryview(value), 0, len(value), fmt, 5)
    assert np.array_equal(decode_frame(again.frame(memoryview(value), 3), fmt), pictures[3])
    with pytest.raises(UndecodablePixels):
        again.frame(memoryview(value), 2)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_lone_frame_is_all_fragments(syntax: str) -> None:
    """Whatever its table says: there is nothing to find."""
    fmt = form(syntax)
    [picture], [frame] = made(fmt, 1)
    value = bytearray(value_of([frame], has_bot=True, fragments=1 if syntax == RLE else 4))
    value[8:12] = b"\xff\xff\0\0"
    index = frame_spans(memoryview(value), 0, len(value), fmt, 1)
    assert np.array_equal(decode_frame(index.frame(memoryview(value), 0), fmt), picture)


@pytest.mark.parametrize(
    "lie", [[0, 4, 8], [8, 100, 200], [0, 0, 0], [0, 200, 100], [0, 100, 1 << 31], [0, 100]], ids=str
)
def test_a_table_that_lies_is_refused(lie: list[int]) -> None:
    """Offsets out of order, beyond the end, too few or into the middle of a fragment give a typed error."""
    fmt = form(RLE)
    _, frames = made(fmt, 3)
    items = value_of(frames, has_bot=False)[8:]
    table = np.array(lie, "<u4").tobytes()
    data = memoryview(b"\xfe\xff\x00\xe0" + len(table).to_bytes(4, "little") + table + items)
    with pytest.raises(BadSource):
        index = frame_spans(data, 0, len(data), fmt, 3)
        for number in range(3):
            index.frame(data, number)


@pytest.mark.parametrize("change", ["count", "lengths", "huge", "short"])
def test_an_extended_table_that_lies_is_refused(change: str) -> None:
    """Other lengths than those of the frames, or other counts, give a typed error."""
    fmt = form(RLE)
    _, frames = made(fmt, 3)
    value, offsets, lengths = encapsulate_extended(frames)
    lies = {
        "count": (offsets[:-8], lengths),
        "lengths": (offsets, lengths[:-8]),
        "huge": (offsets, b"\xff" * 24),
        "short": (offsets, np.array([10, 10, 10], "<u8").tobytes()),
    }
    data = memoryview(value)[:-8]
    with pytest.raises(UndecodablePixels):
        frame_spans(data, 0, len(data), fmt, 3, extended=lies[change])


@pytest.mark.parametrize("declared", [2, 4])
def test_fragments_that_do_not_tell_the_frames_are_refused(declared: int) -> None:
    """Without a table, more or fewer beginnings than frames are no index."""
    fmt = form(JPEG_LS)
    _, frames = made(fmt, 3)
    data = memoryview(value_of(frames, has_bot=False, fragments=1))
    with pytest.raises(UndecodablePixels):
        frame_spans(data, 0, len(data), fmt, declared)


@pytest.mark.parametrize(("syntax", "words"), [(LITTLE, False), (BIG, True), (BIG, False)])
@pytest.mark.parametrize("bits", [1, 8])
def test_plain_frames_that_share_units_come_apart(syntax: str, words: bool, bits: int) -> None:
    """One-bit frames follow each other without padding, and bytes of odd frames may share a big-endian word."""
    fmt = form(syntax, 3, 7, bits_allocated=bits, bits_stored=bits, words=words)
    random = np.random.default_rng(bits)
    pictures = random.integers(0, 2 if bits == 1 else 256, (5, 3, 7), np.uint8)
    value = np.packbits(pictures, bitorder="little").tobytes() if bits == 1 else pictures.tobytes()
    value += b"\0" * (len(value) % 2)
    if words:
        value = np.frombuffer(value, ">u2").astype("<u2").tobytes()
    data = memoryview(value)
    index = travelled(frame_spans(data, 0, len(data), fmt, 5))
    for number, picture in enumerate(pictures):
        found = decode_frame(index.frame(data, number), fmt, skip_bits=index.skip_bits(number))
        assert np.array_equal(found, picture)


def test_plain_frames_are_views() -> None:
    """Nothing is copied to reach a frame of plain samples."""
    fmt = form(LITTLE, 2, 2)
    data = bytearray(24)
    index = frame_spans(memoryview(data), 0, 24, fmt, 3)
    frame = decode_frame(index.frame(memoryview(data), 1), fmt)
    data[8] = 9
    assert frame[0, 0] == 9
    with pytest.raises(TruncatedObject):
        frame_spans(memoryview(data), 0, 24, fmt, 4)
    with pytest.raises(TruncatedObject):
        index.frame(memoryview(data)[:20], 2)


@settings(max_examples=200)
@given(st.binary(max_size=80), st.integers(1, 4), st.integers(0, 90), st.booleans())
def test_arbitrary_bytes_end_in_frames_or_typed_errors(junk: bytes, frames: int, nbytes: int, headed: bool) -> None:
    """However the items lie, reading stays within the pixel data."""
    data = memoryview((b"\xfe\xff\x00\xe0\0\0\0\0" if headed else b"") + junk)
    fmt = form(JPEG_LS)
    try:
        index = frame_spans(data, 0, nbytes, fmt, frames)
        spans = [index.frame(data, number) for number in range(frames)]
    except BadSource:
        return
    assert sum(len(span) for span in spans) <= nbytes
    assert all(one < other for one, other in pairwise(index.starts))
