"""Settings: one TOML file, overridden by ``VOXCACHE_`` variables, as frozen and validated values.

Each room owns the settings it needs; here they only come together. ``VOXCACHE_RAM__BUDGET="8 GiB"`` sets ``budget`` in
``[ram]``: sections and names are joined by two underscores. Sizes may be written with a unit (kB, MiB, GiB …).
"""

import inspect
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast, get_origin

import msgspec

from cache.catalog import CatalogSettings
from cache.errors import ConfigError
from cache.flight import FlightSettings
from cache.lease import LeaseSettings
from cache.nvme import NvmeSettings
from cache.nvme.faults import DiskFaultPlan
from cache.origin.directory import DirectorySettings
from cache.origin.faults import FaultPlan
from cache.origin.find import FindSettings
from cache.origin.s3 import S3Settings
from cache.policy.shares import check_shares
from cache.ram import RamSettings
from cache.recipe.chain import Recipe, parse_recipe
from cache.restore import RestoreSettings
from cache.store import StoreSettings
from cache.workers.pool import WorkerSettings

from .admission import AdmissionSettings
from .api.arrivals import WebhookSettings
from .arrivals.changes import OrthancSettings
from .arrivals.listing import ListingSettings, ReconcileSettings
from .arrivals.queue import ArrivalSettings
from .arrivals.redis import RedisSettings
from .arrivals.sources import SOURCES
from .audit import AuditSettings
from .filler import WarmSettings
from .grpc.door import GrpcSettings
from .log import LogSettings
from .plan import PlanSettings, checked
from .price import PriceSettings
from .retention import RetentionSettings
from .tracing import TracingSettings
from .triton import TritonSettings
from .watched import ObserveSettings

PREFIX: Final = "VOXCACHE_"

#: How settings that may be given several times are written.
_MANY: Final = {dict: ".<name>", tuple: "[]"}

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]i?)?B")
_UNITS: Final = {None: 1, "k": 10**3, "ki": 2**10, "M": 10**6, "Mi": 2**20, "G": 10**9, "Gi": 2**30} | {
    "T": 10**12,
    "Ti": 2**40,
}


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the daemon listens, and how it ends.

    host: address of the HTTP API. Leave it on loopback unless something in front checks who asks.
    port: port of the HTTP API; 0 takes a free one.
    drain_s: seconds that requests under way are given when the daemon is told to stop.
    max_body: largest request body the native API reads, in bytes; bodies for Triton are streamed and have no limit.
    socket: path of the hand-off socket, where programs of this node lease without HTTP; "" for none. Unless it is set:
        lease.sock in state.path. ram.group may connect too.
    """

    host: str = "127.0.0.1"
    port: int = 8600
    drain_s: float = 20.0
    max_body: int = 1 << 20
    socket: str | None = None


class StateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must outlive a restart and cannot be made again.

    path: directory of the arrival queue, of the daemon's lock and of its hand-off socket. One daemon a directory.
    """

    path: str = "/var/lib/voxcache"


class OriginSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The system of record: exactly one of the two.

    directory: a directory of DICOM files.
    s3: a bucket.
    """

    directory: DirectorySettings | None = None
    s3: S3Settings | None = None

    @property
    def bucket(self) -> str:
        """The bucket's name; "" for a directory."""
        return "" if self.s3 is None else self.s3.bucket


class FaultSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong on purpose, in a deployment that is there to be tried out. Never where it matters.

    seed: from which the faults are drawn: the same ones in every run.
    origin: faults of the origin.
    disk: faults of the NVMe disk.
    """

    seed: int = 0
    origin: FaultPlan = FaultPlan()
    disk: DiskFaultPlan = DiskFaultPlan()


class PullSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked for arrivals, where nobody calls or calls may be lost.

    orthanc: its list of changes.
    listing: objects of the origin that are new.
    reconcile: all of the origin, compared with what is known.
    """

    orthanc: OrthancSettings = OrthancSettings()
    listing: ListingSettings = ListingSettings()
    reconcile: ReconcileSettings = ReconcileSettings()


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of the daemon's settings, by section.

    recipes: what callers may ask for, by name: "version" and "ops", see docs/recipes.md.
    """

    ram: RamSettings
    nvme: NvmeSettings
    origin: OriginSettings
    server: ServerSettings = ServerSettings()
    grpc: GrpcSettings = GrpcSettings()
    state: StateSettings = StateSettings()
    find: FindSettings = FindSettings()
    catalog: CatalogSettings = CatalogSettings()
    workers: WorkerSettings = WorkerSettings()
    fills: FlightSettings = FlightSettings()
    leases: LeaseSettings = LeaseSettings()
    store: StoreSettings = StoreSettings()
    restore: RestoreSettings = RestoreSettings()
    triton: TritonSettings = TritonSettings()
    admission: AdmissionSettings = AdmissionSettings()
    arrivals: ArrivalSettings = ArrivalSettings()
    redis: RedisSettings = RedisSettings()
    webhooks: WebhookSettings = WebhookSettings()
    pull: PullSettings = PullSettings()
    plan: PlanSettings = PlanSettings()
    warm: WarmSettings = WarmSettings()
    retention: RetentionSettings = RetentionSettings()
    log: LogSettings = LogSettings()
    audit: AuditSettings = AuditSettings()
    observe: ObserveSettings = ObserveSettings()
    tracing: TracingSettings = TracingSettings()
    price: PriceSettings = PriceSettings()
    faults: FaultSettings = FaultSettings()
    recipes: dict[str, dict[str, Any]] = {}

    @property
    def socket(self) -> Path | None:
        """Where the hand-off socket is; None for nowhere."""
        if self.server.socket is None:
            return Path(self.state.path).absolute() / "lease.sock"
        return Path(self.server.socket).absolute() if self.server.socket else None

    def parsed_recipes(self) -> dict[str, Recipe]:
        """The recipes by name. Raises: ConfigError."""
        return {name: parse_recipe(name, table, self.workers.plugins) for name, table in self.recipes.items()}

    def models_to_know(self) -> set[tuple[str, str]]:
        """The models that recipes end in, with the version they ask for or "", and those whose answers are kept.

        Raises: ConfigError.
        """
        steps = (recipe.infer for recipe in self.parsed_recipes().values())
        keep = {(model, "") for model, virtual in self.triton.models.items() if virtual.results}
        return keep | {(step.model, step.version) for step in steps if step is not None}


def load(path: Path, environment: Mapping[str, str]) -> Settings:
    """Read a settings file and the variables that override it.

    Raises:
        ConfigError: it cannot be read, or a setting is unknown, missing, of the wrong type or out of range.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return from_table(merged(table, environment), str(path))


def from_table(table: Mapping[str, Any], where: str = "settings") -> Settings:
    """Settings from plain tables, sizes with units included. Raises: ConfigError."""
    sized = {name: part if name == "recipes" else _with_sizes(part) for name, part in table.items()}
    try:
        settings = msgspec.convert(sized, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
    if (settings.origin.directory is None) == (settings.origin.s3 is None):
        raise ConfigError(f"{where}: name one origin, [origin.directory] or [origin.s3]")
    for tier, shares in (("ram", settings.ram.namespaces), ("nvme", settings.nvme.namespaces)):
        try:
            check_shares(shares)
        except ConfigError as error:
            raise ConfigError(f"{where}: {tier}.namespaces: {error}") from None
    known = settings.parsed_recipes()
    for model, virtual in settings.triton.models.items():
        if virtual.recipe is not None and virtual.recipe not in known:
            raise ConfigError(f"{where}: triton.models.{model} names the recipe {virtual.recipe!r}, which is not there")
    for recipe in settings.arrivals.warm:
        if recipe not in known:
            raise ConfigError(f"{where}: arrivals.warm names the recipe {recipe!r}, which is not there")
    for name in settings.webhooks.secrets:
        if name not in SOURCES:
            raise ConfigError(f"{where}: webhooks.secrets names the source {name!r}; known: {', '.join(SOURCES)}")
    _check_names(where, "observe.slos", [slo.name for slo in settings.observe.slos])
    _check_names(where, "retention.rules", [rule.name for rule in settings.retention.rules])
    try:
        checked(settings.plan, known, settings.ram.namespaces)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return settings


def _check_names(where: str, what: str, names: Sequence[str]) -> None:
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"{where}: {what}: each needs a name of its own")


def merged(table: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """``table`` with every ``VOXCACHE_SECTION__NAME`` of the environment laid over it.

    Raises: ConfigError: a variable goes through a setting that is no section.
    """
    result = cast(dict[str, Any], _copied(table))
    for name, text in environment.items():
        if not name.startswith(PREFIX) or "__" not in name:
            continue
        *sections, last = name.removeprefix(PREFIX).lower().split("__")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{name}: {section} is no section")
        try:
            place[last] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            place[last] = text  # a bare word needs no quotes
    return result


def _copied(value: object) -> object:
    return {name: _copied(part) for name, part in value.items()} if isinstance(value, Mapping) else value


def _with_sizes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_sizes(part) for name, part in value.items()}
    if isinstance(value, str) and (size := _SIZE.fullmatch(value)):
        return int(float(size[1]) * _UNITS[size[2]])
    return value


def settings_table() -> str:
    """Every setting with its default and what it does, as a Markdown table, from the structs and their docstrings."""
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    _rows(Settings, "", lines)
    return "\n".join(lines) + "\n"


def _rows(struct: type[msgspec.Struct], prefix: str, lines: list[str]) -> None:
    told = _field_texts(struct.__doc__ or "")
    for field in msgspec.structs.fields(struct):
        name = prefix + field.name
        inner = _struct_in(field.type)
        if inner is not None:
            _rows(inner, f"{name}{_MANY.get(get_origin(field.type), '')}.", lines)
            continue
        text = told.get(field.name, "").replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{name}` | {_default(field)} | {text} |")


def _default(field: msgspec.structs.FieldInfo) -> str:
    """A field's default as it would be written in TOML."""
    if field.default is not msgspec.NODEFAULT:
        default = field.default
    elif field.default_factory is not msgspec.NODEFAULT:
        default = field.default_factory()
    else:
        return "(required)"
    if default is None:
        return "(unset)"
    return f"`{_in_toml(default)}`"


def _in_toml(value: object) -> str:
    if isinstance(value, msgspec.Struct):
        value = msgspec.to_builtins(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_in_toml(part)}" for name, part in value.items()) + "}"
    if type(value) is int and value and value % 2**20 == 0:  # only sizes are that round
        return f'"{value // 2**30} GiB"' if value % 2**30 == 0 else f'"{value // 2**20} MiB"'
    return msgspec.json.encode(value).decode()


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    options = [kind, *getattr(kind, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct)), None)


def _field_texts(docstring: str) -> dict[str, str]:
    """``name: text`` and ``name, name: text`` paragraphs under a docstring's first line, continuation lines joined."""
    texts: dict[str, str] = {}
    current: list[str] = []
    for line in inspect.cleandoc(docstring).splitlines()[1:]:  # from 3.13 on they come without indentation
        if start := re.match(r"(\w+(?:, \w+)*): (.*)", line):
            current = start[1].split(", ")
            texts |= dict.fromkeys(current, start[2].strip())
        elif current and line.startswith(" " * 4):
            texts |= {name: f"{texts[name]} {line.strip()}" for name in current}
        else:
            current = []
    return texts
