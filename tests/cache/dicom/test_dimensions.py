"""Series that are several volumes: one is chosen, or all become an axis, on demand and never by a guess."""

from pathlib import Path

import msgspec
import numpy as np
import pydicom
import pytest

from cache.dicom.assemble import VolumeOptions, VolumePlan, plan_volume
from cache.dicom.header import InstanceHeader
from cache.errors import (
    BadSource,
    DuplicateSlice,
    IrregularSeries,
    MissingSlice,
    MixedOrientations,
    MixedSizes,
    SeveralVolumes,
)

from .conftest import objects_in, volume_of
from .test_assemble import header, labelled, stack

FOUR = VolumeOptions(dimensions="4d")
LARGEST = VolumeOptions(select="largest")
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def times(count: int, keyword: str = "TemporalPositionIndex", slices: int = 4) -> list[InstanceHeader]:
    """``count`` volumes at the same places, told apart by ``keyword``, which counts from 9: text would sort wrongly."""
    return [
        header(
            slices * t + z,
            position=(-10.0, -20.0, 2.5 * z),
            distinguishing=labelled(**{keyword: str(9 + t)} if keyword else {}),
            instance_number=slices * t + z + 1,
        )
        for t in range(count)
        for z in range(slices)
    ]


def numbered(headers: list[InstanceHeader], numbers: list[int]) -> list[InstanceHeader]:
    return [msgspec.structs.replace(one, instance_number=n) for one, n in zip(headers, numbers, strict=True)]


def members(plan: VolumePlan) -> list[int]:
    return [plan.objects[piece.object].member for piece in plan.slices]


def refusal(headers: list[InstanceHeader], options: VolumeOptions = FOUR) -> type[BadSource]:
    with pytest.raises(BadSource) as caught:
        plan_volume(headers, options)
    return type(caught.value)


@pytest.mark.parametrize("keyword", ["TemporalPositionIndex", "EchoTime", "DiffusionBValue", "AcquisitionNumber", ""])
def test_volumes_become_an_axis(keyword: str) -> None:
    """Whatever tells them apart, in the order of its values; where nothing does, in that of instance numbers."""
    plan = plan_volume(times(3, keyword)[::-1], FOUR)
    assert (plan.spec.axes, plan.spec.shape) == ("tzyx", (3, 4, 4, 6))
    one = plan_volume(times(1, keyword), VolumeOptions())
    assert (plan.spec.spacing, plan.spec.affine) == (one.spec.spacing, one.spec.affine)
    first = members(one)
    assert members(plan) == [4 * t + z for t in range(3) for z in first]
    assert [piece.at for piece in plan.slices] == list(range(12))


def test_a_lone_volume_keeps_the_axis() -> None:
    """Asked for four dimensions, a plain series has one time point."""
    assert plan_volume(stack(), FOUR).spec.shape == (1, 8, 4, 6)


def test_place_after_place_is_an_order_too() -> None:
    """Instance numbers that go through the times at each place tell them apart as well."""
    headers = numbered(times(3, ""), [3 * z + t + 1 for t in range(3) for z in range(4)])
    assert members(plan_volume(headers, FOUR)) == members(plan_volume(times(3, ""), FOUR))


def test_numbers_in_disorder_tell_nothing() -> None:
    """Instance numbers that follow neither volumes nor places, or are missing, are no order."""
    mixed = numbered(times(3, ""), [1, 5, 2, 9, 12, 3, 7, 4, 8, 6, 10, 11])
    assert refusal(mixed) is SeveralVolumes
    assert refusal([msgspec.structs.replace(one, instance_number=None) for one in times(3, "")]) is SeveralVolumes


def test_two_dimensions_at_once_are_refused() -> None:
    """Two echoes at two times are told apart by no single attribute, so that four volumes in a row would be a guess."""
    headers = [
        msgspec.structs.replace(
            one, distinguishing=labelled(TemporalPositionIndex=str(n // 8), EchoTime=str(n // 4 % 2))
        )
        for n, one in enumerate(times(4, ""))
    ]
    assert refusal(headers) is SeveralVolumes


def test_an_incomplete_product_is_refused() -> None:
    """A slice that one volume lacks, or has in another place or under another value, spoils them all."""
    headers = times(3)
    assert refusal(headers[:-1]) in (DuplicateSlice, SeveralVolumes)
    gap = [one for one in headers if one.position != (-10.0, -20.0, 5.0)]
    assert refusal(gap) is MissingSlice
    odd = [*headers[:-1], msgspec.structs.replace(headers[-1], distinguishing=labelled(TemporalPositionIndex="99"))]
    assert refusal(odd) is SeveralVolumes
    aside = [
        *headers[:8],
        *(msgspec.structs.replace(one, position=(-9.0, -20.0, 2.5 * z)) for z, one in enumerate(headers[8:])),
    ]
    assert refusal(aside) is IrregularSeries


def test_four_dimensions_are_never_the_default() -> None:
    """Without the option the series is refused, and what differs is named."""
    with pytest.raises(SeveralVolumes, match="TemporalPositionIndex"):
        plan_volume(times(3), VolumeOptions())


LOCALIZERS = {
    "turned": ({"orientation": SAGITTAL}, MixedOrientations),
    "larger": ({"rows": 512, "columns": 512}, MixedSizes),
    "coarser": ({"pixel_spacing": (2.0, 2.0)}, MixedSizes),
    "of another frame": ({"frame_of_reference": "1.2.8"}, IrregularSeries),
    "nowhere": ({"position": None, "orientation": None}, IrregularSeries),
}


@pytest.mark.parametrize(("changes", "error"), LOCALIZERS.values(), ids=LOCALIZERS.keys())
def test_localizers_are_left_out_on_demand(changes: dict[str, object], error: type[BadSource]) -> None:
    """The largest group of parallel slices of one size is the volume; without the option the series is refused."""
    localizers = [header(100 + n, **changes) for n in range(3)]
    with pytest.raises(error):
        plan_volume([*localizers, *stack()], VolumeOptions())
    plan = plan_volume([*localizers, *stack()], LARGEST)
    assert plan.spec == plan_volume(stack(), VolumeOptions()).spec
    assert sorted(members(plan)) == list(range(8))


def test_of_two_groups_as_large_none_is_chosen() -> None:
    """A tie is no choice."""
    sagittal = [header(100 + n, orientation=SAGITTAL, position=(2.5 * n, 0.0, 0.0)) for n in range(8)]
    assert refusal([*sagittal, *stack()], LARGEST) is MixedOrientations


def test_the_largest_group_is_checked_as_any_series() -> None:
    """Leaving out localizers forgives nothing else."""
    headers = [header(100, orientation=SAGITTAL), *stack()]
    assert refusal(headers[:4] + headers[5:], LARGEST) is MissingSlice
    assert refusal([*headers, msgspec.structs.replace(headers[3], member=50)], LARGEST) is DuplicateSlice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [("mr_ge_epi4d_interleaved_150", (10, 15, 64, 64)), ("mr_siemens_pdt2_2echo70", (2, 35))],
)
def test_real_series_in_four_dimensions(testdata: Path, name: str, shape: tuple[int, ...]) -> None:
    """Ten time points and two echoes: each volume is what its objects alone give, in the order they were taken."""
    objects = objects_in(testdata / "dicom" / "series" / name)
    plan, volume = volume_of(objects, FOUR)
    assert volume.shape[: len(shape)] == shape
    datasets = [pydicom.dcmread(path) for path in sorted((testdata / "dicom" / "series" / name).iterdir())]
    if shape[0] == 2:
        keys = [str(ds.EchoTime) for ds in datasets]
    else:
        keys = [str((int(ds.InstanceNumber) - 1) // 15) for ds in datasets]
    raw = [path.read_bytes() for path in sorted((testdata / "dicom" / "series" / name).iterdir())]
    for t, key in enumerate(sorted(set(keys), key=float)):
        alone_plan, alone = volume_of([data for data, of in zip(raw, keys, strict=True) if of == key])
        assert np.array_equal(volume[t], alone)
        assert alone_plan.spec.affine == plan.spec.affine
