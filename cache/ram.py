"""The RAM tier: entries in the arena, where other processes read them in place.

Each namespace has a range of the arena to itself, as large as its reservation, which nobody else's entries can take or
fragment. What nobody reserved lies in one range, for all to borrow. All of it runs in the event loop's thread: between
looking and acting nothing else happens.
"""

import asyncio
from collections.abc import Callable, Iterator
from types import TracebackType

import msgspec

from .arena import ALIGN, Arena, Extents, aligned
from .entry import CHUNK, Entry
from .errors import AllPinned, TooLarge, UnknownNamespace
from .interfaces import Clock, EvictionPolicy, Extent, Residency, Spares, Usage
from .keys import Key
from .policy.choice import EvictionSettings
from .policy.shares import Limits, Shares, check_kept, check_shares, default_shares, expendable, limits


class RamSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arena and its division.

    budget: bytes of shared memory, all of them taken at start.
    namespaces: what each namespace has of the budget: its reservation, which is at most 1 for all together, and its
        ceiling, up to where it may borrow. A number alone is both.
    group: the group that may map the arena too, such as the one Triton runs in.
    huge_pages: have the arena in huge pages, which spares those who read it much of the TLB.
    lock: never let the arena be swapped out.
    """

    budget: int
    namespaces: Shares = msgspec.field(default_factory=default_shares)
    group: str | None = None
    huge_pages: bool = False
    lock: bool = False
    eviction: EvictionSettings = EvictionSettings()


class _Resident:
    __slots__ = ("entry", "extent", "last_use", "pins", "uses", "view")

    def __init__(self, entry: Entry, extent: Extent, view: memoryview, now: float) -> None:
        self.entry = entry
        self.extent = extent
        self.view = view
        self.pins = 0
        self.uses = 0
        self.last_use = now


class Pin:
    """An entry that stays where it is until ``release``: ``extent`` says where, ``view`` shows its bytes read-only."""

    __slots__ = ("_held", "_resident")

    def __init__(self, resident: _Resident) -> None:
        self._resident = resident
        self._held = True
        resident.pins += 1

    @property
    def entry(self) -> Entry:
        return self._resident.entry

    @property
    def extent(self) -> Extent:
        return self._resident.extent

    @property
    def view(self) -> memoryview:
        return self._resident.view

    def share(self) -> "Pin":
        """One more pin of the same entry, for another holder. It is no further use of it."""
        return Pin(self._resident)

    def release(self) -> None:
        """Let the entry go. Harmless when repeated."""
        if self._held:
            self._held = False
            self._resident.pins -= 1

    def __enter__(self) -> "Pin":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class RamSpace:
    """Bytes of the arena reserved for an entry that is being made."""

    def __init__(
        self, extent: Extent, view: memoryview, namespace: str, give_back: Callable[["RamSpace"], None]
    ) -> None:
        self.extent = extent
        self.view = view
        self.namespace = namespace
        self._give_back = give_back
        self._open = True

    def release(self) -> None:
        if self.take():
            self._give_back(self)

    def take(self) -> bool:
        """True once: whoever gets it owns the bytes from then on."""
        mine, self._open = self._open, False
        return mine


class _Namespace:
    """What a namespace may have, where it lies, and what it holds."""

    def __init__(self, policy: EvictionPolicy[Key]) -> None:
        self.policy = policy
        self.used = 0
        self.entries = 0
        self.limits = Limits(0, 0)
        self.own = range(0)
        self.ranges: tuple[range, ...] = ()

    def place(self, limits: Limits, own: range, common: range) -> None:
        """Have the range ``own``, and ``common`` to borrow in; as one where they touch, for what spans both."""
        self.limits, self.own = limits, own
        lent = common if limits.ceiling > limits.reservation else range(0)
        touching = own and lent and (own.stop == lent.start or lent.stop == own.start)
        whole = range(min(own.start, lent.start), max(own.stop, lent.stop))
        self.ranges = (own, whole) if touching else tuple(part for part in (own, lent) if part)

    @property
    def largest(self) -> int:
        """The most bytes an entry can have."""
        return min(max(map(len, self.ranges), default=0), self.limits.ceiling)

    def reaches(self, extent: Extent) -> bool:
        """Whether some of it lies where this namespace's entries may lie."""
        return any(extent.offset < part.stop and part.start < extent.offset + extent.nbytes for part in self.ranges)

    def covers(self, extent: Extent) -> bool:
        """Whether all of it does."""
        return any(part.start <= extent.offset and extent.offset + extent.nbytes <= part.stop for part in self.ranges)


class RamTier:
    """Entries in the arena. ``on_evict`` hears what goes and why: ``room`` was needed, it was ``asked`` for,
    or found ``corrupt``.

    What it ``spares`` does not go to make room.

    Raises:
        ConfigError: the shares cannot be.
    """

    name = "ram"

    def __init__(
        self,
        arena: Arena,
        settings: RamSettings,
        clock: Clock,
        on_evict: Callable[[Entry, str], None] | None = None,
    ) -> None:
        self._arena = arena
        self._clock = clock
        self._on_evict = on_evict
        self._eviction = settings.eviction
        self.spares: Spares = lambda key, last_use: False
        self._held: dict[Key, _Resident] = {}
        self._extents = Extents(arena.nbytes)
        self._namespaces: dict[str, _Namespace] = {}
        self._condemned: list[_Resident] = []  # they are pinned, and not in the index any more
        self._misplaced: dict[Key, _Resident] = {}  # they lie where they may not any more, and go once they can
        self.divide(settings.namespaces)

    def divide(self, shares: Shares) -> None:
        """Divide the arena anew. What then lies in another's range goes, as soon as it is not pinned.

        Raises: ConfigError: the shares cannot be, or a namespace is missing that has entries. Nothing is changed then.
        """
        check_shares(shares)
        check_kept(self._namespaces, shares)
        bounds = limits(self._arena.nbytes, shares, ALIGN)
        # what is lent lies beside the two that are named first, so that these can have entries that span both
        start = 0
        lent = self._arena.nbytes - sum(each.reservation for each in bounds.values())
        first, *others = bounds
        common = range(bounds[first].reservation, bounds[first].reservation + lent)
        for name in (first, *others):
            namespace = self._namespaces.setdefault(name, _Namespace(self._eviction.build()))
            namespace.place(bounds[name], range(start, start + bounds[name].reservation), common)
            start = namespace.own.stop if name != first else common.stop
        self._misplaced = {
            key: held for key, held in self._held.items() if not self._namespaces[key.namespace].covers(held.extent)
        }
        self._drop_misplaced()

    def reserve(self, namespace: str, nbytes: int) -> RamSpace:
        """Reserve ``nbytes`` contiguous bytes, evicting what the policy gives up first. Its bytes are not cleared.

        Raises:
            UnknownNamespace: it has no share here.
            TooLarge: more than the namespace may ever have in one piece.
            AllPinned: what is pinned or being made, or reserved by others, leaves no hole that big. Nothing has been
                evicted then.
        """
        mine = self._namespace(namespace)
        if nbytes > mine.largest:
            raise TooLarge(
                f"{nbytes} bytes are more than the {mine.largest} namespace {namespace!r} may have of the arena at once"
            )
        need = max(aligned(nbytes), ALIGN)
        self._drop_misplaced()
        offset = None
        if mine.used + need <= mine.limits.ceiling:
            offset = self._extents.allocate(need, mine.ranges)
        if offset is None:
            self._make_room(namespace, need)
            offset = self._extents.allocate(need, mine.ranges)
        assert offset is not None
        mine.used += need
        extent = Extent(self._arena.path, offset, nbytes)
        return RamSpace(extent, self._arena.view(extent), namespace, self._give_back)

    def admit(self, entry: Entry, space: RamSpace) -> Pin:
        """Make the bytes of ``space`` the entry, pinned for the caller. If its key is held, that one is pinned instead.

        Raises: ValueError if the space was released, or is not of the entry's size and namespace.
        """
        held = self._held.get(entry.key)
        if held is not None:
            space.release()
            return Pin(held)
        if space.extent.nbytes != entry.nbytes or space.namespace != entry.key.namespace:
            raise ValueError("the space is not the entry's: reserve its size in its namespace")
        if not space.take():
            raise ValueError("the space was released")
        now = self._clock.now()
        resident = _Resident(entry, space.extent, space.view.toreadonly(), now)
        self._held[entry.key] = resident
        namespace = self._namespaces[entry.key.namespace]
        namespace.entries += 1
        namespace.policy.admitted(entry.key, entry.nbytes, entry.cost_s, now)
        if not namespace.covers(resident.extent):  # the arena was divided anew meanwhile
            self._misplaced[entry.key] = resident
        return Pin(resident)

    def pin(self, key: Key) -> Pin | None:
        """The entry, pinned for the caller, or None. This is a hit: it counts as a use."""
        resident = self._held.get(key)
        if resident is None:
            return None
        resident.uses += 1
        resident.last_use = now = self._clock.now()
        self._namespaces[key.namespace].policy.used(key, now)
        return Pin(resident)

    def hold(self, key: Key) -> Pin | None:
        """The entry, pinned for the caller, or None. To look at it is no use of it."""
        resident = self._held.get(key)
        return None if resident is None else Pin(resident)

    def condemn(self, key: Key) -> bool:
        """Give the entry to nobody any more; its bytes stay until nobody holds them. False: it is not here."""
        resident = self._held.get(key)
        if resident is None:
            return False
        if resident.pins:
            del self._held[key]
            self._misplaced.pop(key, None)
            namespace = self._namespaces[key.namespace]
            namespace.entries -= 1
            namespace.policy.removed(key)
            self._condemned.append(resident)
        else:
            self._drop(resident, "corrupt")
        return True

    def peek(self, key: Key) -> tuple[Entry, memoryview] | None:
        """The entry and its bytes, which stay as they are until the next await. It does not count as a use."""
        resident = self._held.get(key)
        return None if resident is None else (resident.entry, resident.view)

    def keys(self) -> list[Key]:
        return list(self._held)

    def last_use(self, key: Key) -> float | None:
        """When the entry was last used (Unix seconds); None if it is not here."""
        resident = self._held.get(key)
        return resident.last_use if resident is not None else None

    def lookup(self, key: Key) -> Entry | None:
        resident = self._held.get(key)
        return resident.entry if resident is not None else None

    async def write(self, entry: Entry, payload: memoryview) -> bool:
        """Hold a copy of ``payload``. Raises: UnknownNamespace, or ValueError if it is not ``entry.nbytes`` long."""
        if payload.nbytes != entry.nbytes:
            raise ValueError(f"the payload has {payload.nbytes} bytes, its entry says {entry.nbytes}")
        if entry.key in self._held:
            return True
        try:
            space = self.reserve(entry.key.namespace, entry.nbytes)
        except (AllPinned, TooLarge):
            return False
        try:
            await _copy(payload, space.view)
            self.admit(entry, space).release()
        finally:
            space.release()
        return True

    async def read_into(self, key: Key, out: memoryview) -> Entry:
        """Copy the entry's bytes to ``out``. Raises: KeyError, or ValueError if its length is not ``entry.nbytes``."""
        pin = self.pin(key)
        if pin is None:
            raise KeyError(key)
        with pin:
            if out.nbytes != pin.entry.nbytes:
                raise ValueError(f"{out.nbytes} bytes cannot take the {pin.entry.nbytes} of the entry")
            await _copy(pin.view, out)
            return pin.entry

    def evict(self, key: Key) -> bool:
        resident = self._held.get(key)
        if resident is None or resident.pins:
            return False
        self._drop(resident, "asked")
        return True

    def residents(self) -> Iterator[Residency]:
        for key, held in list(self._held.items()):
            yield Residency(key, self.name, held.entry.nbytes, held.last_use, held.uses, held.pins)

    def usage(self, namespace: str | None = None) -> Usage:
        """Bytes taken, in whole pages, those being made included. Raises: UnknownNamespace."""
        if namespace is None:
            return Usage(self._extents.nbytes - self._extents.free_bytes, self._extents.nbytes, len(self._held))
        mine = self._namespace(namespace)
        return Usage(mine.used, mine.limits.ceiling, mine.entries, mine.limits.reservation)

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(self._namespaces)

    @property
    def utilisation(self) -> float:
        """The part of the arena that is taken."""
        return 1 - self._extents.free_bytes / self._extents.nbytes

    @property
    def fragmentation(self) -> float:
        """The part of the free bytes that is not in the largest hole."""
        free = self._extents.free_bytes
        return 1 - self._extents.largest_hole / free if free else 0.0

    def _namespace(self, name: str) -> _Namespace:
        try:
            return self._namespaces[name]
        except KeyError:
            raise UnknownNamespace(f"namespace {name!r} has no share of the arena") from None

    def _make_room(self, name: str, need: int) -> None:
        """Evict so that ``need`` bytes fit. Raises: AllPinned; nothing has been evicted then."""
        mine = self._namespaces[name]
        seen: dict[int, _Resident] = {}

        def offsets() -> Iterator[int]:
            for resident in expendable(
                {each: namespace.used for each, namespace in self._namespaces.items()},
                {each: namespace.limits for each, namespace in self._namespaces.items()},
                {each: self._expendable(namespace, mine) for each, namespace in self._namespaces.items()},
                lambda resident: _taken(resident.extent),
                name,
                need,
            ):
                seen[resident.extent.offset] = resident
                yield resident.extent.offset

        window = self._extents.to_free(need, offsets(), mine.ranges)
        going = None if window is None else [seen[offset] for offset in window]
        if going is not None:
            given = sum(_taken(resident.extent) for resident in going if resident.entry.key.namespace == name)
            excess = mine.used + need - given - mine.limits.ceiling
            for resident in self._expendable(mine, mine):
                if excess <= 0:
                    break
                if resident not in going:
                    going.append(resident)
                    excess -= _taken(resident.extent)
            if excess > 0:
                going = None
        if going is None:
            raise AllPinned(f"no {need} bytes of namespace {name!r} can be freed while its entries are in use")
        for resident in going:
            self._drop(resident, "room")

    def _expendable(self, namespace: _Namespace, taker: _Namespace) -> Iterator[_Resident]:
        """What ``namespace`` holds that may go and that lies where ``taker`` may use it, the first to go first."""
        for key in namespace.policy.victims():
            resident = self._held[key]
            spared = resident.pins or self.spares(key, resident.last_use)
            if not spared and (namespace is taker or taker.reaches(resident.extent)):
                yield resident

    def _drop(self, resident: _Resident, reason: str) -> None:
        key = resident.entry.key
        del self._held[key]
        self._misplaced.pop(key, None)
        namespace = self._namespaces[key.namespace]
        (namespace.policy.evicted if reason == "room" else namespace.policy.removed)(key)
        namespace.entries -= 1
        namespace.used -= _taken(resident.extent)
        self._extents.free(resident.extent.offset)
        if self._on_evict is not None:
            self._on_evict(resident.entry, reason)

    def _drop_misplaced(self) -> None:
        for resident in [each for each in self._condemned if not each.pins]:
            self._condemned.remove(resident)
            self._namespaces[resident.entry.key.namespace].used -= _taken(resident.extent)
            self._extents.free(resident.extent.offset)
            if self._on_evict is not None:
                self._on_evict(resident.entry, "corrupt")
        for resident in [each for each in self._misplaced.values() if not each.pins]:
            self._drop(resident, "room")

    def _give_back(self, space: RamSpace) -> None:
        self._extents.free(space.extent.offset)
        self._namespaces[space.namespace].used -= _taken(space.extent)


def _taken(extent: Extent) -> int:
    return max(aligned(extent.nbytes), ALIGN)


async def _copy(source: memoryview, target: memoryview) -> None:
    """Copy a chunk at a time, letting the loop serve others in between. Cancelled, it touches ``target`` no more."""
    for start in range(0, source.nbytes, CHUNK):
        target[start : start + CHUNK] = source[start : start + CHUNK]
        await asyncio.sleep(0)
