"""What fuzzing grows from: one small object of each kind, and the small files among the real ones, where there are any.

Each synthetic slice is the middle one of three; `neighbours` are the other two, so that it can be part of a volume.
"""

from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from cache.dicom.codecs import NATIVE_SYNTAXES, RLE, FrameFormat
from cache.dicom.phantom import HTJ2K, JPEG_2000, write_series
from loadtest.encoders import JPEG_BASELINE, JPEG_EXTENDED, JPEG_LOSSLESS_SYNTAXES, JPEG_LS, encode
from tests.cache.dicom.conftest import rewritten
from tests.cache.dicom.test_enhanced import enhanced, written
from tests.cache.dicom.test_grids import dose, nuclear
from tests.cache.dicom.test_grids import written as grid
from tests.cache.dicom.test_palette import with_segments
from tests.cache.dicom.test_pictures import cine
from tests.cache.dicom.test_values import lut, mapping, pet, with_table

#: Real files above this size are left out: a mutation in them rarely hits anything but pixels.
MOST_NBYTES: Final = 40_000

_WRITTEN: Final = (*NATIVE_SYNTAXES, RLE, JPEG_LS, JPEG_2000, HTJ2K)
_EXPLICIT: Final = NATIVE_SYNTAXES[1]


def synthetic(folder: Path) -> dict[str, bytes]:
    """Objects by name. ``folder`` is where the phantoms go."""
    found = {syntax: phantom(folder, syntax)[1] for syntax in _WRITTEN}
    slices = phantom(folder, _EXPLICIT)
    for syntax in (JPEG_BASELINE, JPEG_EXTENDED, *JPEG_LOSSLESS_SYNTAXES):
        found[syntax] = _jpeg(slices[1], syntax)
    found |= {
        "enhanced": written(enhanced()),
        "enhanced-implicit": written(enhanced(), ImplicitVRLittleEndian, undefined=True),
        "enhanced-big": written(enhanced(), ExplicitVRBigEndian),
        "enhanced-rle": written(enhanced(), RLE),
        "pet": pet(slices[1]),
        "dose": grid(dose(slices, [0.0, 3.0, 6.0, 9.0, 12.0, 15.0])),
        "nuclear": grid(nuclear(slices, [1, 2, 3, 4, 5, 6])),
        "segments": with_segments(slices[1], [8, 0, 8], bytes([0, 1, 4, 1, 2, 8, 2, 2, 0, 0, 0, 0, 0, 2, 9, 7])),
        "table": with_table(slices[1], lut(4096, 0, 16, np.arange(4096, dtype="<u2").tobytes())),
        "real-world": rewritten(slices[1], RealWorldValueMappingSequence=Sequence([mapping(0.5, 3.0)])),
    }
    for colour in (False, True):
        for syntax in ("", RLE, JPEG_LS):
            found[f"cine-{'rgb' if colour else 'grey'}-{syntax or 'plain'}"] = cine(slices, 3, colour, syntax)[0]
    return found


def neighbours(folder: Path) -> tuple[bytes, bytes]:
    """The slices below and above the synthetic ones."""
    below, _, above = phantom(folder, _EXPLICIT)
    return below, above


def real(testdata: Path | None) -> dict[str, bytes]:
    """The small single and malformed files of the test data."""
    if testdata is None:
        return {}
    paths = [path for name in ("single", "malformed") for path in sorted((testdata / "dicom" / name).iterdir())]
    return {path.name: path.read_bytes() for path in paths if path.stat().st_size < MOST_NBYTES}


def phantom(folder: Path, syntax: str) -> list[bytes]:
    """Three slices, which belong to the same series whatever their syntax; 16 × 16, but JPEG 2000 needs 32 × 32."""
    size = 32 if syntax == JPEG_2000 else 16
    target = folder / syntax
    paths = write_series(
        target, slices=3, rows=size, columns=size, transfer_syntax=syntax, study_uid="1.2", series_uid="1.2.3"
    )[2]
    return [path.read_bytes() for path in paths]


def _jpeg(data: bytes, syntax: str) -> bytes:
    ds = pydicom.dcmread(BytesIO(data))
    bits = 8 if syntax == JPEG_BASELINE else 12
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = (8, 8, 7) if bits == 8 else (16, 12, 11)
    samples = np.arange(256, dtype=f"u{ds.BitsAllocated // 8}").reshape(16, 16)
    fmt = FrameFormat(syntax, 16, 16, 1, "MONOCHROME2", 0, ds.BitsAllocated, bits, False)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([encode(samples, fmt)[0]])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    out = BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()
