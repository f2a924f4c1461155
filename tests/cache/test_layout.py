"""The layouts a model needs: channels first or last, neighbours as channels, volumes along a time axis."""

import msgspec
import numpy as np
import pytest

from cache.entry import TensorSpec
from cache.errors import BadRequest
from cache.recipe.ops import Array, CropPad, Layout, Op, Reorient, Resample, Stack25d

AFFINE = ((0.0, 0.0, 0.5, -10.0), (0.0, 0.75, 0.0, -20.0), (2.5, 0.0, 0.0, 30.0), (0.0, 0.0, 0.0, 1.0))


def tensor(axes: str) -> tuple[Array, TensorSpec]:
    """Distinct whole values; t, c, z, y, x of lengths 2, 3, 5, 6, 7."""
    lengths = dict(zip("tczyx", (2, 3, 5, 6, 7), strict=True))
    shape = tuple(lengths[axis] for axis in axes)
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    array.setflags(write=False)
    return array, TensorSpec("int16", shape, axes, (2.5, 0.75, 0.5), AFFINE, "HU")


def applied(op: Op, array: Array, spec: TensorSpec) -> tuple[Array, TensorSpec]:
    """The result, which is what was planned."""
    planned = op.plan(spec)
    made = op.run(array, spec)
    assert (made.shape, made.dtype.name) == (planned.shape, planned.dtype)
    return made, planned


@pytest.mark.parametrize(
    ("axes", "to", "expected"),
    [
        ("zyx", "czyx", lambda a: a[None]),
        ("zyx", "zyxc", lambda a: a[..., None]),
        ("zyx", "zyx", lambda a: a),
        ("tzyx", "tczyx", lambda a: a[:, None]),
        ("tzyx", "zyxt", lambda a: np.moveaxis(a, 0, -1)),
        ("czyx", "zyxc", lambda a: np.moveaxis(a, 0, -1)),
        ("zcyx", "zyxc", lambda a: np.moveaxis(a, 1, -1)),
        ("tyxc", "tcyx", lambda a: np.moveaxis(a, -1, 1)),
        ("yx", "cyx", lambda a: a[None]),
    ],
)
def test_axes_are_put_in_order(axes: str, to: str, expected: object) -> None:
    """Every axis keeps its values and goes where the layout names it; a new channel has length 1."""
    array, spec = tensor(axes)
    made, planned = applied(Layout(to), array, spec)
    assert callable(expected)
    assert np.array_equal(made, expected(array))
    assert planned == msgspec.structs.replace(spec, axes=to, shape=made.shape)


@pytest.mark.parametrize("axes", ["zyyx", "xyz", "zxyc", "zyxq", "", "zy"])
def test_what_is_no_layout_is_refused(axes: str) -> None:
    """Axes that are unknown, doubled or in another spatial order are refused when the recipe is read."""
    with pytest.raises(ValueError, match="axes"):
        Layout(axes)


@pytest.mark.parametrize(("axes", "to"), [("tzyx", "zyx"), ("zyx", "tzyx"), ("yx", "zyx"), ("czyx", "zyx")])
def test_no_axis_is_lost_or_invented(axes: str, to: str) -> None:
    """A layout that leaves out an axis, or asks for one that nothing fills, cannot be planned."""
    with pytest.raises(BadRequest, match=to):
        Layout(to).plan(tensor(axes)[1])


@pytest.mark.parametrize("n", [1, 3, 5, 13])
def test_neighbours_become_channels(n: int) -> None:
    """Channel k of slice z is slice z + k - n//2, or the last one there is."""
    array, spec = tensor("zyx")
    made, planned = applied(Stack25d(n), array, spec)
    assert planned.axes == "zcyx"
    for z in range(5):
        for k in range(n):
            assert np.array_equal(made[z, k], array[min(max(z + k - n // 2, 0), 4)])


def test_stacks_need_a_middle_and_a_volume() -> None:
    """An even number of channels and a tensor with other axes are refused."""
    with pytest.raises(ValueError, match="odd"):
        Stack25d(4)
    with pytest.raises(BadRequest, match="tzyx"):
        Stack25d(3).plan(tensor("tzyx")[1])


@pytest.mark.parametrize("axes", ["tzyx", "czyx", "zyxc", "tzyxc", "tczyx"])
@pytest.mark.parametrize(
    "op",
    [Reorient("RSA"), Resample(1.0), Resample((2.0, 1.0, 0.4), order=0), CropPad((4, 9, 5), fill=-7.0)],
    ids=lambda op: op.name,
)
def test_volumes_along_other_axes_are_treated_alike(axes: str, op: Op) -> None:
    """Spatial ops give each time point and channel what they give it alone, whatever axes surround it."""
    array, spec = tensor(axes)
    made, planned = applied(op, array, spec)
    at = axes.index("zyx")
    before, after = spec.shape[:at], spec.shape[at + 3 :]
    alone = msgspec.structs.replace(spec, shape=spec.shape[at : at + 3], axes="zyx")
    for first in np.ndindex(*before):
        for last in np.ndindex(*after):
            place = (*first, slice(None), slice(None), slice(None), *last)
            expected, expected_spec = applied(op, array[place], alone)
            assert np.array_equal(made[place], expected)
    assert (planned.spacing, planned.affine) == (expected_spec.spacing, expected_spec.affine)
    assert planned.axes == axes
