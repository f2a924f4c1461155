"""Objects without a place in the patient: cines, projections, colours, single tiles; equal to pydicom's pictures."""

from io import BytesIO
from pathlib import Path

import msgspec
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut

from cache.dicom.assemble import VolumeOptions, plan_volume
from cache.dicom.decode import decode_slice
from cache.dicom.header import read_header
from cache.errors import BadRequest, BadSource, IrregularSeries, SeveralVolumes, UnsupportedPixels

from .conftest import Array, rewritten, volume_of

FRAMES = VolumeOptions(kind="frames", rescale=False)
IMAGE = VolumeOptions(kind="image", rescale=False)
RLE = "1.2.840.10008.1.2.5"


def frames(**changes: object) -> VolumeOptions:
    return msgspec.structs.replace(FRAMES, **changes)


def cine(phantom: list[bytes], count: int = 7, colour: bool = False, syntax: str = "") -> tuple[bytes, Array]:
    """An ultrasound cine of random frames, and these."""
    shape = (count, 20, 30, 3) if colour else (count, 20, 30)
    values = np.random.default_rng(count).integers(0, 256, shape, np.uint8)
    ds = pydicom.dcmread(BytesIO(phantom[0]))
    for gone in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        del ds[gone]
    ds.Modality, ds.NumberOfFrames, ds.Rows, ds.Columns = "US", count, 20, 30
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    if colour:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.PixelData = values.tobytes()
    if syntax:
        ds.compress(syntax, generate_instance_uid=False)
    out = BytesIO()
    ds.save_as(out)
    return out.getvalue(), values


@pytest.mark.parametrize("syntax", ["", RLE, "1.2.840.10008.1.2.4.80"])
@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
def test_a_cine_is_its_frames(phantom: list[bytes], colour: bool, syntax: str) -> None:
    """Frames in their order, colour last."""
    data, values = cine(phantom, colour=colour, syntax=syntax)
    plan, made = volume_of([data], FRAMES)
    assert plan.spec.axes == ("tyxc" if colour else "tyx")
    assert plan.spec.dtype == "uint8"
    assert np.array_equal(made, values)


@pytest.mark.parametrize("syntax", ["", RLE])
def test_chosen_frames_touch_no_others(phantom: list[bytes], syntax: str) -> None:
    """Frames are picked by their numbers, from 1, in the order given; those not picked may be broken."""
    data, values = cine(phantom, colour=True, syntax=syntax)
    header = read_header(memoryview(data), 0)
    plan, made = volume_of([data], frames(frames=(6, 2, 2)))
    assert np.array_equal(made, values[[5, 1, 1]])
    starts = header.frame_starts or tuple(n * 1800 for n in range(7))
    broken = bytearray(data)
    for number in (0, 2, 3, 4, 6):
        begin = header.pixel_offset + starts[number] + (8 if syntax else 0)
        end = header.pixel_offset + (starts[number + 1] if number < 6 else header.pixel_nbytes)
        broken[begin:end] = b"\xff" * (end - begin)
    again = np.zeros_like(made)
    for piece in plan.slices:
        decode_slice(memoryview(broken), plan.objects[0], piece, again[piece.at])
    assert np.array_equal(again, made)


def test_a_frame_that_is_not_there_is_a_bad_request(phantom: list[bytes]) -> None:
    """The object is fine; the number is not."""
    data, _ = cine(phantom)
    with pytest.raises(BadRequest, match="7 frames"):
        volume_of([data], frames(frames=(8,)))


def test_one_frame_is_an_image(phantom: list[bytes]) -> None:
    """An image has no time; of several frames it must be said which."""
    data, values = cine(phantom)
    plan, made = volume_of([data], msgspec.structs.replace(IMAGE, frames=(3,)))
    assert plan.spec.axes == "yx"
    assert np.array_equal(made, values[2])
    with pytest.raises(SeveralVolumes):
        volume_of([data], IMAGE)


def test_of_several_objects_none_is_chosen(phantom: list[bytes]) -> None:
    """Which of the views of a series is meant, nothing says."""
    with pytest.raises(SeveralVolumes) as refusal:
        volume_of(phantom[:2], IMAGE)
    assert len(refusal.value.instances) == 2


def projection(phantom: list[bytes], **changes: object) -> bytes:
    gone = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
    return rewritten(phantom[0], **{"Modality": "DX", **gone, **changes})


@pytest.mark.parametrize(
    ("changes", "spacing"),
    [
        ({"ImagerPixelSpacing": ["0.1", "0.2"]}, (0.1, 0.2)),
        ({"ImagerPixelSpacing": ["0.1", "0.2"], "PixelSpacing": ["0.08", "0.16"]}, (0.08, 0.16)),
        ({"NominalScannedPixelSpacing": ["0.3", "0.3"]}, (0.3, 0.3)),
        ({}, (1.0, 1.0)),
        ({"ImagerPixelSpacing": ["0.1", "0.1", "0.1"]}, (1.0, 1.0)),
    ],
    ids=str,
)
def test_a_projection_has_the_spacing_it_says(
    phantom: list[bytes], changes: dict[str, object], spacing: tuple[float, float]
) -> None:
    """Calibrated spacing before that of the detector or the film; the affine lies in the picture's plane."""
    spec = plan_volume([read_header(memoryview(projection(phantom, **changes)), 0)], IMAGE).spec
    assert spec.spacing == (1.0, *spacing)
    assert np.allclose(np.array(spec.affine) @ (0, 3, 5, 1), (5 * spacing[1], 3 * spacing[0], 0, 1))


def test_pixels_without_size_are_refused(phantom: list[bytes]) -> None:
    """A spacing of nothing is no spacing."""
    with pytest.raises(IrregularSeries):
        volume_of([projection(phantom, ImagerPixelSpacing=["0", "0.1"])], IMAGE)


def test_pictures_are_rescaled_and_inverted_as_volumes_are(phantom: list[bytes]) -> None:
    """The options for values mean the same."""
    data = projection(phantom, PhotometricInterpretation="MONOCHROME1", RescaleSlope="2")
    stored = pydicom.dcmread(BytesIO(data)).pixel_array.astype(int)
    assert np.array_equal(volume_of([data], VolumeOptions(kind="image"))[1], stored * 2 - 1024)
    inverted = volume_of([data], VolumeOptions(kind="image", monochrome1="invert"))[1]
    assert np.array_equal(inverted, (4095 - stored) * 2 - 1024)


def test_colours_that_nobody_knows_are_refused(phantom: list[bytes]) -> None:
    """Retired and unknown photometric interpretations, and colours asked for as uptake, are no picture."""
    data, _ = cine(phantom, colour=True)
    for wrong in ("CMYK", "YBR_PARTIAL_420", "HSV"):
        with pytest.raises(UnsupportedPixels):
            volume_of([rewritten(data, PhotometricInterpretation=wrong)], FRAMES)
    with pytest.raises(UnsupportedPixels):
        volume_of([data], frames(rescale=True, units="suvbw"))
    with pytest.raises(UnsupportedPixels, match="palette"):
        volume_of([projection(phantom, PhotometricInterpretation="PALETTE COLOR")], IMAGE)


def test_an_offset_table_that_lies_is_refused(phantom: list[bytes]) -> None:
    """Frames are where the table says, or nowhere."""
    data, values = cine(phantom, syntax=RLE)
    ds = pydicom.dcmread(BytesIO(data))
    parts = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=7))
    whole = bytearray(encapsulate(parts))
    whole[12:16] = (6).to_bytes(4, "little")
    ds.PixelData = bytes(whole)
    out = BytesIO()
    ds.save_as(out)
    with pytest.raises(BadSource):
        volume_of([out.getvalue()], FRAMES)
    assert np.array_equal(volume_of([data], FRAMES)[1], values)


UNREADABLE = {
    "cornerstone3D__CTImage_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm": "UnsupportedPixels",
    "cornerstone3D__CTImage_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm": "UnsupportedPixels",
    "pydicom-data__HTJ2KLossless_08_RGB.dcm": "NotDicom",  # these have no UIDs
    "pydicom-data__HTJ2K_08_RGB.dcm": "NotDicom",
    "pydicom-data__JLSL_08_07_0_1F.dcm": "NotDicom",
    "pydicom-data__JLSL_16_15_1_1F.dcm": "NotDicom",
    "pydicom-data__JLSL_RGB_ILV0.dcm": "NotDicom",  # these no prefix
    "pydicom-data__JLSL_RGB_ILV1.dcm": "NotDicom",
    "pydicom-data__JLSL_RGB_ILV2.dcm": "NotDicom",
    "pydicom__JPEGLSNearLossless_08.dcm": "NotDicom",
    "pydicom__JPEGLSNearLossless_16.dcm": "NotDicom",
    "pydicom__SC_rgb_jls_lossy_line.dcm": "NotDicom",
    "pydicom__SC_rgb_jls_lossy_sample.dcm": "NotDicom",
}
#: pydicom has no decoder for 12 bits of JPEG Extended.
NO_REFERENCE = {
    "cornerstone3D__CTImage_JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51.dcm",
    "pydicom__JPGExtended.dcm",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*excess padding")  # pydicom's, on one file with bytes to spare
def test_every_single_object_equals_pydicom_or_is_refused(testdata: Path) -> None:
    """Over all transfer syntaxes, colours and depths at hand, frames are pydicom's, bit for bit, or refused by type."""
    refused = {}
    for path in sorted((testdata / "dicom" / "single").iterdir()):
        data = path.read_bytes()
        try:
            _, made = volume_of([data], FRAMES)
        except BadSource as error:
            refused[path.name] = type(error).__name__
            continue
        assert made.any(), path.name
        if path.name in NO_REFERENCE:
            continue
        ds = pydicom.dcmread(path)
        expected = ds.pixel_array
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            expected = apply_color_lut(expected, ds)
        assert np.array_equal(made, expected.reshape(made.shape)), path.name
    assert refused == UNREADABLE
