"""The synthetic series are DICOM that others read, the same at every call, in every syntax."""

from pathlib import Path

import numpy as np
import pydicom
import pytest

from cache.dicom.phantom import write_series

from .conftest import volume_of

SYNTAXES = {
    "implicit": "1.2.840.10008.1.2",
    "explicit": "1.2.840.10008.1.2.1",
    "big-endian": "1.2.840.10008.1.2.2",
    "deflated": "1.2.840.10008.1.2.1.99",
    "rle": "1.2.840.10008.1.2.5",
    "jpeg-ls": "1.2.840.10008.1.2.4.80",
    "jpeg-2000": "1.2.840.10008.1.2.4.90",
    "htj2k": "1.2.840.10008.1.2.4.201",
}


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES.keys())
def test_every_syntax_holds_the_same_volume(tmp_path: Path, phantom: list[bytes], syntax: str) -> None:
    """Whatever syntax a series is written in, the volume is that of the uncompressed one, affine included."""
    paths = write_series(tmp_path, slices=12, rows=40, columns=48, transfer_syntax=syntax)[2]
    plan, volume = volume_of([path.read_bytes() for path in paths])
    expected_plan, expected = volume_of(phantom)
    assert {header.transfer_syntax for header in plan.objects} == {syntax}
    assert plan.spec == expected_plan.spec
    assert np.array_equal(volume, expected)


def test_it_looks_like_a_chest(phantom: list[bytes]) -> None:
    """Air, lung, soft tissue and bone are where they should be, in Hounsfield units."""
    plan, volume = volume_of(phantom)
    assert plan.spec.dtype == "int16"
    assert plan.spec.units == "HU"
    assert np.array(plan.spec.spacing)[0] == 1.25
    middle = volume[6]
    assert middle[0, 0] < -900
    assert -950 < np.median(middle[18:22, 12:15]) < -700
    assert volume.max() > 300


def test_it_is_written_where_and_as_it_says(tmp_path: Path) -> None:
    """Files lie under study and series, progress is told after each, and another reader finds the same identifiers."""
    seen: list[tuple[int, int]] = []
    study, series, paths = write_series(
        tmp_path,
        slices=3,
        rows=8,
        columns=8,
        study_uid="1.2.3",
        series_uid="1.2.3.4",
        progress=lambda done, of: seen.append((done, of)),
    )
    assert (study, series) == ("1.2.3", "1.2.3.4")
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for path in paths:
        ds = pydicom.dcmread(path)
        assert path == tmp_path / "1.2.3" / "1.2.3.4" / f"{ds.SOPInstanceUID}.dcm"
        assert ds.pixel_array.shape == (8, 8)


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    """Two calls with one seed write the same bytes; another seed gives another series."""
    first = write_series(tmp_path / "a", slices=2, rows=16, columns=16)
    again = write_series(tmp_path / "b", slices=2, rows=16, columns=16)
    other = write_series(tmp_path / "c", slices=2, rows=16, columns=16, seed=1)
    assert [path.read_bytes() for path in first[2]] == [path.read_bytes() for path in again[2]]
    assert first[:2] == again[:2]
    assert other[1] != first[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"transfer_syntax": "1.2.840.10008.1.2.4.70"},
        {"transfer_syntax": "1.2.3"},
        {"slices": 0},
        {"rows": 0},
        {"rows": 31, "transfer_syntax": SYNTAXES["jpeg-2000"]},
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, arguments: dict[str, object]) -> None:
    """A syntax without an encoder and an empty volume are refused before any file is written."""
    with pytest.raises(ValueError, match="no "):
        write_series(tmp_path, **arguments)  # type: ignore[arg-type]  # one argument of each type, by name
    assert not list(tmp_path.iterdir())
