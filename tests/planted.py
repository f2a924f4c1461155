"""Series whose every identifying attribute holds a value that is found again wherever it gets to."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pydicom
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from cache.dicom.phantom import write_series
from cache.keys import SeriesRef

#: Text and dates that were planted, in any case, also as UTF-16; no UID or digest looks like them.
PLANTED: Final = re.compile(rb"zq7x[0-9a-f]{4}|z\0q\0007\0x\0|19110307|1911-03-07", re.IGNORECASE)

_TEXT: Final = frozenset({"PN", "LO", "SH", "ST", "LT", "UT", "UC", "AE"})
#: Groups of PS3.6 that tell of persons, institutions, devices, orders, visits and procedures.
_GROUPS: Final = frozenset({0x0008, 0x0010, 0x0012, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040, 0x0088, 0x4000, 0x4008})
#: What plans may look at, and so has to be shown to whoever asks for the plan (docs/warming.md).
SHOWN: Final = {"SeriesDescription": "ZQ7XDESCRIPTION", "StationName": "ZQ7XSTATION"}
#: What decides how pixels are read.
_READ: Final = frozenset({"RescaleType", "PixelData", "TriggerTime", "Units", "ImageType"})


def mark(tag: int) -> str:
    """What is planted in an attribute."""
    return f"ZQ7X{tag:08X}"


@functools.cache
def _identifying() -> Dataset:
    """Every attribute of the data dictionary that may tell of somebody, filled; in items of sequences, too."""
    ds = Dataset()
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        if tag >> 16 not in _GROUPS or not keyword or retired or keyword in _READ or keyword in SHOWN:
            continue
        if vr in _TEXT:
            ds.add_new(tag, vr, f"{mark(tag)}^Cañary" if vr == "PN" else mark(tag))
        elif vr == "DA" and not keyword.startswith(("Study", "Series", "Acquisition", "Content")):
            ds.add_new(tag, vr, "19110307")
        elif vr == "DT":
            ds.add_new(tag, vr, "19110307031415")
    person = Dataset()
    person.update(ds)
    ds.OtherPatientIDsSequence = Sequence([person])
    for keyword, text in SHOWN.items():
        setattr(ds, keyword, text)
    private = ds.private_block(0x0009, mark(0x00090010), create=True)
    private.add_new(0x01, "LO", mark(0x00091001))
    private.add_new(0x02, "UN", mark(0x00091002).encode())
    ds.SpecificCharacterSet = "ISO_IR 192"
    return ds


@functools.cache
def _telling() -> Dataset:
    """Those of them that every object has."""
    ds, whole = Dataset(), _identifying()
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "InstitutionName", *SHOWN):
        ds[keyword] = whole[keyword]
    return ds


def plant(ds: Dataset, *, whole: bool) -> None:
    """Fill attributes that may tell of somebody: the ``whole`` of them, or those that tell most."""
    assert len(_identifying()) > 300
    ds.update(_identifying() if whole else _telling())
    ds.preamble = mark(0).encode().ljust(128)
    ds.file_meta.SourceApplicationEntityTitle = mark(0x00020016)
    ds.file_meta.PrivateInformationCreatorUID = "1.2.3.4"
    ds.file_meta.PrivateInformation = mark(0x00020102).encode()


Edit = Callable[[Dataset, int], None]


def planted(
    folder: Path, seed: int, edit: Edit | None = None, transfer_syntax: str = "1.2.840.10008.1.2.1"
) -> SeriesRef:
    """A series of four small slices, with ``edit`` made to each by its number."""
    study, series, paths = write_series(
        folder, slices=4, rows=32, columns=32, seed=seed, transfer_syntax=transfer_syntax
    )
    for number, path in enumerate(paths):
        ds = pydicom.dcmread(path)
        plant(ds, whole=edit is None)
        if edit is not None:
            edit(ds, number)
        ds.save_as(path, enforce_file_format=True)
    return SeriesRef(study, series)


def _raw(ds: Dataset, keyword: str, text: str) -> None:
    """An attribute with a value that its representation does not allow."""
    tag = pydicom.datadict.tag_for_keyword(keyword)
    assert tag is not None
    if keyword in ds:
        del ds[keyword]
    ds.add(pydicom.dataelem.RawDataElement(pydicom.tag.Tag(tag), "LO", len(text), text.encode(), 0, False, True))


def _edit(keyword: str) -> Edit:
    def edit(ds: Dataset, number: int) -> None:
        if number == 2:
            _raw(ds, keyword, mark(0xE001))

    return edit


def _syntax(ds: Dataset, number: int) -> None:
    ds.file_meta.TransferSyntaxUID = UID(mark(0x00020010))


def _colours(ds: Dataset, number: int) -> None:
    ds.SamplesPerPixel = 3
    ds.PlanarConfiguration = 0
    ds.PixelData = ds.PixelData * 3
    _raw(ds, "PhotometricInterpretation", mark(0x00280004))


def _gap(ds: Dataset, number: int) -> None:
    if number > 1:
        ds.ImagePositionPatient[2] += 5


def _same_place(ds: Dataset, number: int) -> None:
    ds.ImagePositionPatient[2] = 0
    ds.StackID = mark(0x00209056 + number)


def _codestream(ds: Dataset, number: int) -> None:
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + mark(0x7FE00010).encode() * 20])


#: Ways in which a series cannot be made a tensor of, each an error with words.
BROKEN: Final[dict[str, Edit]] = {
    **{
        keyword: _edit(keyword)
        for keyword in (
            *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "Rows"),
            *("SOPInstanceUID", "FrameOfReferenceUID", "PhotometricInterpretation", "SOPClassUID", "BitsStored"),
            *("InstanceNumber", "StudyInstanceUID", "SeriesInstanceUID", "SamplesPerPixel"),
        )
    },
    "colours": _colours,
    "gap": _gap,
    "same place": _same_place,
    "codestream": _codestream,
    "transfer syntax": _syntax,
}
