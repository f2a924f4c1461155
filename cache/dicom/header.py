"""What one DICOM object says of itself: read once, checked, and small enough to travel as JSON.

pydicom walks the elements; where values end is watched from here, because it takes a value that is cut short for a
whole one. Only the attributes named below are ever read, and of those that tell of a patient only a keyed hash leaves
the object.
"""

import contextlib
import hashlib
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from datetime import datetime
from io import BytesIO
from typing import Any, Final, Literal, NamedTuple

import msgspec
import pydicom.charset
import pydicom.config
from pydicom.filereader import read_dataset

from cache.attributes import Attributes
from cache.errors import BadSource, MalformedUid, NotDicom, TruncatedObject, UnsupportedPixels
from cache.keys import check_uid

from .codecs import FrameFormat, told_syntax
from .elements import UNDEFINED, Element, Elements, Encoding
from .frames import frame_spans
from .grids import GRID_TAGS, NM, RT_DOSE, dose_frames, dose_values, reconstructed_frames
from .groups import DISTINGUISHING, FARTHEST_MM, PER_FRAME, SHARED, FrameGroups, Linear, read_groups, read_real_world
from .quick import Attribute, read_quickly
from .suv import KEYWORDS as SUV_KEYWORDS
from .suv import suvbw_factor

# What pydicom logs and warns of quotes values, also those that name a patient: it must reach nobody's log. What matters
# in it is found again here, as a typed error.
logging.getLogger("pydicom").propagate = False
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


DEFLATED: Final = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
RLE: Final = "1.2.840.10008.1.2.5"

#: Transfer syntaxes whose pixels are plain samples.
NATIVE: Final = {
    "1.2.840.10008.1.2": Encoding(implicit=True),
    "1.2.840.10008.1.2.1": Encoding(),
    DEFLATED: Encoding(),
    BIG_ENDIAN: Encoding(little=False),
}

#: Transfer syntaxes whose pixels are fragments of a codestream (PS3.5 §A.4) that we can decode.
ENCAPSULATED: Final = frozenset(
    {
        "1.2.840.10008.1.2.4.50",  # JPEG baseline
        "1.2.840.10008.1.2.4.51",  # JPEG extended
        "1.2.840.10008.1.2.4.57",  # JPEG lossless
        "1.2.840.10008.1.2.4.70",
        "1.2.840.10008.1.2.4.80",  # JPEG-LS
        "1.2.840.10008.1.2.4.81",
        "1.2.840.10008.1.2.4.90",  # JPEG 2000
        "1.2.840.10008.1.2.4.91",
        "1.2.840.10008.1.2.4.201",  # High-throughput JPEG 2000
        "1.2.840.10008.1.2.4.202",
        "1.2.840.10008.1.2.4.203",
        RLE,
    }
)

#: Syntaxes that everyday objects are written in: little endian, not deflated.
_QUICK_SYNTAXES: Final = ENCAPSULATED | (NATIVE.keys() - {DEFLATED, BIG_ENDIAN})

_PLAIN: Final = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "Rows",
    "Columns",
    "InstanceNumber",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "SpacingBetweenSlices",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
_TAGS: Final = [pydicom.datadict.tag_for_keyword(keyword) for keyword in (*_PLAIN, *DISTINGUISHING, *SUV_KEYWORDS)]
#: What is read of everyday objects: all of _TAGS but what PET and offset tables need, which these objects do not have.
_EVERYDAY: Final = {
    pydicom.datadict.tag_for_keyword(keyword): Attribute(
        keyword, pydicom.datadict.dictionary_VR(keyword).encode(), keyword in DISTINGUISHING
    )
    for keyword in (*_PLAIN, *DISTINGUISHING, "Units", "SpecificCharacterSet")
}
_CHARSETS: Final = frozenset(pydicom.charset.python_encoding)
_UID_TAGS: Final = [0x00080018, 0x0020000D, 0x0020000E]

_DESCRIBING: Final = [
    pydicom.datadict.tag_for_keyword(keyword)
    for keyword in (
        "SpecificCharacterSet",
        "StudyDate",
        "StudyTime",
        "TimezoneOffsetFromUTC",
        "Modality",
        "StationName",
        "SeriesDescription",
        "PatientID",
        "IssuerOfPatientID",
        "BodyPartExamined",
        "FrameOfReferenceUID",
        "NumberOfSeriesRelatedInstances",
        "NumberOfFrames",
    )
]

_MODALITY_LUT: Final = 0x00283000
_LUT_DESCRIPTOR: Final = 0x00283002
_LUT_DATA: Final = 0x00283006
_PALETTE: Final = {0x00281101: 0x00281201, 0x00281102: 0x00281202, 0x00281103: 0x00281203}
_SEGMENTED: Final = {0x00281101: 0x00281221, 0x00281102: 0x00281222, 0x00281103: 0x00281223}
_REAL_WORLD: Final = 0x00409096
#: What is read in place, where pydicom would parse or copy it whole.
_IN_PLACE: Final = frozenset(
    {
        SHARED,
        PER_FRAME,
        _MODALITY_LUT,
        _REAL_WORLD,
        *GRID_TAGS,
        *_PALETTE.keys(),
        *_PALETTE.values(),
        *_SEGMENTED.values(),
    }
)
#: What may not be there twice: nothing says which one counts, and the beginning of the file tells of one only.
_ONCE: Final = frozenset({0x00020010, *map(int, _TAGS), *_IN_PLACE})
_PIXELS: Final = 0x7FE00010
#: The element that holds the samples → what they are, if they are no integers (PS3.3 §C.7.6.24, §C.7.6.25).
_SAMPLES: Final[dict[int, Literal["", "float", "double"]]] = {0x7FE00008: "float", 0x7FE00009: "double", _PIXELS: ""}
_ITEM: Final = b"\xfe\xff\x00\xe0"
_DELIMITER: Final = b"\xfe\xff\xdd\xe0"

#: The largest frame we believe in: beyond it a header claims memory that no scanner fills.
_MOST_PIXELS: Final = 1 << 28
#: The longest dataset that a deflated object may unfold to.
_MOST_INFLATED: Final = 1 << 30


class Table(msgspec.Struct, frozen=True, array_like=True):
    """A lookup table (PS3.3 §C.11.1.1): ``entries`` of ``bits`` (8 or 16) each, for stored values from ``first`` on.

    Its data, ``nbytes`` bytes at ``offset``, lies where the pixel data lies, and is found as that is. ``segmented``: it
    is written in segments (§C.7.9.2).
    """

    entries: int
    first: int
    bits: int
    offset: int
    nbytes: int
    segmented: bool = False


class InstanceHeader(msgspec.Struct, frozen=True):
    """One single- or multi-frame object, as far as geometry and pixels go.

    ``member`` is its position in the pack, ``instance`` its SOP Instance UID. ``position`` and ``orientation`` are
    Image Position and Image Orientation (Patient) in LPS, ``position``, ``pixel_spacing`` (between rows, between
    columns) and ``spacing_between_slices`` in millimetres (PS3.3 §C.7.6.2); what is absent or unusable is None.
    ``projection_spacing`` is the size of a pixel where there is no patient coordinate system: on the detector or the
    film (§10.7.1). ``slope`` and ``intercept`` (§C.11.1) are 1 and 0 where the object has none. ``distinguishing``
    holds the values of DISTINGUISHING. What an object says of each of its frames is in ``groups``, which is empty if
    it says nothing usable.

    ``table`` is the Modality LUT (§C.11.1), ``palette`` red, green and blue (§C.7.9). ``suvbw`` takes rescaled values
    to g/ml; if it is None, ``suvbw_missing`` says why. ``words``: the samples of a big-endian object lie in 16-bit
    words.

    The Pixel Data value, without its closing delimiter, is ``pixel_nbytes`` bytes at ``pixel_offset`` of the object,
    or of what a deflated object's dataset inflates to: `dataset_of` finds both. In it begin the frames of a compressed
    object with several, at ``frame_starts`` (see `cache.dicom.frames.FrameIndex`).
    """

    member: int
    study: str
    series: str
    instance: str
    sop_class: str
    modality: str
    transfer_syntax: str
    frame_of_reference: str
    rows: int
    columns: int
    frames: int
    samples_per_pixel: int
    photometric: str
    planar_configuration: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    position: tuple[float, float, float] | None
    orientation: tuple[float, float, float, float, float, float] | None
    pixel_spacing: tuple[float, float] | None
    spacing_between_slices: float | None
    slope: float
    intercept: float
    rescale_type: str
    units: str
    modality_lut: bool
    functional_groups: bool
    distinguishing: tuple[str, ...]
    pixel_offset: int
    pixel_nbytes: int
    floating: Literal["", "float", "double"] = ""
    instance_number: int | None = None
    groups: tuple[FrameGroups, ...] = ()
    projection_spacing: tuple[float, float] | None = None
    table: Table | None = None
    palette: tuple[Table, ...] = ()
    real_world: Linear | None = None
    words: bool = False
    frame_starts: tuple[int, ...] = ()
    suvbw: float | None = None
    suvbw_missing: str = ""

    @property
    def format(self) -> FrameFormat:
        """What a decoder has to know of each frame."""
        return FrameFormat(
            transfer_syntax=self.transfer_syntax,
            rows=self.rows,
            columns=self.columns,
            samples_per_pixel=self.samples_per_pixel,
            photometric=self.photometric,
            planar_configuration=self.planar_configuration,
            bits_allocated=self.bits_allocated,
            bits_stored=self.bits_stored,
            signed=self.signed,
            floating=self.floating,
            words=self.words,
        )

    @property
    def picture(self) -> tuple[int, ...]:
        """The shape of a frame as it is shown: (rows, columns), or (rows, columns, 3) of colour."""
        colour = self.samples_per_pixel > 1 or self.palette
        return (self.rows, self.columns, 3) if colour else (self.rows, self.columns)

    @property
    def stored_range(self) -> tuple[int, int]:
        """The least and the greatest value that ``bits_stored`` bits can hold."""
        if self.signed:
            return -(1 << (self.bits_stored - 1)), (1 << (self.bits_stored - 1)) - 1
        return 0, (1 << self.bits_stored) - 1


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without warnings, for all that pydicom is asked: it may convert a value only when that is wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_unwarned()
def read_header(data: memoryview, member: int) -> InstanceHeader:
    """Read the header of the object ``data`` (a whole DICOM file, PS3.10 §7), the pack's member number ``member``.

    Raises:
        NotDicom: it is no DICOM file, or lacks the UIDs every object has.
        TruncatedObject: the dataset or the pixel data ends early.
        UnsupportedPixels: no pixel data, or a transfer syntax or sample layout that nothing here decodes.
    """
    scan, dataset, body = _quickly(data) or _thoroughly(data)
    if scan.truncated and scan.pixels is None:
        raise TruncatedObject("the object ends within its header: fetch or send it again")
    study, series, instance = _uids(dataset)
    try:
        floating, offset, nbytes = _locate_pixels(scan, body)
        try:
            header = _build(
                dataset,
                member=member,
                study=study,
                series=series,
                instance=instance,
                transfer_syntax=body.transfer_syntax,
                modality_lut=_MODALITY_LUT in scan.seen,
                functional_groups=PER_FRAME in scan.seen,
                pixel_offset=offset,
                pixel_nbytes=nbytes,
                floating=floating,
            )
            if body.transfer_syntax == BIG_ENDIAN:
                header = msgspec.structs.replace(header, words=scan.vr == "OW" and header.bits_allocated <= 8)
            if scan.seen & _IN_PLACE or header.sop_class == RT_DOSE:
                header = _with_parts(header, body)
        except (BadSource, MemoryError):
            raise
        except Exception as error:  # whatever pydicom's converters make of a malformed value
            raise UnsupportedPixels("an attribute of its pixels has no usable value") from error
        _check_samples(header)
        if header.frames > 1 and header.transfer_syntax not in NATIVE:
            tables = (dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths"))
            index = frame_spans(
                body.data, offset, nbytes, header.format, header.frames, extended=tables if all(tables) else None
            )
            header = msgspec.structs.replace(header, frame_starts=index.starts)
        return header
    except BadSource as error:
        raise type(error)(f"instance {instance} of series {series}: {error}", (instance,)) from error.__cause__


@_unwarned()
def identify(head: bytes) -> tuple[str, str, str]:
    """The Study, Series and SOP Instance UID in the first bytes of a file.

    Raises:
        NotDicom: this is no beginning of a DICOM file, or it lacks one of the UIDs.
        TruncatedObject: ``head`` ends before them: read more.
    """
    scan, dataset = _walk(_Body.of(memoryview(head), partial=True), _UID_TAGS, _UID_TAGS[-1])
    if max(scan.seen, default=0) <= _UID_TAGS[-1] and any(tag not in dataset for tag in _UID_TAGS):
        raise TruncatedObject("the object ends before the UIDs that name it")
    return _uids(dataset)


@_unwarned()
def describe(head: bytes, key: bytes) -> Attributes:
    """What a series can be searched by, from the first bytes of one of its objects. ``key``: 16 to 64 bytes.

    Raises:
        NotDicom: this is no beginning of a DICOM file.
        TruncatedObject: ``head`` ends before what is read: read more.
    """
    scan, dataset = _walk(_Body.of(memoryview(head), partial=True), _DESCRIBING, _DESCRIBING[-1])
    if max(scan.seen, default=0) <= _DESCRIBING[-1]:
        raise TruncatedObject("the object ends before what describes its series")
    patient = _line(dataset, "PatientID")
    whose = hashlib.blake2b(digest_size=16, key=key)
    whose.update(msgspec.msgpack.encode((_line(dataset, "IssuerOfPatientID"), patient)))
    return Attributes(
        patient=whose.hexdigest() if patient else "",
        modality=_line(dataset, "Modality"),
        body_part=_line(dataset, "BodyPartExamined"),
        description=_line(dataset, "SeriesDescription"),
        station=_line(dataset, "StationName"),
        taken_at=_seconds(*(_line(dataset, name) for name in ("StudyDate", "StudyTime", "TimezoneOffsetFromUTC"))),
        frame_of_reference=_uid(dataset, "FrameOfReferenceUID"),
        frames=_count(dataset, "NumberOfFrames") or 1,
        instances=_count(dataset, "NumberOfSeriesRelatedInstances"),
    )


def dataset_of(data: memoryview, header: InstanceHeader) -> memoryview:
    """What the header's offsets refer to: the object ``data``, or what a deflated one's dataset inflates to.

    Raises: TruncatedObject, NotDicom: ``data`` is not the object that ``header`` was read from.
    """
    if header.transfer_syntax == DEFLATED:
        with _unwarned():
            data = _Body.of(data).data
    parts = (header.table, *header.palette) if header.table else header.palette
    if len(data) < header.pixel_offset + header.pixel_nbytes or (
        parts and len(data) < max(part.offset + part.nbytes for part in parts)
    ):
        raise TruncatedObject("the pixel data ends early")
    return data


def pixel_value(data: memoryview, header: InstanceHeader) -> memoryview:
    """The Pixel Data value of the object ``data``, without a copy unless it is deflated. Raises: as `dataset_of`."""
    return dataset_of(data, header)[header.pixel_offset : header.pixel_offset + header.pixel_nbytes]


class _Found(NamedTuple):
    """What a walk over the top level of a dataset came upon."""

    seen: set[int]
    pixels: tuple[int, int, int] | None  # tag, offset and declared length of the value
    vr: str | None  # of the latest element
    truncated: bool = False


class _Place(NamedTuple):
    """The dataset of an object: ``data`` from ``start`` on."""

    data: memoryview
    start: int
    transfer_syntax: str


class _Attributes(dict[str, Any]):
    """Values by keyword, to be had as from pydicom's Dataset."""

    def __getattr__(self, keyword: str) -> Any:
        try:
            return self[keyword]
        except KeyError:
            raise AttributeError(keyword) from None


def _quickly(data: memoryview) -> tuple[_Found, Any, _Place] | None:
    """The walk over an everyday object, or None: pydicom has to see to it."""
    quick = read_quickly(data, _EVERYDAY)
    if quick is None or quick.transfer_syntax not in _QUICK_SYNTAXES or quick.values.get("Modality") == "PT":
        return None
    charsets = quick.values.get("SpecificCharacterSet", "")
    if not _CHARSETS.issuperset([charsets] if isinstance(charsets, str) else charsets):
        return None
    tag, vr, offset, length = quick.pixels
    found = _Found(quick.seen, (tag, offset, length), vr)
    return found, _Attributes(quick.values), _Place(data, quick.start, quick.transfer_syntax)


def _thoroughly(data: memoryview) -> tuple[_Found, Any, _Place]:
    body = _Body.of(data)
    scan, dataset = _walk(body, _TAGS, _PIXELS)
    place = _Place(body.data, body.start, body.transfer_syntax)
    return _Found(scan.seen, scan.pixels, scan.vr, scan.truncated), dataset, place


class _Scan:
    """Watches pydicom walk the top level of a dataset.

    It stops at the first tag outside ``tags`` or at pixels, and where a value is cut short.
    """

    def __init__(self, source: BytesIO, nbytes: int, tags: range) -> None:
        self._source = source
        self._nbytes = nbytes
        self._tags = tags
        self.truncated = False
        self.vr: str | None = None  # of the latest element
        self.end = source.tell()  # of the latest value; of its beginning, if its length is undefined
        self.open_ended = False  # the latest value has undefined length
        self.repeated = False  # something that we read
        self.seen: set[int] = set()
        self.pixels: tuple[int, int, int] | None = None  # tag, offset and declared length of the value

    def __call__(self, tag: int, vr: str | None, length: int) -> bool:
        self.vr = vr
        tag = int(tag)  # pydicom's own tags compare in Python, which takes a third of the whole walk
        self.repeated |= tag in self.seen and tag in _ONCE
        self.seen.add(tag)
        is_pixels = tag in _SAMPLES
        if tag not in self._tags and not is_pixels:
            return True
        begin = self._source.tell()
        self.open_ended = length == UNDEFINED
        self.end = begin if self.open_ended else begin + length
        self.truncated = self.end > self._nbytes
        if is_pixels:
            self.pixels = (tag, begin, length)
        return self.truncated or is_pixels


class _Body(NamedTuple):
    """The dataset of a file: ``data`` from ``start`` on, inflated if it has to be."""

    data: memoryview
    source: BytesIO  # over ``data``
    start: int
    transfer_syntax: str

    @classmethod
    def of(cls, data: memoryview, partial: bool = False) -> "_Body":
        """``partial``: only the beginning of the file is at hand."""
        if bytes(data[128:132]) != b"DICM":
            raise NotDicom("no DICOM file: the prefix DICM (PS3.10 §7.1) is missing")
        source = BytesIO(data)
        source.seek(132)
        scan = _Scan(source, len(data), range(0x00020000, 0x00030000))
        meta = _parse(source, scan, Encoding(), [0x00020010])
        if scan.truncated:
            raise TruncatedObject("the object ends within its file meta information")
        syntax = _text(meta, "TransferSyntaxUID")
        start = source.tell()
        if syntax != DEFLATED:
            return cls(data, source, start, syntax)
        inflated = _inflate(data[start:], partial)
        return cls(memoryview(inflated), BytesIO(inflated), 0, syntax)


def _inflate(data: memoryview, partial: bool) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        dataset = inflater.decompress(data, _MOST_INFLATED)
    except zlib.error as error:
        raise NotDicom("the deflated dataset (PS3.5 §A.5) cannot be inflated") from error
    if inflater.unconsumed_tail:
        raise UnsupportedPixels(f"the deflated dataset unfolds to more than {_MOST_INFLATED} bytes")
    if not inflater.eof and not partial:
        raise TruncatedObject("the deflated dataset ends early")
    return dataset


def _walk(body: _Body, tags: list[int], last: int) -> tuple[_Scan, Any]:
    """Read ``tags`` of the dataset, whose last one, or the last of interest, is ``last``."""
    body.source.seek(body.start)
    scan = _Scan(body.source, len(body.data), range(last + 1))
    dataset = _parse(body.source, scan, NATIVE.get(body.transfer_syntax, Encoding()), tags)
    if scan.pixels is None and not scan.truncated and max(scan.seen, default=0) <= last:
        # the walk came to the end by itself: is it the end of the dataset?
        closed = bytes(body.data[-8:-4]) == _DELIMITER
        scan.truncated = not closed if scan.open_ended else scan.end < len(body.data)
    return scan, dataset


def _parse(source: BytesIO, scan: _Scan, encoding: Encoding, tags: list[int]) -> Any:
    try:
        dataset = read_dataset(source, encoding.implicit, encoding.little, stop_when=scan, specific_tags=tags)
    except (EOFError, struct.error) as error:
        raise TruncatedObject("the object ends within an element of its header") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever pydicom makes of bytes that are no dataset
        raise NotDicom("the dataset cannot be read") from error
    if scan.repeated:
        raise NotDicom("an attribute is there twice (PS3.5 §7.1)")
    return dataset


def _locate_pixels(scan: _Found, body: _Place) -> tuple[Literal["", "float", "double"], int, int]:
    """Kind of samples, offset and length of the Pixel Data value, whole."""
    if scan.pixels is None:
        raise UnsupportedPixels("it holds no pixel data")
    tag, offset, length = scan.pixels
    floating = _SAMPLES[tag]
    if floating and body.transfer_syntax not in NATIVE:
        raise UnsupportedPixels("its floating-point pixels are compressed")
    if body.transfer_syntax not in NATIVE and body.transfer_syntax not in ENCAPSULATED:
        raise UnsupportedPixels(f"no decoder for transfer syntax {told_syntax(body.transfer_syntax)}")
    if (length == UNDEFINED) != (body.transfer_syntax in ENCAPSULATED):
        raise UnsupportedPixels("its pixel data is encapsulated, or is not, against its transfer syntax")
    if scan.truncated:
        raise TruncatedObject("the pixel data ends early: fetch or send the object again")
    return floating, offset, _encapsulated_nbytes(body.data, offset) if length == UNDEFINED else length


def _encapsulated_nbytes(data: memoryview, offset: int) -> int:
    """Bytes of the offset table and the fragments from ``offset`` up to the closing delimiter (PS3.5 §A.4)."""
    at = offset
    items = 0
    while at + 8 <= len(data) and bytes(data[at : at + 4]) == _ITEM:
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        items += 1
    if at + 8 > len(data):
        raise TruncatedObject("the pixel data ends early: fetch or send the object again")
    if bytes(data[at : at + 4]) != _DELIMITER or items < 2:
        raise UnsupportedPixels("its pixel data is no sequence of fragments")
    return at - offset


def _uids(dataset: Any) -> tuple[str, str, str]:
    names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    try:
        study, series, instance = (check_uid(_text(dataset, name)) for name in names)
    except MalformedUid as error:
        raise NotDicom("the Study, Series or SOP Instance UID is missing or malformed") from error
    return study, series, instance


def _line(dataset: Any, keyword: str) -> str:
    """The value as one line of printable text, at most 64 characters; "" for one that cannot be read."""
    try:
        text = _text(dataset, keyword)
    except (BadSource, LookupError, ValueError):  # LookupError: a character set that Python does not know
        return ""
    return "".join(filter(str.isprintable, text)).strip()[:64]


def _count(dataset: Any, keyword: str) -> int:
    text = _line(dataset, keyword)
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _seconds(date: str, time: str, offset: str) -> float:
    """A DA, a TM and an offset such as ``+0100`` (PS3.5 §6.2) in Unix seconds; 0 unless the first is a date."""
    with contextlib.suppress(ValueError):
        moment = datetime.strptime(
            f"{date} {time.partition('.')[0].ljust(6, '0') or '000000'} {offset or '+0000'}", "%Y%m%d %H%M%S %z"
        )
        return moment.timestamp()
    return 0.0


def _with_parts(header: InstanceHeader, body: _Place) -> InstanceHeader:
    """The header with what is read in place, between the dataset's start and its pixels."""
    encoding = NATIVE.get(body.transfer_syntax, Encoding())
    elements = Elements(body.data, encoding)
    end = header.pixel_offset - (8 if encoding.implicit else 12)
    parts = {element.tag: element for element in elements.walk(body.start, end) if element.tag in _IN_PLACE}
    palette: tuple[Table, ...] = ()
    if header.photometric == "PALETTE COLOR":
        segmented = not parts.keys().isdisjoint(_SEGMENTED.values())
        data = _SEGMENTED if segmented else _PALETTE
        found = [_table(elements, parts.get(d), parts.get(v), header, segmented) for d, v in data.items()]
        palette = tuple(table for table in found if table is not None)
    groups = read_groups(elements, parts, header.frames)
    first = FrameGroups(header.position, header.orientation, header.pixel_spacing, header.spacing_between_slices)
    if header.sop_class == RT_DOSE:
        dose = dose_values(elements, parts)
        if dose is None:
            raise UnsupportedPixels("a dose without its scaling")
        header = msgspec.structs.replace(header, slope=dose.slope, intercept=0.0, rescale_type=dose.units)
        groups = dose_frames(elements, parts, header.frames, first) if header.frames > 1 else ()
    elif header.sop_class == NM and not groups:
        groups = reconstructed_frames(elements, parts, header.frames, first)
    return msgspec.structs.replace(
        header,
        groups=groups,
        table=_modality_table(elements, parts[_MODALITY_LUT], header) if _MODALITY_LUT in parts else None,
        palette=palette if len(palette) == 3 else (),
        real_world=read_real_world(elements, parts[_REAL_WORLD]) if _REAL_WORLD in parts else None,
    )


def _modality_table(elements: Elements, sequence: Element, header: InstanceHeader) -> Table | None:
    """The only item of the Modality LUT Sequence (PS3.3 §C.11.1)."""
    items = list(elements.items(sequence))
    if len(items) != 1:
        return None
    inner = {element.tag: element for element in elements.walk(*items[0], sequence.encoding)}
    return _table(elements, inner.get(_LUT_DESCRIPTOR), inner.get(_LUT_DATA), header)


def _table(
    elements: Elements,
    descriptor: Element | None,
    values: Element | None,
    header: InstanceHeader,
    segmented: bool = False,
) -> Table | None:
    """The table, if its data is as long as its descriptor says (PS3.3 §C.11.1.1.1, §C.7.6.3.1.5), or in segments."""
    if descriptor is None or values is None:
        return None
    raw = elements.value(descriptor)
    if len(raw) != 6:
        return None
    entries, first, bits = struct.unpack(f"{'<' if descriptor.encoding.little else '>'}3H", raw)
    entries = entries or 1 << 16
    if header.signed and first >= 1 << 15:
        first -= 1 << 16
    nbytes = values.end - values.begin
    if segmented:
        usable = bits in (8, 16) and values.encoding.little
    else:
        # Eight-bit entries are written one or two bytes wide.
        width = 8 if bits == 8 and nbytes < 2 * entries else 16
        usable = 8 <= bits <= 16 and nbytes * 8 >= entries * width
    return Table(entries, first, bits, values.begin, nbytes, segmented) if usable else None


def _build(dataset: Any, **known: Any) -> InstanceHeader:
    slope, intercept = (float(dataset.get(name) or default) for name, default in _LINEAR)
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ValueError("a rescale that is no number")
    spacing = _floats(dataset, "SpacingBetweenSlices", 1)
    number = _optional(dataset, "InstanceNumber", 1)
    modality = _text(dataset, "Modality")
    suvbw, missing = _suvbw(dataset) if modality == "PT" else (None, "the modality is not PT")
    return InstanceHeader(
        sop_class=_text(dataset, "SOPClassUID"),
        modality=modality,
        frame_of_reference=_text(dataset, "FrameOfReferenceUID"),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        frames=int(dataset.get("NumberOfFrames") or 1),
        samples_per_pixel=int(dataset.get("SamplesPerPixel") or 1),
        photometric=_text(dataset, "PhotometricInterpretation"),
        planar_configuration=int(dataset.get("PlanarConfiguration") or 0),
        bits_allocated=int(dataset.BitsAllocated),
        bits_stored=_bits_stored(dataset),
        signed=bool(int(dataset.get("PixelRepresentation") or 0)),
        position=_floats(dataset, "ImagePositionPatient", 3),
        orientation=_floats(dataset, "ImageOrientationPatient", 6),
        pixel_spacing=_floats(dataset, "PixelSpacing", 2),
        spacing_between_slices=None if spacing is None else spacing[0],
        slope=slope,
        intercept=intercept,
        rescale_type=_text(dataset, "RescaleType"),
        units=_text(dataset, "Units"),
        distinguishing=tuple(_text(dataset, keyword) for keyword in DISTINGUISHING),
        instance_number=None if number is None else int(number[0]),
        projection_spacing=_optional(dataset, "ImagerPixelSpacing", 2)
        or _optional(dataset, "NominalScannedPixelSpacing", 2),
        suvbw=suvbw,
        suvbw_missing=missing,
        **known,
    )


def _suvbw(dataset: Any) -> tuple[float | None, str]:
    try:
        return suvbw_factor(dataset), ""
    except UnsupportedPixels as error:
        return None, str(error)


# An empty or zero slope maps everything to one value: it says nothing, and is read as absent, as highdicom does.
_LINEAR: Final = (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))


def _bits_stored(dataset: Any) -> int:
    stored = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    high = dataset.get("HighBit")
    if high is not None and int(high) != stored - 1:
        raise ValueError("samples that do not start at the lowest bit (retired since PS3.5-2014)")
    return stored


def _check_samples(header: InstanceHeader) -> None:
    """Refuse what no decoder can be trusted with (PS3.5 §8, PS3.3 §C.7.6.3)."""
    pixels = header.rows * header.columns
    if min(header.rows, header.columns) < 1 or max(header.rows, header.columns) > 65535 or pixels > _MOST_PIXELS:
        raise UnsupportedPixels(f"{header.rows} × {header.columns} is no size of a frame")
    if header.frames < 1 or header.samples_per_pixel < 1:
        raise UnsupportedPixels(f"{header.frames} frames of {header.samples_per_pixel} samples are no pixels")
    if not 1 <= header.bits_stored <= header.bits_allocated <= 64:
        raise UnsupportedPixels(f"{header.bits_stored} bits in {header.bits_allocated} are no sample")
    if header.transfer_syntax not in NATIVE:
        return
    frame_bits = pixels * header.samples_per_pixel * header.bits_allocated
    if header.photometric == "YBR_FULL_422":
        frame_bits = frame_bits * 2 // 3
    needed = -(-frame_bits * header.frames // 8)
    if header.pixel_nbytes < needed:
        raise TruncatedObject("the pixel data is shorter than its rows and columns need")
    if (header.pixel_nbytes - needed - needed % 2) * 8 >= frame_bits:
        raise UnsupportedPixels("it holds more frames than it declares")


def _value(dataset: Any, keyword: str) -> Any:
    """The element's value, which pydicom converts only now, or None. Raises: NotDicom."""
    try:
        return dataset.get(keyword)
    except MemoryError:
        raise
    except Exception as error:  # whatever pydicom makes of bytes that are no such value
        raise NotDicom(f"{keyword} cannot be read") from error


def _uid(dataset: Any, keyword: str) -> str:
    """The UID, or "" for none and for what is none: text in its place may be anything. Raises: NotDicom."""
    with contextlib.suppress(MalformedUid):
        return check_uid(_line(dataset, keyword))
    return ""


def _text(dataset: Any, keyword: str) -> str:
    """The value as text, several joined by backslashes; "" for none. Raises: NotDicom."""
    value = _value(dataset, keyword)
    if value is None:
        return ""
    if isinstance(value, str):
        return str(value).strip(" \0")
    if isinstance(value, pydicom.Sequence):  # written out, it would say all that is in it, and of whom
        raise NotDicom(f"{keyword} cannot be read")
    parts = value if hasattr(value, "__iter__") else [value]
    return "\\".join(str(part).strip(" \0") for part in parts)


def _optional(dataset: Any, keyword: str, count: int) -> Any:
    """As `_floats`, for what no volume depends on: a value that is no number is None, too."""
    try:
        return _floats(dataset, keyword, count)
    except (TypeError, ValueError):
        return None


def _floats(dataset: Any, keyword: str, count: int) -> Any:
    """``count`` numbers within reason, or None."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    numbers = tuple(float(part) for part in (value if hasattr(value, "__iter__") else [value]))
    usable = len(numbers) == count and all(abs(number) <= FARTHEST_MM for number in numbers)
    return numbers if usable else None
