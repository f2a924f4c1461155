"""One frame's bytes to its samples: every transfer syntax has one decoder, named in the lineage.

The fast one decides. pydicom's decoders are the reference that tests and `make conformance` compare it with; they never
step in when it fails, because the same object would then give other values from one day to the next.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any, Final, Literal, NamedTuple

import imagecodecs
import msgspec
import numpy as np
import numpy.typing as npt

from cache.errors import MalformedUid, TruncatedObject, UndecodablePixels, UnsupportedPixels
from cache.keys import check_uid

Array = npt.NDArray[Any]

DEFLATED: Final = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
RLE: Final = "1.2.840.10008.1.2.5"
JPEG_LOSSLESS: Final = "1.2.840.10008.1.2.4.57"
JPEG_LOSSLESS_SV1: Final = "1.2.840.10008.1.2.4.70"

#: Transfer syntaxes whose pixels are plain samples.
NATIVE_SYNTAXES: Final = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", DEFLATED, BIG_ENDIAN)

#: Raise it when the values that plain samples, or anything done here after a codec, come to change.
_OURS: Final = "1"

_YBR: Final = ("YBR_FULL", "YBR_FULL_422")
#: The terms that PS3.3 §C.7.6.3.1.2 defines; messages repeat no others, which could be anything.
_PHOTOMETRIC: Final = frozenset(
    {
        *("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "XYB"),
        *("YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT"),
    }
)
#: OpenJPEG computes in 32-bit integers, and the wavelet needs some of them for itself.
_MOST_JPEG_2000_BITS: Final = 24


class FrameFormat(msgspec.Struct, frozen=True):
    """What the header says of each frame's bytes (PS3.3 §C.7.6.3, PS3.5 §8).

    ``floating``: the frame comes from Float or Double Float Pixel Data (PS3.3 §C.7.6.24, §C.7.6.25). ``words``: samples
    of 1 or 8 bits lie in big-endian 16-bit words, as Pixel Data of VR OW does in big-endian objects (PS3.5 §A.3).
    """

    transfer_syntax: str
    rows: int
    columns: int
    samples_per_pixel: int
    photometric: str
    planar_configuration: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    floating: Literal["", "float", "double"] = ""
    words: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns), or (rows, columns, 3) of colour."""
        return (self.rows, self.columns) if self.samples_per_pixel == 1 else (self.rows, self.columns, 3)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a decoded frame, in native byte order; one byte a sample where the object has one bit.

        Raises: UnsupportedPixels: no such sample can be held.
        """
        return _dtype(self.floating, self.bits_allocated, self.signed)

    @property
    def stored_range(self) -> tuple[int, int]:
        """The least and the greatest value that ``bits_stored`` bits can hold."""
        if self.signed:
            return -(1 << (self.bits_stored - 1)), (1 << (self.bits_stored - 1)) - 1
        return 0, (1 << self.bits_stored) - 1

    @property
    def unit_bits(self) -> int:
        """Bits of the units that plain samples come in: a frame may begin within one, never a unit within two."""
        return 16 if self.words else 8

    @property
    def frame_bits(self) -> int:
        """Bits of one frame of plain samples. Frames of one-bit samples follow each other without padding."""
        samples = self.rows * self.columns * self.samples_per_pixel
        if self.photometric == "YBR_FULL_422":  # two pixels share their colour differences (PS3.3 §C.7.6.3.1.2)
            return samples * self.bits_allocated * 2 // 3
        return samples * self.bits_allocated


@cache  # it is asked several times a frame, and there are few answers
def _dtype(floating: str, bits_allocated: int, signed: bool) -> np.dtype[Any]:
    if floating:
        return np.dtype("f4" if floating == "float" else "f8")
    if bits_allocated not in (1, 8, 16, 32, 64):
        raise UnsupportedPixels(f"samples of {bits_allocated} bits")
    return np.dtype(f"{'i' if signed and bits_allocated > 1 else 'u'}{max(1, bits_allocated // 8)}")


class Picture(NamedTuple):
    """What a codestream says of itself.

    ``transform``: the colour transform that an Adobe segment names, or None. ``tiles``: where JPEG 2000's first
    tile-part begins.
    """

    rows: int
    columns: int
    samples: int
    bits: int
    signed: bool = False
    reversible: bool = True
    transform: int | None = None
    tiles: int = 0


class _Codec(NamedTuple):
    """``decode(codestream, format, picture, out)``; ``name`` and its version go into the lineage."""

    name: Callable[[], str]
    decode: Callable[[memoryview, FrameFormat, Picture, Array | None], Array]


def decode_frame(value: memoryview | bytes, fmt: FrameFormat, *, skip_bits: int = 0, out: Array | None = None) -> Array:
    """The samples of one frame: ``fmt.shape``, ``fmt.dtype``, colour as RGB, without what lies above Bits Stored.

    ``value`` is the frame's plain samples, of which the first ``skip_bits`` bits belong to the frame before, or its
    whole codestream (see `frames`). PALETTE COLOR stays indices. Plain samples that need nothing done come back as a
    read-only view of ``value``. With ``out`` (C-contiguous, ``fmt.shape`` and ``fmt.dtype``; a volume's slice of
    another type but the same width can be viewed as that) the samples end there, written by the codec itself where
    it can, and ``out`` is returned.

    Raises:
        UnsupportedPixels: nothing here decodes such samples.
        TruncatedObject: ``value`` is shorter than the frame.
        UndecodablePixels: the codestream is broken, is cut short, or is not the picture that ``fmt`` describes.
    """
    _check(fmt)
    if fmt.transfer_syntax in NATIVE_SYNTAXES:
        array = _native(memoryview(value), fmt, skip_bits)
    elif (codec := _CODECS.get(fmt.transfer_syntax)) is not None:
        array = _decoded(codec, memoryview(value), fmt, out)
    else:
        raise UnsupportedPixels(f"no decoder for transfer syntax {told_syntax(fmt.transfer_syntax)}")
    if out is None:
        return array
    if array.__array_interface__["data"] != out.__array_interface__["data"]:
        np.copyto(out, array, casting="no")
    return out


def reference_frame(value: memoryview | bytes, fmt: FrameFormat) -> Array:
    """The same through pydicom's decoders, whichever of them are installed: what `decode_frame` is compared with.

    Raises: UndecodablePixels: pydicom cannot.
    """
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder

    keyword = {"": "PixelData", "float": "FloatPixelData", "double": "DoubleFloatPixelData"}[fmt.floating]
    native = fmt.transfer_syntax in NATIVE_SYNTAXES
    colour = {"planar_configuration": fmt.planar_configuration} if fmt.samples_per_pixel > 1 else {}
    whole = {} if fmt.floating else {"bits_stored": fmt.bits_stored, "pixel_representation": int(fmt.signed)}
    with _foreign(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array, _ = get_decoder(fmt.transfer_syntax).as_array(
            bytes(value) if native else encapsulate([bytes(value)]),
            index=0,
            rows=fmt.rows,
            columns=fmt.columns,
            number_of_frames=1,
            samples_per_pixel=fmt.samples_per_pixel,
            photometric_interpretation=fmt.photometric,
            bits_allocated=fmt.bits_allocated,
            pixel_keyword=keyword,
            pixel_vr="OW" if fmt.words else "OB",
            **whole,
            **colour,
        )
    reference: Array = array
    return reference


def decoders() -> dict[str, str]:
    """What decodes each transfer syntax, with its version: part of the lineage and of the recipe's digest."""
    plain = dict.fromkeys(NATIVE_SYNTAXES, f"native {_OURS}")
    through = f"imagecodecs {version('imagecodecs')}"
    return plain | {uid: f"{codec.name()}, {through}, voxcache {_OURS}" for uid, codec in _CODECS.items()}


def picture(codestream: bytes | memoryview) -> Picture:
    """What the picture in a codestream of JPEG, JPEG-LS or JPEG 2000 is, by its main header alone.

    It is in the SIZ and COD segments of JPEG 2000 (ITU-T T.800 §A.5.1, §A.6.1), in the frame header of JPEG (T.81
    §B.2.2) and JPEG-LS (T.87 §C.2.2).

    Raises: ValueError: there is no such header, or its components differ in size or depth.
    """
    head = memoryview(codestream)
    main, known = _LATEST[0]
    if known is not None and head[: len(main)] == main:
        return known
    siz = _codestream_2000(head)
    if siz < 0:
        return _jpeg_picture(head)
    found = _jpeg_2000_picture(head[siz:], siz)
    if bytes(head[found.tiles : found.tiles + 2]) == b"\xff\x90":
        _LATEST[0] = bytes(head[: found.tiles + 2]), found
    return found


#: The latest main header of JPEG 2000, to the marker that ends it, and what it says: slices of a series begin with the
#: same bytes as a rule, and to read them takes longer than to compare them.
_LATEST: Final[list[tuple[bytes, Picture | None]]] = [(b"", None)]


def _codestream_2000(head: memoryview) -> int:
    """Where the codestream of JPEG 2000 begins, which a JP2 file's boxes may precede; -1 for none."""
    if bytes(head[:8]) == b"\x00\x00\x00\x0cjP  ":
        return bytes(head[:_LONGEST_BOXES]).find(b"\xff\x4f\xff\x51")
    return 0 if bytes(head[:4]) == b"\xff\x4f\xff\x51" else -1


#: Colour profiles are what may take room in a JP2 file before its codestream.
_LONGEST_BOXES: Final = 1 << 20


def _jpeg_2000_picture(head: memoryview, begin: int) -> Picture:
    samples = int.from_bytes(head[40:42])
    parts = bytes(head[42 : 42 + 3 * samples])
    if samples < 1 or len(parts) < 3 * samples:
        raise ValueError("the codestream has no whole frame header")
    if parts != parts[:3] * samples or parts[1:3] != b"\1\1":
        raise ValueError("the codestream's components differ, or are subsampled")
    width, height, left, top = (int.from_bytes(head[at : at + 4]) for at in (8, 12, 16, 20))
    depth = parts[0]
    reversible, tiles = True, len(head)
    for marker, at, nbytes in _segments(head, 2):
        if marker == 0x52:  # COD: SGcod ends at 5, and the transformation is the fifth byte of SPcod
            if nbytes < 12:
                raise ValueError("the codestream's coding style is cut short")
            reversible = head[at + 13] == 1
        elif marker == 0x90:
            tiles = at
            break
    return Picture(
        height - top, width - left, samples, (depth & 0x7F) + 1, depth > 0x7F, reversible, tiles=begin + tiles
    )


def _jpeg_picture(head: memoryview) -> Picture:
    transform = None
    for marker, at, nbytes in _segments(head, 2):
        if marker == 0xEE and nbytes >= 14 and bytes(head[at + 4 : at + 9]) == b"Adobe":
            transform = head[at + 15]
        if (marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC))) and nbytes >= 8:
            rows, columns = int.from_bytes(head[at + 5 : at + 7]), int.from_bytes(head[at + 7 : at + 9])
            return Picture(rows, columns, head[at + 9], head[at + 4], transform=transform)
    raise ValueError("the codestream has no frame header")


def _segments(head: memoryview, at: int) -> Iterator[tuple[int, int, int]]:
    """Marker, offset and length (as the segment gives it, without the marker) of each whole segment from ``at`` on."""
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:  # fill bytes may precede any marker
            at += 1
            continue
        nbytes = int.from_bytes(head[at + 2 : at + 4])
        if at + 2 + nbytes > len(head):
            return
        yield marker, at, nbytes
        at += 2 + nbytes


def told_syntax(uid: str) -> str:
    """The transfer syntax for a message: whatever else than a UID stands in its place is not repeated."""
    with contextlib.suppress(MalformedUid):
        return check_uid(uid)
    return "unknown"


def _told_colours(photometric: str) -> str:
    return photometric if photometric in _PHOTOMETRIC else "what PS3.3 does not define"


@lru_cache(maxsize=256)  # a series has one format, or a few
def _check(fmt: FrameFormat) -> None:
    """Refuse what no decoder can be trusted with."""
    bits = fmt.dtype.itemsize * 8
    if fmt.samples_per_pixel not in (1, 3):
        raise UnsupportedPixels(f"pixels of {fmt.samples_per_pixel} samples")
    if not fmt.floating and not 1 <= fmt.bits_stored <= bits:
        raise UnsupportedPixels(f"samples of {fmt.bits_stored} bits in {fmt.bits_allocated}")
    if fmt.samples_per_pixel == 3 and fmt.photometric not in ("RGB", "YBR_ICT", "YBR_RCT", *_YBR):
        raise UnsupportedPixels(f"colours given as {_told_colours(fmt.photometric)}")
    if fmt.photometric in _YBR and (bits, fmt.bits_stored, fmt.signed) != (8, 8, False):
        raise UnsupportedPixels("luminance and colour differences of other than 8 bits")
    if fmt.samples_per_pixel == 1 and fmt.photometric.startswith(("YBR", "RGB")):
        raise UnsupportedPixels(f"one sample a pixel cannot be {_told_colours(fmt.photometric)}")


# ------------------------------------------------------------------ plain samples


class _Plain(NamedTuple):
    """Frames of plain samples of one format: what their bytes are read as, in how many, and whether they are stored
    as they come, pixel after pixel."""

    dtype: np.dtype[Any]
    samples: int
    nbytes: int
    simple: bool


@lru_cache(maxsize=256)  # as of `_check`
def _plain(fmt: FrameFormat) -> _Plain:
    samples = fmt.rows * fmt.columns * fmt.samples_per_pixel
    dtype = fmt.dtype.newbyteorder(">" if fmt.transfer_syntax == BIG_ENDIAN else "<")
    simple = fmt.bits_allocated > 1 and fmt.samples_per_pixel == 1 and not fmt.words
    return _Plain(dtype, samples, samples * dtype.itemsize, simple)


def _native(value: memoryview, fmt: FrameFormat, skip_bits: int) -> Array:
    """Plain samples (PS3.5 §8.1.1, §8.2)."""
    plain = _plain(fmt)
    if plain.simple:
        if len(value) < plain.nbytes:
            raise TruncatedObject("the pixel data ends early")
        return _clean(np.frombuffer(value, plain.dtype, plain.samples), fmt).reshape(fmt.shape)
    needed = -(-(skip_bits + fmt.frame_bits) // fmt.unit_bits) * fmt.unit_bits // 8
    if len(value) < needed:
        raise TruncatedObject("the pixel data ends early")
    if fmt.words:
        value = np.frombuffer(value, ">u2", needed // 2).astype("<u2").data.cast("B")
    if fmt.bits_allocated == 1:
        bits = np.unpackbits(np.frombuffer(value, np.uint8), count=skip_bits + plain.samples, bitorder="little")
        return _interleaved(bits[skip_bits:], fmt).view(fmt.dtype)
    value = value[skip_bits // 8 :]
    if fmt.photometric == "YBR_FULL_422":
        return _rgb(_full(np.frombuffer(value, np.uint8, fmt.frame_bits // 8), fmt))
    used = _clean(_interleaved(np.frombuffer(value, plain.dtype, plain.samples), fmt), fmt)
    return _rgb(used) if fmt.photometric in _YBR else used


def _interleaved(samples: Array, fmt: FrameFormat) -> Array:
    """As rows of pixels, whether samples of a colour lie together or not (PS3.3 §C.7.6.3.1.3)."""
    if fmt.samples_per_pixel > 1 and fmt.planar_configuration == 1:
        return np.moveaxis(samples.reshape(3, fmt.rows, fmt.columns), 0, -1)
    return samples.reshape(fmt.shape)


def _clean(stored: Array, fmt: FrameFormat) -> Array:
    """In native byte order, without the bits above Bits Stored, which may hold anything (PS3.5 §8.1.1)."""
    stored = stored if stored.dtype.isnative else stored.astype(fmt.dtype)
    if fmt.floating or _fits(stored, fmt):
        return stored
    unused = stored.dtype.itemsize * 8 - fmt.bits_stored
    used: Array = (stored << unused) >> unused if fmt.signed else stored & stored.dtype.type(fmt.stored_range[1])
    return used


def _fits(stored: Array, fmt: FrameFormat) -> bool:
    """No value needs more than Bits Stored: then the bits above them repeat the sign, or are zero."""
    if fmt.bits_stored >= stored.dtype.itemsize * 8:
        return True
    if fmt.signed:
        least, most = fmt.stored_range
        return bool(stored.max() <= most) and bool(stored.min() >= least)
    return int(np.maximum.reduce(stored, axis=None)) >> fmt.bits_stored == 0


def _full(samples: Array, fmt: FrameFormat) -> Array:
    """YBR_FULL_422 (two luminances, then their two colour differences) with colour differences for each pixel."""
    if fmt.columns % 2:
        raise UnsupportedPixels("YBR_FULL_422 of an odd number of columns")
    pairs = samples.reshape(fmt.rows, fmt.columns // 2, 4)
    full = np.empty(fmt.shape, np.uint8)
    full[..., 0] = pairs[..., :2].reshape(fmt.rows, fmt.columns)
    full[..., 1:] = np.repeat(pairs[..., 2:], 2, axis=1)
    return full


#: Red, green and blue from Y, CB - 128 and CR - 128: the inverse of PS3.3 §C.7.6.3.1.2.
_TO_RGB: Final = np.array(
    [[1.0, 0.0, 1.402], [1.0, -0.114 * 1.772 / 0.587, -0.299 * 1.402 / 0.587], [1.0, 1.772, 0.0]], np.float32
)


def _rgb(ybr: Array) -> Array:
    """RGB of 8-bit YBR_FULL, for what no codec converts."""
    exact = (ybr.astype(np.float32) - np.array([0, 128, 128], np.float32)) @ _TO_RGB.T
    rgb: Array = np.clip(np.floor(exact + 0.5), 0, 255).astype(np.uint8)
    return rgb


# ------------------------------------------------------------------ codestreams


def _decoded(codec: _Codec, value: memoryview, fmt: FrameFormat, out: Array | None) -> Array:
    if fmt.floating:
        raise UnsupportedPixels("floating-point numbers cannot be compressed")
    with _foreign():
        if fmt.transfer_syntax == RLE:
            found = Picture(fmt.rows, fmt.columns, fmt.samples_per_pixel, fmt.bits_stored, fmt.signed)
        else:
            found = picture(value)
        # A picture of another size would cost what it claims, not what we expect.
        if found[:3] != (fmt.rows, fmt.columns, fmt.samples_per_pixel):
            raise ValueError("the codestream has another size than the header says")
        array = codec.decode(value, fmt, found, out if out is not None and _takes(out, fmt, found) else None)
        if array.shape != fmt.shape or array.dtype.kind not in "iu":
            raise ValueError("the decoder gave something else than its codestream announced")
    if fmt.transfer_syntax == RLE:
        return _clean(array, fmt)
    stored = _signed(array, fmt, found)
    if not _fits(stored, fmt):
        raise UndecodablePixels(f"its codestream holds values of more than {fmt.bits_stored} bits")
    return stored.astype(fmt.dtype, copy=False)


def _takes(out: Array, fmt: FrameFormat, found: Picture) -> bool:
    """The codec's own samples are as wide as those wanted."""
    return (
        fmt.samples_per_pixel == 1
        and out.flags.c_contiguous
        and (8 if found.bits <= 8 else 16 if found.bits <= 16 else 32) == 8 * out.itemsize
    )


def _signed(array: Array, fmt: FrameFormat, found: Picture) -> Array:
    """Samples with the header's sign, which the codestream may not know (JPEG, JPEG-LS) or deny (JPEG 2000).

    The codestream's own depth tells which bit is the sign (PS3.5 §8.2.1, §8.2.3, §8.2.4).
    """
    width = 8 * array.itemsize
    if fmt.signed and array.dtype.kind == "u":
        array = array.view(f"i{array.itemsize}")
        if unused := width - found.bits:
            np.left_shift(array, unused, out=array)
            np.right_shift(array, unused, out=array)
    elif not fmt.signed and array.dtype.kind == "i":
        array = array.view(f"u{array.itemsize}")
        if width > found.bits:
            np.bitwise_and(array, (1 << found.bits) - 1, out=array)
    return array


@contextlib.contextmanager
def _foreign() -> Iterator[None]:
    """Whatever a decoder raises becomes UndecodablePixels; lack of memory stays what it is."""
    try:
        yield
    except (MemoryError, UndecodablePixels, UnsupportedPixels, TruncatedObject):
        raise
    except BaseException as error:  # decoders raise what they like, those written in Rust even beside Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UndecodablePixels("its codestream cannot be decoded") from error


def _rle(value: memoryview, fmt: FrameFormat, found: Picture, out: Array | None) -> Array:
    """RLE Lossless (PS3.5 Annex G). Its segments come as planes, one a sample."""
    if int.from_bytes(value[:4], "little") != fmt.samples_per_pixel * fmt.dtype.itemsize:
        raise ValueError("the frame has other segments than the header says")
    pixels = fmt.rows * fmt.columns
    if out is not None and fmt.samples_per_pixel == 1 and pixels % 2 == 0:
        _unpack(value, out.reshape(-1))
        return out
    # Some encoders make a segment of an odd number of bytes even before they compress it, not after.
    for each in (pixels, pixels + 1) if pixels % 2 else (pixels,):
        planes = np.empty((fmt.samples_per_pixel, each), fmt.dtype)
        try:
            _unpack(value, planes.reshape(-1))
            break
        except imagecodecs.DicomrleError:
            if each > pixels or pixels % 2 == 0:
                raise
    array = np.moveaxis(planes[:, :pixels].reshape(-1, fmt.rows, fmt.columns), 0, -1).reshape(fmt.shape)
    return _rgb(array) if fmt.photometric in _YBR else array


def _unpack(value: memoryview, samples: Array) -> None:
    written = imagecodecs.dicomrle_decode(value, samples.dtype.newbyteorder("<"), out=samples.view(np.uint8).data)
    if len(written) != samples.nbytes:
        raise imagecodecs.DicomrleError("the frame has another size than the header says")


def _jpeg(value: memoryview, fmt: FrameFormat, found: Picture, out: Array | None) -> Array:
    """JPEG of every process that is in use. An Adobe segment knows the colour transform better than the header."""
    _check_jpeg_end(value)
    if found.samples == 1:
        return _array(imagecodecs.jpeg8_decode(value, out=_unsigned(out)))
    ybr = fmt.photometric in _YBR
    if ybr and found.transform == 0:
        raise ValueError("the codestream says RGB, and the header says YBR")
    if fmt.transfer_syntax in (JPEG_LOSSLESS, JPEG_LOSSLESS_SV1):
        array = _array(imagecodecs.jpeg8_decode(value, colorspace="RGB", outcolorspace="RGB", out=_unsigned(out)))
        return _rgb(array) if ybr else array
    source = "YCBCR" if ybr or found.transform == 1 else "RGB"
    return _array(imagecodecs.jpeg8_decode(value, colorspace=source, outcolorspace="RGB", out=_unsigned(out)))


def _check_jpeg_end(value: memoryview) -> None:
    """Refuse an entropy-coded segment without its end: libjpeg paints the rest grey, CharLS looks on for seconds."""
    if bytes(value[-256:]).rfind(b"\xff\xd9") < 0:
        raise ValueError("the codestream ends early")


def _jpeg_ls(value: memoryview, fmt: FrameFormat, found: Picture, out: Array | None) -> Array:
    _check_jpeg_end(value)
    array = _array(imagecodecs.jpegls_decode(value, out=_unsigned(out)))
    return _rgb(array) if fmt.photometric in _YBR else array


def _jpeg_2000(value: memoryview, fmt: FrameFormat, found: Picture, out: Array | None) -> Array:
    """OpenJPEG, which undoes YBR_RCT and YBR_ICT itself."""
    _check_tile_parts(value, found.tiles)
    if found.bits > _MOST_JPEG_2000_BITS:
        raise UnsupportedPixels(f"JPEG 2000 of {found.bits} bits")
    array = _array(imagecodecs.jpeg2k_decode(value, planar=False, out=_like(out, found)))
    return _rgb(array) if fmt.photometric in _YBR else array


def _htj2k(value: memoryview, fmt: FrameFormat, found: Picture, out: Array | None) -> Array:
    """OpenJPH, for reversible codestreams alone: values that a lossy one overshoots wrap around in it."""
    _check_tile_parts(value, found.tiles)
    if not found.reversible:
        raise ValueError("a lossy codestream in a lossless transfer syntax")
    # imagecodecs' OpenJPH loop drops exceptions, and leaves the rest of the frame as the memory happened to be
    dropped: list[BaseException | None] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda report: dropped.append(report.exc_value)
    try:
        array = _array(imagecodecs.htj2k_decode(value, planar=False, out=_like(out, found)))
    finally:
        sys.unraisablehook = before
    if dropped:
        raise ValueError("the decoder gave up within the frame") from dropped[0]
    return _rgb(array) if fmt.photometric in _YBR else array


def _check_tile_parts(value: memoryview, at: int) -> None:
    """Refuse tile-parts that do not reach from the main header to the end (T.800 §A.4.2): a decoder may leave holes."""
    while bytes(value[at : at + 2]) == b"\xff\x90" and at + 12 <= len(value):
        nbytes = int.from_bytes(value[at + 6 : at + 10])
        if nbytes == 0:  # the last tile-part may reach to the end
            if bytes(value[-3:]).rfind(b"\xff\xd9") < 0:
                break
            return
        if nbytes < 14:
            break
        at += nbytes
    if bytes(value[at : at + 2]) != b"\xff\xd9":
        raise ValueError("the codestream ends early")


def _unsigned(out: Array | None) -> Array | None:
    return None if out is None else out.view(f"u{out.itemsize}")


def _like(out: Array | None, found: Picture) -> Array | None:
    return None if out is None else out.view(f"{'i' if found.signed else 'u'}{out.itemsize}")


def _array(decoded: Any) -> Array:
    array: Array = decoded
    return array


_JPEG: Final = _Codec(imagecodecs.jpeg8_version, _jpeg)
_JPEG_LS: Final = _Codec(imagecodecs.jpegls_version, _jpeg_ls)
_JPEG_2000: Final = _Codec(imagecodecs.jpeg2k_version, _jpeg_2000)
_HTJ2K: Final = _Codec(imagecodecs.htj2k_version, _htj2k)

_CODECS: Final = {
    "1.2.840.10008.1.2.4.50": _JPEG,
    "1.2.840.10008.1.2.4.51": _JPEG,
    JPEG_LOSSLESS: _JPEG,
    JPEG_LOSSLESS_SV1: _JPEG,
    "1.2.840.10008.1.2.4.80": _JPEG_LS,
    "1.2.840.10008.1.2.4.81": _JPEG_LS,
    "1.2.840.10008.1.2.4.90": _JPEG_2000,
    "1.2.840.10008.1.2.4.91": _JPEG_2000,
    "1.2.840.10008.1.2.4.201": _HTJ2K,
    "1.2.840.10008.1.2.4.202": _HTJ2K,
    "1.2.840.10008.1.2.4.203": _JPEG_2000,
    RLE: _Codec(imagecodecs.dicomrle_version, _rle),
}
