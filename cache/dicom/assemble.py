"""How the slices of a series form one regular volume, or why they do not: pure geometry, decided before any pixel.

The rules and tolerances are highdicom's (``get_volume_from_series``), so that arrays and affines compare equal; what
it refuses with one message is refused here with a type, and the instances at fault.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Annotated, Final, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from cache.entry import Affine, DType, TensorSpec
from cache.errors import (
    BadRequest,
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

from .groups import DISTINGUISHING, Linear
from .header import InstanceHeader

_T = TypeVar("_T")

FrameNumber = Annotated[int, msgspec.Meta(ge=1)]

#: Photometric interpretations that become red, green and blue → samples a pixel (PS3.3 §C.7.6.3.1.2).
COLOURS: Final = {
    "PALETTE COLOR": 1,
    "RGB": 3,
    "YBR_FULL": 3,
    "YBR_FULL_422": 3,
    "YBR_ICT": 3,
    "YBR_RCT": 3,
}

#: Distances between neighbours may differ from their mean by this part of it (highdicom's default).
SPACING_RTOL: Final = 1e-2
#: How far the cosine between stacking direction and slice normal may be from ±1 (highdicom's default).
PERPENDICULAR_TOL: Final = 1e-3
#: How far from a right angle rows and columns may be, as a cosine (highdicom's default).
ORTHOGONAL_TOL: Final = 1e-4
#: Slices nearer than this, in millimetres, lie at the same place.
SAME_PLACE_MM: Final = 1e-5


class VolumeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to make of a series.

    ``kind`` "volume" places the slices in the patient. "frames" takes all frames of a lone object as they follow each
    other (ultrasound, angiography, slides), "image" the only one (radiography, mammography); ``frames`` picks them by
    their numbers, which begin at 1.

    ``rescale``: apply Modality LUT or Rescale Slope and Intercept, where there are any. ``units`` asks for other
    values than these give: "real_world" by the Real World Value Mapping, "suvbw" for PET. ``monochrome1``: "invert"
    turns stored values of MONOCHROME1 slices within the range of their bits (lowest + highest - value), before any
    rescale.

    ``select`` "largest" takes only the largest group of slices that share orientation, size, spacing and frame of
    reference: localizers fall away. ``dimensions`` "4d" makes time points, echoes or b-values a first axis ``t``,
    where each place has one slice of each.
    """

    rescale: bool = True
    monochrome1: Literal["keep", "invert"] = "keep"
    kind: Literal["volume", "frames", "image"] = "volume"
    frames: tuple[FrameNumber, ...] = ()
    units: Literal["modality", "real_world", "suvbw"] = "modality"
    select: Literal["all", "largest"] = "all"
    dimensions: Literal["refuse", "4d"] = "refuse"

    def __post_init__(self) -> None:
        if self.units != "modality" and not self.rescale:
            raise ValueError(f"units: {self.units!r} are none of stored values; leave rescale on")
        if self.kind == "volume" and self.frames:
            raise ValueError("frames: a volume takes all of them; set kind to 'frames' or 'image'")
        if self.kind != "volume" and (self.select, self.dimensions) != ("all", "refuse"):
            raise ValueError(f"kind: {self.kind!r} has no place for select and dimensions, which are a volume's")
        if self.kind == "image" and len(self.frames) > 1:
            raise ValueError("frames: an image is one of them")


class SlicePlan(msgspec.Struct, frozen=True, array_like=True):
    """Which slice a frame becomes, and how its stored values become the volume's.

    ``object`` is its place in the plan's objects, ``frame`` its number in the object, from 0. ``at`` counts slices in
    the order of the volume's memory: over z, or over t and z. Stored values times ``slope`` plus ``intercept`` are
    the volume's, or with ``table`` what the Modality LUT is looked up with.
    """

    object: int
    frame: int
    at: int
    slope: float
    intercept: float
    table: bool = False


class VolumePlan(msgspec.Struct, frozen=True):
    """What the volume will be, and where each frame goes, in the order of the volume's memory.

    The headers in ``objects`` have no ``groups`` any more: what they say is in the slices.
    """

    spec: TensorSpec
    slices: tuple[SlicePlan, ...]
    options: VolumeOptions
    objects: tuple[InstanceHeader, ...] = ()

    def part(self, slices: Sequence[SlicePlan]) -> "VolumePlan":
        """The plan of some of its slices alone, with the objects that these need."""
        needed = {number: place for place, number in enumerate(dict.fromkeys(piece.object for piece in slices))}
        return msgspec.structs.replace(
            self,
            slices=tuple(msgspec.structs.replace(piece, object=needed[piece.object]) for piece in slices),
            objects=tuple(self.objects[number] for number in needed),
        )


class _Frame(NamedTuple):
    """One frame of an object, as far as geometry and values go."""

    header: InstanceHeader
    number: int
    position: tuple[float, float, float] | None
    orientation: tuple[float, float, float, float, float, float] | None
    pixel_spacing: tuple[float, float] | None
    spacing_between_slices: float | None
    rescale: Linear
    real_world: Linear | None
    distinguishing: tuple[str, ...]


class _Values(NamedTuple):
    """How a frame's stored values become the volume's, and what these measure."""

    slope: float
    intercept: float
    table: bool
    units: str


def plan_volume(headers: Sequence[InstanceHeader], options: VolumeOptions) -> VolumePlan:
    """Say what the objects make, and order their frames.

    A volume has axes ``zyx``, or ``tzyx`` with ``dimensions`` "4d", ``t`` ordered by the value that tells its volumes
    apart. Slice 0 is the one from which (z, y, x) is a right-handed frame with rows and columns as stored. The
    distance between slices comes from their positions (PS3.3 §C.7.6.2.1.1); a lone slice has no neighbour, so it takes
    Spacing Between Slices, or else 1 mm, as highdicom does. ``kind`` "frames" has axes ``tyx``, "image" ``yx``, both
    with a last axis ``c`` (red, green, blue) where the object is in colour; their affine has its origin at the first
    pixel, and is no patient's.

    Values are int16 where every value that the stored bits can hold provably fits after the rescale, otherwise
    float32 (float64 for double float pixels); without rescale they keep their stored type.

    Raises:
        EmptySeries: there are no instances.
        UnsupportedPixels: samples, colours or functional groups that make no volume, or values that are not there.
        MissingSlice, DuplicateSlice, MixedOrientations, MixedSizes, TiltedSeries, SeveralVolumes: as they say.
        IrregularSeries: any other reason why this is no regular volume.
        BadRequest: the options ask for a frame that is not there.
    """
    if not headers:
        raise EmptySeries("no instances, no volume")
    if options.kind != "volume":
        return _plan_pictures(headers, options)
    frames = [frame for header in headers for frame in _frames_of(header)]
    if options.select == "largest":
        frames = _largest(frames)
    _check_series(frames if options.select == "largest" else [_frames_of(header)[0] for header in headers])
    if odd := [frame for frame in frames if _undescribed(frame.header)]:
        what = "have several frames, or functional groups, that do not say where each frame lies"
        raise _refusal(UnsupportedPixels, f"{len(odd)} of {len(frames)} instances {what}", odd)
    if odd := [frame for frame in frames if _in_colour(frame.header)]:
        raise _refusal(UnsupportedPixels, f"{len(odd)} of {len(frames)} slices are in colour", odd)
    _check_pixels(frames, options)
    _check_grid(frames)
    volumes = [frames] if options.dimensions == "refuse" else _split(frames)
    stacks = [_stack(volume) for volume in volumes]
    ordered, spacing = stacks[0]
    _check_alike(stacks)
    first = ordered[0]
    extra = (len(stacks),) if options.dimensions == "4d" else ()
    spec = TensorSpec(
        dtype=_dtype(frames, options),
        shape=(*extra, len(ordered), first.header.rows, first.header.columns),
        axes="tzyx" if extra else "zyx",
        spacing=(spacing, *_given(first.pixel_spacing)),
        affine=_affine(first, spacing),
        units=_units(frames, options),
    )
    return _plan(spec, [frame for stack, _ in stacks for frame in stack], options)


def _plan(spec: TensorSpec, ordered: Sequence[_Frame], options: VolumeOptions) -> VolumePlan:
    headers = {frame.header.member: frame.header for frame in ordered}
    objects = {member: place for place, member in enumerate(headers)}
    slices = []
    for at, frame in enumerate(ordered):
        values = _values(frame, options)
        place = objects[frame.header.member]
        slices.append(SlicePlan(place, frame.number, at, values.slope, values.intercept, values.table))
    bare = tuple(msgspec.structs.replace(header, groups=()) if header.groups else header for header in headers.values())
    return VolumePlan(spec, tuple(slices), options, bare)


def _plan_pictures(headers: Sequence[InstanceHeader], options: VolumeOptions) -> VolumePlan:
    """Frames of a lone object, wherever they lie."""
    frames = _frames_of(headers[0])
    header = headers[0]
    if len(headers) > 1:
        every = [_frames_of(one)[0] for one in headers]
        raise _refusal(SeveralVolumes, f"{len(headers)} objects, and nothing says which one to take", every)
    wanted = options.frames or range(1, header.frames + 1)
    if max(wanted) > header.frames:
        raise BadRequest(f"series {header.series} has {header.frames} frames: there is none with number {max(wanted)}")
    if options.kind == "image" and len(wanted) > 1:
        raise _refusal(SeveralVolumes, f"an object of {header.frames} frames, and nothing says which to take", frames)
    ordered = [frames[number - 1] for number in wanted]
    colour = _in_colour(header)
    if colour and (header.photometric not in COLOURS or header.samples_per_pixel != COLOURS[header.photometric]):
        raise _refusal(UnsupportedPixels, f"{header.samples_per_pixel} samples a pixel of no known colours", frames)
    if header.photometric == "PALETTE COLOR" and not header.palette:
        raise _refusal(UnsupportedPixels, "its palette is missing or cannot be read", frames)
    if colour and options.units != "modality":
        raise _refusal(UnsupportedPixels, f"colours have no {options.units} values", frames)
    _check_pixels(ordered, options)
    spacing = ordered[0].pixel_spacing or header.projection_spacing or (1.0, 1.0)
    if min(spacing) <= 0:
        raise _refusal(IrregularSeries, "its pixels have no size", frames)
    between_rows, between_columns = spacing
    shape = (header.rows, header.columns, 3) if colour else (header.rows, header.columns)
    axes = "yxc" if colour else "yx"
    spec = TensorSpec(
        dtype=_colour_dtype(header) if colour else _dtype(ordered, options),
        shape=shape if options.kind == "image" else (len(ordered), *shape),
        axes=axes if options.kind == "image" else f"t{axes}",
        spacing=(1.0, between_rows, between_columns),
        affine=(
            (0.0, 0.0, between_columns, 0.0),
            (0.0, between_rows, 0.0, 0.0),
            (1.0, 0.0, 0.0, 0.0),
            (0.0, 0.0, 0.0, 1.0),
        ),
        units="" if colour else _units(ordered, options),
    )
    return _plan(spec, ordered, options)


def _frames_of(header: InstanceHeader) -> list[_Frame]:
    """Every frame, by its functional groups, or else by what the object says of all."""
    whole = Linear(header.slope, header.intercept, header.rescale_type)
    if not header.groups:
        one = _Frame(
            header,
            0,
            header.position,
            header.orientation,
            header.pixel_spacing,
            header.spacing_between_slices,
            whole,
            header.real_world,
            header.distinguishing,
        )
        return [one._replace(number=number) for number in range(header.frames)]
    return [
        _Frame(
            header,
            number,
            groups.position,
            groups.orientation,
            groups.pixel_spacing,
            groups.spacing_between_slices,
            groups.rescale or whole,
            groups.real_world or header.real_world,
            groups.distinguishing,
        )
        for number, groups in enumerate(header.groups)
    ]


def _undescribed(header: InstanceHeader) -> bool:
    return (header.frames > 1 or header.functional_groups) and not header.groups


def _in_colour(header: InstanceHeader) -> bool:
    return header.samples_per_pixel > 1 or header.photometric not in ("MONOCHROME1", "MONOCHROME2")


def _values(frame: _Frame, options: VolumeOptions) -> _Values:
    header = frame.header
    slope, intercept, table, units = 1.0, 0.0, False, ""
    if _in_colour(header):
        return _Values(slope, intercept, table, units)
    if options.units == "real_world":
        slope, intercept, units = msgspec.structs.astuple(_given(frame.real_world))
    elif options.rescale and header.table is not None:
        table = True
    elif options.rescale:
        slope, intercept, units = msgspec.structs.astuple(frame.rescale)
        # CT is in Hounsfield units unless it says otherwise (PS3.3 §C.8.2.1.1.2).
        units = units or header.units or ("HU" if header.modality == "CT" else "")
    if options.units == "suvbw":
        factor = _given(header.suvbw)
        slope, intercept, units = slope * factor, intercept * factor, "g/ml"
    if header.photometric == "MONOCHROME1" and options.monochrome1 == "invert":
        slope, intercept = -slope, slope * sum(header.stored_range) + intercept
    return _Values(slope, intercept, table, "" if units == "US" else units)  # US: unspecified


def _largest(frames: Sequence[_Frame]) -> list[_Frame]:
    """The largest group of frames that could be one volume; all of them, if two groups are as large."""

    def group(frame: _Frame) -> Hashable:
        header = frame.header
        return header.frame_of_reference, frame.orientation, header.rows, header.columns, frame.pixel_spacing

    (largest, most), *others = Counter(map(group, frames)).most_common(2)
    if others and others[0][1] == most:
        return list(frames)
    return [frame for frame in frames if group(frame) == largest]


def _check_series(frames: Sequence[_Frame]) -> None:
    reads: list[tuple[str, Callable[[_Frame], Hashable]]] = [
        ("of another series", lambda f: (f.header.study, f.header.series)),
        ("of another modality", lambda f: f.header.modality),
        ("in another frame of reference", lambda f: f.header.frame_of_reference),
    ]
    for what, read in reads:
        if odd := _odd_ones(frames, read):
            raise _refusal(IrregularSeries, f"{len(odd)} of {len(frames)} instances are {what} than the rest", odd)
    times = Counter((frame.header.instance, frame.number) for frame in frames)
    if doubled := [frame for frame in frames if times[frame.header.instance, frame.number] > 1]:
        raise _refusal(DuplicateSlice, "an instance occurs more than once", doubled)


def _check_pixels(frames: Sequence[_Frame], options: VolumeOptions) -> None:
    asked = options.units
    most = float(np.finfo("f4").max)
    tests: list[tuple[str, Callable[[_Frame], bool]]] = [
        (
            "of samples that have neither 1, 8, 16 nor 32 bits",
            lambda f: not f.header.floating and f.header.bits_allocated not in (1, 8, 16, 32),
        ),
        (
            "rescaled by a table (Modality LUT) that cannot be read",
            lambda f: (
                asked != "real_world"
                and options.rescale
                and f.header.modality_lut
                and (f.header.table is None or f.header.bits_allocated > 16 or bool(f.header.floating))
            ),
        ),
        (
            "without the one linear Real World Value Mapping",
            lambda f: asked == "real_world" and f.real_world is None,
        ),
        (
            f"without SUVbw ({next((f.header.suvbw_missing for f in frames if f.header.suvbw_missing), '')})",
            lambda f: asked == "suvbw" and (f.header.suvbw is None or f.header.table is not None),
        ),
        (
            "of floating-point values, which cannot be inverted",
            lambda f: (
                bool(f.header.floating) and f.header.photometric == "MONOCHROME1" and options.monochrome1 == "invert"
            ),
        ),
        ("rescaled beyond what a float32 holds", lambda f: not _within(f, options, most)),
    ]
    for what, test in tests:
        if odd := [frame for frame in frames if test(frame)]:
            raise _refusal(UnsupportedPixels, f"{len(odd)} of {len(frames)} slices are {what}", odd)


def _split(frames: Sequence[_Frame]) -> list[list[_Frame]]:
    """The volumes of a series, by the one attribute that tells its slices apart at every place.

    Where none does, by Instance Number and frame number, if volume follows volume, or place follows place.

    Raises: SeveralVolumes, DuplicateSlice: neither does.
    """
    normal = _normal(frames[0])
    distances = np.array([_given(frame.position) for frame in frames]) @ normal
    order = np.argsort(distances, kind="stable").tolist()
    places: list[list[_Frame]] = []
    before = -math.inf
    for index in order:
        if distances[index] - before > SAME_PLACE_MM:
            places.append([])
        places[-1].append(frames[index])
        before = distances[index]
    count = len(places[0])
    if count == 1 or any(len(place) != count for place in places):
        return [list(frames)]  # stacked as one volume, it is refused for what is wrong with it
    varying = []
    for column in range(len(DISTINGUISHING)):
        values = [{frame.distinguishing[column] for frame in place} for place in places]
        if all(value == values[0] for value in values) and len(values[0]) == count:
            key = _sort_key(values[0])
            ranked = [sorted(place, key=lambda frame: key(frame.distinguishing[column])) for place in places]
            return [list(volume) for volume in zip(*ranked, strict=True)]
        varying += [column] if any(len(value) > 1 for value in values) else []
    if varying or any(frame.header.instance_number is None for frame in frames):
        return [list(frames)]
    ranked = [sorted(place, key=_number) for place in places]
    volumes = [list(volume) for volume in zip(*ranked, strict=True)]
    return volumes if _in_turn(volumes) or _in_turn(ranked) else [list(frames)]


def _sort_key(values: Iterable[str]) -> Callable[[str], tuple[float, str]]:
    """Numbers in their order, if all values are numbers; else text in its own."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return lambda value: (0.0, value)
    return lambda value: (numbers[value], value)


def _number(frame: _Frame) -> tuple[int, int]:
    return _given(frame.header.instance_number), frame.number


def _in_turn(groups: Iterable[Sequence[_Frame]]) -> bool:
    """Whether the groups follow each other, in whatever order, without one reaching into the next."""
    spans = sorted((min(map(_number, group)), max(map(_number, group))) for group in groups)
    return all(last < first for (_, last), (first, _) in itertools.pairwise(spans))


def _check_alike(stacks: Sequence[tuple[Sequence[_Frame], float]]) -> None:
    """Refuse volumes that do not lie at the same places."""
    first = np.array([_given(frame.position) for frame in stacks[0][0]])
    for stack, _ in stacks[1:]:
        apart = np.abs(np.array([_given(frame.position) for frame in stack]) - first).max(axis=1) > SAME_PLACE_MM
        if apart.any():
            odd = [frame for frame, is_apart in zip(stack, apart, strict=True) if is_apart]
            raise _refusal(IrregularSeries, "its volumes do not lie at the same places", odd)


def _check_grid(frames: Sequence[_Frame]) -> None:
    if lost := [f for f in frames if None in (f.position, f.orientation, f.pixel_spacing)]:
        raise _refusal(IrregularSeries, f"{len(lost)} instances lack position, orientation or spacing", lost)
    if odd := _odd_ones(frames, lambda f: (f.header.rows, f.header.columns, f.pixel_spacing)):
        raise _refusal(MixedSizes, f"{len(odd)} instances have other rows, columns or spacing than the rest", odd)
    if odd := _odd_ones(frames, lambda f: f.orientation):
        raise _refusal(MixedOrientations, f"{len(odd)} instances have another orientation than the rest", odd)
    row, column = _axes(frames[0])
    square = abs(row @ column) <= ORTHOGONAL_TOL and max(abs(row @ row - 1), abs(column @ column - 1)) <= 2e-3
    if not square or min(_given(frames[0].pixel_spacing)) <= 0:
        raise _refusal(IrregularSeries, "rows and columns are not at right angles, or have no length", frames)


def _stack(frames: Sequence[_Frame]) -> tuple[list[_Frame], float]:
    """The instances along their normal, and the distance between neighbours in millimetres."""
    if len(frames) == 1:
        return list(frames), abs(frames[0].spacing_between_slices or 1.0)
    positions = np.array([frame.position for frame in frames])
    # One order to compute in, whatever order the instances came in: sums of the same numbers are then the same.
    canonical = np.lexsort(positions.T[::-1])
    positions = positions[canonical]
    normal = _normal(frames[0])
    distances = (normal[None] @ positions.T).squeeze(0)
    order = np.argsort(distances, kind="stable")
    ordered = [frames[index] for index in canonical[order]]
    distances = distances[order]
    _check_places(ordered, distances)
    _check_direction(ordered, positions[order], normal)
    return ordered, _regular_spacing(ordered, distances)


def _check_places(ordered: Sequence[_Frame], distances: npt.NDArray[np.float64]) -> None:
    """Refuse slices that lie at the same place."""
    places = np.concatenate([[0], np.cumsum(np.diff(distances) > SAME_PLACE_MM)])
    times = np.bincount(places)
    if times.max() == 1:
        return
    crowd = [(place, frame) for place, frame in zip(places.tolist(), ordered, strict=True) if times[place] > 1]
    instances = [frame for _, frame in crowd]
    if len({(place, frame.distinguishing) for place, frame in crowd}) == len(crowd):
        differing = [
            keyword
            for keyword, values in zip(
                DISTINGUISHING, zip(*(f.distinguishing for f in instances), strict=True), strict=True
            )
            if len(set(values)) > 1
        ]
        raise _refusal(SeveralVolumes, f"slices at the same place differ in {', '.join(differing)}", instances)
    if len(times) > 1 and times.min() == times.max():
        raise _refusal(SeveralVolumes, f"each place is taken by {times.max()} slices", instances)
    raise _refusal(DuplicateSlice, f"{len(instances)} slices lie where another one is", instances)


def _check_direction(
    ordered: Sequence[_Frame], positions: npt.NDArray[np.float64], normal: npt.NDArray[np.float64]
) -> None:
    """Refuse slices that are not stacked along their normal."""
    spans = positions[1:] - positions[0]
    cosines = spans @ normal / np.linalg.norm(spans, axis=1)
    off = np.abs(np.abs(cosines) - 1.0) >= PERPENDICULAR_TOL
    if off.any():
        tilted = [frame for frame, is_off in zip(ordered[1:], off, strict=True) if is_off]
        raise _refusal(TiltedSeries, "the slices are not stacked along their normal (gantry tilt)", tilted)


def _regular_spacing(ordered: Sequence[_Frame], distances: npt.NDArray[np.float64]) -> float:
    spacing = float((distances[-1] - distances[0]) / (len(distances) - 1))
    gaps = np.diff(distances)
    if np.isclose(gaps, spacing, rtol=SPACING_RTOL, atol=0.0).all():
        return spacing
    # The usual gap, one that really occurs: with a slice out of four missing, the mean of two is none of them.
    usual = np.sort(gaps)[(len(gaps) - 1) // 2]
    wide = gaps > 1.75 * usual
    if wide.any() and gaps.min() > 0.75 * usual:
        beside = [frame for z, frame in enumerate(ordered) if wide[max(z - 1, 0) : z + 1].any()]
        missing = f"{wide.sum()} gaps of up to {gaps.max():.4g} mm between slices that are else {usual:.4g} mm apart"
        raise _refusal(MissingSlice, missing, beside)
    uneven = ~np.isclose(gaps, usual, rtol=SPACING_RTOL, atol=0.0)
    beside = [frame for z, frame in enumerate(ordered) if uneven[max(z - 1, 0) : z + 1].any()]
    raise _refusal(IrregularSeries, f"slices lie {gaps.min():.4g} to {gaps.max():.4g} mm apart", beside)


def _axes(frame: _Frame) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Unit vectors along a row (columns increase) and along a column (rows increase)."""
    orientation = np.array(_given(frame.orientation))
    return orientation[:3], orientation[3:]


def _normal(frame: _Frame) -> npt.NDArray[np.float64]:
    """The direction of z: that of (y, x) crossed, so that (z, y, x) is right-handed."""
    row, column = _axes(frame)
    return np.cross(column, row)


def _affine(first: _Frame, spacing: float) -> Affine:
    row, column = _axes(first)
    between_rows, between_columns = _given(first.pixel_spacing)
    axes = [_normal(first) * spacing, column * between_rows, row * between_columns, np.array(_given(first.position))]
    x, y, z = np.column_stack(axes).tolist()
    return tuple(x), tuple(y), tuple(z), (0.0, 0.0, 0.0, 1.0)


def _dtype(frames: Sequence[_Frame], options: VolumeOptions) -> DType:
    if any(frame.header.floating for frame in frames):
        return "float64" if any(frame.header.floating == "double" for frame in frames) else "float32"
    if options.rescale:
        values = [_values(frame, options) for frame in frames]
        exact = all(v.slope.is_integer() and v.intercept.is_integer() for v in values)
        return "int16" if exact and all(_fits_int16(frame, options) for frame in frames) else "float32"
    names = {_stored_dtype(frame.header) for frame in frames}
    common = np.result_type(*sorted(names)).name
    if common == "int64":
        raise _refusal(UnsupportedPixels, "signed and unsigned samples of 32 bits in one volume", frames)
    dtype: DType = msgspec.convert(common, DType)
    return dtype


def _stored_dtype(header: InstanceHeader) -> str:
    return f"{'int' if header.signed else 'uint'}{max(8, header.bits_allocated)}"


def _colour_dtype(header: InstanceHeader) -> DType:
    bits = max((table.bits for table in header.palette), default=header.bits_allocated)
    dtype: DType = "uint8" if bits <= 8 else "uint16" if bits <= 16 else "uint32"
    return dtype


def _bounds(frame: _Frame, options: VolumeOptions) -> tuple[float, float]:
    """The least and the greatest value that the frame's bits can come to."""
    values = _values(frame, options)
    if values.table:
        return 0.0, float((1 << _given(frame.header.table).bits) - 1)
    ends = [values.slope * value + values.intercept for value in frame.header.stored_range]
    return min(ends), max(ends)


def _fits_int16(frame: _Frame, options: VolumeOptions) -> bool:
    least, most = _bounds(frame, options)
    return least >= -32768 and most <= 32767


def _within(frame: _Frame, options: VolumeOptions, most: float) -> bool:
    if frame.header.floating:
        return True  # as written: infinities are allowed (PS3.3 §C.7.6.24)
    return all(math.isfinite(value) and abs(value) <= most for value in _bounds(frame, options))


def _units(frames: Sequence[_Frame], options: VolumeOptions) -> str:
    """What the values measure."""
    units = {_values(frame, options).units for frame in frames}
    if len(units) > 1:
        raise _refusal(IrregularSeries, "the slices measure different units", frames)
    return units.pop()


def _odd_ones(frames: Sequence[_Frame], read: Callable[[_Frame], Hashable]) -> list[_Frame]:
    """Those whose value is not the most common one."""
    counted = Counter(read(frame) for frame in frames)
    if len(counted) == 1:
        return []
    common = counted.most_common(1)[0][0]
    return [frame for frame in frames if read(frame) != common]


def _refusal(error: type[BadSource], why: str, at_fault: Iterable[_Frame]) -> BadSource:
    """The error, naming the instances at fault; of objects with several frames, also the first few of these."""
    frames = list(at_fault)
    numbers = [str(frame.number + 1) for frame in frames if frame.header.frames > 1]
    if numbers and len(numbers) < frames[0].header.frames:
        why += f" (frames {', '.join(numbers[:8])}{', …' if len(numbers) > 8 else ''})"
    instances = dict.fromkeys(frame.header.instance for frame in frames)
    return error(f"series {frames[0].header.series}: {why}", tuple(instances))


def _given(value: _T | None) -> _T:
    """A value whose presence has been checked."""
    assert value is not None
    return value
