"""Synthetic CT series that look and compress like real ones, for demos, benchmarks and tests without patients."""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from .header import BIG_ENDIAN, NATIVE, RLE

JPEG_2000: Final = "1.2.840.10008.1.2.4.90"
HTJ2K: Final = "1.2.840.10008.1.2.4.201"

#: Which of pydicom's encoders makes each compressed syntax; it has none for HTJ2K.
_ENCODERS: Final = {
    RLE: "pydicom",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    JPEG_2000: "pylibjpeg",
}

_FIELD_MM: Final = 360.0
_SPACING_MM: Final = 1.25
_INTERCEPT: Final = -1024

Image = npt.NDArray[np.float32]
#: x as one row and y as one column, both from -1 to 1.
Grid = tuple[Image, Image]


def write_series(
    folder: Path,
    *,
    slices: int = 300,
    rows: int = 512,
    columns: int = 512,
    transfer_syntax: str = "1.2.840.10008.1.2.1",
    study_uid: str | None = None,
    series_uid: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, str, list[Path]]:
    """Write one axial chest CT as ``{folder}/{study}/{series}/{sop}.dcm``; the same arguments give the same files.

    Hounsfield units by slope 1 and intercept -1024, 12 bits in 16, slices 1.25 mm apart. ``transfer_syntax``: implicit
    or explicit little endian, explicit big endian, deflated, RLE, JPEG-LS lossless, JPEG 2000 lossless or HTJ2K
    lossless.
    ``progress(written, slices)`` is called after each file. Returns the Study and Series Instance UID and the paths,
    from the feet to the head.

    Raises: ValueError: a transfer syntax that cannot be written, or a size that is none (JPEG 2000 needs 32 × 32).
    """
    if transfer_syntax not in NATIVE and transfer_syntax not in _ENCODERS and transfer_syntax != HTJ2K:
        raise ValueError(f"no encoder for transfer syntax {transfer_syntax}")
    if min(slices, rows, columns) < 1 or (transfer_syntax == JPEG_2000 and min(rows, columns) < 32):
        raise ValueError(
            f"{slices} × {rows} × {columns} is no size of a volume that {UID(transfer_syntax).name} can hold"
        )
    study = study_uid or _uid("study", seed)
    series = series_uid or _uid("series", study, seed, slices, rows, columns, transfer_syntax)
    target = folder / study / series
    target.mkdir(parents=True, exist_ok=True)
    template = _template(study, series, rows, columns)
    paths = []
    for number, stored in enumerate(_stored_slices(slices, rows, columns, seed)):
        instance = _uid("instance", series, number)
        template.SOPInstanceUID = instance
        template.InstanceNumber = number + 1
        template.ImagePositionPatient = [*_corner(template), f"{number * _SPACING_MM:.6g}"]
        path = target / f"{instance}.dcm"
        path.write_bytes(_file(template, stored, transfer_syntax))
        paths.append(path)
        if progress is not None:
            progress(number + 1, slices)
    return study, series, paths


def _uid(*parts: object) -> str:
    return str(generate_uid(entropy_srcs=["voxcache phantom", *map(str, parts)]))


def _corner(template: Dataset) -> list[str]:
    between_rows, between_columns = (float(value) for value in template.PixelSpacing)
    x = -between_columns * (template.Columns - 1) / 2
    y = -between_rows * (template.Rows - 1) / 2
    return [f"{x:.8g}", f"{y:.8g}"]


def _template(study: str, series: str, rows: int, columns: int) -> Dataset:
    """All that the instances share (CT Image IOD, PS3.3 §A.3)."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20200101"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.AccessionNumber = ""
    ds.Modality = "CT"
    ds.Manufacturer = "voxcache"
    ds.ReferringPhysicianName = ""
    ds.SeriesDescription = "Synthetic chest"
    ds.PatientName = "Phantom^Synthetic"
    ds.PatientID = "PHANTOM"
    ds.PatientBirthDate = ""
    ds.PatientSex = "O"
    ds.PatientPosition = "HFS"
    ds.SliceThickness = f"{_SPACING_MM:.6g}"
    ds.KVP = "120"
    ds.StudyInstanceUID = study
    ds.SeriesInstanceUID = series
    ds.StudyID = "1"
    ds.SeriesNumber = 1
    ds.AcquisitionNumber = 1
    ds.FrameOfReferenceUID = _uid("frame", study)
    ds.PositionReferenceIndicator = ""
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [f"{_FIELD_MM / rows:.8g}", f"{_FIELD_MM / columns:.8g}"]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = rows, columns
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelRepresentation = 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(_INTERCEPT), "1", "HU"
    ds.WindowCenter, ds.WindowWidth = "40", "400"
    return ds


def _file(template: Dataset, stored: npt.NDArray[np.uint16], transfer_syntax: str) -> bytes:
    ds = Dataset(template)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(transfer_syntax)
    if encoder := _ENCODERS.get(transfer_syntax):
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(UID(transfer_syntax), stored, encoding_plugin=encoder, generate_instance_uid=False)
    elif transfer_syntax == HTJ2K:
        ds.add_new(0x7FE00010, "OB", encapsulate([bytes(imagecodecs.htj2k_encode(stored, reversible=True))]))
        ds["PixelData"].is_undefined_length = True
    else:
        samples = stored.astype(">u2" if transfer_syntax == BIG_ENDIAN else "<u2").tobytes()
        ds.add_new(0x7FE00010, "OW", samples)
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _stored_slices(slices: int, rows: int, columns: int, seed: int) -> Iterator[npt.NDArray[np.uint16]]:
    """Stored values of each slice: anatomy plus noise, within 12 bits."""
    random = np.random.default_rng(seed)
    noise = random.normal(0.0, 18.0, (rows + 64, columns + 64)).astype(np.float32)
    y = np.linspace(-1.0, 1.0, rows, dtype=np.float32)[:, None]
    x = np.linspace(-1.0, 1.0, columns, dtype=np.float32)[None, :]
    for number in range(slices):
        height = number / max(slices - 1, 1)
        # One field of noise, seen at another place each time: as random as the eye and a codec can tell.
        down, right = random.integers(0, 64, 2)
        values = _anatomy((x, y), height) + noise[down : down + rows, right : right + columns]
        yield np.clip(np.rint(values) - _INTERCEPT, 0, 4095).astype(np.uint16)


def _anatomy(grid: Grid, height: float) -> Image:
    """Hounsfield units of the chest at ``height``, 0 at the diaphragm and 1 at the neck."""
    breadth = 0.86 - 0.28 * height**3
    image = np.full(np.broadcast_shapes(*(axis.shape for axis in grid)), -1000.0, np.float32)
    image[_ellipse(grid, 0.0, 0.0, breadth, 0.62)] = -100.0  # fat under the skin
    image[_ellipse(grid, 0.0, 0.0, breadth - 0.05, 0.57)] = 45.0  # muscle
    lung = 0.30 * math.sqrt(max(math.sin(math.pi * (0.12 + 0.80 * height)), 0.05))
    for side in (-1.0, 1.0):
        lungs = _ellipse(grid, side * 0.40, -0.02, lung, 1.45 * lung)
        image[lungs] = -860.0
        for branch in range(5):  # vessels that wander through the lungs
            turn = 6.28 * (height * (1.0 + 0.3 * branch) + 0.2 * branch)
            center_x, center_y = side * 0.40 + 0.55 * lung * math.cos(turn), -0.02 + 0.8 * lung * math.sin(turn)
            image[_ellipse(grid, center_x, center_y, 0.018, 0.018) & lungs] = 50.0
    image[_ellipse(grid, 0.10, -0.16, 0.22 * (1.0 - 0.5 * height), 0.20)] = 60.0  # heart
    image[_ellipse(grid, 0.06, 0.20, 0.055, 0.055)] = 180.0  # aorta, with contrast
    image[_ellipse(grid, 0.02, -0.02, 0.035, 0.030)] = -950.0  # trachea
    disc = math.sin(60.0 * height) > 0.75
    image[_ellipse(grid, 0.0, 0.38, 0.105, 0.085)] = 90.0 if disc else 480.0
    if not disc:
        image[_ellipse(grid, 0.0, 0.38, 0.085, 0.066)] = 210.0  # marrow
    image[_ellipse(grid, 0.0, 0.485, 0.04, 0.035)] = 25.0  # spinal canal
    image[_ellipse(grid, 0.0, -0.50, 0.09, 0.025)] = 420.0  # sternum
    return image


def _ellipse(grid: Grid, center_x: float, center_y: float, a: float, b: float) -> npt.NDArray[np.bool_]:
    x, y = grid
    inside: npt.NDArray[np.bool_] = ((x - center_x) / a) ** 2 + ((y - center_y) / b) ** 2 <= 1.0
    return inside
