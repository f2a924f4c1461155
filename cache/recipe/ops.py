"""The ops a recipe is made of: each says what it will make from a spec alone, then makes it from an array.

They are pure, so an entry can be planned, and its space reserved, before a pixel is decoded; and the same recipe over
the same source gives the same bytes on every node.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from cache.dicom.assemble import VolumeOptions
from cache.entry import Affine, DType, Spacing, TensorSpec
from cache.errors import BadRequest

Array = npt.NDArray[Any]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Length = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]

# Which LPS axis a letter lies on, and whether it points along it (PS3.3 §C.7.6.2.1.1: L, P and S are positive).
_DIRECTIONS: Final = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}


class Op(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step of a recipe. Subclass it for an op of your own: its fields are the parameters it takes in TOML.

    ``name`` is what recipes call it. Raise ``version`` whenever the same parameters begin to give other values: it is
    part of the recipe's digest, so that old results are left behind.
    """

    name: ClassVar[str]
    version: ClassVar[int]

    def plan(self, spec: TensorSpec) -> TensorSpec:
        """The spec of the result, from the spec of what comes in: no pixels needed.

        Raises:
            BadRequest: this op cannot be applied to such a tensor.
        """
        return spec

    def run(self, array: Array, spec: TensorSpec) -> Array:
        """The result, of the shape and dtype that ``plan(spec)`` promises. ``array`` is read-only; a view is welcome.

        Raises:
            BadRequest: the values themselves do not allow it.
        """
        raise NotImplementedError


class Volume(Op, VolumeOptions, frozen=True, forbid_unknown_fields=True):
    """Assemble the series: always the first op. ``kind`` "volume" places slices in the patient, axes zyx.

    "frames" takes the frames of a lone object as they follow each other (tyx, colour tyxc), "image" its only one (yx,
    yxc); ``frames`` picks them by number, from 1. ``rescale`` applies Modality LUT or rescale, frame by frame, and
    ``units`` asks for other values: "real_world" by the Real World Value Mapping, "suvbw" for PET. ``select`` "largest"
    leaves localizers out. ``dimensions`` "4d" makes time points, echoes or b-values an axis t (tzyx).
    """

    name: ClassVar[str] = "volume"
    version: ClassVar[int] = 1

    @property
    def options(self) -> VolumeOptions:
        return msgspec.convert(self, VolumeOptions, from_attributes=True)

    def run(self, array: Array, spec: TensorSpec) -> Array:
        """The volume itself: decoding has made it already."""
        return array


class Spatial(Op, frozen=True, forbid_unknown_fields=True):
    """An op on z, y and x. Along other axes (time points, channels) lie so many volumes, each treated alike."""

    def plan(self, spec: TensorSpec) -> TensorSpec:
        before, _, after = self._around(spec)
        planned = self.plan_volume(self._volume(spec))
        return msgspec.structs.replace(planned, shape=(*before, *planned.shape, *after), axes=spec.axes)

    def run(self, array: Array, spec: TensorSpec) -> Array:
        if spec.axes == "zyx":
            return self.run_volume(array, spec)
        before, _, after = self._around(spec)
        planned = self.plan(spec)
        volume = self._volume(spec)
        out = np.empty(planned.shape, planned.dtype)
        for first in np.ndindex(*before):
            for last in np.ndindex(*after):
                place = (*first, slice(None), slice(None), slice(None), *last)
                out[place] = self.run_volume(array[place], volume)
        return out

    def plan_volume(self, spec: TensorSpec) -> TensorSpec:
        """As `plan`, for axes ``zyx`` alone."""
        raise NotImplementedError

    def run_volume(self, array: Array, spec: TensorSpec) -> Array:
        """As `run`, for axes ``zyx`` alone."""
        raise NotImplementedError

    def _volume(self, spec: TensorSpec) -> TensorSpec:
        return msgspec.structs.replace(spec, shape=self._around(spec)[1], axes="zyx")

    def _around(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The lengths of the axes before z, those of z, y, x, and of those after x."""
        at = spec.axes.find("zyx")
        if at < 0:
            raise BadRequest(f"op {self.name!r} needs a volume with axes 'zyx' side by side, not {spec.axes!r}")
        return spec.shape[:at], spec.shape[at : at + 3], spec.shape[at + 3 :]


class Reorient(Spatial, frozen=True, forbid_unknown_fields=True):
    """Turn and flip the axes so that x, y and z increase towards the three letters of ``to``, as closely as they can.

    The letters are L or R, A or P, S or I, for x, y, z: the *last*, middle and first array axis. No value is
    interpolated: an oblique volume stays oblique, with each axis at the nearest anatomical direction.
    """

    name: ClassVar[str] = "reorient"
    version: ClassVar[int] = 1

    to: str

    def __post_init__(self) -> None:
        if {_DIRECTIONS.get(letter, (None,))[0] for letter in self.to} != {0, 1, 2} or len(self.to) != 3:
            raise ValueError(f"to: {self.to!r} is no orientation; use one each of L/R, A/P and S/I, such as 'LPS'")

    def plan_volume(self, spec: TensorSpec) -> TensorSpec:
        order, flips = self._moves(spec)
        affine = np.array(spec.affine)
        origin = affine[:3, 3].copy()
        columns = []
        for axis, flip in zip(order, flips, strict=True):
            column = affine[:3, axis]
            if flip:
                origin += column * (spec.shape[axis] - 1)
                column = -column
            columns.append(column)
        spacing = _millimetres(spec)
        return msgspec.structs.replace(
            spec,
            shape=tuple(spec.shape[axis] for axis in order),
            spacing=(spacing[order[0]], spacing[order[1]], spacing[order[2]]),
            affine=_affine(columns, origin),
        )

    def run_volume(self, array: Array, spec: TensorSpec) -> Array:
        order, flips = self._moves(spec)
        steps = tuple(slice(None, None, -1 if flip else None) for flip in flips)
        return array.transpose(order)[steps]

    def _moves(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """For each result axis: the axis it is taken from, and whether backwards."""
        # Rows: where result axes z, y, x should point. Columns: where the array's axes do point.
        wanted = np.zeros((3, 3))
        for row, letter in enumerate(reversed(self.to)):
            axis, sign = _DIRECTIONS[letter]
            wanted[row, axis] = sign
        along = wanted @ (np.array(spec.affine)[:3, :3] / np.array(spec.spacing))
        order = max(itertools.permutations(range(3)), key=lambda p: sum(abs(along[row, p[row]]) for row in range(3)))
        return order, tuple(bool(along[row, order[row]] < 0) for row in range(3))


class Resample(Spatial, frozen=True, forbid_unknown_fields=True):
    """Sample the volume at another ``spacing`` (mm): one number for all axes, or three for z, y, x.

    The centre of the first voxel stays where it is; an axis of n voxels becomes round(n · old / new), at least 1.
    Samples past the last voxel's centre take its value. ``order`` 0 takes the nearest voxel and keeps the dtype;
    1 (linear) and 3 (cubic B-spline) give float32. Nothing is smoothed before it is thinned out.
    """

    name: ClassVar[str] = "resample"
    version: ClassVar[int] = 1

    spacing: float | tuple[float, float, float]  # msgspec 0.22 misreads constraints within such a union
    order: Literal[0, 1, 3] = 1

    def __post_init__(self) -> None:
        if not all(new > 0 for new in self._spacing()):
            raise ValueError(f"spacing: {self.spacing} mm; every axis needs more than 0")

    def plan_volume(self, spec: TensorSpec) -> TensorSpec:
        had = _millimetres(spec)
        if not all(old > 0 for old in had):
            raise BadRequest(f"op {self.name!r} cannot work on a volume of spacing {spec.spacing} mm")
        new = self._spacing()
        affine = np.array(spec.affine)
        zoom = [math.floor(n * old / to + 0.5) for n, old, to in zip(spec.shape, had, new, strict=True)]
        return msgspec.structs.replace(
            spec,
            dtype=spec.dtype if self.order == 0 else "float32",
            shape=tuple(max(1, n) for n in zoom),
            spacing=new,
            affine=_affine([affine[:3, axis] * (new[axis] / had[axis]) for axis in range(3)], affine[:3, 3]),
        )

    def run_volume(self, array: Array, spec: TensorSpec) -> Array:
        planned = self.plan_volume(spec)
        if planned.spacing == spec.spacing:
            return array.astype(planned.dtype, copy=False)
        steps = [new / old for new, old in zip(self._spacing(), _millimetres(spec), strict=True)]
        if self.order == 3:
            from scipy import ndimage

            out = np.empty(planned.shape, dtype=np.float32)
            source = array.astype(np.float32, copy=False)
            ndimage.affine_transform(source, np.array(steps), output=out, order=3, mode="nearest")
            return out
        at = [np.arange(n) * step for n, step in zip(planned.shape, steps, strict=True)]
        out = np.empty(planned.shape, dtype=planned.dtype)
        # A few slices at a time stay in the CPU's cache: three times as fast as axis by axis over the whole.
        for first in range(0, planned.shape[0], 4):
            part = _sample(array, 0, at[0][first : first + 4], self.order)
            out[first : first + 4] = _sample(_sample(part, 1, at[1], self.order), 2, at[2], self.order)
        return out

    def _spacing(self) -> Spacing:
        return self.spacing if isinstance(self.spacing, tuple) else (self.spacing, self.spacing, self.spacing)


class Window(Op, frozen=True, forbid_unknown_fields=True):
    """Map ``center`` ± ``width``/2 to 0 … 1 as float32; values outside get 0 or 1.

    The function of PS3.3 §C.11.2.1.3.2 (LINEAR_EXACT).
    """

    name: ClassVar[str] = "window"
    version: ClassVar[int] = 1

    center: float
    width: Positive

    def plan(self, spec: TensorSpec) -> TensorSpec:
        return msgspec.structs.replace(spec, dtype="float32", units="")

    def run(self, array: Array, spec: TensorSpec) -> Array:
        low = np.float32(self.center - self.width / 2)
        out: Array = np.subtract(array, low, dtype=np.float32, casting="same_kind")
        np.divide(out, np.float32(self.width), out=out)
        return np.clip(out, 0, 1, out=out)


class Clip(Op, frozen=True, forbid_unknown_fields=True):
    """Limit values to ``low`` … ``high``; the dtype stays. For integers the bounds must be whole numbers."""

    name: ClassVar[str] = "clip"
    version: ClassVar[int] = 1

    low: float
    high: float

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low: {self.low} is above high, {self.high}")

    def plan(self, spec: TensorSpec) -> TensorSpec:
        least, most = _limits(spec.dtype)
        whole = self.low.is_integer() and self.high.is_integer()
        if self.low > most or self.high < least or not (whole or _is_float(spec.dtype)):
            raise BadRequest(f"op {self.name!r} cannot limit {spec.dtype} to {self.low} … {self.high}")
        return spec

    def run(self, array: Array, spec: TensorSpec) -> Array:
        least, most = _limits(spec.dtype)
        low, high = max(self.low, least), min(self.high, most)
        return np.clip(array, np.array(low, array.dtype), np.array(high, array.dtype))


class Normalize(Op, frozen=True, forbid_unknown_fields=True):
    """Shift and scale values, to float32: ``(value - mean) / std`` with fixed numbers, or by the volume's own values.

    ``mode`` "zscore" takes mean and standard deviation over the whole volume, "minmax" maps least … most to 0 … 1. A
    constant volume becomes 0.
    """

    name: ClassVar[str] = "normalize"
    version: ClassVar[int] = 1

    mode: Literal["fixed", "zscore", "minmax"] = "fixed"
    mean: float | None = None
    std: Positive | None = None

    def __post_init__(self) -> None:
        given = self.mean is not None, self.std is not None
        if self.mode == "fixed" and not all(given):
            raise ValueError("mean, std: both are needed, or a mode ('zscore', 'minmax')")
        if self.mode != "fixed" and any(given):
            raise ValueError(f"mean, std: mode {self.mode!r} takes them from the volume")

    def plan(self, spec: TensorSpec) -> TensorSpec:
        return msgspec.structs.replace(spec, dtype="float32", units="")

    def run(self, array: Array, spec: TensorSpec) -> Array:
        shift, scale = self._terms(array)
        out: Array = np.subtract(array, np.float32(shift), dtype=np.float32, casting="same_kind")
        return np.divide(out, np.float32(scale), out=out)

    def _terms(self, array: Array) -> tuple[float, float]:
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        if self.mode == "zscore":
            # float64 sums: float32 ones drift over a hundred million voxels.
            return float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64)) or 1.0
        least, most = float(array.min()), float(array.max())
        return least, (most - least) or 1.0


class CropPad(Spatial, frozen=True, forbid_unknown_fields=True):
    """Cut or fill the volume to exactly ``shape`` (z, y, x), keeping voxels where they are in the patient.

    ``centre`` is where the middle of the result lies, as a fraction of each axis: 0.5 is the middle of the volume. An
    odd voxel falls to the end when cutting, to the start when filling. New voxels get ``fill``.
    """

    name: ClassVar[str] = "crop_pad"
    version: ClassVar[int] = 1

    shape: tuple[Length, Length, Length]
    centre: tuple[Fraction, Fraction, Fraction] = (0.5, 0.5, 0.5)
    fill: float = 0.0

    def plan_volume(self, spec: TensorSpec) -> TensorSpec:
        least, most = _limits(spec.dtype)
        if not least <= self.fill <= most or not (_is_float(spec.dtype) or self.fill.is_integer()):
            raise BadRequest(f"op {self.name!r} cannot fill {spec.dtype} with {self.fill}")
        affine = np.array(spec.affine)
        origin = affine[:3, 3] + affine[:3, :3] @ np.array(self._starts(spec), dtype=float)
        affine_new = _affine([affine[:3, axis] for axis in range(3)], origin)
        return msgspec.structs.replace(spec, shape=self.shape, affine=affine_new)

    def run_volume(self, array: Array, spec: TensorSpec) -> Array:
        starts = self._starts(spec)
        axes = list(zip(starts, array.shape, self.shape, strict=True))
        taken = array[tuple(slice(max(0, start), max(0, min(old, start + new))) for start, old, new in axes)]
        if taken.shape == self.shape:
            return taken
        out = np.full(self.shape, self.fill, dtype=array.dtype)
        places = (max(0, -start) for start in starts)
        out[tuple(slice(place, place + n) for place, n in zip(places, taken.shape, strict=True))] = taken
        return out

    def _starts(self, spec: TensorSpec) -> list[int]:
        """For each axis, which voxel of the volume becomes voxel 0 of the result; negative when filling."""
        axes = zip(self.centre, spec.shape, self.shape, strict=True)
        return [math.floor(centre * old - new / 2) for centre, old, new in axes]


class Cast(Op, frozen=True, forbid_unknown_fields=True):
    """Change the ``dtype``; floats become integers by rounding to the nearest, halves to even. Never wraps.

    A value beyond the dtype's range is refused, or with ``overflow`` "clip" set to the nearest within. A NaN never
    becomes an integer. Floats keep as many digits as they have room for.
    """

    name: ClassVar[str] = "cast"
    version: ClassVar[int] = 1

    dtype: DType
    overflow: Literal["refuse", "clip"] = "refuse"

    def plan(self, spec: TensorSpec) -> TensorSpec:
        return msgspec.structs.replace(spec, dtype=self.dtype)

    def run(self, array: Array, spec: TensorSpec) -> Array:
        target = np.dtype(self.dtype)
        if np.can_cast(array.dtype, target, casting="safe"):
            return array.astype(target, copy=False)
        if array.dtype.kind == "f" and target.kind != "f":
            # Wide enough that the target's own limits are exact, or clipping to them would go past them.
            wide = np.result_type(array.dtype, np.float64 if target.itemsize == 4 else np.float32)
            array = np.rint(array, dtype=wide)
        found: tuple[float, float] = (np.fmin.reduce(array, axis=None).item(), np.fmax.reduce(array, axis=None).item())
        if target.kind != "f" and array.dtype.kind == "f" and np.isnan(array.min()):
            raise BadRequest(f"op {self.name!r}: NaN cannot become {self.dtype}")
        least, most = _limits(self.dtype)
        if found[0] < least or found[1] > most:
            if self.overflow == "refuse":
                raise BadRequest(
                    f"op {self.name!r}: values from {found[0]:g} to {found[1]:g} do not fit {self.dtype}; "
                    "set overflow = 'clip' or put a clip or window before it"
                )
            low, high = (min(max(value, least), most) for value in found)
            array = np.clip(array, low, high)
        return array.astype(target)


class Layout(Op, frozen=True, forbid_unknown_fields=True):
    """Put the axes in the order of ``axes``, such as "czyx", "tczyx" or "zyxc" (channels last).

    A ``c`` that is not there yet becomes an axis of length 1. z, y and x stay in their order: `reorient` turns them.
    """

    name: ClassVar[str] = "layout"
    version: ClassVar[int] = 1

    axes: str

    def __post_init__(self) -> None:
        if len(set(self.axes)) != len(self.axes) or not set("yx") <= set(self.axes) <= set("tczyx"):
            raise ValueError(f"axes: {self.axes!r} is no order of t, c, z, y and x")
        if [axis for axis in self.axes if axis in "zyx"] != [axis for axis in "zyx" if axis in self.axes]:
            raise ValueError(f"axes: {self.axes!r} turns z, y and x round; use reorient for that")

    def plan(self, spec: TensorSpec) -> TensorSpec:
        missing = set(self.axes) - set(spec.axes)
        if not missing <= {"c"} or not set(spec.axes) <= set(self.axes):
            raise BadRequest(f"op {self.name!r} cannot make axes {self.axes!r} of {spec.axes!r}")
        lengths = dict(zip(spec.axes, spec.shape, strict=True)) | dict.fromkeys(missing, 1)
        return msgspec.structs.replace(spec, shape=tuple(lengths[axis] for axis in self.axes), axes=self.axes)

    def run(self, array: Array, spec: TensorSpec) -> Array:
        axes = spec.axes
        if set(self.axes) - set(axes):
            array, axes = array[np.newaxis], f"c{axes}"
        return array.transpose([axes.index(axis) for axis in self.axes])


class Stack25d(Op, frozen=True, forbid_unknown_fields=True):
    """Give every slice its neighbours as channels, for 2-D models that see some depth: axes ``zcyx``, ``n`` channels.

    ``n`` is odd; the slice itself is the middle channel, lower z come first. Past either end the last slice is
    repeated.
    """

    name: ClassVar[str] = "stack25d"
    version: ClassVar[int] = 1

    n: Annotated[int, msgspec.Meta(ge=1, le=255)]

    def __post_init__(self) -> None:
        if self.n % 2 == 0:
            raise ValueError(f"n: {self.n} channels have no middle; use an odd number")

    def plan(self, spec: TensorSpec) -> TensorSpec:
        if spec.axes != "zyx":
            raise BadRequest(f"op {self.name!r} needs a volume with axes 'zyx', not {spec.axes!r}")
        z, y, x = spec.shape
        return msgspec.structs.replace(spec, shape=(z, self.n, y, x), axes="zcyx")

    def run(self, array: Array, spec: TensorSpec) -> Array:
        z = spec.shape[0]
        beside = np.arange(z)[:, None] + np.arange(self.n) - self.n // 2
        stacked: Array = array[np.clip(beside, 0, z - 1)]
        return stacked


#: In the order in which recipes tend to use them.
BUILT_IN: Final[tuple[type[Op], ...]] = (
    Volume,
    Reorient,
    Resample,
    Clip,
    Window,
    Normalize,
    CropPad,
    Cast,
    Layout,
    Stack25d,
)


def _sample(array: Array, axis: int, at: npt.NDArray[np.floating[Any]], order: Literal[0, 1]) -> Array:
    """``array`` at the positions ``at`` (in voxels) of one axis: the nearest voxel's value, or linear as float32."""
    last = array.shape[axis] - 1
    if order == 0:
        nearest: Array = array.take(np.minimum(np.floor(at + 0.5).astype(np.intp), last), axis=axis)
        return nearest
    before = np.minimum(at.astype(np.intp), last)
    weight = np.expand_dims((at - before).astype(np.float32), tuple(range(1, array.ndim - axis)))
    out: Array = array.take(before, axis=axis).astype(np.float32, copy=False)
    rise = array.take(np.minimum(before + 1, last), axis=axis).astype(np.float32, copy=False)
    rise -= out
    rise *= weight
    out += rise
    return out


def _millimetres(spec: TensorSpec) -> Spacing:
    assert spec.spacing is not None  # only embeddings have none, and no op comes after a model
    return spec.spacing


def _affine(columns: Sequence[Array], origin: Array) -> Affine:
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack(columns, axis=1)
    matrix[:3, 3] = origin
    affine: Affine = msgspec.convert(matrix.tolist(), Affine)
    return affine


def _is_float(dtype: DType) -> bool:
    return np.dtype(dtype).kind == "f"


def _limits(dtype: DType) -> tuple[float, float]:
    """The least and most a value of ``dtype`` can be."""
    if dtype == "bool":
        return 0, 1
    if _is_float(dtype):
        finite = np.finfo(dtype)
        return float(finite.min), float(finite.max)
    whole = np.iinfo(dtype)
    return int(whole.min), int(whole.max)
