"""What is kept however full it gets, and what goes before its room is needed: pins and rules, decided without I/O."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec

from cache.catalog import Catalog
from cache.errors import ConfigError, NotFound, OverQuota
from cache.interfaces import Clock, Observer
from cache.keys import Key, SeriesRef
from cache.store import Store

from . import durable
from .audit import DAEMON, SILENT, Agent, Auditor
from .audit.record import DROP, PIN, UNPIN
from .log import log_failure, logger

_DAY: Final = 86400.0
_Days = Annotated[float, msgspec.Meta(ge=0)]


class RetentionRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What becomes of entries that meet all of its conditions; a rule without conditions meets all that are not pinned.

    name: what the log calls it.
    modality: one of these.
    namespace: one of these.
    tag: a pin with one of these tags; a rule without it meets nothing that is pinned.
    keep: they stay, however old; no later rule is asked.
    max_age_days: they go so many days after they were made; 0 for never.
    max_idle_days: they go so many days after they were last used; 0 for never.
    """

    name: str
    modality: tuple[str, ...] = ()
    namespace: tuple[str, ...] = ()
    tag: tuple[str, ...] = ()
    keep: bool = False
    max_age_days: _Days = 0.0
    max_idle_days: _Days = 0.0


class RetentionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept, and for how long.

    rules: the first one that an entry meets decides; what meets none stays until its room is needed.
    sweep_s: seconds between two looks at all entries.
    quota: the part of each namespace's NVMe budget that pins may hold.
    """

    rules: tuple[RetentionRule, ...] = ()
    sweep_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    quota: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25


class Pin(msgspec.Struct, frozen=True):
    """Somebody's wish to keep a study, or one series of it: since and until when (Unix seconds), as what, and why."""

    study: str
    series: str = ""
    tag: str = ""
    reason: str = ""
    since: float = 0.0
    expires: float | None = None

    def holds(self, key: Key) -> bool:
        return key.study == self.study and self.series in ("", key.series)


class Held(msgspec.Struct, frozen=True):
    """An entry, in whatever tiers, as far as retention looks at it."""

    key: Key
    made_at: float
    last_use: float
    modality: str


class Verdict(msgspec.Struct, frozen=True):
    """What is to become of an entry, by which rule ("" for none), and why."""

    key: Key
    keep: bool
    rule: str
    why: str


class _File(msgspec.Struct, frozen=True):
    """The file of pins."""

    voxcache_pins: int
    pins: tuple[Pin, ...]


def decide(entry: Held, pins: Sequence[Pin], rules: Sequence[RetentionRule], now: float) -> Verdict:
    """What is to become of ``entry`` at ``now``, under the ``pins`` that hold it. Pure."""
    tags = {pin.tag for pin in pins}
    for rule in rules:
        if rule.modality and entry.modality not in rule.modality:
            continue
        if rule.namespace and entry.key.namespace not in rule.namespace:
            continue
        if tags.isdisjoint(rule.tag) if rule.tag else bool(pins):
            continue
        age, idle = now - entry.made_at, now - entry.last_use
        if rule.keep:
            return Verdict(entry.key, True, rule.name, "kept by its rule")
        if rule.max_age_days and age > rule.max_age_days * _DAY:
            return Verdict(entry.key, False, rule.name, f"made {age / _DAY:.1f} days ago")
        if rule.max_idle_days and idle > rule.max_idle_days * _DAY:
            return Verdict(entry.key, False, rule.name, f"last used {idle / _DAY:.1f} days ago")
        return Verdict(entry.key, True, rule.name, "its time has not come")
    return Verdict(entry.key, True, "", "pinned" if pins else "no rule meets it")


def beyond_quota(pins: Iterable[Pin], held: Sequence[tuple[Key, int]], quota: Mapping[str, int]) -> set[Key]:
    """Entries that pins do not protect, since earlier ones hold their namespace's ``quota`` of bytes already. Pure.

    ``held``: entries and their bytes.
    """
    left = dict(quota)
    seen: set[Key] = set()
    beyond: set[Key] = set()
    for pin in sorted(pins, key=lambda pin: (pin.since, pin.study, pin.series, pin.tag)):
        for key, nbytes in held:
            if pin.holds(key) and key not in seen:
                seen.add(key)
                if nbytes <= left.get(key.namespace, 0):
                    left[key.namespace] -= nbytes
                else:
                    beyond.add(key)
    return beyond


class Retention:
    """Pins, in a file that outlives the daemon, and the sweep."""

    def __init__(
        self,
        *,
        settings: RetentionSettings,
        path: Path,
        store: Store,
        catalog: Catalog,
        budgets: Callable[[], Mapping[str, int]],
        clock: Clock,
        observer: Observer,
        audit: Auditor = SILENT,
    ) -> None:
        """``budgets``: bytes of NVMe by namespace. Raises: ConfigError: the file of pins cannot be read."""
        self._settings = settings
        self._path = path
        self._store = store
        self._catalog = catalog
        self._budgets = budgets
        self._clock = clock
        self._observer = observer
        self._audit = audit
        self._pins = _read(path)
        self._beyond: set[Key] = set()
        self._changing = asyncio.Lock()
        store.keep_what(self.keeps)

    async def run(self) -> None:
        """Sweep again and again."""
        while True:
            try:
                await self.sweep()
            except Exception as error:
                log_failure("a retention sweep ended early", error)
            await asyncio.sleep(self._settings.sweep_s)

    def keeps(self, key: Key) -> bool:
        """Whether a pin protects the entry from having to make room."""
        return key not in self._beyond and any(pin.holds(key) for pin in self._pins)

    def pins(self, study: str = "") -> list[Pin]:
        """All pins, or those of a study, as they were made."""
        now = self._clock.now()
        return [pin for pin in self._pins if study in ("", pin.study) and not _expired(pin, now)]

    def pinned_bytes(self) -> dict[str, int]:
        """Bytes that pins hold on NVMe, by namespace."""
        found = dict.fromkeys(self._budgets(), 0)
        for resident in self._store.residents():
            if resident.tier == "nvme" and self.keeps(resident.key):
                found[resident.key.namespace] += resident.nbytes
        return found

    async def pin(self, pin: Pin, who: Agent = DAEMON) -> None:
        """Keep what ``pin`` names; one of the same study, series and tag is replaced. Durable when this returns.

        Raises: OverQuota: its entries and those pinned already are more than retention.quota allows.
        """

        def pinned(before: tuple[Pin, ...]) -> tuple[Pin, ...]:
            after = (*(other for other in before if not _same(other, pin)), pin)
            if any(pin.holds(key) for key in self._over(after)):
                raise OverQuota(f"study {pin.study} and what is pinned already are more than retention.quota allows")
            return after

        await self._change(pinned)
        self._audit.note(PIN, who, SeriesRef(pin.study, pin.series), details=_tagged(pin.tag))
        logger().info("pinned", study=pin.study, series=pin.series, tag=pin.tag, expires=pin.expires)

    async def unpin(self, study: str, series: str, tag: str, who: Agent = DAEMON) -> None:
        """Let go of one pin. Raises: NotFound."""

        def unpinned(before: tuple[Pin, ...]) -> tuple[Pin, ...]:
            after = tuple(other for other in before if not _same(other, Pin(study, series, tag)))
            if len(after) == len(before):
                raise NotFound(f"study {study} has no such pin")
            return after

        await self._change(unpinned)
        self._audit.note(UNPIN, who, SeriesRef(study, series), details=_tagged(tag))
        logger().info("unpinned", study=study, series=series, tag=tag)

    async def sweep(self) -> list[Verdict]:
        """Forget pins whose time is over, decide on every entry, and drop what has to go and nobody holds."""
        now = self._clock.now()
        for pin in self._pins:
            if _expired(pin, now):
                self._audit.note(UNPIN, DAEMON, SeriesRef(pin.study, pin.series), details=_tagged(pin.tag))
                logger().info("pin expired", study=pin.study, series=pin.series, tag=pin.tag)
        await self._change(lambda before: tuple(pin for pin in before if not _expired(pin, now)))
        verdicts = []
        for number, entry in enumerate(self._held() if self._settings.rules else ()):
            pins = [pin for pin in self._pins if pin.holds(entry.key)]
            verdict = decide(entry, pins, self._settings.rules, now)
            verdicts.append(verdict)
            self._carry_out(verdict)
            if number % 256 == 255:
                await asyncio.sleep(0)  # the loop serves hits meanwhile
        return verdicts

    # ------------------------------------------------------------------ within

    def _carry_out(self, verdict: Verdict) -> None:
        entry = None if verdict.keep else self._store.entry(verdict.key)
        gone = entry is not None and self._store.drop(verdict.key)
        if gone:
            self._audit.note(DROP, DAEMON, entry, details=(("rule", verdict.rule),))
            self._observer.count("retention_drops", (verdict.rule,))
        log = logger().debug if verdict.keep else logger().info
        log(
            "retention",
            study=verdict.key.study,
            series=verdict.key.series,
            kind=verdict.key.kind,
            etag=verdict.key.digest,
            rule=verdict.rule,
            outcome="kept" if verdict.keep else "dropped" if gone else "held",
            why=verdict.why,
        )

    def _held(self) -> Iterator[Held]:
        """Every entry, once, by its latest use in any tier."""
        last_use: dict[Key, float] = {}
        for resident in self._store.residents():
            last_use[resident.key] = max(last_use.get(resident.key, 0.0), resident.last_use)
        by_modality = any(rule.modality for rule in self._settings.rules)
        for key, used in last_use.items():
            if (entry := self._store.entry(key)) is not None:
                known = self._catalog.described(key.ref) if by_modality else None
                modality = known.attributes.modality if known is not None and known.attributes is not None else ""
                made_at = entry.lineage.made_at
                yield Held(key, made_at, max(made_at, used), modality)

    def _over(self, pins: tuple[Pin, ...]) -> set[Key]:
        """What is beyond the quota with these pins."""
        if not pins:
            return set()
        quota = {namespace: int(budget * self._settings.quota) for namespace, budget in self._budgets().items()}
        on_nvme = [(each.key, each.nbytes) for each in self._store.residents() if each.tier == "nvme"]
        return beyond_quota(pins, on_nvme, quota)

    async def _change(self, change: Callable[[tuple[Pin, ...]], tuple[Pin, ...]]) -> None:
        """Have the pins become what ``change`` makes of them, on disk before it counts; one change after another."""
        async with self._changing:
            after = change(self._pins)
            if after != self._pins:
                await asyncio.to_thread(durable.write, self._path, msgspec.json.encode(_File(1, after)))
            self._pins = after
            self._beyond = self._over(after)


def _tagged(tag: str) -> tuple[tuple[str, str], ...]:
    return (("tag", tag),) if tag else ()


def _same(one: Pin, other: Pin) -> bool:
    return (one.study, one.series, one.tag) == (other.study, other.series, other.tag)


def _expired(pin: Pin, now: float) -> bool:
    return pin.expires is not None and pin.expires <= now


def _read(path: Path) -> tuple[Pin, ...]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File).pins
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        # to go on without them would let go what somebody has to keep
        raise ConfigError(f"the pins in {path} cannot be read: {error}; restore the file, or remove it") from error
