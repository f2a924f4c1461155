"""A header is read whole or refused by type, whatever bytes come in."""

import io
import logging
from io import BytesIO

import msgspec
import pydicom
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.uid import generate_uid

from cache.dicom.assemble import VolumeOptions
from cache.dicom.header import ENCAPSULATED, InstanceHeader, identify, pixel_value, read_header
from cache.errors import BadSource, NotDicom, TruncatedObject, UnsupportedPixels

from .conftest import rewritten, volume_of


def read(data: bytes) -> InstanceHeader:
    return read_header(memoryview(data), 0)


def test_a_header_says_what_the_object_says(phantom: list[bytes]) -> None:
    """Every field is the attribute's value, and the pixel data is where the header says."""
    data = phantom[3]
    ds = pydicom.dcmread(BytesIO(data))
    header = read_header(memoryview(data), 7)
    assert header.member == 7
    assert (header.study, header.series, header.instance) == (
        ds.StudyInstanceUID,
        ds.SeriesInstanceUID,
        ds.SOPInstanceUID,
    )
    assert (header.rows, header.columns, header.frames) == (40, 48, 1)
    assert (header.bits_allocated, header.bits_stored, header.signed) == (16, 12, False)
    assert header.position == tuple(float(value) for value in ds.ImagePositionPatient)
    assert header.orientation == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    assert header.pixel_spacing == (9.0, 7.5)
    assert (header.slope, header.intercept, header.rescale_type) == (1.0, -1024.0, "HU")
    assert header.stored_range == (0, 4095)
    assert bytes(pixel_value(memoryview(data), header)) == ds.PixelData


def test_a_header_survives_json(phantom: list[bytes]) -> None:
    """Headers travel between processes as JSON without loss."""
    header = read(phantom[0])
    assert msgspec.json.decode(msgspec.json.encode(header), type=InstanceHeader) == header


def test_an_object_cut_anywhere_is_refused(phantom: list[bytes]) -> None:
    """No cut passes for a whole object: it ends in a typed error, and with pixels cut in TruncatedObject."""
    data = phantom[0]
    header = read(data)
    for length in range(132, header.pixel_offset, 3):
        with pytest.raises((TruncatedObject, UnsupportedPixels, NotDicom)):
            read(data[:length])
    for length in (header.pixel_offset, header.pixel_offset + 1, len(data) - 1):
        with pytest.raises(TruncatedObject) as refusal:
            read(data[:length])
        assert refusal.value.instances == (header.instance,)


@pytest.mark.parametrize("syntax", sorted(ENCAPSULATED & {"1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80"}))
def test_a_cut_sequence_of_fragments_is_truncated(phantom: list[bytes], syntax: str) -> None:
    """Encapsulated pixel data without its closing delimiter has lost something."""
    ds = pydicom.dcmread(BytesIO(phantom[0]))
    ds.compress(syntax)
    out = BytesIO()
    ds.save_as(out)
    data = out.getvalue()
    whole = read(data)
    for length in (whole.pixel_offset + 4, whole.pixel_offset + 30, len(data) - 9):
        with pytest.raises(TruncatedObject):
            read(data[:length])


@given(st.binary(max_size=400))
@example(b"")
@example(b"\0" * 128 + b"DICM")
@example(b"\0" * 128 + b"DICM" + b"\x02\x00\x10\x00UI\xff\xff")
def test_no_bytes_raise_anything_but_our_errors(data: bytes) -> None:
    """Arbitrary bytes, with and without the prefix of a DICOM file, are refused by type."""
    for candidate in (data, b"\0" * 128 + b"DICM" + data):
        with pytest.raises(BadSource):
            read(candidate)
        with pytest.raises(BadSource):
            identify(candidate)


@pytest.mark.slow
@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_decoded_or_refused(phantom: list[bytes], flips: list[tuple[int, int]]) -> None:
    """A damaged object gives a volume or a typed error, never a foreign one."""
    damaged = bytearray(phantom[0])
    header = read(phantom[0]).pixel_offset - 128
    for place, value in flips:
        damaged[128 + place % header] = value
    try:
        plan, volume = volume_of([bytes(damaged)], VolumeOptions())
    except BadSource:
        return
    assert volume.shape == plan.spec.shape


@pytest.mark.parametrize("tag", [b"\x08\x00\x18\x00", b"\x02\x00\x10\x00"], ids=["SOP instance", "transfer syntax"])
def test_an_unknown_value_representation_is_no_dicom(phantom: list[bytes], tag: bytes) -> None:
    """A needed element of a kind that PS3.5 §6.2 does not know is refused by type."""
    with pytest.raises(NotDicom):
        read(phantom[0].replace(tag + b"UI", tag + b"UQ", 1))


def test_nothing_of_the_patient_is_kept(phantom: list[bytes]) -> None:
    """Neither the header nor a refusal holds a value that names the patient."""
    data = rewritten(phantom[0], PatientName="Doe^John", PatientID="12345678", HighBit=15)
    with pytest.raises(BadSource) as refusal:
        read(data)
    kept = repr(read(rewritten(phantom[0], PatientName="Doe^John", PatientID="12345678")))
    for value in ("Doe", "12345678"):
        assert value not in kept
        assert value not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"PixelData": None}, UnsupportedPixels),
        ({"Rows": None}, UnsupportedPixels),
        ({"Rows": 0}, UnsupportedPixels),
        ({"Rows": 41}, TruncatedObject),
        ({"Rows": 20}, UnsupportedPixels),  # room for a second frame that nobody declares
        ({"BitsStored": 17, "HighBit": 16}, UnsupportedPixels),
        ({"HighBit": 15}, UnsupportedPixels),
        ({"NumberOfFrames": 2}, TruncatedObject),
        ({"RescaleSlope": "1e999"}, UnsupportedPixels),
        ({"SeriesInstanceUID": "not a uid"}, NotDicom),
        ({"StudyInstanceUID": None}, NotDicom),
    ],
    ids=str,
)
def test_a_header_that_cannot_be_trusted_is_refused(
    phantom: list[bytes], changes: dict[str, object], error: type[BadSource]
) -> None:
    """Missing, contradictory and impossible descriptions of the pixels are refused, not repaired."""
    with pytest.raises(error):
        read(rewritten(phantom[0], **changes))


def test_an_unknown_transfer_syntax_is_refused(phantom: list[bytes]) -> None:
    """Pixels that no decoder here understands are refused when the header is read, not when they are needed."""
    unknown = phantom[0].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0", 1)
    with pytest.raises(UnsupportedPixels, match=r"1\.2\.840\.10008\.1\.2\.9"):
        read(unknown)


def test_negative_sizes_are_refused(phantom: list[bytes]) -> None:
    """Rows and columns that are both negative do not make a positive number of pixels."""
    data = phantom[0]
    for element, value in ((b"\x28\x00\x10\x00", 40), (b"\x28\x00\x11\x00", 48)):
        as_written = element + b"US\x02\x00" + value.to_bytes(2, "little")
        assert as_written in data
        data = data.replace(as_written, element + b"SS\x02\x00" + (-value).to_bytes(2, "little", signed=True))
    with pytest.raises(UnsupportedPixels, match="-40 × -48"):
        read(data)


def test_what_pydicom_logs_reaches_nobody() -> None:
    """Its messages quote values: none of them gets to the handlers of the process."""
    heard = io.StringIO()
    listener = logging.StreamHandler(heard)
    logging.getLogger().addHandler(listener)
    try:
        logging.getLogger("pydicom.dataset").error("PatientName: Doe^John")
        logging.getLogger("another").error("heard")
    finally:
        logging.getLogger().removeHandler(listener)
    assert heard.getvalue() == "heard\n"


def test_hostile_geometry_is_read_as_absent(phantom: list[bytes]) -> None:
    """Positions that are no numbers, too many or out of this world are absent, so that geometry stays finite."""
    assert read(rewritten(phantom[0], ImagePositionPatient=["0", "0", "1e30"])).position is None
    assert read(rewritten(phantom[0], ImagePositionPatient=["0", "0"])).position is None
    assert read(rewritten(phantom[0], PixelSpacing=None)).pixel_spacing is None


def test_identify_reads_the_beginning_only(phantom: list[bytes]) -> None:
    """The first kilobyte is enough, also of an object in another encoding."""
    ds = pydicom.dcmread(BytesIO(phantom[0]))
    expected = (ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID)
    assert identify(phantom[0][:1200]) == expected
    for syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"):
        out = BytesIO()
        ds.file_meta.TransferSyntaxUID = syntax
        ds.save_as(out)
        assert identify(out.getvalue()[:1200]) == expected


def test_identify_asks_for_more_when_cut_short(phantom: list[bytes]) -> None:
    """A beginning that ends before the UIDs is too short, which is not the same as no DICOM."""
    with pytest.raises(TruncatedObject):
        identify(phantom[0][:400])
    with pytest.raises(NotDicom):
        identify(b"GIF89a" + bytes(400))


def test_instances_are_told_apart(phantom: list[bytes]) -> None:
    """Each object of a series is identified by its own UID."""
    again = rewritten(phantom[0], SOPInstanceUID=generate_uid())
    assert identify(again)[:2] == identify(phantom[0])[:2]
    assert identify(again)[2] != identify(phantom[0])[2]
