"""Palettes give each index its colour, in tables written out or in segments, as pydicom has it."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.pixels.processing import apply_color_lut

from cache.dicom.palette import Palette, palette
from cache.errors import UndecodablePixels, UnsupportedPixels

from .conftest import Array, volume_of
from .test_pictures import FRAMES


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_gives_each_index_its_colour(bits: int) -> None:
    """Indices before the first entry take its colour, those after the last that one's."""
    table = np.arange(1, 5, dtype=f"<u{bits // 8}")
    lut = Palette(4, 10, bits, table.tobytes(), (table * 2).tobytes(), (table * 3).tobytes())
    colours = palette(np.array([[0, 10, 11], [12, 13, 99]], np.uint8), lut)
    assert colours.dtype == table.dtype.newbyteorder("=")
    assert colours[..., 0].tolist() == [[1, 1, 2], [3, 4, 4]]
    assert colours[1, 2].tolist() == [4, 8, 12]


def test_a_palette_may_hold_bytes_in_words_but_not_less_than_it_says() -> None:
    """8-bit entries in words of their own are common; a short table is refused."""
    words = np.arange(4, dtype="<u2").tobytes()
    assert palette(np.arange(4), Palette(4, 0, 8, words, words, words))[:, 0].tolist() == [0, 1, 2, 3]
    for lut in (Palette(5, 0, 16, words, words, words), Palette(4, 0, 12, words, words, words)):
        with pytest.raises(UndecodablePixels):
            palette(np.arange(4), lut)
    ones = b"\1\0" * 65536
    assert len(palette(np.array([65535]), Palette(0, 0, 16, ones, ones, ones))) == 1


def segmented(entries: int, bits: int, *segments: int) -> Palette:
    data = np.array(segments, f"<u{bits // 8}").tobytes()
    return Palette(entries, 0, bits, data, data, data, segmented=True)


def expanded(lut: Palette) -> list[int]:
    colours: list[int] = palette(np.arange(lut.entries), lut)[:, 0].tolist()
    return colours


def test_segments_are_values_lines_and_earlier_segments() -> None:
    """A line goes on from the value before it, also where an earlier segment is used once more."""
    assert expanded(segmented(4, 8, 0, 4, 7, 9, 250, 3)) == [7, 9, 250, 3]
    assert expanded(segmented(6, 8, 0, 1, 10, 1, 5, 20)) == [10, 12, 14, 16, 18, 20]
    assert expanded(segmented(3, 16, 0, 1, 60000, 1, 2, 0)) == [60000, 30000, 0]
    assert expanded(segmented(7, 8, 0, 1, 4, 1, 2, 8, 2, 2, 0, 0, 0, 0, 0, 1, 99)) == [4, 6, 8, 4, 6, 8, 99]


@pytest.mark.parametrize(
    "lut",
    [
        segmented(5, 8, 0, 4, 7, 9, 250, 3),
        segmented(3, 8, 0, 4, 7, 9, 250, 3),
        segmented(4, 8, 0, 9, 7, 9, 250, 3),
        segmented(4, 8, 1, 4, 250),
        segmented(4, 8, 3, 4, 250),
        segmented(4, 8, 0, 0),
        segmented(4, 8, 0, 1, 4, 2, 1, 3, 0, 0, 0),
        segmented(65535, 16, 0, 1, 4, *[1, 65535, 9] * 100),
    ],
    ids=["short", "long", "cut short", "from nowhere", "unknown", "empty", "of itself", "without end"],
)
def test_segments_that_make_no_table_are_refused(lut: Palette) -> None:
    """Too few entries or too many, a line before any value, and segments that nobody knows."""
    with pytest.raises(UndecodablePixels):
        expanded(lut)


def test_sixteen_bits_that_refer_to_themselves_are_refused() -> None:
    """What the offset counts there is read in two ways."""
    with pytest.raises(UnsupportedPixels):
        expanded(segmented(2, 16, 0, 1, 4, 2, 1, 0, 0))


SEGMENTS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 255), min_size=1, max_size=9).map(lambda values: [0, len(values), *values]),
        st.tuples(st.integers(1, 20), st.integers(0, 255)).map(lambda line: [1, *line]),
    ),
    min_size=1,
    max_size=6,
)


def with_segments(data: bytes, descriptor: list[int], segments: bytes) -> bytes:
    """The object as a picture whose three tables have this descriptor and these segments."""
    ds = pydicom.dcmread(BytesIO(data))
    ds.PhotometricInterpretation = "PALETTE COLOR"
    # indices beyond 255 wrap round in pydicom, where the entries have 8 bits
    ds.PixelData = (np.arange(ds.Rows * ds.Columns) % 200).astype("<u2").tobytes()
    for place in range(3):
        ds.add_new(0x00281101 + place, "US", descriptor)
        ds.add_new(0x00281221 + place, "OW", segments)
    out = BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


Both = Callable[[list[int], bytes], tuple[Array, Array]]


@pytest.fixture(scope="module")
def both(phantom: list[bytes]) -> Both:
    """The colours of such an object by us and by pydicom."""

    def colours(descriptor: list[int], segments: bytes) -> tuple[Array, Array]:
        data = with_segments(phantom[0], descriptor, segments)
        ds = pydicom.dcmread(BytesIO(data))
        return volume_of([data], FRAMES)[1][0], apply_color_lut(ds.pixel_array, ds)

    return colours


@given(bits=st.sampled_from([8, 16]), first=st.integers(0, 255), segments=SEGMENTS)
def test_segments_expand_as_in_pydicom(both: Both, bits: int, first: int, segments: list[list[int]]) -> None:
    """Values and lines of any lengths, in a whole object."""
    words = [0, 1, first, *(word for segment in segments for word in segment)]
    entries = 1 + sum(segment[1] for segment in segments)
    data = np.array(words, f"<u{bits // 8}").tobytes()
    assert np.array_equal(*both([entries, 3, bits], data))
