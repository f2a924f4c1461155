"""Real series give highdicom's array and affine bit for bit, or the refusal they deserve."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from highdicom import Volume, get_volume_from_series

from cache.dicom.assemble import VolumeOptions
from cache.dicom.header import identify
from cache.errors import BadSource, SeveralVolumes, TiltedSeries, TruncatedObject, UnsupportedPixels

from .conftest import objects_in, volume_of

sitk: Any = SimpleITK  # typed in parts only

REGULAR = {
    "ct_philips_bone1mm140": "int16",
    "mr_d2n_compressed_j2k_001": "int16",
    "mr_d2n_compressed_jpeg_001": "int16",
    "mr_d2n_compressed_jpegls_001": "int16",
    "mr_d2n_compressed_rle_001": "int16",
    "mr_fruit_sag196": "int16",
    "mr_siemens_frag_j2k96": "float32",  # 16 bits unsigned
}
REFUSED: dict[str, type[BadSource]] = {
    "ct_philips_phantom_tilt54": TiltedSeries,
    "mr_d2n_rgb_dti4": UnsupportedPixels,
    "mr_ge_epi4d_interleaved_150": SeveralVolumes,
    "mr_siemens_pdt2_2echo70": SeveralVolumes,
}


def oracle(objects: Sequence[bytes], rescale: bool) -> Volume:
    datasets = [pydicom.dcmread(BytesIO(data)) for data in objects]
    for ds in datasets:
        if "FrameOfReferenceUID" not in ds:  # it insists on one, and does nothing with it
            ds.FrameOfReferenceUID = "1.2.3"
    return get_volume_from_series(
        datasets,
        apply_modality_transform=None if rescale else False,
        apply_real_world_transform=False,
        apply_presentation_lut=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "stored"])
@pytest.mark.parametrize(("name", "dtype"), REGULAR.items(), ids=REGULAR.keys())
def test_a_regular_series_equals_highdicom(testdata: Path, name: str, dtype: str, rescale: bool) -> None:
    """Array, affine and order of slices are the oracle's, bit for bit."""
    objects = objects_in(testdata / "dicom" / "series" / name)[:32]
    plan, volume = volume_of(objects, VolumeOptions(rescale=rescale))
    expected = oracle(objects, rescale)
    if rescale:
        assert plan.spec.dtype == dtype
    assert volume.shape == expected.array.shape
    assert np.array_equal(volume, expected.array)
    assert np.array_equal(np.array(plan.spec.affine), expected.affine)


@pytest.mark.slow
@pytest.mark.parametrize("name", REGULAR)
def test_a_clean_series_equals_simpleitk(testdata: Path, name: str) -> None:
    """Another library that reads series its own way finds the same values at the same places in the patient."""
    folder = testdata / "dicom" / "series" / name
    plan, volume = volume_of(objects_in(folder))
    [series] = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series))
    array = sitk.GetArrayFromImage(image)
    affine = np.array(plan.spec.affine)
    # Its third axis may run the other way: slices are taken from the same end.
    ours = affine[:3, 0] @ np.array(image.GetDirection()).reshape(3, 3)[:, 2]
    if ours < 0:
        array = array[::-1]
    assert np.array_equal(volume, array)
    for z, y, x in ((0, 0, 0), (len(volume) - 1, 3, 5)):
        there = image.TransformIndexToPhysicalPoint((x, y, z if ours > 0 else len(volume) - 1 - z))
        assert np.allclose((affine @ (z, y, x, 1))[:3], there, atol=0.02)


@pytest.mark.parametrize(("name", "error"), REFUSED.items(), ids=REFUSED.keys())
def test_an_irregular_series_is_refused_by_type(testdata: Path, name: str, error: type[BadSource]) -> None:
    """What is no single regular volume is refused for the right reason, and the instances at fault are named."""
    with pytest.raises(error) as refusal:
        volume_of(objects_in(testdata / "dicom" / "series" / name))
    assert type(refusal.value) is error
    assert refusal.value.instances


def test_every_malformed_object_ends_in_a_typed_error(testdata: Path) -> None:
    """No broken file brings down its reader with an error of someone else's making."""
    objects = {path.name: path.read_bytes() for path in sorted((testdata / "dicom" / "malformed").iterdir())}
    assert objects
    for data in objects.values():
        with pytest.raises(BadSource):
            volume_of([data])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mr_siemens_frag_j2k96", "mr_ge_epi4d_interleaved_150"])
def test_any_beginning_of_an_object_identifies_it_or_is_too_short(testdata: Path, name: str) -> None:
    """Wherever a read of the first bytes stops, it is enough or known to be too little, never misread."""
    data = objects_in(testdata / "dicom" / "series" / name)[0]
    whole = identify(data)
    for length in range(132, 8192, 7):
        try:
            assert identify(data[:length]) == whole
        except TruncatedObject:
            continue
