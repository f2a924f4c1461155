"""The ledger: which entries there are, what they and all else take of the budget, and what goes to make room.

It counts bytes of disk, and decides: what has to be removed for a decision is returned, for the folder to remove.
"""

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from cache.arena import aligned
from cache.entry import Entry
from cache.errors import AllPinned, TooLarge, UnknownNamespace
from cache.interfaces import EvictionPolicy, Spares, Usage
from cache.keys import Key
from cache.policy.choice import EvictionSettings
from cache.policy.shares import Limits, Shares, check_kept, check_shares, expendable, limits

from .folder import File
from .head import head_nbytes
from .journal import Note
from .reads import Job

#: Room for what a new name may add to its folders: one split of a directory's index, in each of two.
_NAMES: Final = 16 << 10
#: Room for the file that a probe of the disk writes.
_PROBE: Final = 8 << 10
#: So few that their folder never outgrows its first block.
_MOST_QUARANTINED: Final = 16


class Resident:
    """An entry that is here. ``allocated``: bytes of disk; ``last_use``: Unix seconds; ``pins``: who is at its file."""

    __slots__ = ("allocated", "entry", "head", "identity", "last_use", "path", "pins", "sums", "uses")

    def __init__(self, entry: Entry, sums: str, file: File) -> None:
        self.entry = _sharing(entry)
        self.sums = sums.encode()
        self.head = head_nbytes(entry.nbytes)
        self.path = file.path
        self.identity = file.identity
        self.allocated = file.identity.allocated
        self.last_use = file.used_at
        self.uses = 0
        self.pins = 0

    @property
    def chunks(self) -> int:
        return len(self.sums) // 16

    @property
    def note(self) -> Note:
        return Note(self.path.name, self.identity, self.entry, self.sums.decode())

    def job(self, chunks: Iterable[int]) -> Job:
        """What reads these chunks."""
        sums = {chunk: self.sums[16 * chunk : 16 * chunk + 16].decode() for chunk in chunks}
        return Job(self.path, self.head, sums, self.last_use)


class Ledger:
    """Bytes of disk of ``budget``: those of the entries, by namespace, and those of what is kept beside them.

    ``around`` tells what else takes some now, folders and notes. ``on_evict`` hears what goes and why; what the ledger
    ``spares`` does not go to make room.

    ``held``: the entries, by key. ``quarantined``: files set aside, oldest first, and their bytes; ``strays``: those of
    another format, the first to go; ``foreign``: files of others among the entries; ``reserved``: bytes of these and of
    what lies beside the entries.
    """

    def __init__(
        self,
        budget: int,
        shares: Shares,
        eviction: EvictionSettings,
        *,
        quarantine: float,
        reserved: int,
        around: Callable[[], int],
        on_evict: Callable[[Entry, str], None] | None,
    ) -> None:
        """Raises: ConfigError: the shares cannot be."""
        check_shares(shares)
        self._budget = budget
        self._shares = shares
        self._eviction = eviction
        self._around = around
        self._on_evict = on_evict
        self.spares: Spares = lambda key, last_use: False
        self._policies: dict[str, EvictionPolicy[Key]] = {namespace: eviction.build() for namespace in shares}
        self._used = dict.fromkeys(shares, 0)
        self._entries: Counter[str] = Counter()  # of those held, by namespace
        self.held: dict[Key, Resident] = {}
        self.quarantined: OrderedDict[Path, int] = OrderedDict()
        self.quarantine_bytes: Final = int(budget * quarantine)
        self.strays: OrderedDict[Path, int] = OrderedDict()
        self.foreign: frozenset[Path] = frozenset()
        self.reserved = reserved

    # -- what there is

    def holds(self, resident: Resident) -> bool:
        """Whether this very one is still here."""
        return self.held.get(resident.entry.key) is resident

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(self._shares)

    def usage(self, namespace: str | None = None) -> Usage:
        """Bytes of a namespace's entries and spaces, or of all. Raises: UnknownNamespace."""
        if namespace is None:
            return Usage(self.total(), self._budget, len(self.held))
        mine = self.limits_of(namespace)
        return Usage(self._used[namespace], mine.ceiling, self._entries[namespace], mine.reservation)

    def limits_of(self, namespace: str) -> Limits:
        """Raises: UnknownNamespace."""
        try:
            return self._limits()[namespace]
        except KeyError:
            raise UnknownNamespace(f"namespace {namespace!r} has no share of the NVMe tier") from None

    def room(self) -> int:
        """Bytes that entries and spaces may take together."""
        return self._budget - self.reserved - self.quarantine_bytes - self._around() - _NAMES - _PROBE

    def total(self) -> int:
        """Bytes that all of it takes."""
        kept = sum(self.quarantined.values()) + sum(self.strays.values())
        return sum(self._used.values()) + kept + self.reserved + self._around()

    def _limits(self) -> dict[str, Limits]:
        return limits(max(self.room(), 0), self._shares)

    # -- what comes

    def take(self, namespace: str, nbytes: int) -> None:
        """Charge a namespace, for a file that is being made."""
        self._used[namespace] += nbytes

    def give_back(self, namespace: str, nbytes: int) -> None:
        self._used[namespace] -= nbytes

    def admit(self, resident: Resident) -> None:
        key = resident.entry.key
        self.held[key] = resident
        self._entries[key.namespace] += 1
        self._used[key.namespace] += resident.allocated
        self._policies[key.namespace].admitted(key, resident.allocated, resident.entry.cost_s, resident.last_use)

    def restore(self, residents: Iterable[Resident]) -> None:
        """Take over what is there at the start, in namespaces that are known."""
        self.held.update((resident.entry.key, resident) for resident in residents)
        read: dict[str, list[tuple[Key, int, float, float]]] = {namespace: [] for namespace in self._policies}
        for resident in sorted(self.held.values(), key=lambda resident: resident.last_use):
            key, entry = resident.entry.key, resident.entry
            self._entries[key.namespace] += 1
            self._used[key.namespace] += resident.allocated
            read[key.namespace].append((key, resident.allocated, entry.cost_s, resident.last_use))
        for namespace, entries in read.items():
            self._policies[namespace].restored(entries)

    def used(self, resident: Resident, now: float) -> None:
        """It was read."""
        resident.uses += 1
        resident.last_use = now
        self._policies[resident.entry.key.namespace].used(resident.entry.key, now)

    def correct(self, resident: Resident, nbytes: int) -> None:
        """It takes ``nbytes`` of disk, as was found."""
        if self.holds(resident):
            self._used[resident.entry.key.namespace] += nbytes - resident.allocated
            resident.allocated = nbytes

    # -- what goes

    def drop(self, resident: Resident, reason: str) -> None:
        key = resident.entry.key
        del self.held[key]
        self._entries[key.namespace] -= 1
        self._used[key.namespace] -= resident.allocated
        policy = self._policies[key.namespace]
        (policy.evicted if reason == "room" else policy.removed)(key)
        if self._on_evict is not None:
            self._on_evict(resident.entry, reason)

    def divide(self, shares: Shares) -> list[Path]:
        """Divide the budget anew; the files to remove of what is then above its share, unless it is being read.

        Raises: ConfigError: the shares cannot be, or a namespace is missing that is there now. Nothing is changed then.
        """
        check_shares(shares)
        check_kept(self._shares, shares)
        self._shares = shares
        for namespace in shares.keys() - self._used.keys():
            self._used[namespace] = 0
            self._policies[namespace] = self._eviction.build()
        return self.make_room(None, 0)

    def make_room(self, namespace: str | None, need: int) -> list[Path]:
        """Drop what has to go so that ``namespace`` may take ``need`` bytes more; its files, which are to be removed.

        Without a namespace, so that all are within their limits. These shrink by a little as folders grow, hence a look
        at all of them.

        Raises: TooLarge, AllPinned; nothing has been dropped then.
        """
        bounds, room = self._limits(), self.room()
        after = dict(self._used)
        if namespace is not None:
            after[namespace] += need
            if need > bounds[namespace].ceiling:
                raise TooLarge(
                    f"{need} bytes are more than the {bounds[namespace].ceiling} namespace {namespace!r} "
                    "may have of the NVMe tier"
                )

        going: list[Resident] = []
        victims = {each: self._expendable(each) for each in bounds}

        def give(resident: Resident) -> None:
            going.append(resident)
            after[resident.entry.key.namespace] -= resident.allocated

        def short() -> bool:
            # what others have reserved and do not use is no room, but for what is reserved too
            within = namespace is not None and after[namespace] <= bounds[namespace].reservation
            kept = (after[each] if within else max(after[each], bound.reservation) for each, bound in bounds.items())
            return sum(kept) > room

        for each in bounds if namespace is None else (namespace,):
            while after[each] > bounds[each].ceiling and (resident := next(victims[each], None)) is not None:
                give(resident)
        giving = expendable(dict(after), bounds, victims, lambda resident: resident.allocated, namespace)
        while short() and (resident := next(giving, None)) is not None:
            give(resident)
        if namespace is not None and (after[namespace] > bounds[namespace].ceiling or short()):
            raise AllPinned(f"no {need} bytes of namespace {namespace!r} can be freed while its entries are in use")
        gone: list[Path] = []
        while self.strays and sum(after.values()) + sum(self.strays.values()) > room:
            gone.append(self.strays.popitem(last=False)[0])
        for resident in going:
            self.drop(resident, "room")
            gone.append(resident.path)
        return gone

    def _expendable(self, namespace: str) -> Iterator[Resident]:
        for key in self._policies[namespace].victims():
            resident = self.held[key]
            if not resident.pins and not self.spares(key, resident.last_use):
                yield resident

    def trim_quarantine(self, need: int) -> list[Path]:
        """The oldest files that were set aside, to be removed, so that ``need`` bytes more can be."""
        most = _MOST_QUARANTINED - (need > 0)
        gone: list[Path] = []
        while self.quarantined and (
            sum(self.quarantined.values()) + need > self.quarantine_bytes or len(self.quarantined) > most
        ):
            gone.append(self.quarantined.popitem(last=False)[0])
        return gone


def charge(size: int) -> int:
    """The most disk a file of ``size`` bytes may take while it is made, with what its names add to the folders.

    Beyond its own blocks: those that map it, one for every 4 MiB if the disk is as fragmented as that.
    """
    return aligned(size) + 4096 * (2 + (size >> 22)) + _NAMES


def _sharing(entry: Entry) -> Entry:
    """The entry, its long texts, which many entries have in common, being one in memory."""
    lineage = entry.lineage
    for field in ("recipe", "software"):
        msgspec.structs.force_setattr(lineage, field, sys.intern(getattr(lineage, field)))
    return entry
