"""Values are those the object means: bits, sign, rescale and photometric interpretation, or a typed error."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import msgspec
import numpy as np
import pydicom
import pytest
from highdicom import get_volume_from_series
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import generate_uid

from cache.dicom.assemble import VolumeOptions, plan_volume
from cache.dicom.decode import decode_slice, decoders
from cache.dicom.header import ENCAPSULATED, NATIVE, read_header
from cache.errors import (
    DuplicateSlice,
    IrregularSeries,
    MissingSlice,
    MixedOrientations,
    MixedSizes,
    TiltedSeries,
    TruncatedObject,
    UndecodablePixels,
    UnsupportedPixels,
)

from .conftest import Array, rewritten, volume_of

RLE = "1.2.840.10008.1.2.5"
JPEG_LS = "1.2.840.10008.1.2.4.80"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
COMPRESSED = [RLE, JPEG_LS, JPEG_2000]


def with_values(data: bytes, values: Array, syntax: str = "", **changes: Any) -> bytes:
    """The object with other stored values, 16 bits each, compressed if a syntax is given."""
    ds = pydicom.dcmread(BytesIO(data))
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    ds.Rows, ds.Columns = values.shape
    ds.PixelData = values.tobytes()
    if syntax:
        ds.compress(syntax, generate_instance_uid=False)
    out = BytesIO()
    ds.save_as(out)
    return out.getvalue()


def with_codestream(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The object with its one compressed frame changed, and everything around it whole."""
    ds = pydicom.dcmread(BytesIO(data))
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    ds.PixelData = encapsulate([change(frame)])
    out = BytesIO()
    ds.save_as(out)
    return out.getvalue()


def oracle(objects: list[bytes], invert: bool = False) -> Array:
    datasets = [pydicom.dcmread(BytesIO(data)) for data in objects]
    array: Array = get_volume_from_series(datasets, apply_presentation_lut=invert).array
    return array


def test_rescale_is_that_of_each_slice(phantom: list[bytes]) -> None:
    """Slices with whole slopes and intercepts of their own keep exact integers, equal to highdicom's."""
    objects = [
        rewritten(data, RescaleSlope=str(1 + number % 3), RescaleIntercept=str(-1000 - number))
        for number, data in enumerate(phantom)
    ]
    plan, volume = volume_of(objects)
    assert plan.spec.dtype == "int16"
    assert np.array_equal(volume, oracle(objects))


def test_fractions_are_rounded_once(phantom: list[bytes]) -> None:
    """With fractional slopes the volume is highdicom's float64 result, rounded to float32."""
    objects = [
        rewritten(data, RescaleSlope=f"0.{number}37", RescaleIntercept="0.1") for number, data in enumerate(phantom)
    ]
    plan, volume = volume_of(objects)
    assert plan.spec.dtype == "float32"
    assert np.array_equal(volume, oracle(objects).astype(np.float32))


def test_without_rescale_values_are_as_stored(phantom: list[bytes]) -> None:
    """The rescale is an option: without it the volume holds the stored samples."""
    plan, volume = volume_of(phantom, VolumeOptions(rescale=False))
    assert plan.spec.dtype == "uint16"
    for planned in plan.slices:
        stored = pydicom.dcmread(BytesIO(phantom[plan.objects[planned.object].member])).pixel_array
        assert np.array_equal(volume[planned.at], stored)


@pytest.mark.parametrize("slope", ["1", "0.5"])
def test_monochrome1_is_inverted_on_demand_only(phantom: list[bytes], slope: str) -> None:
    """Kept as it is by default; "invert" turns values within the range of their bits, as highdicom does."""
    objects = [rewritten(data, PhotometricInterpretation="MONOCHROME1", RescaleSlope=slope) for data in phantom]
    assert np.array_equal(volume_of(objects)[1], oracle(objects))
    inverted = volume_of(objects, VolumeOptions(monochrome1="invert"))[1]
    assert np.array_equal(inverted, oracle(objects, invert=True))
    stored = volume_of(objects, VolumeOptions(rescale=False))[1]
    turned = volume_of(objects, VolumeOptions(rescale=False, monochrome1="invert"))[1]
    assert np.array_equal(turned, 4095 - stored)


def test_monochrome2_is_never_inverted(phantom: list[bytes]) -> None:
    """The option for MONOCHROME1 leaves other series alone."""
    assert np.array_equal(volume_of(phantom, VolumeOptions(monochrome1="invert"))[1], volume_of(phantom)[1])


@pytest.mark.parametrize("syntax", ["", *COMPRESSED])
def test_negative_values_survive_every_syntax(phantom: list[bytes], syntax: str) -> None:
    """Signed samples of fewer bits than their container come back with their sign."""
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    data = with_values(phantom[0], values, syntax, PixelRepresentation=1)
    assert np.array_equal(volume_of([data], VolumeOptions(rescale=False))[1][0], values)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", ["", RLE])
def test_unused_high_bits_do_not_count(phantom: list[bytes], syntax: str, signed: bool) -> None:
    """Whatever lies above Bits Stored (overlays, dirt) is not part of the value (PS3.5 §8.1.1)."""
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)
    dirty = (values & 0x0FFF).astype(np.uint16) | np.uint16(0x5000)
    data = with_values(phantom[0], dirty, syntax, PixelRepresentation=int(signed))
    expected = values if signed else values & 0x0FFF
    assert np.array_equal(volume_of([data], VolumeOptions(rescale=False))[1][0], expected)
    assert np.array_equal(volume_of([data])[1][0], expected - 1024)


@pytest.mark.parametrize("syntax", [JPEG_LS, JPEG_2000])
def test_codestreams_beyond_their_bits_are_refused(phantom: list[bytes], syntax: str) -> None:
    """A codestream of more bits than the header declares would wrap; it is refused instead."""
    values = np.full((64, 64), 9000, np.uint16)
    data = with_values(phantom[0], values, syntax, BitsStored=16, HighBit=15)
    lying = rewritten(data, BitsStored=12, HighBit=11)
    with pytest.raises(UndecodablePixels, match="12 bits"):
        volume_of([lying])


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_a_broken_codestream_is_undecodable(phantom: list[bytes], syntax: str) -> None:
    """Garbage and a cut in the codestream end in a typed error that names the instance."""
    values = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    data = with_values(phantom[0], values, syntax)
    for change in (lambda frame: b"\0" * len(frame), lambda frame: frame[:20]):
        broken = with_codestream(data, change)
        with pytest.raises(UndecodablePixels) as refusal:
            volume_of([broken])
        assert refusal.value.instances == (pydicom.dcmread(BytesIO(data)).SOPInstanceUID,)


@pytest.mark.parametrize(
    ("syntax", "shape"),
    [(syntax, shape) for syntax in COMPRESSED for shape in [(32, 32), (128, 128)]]
    + [(RLE, (1, 1)), (JPEG_LS, (32, 128)), (JPEG_2000, (32, 128))],
    ids=str,
)
def test_a_picture_of_another_size_is_undecodable(phantom: list[bytes], syntax: str, shape: tuple[int, int]) -> None:
    """A codestream is not stretched, cropped or reshaped to what the header says."""
    data = with_values(phantom[0], np.zeros(shape, np.uint16), syntax)
    lying = rewritten(data, Rows=64, Columns=64)
    with pytest.raises(UndecodablePixels):
        volume_of([lying])


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_a_frame_in_many_fragments_is_one_frame(phantom: list[bytes], syntax: str) -> None:
    """Fragments of a frame are joined (PS3.5 §A.4)."""
    values = np.random.default_rng(0).integers(0, 4096, (64, 64), dtype=np.uint16)
    ds = pydicom.dcmread(BytesIO(with_values(phantom[0], values, syntax)))
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    for has_bot in (True, False):
        ds.PixelData = encapsulate([frame], fragments_per_frame=3, has_bot=has_bot)
        out = BytesIO()
        ds.save_as(out)
        assert np.array_equal(volume_of([out.getvalue()], VolumeOptions(rescale=False))[1][0], values)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", JPEG_LS])
def test_an_object_that_shrank_since_is_truncated(phantom: list[bytes], syntax: str) -> None:
    """When the bytes are not those the header was read from, the end is noticed."""
    ds = pydicom.dcmread(BytesIO(phantom[0]))
    if syntax == JPEG_LS:
        ds.compress(syntax)
    ds.file_meta.TransferSyntaxUID = syntax
    out = BytesIO()
    ds.save_as(out)
    data = memoryview(out.getvalue())
    plan = plan_volume([read_header(data, 0)], VolumeOptions())
    volume = np.empty(plan.spec.shape, plan.spec.dtype)
    with pytest.raises(TruncatedObject):
        decode_slice(data[:-40], plan.objects[0], plan.slices[0], volume[0])


def test_a_transfer_syntax_nobody_decodes_is_unsupported(phantom: list[bytes]) -> None:
    """A header from elsewhere that names another syntax is refused, not guessed at."""
    plan = plan_volume([read_header(memoryview(phantom[0]), 0)], VolumeOptions())
    header = msgspec.structs.replace(plan.objects[0], transfer_syntax="1.2.3")
    with pytest.raises(UnsupportedPixels):
        decode_slice(memoryview(phantom[0]), header, plan.slices[0], np.empty(header.picture, plan.spec.dtype))


def test_every_transfer_syntax_has_one_named_decoder() -> None:
    """Lineage names decoder and version for each syntax whose headers are accepted, and for no other."""
    table = decoders()
    assert set(table) == NATIVE.keys() | ENCAPSULATED
    assert "imagecodecs " in table[JPEG_LS]
    assert all(any(part[0].isdigit() for part in text.split()) for text in table.values())


def moved(data: bytes, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> bytes:
    position = pydicom.dcmread(BytesIO(data)).ImagePositionPatient
    return rewritten(data, ImagePositionPatient=[f"{a + b:.8g}" for a, b in zip(position, (x, y, z), strict=True)])


def resized(data: bytes) -> bytes:
    return with_values(data, np.zeros((40, 40), np.uint16))


DIRT: dict[str, tuple[Callable[[list[bytes]], list[bytes]], type[IrregularSeries]]] = {
    "one removed": (lambda objects: objects[:5] + objects[6:], MissingSlice),
    "one doubled": (lambda objects: [*objects, rewritten(objects[5], SOPInstanceUID=generate_uid())], DuplicateSlice),
    "one sent twice": (lambda objects: [*objects, objects[5]], DuplicateSlice),
    "one shifted": (lambda objects: [*objects[:5], moved(objects[5], z=0.625), *objects[6:]], IrregularSeries),
    "one turned": (
        lambda objects: [*objects[:5], rewritten(objects[5], ImageOrientationPatient=[0, 1, 0, 0, 0, 1]), *objects[6:]],
        MixedOrientations,
    ),
    "one resized": (lambda objects: [*objects[:5], resized(objects[5]), *objects[6:]], MixedSizes),
    "sheared": (lambda objects: [moved(data, y=0.3 * number) for number, data in enumerate(objects)], TiltedSeries),
}


@pytest.mark.parametrize(("spoil", "error"), DIRT.values(), ids=DIRT.keys())
def test_a_spoilt_series_is_refused(
    phantom: list[bytes], spoil: Callable[[list[bytes]], list[bytes]], error: type[IrregularSeries]
) -> None:
    """From the objects on, each way to spoil a series gives the refusal of its kind, where highdicom refuses too."""
    objects = spoil(phantom)
    with pytest.raises(IrregularSeries) as refusal:
        volume_of(objects)
    assert type(refusal.value) is error
    with pytest.raises(ValueError):
        oracle(objects)


def test_instance_numbers_do_not_matter(phantom: list[bytes]) -> None:
    """Slices are ordered by position: shuffled numbers and shuffled arrival give the same volume."""
    numbers = np.random.default_rng(3).permutation(len(phantom))
    shuffled = [rewritten(phantom[n], InstanceNumber=int(position)) for position, n in enumerate(numbers)]
    plan, volume = volume_of(shuffled)
    expected_plan, expected = volume_of(phantom)
    assert np.array_equal(volume, expected)
    assert plan.spec == expected_plan.spec
