"""Slices form one regular volume or are refused for what is wrong with them; no pixel is needed to tell."""

import math
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.dicom.assemble import VolumeOptions, VolumePlan, plan_volume
from cache.dicom.groups import DISTINGUISHING
from cache.dicom.header import InstanceHeader
from cache.errors import (
    BadSource,
    DuplicateSlice,
    EmptySeries,
    IrregularSeries,
    MissingSlice,
    MixedOrientations,
    MixedSizes,
    SeveralVolumes,
    TiltedSeries,
    UnsupportedPixels,
)

OPTIONS = VolumeOptions()
NO_LABELS = ("",) * len(DISTINGUISHING)


def header(number: int, **changes: Any) -> InstanceHeader:
    """Slice ``number`` of an axial CT, 2.5 mm from its neighbours."""
    fields: dict[str, Any] = {
        "member": number,
        "study": "1.2",
        "series": "1.2.3",
        "instance": f"1.2.3.{number}",
        "sop_class": "1.2.840.10008.5.1.4.1.1.2",
        "modality": "CT",
        "transfer_syntax": "1.2.840.10008.1.2.1",
        "frame_of_reference": "1.2.9",
        "rows": 4,
        "columns": 6,
        "frames": 1,
        "samples_per_pixel": 1,
        "photometric": "MONOCHROME2",
        "planar_configuration": 0,
        "bits_allocated": 16,
        "bits_stored": 12,
        "signed": False,
        "position": (-10.0, -20.0, 2.5 * number),
        "orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        "pixel_spacing": (0.5, 0.75),
        "spacing_between_slices": None,
        "slope": 1.0,
        "intercept": -1024.0,
        "rescale_type": "HU",
        "units": "",
        "modality_lut": False,
        "functional_groups": False,
        "distinguishing": NO_LABELS,
        "pixel_offset": 1000,
        "pixel_nbytes": 48,
    }
    return InstanceHeader(**(fields | changes))


def labelled(**values: str) -> tuple[str, ...]:
    return tuple(values.get(keyword, "") for keyword in DISTINGUISHING)


def stack(count: int = 8, **changes: Any) -> list[InstanceHeader]:
    return [header(number, **changes) for number in range(count)]


def refusal(headers: list[InstanceHeader], options: VolumeOptions = OPTIONS) -> BadSource:
    with pytest.raises(BadSource) as caught:
        plan_volume(headers, options)
    return caught.value


# A direction in space: rows and columns at right angles, anywhere.
@st.composite
def orientations(draw: st.DrawFn) -> tuple[float, ...]:
    a, b, c = (draw(st.floats(-math.pi, math.pi)) for _ in range(3))
    around_z = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    around_y = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    around_x = np.array([[1, 0, 0], [0, math.cos(c), -math.sin(c)], [0, math.sin(c), math.cos(c)]])
    turned = around_z @ around_y @ around_x
    return (*turned[:, 0].tolist(), *turned[:, 1].tolist())


@st.composite
def series(draw: st.DrawFn, least: int = 1) -> list[InstanceHeader]:
    """A regular series in any direction, at any place, of any spacing."""
    orientation = draw(orientations())
    spacing = draw(st.floats(0.1, 10))
    origin = np.array([draw(st.floats(-500, 500)) for _ in range(3)])
    normal = np.cross(orientation[3:], orientation[:3])
    return [
        header(number, position=tuple((origin + number * spacing * normal).tolist()), orientation=orientation)
        for number in range(draw(st.integers(least, 30)))
    ]


@given(series(), st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter(headers: list[InstanceHeader], chance: random.Random) -> None:
    """Shuffled instances give the same plan to the last bit, in the order of their positions."""
    shuffled = chance.sample(headers, len(headers))
    plan = plan_volume(shuffled, OPTIONS)
    assert plan == plan_volume(headers, OPTIONS)
    assert [plan.objects[planned.object] for planned in plan.slices] == headers
    assert [planned.at for planned in plan.slices] == list(range(len(headers)))


@given(series())
def test_the_affine_puts_every_slice_where_it_was(headers: list[InstanceHeader]) -> None:
    """The affine maps (z, 0, 0) to the position of slice z, and its columns are as long as the spacing says."""
    spec = plan_volume(headers, OPTIONS).spec
    affine = np.array(spec.affine)
    for z, one in enumerate(headers):
        assert np.allclose((affine @ (z, 0, 0, 1))[:3], np.array(one.position), atol=1e-6)
    assert np.allclose(np.linalg.norm(affine[:3, :3], axis=0), np.array(spec.spacing), rtol=1e-6)
    assert np.linalg.det(affine[:3, :3]) > 0


@given(series(least=4), st.data())
def test_a_lost_slice_is_always_missed(headers: list[InstanceHeader], data: st.DataObject) -> None:
    """Without one of its inner slices no series passes for regular, and the neighbours of the gap are named."""
    lost = data.draw(st.integers(1, len(headers) - 2))
    error = refusal(headers[:lost] + headers[lost + 1 :])
    assert type(error) is MissingSlice
    assert error.instances == (headers[lost - 1].instance, headers[lost + 1].instance)


@given(series(least=2), st.data())
def test_a_doubled_slice_is_always_found(headers: list[InstanceHeader], data: st.DataObject) -> None:
    """A second instance at the place of another one is refused, both named."""
    twin = data.draw(st.sampled_from(headers))
    error = refusal([*headers, msgspec.structs.replace(twin, instance="1.2.3.999")])
    assert type(error) is DuplicateSlice
    assert set(error.instances) == {twin.instance, "1.2.3.999"}


def changed(headers: list[InstanceHeader], number: int, **changes: Any) -> list[InstanceHeader]:
    return [msgspec.structs.replace(one, **changes) if one.member == number else one for one in headers]


ODD_ONE: list[tuple[dict[str, Any], type[BadSource]]] = [
    ({"study": "1.3"}, IrregularSeries),
    ({"series": "1.2.4"}, IrregularSeries),
    ({"modality": "PT"}, IrregularSeries),
    ({"frame_of_reference": "1.2.8"}, IrregularSeries),
    ({"rescale_type": "OD"}, IrregularSeries),
    ({"rows": 5}, MixedSizes),
    ({"columns": 5}, MixedSizes),
    ({"pixel_spacing": (0.5, 0.5)}, MixedSizes),
    ({"orientation": (0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}, MixedOrientations),
    ({"position": None}, IrregularSeries),
    ({"orientation": None}, IrregularSeries),
    ({"pixel_spacing": None}, IrregularSeries),
    ({"position": (-10.0, -20.0, 8.75)}, IrregularSeries),  # half a spacing off its place
    ({"position": (-10.0, 20.0, 7.5)}, TiltedSeries),  # aside in its plane
    ({"frames": 2}, UnsupportedPixels),
    ({"functional_groups": True}, UnsupportedPixels),
    ({"samples_per_pixel": 3, "photometric": "RGB"}, UnsupportedPixels),
    ({"photometric": "PALETTE COLOR"}, UnsupportedPixels),
    ({"bits_allocated": 64, "bits_stored": 64}, UnsupportedPixels),
    ({"modality_lut": True}, UnsupportedPixels),
    ({"slope": 1e300}, UnsupportedPixels),
    ({"instance": "1.2.3.2"}, DuplicateSlice),
]


@pytest.mark.parametrize(("changes", "error"), ODD_ONE, ids=[str(changes) for changes, _ in ODD_ONE])
def test_one_odd_slice_spoils_the_volume(changes: dict[str, Any], error: type[BadSource]) -> None:
    """Whatever sets one slice apart, the series is refused by type and the slice is among those named."""
    headers = changed(stack(), 3, **changes)
    found = refusal(headers)
    assert type(found) is error
    assert headers[3].instance in found.instances
    assert f"series {headers[3].series}" in str(found)


def test_a_gap_at_the_end_is_no_gap() -> None:
    """Fewer slices at either end make a shorter volume: nothing tells that there were more."""
    assert plan_volume(stack()[2:6], OPTIONS).spec.shape == (4, 4, 6)


def test_small_unevenness_is_tolerated_as_by_highdicom() -> None:
    """Distances within a hundredth of their mean are regular; a little more is not."""
    close = changed(stack(), 3, position=(-10.0, -20.0, 7.5 + 0.02))
    assert np.array(plan_volume(close, OPTIONS).spec.spacing)[0] == 2.5
    uneven = changed(stack(), 3, position=(-10.0, -20.0, 7.5 + 0.05))
    assert type(refusal(uneven)) is IrregularSeries


def test_a_sheared_stack_is_tilted() -> None:
    """A gantry tilt moves every slice aside: the spacing is regular, the volume is not."""
    tilted = [
        msgspec.structs.replace(one, position=(-10.0, -20.0 + 0.5 * one.member, 2.5 * one.member)) for one in stack()
    ]
    assert type(refusal(tilted)) is TiltedSeries


@pytest.mark.parametrize(
    "keyword", ["EchoTime", "TemporalPositionIdentifier", "AcquisitionNumber", "DiffusionBValue", "ImageType"]
)
def test_volumes_at_one_place_are_told_by_what_differs(keyword: str) -> None:
    """Two echoes, time points or acquisitions are several volumes, and the refusal names the attribute."""
    first = stack(distinguishing=labelled(**{keyword: "1"}))
    second = [
        msgspec.structs.replace(one, instance=f"{one.instance}.2", distinguishing=labelled(**{keyword: "2"}))
        for one in first
    ]
    error = refusal(first + second)
    assert type(error) is SeveralVolumes
    assert keyword in str(error)
    assert len(error.instances) == 16


def test_a_series_held_twice_is_several_volumes() -> None:
    """Every place taken twice, by instances that say nothing of why, is two volumes, not one doubled slice."""
    twice = stack() + [msgspec.structs.replace(one, instance=f"{one.instance}.2") for one in stack()]
    assert type(refusal(twice)) is SeveralVolumes


def test_rows_and_columns_must_be_at_right_angles() -> None:
    """An orientation that is no pair of unit vectors at right angles has no normal to sort by."""
    for orientation in [(1.0, 0.0, 0.0, 0.1, 1.0, 0.0), (1.0, 0.0, 0.0, 1.0, 0.0, 0.0), (0.0,) * 6]:
        assert type(refusal(stack(orientation=orientation))) is IrregularSeries
    assert type(refusal(stack(pixel_spacing=(0.0, 1.0)))) is IrregularSeries


def test_no_instances_are_no_volume() -> None:
    """An empty series is an error of its own."""
    with pytest.raises(EmptySeries):
        plan_volume([], OPTIONS)


def test_a_lone_slice_takes_its_stated_spacing() -> None:
    """One slice is a volume; its depth is Spacing Between Slices or, as with highdicom, one millimetre."""
    assert plan_volume([header(0)], OPTIONS).spec.spacing == (1.0, 0.5, 0.75)
    assert plan_volume([header(0, spacing_between_slices=3.0)], OPTIONS).spec.spacing == (3.0, 0.5, 0.75)


@pytest.mark.parametrize(
    ("changes", "rescaled", "stored"),
    [
        ({}, "int16", "uint16"),
        ({"signed": True}, "int16", "int16"),
        ({"bits_allocated": 8, "bits_stored": 8}, "int16", "uint8"),
        ({"bits_allocated": 8, "bits_stored": 7, "signed": True}, "int16", "int8"),
        ({"bits_stored": 16, "intercept": 0.0}, "float32", "uint16"),  # 65535 does not fit
        ({"bits_stored": 16, "intercept": -32768.0}, "int16", "uint16"),
        ({"bits_stored": 16, "signed": True, "intercept": -1.0}, "float32", "int16"),  # -32769 does not fit
        ({"slope": 8.0, "intercept": 0.0}, "int16", "uint16"),
        ({"slope": 9.0, "intercept": 0.0}, "float32", "uint16"),
        ({"slope": 0.5}, "float32", "uint16"),
        ({"intercept": 0.25}, "float32", "uint16"),
    ],
    ids=str,
)
def test_the_type_holds_every_value_there_can_be(changes: dict[str, Any], rescaled: str, stored: str) -> None:
    """int16 only where the bits, the sign and the rescale prove that nothing can wrap."""
    headers = stack(**changes)
    assert plan_volume(headers, OPTIONS).spec.dtype == rescaled
    assert plan_volume(headers, VolumeOptions(rescale=False)).spec.dtype == stored


def test_one_slice_decides_for_float() -> None:
    """With a rescale of its own in each slice, one that is not whole makes the volume float32; signs may mix."""
    assert plan_volume(changed(stack(), 5, slope=1.5), OPTIONS).spec.dtype == "float32"
    mixed = changed(stack(bits_stored=16), 5, signed=True)
    assert plan_volume(mixed, VolumeOptions(rescale=False)).spec.dtype == "int32"


def test_units_are_what_the_series_says() -> None:
    """CT is in HU unless it says otherwise, PET in its units, and stored values have none."""
    assert plan_volume(stack(rescale_type=""), OPTIONS).spec.units == "HU"
    assert plan_volume(stack(modality="PT", rescale_type="", units="BQML"), OPTIONS).spec.units == "BQML"
    assert plan_volume(stack(modality="MR", rescale_type="US"), OPTIONS).spec.units == ""
    assert plan_volume(stack(), VolumeOptions(rescale=False)).spec.units == ""


def test_a_modality_lut_matters_only_where_it_would_be_applied() -> None:
    """Stored values of a series with a lookup table are still available."""
    assert plan_volume(stack(modality_lut=True), VolumeOptions(rescale=False)).spec.dtype == "uint16"


def test_a_plan_survives_json() -> None:
    """Plans travel between processes as JSON without loss."""
    plan = plan_volume(stack(), OPTIONS)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=VolumePlan) == plan


def test_unknown_options_are_refused() -> None:
    """A misspelt option is an error, not a default."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"rescaled": True}, VolumeOptions)
