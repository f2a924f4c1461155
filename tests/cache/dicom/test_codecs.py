"""A frame's samples are those its encoder was given, whatever syntax, depth, sign and colour; or there is an error."""

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import imagecodecs
import msgspec
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from cache.dicom.codecs import (
    BIG_ENDIAN,
    NATIVE_SYNTAXES,
    RLE,
    FrameFormat,
    Picture,
    decode_frame,
    decoders,
    picture,
    reference_frame,
)
from cache.errors import TruncatedObject, UndecodablePixels, UnsupportedPixels
from loadtest.encoders import (
    HTJ2K_LOSSY,
    HTJ2K_SYNTAXES,
    JPEG_2000,
    JPEG_BASELINE,
    JPEG_LOSSLESS_SYNTAXES,
    JPEG_LS,
    LOSSY,
    Unproducible,
    encode,
    expected,
)

from .conftest import Array

LITTLE = "1.2.840.10008.1.2.1"
LOSSLESS = (RLE, *JPEG_LOSSLESS_SYNTAXES, JPEG_LS, JPEG_2000, *HTJ2K_SYNTAXES)
DEPTHS = [(8, 8), (8, 7), (16, 10), (16, 12), (16, 16)]
COLOURS = ["MONOCHROME2", "RGB", "YBR_FULL"]


def form(syntax: str = LITTLE, rows: int = 4, columns: int = 6, **changes: Any) -> FrameFormat:
    """Grey, unsigned, 16 bits, unless changed."""
    fmt = FrameFormat(syntax, rows, columns, 1, "MONOCHROME2", 0, 16, 16, signed=False)
    return msgspec.structs.replace(fmt, **changes)


def drawn(fmt: FrameFormat, seed: int) -> Array:
    """Noise over the whole range, or few values in long runs: what codecs take different ways for."""
    random = np.random.default_rng(seed)
    least, most = fmt.stored_range
    if seed % 2:
        return random.integers(least, most, fmt.shape, fmt.dtype, endpoint=True)
    return np.repeat(random.integers(least, most, (fmt.rows, *fmt.shape[2:]), fmt.dtype, True)[:, None], fmt.columns, 1)


@st.composite
def lossless_frames(draw: st.DrawFn) -> tuple[FrameFormat, Array]:
    allocated, stored = draw(st.sampled_from(DEPTHS))
    colour = draw(st.sampled_from(COLOURS if stored == 8 else COLOURS[:2]))
    fmt = form(
        draw(st.sampled_from([*NATIVE_SYNTAXES, *LOSSLESS])),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        samples_per_pixel=1 if colour == "MONOCHROME2" else 3,
        photometric=colour,
        bits_allocated=allocated,
        bits_stored=stored,
        signed=colour == "MONOCHROME2" and draw(st.booleans()),
    )
    if fmt.transfer_syntax == JPEG_2000:  # the encoder takes nothing smaller
        fmt = msgspec.structs.replace(fmt, rows=fmt.rows + 31, columns=fmt.columns + 31)
    return fmt, drawn(fmt, draw(st.integers(0, 1 << 16)))


@settings(max_examples=150)
@given(lossless_frames())
def test_lossless_frames_come_back_as_they_were(made: tuple[FrameFormat, Array]) -> None:
    """Random frames survive every lossless encoder bit for bit, into a new array and into one that is given."""
    fmt, samples = made
    try:
        value = encode(samples, fmt)[0]
    except Unproducible:  # noise in few pixels grows beyond the encoder's buffer
        reject()
    found = decode_frame(value, fmt)
    assert found.dtype == fmt.dtype
    assert np.array_equal(found, expected(samples, fmt))
    out = np.full(fmt.shape, 7, fmt.dtype)
    assert decode_frame(memoryview(value), fmt, out=out) is out
    assert np.array_equal(out, found)


@pytest.mark.parametrize("syntax", sorted(LOSSY - {HTJ2K_LOSSY}))
def test_lossy_frames_are_as_pydicom_reads_them(syntax: str) -> None:
    """The fast decoder of a lossy syntax gives what pydicom's gives."""
    fmt = form(syntax, 64, 48, bits_allocated=8, bits_stored=8)
    samples = np.add.outer(np.arange(64), 2 * np.arange(48)).astype(np.uint8)
    value = encode(samples, fmt)[0]
    assert np.array_equal(decode_frame(value, fmt), reference_frame(value, fmt))
    assert np.abs(decode_frame(value, fmt).astype(int) - samples).max() < 8


def test_values_that_a_lossy_codestream_overshoots_do_not_wrap() -> None:
    """Black and white edges stay black and white in lossy HTJ2K."""
    fmt = form(HTJ2K_LOSSY, 64, 64, bits_allocated=8, bits_stored=8)
    samples = np.where(np.add.outer(np.arange(64), np.arange(64)) % 11 < 5, 0, 255).astype(np.uint8)
    value = imagecodecs.htj2k_encode(samples, level=0.02, reversible=False)
    assert np.abs(decode_frame(value, fmt).astype(int) - samples).max() < 64
    with pytest.raises(UndecodablePixels):  # its decoder would wrap them, and lossless it is not
        decode_frame(value, msgspec.structs.replace(fmt, transfer_syntax=HTJ2K_SYNTAXES[0]))


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("syntax", NATIVE_SYNTAXES)
def test_unused_bits_are_not_part_of_plain_samples(syntax: str, bits: int) -> None:
    """Bits above Bits Stored may hold anything, in both byte orders and signs."""
    values = np.arange(-12, 12, dtype=np.int16).reshape(4, 6)
    dirty = ((values.view(np.uint16) & 0x0FFF) | 0xA000) if bits == 12 else values.view(np.uint16)
    value = dirty.astype(">u2" if syntax == BIG_ENDIAN else "<u2").tobytes()
    assert np.array_equal(decode_frame(value, form(syntax, bits_stored=bits, signed=True)), values)
    unsigned = decode_frame(value, form(syntax, bits_stored=bits))
    assert np.array_equal(unsigned, values.view(np.uint16) & ((1 << bits) - 1))


def test_plain_samples_are_not_copied() -> None:
    """Where there is nothing to do, the frame is a view of the object."""
    data = bytearray(48)
    frame = decode_frame(memoryview(data), form())
    data[2] = 5
    assert frame[0, 1] == 5


@pytest.mark.parametrize("floating", ["float", "double"])
def test_floating_point_pixels_are_kept(floating: str) -> None:
    """Float and Double Float Pixel Data come back as they are, infinities and NaN included."""
    fmt = form(bits_allocated=64 if floating == "double" else 32, bits_stored=0, floating=floating)
    values = np.linspace(-1e30, 1e30, 24).astype(fmt.dtype).reshape(4, 6)
    values[0, :2] = np.nan, np.inf
    assert np.array_equal(decode_frame(values.tobytes(), fmt), values, equal_nan=True)
    with pytest.raises(UnsupportedPixels):
        decode_frame(b"", msgspec.structs.replace(fmt, transfer_syntax=RLE))


def test_bytes_in_big_endian_words_are_put_in_order() -> None:
    """8-bit samples of VR OW in a big-endian object lie in words, also after an odd number of them."""
    fmt = form(BIG_ENDIAN, 1, 3, bits_allocated=8, bits_stored=8, words=True)
    value = np.array([2, 1, 4, 3, 6, 5], np.uint8).tobytes()
    assert decode_frame(value, fmt).tolist() == [[1, 2, 3]]
    assert decode_frame(value[2:], fmt, skip_bits=8).tolist() == [[4, 5, 6]]


def test_planes_are_interleaved() -> None:
    """Planar configuration 1 gives the same picture as 0."""
    fmt = form(samples_per_pixel=3, photometric="RGB", bits_allocated=8, bits_stored=8)
    samples = drawn(fmt, 1)
    planes = msgspec.structs.replace(fmt, planar_configuration=1)
    assert np.array_equal(decode_frame(np.moveaxis(samples, -1, 0).tobytes(), planes), samples)
    assert np.array_equal(decode_frame(samples.tobytes(), fmt), samples)


@pytest.mark.parametrize("samples", [1, 3])
def test_segments_padded_before_they_were_packed_are_read(samples: int) -> None:
    """RLE of an odd number of bytes a segment, made even by one more value: some encoders do so."""
    fmt = form(RLE, 3, 3, bits_allocated=8, bits_stored=8, samples_per_pixel=samples)
    fmt = msgspec.structs.replace(fmt, photometric="RGB" if samples == 3 else "MONOCHROME2")
    values = drawn(fmt, 1)
    planes = values.reshape(9, samples).T
    offsets = [64 + 12 * number for number in range(samples)] + [0] * (15 - samples)
    header = np.array([samples, *offsets], "<u4").tobytes()
    value = header + b"".join(b"\x09" + plane.tobytes() + b"\0\0" for plane in planes)
    assert np.array_equal(decode_frame(value, fmt), values)


@pytest.mark.parametrize(("marker", "photometric"), [(None, "RGB"), (0, "RGB"), (1, "RGB"), (None, "YBR_FULL")])
def test_the_adobe_marker_tells_the_colour_transform(marker: int | None, photometric: str) -> None:
    """Red stays red, whether the codestream holds RGB or YBR, by its own marker or else by the header."""
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    transformed = marker == 1 or photometric == "YBR_FULL"
    value = imagecodecs.jpeg8_encode(red, 95, colorspace="RGB", outcolorspace="YCBCR" if transformed else "RGB")
    value = without_markers(value)
    if marker is not None:
        value = value[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([marker]) + value[2:]
    fmt = form(JPEG_BASELINE, 16, 16, samples_per_pixel=3, bits_allocated=8, bits_stored=8, photometric=photometric)
    assert np.abs(decode_frame(value, fmt).astype(int) - red).max() <= 2


def test_a_codestream_and_a_header_of_different_colours_are_refused() -> None:
    """RGB by the Adobe marker and YBR_FULL by the header: one of them lies."""
    value = encode(
        np.zeros((16, 16, 3), np.uint8),
        rgb := form(JPEG_BASELINE, 16, 16, samples_per_pixel=3, bits_allocated=8, bits_stored=8, photometric="RGB"),
    )[0]
    with pytest.raises(UndecodablePixels):
        decode_frame(value, msgspec.structs.replace(rgb, photometric="YBR_FULL"))


def without_markers(value: bytes) -> bytes:
    """A JPEG without its JFIF or Adobe segment, which comes first."""
    if value[2:4] in (b"\xff\xe0", b"\xff\xee"):
        return value[:2] + value[4 + int.from_bytes(value[4:6]) :]
    return value


@pytest.mark.parametrize("signed", [False, True])
def test_the_header_decides_on_the_sign_of_jpeg_2000(signed: bool) -> None:
    """A codestream of the other sign holds the same bits."""
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    written = values if not signed else (values.view(np.uint16) & 0x0FFF)
    value = imagecodecs.jpeg2k_encode(written, codecformat="j2k", level=0, reversible=True, bitspersample=12)
    found = decode_frame(value, form(JPEG_2000, 64, 64, bits_stored=12, signed=signed))
    assert np.array_equal(found, values if signed else values.view(np.uint16) & 0x0FFF)


@pytest.mark.parametrize("syntax", [*LOSSLESS, JPEG_BASELINE, HTJ2K_LOSSY])
def test_a_codestream_cut_anywhere_is_undecodable(syntax: str) -> None:
    """No decoder fills in what is missing: not at half, not before the last bytes."""
    fmt = form(syntax, 64, 64, bits_allocated=8, bits_stored=8)
    value = encode(drawn(fmt, 1), fmt)[0].rstrip(b"\0")
    for end in (0, 1, 20, len(value) // 2, len(value) - len(value) // 10, len(value) - 70):
        with pytest.raises(UndecodablePixels):
            decode_frame(value[:end], fmt)


def ends_well(work: Callable[[], object], *, may_hang: bool) -> None:
    """Do it in a process of its own, with a limit.

    Where it ``may_hang``, to be stopped by the limit is as good an end as any, as it is for a job of a worker.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child does nothing that a thread's lock could hold up
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process wherever it is, in C too
            signal.alarm(5 if may_hang else 20)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0 or (may_hang and status == signal.SIGALRM)


@settings(max_examples=150)
@given(st.sampled_from([*LOSSLESS, JPEG_BASELINE, HTJ2K_LOSSY]), st.randoms(use_true_random=False))
def test_spoilt_codestreams_are_refused_or_keep_their_shape(syntax: str, random: Any) -> None:
    """Whatever bits turn, there is a frame of the right shape or a typed refusal, and nothing else is left changed."""
    fmt = form(syntax, 48, 40, bits_allocated=8, bits_stored=8)
    value = bytearray(encode(drawn(fmt, 2), fmt)[0])
    for _ in range(random.randint(1, 8)):
        value[random.randrange(len(value))] ^= 1 << random.randrange(8)

    def decode() -> None:
        hook = sys.unraisablehook
        with contextlib.suppress(UndecodablePixels, UnsupportedPixels):
            assert decode_frame(bytes(value), fmt).shape == fmt.shape
        assert sys.unraisablehook is hook

    # OpenJPH goes on for hours over some codestreams
    ends_well(decode, may_hang=syntax in (*HTJ2K_SYNTAXES, HTJ2K_LOSSY))


def test_what_a_decoder_swallows_is_raised() -> None:
    """OpenJPH's errors within a frame do not leave it half filled."""
    fmt = form(HTJ2K_SYNTAXES[0], 128, 128)
    value = bytearray(encode(drawn(fmt, 1), fmt)[0])
    refused = 0
    for at in range(len(value) // 2, len(value) - 2, len(value) // 60):
        spoilt = value.copy()
        spoilt[at : at + 4] = b"\xff\xff\xff\xff"
        try:
            decode_frame(bytes(spoilt), fmt)
        except UndecodablePixels as error:
            refused += "gave up" in str(error.__cause__)
    assert refused


@pytest.mark.parametrize("syntax", [*LOSSLESS, LITTLE])
def test_a_picture_of_another_shape_is_refused(syntax: str) -> None:
    """Neither fewer rows, nor rows for columns, nor colour for grey."""
    fmt = form(syntax, 64, 32)
    value = encode(drawn(fmt, 1), fmt)[0]
    colour = {"samples_per_pixel": 3, "photometric": "RGB"}
    for lie in ({"rows": 65}, {"columns": 33}, colour):
        with pytest.raises((UndecodablePixels, TruncatedObject)):
            decode_frame(value, msgspec.structs.replace(fmt, **lie))


@pytest.mark.parametrize(
    "lie",
    [
        {"samples_per_pixel": 4},
        {"samples_per_pixel": 2},
        {"samples_per_pixel": 3, "photometric": "CMYK"},
        {"samples_per_pixel": 3, "photometric": "YBR_FULL"},
        {"photometric": "YBR_FULL_422"},
        {"bits_allocated": 12},
        {"bits_stored": 17},
        {"bits_stored": 0},
        {"transfer_syntax": "1.2.840.10008.1.2.4.55"},
        {"transfer_syntax": ""},
    ],
    ids=str,
)
def test_samples_that_nothing_decodes_are_unsupported(lie: dict[str, Any]) -> None:
    """Such a header is refused by its type before any byte is read."""
    with pytest.raises(UnsupportedPixels):
        decode_frame(b"\0" * 4096, form(**lie))


def test_a_codestream_without_a_frame_header_is_no_picture() -> None:
    """Neither nothing, nor an endless run of markers, nor half a header."""
    for codestream in (
        b"",
        b"\xff\xd8",
        b"\xff" * 100,
        b"\xff\xd8\xff\xe0\x00\x04ab",
        b"\xff\x4f\xff\x51" + b"\0" * 30,
    ):
        with pytest.raises(ValueError, match="frame header"):
            picture(codestream)
    jpeg = imagecodecs.jpegls_encode(np.zeros((5, 9), np.uint16))
    assert picture(jpeg) == Picture(5, 9, 1, 16)


@pytest.mark.parametrize("syntax", [JPEG_2000, HTJ2K_SYNTAXES[0]])
def test_a_main_header_that_goes_on_is_another_one(syntax: str) -> None:
    """A codestream that begins as the one before it, but says more, is read for what it says."""
    fmt = form(syntax, 64, 64)
    value = encode(drawn(fmt, 1), fmt)[0]
    assert np.array_equal(decode_frame(value, fmt), drawn(fmt, 1))
    at = picture(value).tiles
    longer = value[:at] + b"\xff\x64\x00\x06\x00\x01hi" + value[at:]
    assert picture(longer).tiles == at + 8
    assert picture(value).tiles == at
    assert np.array_equal(decode_frame(longer, fmt), drawn(fmt, 1))
    irreversible = bytearray(value)
    cod = value.index(b"\xff\x52")
    irreversible[cod + 13] = 0
    assert picture(bytes(irreversible)).reversible != picture(value).reversible


def test_every_decoder_is_named_with_its_version() -> None:
    """Lineage tells library and version for each syntax."""
    table = decoders()
    assert table[JPEG_LS].startswith("charls ")
    assert all(any(part[0].isdigit() for part in text.split()) for text in table.values())
