"""Multi-frame objects: their frames are slices, placed and scaled as their functional groups say, as by highdicom."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
import msgspec
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRBigEndian, ImplicitVRLittleEndian

from cache.dicom.assemble import VolumeOptions, plan_volume
from cache.dicom.decode import decode_slice
from cache.dicom.groups import DISTINGUISHING
from cache.dicom.header import InstanceHeader, read_header
from cache.errors import (
    BadSource,
    DuplicateSlice,
    IrregularSeries,
    MissingSlice,
    MixedOrientations,
    NotDicom,
    SeveralVolumes,
    TiltedSeries,
    TruncatedObject,
    UnsupportedPixels,
)

from .conftest import volume_of

EXPLICIT = "1.2.840.10008.1.2.1"
RLE = "1.2.840.10008.1.2.5"
JPEG_LS = "1.2.840.10008.1.2.4.80"

Spoil = Callable[[Dataset], None]


def item(**values: Any) -> Sequence:
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return Sequence([ds])


def enhanced(
    *, frames: int = 6, first: int = 0, instance: str = "1.2.3.1", step: float = 1.5, change: Spoil | None = None
) -> Dataset:
    """An enhanced CT, oblique, its frames stored in another order than they lie in, each with its own rescale."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = EXPLICIT
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = instance
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2", "1.2.3", "1.2.9"
    ds.Modality = "CT"
    ds.Rows, ds.Columns, ds.NumberOfFrames = 8, 10, frames
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=[0.8, 0.6, 0, 0, 0, -1])
    shared.PixelMeasuresSequence = item(PixelSpacing=["0.5", "0.75"], SliceThickness="3")
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence([])
    normal = np.cross([0, 0, -1], [0.8, 0.6, 0])
    for number in range(frames):
        place = np.array([-10.0, -20.0, 30.0]) + (first + (number * 5) % frames) * step * normal
        groups = Dataset()
        groups.PlanePositionSequence = item(ImagePositionPatient=[f"{value:.10g}" for value in place])
        groups.PixelValueTransformationSequence = item(
            RescaleSlope=str(1 + number % 2), RescaleIntercept=str(-1000 - number), RescaleType="HU"
        )
        groups.FrameContentSequence = item(StackID="1", InStackPositionNumber=number + 1)
        ds.PerFrameFunctionalGroupsSequence.append(groups)
    stored = np.random.default_rng(first).integers(0, 4096, (frames, 8, 10), np.uint16)
    ds.PixelData = stored.tobytes()
    if change is not None:
        change(ds)
    return ds


def written(ds: Dataset, syntax: str = EXPLICIT, undefined: bool = False) -> bytes:
    """The object in another encoding; ``undefined``: its sequences and items have no stated length."""
    ds.file_meta.TransferSyntaxUID = EXPLICIT if syntax in (RLE, JPEG_LS) else syntax
    if undefined:
        for one in (ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence):
            one.is_undefined_length = True
            for groups in one:
                groups.is_undefined_length_sequence_item = True
                for macro in groups:
                    if macro.VR == "SQ":
                        macro.is_undefined_length = True
                        for inner in macro.value:
                            inner.is_undefined_length_sequence_item = True
    if syntax in (RLE, JPEG_LS):
        ds.compress(syntax, generate_instance_uid=False)
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    out = BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def read(data: bytes) -> InstanceHeader:
    return read_header(memoryview(data), 0)


def oracle(data: bytes, rescale: bool = True) -> highdicom.Volume:
    image = highdicom.Image.from_dataset(pydicom.dcmread(BytesIO(data)))
    return image.get_volume(
        apply_modality_transform=None if rescale else False,
        apply_real_world_transform=False,
        apply_presentation_lut=False,
    )


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "stored"])
@pytest.mark.parametrize("undefined", [False, True], ids=["lengths", "delimiters"])
@pytest.mark.parametrize("syntax", [EXPLICIT, ImplicitVRLittleEndian, RLE, JPEG_LS])
def test_an_enhanced_object_equals_highdicom(syntax: str, undefined: bool, rescale: bool) -> None:
    """Array and affine are the oracle's: frames ordered by their positions, each with the rescale of its groups."""
    data = written(enhanced(), syntax, undefined)
    plan, volume = volume_of([data], VolumeOptions(rescale=rescale))
    expected = oracle(data, rescale)
    assert plan.spec.dtype == ("int16" if rescale else "uint16")
    assert plan.spec.units == ("HU" if rescale else "")
    assert np.array_equal(volume, expected.array)
    assert np.allclose(np.array(plan.spec.affine), expected.affine, atol=1e-9)


def test_big_endian_groups_are_read_as_such() -> None:
    """The functional groups of a big-endian object say what those of a little-endian one say."""
    expected_plan, expected = volume_of([written(enhanced())])
    plan, volume = volume_of([written(enhanced(), ExplicitVRBigEndian)])
    assert plan.spec == expected_plan.spec
    assert np.array_equal(volume, expected)


def test_one_volume_in_several_objects() -> None:
    """Frames of several objects of a series are ordered together, whatever order the objects come in."""
    whole = written(enhanced(frames=6), EXPLICIT)
    parts = [
        written(enhanced(frames=3, first=first, instance=f"1.2.3.{first}"), syntax)
        for first, syntax in ((3, RLE), (0, EXPLICIT))
    ]
    plan, volume = volume_of(parts)
    spec = volume_of([whole])[0].spec
    assert (plan.spec.shape, plan.spec.spacing, plan.spec.affine) == (spec.shape, spec.spacing, spec.affine)
    # each alone is the lower or the upper half
    assert np.array_equal(volume, np.concatenate([volume_of([parts[1]])[1], volume_of([parts[0]])[1]]))


@pytest.mark.parametrize("table", ["none", "basic", "extended"])
def test_any_frame_is_found(table: str) -> None:
    """With a basic, an extended or no offset table, frame N alone is frame N of the volume."""
    ds = enhanced()
    ds.compress(JPEG_LS, generate_instance_uid=False)
    frames = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=6))
    if table == "extended":
        ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(frames)
    else:
        ds.PixelData = encapsulate(frames, has_bot=table == "basic")
    out = BytesIO()
    ds.save_as(out, enforce_file_format=True)
    data = out.getvalue()
    plan, volume = volume_of([data])
    assert np.array_equal(volume, volume_of([written(enhanced())])[1])
    for piece in plan.slices:
        alone = np.zeros_like(volume)
        decode_slice(memoryview(data), plan.objects[0], piece, alone[piece.at])
        assert np.array_equal(alone[piece.at], volume[piece.at])
        assert np.count_nonzero(alone.any(axis=(1, 2))) == 1


def groups_of(ds: Dataset, number: int) -> Any:
    return ds.PerFrameFunctionalGroupsSequence[number]


def at(ds: Dataset, number: int, *shift: float) -> None:
    position = groups_of(ds, number).PlanePositionSequence[0]
    moved = [float(a) + b for a, b in zip(position.ImagePositionPatient, shift, strict=True)]
    position.ImagePositionPatient = [f"{value:.10g}" for value in moved]


def sheared(ds: Dataset) -> None:
    for number in range(6):
        at(ds, number, 0, 0, -0.4 * ((number * 5) % 6))


def without(ds: Dataset, *numbers: int) -> None:
    """Some frames fewer, here and in the pixels."""
    kept = [number for number in range(6) if number not in numbers]
    ds.PerFrameFunctionalGroupsSequence = Sequence([groups_of(ds, number) for number in kept])
    ds.PixelData = np.frombuffer(ds.PixelData, np.uint16).reshape(6, 80)[kept].tobytes()
    ds.NumberOfFrames = len(kept)


SPOILT: dict[str, tuple[Spoil, type[BadSource]]] = {
    "one removed": (lambda ds: without(ds, 2), MissingSlice),
    "one doubled": (
        lambda ds: setattr(groups_of(ds, 1), "PlanePositionSequence", groups_of(ds, 2).PlanePositionSequence),
        DuplicateSlice,
    ),
    "one shifted": (lambda ds: at(ds, 1, -0.36, 0.48, 0), IrregularSeries),
    "one turned": (
        lambda ds: setattr(
            groups_of(ds, 1), "PlaneOrientationSequence", item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
        ),
        MixedOrientations,
    ),
    "sheared": (sheared, TiltedSeries),
    "no positions": (lambda ds: groups_of(ds, 1).__delattr__("PlanePositionSequence"), IrregularSeries),
    "a group too few": (lambda ds: ds.PerFrameFunctionalGroupsSequence.pop(), UnsupportedPixels),
    "no groups": (lambda ds: ds.__delattr__("PerFrameFunctionalGroupsSequence"), UnsupportedPixels),
    "no number": (
        lambda ds: setattr(
            groups_of(ds, 1),
            "PixelValueTransformationSequence",
            item(RescaleSlope="1e999", RescaleIntercept="0", RescaleType="HU"),
        ),
        UnsupportedPixels,
    ),
}


@pytest.mark.parametrize(("spoil", "error"), SPOILT.values(), ids=SPOILT.keys())
def test_spoilt_frames_are_refused(spoil: Spoil, error: type[BadSource]) -> None:
    """Each way to spoil a series of instances spoils one of frames alike, and the object is named."""
    with pytest.raises(BadSource) as refusal:
        volume_of([written(enhanced(change=spoil))])
    assert type(refusal.value) is error
    assert refusal.value.instances == ("1.2.3.1",)


def test_frames_at_fault_are_numbered() -> None:
    """Of an object with many frames, the refusal says which."""
    with pytest.raises(MissingSlice, match=r"frames 3, 2\)"):
        volume_of([written(enhanced(change=lambda ds: without(ds, 2)))])


def test_frames_of_two_times_are_several_volumes() -> None:
    """What tells frames at one place apart is found in their groups, under the keyword of classic objects."""

    def twice(ds: Dataset) -> None:
        for number in range(6):
            groups_of(ds, number).FrameContentSequence[0].TemporalPositionIndex = 1 + number // 3
            groups_of(ds, number).PlanePositionSequence = groups_of(ds, number % 3).PlanePositionSequence

    with pytest.raises(SeveralVolumes, match="TemporalPositionIndex"):
        volume_of([written(enhanced(change=twice))])


def test_a_header_with_groups_survives_json() -> None:
    """Groups travel between processes without loss, and the plan does without them."""
    header = read(written(enhanced(), JPEG_LS))
    assert len(header.groups) == len(header.frame_starts) == 6
    assert len(header.groups[0].distinguishing) == len(DISTINGUISHING)
    assert msgspec.json.decode(msgspec.json.encode(header), type=InstanceHeader) == header
    plan = plan_volume([header], VolumeOptions())
    assert not plan.objects[0].groups
    assert len(plan.part(plan.slices[2:4]).objects) == 1


@pytest.mark.slow
def test_a_plan_of_many_frames_is_small() -> None:
    """A thousand frames cost the header once, and some bytes each."""
    ds = enhanced(frames=1000 - 1)  # not divisible by five, so that all places are taken
    plan = plan_volume([read(written(ds))], VolumeOptions())
    assert len(plan.slices) == 999
    assert len(msgspec.json.encode(plan)) < 50_000


def nested(depth: int) -> bytes:
    """Per-frame groups whose macro holds sequences without end, as far as these bytes go."""
    private = b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return b"\x00\x52\x30\x92SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" + private * depth


@pytest.mark.parametrize("depth", [20, 5000])
def test_sequences_without_end_are_refused(depth: int) -> None:
    """Nesting that nobody could have meant ends in a typed error, at any depth."""
    data = written(enhanced(change=lambda ds: ds.__delattr__("PerFrameFunctionalGroupsSequence")))
    pixels = data.index(b"\xe0\x7f\x10\x00OW")
    with pytest.raises((NotDicom, TruncatedObject)):
        read(data[:pixels] + nested(depth) + data[pixels:])


@pytest.mark.slow
def test_groups_cut_anywhere_are_refused() -> None:
    """A length that lies anywhere within the groups ends in a typed error, or in groups that place no frame."""
    data = written(enhanced(frames=2))
    begin, end = data.index(b"\x00\x52\x29\x92SQ"), data.index(b"\xe0\x7f\x10\x00OW")
    for place in range(begin, end):
        for value in (0, 7, 255):
            damaged = bytearray(data)
            damaged[place] = value
            try:
                volume_of([bytes(damaged)])
            except BadSource:
                continue


def test_a_real_enhanced_object(testdata: Path) -> None:
    """A Philips volume of eight sagittal frames, each rescaled: highdicom's, once given the frame of reference."""
    data = (testdata / "dicom" / "single" / "dicom2nifti__anatomical_001_IM-0001-0170-0001.dcm").read_bytes()
    ds = pydicom.dcmread(BytesIO(data))
    ds.FrameOfReferenceUID = "1.2.3"  # it insists on one
    out = BytesIO()
    ds.save_as(out)
    expected = oracle(out.getvalue())
    plan, volume = volume_of([data])
    assert plan.spec.dtype == "float32"
    assert np.array_equal(volume, expected.array.astype(np.float32))
    assert np.allclose(np.array(plan.spec.affine), expected.affine, atol=1e-9)


@pytest.mark.parametrize("name", ["pydicom-data__liver_nonbyte_aligned.dcm", "pydicom-data__liver_j2k.dcm"])
def test_real_segments_of_one_bit(testdata: Path, name: str) -> None:
    """One-bit frames, byte-aligned or not, plain or compressed, are uint8 volumes that equal pydicom's."""
    data = (testdata / "dicom" / "single" / name).read_bytes()
    plan, volume = volume_of([data], VolumeOptions(rescale=False))
    assert plan.spec.dtype == "uint8"
    expected = pydicom.dcmread(BytesIO(data)).pixel_array
    order = [piece.frame for piece in plan.slices]
    assert np.array_equal(volume, expected[order])
