"""Recipes: what they mean, what they promise before they run, and what tells one from another."""

import re
import tomllib
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import SimpleITK
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache.dicom.assemble import VolumeOptions
from cache.entry import DType, ModelIdentity, TensorSpec
from cache.errors import BadRequest, ConfigError, WorkerFailed
from cache.recipe import chain, ops
from cache.recipe.chain import Infer, Recipe, known_ops, ops_table, parse_recipe, read_canonical
from cache.recipe.ops import Array, Op

LUNG = tomllib.loads("""
[recipes.lung_small]
version = 1
ops = [ {op="volume"}, {op="reorient", to="LPS"}, {op="resample", spacing=[2.0,1.5,1.5]},
        {op="window", center=-600, width=1500}, {op="crop_pad", shape=[128,192,192]}, {op="cast", dtype="float16"} ]
""")["recipes"]["lung_small"]

sitk: Any = SimpleITK  # typed in parts only

FLOATS: tuple[DType, ...] = ("float16", "float32", "float64")
DTYPES: tuple[DType, ...] = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", *FLOATS)


class Liar(Op, frozen=True, forbid_unknown_fields=True):
    """Makes something else than it plans."""

    name: ClassVar[str] = "liar"
    version: ClassVar[int] = 1

    def run(self, array: Array, spec: TensorSpec) -> Array:
        return array[1:]


class Clash(Op, frozen=True, forbid_unknown_fields=True):
    """Has a name that is taken."""

    name: ClassVar[str] = "window"
    version: ClassVar[int] = 1


def spec_of(
    array: Array, spacing: tuple[float, float, float] = (2.5, 0.75, 0.5), turn: Array | None = None
) -> TensorSpec:
    """A volume somewhere in the patient; ``turn`` holds the directions of z, y, x as columns."""
    directions = np.fliplr(np.eye(3)) if turn is None else turn
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = (-120.5, -80.25, 33.0)
    return msgspec.convert(
        {"dtype": str(array.dtype), "shape": array.shape, "axes": "zyx", "spacing": spacing, "affine": affine.tolist()},
        TensorSpec,
    )


def volume(dtype: str = "int16", shape: tuple[int, int, int] = (7, 12, 9)) -> Array:
    return np.random.default_rng(7).integers(-1000, 2000, shape).astype(dtype)


def op(name: str, **parameters: object) -> Op:
    return parse_recipe("test", {"version": 1, "ops": [{"op": "volume"}, {"op": name, **parameters}]}).ops[1]


def apply(name: str, array: Array, spec: TensorSpec | None = None, **parameters: object) -> tuple[Array, TensorSpec]:
    """Run one op on a read-only array; it makes what it has planned."""
    made, before = op(name, **parameters), spec or spec_of(array)
    array.flags.writeable = False
    planned = made.plan(before)
    result = made.run(array, before)
    assert (result.shape, str(result.dtype)) == (planned.shape, planned.dtype)
    return result, planned


def where(spec: TensorSpec, index: tuple[int, ...]) -> Array:
    """The centre of a voxel in the patient, in mm."""
    return (np.array(spec.affine) @ [*index, 1])[:3]


# --- recipes -----------------------------------------------------------------------------------------------------


def test_parse() -> None:
    """A recipe reads from TOML, plans without pixels, and makes what it has planned."""
    recipe = parse_recipe("lung_small", LUNG)
    assert [each.name for each in recipe.ops] == ["volume", "reorient", "resample", "window", "crop_pad", "cast"]
    assert recipe.volume == VolumeOptions()
    assert recipe.steps == recipe.ops[1:]
    array = volume(shape=(40, 50, 60))
    planned = recipe.plan(spec_of(array))
    assert (planned.dtype, planned.shape, planned.spacing) == ("float16", (128, 192, 192), (2.0, 1.5, 1.5))
    made = recipe.run(array, spec_of(array))
    assert (str(made.dtype), made.shape) == (planned.dtype, planned.shape)


def test_volume_alone() -> None:
    """A recipe may be the volume itself; its options are those of decoding."""
    ops = [{"op": "volume", "rescale": False, "monochrome1": "invert"}]
    recipe = parse_recipe("raw", {"version": 1, "ops": ops})
    assert recipe.volume == VolumeOptions(rescale=False, monochrome1="invert")
    array = volume()
    assert recipe.plan(spec_of(array)) == spec_of(array)
    assert recipe.run(array, spec_of(array)) is array


def test_canonical_round_trip() -> None:
    """The canonical text holds every parameter, defaults too, and reads back as the same chain."""
    recipe = parse_recipe("lung_small", LUNG)
    assert '"overflow":"refuse"' in recipe.canonical()
    assert read_canonical("lung_small", recipe.canonical()) == recipe


def test_canonical_of_other_code() -> None:
    """A text written by another version of an op is refused: it would not mean the same."""
    text = (
        parse_recipe("lung_small", LUNG).canonical().replace('"op":"window","version":1', '"op":"window","version":2')
    )
    with pytest.raises(ConfigError, match="'window' has version 1 here, 2 there"):
        read_canonical("lung_small", text)


def test_a_recipe_may_end_in_a_model() -> None:
    """What comes before the model is a recipe of its own: the same as one that never had a model."""
    infer = {"op": "infer", "model": "encoder", "version": "2", "input": "VOLUME", "output": "EMBEDDING"}
    recipe = parse_recipe("lung_vector", {**LUNG, "ops": [*LUNG["ops"], infer]})
    lung = parse_recipe("lung_small", LUNG)
    assert recipe.infer == Infer("encoder", "EMBEDDING", "2", "VOLUME")
    assert lung.infer is None
    assert recipe.tensor.canonical() == lung.canonical()
    assert recipe.tensor.digest({}) == lung.digest({})
    assert read_canonical("lung_vector", recipe.tensor.canonical()) == recipe.tensor
    model = ModelIdentity("encoder", "2", "c1")
    digests = {
        lung.digest({}),
        recipe.digest({}, model),
        recipe.digest({}, ModelIdentity("encoder", "2", "c2")),
        recipe.digest({}, ModelIdentity("encoder", "3", "c1")),
        msgspec.structs.replace(recipe, infer=Infer("encoder", "OTHER", "2", "VOLUME")).digest({}, model),
    }
    assert len(digests) == 5


def test_digest() -> None:
    """The digest tells apart whatever can change a value, and nothing else."""
    decoders = {"1.2.840.10008.1.2.1": "native 1", "1.2.840.10008.1.2.5": "rle 1"}
    digest = parse_recipe("lung_small", LUNG).digest(decoders)
    assert re.fullmatch("[0-9a-f]{32}", digest)
    assert parse_recipe("other_name", LUNG).digest(dict(reversed(decoders.items()))) == digest
    changed = [
        parse_recipe("a", {**LUNG, "version": 2}).digest(decoders),
        parse_recipe("a", {**LUNG, "ops": LUNG["ops"][:-1]}).digest(decoders),
        parse_recipe("a", {**LUNG, "ops": [*LUNG["ops"][:-1], {"op": "cast", "dtype": "float32"}]}).digest(decoders),
        parse_recipe("a", LUNG).digest({**decoders, "1.2.840.10008.1.2.5": "rle 2"}),
        parse_recipe("a", LUNG).digest({}),
    ]
    assert len({digest, *changed}) == 6


def test_digest_follows_op_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op whose code gives other values makes another digest."""
    recipe = parse_recipe("lung_small", LUNG)
    before = recipe.digest({})
    monkeypatch.setattr(ops.Window, "version", 2)
    assert recipe.digest({}) != before


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([], "first op"),
        ([{"op": "clip", "low": 0, "high": 1}], "first op"),
        ([{"op": "volume"}, {"op": "volume"}], "first op"),
        ([{"op": "volume"}, {"op": "blur"}], r"op 2: 'blur' is none of .*window"),
        ([{"op": "volume"}, {}], "op 2: None is none of"),
        ([{"op": "infer", "model": "m", "output": "o"}], "first op"),
        ([{"op": "volume"}, {"op": "infer", "model": "m"}], r"op 2 \(infer\): .*output"),
        ([{"op": "volume"}, {"op": "infer", "model": "", "output": "o"}], r"op 2 \(infer\): .*model"),
        ([{"op": "volume"}, {"op": "infer", "model": "m", "output": "o", "version": "v2"}], "version"),
        ([{"op": "volume"}, {"op": "infer", "model": "m", "output": "o"}, {"op": "volume"}], "only be the last op"),
        ([{"op": "volume", "rescale": "yes"}], r"op 1 \(volume\): .*rescale"),
        ([{"op": "volume"}, {"op": "window", "center": 0}], r"op 2 \(window\): .*width"),
        ([{"op": "volume"}, {"op": "window", "center": 0, "width": 0}], r"op 2 \(window\): .*width"),
        ([{"op": "volume"}, {"op": "window", "center": 0, "widht": 1, "width": 1}], "widht"),
        ([{"op": "volume"}, {"op": "window", "center": float("nan"), "width": 1}], "center must be a finite number"),
        ([{"op": "volume"}, {"op": "resample", "spacing": [1, float("inf"), 1]}], r"spacing\[1\] must be a finite"),
        ([{"op": "volume"}, {"op": "resample", "spacing": [1, 0, 1]}], "spacing"),
        ([{"op": "volume"}, {"op": "resample", "spacing": [1, 1]}], "spacing"),
        ([{"op": "volume"}, {"op": "resample", "spacing": 1, "order": 2}], "order"),
        ([{"op": "volume"}, {"op": "reorient", "to": "LRS"}], "to: 'LRS' is no orientation"),
        ([{"op": "volume"}, {"op": "reorient", "to": "LPSS"}], "to: "),
        ([{"op": "volume"}, {"op": "reorient", "to": "XYZ"}], "to: "),
        ([{"op": "volume"}, {"op": "clip", "low": 2, "high": 1}], "low: "),
        ([{"op": "volume"}, {"op": "normalize"}], "mean, std: "),
        ([{"op": "volume"}, {"op": "normalize", "mode": "zscore", "mean": 0}], "mean, std: "),
        ([{"op": "volume"}, {"op": "crop_pad", "shape": [1, 0, 1]}], "shape"),
        ([{"op": "volume"}, {"op": "crop_pad", "shape": [1, 1, 1], "centre": [0, 0, 2]}], "centre"),
        ([{"op": "volume"}, {"op": "cast", "dtype": "int64"}], "dtype"),
    ],
)
def test_config_errors(steps: list[dict[str, object]], says: str) -> None:
    """A recipe that cannot work is refused by its name, the op and the parameter."""
    with pytest.raises(ConfigError, match=f"recipe 'bad'.*{says}"):
        parse_recipe("bad", {"version": 1, "ops": steps})


@pytest.mark.parametrize("table", [{"ops": []}, {"version": 0, "ops": []}, {"version": 1, "ops": [], "x": 1}])
def test_config_errors_of_tables(table: dict[str, object]) -> None:
    """So is a table of another form, or a name that no reference could hold."""
    with pytest.raises(ConfigError, match="recipe 'bad'"):
        parse_recipe("bad", table)
    with pytest.raises(ConfigError, match="cannot name a recipe"):
        parse_recipe("a/b", LUNG)


def test_plugins() -> None:
    """An op of your own joins by module and class; one that is none, or whose name is taken, does not."""
    assert known_ops([f"{__name__}:Liar"])["liar"] is Liar
    for plugin, says in (("Clash", "name is taken by Window"), ("LUNG", "is no op"), ("Nobody", "cannot be loaded")):
        with pytest.raises(ConfigError, match=says):
            known_ops([f"{__name__}:{plugin}"])


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package adds ops by entry points."""
    point = EntryPoint("liar", f"{__name__}:Liar", chain.ENTRY_POINTS)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: [point] if group == "voxcache.ops" else [])
    assert parse_recipe("mine", {"version": 1, "ops": [{"op": "volume"}, {"op": "liar"}]}).steps == (Liar(),)


def test_op_that_breaks_its_promise() -> None:
    """An op that makes something else than it planned fails the job: the place for its result has another size."""
    with pytest.raises(WorkerFailed, match="'liar' made"):
        Recipe("lies", 1, (ops.Volume(), Liar())).run(volume(), spec_of(volume()))


def test_ops_table() -> None:
    """The documentation's table has a row an op, with every parameter."""
    table = ops_table()
    for each in ops.BUILT_IN:
        [row] = [line for line in table.splitlines() if line.startswith(f"| `{each.name}` |")]
        assert all(f"`{field.name}`:" in row for field in msgspec.structs.fields(each))
    assert "`order`: `0` or `1` or `3` = `1`" in table


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("reorient", {"to": "LPS"}), ("resample", {"spacing": 1}), ("crop_pad", {"shape": [1] * 3})],
)
def test_spatial_ops_need_a_volume(name: str, parameters: dict[str, object]) -> None:
    """An op that moves voxels refuses a tensor whose z, y and x do not lie side by side."""
    for axes, shape in (("zcyx", (4, 1, 5, 6)), ("tyx", (4, 5, 6)), ("yx", (5, 6))):
        with pytest.raises(BadRequest, match="zyx"):
            op(name, **parameters).plan(msgspec.structs.replace(spec_of(volume()), axes=axes, shape=shape))


# --- geometry ----------------------------------------------------------------------------------------------------


@given(
    letters=st.tuples(st.sampled_from("LR"), st.sampled_from("AP"), st.sampled_from("SI")).flatmap(st.permutations),
    seed=st.integers(0, 1000),
)
def test_reorient(letters: list[str], seed: int) -> None:
    """Axes point where the letters say, and every voxel stays where it is in the patient."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    before = spec_of(array, turn=turn)
    result, after = apply("reorient", array, before, to="".join(letters))
    found = np.array(after.affine)[:3, :3] / after.spacing
    wanted = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    towards = np.array([wanted[letter] for letter in reversed(letters)]).T
    cosines = (found * towards).sum(axis=0)
    assert (cosines >= 0).all()
    assert cosines.sum() >= 1.0
    for index in np.ndindex(result.shape):
        [home] = np.argwhere(array == result[index])
        assert where(after, index) == pytest.approx(where(before, tuple(home)))


@pytest.mark.parametrize("to", ["LPS", "RAS", "PIR", "ASL"])
def test_reorient_as_itk(to: str) -> None:
    """Orientation letters mean what they mean to ITK."""
    array = volume()
    before = spec_of(array)
    result, after = apply("reorient", array, before, to=to)
    image = sitk.DICOMOrient(_image(array, before), to)
    assert np.array_equal(sitk.GetArrayFromImage(image), result)
    assert image.GetSpacing()[::-1] == pytest.approx(after.spacing)
    assert image.GetOrigin() == pytest.approx(where(after, (0, 0, 0)))


@given(spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3), dtype=st.sampled_from(["int16", "float32", "float16", "uint8"]))
def test_resample_as_itk(spacing: tuple[float, float, float], dtype: str) -> None:
    """Linear resampling equals ITK's, on ITK's own grid of that origin, spacing and size."""
    array = volume().astype(np.uint8).astype(dtype)
    before = spec_of(array)
    result, after = apply("resample", array, before, spacing=list(spacing))
    resample = sitk.ResampleImageFilter()
    resample.SetInterpolator(sitk.sitkLinear)
    resample.SetUseNearestNeighborExtrapolator(True)
    image = _image(array.astype(np.float32), before)
    resample.SetOutputOrigin(image.GetOrigin())
    resample.SetOutputDirection(image.GetDirection())
    resample.SetOutputSpacing(np.array(after.spacing)[::-1].tolist())
    resample.SetSize(after.shape[::-1])
    assert result.dtype == np.float32
    # Past the last centres ITK snaps to the nearest voxel on every axis at once.
    inside = tuple(
        slice(0, int((old - 1) * had / new) + 1)
        for old, had, new in zip(array.shape, np.array(before.spacing), spacing, strict=True)
    )
    np.testing.assert_allclose(result[inside], sitk.GetArrayFromImage(resample.Execute(image))[inside], atol=1e-4 * 255)


def test_resample_grid() -> None:
    """The first voxel's centre stays, sizes round to the nearest, and no axis vanishes."""
    array = volume()
    before = spec_of(array)  # 7 × 12 × 9 voxels of 2.5 × 0.75 × 0.5 mm
    _, after = apply("resample", array, before, spacing=[1.0, 1.5, 20.0])
    assert after.shape == (18, 6, 1)
    assert after.spacing == (1.0, 1.5, 20.0)
    assert np.array_equal(where(after, (0, 0, 0)), where(before, (0, 0, 0)))
    assert where(after, (5, 3, 0)) == pytest.approx(where(before, (2, 6, 0)))


def test_resample_past_the_end() -> None:
    """Samples past the last voxel's centre take its value."""
    array = np.array([[[10, 20]]], np.int16)
    result, _ = apply("resample", array, spacing=[2.5, 0.75, 0.2])
    np.testing.assert_allclose(result.ravel(), [10, 14, 18, 20, 20], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_resample_nearest(dtype: str) -> None:
    """Nearest-voxel sampling only picks values, so any dtype keeps itself, labels included."""
    array = volume().astype(np.uint8).astype(dtype)
    result, _ = apply("resample", array, order=0, spacing=[2.5, 1.5, 0.25])
    picked = array[:, ::2][:, :, np.minimum(np.floor(np.arange(18) / 2 + 0.5).astype(int), 8)]
    assert np.array_equal(result, picked)


def test_resample_cubic() -> None:
    """Cubic resampling passes through the samples it was given."""
    array = volume()
    result, _ = apply("resample", array, order=3, spacing=[1.25, 0.75, 0.25])
    np.testing.assert_allclose(result[::2, :, ::2], array, atol=0.5)
    assert result.shape == (14, 12, 18)


def test_resample_to_its_own_spacing() -> None:
    """Resampling to the spacing that is there changes no value."""
    array = volume()
    result, after = apply("resample", array, spacing=[2.5, 0.75, 0.5])
    assert np.array_equal(result, array)
    assert after.affine == spec_of(array).affine


@given(
    shape=st.tuples(*[st.integers(1, 16)] * 3),
    centre=st.tuples(*[st.floats(0, 1)] * 3),
)
def test_crop_pad(shape: tuple[int, int, int], centre: tuple[float, float, float]) -> None:
    """Voxels that stay keep their place in the patient and their value; the others are filled."""
    array = np.arange(1, 1 + 7 * 12 * 9, dtype=np.int16).reshape(7, 12, 9)
    before = spec_of(array)
    result, after = apply("crop_pad", array, before, shape=list(shape), centre=list(centre), fill=-7)
    to_old = np.linalg.inv(np.array(before.affine)) @ np.array(after.affine)
    start = np.rint(to_old[:3, 3]).astype(int)
    for index in np.ndindex(result.shape):
        home = start + index
        inside = (home >= 0).all() and (home < array.shape).all()
        assert result[index] == (array[tuple(home)] if inside else -7)
    middle = start + np.array(shape) / 2
    assert np.abs(middle - np.array(centre) * array.shape).max() <= 1 + 1e-9


def test_crop_without_copy() -> None:
    """Cropping alone moves no bytes."""
    array = volume()
    result, _ = apply("crop_pad", array, shape=[3, 4, 5])
    assert np.array_equal(result, array[2:5, 4:8, 2:7])
    assert result.base is array


def test_crop_pad_fill_must_fit() -> None:
    """A fill value that the dtype cannot hold is refused before anything runs."""
    for dtype, fill in (("uint8", -1), ("int16", 0.5), ("float16", 1e6)):
        with pytest.raises(BadRequest, match="cannot fill"):
            op("crop_pad", shape=[1, 1, 1], fill=fill).plan(spec_of(volume(dtype)))


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int16", "uint8", "int32", "float32", "float64"])
def test_window(dtype: str) -> None:
    """The window's ends become 0 and 1, its centre 0.5, and what lies outside is cut."""
    array = np.array([[[0, 50, 75, 100, 150, 200]]], dtype)
    result, after = apply("window", array, center=100, width=100)
    assert result.ravel().tolist() == [0, 0, 0.25, 0.5, 1, 1]
    assert (after.dtype, after.units) == ("float32", "")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_clip(dtype: str) -> None:
    """Values are limited, the dtype stays, and a bound past the dtype's own range has no effect."""
    array = np.array([[[0, 1, 50, 120]]], dtype)
    assert apply("clip", array, low=1, high=60)[0].ravel().tolist() == [1, 1, 50, 60]
    assert apply("clip", array, low=-1e30, high=1e30)[0].ravel().tolist() == [0, 1, 50, 120]


def test_clip_that_cannot_be() -> None:
    """Bounds that the dtype cannot hold are refused before anything runs."""
    for dtype, low, high in (("int16", 0.5, 3), ("uint8", 300, 400), ("int8", -400, -300)):
        with pytest.raises(BadRequest, match="cannot limit"):
            op("clip", low=low, high=high).plan(spec_of(np.zeros((1, 1, 1), dtype)))


def test_normalize() -> None:
    """Fixed numbers, the volume's own mean and deviation, or its own range."""
    array = volume()
    np.testing.assert_allclose(apply("normalize", array, mean=100, std=50)[0], (array - 100.0) / 50, rtol=1e-6)
    own = apply("normalize", array, mode="zscore")[0]
    assert (own.mean(dtype=float), own.std(dtype=float)) == pytest.approx((0, 1), abs=1e-6)
    unit = apply("normalize", array, mode="minmax")[0]
    assert (unit.min(), unit.max()) == (0, 1)


@pytest.mark.parametrize("mode", ["zscore", "minmax"])
def test_normalize_constant(mode: str) -> None:
    """A constant volume becomes 0, not NaN."""
    assert not apply("normalize", np.full((2, 2, 2), 40, np.int16), mode=mode)[0].any()


def arrays() -> st.SearchStrategy[Array]:
    return st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(np.dtype(dtype), (1, 2, 3)))


@given(array=arrays(), dtype=st.sampled_from(DTYPES))
def test_cast_never_wraps(array: Array, dtype: DType) -> None:
    """A cast that succeeds is exact up to rounding; one that clips differs only where the dtype ends."""
    least, most = ops._limits(dtype)
    with np.errstate(invalid="ignore"):
        exact = array.astype(np.float64)
    try:
        plain = apply("cast", array.copy(), dtype=dtype)[0]
    except BadRequest:
        plain = None
    try:
        clipped = apply("cast", array.copy(), dtype=dtype, overflow="clip")[0]
    except BadRequest:
        assert np.isnan(exact).any()
        assert dtype not in FLOATS
        return
    wanted = np.clip(exact if dtype in FLOATS else np.rint(exact), least, most)
    with np.errstate(over="ignore"):
        same = (clipped == wanted.astype(dtype)) | (np.isnan(exact) & np.isnan(clipped.astype(np.float64)))
    if array.dtype == np.dtype(dtype) or np.can_cast(array.dtype, dtype, casting="safe"):
        assert np.array_equal(clipped, array.astype(dtype), equal_nan=dtype in FLOATS)
    else:
        assert same.all()
    if plain is not None:
        assert np.array_equal(plain, clipped, equal_nan=dtype in FLOATS)


@pytest.mark.parametrize(
    ("value", "source", "dtype"),
    [
        (40000, "int32", "int16"),
        (-1, "int16", "uint8"),
        (1e6, "float32", "float16"),
        (2.0**31, "float32", "int32"),
        (2, "uint8", "bool"),
    ],
)
def test_cast_overflow(value: float, source: str, dtype: str) -> None:
    """A value past the dtype's range is refused, or by request becomes the nearest that there is."""
    array = np.full((1, 1, 1), value, source)
    with pytest.raises(BadRequest, match=f"do not fit {dtype}"):
        apply("cast", array, dtype=dtype)
    least, most = ops._limits(msgspec.convert(dtype, DType))
    assert apply("cast", array, dtype=dtype, overflow="clip")[0].item() == (least if value < 0 else most)


def test_cast_nan() -> None:
    """A NaN becomes no integer, clipped or not; among floats it stays."""
    array = np.array([[[1.0, np.nan]]], np.float32)
    for overflow in ("refuse", "clip"):
        with pytest.raises(BadRequest, match="NaN"):
            apply("cast", array, dtype="int16", overflow=overflow)
    assert np.isnan(apply("cast", array, dtype="float16")[0][0, 0, 1])


def _image(array: Array, spec: TensorSpec) -> Any:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(np.array(spec.spacing)[::-1].tolist())
    image.SetOrigin(where(spec, (0, 0, 0)).tolist())
    image.SetDirection(np.fliplr(np.array(spec.affine)[:3, :3] / spec.spacing).ravel().tolist())
    return image
