"""Every kind of frame, decoded here and by another decoder: transfer syntax × photometric interpretation × bits × sign.

    python -m loadtest.conformance

A cell is "=" where both agree in every sample (and, if lossless, with what was encoded), "±n" where a lossy frame
differs by n at most, "≠" where a lossless one differs or a decoder fails, "·" where no such frame can be made: why is
listed below the matrix. Real single-file objects follow, where the test data is (VOXCACHE_TESTDATA). The last line on
stdout is JSON; all results: loadtest/results/conformance.json. Exit status 1 if any cell is "≠".
"""

import json
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, Final, Literal

import imagecodecs
import msgspec
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import UID, SecondaryCaptureImageStorage, generate_uid

from cache.dicom.codecs import (
    BIG_ENDIAN,
    NATIVE_SYNTAXES,
    RLE,
    FrameFormat,
    decode_frame,
    decoders,
    reference_frame,
)
from cache.dicom.frames import frame_spans
from cache.errors import BadSource, UnsupportedPixels

from . import encoders
from .encoders import HTJ2K_LOSSY, HTJ2K_SYNTAXES, LOSSY, Array, Unproducible
from .figures import at_most, plain

ROOT: Final = Path(__file__).resolve().parent
RESULTS: Final = ROOT / "results" / "conformance.json"

SYNTAXES: Final = (
    *NATIVE_SYNTAXES,
    RLE,
    encoders.JPEG_BASELINE,
    encoders.JPEG_EXTENDED,
    *encoders.JPEG_LOSSLESS_SYNTAXES,
    encoders.JPEG_LS,
    encoders.JPEG_LS_NEAR,
    encoders.JPEG_2000,
    encoders.JPEG_2000_LOSSY,
    *HTJ2K_SYNTAXES,
    HTJ2K_LOSSY,
)
#: (photometric interpretation, planar configuration)
PHOTOMETRICS: Final = (
    ("MONOCHROME1", 0),
    ("MONOCHROME2", 0),
    ("PALETTE COLOR", 0),
    ("RGB", 0),
    ("RGB", 1),
    ("YBR_FULL", 0),
    ("YBR_FULL_422", 0),
    ("YBR_RCT", 0),
    ("YBR_ICT", 0),
)
#: (name, bits allocated, bits stored, signed, floating)
DEPTHS: Final[tuple[tuple[str, int, int, bool, Literal["", "float", "double"]], ...]] = (
    ("1u", 1, 1, False, ""),
    ("8u", 8, 8, False, ""),
    ("8s", 8, 8, True, ""),
    ("10u", 16, 10, False, ""),
    ("10s", 16, 10, True, ""),
    ("12u", 16, 12, False, ""),
    ("12s", 16, 12, True, ""),
    ("16u", 16, 16, False, ""),
    ("16s", 16, 16, True, ""),
    ("24u", 32, 24, False, ""),
    ("24s", 32, 24, True, ""),
    ("32u", 32, 32, False, ""),
    ("32s", 32, 32, True, ""),
    ("f", 32, 32, False, "float"),
    ("d", 64, 64, False, "double"),
)
ROWS: Final = 64
COLUMNS: Final = 80


class Cell(msgspec.Struct, frozen=True):
    """One kind of frame, ``mark``ed as the module says. ``note``: who encoded and decoded it, or why not."""

    syntax: str
    photometric: str
    planar: int
    depth: str
    mark: str
    note: str


def formats() -> list[tuple[str, FrameFormat]]:
    return [
        (
            depth,
            FrameFormat(
                transfer_syntax=syntax,
                rows=ROWS,
                columns=COLUMNS,
                samples_per_pixel=1 if photometric[:4] in ("MONO", "PALE") else 3,
                photometric=photometric,
                planar_configuration=planar,
                bits_allocated=allocated,
                bits_stored=stored,
                signed=signed,
                floating=floating,
            ),
        )
        for syntax in SYNTAXES
        for photometric, planar in PHOTOMETRICS
        for depth, allocated, stored, signed, floating in DEPTHS
    ]


def samples(fmt: FrameFormat, seed: int = 0) -> Array:
    """Smooth hills with noise over the whole range of the bits, extremes included, as stored."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : fmt.rows, 0 : fmt.columns]
    hills = [0.5 + 0.42 * np.sin(x / 11 + k) * np.cos(y / 9 - k) for k in range(fmt.samples_per_pixel)]
    part = np.clip(np.stack(hills, -1) + random.normal(0, 0.02, (fmt.rows, fmt.columns, fmt.samples_per_pixel)), 0, 1)
    part[0, 0], part[-1, -1] = 0, 1
    if fmt.floating:
        return (part * 2000 - 1000).astype(fmt.dtype).reshape(fmt.shape)
    least, most = fmt.stored_range
    return np.rint(least + part * (most - least)).astype(fmt.dtype).reshape(fmt.shape)


def judge(depth: str, fmt: FrameFormat) -> Cell:
    """Encode one frame, decode it twice, compare."""

    def cell(mark: str, note: str) -> Cell:
        return Cell(fmt.transfer_syntax, fmt.photometric, fmt.planar_configuration, depth, mark, note)

    stored = samples(fmt)
    try:
        if fmt.planar_configuration and fmt.transfer_syntax not in NATIVE_SYNTAXES:
            raise Unproducible("codestreams know no planar configuration (RLE's is its own)")
        value, encoder = encoders.encode(stored, fmt)
    except Unproducible as why:
        return cell("·", str(why))
    try:
        ours = decode_frame(value, fmt)
    except UnsupportedPixels as error:
        return cell("·", f"refused here: {error}")
    except BadSource as error:
        return cell("≠", f"{encoder}: ours fails: {error} ({error.__cause__})")
    try:
        theirs, decoder = another(value, fmt)
    except (BadSource, RuntimeError) as error:
        return cell("·", f"encoded by {encoder}, but no other decoder reads it: {error}")
    note = f"{encoder} → {decoder}"
    difference = largest(ours, theirs)
    if fmt.transfer_syntax not in LOSSY:
        same = difference == 0 and np.array_equal(ours, encoders.expected(stored, fmt))
        return cell("=" if same else "≠", note if same else f"{note}: differs by {difference}")
    return cell("=" if difference == 0 else f"±{difference:g}", note)


def largest(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


def another(value: bytes, fmt: FrameFormat) -> tuple[Array, str]:
    """The frame through pydicom, or through someone else where that cannot."""
    if fmt.transfer_syntax == encoders.JPEG_EXTENDED and fmt.bits_stored > 8:
        return through_itk(value, fmt), "SimpleITK"
    if fmt.transfer_syntax in encoders.JPEG_LOSSLESS_SYNTAXES and fmt.photometric == "YBR_FULL":
        # pydicom takes what GDCM gives for RGB, which it is not
        stored = imagecodecs.jpegsof3_decode(value)
        return convert_color_space(stored, "YBR_FULL", "RGB"), "jpegsof3"
    plugins = get_decoder(UID(fmt.transfer_syntax)).available_plugins
    return reference_frame(value, fmt), "/".join(plugins) or "pydicom"


def through_itk(value: bytes, fmt: FrameFormat) -> Array:
    """A grey frame as SimpleITK reads it from a file."""
    ds = Dataset()
    ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.SOPInstanceUID = generate_uid()
    ds.Rows, ds.Columns, ds.SamplesPerPixel = fmt.rows, fmt.columns, 1
    ds.PhotometricInterpretation = "MONOCHROME2"  # ITK inverts MONOCHROME1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = fmt.bits_allocated, fmt.bits_stored, fmt.bits_stored - 1
    ds.PixelRepresentation = int(fmt.signed)
    ds.PixelData = encapsulate([value])
    ds["PixelData"].VR = "OB"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(fmt.transfer_syntax)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frame.dcm"
        ds.save_as(path, enforce_file_format=True)
        array: Array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0]
    return array


def real_files(folder: Path) -> list[dict[str, str]]:
    """Each frame of each single object in the test data against pydicom's, where pydicom decodes it."""
    return [{"file": path.name} | real_file(path) for path in sorted(folder.iterdir())]


def real_file(path: Path) -> dict[str, str]:
    ds = pydicom.dcmread(path, force=True)
    keywords = {"PixelData": "", "FloatPixelData": "float", "DoubleFloatPixelData": "double"}
    keyword = next((keyword for keyword in keywords if keyword in ds), None)
    if keyword is None:
        return {"mark": "·", "note": "no pixels"}
    syntax = str(ds.file_meta.TransferSyntaxUID)
    allocated = int(ds.BitsAllocated)
    fmt = FrameFormat(
        transfer_syntax=syntax,
        rows=ds.Rows,
        columns=ds.Columns,
        samples_per_pixel=ds.SamplesPerPixel,
        photometric=ds.PhotometricInterpretation,
        planar_configuration=int(ds.get("PlanarConfiguration") or 0),
        bits_allocated=allocated,
        bits_stored=int(ds.get("BitsStored") or allocated),
        signed=bool(ds.get("PixelRepresentation")),
        floating=keywords[keyword],  # type: ignore[arg-type] # one of the three
        words=syntax == BIG_ENDIAN and allocated <= 8 and ds[keyword].VR == "OW",
    )
    data = memoryview(ds[keyword].value)
    end = len(data) - 8 * (syntax not in NATIVE_SYNTAXES and bytes(data[-8:-4]) == b"\xfe\xff\xdd\xe0")
    frames = int(ds.get("NumberOfFrames") or 1)
    worst = 0.0
    try:
        index = frame_spans(data, 0, end, fmt, frames)
        ours = [decode_frame(index.frame(data, n), fmt, skip_bits=index.skip_bits(n)) for n in range(frames)]
    except BadSource as error:
        return {"mark": "·", "note": f"refused: {error}"}
    try:
        if syntax == encoders.JPEG_EXTENDED and fmt.bits_stored > 8:
            theirs, who = [through_itk(bytes(index.frame(data, n)), fmt) for n in range(frames)], "SimpleITK"
        else:
            theirs = [pydicom.pixels.pixel_array(ds, index=n, raw=False) for n in range(frames)]
            who = "/".join(get_decoder(UID(syntax)).available_plugins) or "pydicom"
    except (RuntimeError, NotImplementedError) as error:
        return {"mark": "·", "note": f"no other decoder reads it: {str(error).splitlines()[0][:100]}"}
    worst = max(
        0.0 if np.array_equal(a, b, equal_nan=bool(fmt.floating)) else largest(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )
    lossy = syntax in LOSSY
    return {"mark": "=" if worst == 0 else f"±{worst:g}" if lossy else "≠", "note": f"{frames} frames, {who}"}


def show(cells: list[Cell]) -> None:
    rows: dict[tuple[str, str, int], dict[str, str]] = defaultdict(dict)
    for cell in cells:
        rows[cell.syntax, cell.photometric, cell.planar][cell.depth] = cell.mark
    names = [depth for depth, *_ in DEPTHS]
    last = ""
    for (syntax, photometric, planar), marks in rows.items():
        if syntax != last:
            print(f"\n{syntax}  {UID(syntax).name}  [{decoders()[syntax]}]")
            print(f"    {'':16}" + "".join(f"{name:>5}" for name in names))
            last = syntax
        print(f"    {photometric + ('/planar' if planar else ''):16}" + "".join(f"{marks[name]:>5}" for name in names))
    reasons: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        if cell.mark in ("·", "≠"):
            reasons[f"{cell.mark} {cell.note}"].append(f"…{cell.syntax[-6:]} {cell.photometric} {cell.depth}")
    print()
    for reason, places in sorted(reasons.items()):
        shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
        print(f"{reason}\n      {shown}")


def main() -> None:
    warnings.simplefilter("ignore")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # type: ignore[no-untyped-call] # SimpleITK's types are partial
    cells = [judge(depth, fmt) for depth, fmt in formats()]
    show(cells)
    data = Path(os.environ.get("VOXCACHE_TESTDATA", ROOT.parent.parent / "shared" / "data")) / "dicom" / "single"
    real = real_files(data) if data.is_dir() else []
    print(f"\nreal objects: {len(real) or 'no test data'}")
    for found in real:
        print(f"  {found['mark']:>5}  {found['file']}  ({found['note']})")
    lossy = [float(cell.mark[1:]) for cell in cells if cell.mark.startswith("±")]
    figures: dict[str, Any] = {
        "cells": len(cells),
        "cells_equal": sum(cell.mark == "=" for cell in cells),
        "cells_lossy_differing": len(lossy),
        "cells_not_producible": sum(cell.mark == "·" for cell in cells),
        "lossy_largest_difference": max(lossy, default=0.0),
        "real_objects": len(real),
        "real_objects_equal": sum(found["mark"] == "=" for found in real),
    }
    differing = sum(cell.mark == "≠" for cell in cells)
    real_differing = sum(found["mark"] == "≠" for found in real)
    bars = [
        at_most("lossless_cells_differing", differing, 0),
        at_most("real_lossless_objects_differing", real_differing, 0),
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    everything = {"decoders": decoders(), "cells": [msgspec.to_builtins(cell) for cell in cells], "real": real}
    RESULTS.write_text(
        json.dumps(everything | {"figures": figures, "bars": plain(bars)}, ensure_ascii=False, indent=1) + "\n"
    )
    print(json.dumps({"figures": figures, "bars": plain(bars)}))
    if not all(bar.ok for bar in bars):
        sys.exit(1)


if __name__ == "__main__":
    main()
