"""The tier over the folder: what to hold is decided in the event loop, and done by threads.

Space is charged before its file is created, at the most it may take, and freed when its removal is decided. The folder
keeps that order, so an observer never sees more than the budget. Payloads are moved by threads of their own, so that
reading and evicting never wait for a slow write.
"""

import asyncio
import contextlib
import errno
import gc
import itertools
import math
import mmap
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cache.arena import ALIGN
from cache.entry import CHUNK, Entry, checksum
from cache.errors import (
    AllPinned,
    ConfigError,
    CorruptEntry,
    DiskFailing,
    Refused,
)
from cache.interfaces import Clock, Extent, Residency, Spares, Usage
from cache.keys import Key, Kind
from cache.policy.choice import EvictionSettings
from cache.policy.shares import Shares, default_shares

from .disk import Disk, opened, page_aligned
from .folder import File, Folder, examine, read_head
from .head import LEAST, BadHead, Head, OtherFormat, encode, head_nbytes
from .health import HealthSettings, State
from .journal import Journal, Note
from .ledger import Ledger, Resident, charge
from .reads import Reads, read_chunk
from .watch import Told, Watch

T = TypeVar("T")


class NvmeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The folder and its budget.

    path: the folder; the daemon owns what is in it.
    budget: bytes of disk that everything under it may take, folders, temporaries and catalogue included.
    namespaces: what each namespace has of what is left for entries, as in ram.
    threads: reads at a time, of at most 4 MiB each, and as many writes.
    direct: move payloads by direct I/O where the filesystem can.
    quarantine: the share of the budget for files that failed their checksum, kept for a look at why.
    scrub: bytes a second that are verified while nothing is read; 0 for none.
    journal: bytes of the budget, but at most a fiftieth of it, for notes of what there is: they make a start fast.
    """

    path: str
    budget: int
    namespaces: Shares = msgspec.field(default_factory=default_shares)
    threads: int = 2
    direct: bool = True
    quarantine: float = 0.02
    journal: int = 128 << 20
    scrub: int = 16 << 20
    eviction: EvictionSettings = EvictionSettings()
    health: HealthSettings = HealthSettings()


class Report(msgspec.Struct, frozen=True):
    """What ``check`` found. ``ledger`` and ``on_disk`` are bytes; ``repaired`` counts the problems dealt with."""

    entries: int
    ledger: int
    on_disk: int
    budget: int
    problems: tuple[str, ...]
    repaired: int

    @property
    def well(self) -> bool:
        """Nothing is wrong that was not repaired."""
        return len(self.problems) == self.repaired


class NvmeSpace:
    """A file, allocated in full, for an entry that is being made: other processes map ``extent`` and fill it."""

    def __init__(self, tier: "NvmeTier", namespace: str, path: Path, nbytes: int, charge: int) -> None:
        self.extent = Extent(str(path), head_nbytes(nbytes), nbytes)
        self.namespace = namespace
        self.charge = charge
        self._tier = tier
        self._view: memoryview | None = None
        self.open = True

    @property
    def view(self) -> memoryview:
        if self._view is None:
            nbytes = self.extent.nbytes
            fd = os.open(self.extent.path, os.O_RDWR)
            try:
                self._view = memoryview(mmap.mmap(fd, nbytes, offset=self.extent.offset) if nbytes else bytearray())
            finally:
                os.close(fd)
        return self._view

    def release(self) -> None:
        self._tier._release(self)


class Payload:
    """An entry's bytes, read as they are asked for; the entry stays until ``release``."""

    def __init__(self, tier: "NvmeTier", resident: Resident) -> None:
        self.entry = resident.entry
        self._tier = tier
        self._resident = resident
        self._held = True
        resident.pins += 1

    async def chunks(self, start: int = 0, stop: int | None = None) -> AsyncIterator[memoryview]:
        """The bytes ``[start, stop)``, at most CHUNK at a time, each verified before it is given out.

        Raises:
            CorruptEntry: a chunk fails its checksum; the entry is gone, and what was given out before is right.
            ValueError: the range is not within the payload.
        """
        stop = self.entry.nbytes if stop is None else stop
        if not 0 <= start <= stop <= self.entry.nbytes:
            raise ValueError(f"[{start}, {stop}) is not within {self.entry.nbytes} bytes")
        if start == stop:
            return
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            base = chunk * CHUNK
            buffer = page_aligned(min(CHUNK, self.entry.nbytes - base))
            await self._tier._read(self._resident, buffer, [chunk])
            yield buffer[max(start - base, 0) : stop - base]

    def share(self) -> "Payload":
        """One more reader of the same entry, for another holder."""
        return Payload(self._tier, self._resident)

    def release(self) -> None:
        """Let the entry go. Harmless when repeated."""
        if self._held:
            self._held = False
            self._resident.pins -= 1


class NvmeTier:
    """Entries as files. ``on_evict`` hears what goes and why: ``room``, ``asked``, or ``corrupt``.

    ``failed_writes`` counts writes the disk refused; ``corrupted`` entries that failed their checksum.
    """

    name = "nvme"

    def __init__(
        self,
        settings: NvmeSettings,
        clock: Clock,
        *,
        on_evict: Callable[[Entry, str], None] | None,
        reserved_bytes: int,
        disk: Disk | None,
        on_health: Told | None,
    ) -> None:
        """Use ``open``."""
        if not 0 <= settings.quarantine < 1 or settings.threads < 1 or settings.scrub < 0:
            raise ConfigError("nvme: quarantine must be a share below 1, threads at least 1, and scrub not below 0")
        settings.health.check()
        self._settings = settings
        self._clock = clock
        self._disk = disk or Disk(direct=settings.direct)
        self._folder = Folder(Path(settings.path), self._disk)
        self._journal = Journal(self._folder.root / "journal", min(settings.journal, settings.budget // 50))
        self._reading = Watch("read", settings.health, clock, self._probe_read, on_health)
        self._writing = Watch("write", settings.health, clock, self._probe_write, on_health)
        self._reads = Reads(self._disk, settings.threads, self._reading, clock)
        self._write_turns = asyncio.Semaphore(settings.threads)
        self._lookers = ThreadPoolExecutor(settings.threads, "voxcache-nvme-look")
        self._writers = ThreadPoolExecutor(settings.threads, "voxcache-nvme-write")
        self._numbers = itertools.count()
        self._ledger = Ledger(
            settings.budget,
            settings.namespaces,
            settings.eviction,
            quarantine=settings.quarantine,
            reserved=reserved_bytes,
            around=lambda: self._journal.nbytes + self._folder.own + self._folder.stuck,
            on_evict=on_evict,
        )
        self._spaces: dict[str, NvmeSpace] = {}
        self._landing: dict[Key, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.failed_writes = 0
        self.corrupted = 0

    @classmethod
    async def open(
        cls,
        settings: NvmeSettings,
        clock: Clock,
        *,
        on_evict: Callable[[Entry, str], None] | None = None,
        reserved_bytes: int = 0,
        disk: Disk | None = None,
        on_health: Told | None = None,
    ) -> "NvmeTier":
        """Take over the folder: wipe temporaries, read every head, quarantine what is broken, evict to the budget.

        ``reserved_bytes`` of the budget are for what else lies in the folder: the catalogue. ``disk`` is another one
        than the machine's, such as one that fails on purpose; ``on_health`` hears each change of the disk's state.
        Files of other formats are left alone until their room is needed; foreign files are counted, never touched.

        Raises:
            ConfigError: settings that cannot work, a folder that cannot be used, or one in use by another daemon.
        """
        tier = cls(
            settings,
            clock,
            on_evict=on_evict,
            reserved_bytes=reserved_bytes,
            disk=disk,
            on_health=on_health,
        )
        try:
            with _uncollected():
                await tier._whole(tier._recover())
        except OSError as error:
            await tier.close()
            raise ConfigError(f"{settings.path} cannot be used as a cache: {error.strerror or error}") from error
        except BaseException:
            await tier.close()
            raise
        return tier

    # -- looking and reading

    def lookup(self, key: Key) -> Entry | None:
        resident = self._ledger.held.get(key)
        return resident.entry if resident is not None else None

    async def read_into(self, key: Key, out: memoryview, freed: Callable[[], None] | None = None) -> Entry:
        """Copy the verified payload to ``out``.

        Without ``freed`` this waits for the disk, however long that takes, and ``out`` is not touched after it returns
        or raises. With it, a read that is late is left behind, and nothing is read from a disk that fails: if this
        raises, cancellation included, ``freed`` is called once ``out`` is touched no more, then or later.

        Raises:
            KeyError: it is not here.
            CorruptEntry: it cannot be read, or fails its checksum; it is gone now.
            DiskFailing: the disk is late, or is left alone; the entry stays.
            ValueError: ``out`` is not ``entry.nbytes`` long.
        """
        try:
            resident = self._ledger.held[key]
            if out.nbytes != resident.entry.nbytes:
                raise ValueError(f"{out.nbytes} bytes cannot take the {resident.entry.nbytes} of the entry")
        except BaseException:
            if freed is not None:
                freed()
            raise
        self._ledger.used(resident, self._clock.now())
        await self._read(resident, out.cast("B"), range(resident.chunks), freed)
        return resident.entry

    def open_payload(self, key: Key) -> Payload:
        """The entry, pinned, to be read in parts. Raises: KeyError."""
        resident = self._ledger.held[key]
        self._ledger.used(resident, self._clock.now())
        return Payload(self, resident)

    def hold(self, key: Key) -> Payload | None:
        """The same, or None: to look at it is no use of it."""
        resident = self._ledger.held.get(key)
        return None if resident is None else Payload(self, resident)

    def keys(self) -> list[Key]:
        return list(self._ledger.held)

    def residents(self) -> Iterator[Residency]:
        for key, held in list(self._ledger.held.items()):
            yield Residency(key, self.name, held.entry.nbytes, held.last_use, held.uses, held.pins)

    def usage(self, namespace: str | None = None) -> Usage:
        """Bytes of disk, reserved ones included; of the whole tier with all that is in its folder.

        Raises: UnknownNamespace.
        """
        return self._ledger.usage(namespace)

    @property
    def spares(self) -> Spares:
        """What does not go to make room."""
        return self._ledger.spares

    @spares.setter
    def spares(self, spares: Spares) -> None:
        self._ledger.spares = spares

    @property
    def namespaces(self) -> tuple[str, ...]:
        return self._ledger.namespaces

    @property
    def health(self) -> dict[str, State]:
        """The state of the disk's reads and of its writes."""
        return {"read": self._reading.state, "write": self._writing.state}

    @property
    def takes_writes(self) -> bool:
        """Whether what is written would be taken: False while the disk is left alone."""
        return self._writing.admits

    def allowed_s(self, nbytes: int) -> float:
        """Seconds that a file of ``nbytes`` may take to be made: a deadline for each chunk, and two for its names."""
        return self._writing.deadline_s * (2 + -(-nbytes // CHUNK))

    async def awaited(self, writing: "asyncio.Future[Any]", nbytes: int) -> bool:
        """Wait for a file of ``nbytes`` that is on its way, as long as it may take; False if it takes longer."""
        return await self._in_time(writing, self.allowed_s(nbytes))

    # -- writing

    async def write(self, entry: Entry, payload: memoryview) -> bool:
        """Hold a copy of ``payload``; False if there is no room, or the disk refuses it or is left alone.

        Raises: UnknownNamespace, or ValueError if it is not ``entry.nbytes`` long.
        """
        key = entry.key
        if payload.nbytes != entry.nbytes:
            raise ValueError(f"the payload has {payload.nbytes} bytes, its entry says {entry.nbytes}")
        while key in self._landing:
            await asyncio.wait([self._landing[key]])
        if key in self._ledger.held:
            return True
        with self._lands(key):
            return await self._whole(self._write(entry, payload.cast("B")))

    async def reserve(self, namespace: str, nbytes: int, kind: Kind) -> NvmeSpace:
        """Reserve and allocate a file for a payload of ``nbytes``, evicting what the policy gives up first.

        Raises:
            UnknownNamespace: it has no share here.
            TooLarge: more than the namespace's share.
            AllPinned: what is being read or made leaves no room, or the disk has less than it should.
            DiskFailing: the disk is late, or is left alone.
        """
        return await self._whole(
            self._reserve(namespace, nbytes), undo=NvmeSpace.release, allowed=self.allowed_s(nbytes)
        )

    async def commit(self, entry: Entry, space: NvmeSpace) -> None:
        """Make what was written to ``space`` the entry. If its key is held already, the space is released.

        Raises:
            Refused: the disk fails, or the entry's description does not fit; the space is released.
            ValueError: the space was released, or is not of the entry's size and namespace.
        """
        key = entry.key
        if space.extent.nbytes != entry.nbytes or space.namespace != key.namespace:
            raise ValueError("the space is not the entry's: reserve its size in its namespace")
        if not space.open:
            raise ValueError("the space was released")
        while key in self._landing:
            await asyncio.wait([self._landing[key]])
        if key in self._ledger.held:
            space.release()
            return
        with self._lands(key):
            await self._whole(self._commit(entry, space))

    def evict(self, key: Key) -> bool:
        resident = self._ledger.held.get(key)
        if resident is None or resident.pins:
            return False
        self._ledger.drop(resident, "asked")
        self._folder.remove(resident.path)
        return True

    async def condemn(self, key: Key) -> bool:
        """Set the entry aside, as one that fails its checksum is; False: it is not here."""
        resident = self._ledger.held.get(key)
        if resident is None:
            return False
        await self._tracked(self._condemn(resident))
        return True

    async def close(self) -> None:
        """Finish what is under way and let the folder go. Harmless when repeated."""
        for watch in (self._reading, self._writing):
            await watch.close()
        await self._reads.close()
        while self._tasks:
            await asyncio.wait(self._tasks)
        for space in list(self._spaces.values()):
            space.release()
        for pool in (self._lookers, self._writers):
            await asyncio.to_thread(pool.shutdown)
        await self._journal.close()
        await self._folder.close()

    def divide(self, shares: Shares) -> None:
        """Divide the budget anew; what is then above its share goes, unless it is being read.

        Raises: ConfigError: the shares cannot be, or a namespace is missing that is there now. Nothing is changed then.
        """
        self._remove(self._ledger.divide(shares))

    # -- verifying

    async def scrub(self) -> None:
        """Verify entry after entry while nothing else is read, at the pace that is set, until cancelled.

        What is found broken is set aside, as at a read.
        """
        if not self._settings.scrub:
            return
        pause = CHUNK / self._settings.scrub
        while True:
            for resident in list(self._ledger.held.values()):
                await self._scrub(resident, pause)
            await asyncio.sleep(pause)

    async def _scrub(self, resident: Resident, pause: float) -> None:
        for part in (None, *range(resident.chunks)):
            await asyncio.sleep(pause)
            await self._reads.until_idle()
            if not self._ledger.holds(resident):
                return
            try:
                if part is not None:
                    buffer = page_aligned(min(CHUNK, resident.entry.nbytes - part * CHUNK))
                    await self._read(resident, buffer, [part], lambda: None)
                elif await self._run(self._lookers, self._head_fault, resident) is not None:
                    await self._whole(self._condemn(resident))
            except (CorruptEntry, DiskFailing):
                return

    async def check(self, repair: bool = False) -> Report:
        """Verify every file, and that index, ledger and disk agree. ``repair`` quarantines and removes what is wrong.

        Entries may come and go meanwhile; those that stay are all looked at.
        """
        found: list[tuple[str, Callable[[], Coroutine[Any, Any, None]]]] = []
        on_disk, strange, differing = await self._compare()
        found += [(f"{path.name}: nothing accounts for it", partial(self._discard, path)) for path in strange]
        for resident, size in differing:
            text = f"{resident.path.name}: takes {size} bytes of disk, the ledger says {resident.allocated}"
            found.append((text, partial(self._correct, resident, size)))
        for resident in list(self._ledger.held.values()):
            if self._ledger.holds(resident):
                with _pinned(resident):
                    fault = await self._run(self._lookers, self._fault, resident)
                if fault is not None:
                    found.append((f"{resident.path.name}: {fault}", partial(self._condemn, resident)))
        if repair:
            for _, mend in found:
                await self._whole(mend())
        problems = [text for text, _ in found]
        if on_disk > self._settings.budget:
            problems.append(f"{on_disk} bytes on disk are more than the budget of {self._settings.budget}")
        repaired = len(found) if repair else 0
        ledger = self._ledger.total() - self._journal.nbytes + self._journal.taken
        return Report(len(self._ledger.held), ledger, on_disk, self._settings.budget, tuple(problems), repaired)

    async def _discard(self, path: Path) -> None:
        self._folder.remove(path)
        await self._folder.settled()

    async def _correct(self, resident: Resident, size: int) -> None:
        self._ledger.correct(resident, size)

    def _head_fault(self, resident: Resident) -> str | None:
        try:
            head = read_head(resident.path)
        except (OSError, BadHead, OtherFormat) as error:
            return str(error)
        same = head.entry == resident.entry and head.sums.encode() == resident.sums
        return None if same else "the head describes another entry"

    def _fault(self, resident: Resident) -> str | None:
        if (fault := self._head_fault(resident)) is not None:
            return fault
        try:
            buffer = page_aligned(min(CHUNK, resident.entry.nbytes))
            job = resident.job(range(resident.chunks))
            fd = opened(resident.path)
            try:
                for chunk in job.sums:
                    read_chunk(self._disk, fd, job, chunk, buffer[: resident.entry.nbytes - chunk * CHUNK])
            finally:
                os.close(fd)
        except (OSError, EOFError, CorruptEntry) as error:
            return str(error)
        return None

    async def _compare(self) -> tuple[int, dict[Path, int], list[tuple[Resident, int]]]:
        """Bytes on disk; files that nothing accounts for; residents of another size than the ledger says."""
        # the hand lists the folder after all that was decided before, and before all that is decided from now on
        residents = {resident.path: resident for resident in self._ledger.held.values()}
        known = residents.keys() | self._ledger.strays.keys() | self._ledger.foreign | self._ledger.quarantined.keys()
        known |= (
            {self._folder.probe}
            | {Path(path) for path in self._spaces}
            | {self._folder.path(key) for key in self._landing}
        )
        await self._journal.settled()
        on_disk, listed = await self._folder.listing()
        strange = {path: size for path, size in listed.items() if path not in known}
        differing = [(r, listed[path]) for path, r in residents.items() if listed.get(path, r.allocated) != r.allocated]
        return on_disk, strange, differing

    # -- recovery

    async def _recover(self) -> None:
        await self._folder.take()
        found, notes = await asyncio.gather(self._folder.look(self._journal.paths), self._journal.load())
        if 0 < found.filesystem < self._settings.budget:
            raise ConfigError(
                f"{self._settings.path} is on a filesystem of {found.filesystem} bytes, smaller than the budget of "
                f"{self._settings.budget}: lower nvme.budget"
            )
        ledger = self._ledger
        ledger.foreign = frozenset(found.foreign)
        ledger.reserved = max(ledger.reserved, found.beside) + sum(found.foreign.values())
        ledger.quarantined.update(found.quarantined)
        known = [_if_of(notes.get(file.path.name), file) for file in found.files]
        heads = iter(await self._heads([file.path for file, note in zip(found.files, known, strict=True) if not note]))
        namespaces = frozenset(ledger.namespaces)
        held: list[Resident] = []
        read: list[Resident] = []
        broken: list[tuple[Path, int]] = []
        unowned: list[Path] = []
        for file, note in zip(found.files, known, strict=True):
            what = note or next(heads)
            if isinstance(what, OtherFormat):
                ledger.strays[file.path] = file.identity.allocated
            elif isinstance(what, BadHead):
                broken.append((file.path, file.identity.allocated))
            elif what.entry.key.namespace not in namespaces:
                unowned.append(file.path)
            else:
                resident = Resident(what.entry, what.sums, file)
                held.append(resident)
                if note is None:
                    read.append(resident)
        ledger.restore(held)
        for path in unowned:
            self._folder.remove(path)
        for path, size in broken:
            await self._set_aside(path, size)
        self._remove(ledger.trim_quarantine(0))
        if ledger.room() < charge(LEAST):
            raise ConfigError(
                f"nvme: the budget of {self._settings.budget} bytes leaves nothing for entries: "
                f"{self._settings.budget - ledger.room()} are taken or set aside already"
            )
        self._remove(ledger.make_room(None, 0))
        await self._folder.settled()
        if len(notes) > 2 * sum(note is not None for note in known):  # most are of what is no more
            self._rewrite_journal()
        else:
            self._journal.note(resident.note for resident in read)

    async def _heads(self, paths: list[Path]) -> list[Head | BadHead | OtherFormat]:
        """What the heads of these files say, read by several threads."""

        def several(some: list[Path]) -> list[Head | BadHead | OtherFormat]:
            return [examine(path) for path in some]

        # a few at a time: handing over one by one would take longer than to read them
        batches = [paths[at : at + 64] for at in range(0, len(paths), 64)]
        read = await asyncio.gather(*(self._run(self._lookers, several, batch) for batch in batches))
        return list(itertools.chain.from_iterable(read))

    def _rewrite_journal(self) -> None:
        residents = list(self._ledger.held.values())
        self._journal.rewrite(lambda: (resident.note for resident in residents))

    # -- space

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._folder.remove(path)

    def _release(self, space: NvmeSpace) -> None:
        if space.open:
            self._close_space(space)
            self._folder.remove(Path(space.extent.path))

    def _close_space(self, space: NvmeSpace) -> None:
        space.open = False
        del self._spaces[space.extent.path]
        self._ledger.give_back(space.namespace, space.charge)

    @contextlib.contextmanager
    def _lands(self, key: Key) -> Iterator[None]:
        """While it lasts, others that bring the same entry wait for the outcome."""
        self._landing[key] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            self._landing.pop(key).set_result(None)

    # -- reading, within

    async def _read(
        self,
        resident: Resident,
        out: memoryview,
        chunks: Iterable[int],
        freed: Callable[[], None] | None = None,
    ) -> None:
        """Read consecutive ``chunks`` to ``out``, ``freed`` as in ``read_into``. Raises: CorruptEntry, DiskFailing."""
        key = resident.entry.key
        if freed is not None and not self._reads.admits:
            freed()
            raise DiskFailing(f"a stored {key.kind} of series {key.series} is not read: the disk is left alone")
        reading = self._reads.start(resident.job(chunks), out)
        resident.pins += 1
        reading.when_over(partial(_unpin, resident))
        try:
            faults = await self._reads.outcome(reading, may_leave=freed is not None)
            await self._judge(resident, faults)
        except BaseException:
            if freed is not None:
                reading.when_over(freed)
            raise

    async def _judge(self, resident: Resident, faults: list[BaseException]) -> None:
        """What a read in time says of the disk and of the entry. Raises: CorruptEntry, DiskFailing."""
        for fault in faults:
            if not isinstance(fault, OSError | EOFError | CorruptEntry):
                raise fault
        if any(isinstance(fault, OSError) for fault in faults):
            self._reading.bad()
        else:
            self._reading.good()
        if not faults:
            return
        key = resident.entry.key
        text = f"a stored {key.kind} of series {key.series} was unreadable: {faults[0]}"
        if isinstance(faults[0], OSError) and not await self._run(self._lookers, self._folder.there):
            raise DiskFailing(text) from faults[0]
        # to set it aside may take as long as the disk likes, its going does not
        await asyncio.wait([self._tracked(self._condemn(resident))], timeout=self._reading.deadline_s)
        raise CorruptEntry(text) from faults[0]

    async def _condemn(self, resident: Resident) -> None:
        """Drop a broken entry and set its file aside, unless another reader did."""
        if self._ledger.holds(resident):
            self.corrupted += 1
            self._ledger.drop(resident, "corrupt")
            await self._set_aside(resident.path, resident.allocated)

    async def _set_aside(self, path: Path, size: int) -> None:
        if size > self._ledger.quarantine_bytes:
            await self._discard(path)
            return
        self._remove(self._ledger.trim_quarantine(size))
        name = f"{int(self._clock.now()):012d}-{next(self._numbers):04d}-{path.name}"
        target = self._folder.quarantine / name
        self._ledger.quarantined[target] = size
        took = await self._folder.move(path, target)
        if target in self._ledger.quarantined:  # it may have had to go meanwhile
            self._ledger.quarantined[target] = took

    # -- writing, within

    async def _reserve(self, namespace: str, nbytes: int) -> NvmeSpace:
        self._ledger.limits_of(namespace)
        if not self._writing.admits:
            raise DiskFailing(f"no {nbytes} bytes of disk are taken: the disk is left alone until a probe goes well")
        most = charge(head_nbytes(nbytes) + nbytes)
        self._remove(self._ledger.make_room(namespace, most))
        self._ledger.take(namespace, most)
        space = NvmeSpace(self, namespace, self._folder.tmp / f"{next(self._numbers):08x}", nbytes, most)
        self._spaces[space.extent.path] = space
        try:
            await self._folder.create(space.extent)
        except OSError as error:
            self._failed_write()
            space.release()
            raise AllPinned(f"the disk has no room for {nbytes} bytes: {error.strerror}") from error
        return space

    def _failed_write(self) -> None:
        self.failed_writes += 1
        self._writing.bad()

    async def _write(self, entry: Entry, payload: memoryview) -> bool:
        while True:
            try:
                async with asyncio.timeout(self._writing.deadline_s):
                    await self._write_turns.acquire()
                break
            except TimeoutError:  # behind others, whose memory the disk may hold for long: this one's it need not
                if not self._writing.admits:
                    return False
        try:
            space = await self._reserve(entry.key.namespace, entry.nbytes)
            await self._land(entry, space, payload)
        except Refused:
            return False
        finally:
            self._write_turns.release()
        return True

    async def _commit(self, entry: Entry, space: NvmeSpace) -> None:
        await self._land(entry, space, None)

    async def _land(self, entry: Entry, space: NvmeSpace, payload: memoryview | None) -> None:
        path = self._folder.path(entry.key)
        now = self._clock.now()
        try:
            head = await self._strikes(self._run(self._writers, self._fill, entry, space, payload), entry.nbytes)
            identity = await self._folder.publish(Path(space.extent.path), path, now)
        except (OSError, EOFError) as error:
            self._failed_write()
            raise AllPinned(f"the disk did not take {entry.nbytes} bytes: {error}") from error
        else:
            self._writing.good()
            self._close_space(space)
            resident = Resident(entry, head.sums, File(path, identity, now))
            self._ledger.admit(resident)
            self._journal.note([resident.note])
            if self._journal.overgrown:
                self._rewrite_journal()
        finally:
            space.release()

    async def _strikes(self, work: Coroutine[Any, Any, T], nbytes: int) -> T:
        """Wait for a write of ``nbytes``, which strikes each time that it takes longer than it may."""
        writing = asyncio.create_task(work)
        while not await self.awaited(writing, nbytes):
            self._writing.bad()
        return writing.result()

    async def _in_time(self, work: "asyncio.Future[Any]", allowed: float) -> bool:
        return await self._writing.in_time(work, partial(self._writing.left, self._clock.monotonic(), allowed))

    def _fill(self, entry: Entry, space: NvmeSpace, payload: memoryview | None) -> Head:
        """In a writer: payload (None: it is there already), then head, then to the disk."""
        fd = os.open(space.extent.path, os.O_RDWR)
        try:
            sums = []
            buffer = memoryview(b"") if payload is not None else page_aligned(min(CHUNK, entry.nbytes))
            for start in range(0, entry.nbytes, CHUNK):
                at = space.extent.offset + start
                if payload is not None:
                    part = payload[start : start + CHUNK]
                    self._disk.write(fd, part, at)
                else:
                    # not through a mapping: there a bad disk is a signal that ends the process
                    part = buffer[: entry.nbytes - start]
                    self._disk.read_cached(fd, part, at)
                sums.append(checksum(part))
            head = Head(entry, "".join(sums))
            self._disk.write(fd, memoryview(encode(head)), 0)
            self._disk.sync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        return head

    # -- probes, in threads of their own

    def _probe_read(self) -> None:
        """Read the first chunk of some entry, or look at the folder where there is none. Raises: OSError."""
        resident = next(reversed(self._ledger.held.values()), None)
        if resident is not None:
            job = resident.job([0] if resident.chunks else [])
            with contextlib.suppress(FileNotFoundError, EOFError, CorruptEntry):  # its own trouble, not the disk's
                fd = opened(resident.path)
                try:
                    for chunk in job.sums:
                        read_chunk(self._disk, fd, job, chunk, page_aligned(min(CHUNK, resident.entry.nbytes)))
                finally:
                    os.close(fd)
        if not self._folder.there():
            raise FileNotFoundError(errno.ENOENT, "the folder is not where it was", str(self._folder.root))

    def _probe_write(self) -> None:
        """Make a file of one page, and remove it. Raises: OSError."""
        path = self._folder.probe
        fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            self._disk.allocate(fd, ALIGN)
            self._disk.write(fd, page_aligned(ALIGN), 0)
            self._disk.sync(fd)
        finally:
            os.close(fd)
            path.unlink()

    # -- threads

    def _tracked(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _whole(
        self, work: Coroutine[Any, Any, T], undo: Callable[[T], None] | None = None, allowed: float = math.inf
    ) -> T:
        """Run ``work`` to its end even if the caller is cancelled, and only then let the caller go: a thread cannot be
        called back, and the memory it works on must be valid until it is done. ``undo`` takes a result nobody gets.

        Raises: DiskFailing if it takes longer than ``allowed`` seconds; it goes on, to be undone. Else as ``work``.
        """
        task = self._tracked(work)
        cancelled = None
        while not task.done():
            try:
                if not await self._in_time(task, allowed):
                    self._writing.bad()
                    task.add_done_callback(partial(_undo, undo))
                    raise cancelled or DiskFailing(f"the disk took longer than {allowed} s")
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            _undo(undo, task)
            raise cancelled
        return task.result()

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *args)


def _undo(undo: Callable[[T], None] | None, task: asyncio.Task[T]) -> None:
    if task.exception() is None and undo is not None:
        undo(task.result())


def _unpin(resident: Resident) -> None:
    resident.pins -= 1


@contextlib.contextmanager
def _pinned(resident: Resident) -> Iterator[None]:
    resident.pins += 1
    try:
        yield
    finally:
        resident.pins -= 1


def _if_of(note: Note | None, file: File) -> Note | None:
    """The note if it was made of this very file."""
    return note if note is not None and note.identity == file.identity else None


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: to go through all that has been made, again and again, while a hundred thousand
    entries are, would take longer than to make them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
