"""What ``make fuzz`` starts from holds, and what it has found stays mended."""

import random
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from cache.dicom.header import identify, read_header
from cache.errors import NotDicom, UnsupportedPixels
from tests.fuzz import seeds
from tests.fuzz.harness import Harness
from tests.fuzz.mutate import mutated


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return seeds.synthetic(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(seeds.neighbours(tmp_path_factory.mktemp("neighbours")))


def test_something_can_be_made_of_every_seed(harness: Harness, objects: dict[str, bytes]) -> None:
    """An object that is refused before its pixels would teach the fuzzer nothing about them."""
    assert [name for name, data in objects.items() if not harness.check(data)] == []


@pytest.mark.slow
def test_every_small_real_object_is_made_or_refused(harness: Harness, testdata: Path) -> None:
    """Over the odd and the malformed ones: nothing but our own refusals, twice the same, without holes."""
    found = {name: harness.check(data) for name, data in seeds.real(testdata).items()}
    assert len(found) > 40
    assert any(found.values())
    assert not all(found.values())


@pytest.mark.slow
def test_mutated_objects_are_made_or_refused(harness: Harness, objects: dict[str, bytes]) -> None:
    """A few changes to each seed, the same in each run: nothing but our own refusals."""
    chance = random.Random(1)

    def spoilt(data: bytes) -> bytes:
        at = chance.randrange(len(data) + 1)
        return data[:at] + chance.randbytes(2) + data[at + 2 :]

    made = [harness.check(mutated(data, seed, spoilt)) for data in objects.values() for seed in range(8)]
    assert True in made
    assert False in made


@pytest.mark.parametrize("vr", [b"SQ", b"UL", b"ZZ"])
@pytest.mark.parametrize("tag", [b"\x02\x00\x10\x00", b"\x08\x00\x18\x00", b"\x28\x00\x04\x00"])
def test_an_element_of_another_vr_is_refused_or_read(
    harness: Harness, objects: dict[str, bytes], tag: bytes, vr: bytes
) -> None:
    """Transfer syntax, instance and photometric interpretation written as what they cannot be."""
    data = objects["1.2.840.10008.1.2.1"]
    at = data.index(tag, 132)
    harness.check(data[: at + 4] + vr + data[at + 6 :])


def test_a_sequence_in_place_of_text_is_never_written_out(objects: dict[str, bytes]) -> None:
    """A text attribute that is a sequence is refused: as text, it would carry all that is in it."""
    ds = pydicom.dcmread(BytesIO(objects["1.2.840.10008.1.2.1"]))
    inner = Dataset()
    inner.PatientName = "Somebody"
    ds.add_new("RescaleType", "SQ", Sequence([inner]))
    out = BytesIO()
    ds.save_as(out)
    with pytest.raises(NotDicom) as caught:
        read_header(memoryview(out.getvalue()), 0)
    assert "Somebody" not in str(caught.value)
    broken = bytes([2, 0, 16, 0]) + b"SQ\0\0\x10\0\0\0" + b"\xfe\xff\x00\xe0\x08\0\0\0" + b"\x0c\0\0\0WW\0\0"
    with pytest.raises(NotDicom):
        identify(bytes(128) + b"DICM" + broken + out.getvalue()[400:])


@pytest.mark.parametrize("ahead_of", [b"\x28\x00\x11\x00", b"\x08\x00\x18\x00"], ids=["later", "earlier"])
def test_a_series_named_twice_is_refused(harness: Harness, objects: dict[str, bytes], ahead_of: bytes) -> None:
    """An object cannot be filed under the UID that comes first, and belong to the series that comes last."""
    data = objects["1.2.840.10008.1.2.1"]
    at = data.index(ahead_of, 132)
    twice = data[:at] + b"\x20\x00\x0e\x00UI\x06\x001.2.4\0" + data[at:]
    with pytest.raises(NotDicom, match="twice"):
        read_header(memoryview(twice), 0)
    harness.check(twice)


def test_a_tag_among_those_of_pixels_is_not_one_of_them(objects: dict[str, bytes]) -> None:
    """(7FE0,000A) lies between the elements that hold samples, and holds none."""
    data = objects["1.2.840.10008.1.2.1"]
    at = data.rindex(b"\xe0\x7f\x10\x00OW")
    with pytest.raises(UnsupportedPixels, match="no pixel data"):
        read_header(memoryview(data[: at + 2] + b"\x0a\x00" + data[at + 4 :]), 0)
