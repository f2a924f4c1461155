"""A store on real tiers, a real catalogue and a real directory; its deriver is so light that a walk takes little."""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from cache.arena import Arena, aligned
from cache.attributes import Attributes
from cache.catalog import Catalog, CatalogSettings
from cache.dicom.assemble import VolumePlan
from cache.entry import Entry, ModelIdentity, TensorSpec
from cache.errors import ModelChanged, NotDicom, VoxcacheError
from cache.flight import FlightSettings
from cache.interfaces import Encoded, Extent, Room
from cache.keys import SeriesRef, TensorRef, digest
from cache.nvme import NvmeSettings, NvmeTier
from cache.nvme.faults import DiskFaultPlan, FaultyDisk
from cache.nvme.health import HealthSettings
from cache.origin.directory import DirectoryOrigin, DirectorySettings
from cache.origin.faults import FaultPlan, FaultyOrigin
from cache.origin.find import Finder, FindSettings
from cache.pack import Layout
from cache.policy.shares import Shares
from cache.ram import RamSettings, RamTier
from cache.recipe.chain import Infer, Recipe, parse_recipe
from cache.restore import Restores, RestoreSettings
from cache.store import Outcome, Store, StoreSettings
from cache.workers.wire import Plan
from tests.conformance.tier import EYE, FakeClock

KIB = 1 << 10
MIB = 1 << 20

_TICKS = itertools.count(1)

SHARES: Shares = {"serving": 0.75, "staging": 0.25}

#: Looks often whether something is late. Only the test's clock makes it so.
QUICK = HealthSettings(deadline_s=0.002, recovery=2, probe_s=0.002)

#: ``plain`` is the objects' bytes as they are; ``turned`` has a step, which turns every bit round.
RECIPES = {
    "plain": parse_recipe("plain", {"version": 1, "ops": [{"op": "volume"}]}),
    "turned": parse_recipe("turned", {"version": 1, "ops": [{"op": "volume"}, {"op": "cast", "dtype": "int16"}]}),
}
#: What the Oracle says to either.
EMBEDDINGS = {
    f"word_of_{name}": msgspec.structs.replace(recipe, name=f"word_of_{name}", infer=Infer("oracle", "WORD"))
    for name, recipe in RECIPES.items()
}


_TURNED = bytes(255 - byte for byte in range(256))


def made(recipe: str, objects: Iterable[bytes]) -> bytes:
    """What the recipe makes of a series of these objects."""
    whole = b"".join(objects)
    return whole if recipe == "plain" else whole.translate(_TURNED)


def objects(seed: int, count: int = 3, nbytes: int = 10 * KIB) -> list[bytes]:
    """Objects of a series, others for another seed."""
    return [bytes([seed, number]) * (nbytes // 2 + number) for number in range(count)]


async def until(true: Callable[[], bool]) -> None:
    """Return once it holds."""
    while not true():
        await asyncio.sleep(0.001)  # threads bring it about, or tasks of the store's own: none of them tells anybody


class Echo:
    """A Deriver: the volume is the objects' bytes, one after another.

    The faults are raised in place of a result; while ``gate`` is closed, deriving waits.
    """

    def __init__(self) -> None:
        self.decoders = {"1.2.840.10008.1.2.1": "none"}
        self.inspect_fault: VoxcacheError | None = None
        self.derive_fault: VoxcacheError | None = None
        self.gate: asyncio.Event | None = None
        self.derived = 0
        self.foresees = 0  # bytes of the room it asks for; 0: those of the volume
        self.rooms: list[Extent] = []  # that it got
        self.volumes: list[Extent] = []
        self.attributes = Attributes()

    async def describe(self, head: bytes, key: bytes) -> Attributes:
        return self.attributes

    @asynccontextmanager
    async def derivation(
        self,
        pack: Extent,
        layout: Layout,
        recipe: Recipe,
        room: Room,
        stored: bool = False,
    ) -> AsyncIterator["Echoing"]:
        work = Echoing(self, layout, recipe, room, stored)
        try:
            yield work
        finally:
            work.ended = True


class Echoing:
    """A Derivation of Echo. It asks for room as soon as the first object is there, and leaves its mark in it."""

    def __init__(self, echo: Echo, layout: Layout, recipe: Recipe, room: Room, stored: bool) -> None:
        self._echo = echo
        self._layout = layout
        self._recipe = recipe
        self._room = room
        self._here = set(range(len(layout.members))) if stored else set()
        nbytes = sum(member.nbytes for member in layout.members)
        self._spec = TensorSpec("uint8", (nbytes, 1, 1), "zyx", (1.0, 1.0, 1.0), EYE)
        self.ended = False

    def arrived(self, member: int) -> None:
        assert not self.ended
        if not self._here and (extent := self._room(self._echo.foresees or self._spec.nbytes)) is not None:
            _write(extent, b"?" * extent.nbytes)
            self._echo.rooms.append(extent)
        self._here.add(member)

    async def plan(self) -> Plan:
        assert len(self._here) == len(self._layout.members)
        if self._echo.inspect_fault is not None:
            raise self._echo.inspect_fault
        return Plan(VolumePlan(self._spec, (), self._recipe.volume), self._spec, "CT")

    async def derive(self, pack: Extent, volume: Extent, result: Extent | None) -> dict[str, float]:
        echo = self._echo
        echo.derived += 1
        echo.volumes.append(volume)
        objects = [_read(pack, member.offset, member.nbytes) for member in self._layout.members]
        _write(volume, b"".join(objects))
        await asyncio.sleep(0)
        if echo.gate is not None:
            await echo.gate.wait()
        if echo.derive_fault is not None:
            raise echo.derive_fault
        if result is not None:
            _write(result, made(self._recipe.name, [_read(volume, 0, volume.nbytes)]))
        return {"decode": 0.5}


class Oracle:
    """An Encoder: an embedding is four bytes that depend on model and tensor.

    While ``gate`` is closed, encoding waits, and goes on reading even when nobody waits for it any more.
    """

    def __init__(self) -> None:
        self.model = ModelIdentity("oracle", "1", "c1")
        self.heard: ModelIdentity | None = None  # what is known of it
        self.fault: VoxcacheError | None = None  # of whatever asks it
        self.gate: asyncio.Event | None = None
        self.encoded = 0
        self.asked = 0
        self.calls: set[asyncio.Task[bytes]] = set()

    def known(self, infer: Infer) -> ModelIdentity | None:
        return self.heard

    async def identify(self, infer: Infer) -> ModelIdentity:
        self.asked += 1
        await asyncio.sleep(0)
        if self.fault is not None:
            raise self.fault
        self.heard = self.model
        return self.model

    async def encode(
        self, infer: Infer, model: ModelIdentity, spec: TensorSpec, tensor: Extent, release: Callable[[], None]
    ) -> Encoded:
        task = asyncio.create_task(self._read(tensor))
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)
        task.add_done_callback(lambda _: release())
        word = said(self.model, await asyncio.shield(task))
        if self.fault is not None:
            raise self.fault
        if await self.identify(infer) != model:
            raise ModelChanged("another model answered")
        self.encoded += 1
        return Encoded(TensorSpec("uint8", (1, len(word)), "", None, None), word)

    async def _read(self, tensor: Extent) -> bytes:
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        return _read(tensor, 0, tensor.nbytes)


def said(model: ModelIdentity, tensor: bytes) -> bytes:
    """The word of the Oracle's for a tensor."""
    return bytes.fromhex(digest(model.version, model.config, tensor.hex())[:8])


def _read(extent: Extent, offset: int, nbytes: int) -> bytes:
    fd = os.open(extent.path, os.O_RDONLY)
    try:
        return os.pread(fd, nbytes, extent.offset + offset)
    finally:
        os.close(fd)


def _write(extent: Extent, data: bytes) -> None:
    assert len(data) == extent.nbytes
    fd = os.open(extent.path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, extent.offset)
    finally:
        os.close(fd)


class Ears:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        self.observed: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()

    def stage(self, name: str, seconds: float) -> None:
        self.stages[name] += 1

    def count(self, name: str, labels: Iterable[str] = (), amount: float = 1.0) -> None:
        self.counts["/".join((name, *labels))] += int(amount)

    def observe(self, name: str, seconds: float) -> None:
        self.observed[name] += 1

    def answered(self, tier: str, entry: Entry) -> None:
        self.answers[tier] += 1


class Archive:
    """The directory that is the origin. Every file it writes differs from all before it in its ETag."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)

    def write(self, ref: SeriesRef, objects: Sequence[bytes]) -> None:
        """Have the series consist of ``objects``."""
        folder = self.path / ref.study / ref.series
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(objects):
            path = folder / f"{number:03d}.dcm"
            path.write_bytes(data)
            tick = next(_TICKS)
            os.utime(path, (tick, tick))
        for path in sorted(folder.iterdir())[len(objects) :]:
            path.unlink()


class Walk:
    """The parts of one store, opened by ``walking``."""

    def __init__(self, folder: Path, archive: Archive, origin: FaultyOrigin, clock: FakeClock) -> None:
        self.folder = folder
        self.archive = archive
        self.origin = origin
        self.clock = clock
        self.disk = FaultyDisk()
        self.echo = Echo()
        self.oracle = Oracle()
        self.ears = Ears()
        self.states: list[str] = []  # the disk's, as they came
        self.ram: RamTier
        self.nvme: NvmeTier
        self.store: Store
        self.catalog: Catalog

    async def settled(self) -> None:
        """Return when no fill or listing is under way and nothing waits to be written or refreshed."""
        store, listings = self.store, self.store._listings

        def over() -> bool:
            store._behind.hurry()  # no fill will come that it might let go first
            return store.under_way == (0, 0) and not (store._behind.busy or listings.refreshing or listings._flights)

        await until(over)
        await self.nvme._folder.settled()

    async def get(self, ref: SeriesRef, recipe: str = "plain", namespace: str = "serving") -> tuple[str, bytes]:
        """The tier that answered, and the bytes."""
        outcome = await self.store.get(TensorRef(ref, recipe, namespace))
        try:
            return outcome.tier, await content(outcome)
        finally:
            outcome.release()

    def heal(self) -> None:
        """Let nothing fail any more."""
        self.origin.plan = FaultPlan()
        self.disk.plan = DiskFaultPlan()
        self.disk.resume()
        self.echo.inspect_fault = self.echo.derive_fault = None

    def fetched(self) -> int:
        return self.origin.count("fetch")

    def evict_ram(self, ref: SeriesRef) -> None:
        """Have the series leave the RAM tier."""
        for resident in list(self.ram.residents()):
            if resident.key.ref == ref:
                assert self.ram.evict(resident.key)

    def files(self, kind: str = "*") -> list[Path]:
        """Entries' files."""
        return sorted((self.folder / "nvme" / "entries").glob(f"*.{kind}"))

    def in_the_making(self) -> list[Path]:
        """Files that are no entries yet."""
        return [path for path in (self.folder / "nvme" / "tmp").iterdir() if path != self.nvme._folder.probe]

    def leaks(self) -> list[str]:
        """What is taken and belongs to no entry, when nothing is under way."""
        problems = self.ram._extents.check()
        entries = sum(aligned(resident.nbytes) for resident in self.ram.residents())
        if self.ram.usage().used != entries:
            problems.append(f"RAM has {self.ram.usage().used} bytes taken, its entries have {entries}")
        if passing := self.store._places.passing:
            problems.append(f"{passing} bytes are counted as passing")
        for tier in (self.ram, self.nvme):
            for namespace in tier.namespaces:
                counted = sum(resident.key.namespace == namespace for resident in tier.residents())
                if tier.usage(namespace).entries != counted:
                    problems.append(f"{tier.name} counts {tier.usage(namespace).entries} entries of {counted}")
        problems += [f"{path} is left" for path in self.in_the_making()]
        return problems

    def pins(self) -> int:
        return sum(resident.pins for tier in (self.ram, self.nvme) for resident in tier.residents())


async def content(outcome: Outcome) -> bytes:
    """All of an outcome's bytes."""
    return b"".join([bytes(piece) async for piece in outcome.chunks(0, outcome.entry.nbytes)])


async def nobody(head: bytes) -> tuple[str, str, str]:
    raise NotDicom("nothing here is found by its header")


@asynccontextmanager
async def walking(
    folder: Path,
    *,
    ram: int = 512 * KIB,
    nvme: int = 4 * MIB,
    shares: Shares = SHARES,
    settings: StoreSettings | None = None,
    flights: FlightSettings | None = None,
    clock: FakeClock | None = None,
    origin: FaultyOrigin | None = None,
) -> AsyncIterator[Walk]:
    """A store over ``folder``, closed with all its parts on the way out; nothing may be pinned or leak by then."""
    archive = Archive(folder / "archive")
    inner = DirectoryOrigin(DirectorySettings(str(archive.path), threads=4))
    walk = Walk(folder, archive, origin or FaultyOrigin(inner), clock or FakeClock())
    arena = Arena.create(ram)
    reserve = CatalogSettings(reserve=MIB)
    try:
        walk.ram = RamTier(arena, RamSettings(ram, shares), walk.clock)
        nvme_settings = NvmeSettings(str(folder / "nvme"), nvme, shares, threads=1, health=QUICK)
        walk.nvme = await NvmeTier.open(
            nvme_settings,
            walk.clock,
            reserved_bytes=reserve.reserve,
            disk=walk.disk,
            on_health=lambda side, state: walk.states.append(f"{side} {state.name.lower()}"),
        )
        walk.catalog = catalog = Catalog.open(folder / "nvme" / "catalog.sqlite", reserve)
        walk.store = Store(
            settings=settings or StoreSettings(revalidate="request"),
            flights=flights or FlightSettings(),
            ram=walk.ram,
            nvme=walk.nvme,
            catalog=catalog,
            origin=walk.origin,
            finder=Finder(walk.origin, msgspec.structs.replace(FindSettings(), manifest=""), nobody, catalog),
            workers=walk.echo,
            encoder=walk.oracle,
            recipes=RECIPES | EMBEDDINGS,
            clock=walk.clock,
            observer=walk.ears,
            patient_key=bytes(32),
            restores=Restores(RestoreSettings(), walk.origin, catalog, walk.clock, walk.ears),
        )
        try:
            yield walk
        finally:
            await walk.store.close()
            catalog.close()
            await walk.nvme.close()
        assert walk.leaks() == []
        assert walk.pins() == 0
    finally:
        await inner.close()
        arena.close()
