"""Frames in every transfer syntax that an encoder here can write. None of them shares code with the decoder it is for,
unless no other encoder exists."""

import io
from typing import Any, Final

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.pixels import get_encoder
from pydicom.pixels.processing import convert_color_space

from cache.dicom.codecs import BIG_ENDIAN, JPEG_LOSSLESS, NATIVE_SYNTAXES, RLE, FrameFormat

Array = npt.NDArray[Any]

JPEG_BASELINE: Final = "1.2.840.10008.1.2.4.50"
JPEG_EXTENDED: Final = "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS_SYNTAXES: Final = (JPEG_LOSSLESS, "1.2.840.10008.1.2.4.70")
JPEG_LS: Final = "1.2.840.10008.1.2.4.80"
JPEG_LS_NEAR: Final = "1.2.840.10008.1.2.4.81"
JPEG_2000: Final = "1.2.840.10008.1.2.4.90"
JPEG_2000_LOSSY: Final = "1.2.840.10008.1.2.4.91"
HTJ2K_SYNTAXES: Final = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202")
HTJ2K_LOSSY: Final = "1.2.840.10008.1.2.4.203"

#: Codestreams in these need not hold what was put in.
LOSSY: Final = frozenset({JPEG_BASELINE, JPEG_EXTENDED, JPEG_LS_NEAR, JPEG_2000_LOSSY, HTJ2K_LOSSY})
_JPEG_2000_FAMILY: Final = (JPEG_2000, JPEG_2000_LOSSY, *HTJ2K_SYNTAXES, HTJ2K_LOSSY)


class Unproducible(Exception):
    """The standard forbids such a frame, or no encoder here writes it."""


def expected(samples: Array, fmt: FrameFormat) -> Array:
    """What a lossless frame of ``samples`` (as stored, one triple a pixel) decodes to: pydicom's colours."""
    if fmt.photometric == "YBR_FULL_422":
        samples = samples.copy()
        samples[:, 1::2, 1:] = samples[:, ::2, 1:]
    if fmt.photometric.startswith("YBR_FULL"):
        samples = convert_color_space(samples, "YBR_FULL", "RGB")
    return samples


def encode(samples: Array, fmt: FrameFormat) -> tuple[bytes, str]:
    """One frame's bytes, and who wrote them. ``samples``: ``fmt.shape``, as stored (RGB where the codec transforms).

    Raises: Unproducible.
    """
    _allowed(fmt)
    syntax = fmt.transfer_syntax
    transformed = fmt.photometric in ("YBR_RCT", "YBR_ICT")
    try:
        if syntax in NATIVE_SYNTAXES:
            return plain(samples, fmt), "NumPy"
        if syntax in (JPEG_BASELINE, JPEG_EXTENDED):
            return _jpeg(samples, fmt)
        if syntax in JPEG_LOSSLESS_SYNTAXES:
            return _jpeg_lossless(samples, fmt), "imagecodecs"
        if syntax in HTJ2K_SYNTAXES:
            return bytes(imagecodecs.htj2k_encode(samples, reversible=True, rgb=transformed)), "imagecodecs"
        if syntax == HTJ2K_LOSSY:
            return bytes(
                imagecodecs.htj2k_encode(samples, level=0.002, reversible=False, rgb=transformed)
            ), "imagecodecs"
        return _through_pydicom(samples, fmt), "pydicom"
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise Unproducible(str(error).strip().splitlines()[-1][:110]) from error


def plain(samples: Array, fmt: FrameFormat) -> bytes:
    """Plain samples (PS3.5 §8.1.1), padded to an even length."""
    if fmt.bits_allocated == 1:
        value = np.packbits(samples.reshape(-1), bitorder="little").tobytes()
    elif fmt.photometric == "YBR_FULL_422":
        pairs = samples.reshape(fmt.rows, fmt.columns // 2, 2, 3)
        value = np.concatenate([pairs[:, :, :, 0], pairs[:, :, 0, 1:]], axis=-1).tobytes()
    else:
        big, little = samples.dtype.newbyteorder(">"), samples.dtype.newbyteorder("<")
        planar = np.moveaxis(samples, -1, 0) if fmt.planar_configuration else samples
        value = planar.astype(big if fmt.transfer_syntax == BIG_ENDIAN else little).tobytes()
    value += b"\0" * (len(value) % 2)
    return np.frombuffer(value, ">u2").astype("<u2").tobytes() if fmt.words else value


def _allowed(fmt: FrameFormat) -> None:
    """PS3.5 §8.2 and PS3.3 §C.7.6.3.1.2: which photometric interpretations, depths and signs go with which syntax."""
    syntax, bits = fmt.transfer_syntax, fmt.bits_stored
    native, lossy_jpeg = syntax in NATIVE_SYNTAXES, syntax in (JPEG_BASELINE, JPEG_EXTENDED)
    colour = fmt.samples_per_pixel == 3
    rules = [
        (fmt.floating and not native, "floating-point numbers cannot be compressed"),
        (fmt.bits_allocated == 1 and not native, "one-bit samples are not compressed by these encoders"),
        (fmt.photometric.startswith("YBR_FULL") and (bits != 8 or fmt.signed), "YBR_FULL is defined for 8 bits here"),
        (
            fmt.photometric in ("YBR_RCT", "YBR_ICT") and syntax not in _JPEG_2000_FAMILY,
            "that transform is JPEG 2000's own",
        ),
        (fmt.photometric == "YBR_RCT" and syntax in LOSSY, "the lossy transform is YBR_ICT"),
        (fmt.photometric == "YBR_ICT" and syntax not in LOSSY, "the lossless transform is YBR_RCT"),
        (fmt.photometric == "YBR_FULL_422" and not native and not lossy_jpeg, "subsampled by JPEG or not at all"),
        (fmt.photometric == "PALETTE COLOR" and (fmt.signed or bits > 16), "indices are unsigned, at most 16 bits"),
        (fmt.photometric == "PALETTE COLOR" and syntax in LOSSY, "indices cannot be approximated"),
        (colour and (fmt.signed or bits == 1 or bool(fmt.floating)), "colours are unsigned whole numbers"),
        (
            lossy_jpeg and (fmt.signed or bits not in ((8,) if syntax == JPEG_BASELINE else (8, 12))),
            "lossy JPEG holds 8 bits, or 12",
        ),
        (lossy_jpeg and colour and bits != 8, "no encoder for colour of 12 bits"),
        (syntax == HTJ2K_LOSSY and bits not in (8, 16), "the encoder overshoots other depths than 8 and 16"),
        (syntax in JPEG_LOSSLESS_SYNTAXES and bits > 16, "at most 16 bits"),
        (syntax in (JPEG_LS, JPEG_LS_NEAR) and bits > 16, "at most 16 bits"),
    ]
    for broken, why in rules:
        if broken:
            raise Unproducible(why)


def _jpeg_lossless(samples: Array, fmt: FrameFormat) -> bytes:
    depth = max(8, fmt.bits_stored)
    unsigned = np.ascontiguousarray(samples).view(f"u{samples.itemsize}") & ((1 << depth) - 1)
    predictor = 4 if fmt.transfer_syntax == JPEG_LOSSLESS else 1
    encoded = imagecodecs.jpeg8_encode(unsigned, lossless=True, predictor=predictor, bitspersample=depth)
    if fmt.photometric != "YBR_FULL":
        return bytes(encoded)
    adobe = encoded.find(b"\xff\xee\x00\x0eAdobe")  # it says RGB, which these samples are not
    return bytes(encoded[:adobe] + encoded[adobe + 16 :])


def _jpeg(samples: Array, fmt: FrameFormat) -> tuple[bytes, str]:
    if fmt.bits_stored > 8:
        return bytes(imagecodecs.jpeg8_encode(samples, level=95, bitspersample=12)), "imagecodecs"
    stream = io.BytesIO()
    if fmt.samples_per_pixel == 1:
        Image.fromarray(samples).save(stream, "JPEG", quality=95)
    else:
        subsampling = "4:2:2" if fmt.photometric == "YBR_FULL_422" else "4:4:4"
        image = Image.fromarray(samples)
        image.save(stream, "JPEG", quality=95, subsampling=subsampling, keep_rgb=fmt.photometric == "RGB")
    return stream.getvalue(), "Pillow"


def _through_pydicom(samples: Array, fmt: FrameFormat) -> bytes:
    options: dict[str, Any] = {}
    if fmt.transfer_syntax == JPEG_LS_NEAR:
        options["jls_error"] = 2
    if fmt.transfer_syntax == JPEG_2000_LOSSY:
        options["j2k_cr"] = [8]
    encoded: bytes = get_encoder(fmt.transfer_syntax).encode(
        samples,
        rows=fmt.rows,
        columns=fmt.columns,
        samples_per_pixel=fmt.samples_per_pixel,
        number_of_frames=1,
        photometric_interpretation=fmt.photometric,
        bits_allocated=fmt.bits_allocated,
        bits_stored=fmt.bits_stored,
        pixel_representation=int(fmt.signed),
        planar_configuration=0,
        encoding_plugin="pylibjpeg" if fmt.transfer_syntax == RLE else "",  # GDCM's ends the process on odd sizes
        validate=fmt.transfer_syntax != RLE,  # 32 bits are beyond what it vouches for
        **options,
    )
    return encoded
