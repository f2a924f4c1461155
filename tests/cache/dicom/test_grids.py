"""RT doses and reconstructed NM lie where SimpleITK puts them, with the values that they state, or are refused."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset

from cache.dicom.assemble import VolumeOptions
from cache.dicom.grids import NM, RT_DOSE
from cache.errors import BadSource, IrregularSeries, UnsupportedPixels

from .conftest import Array, volume_of

FRAMES = 6
STORED = np.arange(FRAMES * 8 * 10, dtype=np.uint16).reshape(FRAMES, 8, 10) * 7

AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
CORONAL = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0]


def base(sop_class: str, phantom: list[bytes]) -> Dataset:
    ds = pydicom.dcmread(BytesIO(phantom[0]))
    for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType", "ImageType", "SliceThickness"):
        ds.pop(keyword, None)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.NumberOfFrames, ds.Rows, ds.Columns = STORED.shape
    ds.BitsStored, ds.HighBit = 16, 15
    ds.PixelSpacing = [2.5, 3.5]
    ds.PixelData = STORED.tobytes()
    return ds


def dose(phantom: list[bytes], offsets: list[float], orientation: list[float] = AXIAL) -> Dataset:
    ds = base(RT_DOSE, phantom)
    ds.Modality = "RTDOSE"
    ds.DoseUnits, ds.DoseGridScaling = "GY", 0.0125
    ds.FrameIncrementPointer = 0x3004000C
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-10.0, 20.0, 30.0], orientation
    ds.GridFrameOffsetVector = offsets
    return ds


def nuclear(phantom: list[bytes], slices: list[int], between: float = 4.0, orientation: list[float] = AXIAL) -> Dataset:
    ds = base(NM, phantom)
    ds.Modality, ds.ImageType = "NM", ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"]
    del ds.ImagePositionPatient, ds.ImageOrientationPatient
    ds.SpacingBetweenSlices = between
    ds.FrameIncrementPointer, ds.SliceVector = 0x00540080, slices
    detector = Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [-10.0, 20.0, 30.0], orientation
    ds.DetectorInformationSequence = [detector]
    return ds


def written(ds: Dataset) -> bytes:
    out = BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def places(data: bytes, folder: Path) -> tuple[Array, Array]:
    """Where SimpleITK has each voxel, shape (z, y, x, 3), LPS millimetres, and its stored value."""
    path = folder / "object.dcm"
    path.write_bytes(data)
    image = SimpleITK.ReadImage(path)
    stored = SimpleITK.GetArrayFromImage(image)
    told = (image.GetDirection(), image.GetSpacing(), image.GetOrigin())  # type: ignore[no-untyped-call]  # theirs
    direction, origin = np.array(told[0]).reshape(3, 3) * np.array(told[1]), np.array(told[2])
    index = np.stack(np.meshgrid(*map(np.arange, stored.shape), indexing="ij"), axis=-1)[..., ::-1]
    return index @ direction.T + origin, stored


def ours(data: bytes, **options: Any) -> tuple[Array, Array, str]:
    plan, volume = volume_of([data], VolumeOptions(**options))
    assert plan.spec.affine is not None
    affine = np.array(plan.spec.affine)
    index = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3], volume, plan.spec.units


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL], ids=["axial", "coronal"])
@pytest.mark.parametrize(
    "make",
    [lambda p, o: dose(p, [3.0 * n for n in range(6)], o), lambda p, o: nuclear(p, [*range(1, 7)], 3.0, o)],
    ids=["dose", "NM"],
)
def test_frames_lie_where_simpleitk_has_them(
    phantom: list[bytes], tmp_path: Path, make: Callable[[list[bytes], list[float]], Dataset], orientation: list[float]
) -> None:
    """Each stored value is at the same millimetre."""
    data = written(make(phantom, orientation))
    theirs, stored = places(data, tmp_path)
    where, volume, _ = ours(data, rescale=False)
    assert np.allclose(where[::-1], theirs)
    assert np.array_equal(volume[::-1], stored)
    assert np.array_equal(stored, STORED)


def test_a_dose_is_its_grid_times_the_scaling(phantom: list[bytes]) -> None:
    """In Gy where the object says so, rounded once; stored values if these are asked for."""
    data = written(dose(phantom, [3.0 * n for n in range(6)]))
    _, volume, units = ours(data)
    assert (volume.dtype.name, units) == ("float32", "Gy")
    assert np.array_equal(volume[::-1], (STORED * 0.0125).astype(np.float32))
    relative = dose(phantom, [3.0 * n for n in range(6)])
    relative.DoseUnits = "RELATIVE"
    assert ours(written(relative))[2] == ""


def test_a_dose_may_give_coordinates(phantom: list[bytes]) -> None:
    """Offsets that begin with the first plane's z are the planes' z, also downwards."""
    for step in (3.0, -3.0):
        relative, absolute = ([start + step * n for n in range(6)] for start in (0.0, 30.0))
        expected = ours(written(dose(phantom, relative)))
        found = ours(written(dose(phantom, absolute)))
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])


def test_nm_slices_have_numbers_and_a_direction(phantom: list[bytes]) -> None:
    """Slice Vector orders the frames; a negative spacing stacks them the other way, in front of the first one."""
    plain = ours(written(nuclear(phantom, [*range(1, 7)])))
    turned = ours(written(nuclear(phantom, [6, 5, 4, 3, 2, 1])))
    assert np.array_equal(turned[0], plain[0])
    assert np.array_equal(turned[1][::-1], plain[1])
    before = ours(written(nuclear(phantom, [*range(1, 7)], -4.0)))
    assert before[0][..., 2].max() == plain[0][..., 2].min() == 30.0
    assert np.array_equal(before[1][::-1], plain[1])


def without(ds: Dataset, *keywords: str) -> Dataset:
    for keyword in keywords:
        delattr(ds, keyword)
    return ds


def two_detectors(ds: Dataset) -> Dataset:
    ds.DetectorInformationSequence = [ds.DetectorInformationSequence[0]] * 2
    return ds


EVEN = [0.0, 3.0, 6.0, 9.0, 12.0, 15.0]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda p: dose(p, EVEN[:5]), UnsupportedPixels),
        (lambda p: dose(p, [1.0, 4.0, 7.0, 10.0, 13.0, 16.0]), UnsupportedPixels),
        (lambda p: dose(p, [30.0 + z for z in EVEN], CORONAL), UnsupportedPixels),
        (lambda p: dose(p, [0.0, 3.0, 6.0, 9.0, 13.0, 15.0]), IrregularSeries),
        (lambda p: dose(p, [0.0, *[1e9] * 5]), UnsupportedPixels),
        (lambda p: without(dose(p, EVEN), "GridFrameOffsetVector"), UnsupportedPixels),
        (lambda p: without(dose(p, EVEN), "DoseGridScaling"), UnsupportedPixels),
        (lambda p: without(nuclear(p, [1, 2, 3, 4, 5, 6]), "SpacingBetweenSlices"), UnsupportedPixels),
        (lambda p: without(nuclear(p, [1, 2, 3, 4, 5, 6]), "SliceVector"), UnsupportedPixels),
        (lambda p: nuclear(p, [1, 2, 3, 4, 5]), UnsupportedPixels),
        (lambda p: nuclear(p, [1, 2, 3, 3, 4, 5]), BadSource),
        (lambda p: two_detectors(nuclear(p, [1, 2, 3, 4, 5, 6])), UnsupportedPixels),
    ],
    ids=[
        "too few offsets",
        "offsets from nowhere",
        "coordinates of coronal planes",
        "uneven planes",
        "planes far away",
        "no offsets",
        "no scaling",
        "no spacing",
        "no slice vector",
        "too few slices",
        "a slice twice",
        "two detectors",
    ],
)
def test_what_tells_no_place_is_refused(
    phantom: list[bytes], make: Callable[[list[bytes]], Dataset], error: type[BadSource]
) -> None:
    """Planes of which the object does not say where they lie, or what their values are, make no volume."""
    with pytest.raises(error):
        ours(written(make(phantom)))


def test_real_doses(testdata: Path, tmp_path: Path) -> None:
    """Each is where SimpleITK has it; its values, which that leaves as they are stored, are times the scaling."""
    for name in ("rtdose", "rtdose_rle"):
        path = testdata / "dicom" / "single" / f"pydicom__{name}.dcm"
        theirs, stored = places(path.read_bytes(), tmp_path)
        where, volume, _ = ours(path.read_bytes())
        assert np.allclose(where[::-1], theirs)
        scaling = float(pydicom.dcmread(path).DoseGridScaling)
        assert np.array_equal(volume[::-1], (stored * scaling).astype(np.float32))
