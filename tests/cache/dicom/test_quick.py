"""The quick way to a header is only ever quicker: what it reads is what pydicom reads."""

from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.dicom.header import InstanceHeader, _quickly, read_header
from cache.errors import BadSource

from .conftest import rewritten


def both(data: bytes) -> tuple[InstanceHeader | str, InstanceHeader | str, bool]:
    """The header, or the type of refusal, as it is read and with pydicom alone; whether the quick way was taken."""
    view = memoryview(data)
    taken = _quickly(view) is not None
    with pytest.MonkeyPatch.context() as patch:
        as_is = outcome(view)
        patch.setattr("cache.dicom.header._quickly", lambda data: None)
        return as_is, outcome(view), taken


def outcome(view: memoryview) -> InstanceHeader | str:
    try:
        return read_header(view, 0)
    except BadSource as error:
        return type(error).__name__


def test_every_object_of_the_test_data_reads_the_same(testdata: Path) -> None:
    """Over all files, real and malformed, both ways give the same header or refusal; most take the quick one."""
    folder = testdata / "dicom"
    paths = [path for each in (folder / "series").iterdir() for path in sorted(each.iterdir())[:2]]
    paths += [*(folder / "single").iterdir(), *(folder / "malformed").iterdir()]
    quick = 0
    for path in paths:
        as_is, by_pydicom, taken = both(path.read_bytes())
        assert as_is == by_pydicom, path.name
        quick += taken
    assert quick > len(paths) * 2 // 3


@pytest.mark.slow
@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=3), st.booleans())
def test_damage_is_seen_alike(phantom: list[bytes], flips: list[tuple[int, int]], implicit: bool) -> None:
    """Flipped bytes in a header never make the quick way accept what pydicom reads otherwise."""
    data = IMPLICIT.setdefault(phantom[0], in_implicit(phantom[0])) if implicit else phantom[0]
    damaged = bytearray(data)
    length = len(data) - 40 * 48 * 2
    for place, value in flips:
        damaged[132 + place % (length - 132)] = value
    as_is, by_pydicom, _ = both(bytes(damaged))
    assert as_is == by_pydicom


IMPLICIT: dict[bytes, bytes] = {}


def in_implicit(data: bytes) -> bytes:
    ds = pydicom.dcmread(BytesIO(data))
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    out = BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize(
    ("changes", "quick"),
    [
        ({}, True),
        ({"ImageType": ["DERIVED", "", "AXIAL "]}, True),
        ({"EchoTime": "+1.50"}, True),
        ({"AcquisitionNumber": "007"}, True),
        ({"RescaleSlope": ""}, True),
        ({"ImagePositionPatient": ["1", "2"]}, True),
        ({"SpacingBetweenSlices": None}, True),
        ({"DiffusionBValue": 800.0}, False),  # FD
        ({"TemporalPositionIndex": 3}, False),  # UL
        ({"Modality": "PT"}, False),
    ],
    ids=str,
)
def test_odd_values_read_the_same(phantom: list[bytes], changes: dict[str, object], quick: bool) -> None:
    """Empty, signed, padded and several values come out as by pydicom, which is asked for the kinds that are rare."""
    as_is, by_pydicom, taken = both(rewritten(phantom[0], **changes))
    assert isinstance(as_is, InstanceHeader)
    assert as_is == by_pydicom
    assert taken is quick
