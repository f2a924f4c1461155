"""A guess at where slices will lie says what the plan of the whole series says, or it says nothing."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from cache.dicom.ahead import ENOUGH, Guess, guess
from cache.dicom.assemble import SlicePlan, VolumeOptions, plan_volume
from cache.dicom.header import InstanceHeader

from .test_assemble import header

OPTIONS = VolumeOptions()


def shuffled(headers: Sequence[InstanceHeader]) -> list[InstanceHeader]:
    """The same objects at other places of the pack."""
    order = random.Random(3).sample(range(len(headers)), len(headers))
    return [msgspec.structs.replace(headers[at], member=member) for member, at in enumerate(order)]


def numbered(headers: Sequence[InstanceHeader]) -> list[InstanceHeader]:
    return [msgspec.structs.replace(each, instance_number=each.member + 1) for each in headers]


def series(**changes: Any) -> list[InstanceHeader]:
    return numbered([header(number, **changes) for number in range(12)])


def backwards(headers: Sequence[InstanceHeader]) -> list[InstanceHeader]:
    last = len(headers) - 1
    return [msgspec.structs.replace(each, member=last - each.member) for each in reversed(headers)]


def planned(headers: Sequence[InstanceHeader]) -> list[SlicePlan]:
    """The plan's slices, by the member they come from."""
    plan = plan_volume(headers, OPTIONS)
    members = [each.member for each in plan.objects]
    slices = [msgspec.structs.replace(piece, object=members[piece.object]) for piece in plan.slices]
    return sorted(slices, key=lambda piece: piece.object)


@pytest.mark.parametrize(
    "headers",
    [
        series(),
        backwards(series()),
        shuffled(series()),
        shuffled(backwards(series())),
        series(orientation=(0.0, 1.0, 0.0, 1.0, 0.0, 0.0)),
        [msgspec.structs.replace(each, slope=1.5 + each.member / 7) for each in series(modality="PT", units="BQML")],
    ],
    ids=["in order", "backwards", "shuffled", "shuffled backwards", "left-handed", "a slope each"],
)
def test_a_regular_series_is_foreseen(headers: list[InstanceHeader]) -> None:
    """By keys or by instance numbers, from any of its objects: volume and slices are those of the plan."""
    count = len(headers)
    for first in range(0, count - ENOUGH, 2):
        told = guess(headers[first : first + ENOUGH], count, OPTIONS)
        assert told is not None
        plan = plan_volume(headers, OPTIONS)
        assert (told.spec.dtype, told.spec.shape) == (plan.spec.dtype, plan.spec.shape)
        assert [told.place(each) for each in headers] == planned(headers)
        assert msgspec.json.decode(msgspec.json.encode(told), type=Guess) == told


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 8},
        {"signed": True, "bits_stored": 16, "intercept": -30000.0},
        {"slope": 0.5},
        {"position": (-10.0, -20.0, 100.0)},
        {"position": None},
        {"instance_number": 99, "member": 99},
        {"samples_per_pixel": 3, "photometric": "RGB"},
        {"frames": 2},
    ],
    ids=", ".join,
)
def test_what_does_not_fit_in_has_no_place(change: dict[str, Any]) -> None:
    """An object of another size, another type, off the line or beyond the end is left to the plan."""
    headers = series()
    told = guess(headers[:ENOUGH], len(headers), OPTIONS)
    assert told is not None
    assert told.place(headers[5]) is not None
    assert told.place(msgspec.structs.replace(headers[5], **change)) is None


def uneven(headers: list[InstanceHeader]) -> list[InstanceHeader]:
    positions = [(-10.0, -20.0, 2.5 * place) for place in (0, 5, 1)]
    return [msgspec.structs.replace(each, position=p) for each, p in zip(headers, positions, strict=True)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda headers: headers[:2],
        uneven,
        lambda headers: [msgspec.structs.replace(each, position=(0.0, 0.0, 0.0)) for each in headers],
        lambda headers: [msgspec.structs.replace(each, position=None) for each in headers],
        lambda headers: [msgspec.structs.replace(each, instance_number=1) for each in uneven(headers)],
        lambda headers: [msgspec.structs.replace(each, functional_groups=True) for each in headers],
        lambda headers: [msgspec.structs.replace(each, frames=3) for each in headers],
    ],
    ids=["too few", "shuffled", "one place", "no place", "one number", "groups not read", "frames"],
)
def test_nothing_to_go_by(spoil: Callable[[list[InstanceHeader]], list[InstanceHeader]]) -> None:
    """Too few objects, or such as lie on no line, tell nothing."""
    assert guess(spoil(series()[:ENOUGH]), 12, OPTIONS) is None


@pytest.mark.parametrize("options", [{"kind": "frames"}, {"select": "largest"}, {"dimensions": "4d"}])
def test_only_plain_volumes_are_foreseen(options: dict[str, Any]) -> None:
    """Where the recipe may take slices away, or make several volumes, it takes all headers to tell."""
    assert guess(series()[:ENOUGH], 12, VolumeOptions(**options)) is None
