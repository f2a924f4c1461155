"""What a series is of is read from the first bytes of an object, and whose it is leaves them hashed only."""

from datetime import UTC, datetime

import pydicom
import pytest

from cache.attributes import Attributes
from cache.dicom.header import describe
from cache.errors import NotDicom, TruncatedObject

from .conftest import rewritten

KEY = bytes(range(32))


def test_the_attributes(phantom: list[bytes]) -> None:
    """They are the object's own, and the beginning of the object is enough."""
    data = rewritten(phantom[0], BodyPartExamined="CHEST", StationName="CT01", NumberOfSeriesRelatedInstances=12)
    told = describe(data[:4096], KEY)
    assert told == describe(data, KEY)
    assert (told.modality, told.body_part, told.description) == ("CT", "CHEST", "Synthetic chest")
    assert (told.station, told.frames, told.instances) == ("CT01", 1, 12)
    assert told.taken_at == datetime(2020, 1, 1, 12, tzinfo=UTC).timestamp()
    assert told.frame_of_reference.count(".") > 2


def test_nothing_is_said(phantom: list[bytes]) -> None:
    """What the object leaves out is empty."""
    bare = dict.fromkeys(
        ("Modality", "BodyPartExamined", "SeriesDescription", "StationName", "StudyDate", "StudyTime", "PatientID")
    )
    assert describe(rewritten(phantom[0], **bare, FrameOfReferenceUID=None), KEY) == Attributes()


def test_the_patient_is_hashed(phantom: list[bytes]) -> None:
    """One patient has one hash for each key; another ID or issuer is another patient; no value can be read off it."""
    told = describe(phantom[0], KEY)
    assert len(told.patient) == 32
    assert "PHANTOM" not in repr(told)
    assert describe(phantom[5], KEY).patient == told.patient
    assert describe(phantom[0], bytes(32)).patient != told.patient
    assert describe(rewritten(phantom[0], PatientID="OTHER"), KEY).patient != told.patient
    assert describe(rewritten(phantom[0], IssuerOfPatientID="ELSEWHERE"), KEY).patient != told.patient


@pytest.mark.parametrize(
    ("date", "time", "offset", "expected"),
    [
        ("20240229", "235959.123456", "", datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC).timestamp()),
        ("20240301", "12", "", datetime(2024, 3, 1, 12, tzinfo=UTC).timestamp()),
        ("20240301", "", "+0130", datetime(2024, 2, 29, 22, 30, tzinfo=UTC).timestamp()),
        ("", "120000", "", 0.0),
        ("20240301", "99", "", 0.0),
        ("20241301", "120000", "", 0.0),
    ],
)
def test_the_time(phantom: list[bytes], date: str, time: str, offset: str, expected: float) -> None:
    """Date, time and offset make Unix seconds; a date that is none makes 0."""
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        data = rewritten(phantom[0], StudyDate=date, StudyTime=time, TimezoneOffsetFromUTC=offset)
    finally:
        pydicom.config.settings.writing_validation_mode = None
    assert describe(data, KEY).taken_at == expected


def test_text_in_other_scripts(phantom: list[bytes]) -> None:
    """A description is read in the object's character set, and kept to one short line."""
    told = describe(
        rewritten(phantom[0], SpecificCharacterSet="ISO_IR 192", SeriesDescription="Schädel\x07 nativ"), KEY
    )
    assert told.description == "Schädel nativ"


def test_too_little(phantom: list[bytes]) -> None:
    """A beginning that is too short is told from what is no DICOM."""
    with pytest.raises(TruncatedObject):
        describe(phantom[0][:600], KEY)
    with pytest.raises(NotDicom):
        describe(b"GIF89a" + bytes(4000), KEY)
