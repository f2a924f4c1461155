"""A recipe as a value: parsed from configuration, written canonically, planned and run as one chain of ops."""

import importlib.metadata
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec

from cache.dicom.assemble import VolumeOptions
from cache.entry import ModelIdentity, TensorSpec
from cache.errors import ConfigError, MalformedReference, WorkerFailed
from cache.keys import check_name, digest

from .ops import BUILT_IN, Array, Op, Volume

_T = TypeVar("_T")

#: Packages add ops of their own under this entry point group: ``name = "module:op_class"``.
ENTRY_POINTS: Final = "voxcache.ops"

#: What a recipe calls its model, as if it were an op.
INFER: Final = "infer"


class Infer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Give the tensor to a ``model`` and keep its ``output``, an embedding: only as the last op of a recipe.

    Without a ``version``, the newest one that is served answers; without an ``input``, the model's only one that is no
    text takes the tensor.
    """

    model: Annotated[str, msgspec.Meta(min_length=1)]
    output: Annotated[str, msgspec.Meta(min_length=1)]
    version: Annotated[str, msgspec.Meta(pattern="^[0-9]*$")] = ""
    input: str = ""


class Recipe(msgspec.Struct, frozen=True):
    """A named, versioned, pure chain of ops, ``volume`` first, that may end in a model.

    Raise ``version`` to have everything made again; the name is only what callers say, two names for the same chain
    share their results.
    """

    name: str
    version: int
    ops: tuple[Op, ...]
    infer: Infer | None = None

    @property
    def volume(self) -> VolumeOptions:
        """How decoding assembles the series."""
        first = self.ops[0]
        assert isinstance(first, Volume)  # parse_recipe lets no other chain through
        return first.options

    @property
    def steps(self) -> tuple[Op, ...]:
        """The ops that run on the assembled volume."""
        return self.ops[1:]

    @property
    def tensor(self) -> "Recipe":
        """The recipe of what the model is given: this one without its model."""
        return msgspec.structs.replace(self, infer=None)

    def canonical(self) -> str:
        """JSON text of all that is asked for: the version, each op's version and parameters, and the model."""
        ops = [{"op": op.name, "version": op.version, **msgspec.structs.asdict(op)} for op in self.ops]
        asked = {"version": self.version, "ops": ops} | ({} if self.infer is None else {INFER: self.infer})
        return msgspec.json.encode(asked, order="sorted").decode()

    def digest(self, decoders: Mapping[str, str], model: ModelIdentity | None = None) -> str:
        """32 hex digits over all that the values depend on.

        That is the canonical form, ``decoders`` (transfer syntax UID → decoder and version) and, for a recipe that ends
        in one, who the ``model`` is.
        """
        assert (model is None) == (self.infer is None)
        served = () if model is None else (model.name, model.version, model.config)
        return digest(self.canonical(), *(part for pair in sorted(decoders.items()) for part in pair), *served)

    def plan(self, volume: TensorSpec) -> TensorSpec:
        """The spec of the result, from that of the assembled volume.

        Raises:
            BadRequest: an op cannot be applied to such a volume.
        """
        spec = volume
        for op in self.steps:
            spec = op.plan(spec)
        return spec

    def run(self, array: Array, volume: TensorSpec) -> Array:
        """Apply all steps to the assembled volume; the result may be a view of ``array``.

        Raises:
            BadRequest: the values do not allow it.
            WorkerFailed: an op made something else than it planned.
        """
        spec = volume
        for op in self.steps:
            planned = op.plan(spec)
            array = op.run(array, spec)
            if array.shape != planned.shape or array.dtype != planned.dtype:
                raise WorkerFailed(
                    f"op {op.name!r} made {array.dtype} {array.shape}, but planned {planned.dtype} {planned.shape}"
                )
            spec = planned
        return array


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[recipes.<name>]`` in TOML."""

    version: Annotated[int, msgspec.Meta(ge=1)]
    ops: list[dict[str, object]]


def parse_recipe(name: str, table: Mapping[str, object], plugins: Sequence[str] = ()) -> Recipe:
    """Read the recipe ``name`` from its TOML table: ``version`` and ``ops``, a list of ``{op = "…", parameters…}``.

    ``plugins`` are op classes of your own that are not packaged, as ``module:class``.

    Raises:
        ConfigError: it names the recipe, the op and the parameter at fault.
    """
    try:
        check_name(name, "recipe")
        read = msgspec.convert(table, _Table)
    except (MalformedReference, msgspec.ValidationError) as exc:
        raise ConfigError(f"recipe {name!r}: {exc}") from None
    known = known_ops(plugins)
    infer, entries = None, read.ops
    if entries and entries[-1].get("op") == INFER:
        *entries, last = entries
        infer = _read(f"recipe {name!r}, op {len(read.ops)} ({INFER})", last, Infer)
    ops = tuple(_op(f"recipe {name!r}, op {number}", entry, known) for number, entry in enumerate(entries, 1))
    if [number for number, op in enumerate(ops) if isinstance(op, Volume)] != [0]:
        raise ConfigError(f"recipe {name!r}: its first op, and no other, must be 'volume'")
    return Recipe(name, read.version, ops, infer)


def read_canonical(name: str, text: str, plugins: Sequence[str] = ()) -> Recipe:
    """The recipe, of ops alone, whose ``canonical()`` is ``text``.

    Raises:
        ConfigError: it is none, or was written by other versions of the ops.
    """
    table = msgspec.json.decode(text, type=dict[str, Any])
    versions = [op.pop("version", None) for op in table.get("ops", ())]
    recipe = parse_recipe(name, table, plugins)
    for op, version in zip(recipe.ops, versions, strict=True):
        if op.version != version:
            raise ConfigError(f"recipe {name!r}: op {op.name!r} has version {op.version} here, {version} there")
    return recipe


def known_ops(plugins: Sequence[str] = ()) -> dict[str, type[Op]]:
    """Every op by name: the built-in ones, those of installed packages, and ``plugins``.

    Raises:
        ConfigError: one cannot be loaded, is no op, or has a name that is taken.
    """
    known: dict[str, type[Op]] = {op.name: op for op in BUILT_IN}
    for point in (
        *importlib.metadata.entry_points(group=ENTRY_POINTS),
        *(importlib.metadata.EntryPoint(value, value, ENTRY_POINTS) for value in plugins),
    ):
        op = _load(point)
        if op.name == INFER:
            raise ConfigError(f"op {op.name!r} of {point.value!r}: the name is taken by a recipe's model")
        if known.setdefault(op.name, op) is not op:
            raise ConfigError(f"op {op.name!r} of {point.value!r}: the name is taken by {known[op.name].__qualname__}")
    return known


def ops_table(plugins: Sequence[str] = ()) -> str:
    """The known ops as a Markdown table: name, version, parameters with types and defaults, what they do."""
    rows = ["| op | version | parameters | what it does |", "|---|---|---|---|"]
    rows += [_row(op.name, str(op.version), op) for op in known_ops(plugins).values()]
    return "\n".join((*rows, _row(INFER, "the model's", Infer))) + "\n"


def _row(name: str, version: str, told: type[msgspec.Struct]) -> str:
    parameters = "<br>".join(_describe(field) for field in msgspec.structs.fields(told)) or "none"
    text = " ".join((told.__doc__ or "").split()).replace("``", "`").replace("|", "\\|")
    return f"| `{name}` | {version} | {parameters} | {text} |"


def _load(point: importlib.metadata.EntryPoint) -> type[Op]:
    try:
        op = point.load()
    except (ImportError, AttributeError) as exc:
        raise ConfigError(f"op {point.value!r} cannot be loaded: {exc}") from exc
    if not (isinstance(op, type) and issubclass(op, Op) and hasattr(op, "name") and hasattr(op, "version")):
        raise ConfigError(f"{point.value!r} is no op: subclass cache.recipe.ops.Op and give it a name and a version")
    if taken := {"op", "name", "version"} & {field.name for field in msgspec.structs.fields(op)}:
        raise ConfigError(f"op {op.name!r} of {point.value!r}: {sorted(taken)} cannot be parameters")
    return op


def _op(where: str, entry: Mapping[str, object], known: Mapping[str, type[Op]]) -> Op:
    name = entry.get("op")
    if name == INFER:
        raise ConfigError(f"{where}: {INFER!r} can only be the last op")
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{where}: {name!r} is none of {', '.join(sorted((*known, INFER)))}")
    return _read(f"{where} ({name})", entry, known[name])


def _read(where: str, entry: Mapping[str, object], kind: type[_T]) -> _T:
    """The parameters of one op's table."""
    parameters = {name: value for name, value in entry.items() if name != "op"}
    for path, value in _leaves(parameters):
        # JSON has no word for these, so two recipes that differ in them would share a digest.
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {path} must be a finite number, not {value}")
    try:
        return msgspec.convert(parameters, kind)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{where}: {exc}") from None


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every scalar within tables and lists, with the path to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{number}]")
    else:
        yield path, value


def _describe(field: msgspec.structs.FieldInfo) -> str:
    text = f"`{field.name}`: {_spell(field.type)}"
    if field.default is None:
        text += ", optional"
    elif field.default is not msgspec.NODEFAULT:
        text += f" = `{msgspec.json.encode(field.default).decode()}`"
    return text


def _spell(kind: Any) -> str:
    """A parameter's type as a person who writes TOML would say it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _spell(inner[0])
    if origin is Literal:
        return " or ".join(f"`{msgspec.json.encode(value).decode()}`" for value in inner)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_spell(part) for part in inner if part is not types.NoneType)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"[{_spell(inner[0])}, …]"
    if origin is tuple:
        return "[" + ", ".join(_spell(part) for part in inner) + "]"
    return {float: "number", int: "whole number", str: "text", bool: "true or false"}.get(kind, str(kind))
