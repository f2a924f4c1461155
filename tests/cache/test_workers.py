"""The worker pool, with real processes: what one job does wrong stays its own."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import pytest_asyncio

from cache.dicom.ahead import ENOUGH
from cache.dicom.assemble import plan_volume
from cache.dicom.decode import decode_plan, decoders
from cache.dicom.frames import frame_spans
from cache.dicom.header import read_header
from cache.dicom.phantom import write_series
from cache.errors import (
    ConfigError,
    EmptySeries,
    MissingSlice,
    NotDicom,
    UndecodablePixels,
    WorkerDied,
    WorkerFailed,
    WorkerOutOfMemory,
    WorkerTimeout,
)
from cache.interfaces import Derivation, Extent, NullObserver, Room
from cache.keys import Manifest, SeriesRef, SourceObject
from cache.pack import Layout
from cache.recipe.chain import Recipe, parse_recipe
from cache.urgency import Urgency, working
from cache.workers.pool import Workers, WorkerSettings
from cache.workers.wire import Identify, read_reply

from .dicom.conftest import rewritten
from .dicom.test_enhanced import enhanced, written
from .faulty_ops import PLUGINS

pytestmark = pytest.mark.slow  # every test starts processes of its own

EXPLICIT = "1.2.840.10008.1.2.1"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
GUARD = 0xA5

shared = pytest.mark.asyncio(loop_scope="module")

SETTINGS = WorkerSettings(count=1, cancel_grace_s=0.05, plugins=PLUGINS)


class Bench:
    """A small series laid out in a file as in the arena, with room for volumes and results behind it."""

    def __init__(self, folder: Path, objects: Iterable[bytes]) -> None:
        data = list(objects)
        sources = [SourceObject(f"{n:03d}", len(each), "etag") for n, each in enumerate(data)]
        self.folder = folder
        self.layout = Layout.of(Manifest.of(SeriesRef("1.2", "1.3"), sources))
        self.path = folder / "arena"
        payload = bytearray(self.layout.nbytes)
        for each, member in zip(data, self.layout.members, strict=True):
            payload[member.offset : member.offset + member.nbytes] = each
        self.path.write_bytes(payload)
        self.pack = Extent(str(self.path), 0, len(payload))

    def room(self, nbytes: int) -> Extent:
        """A new extent between guard bytes, at an offset that is no multiple of a page."""
        end = self.path.stat().st_size
        with self.path.open("ab") as file:
            file.write(bytes([GUARD]) * (512 + nbytes + 512))
        return Extent(str(self.path), end + 512, nbytes)

    def object(self, number: int) -> bytes:
        member = self.layout.members[number]
        return self.path.read_bytes()[member.offset : member.offset + member.nbytes]

    def read(self, extent: Extent) -> bytes:
        around = self.path.read_bytes()[extent.offset - 512 : extent.offset + extent.nbytes + 512]
        assert set(around[:512] + around[-512:]) == {GUARD}
        return around[512:-512]

    @asynccontextmanager
    async def derivation(
        self, workers: Workers, recipe: Recipe, room: Room = lambda _: None, stored: bool = False
    ) -> AsyncIterator[Derivation]:
        """A derivation of the whole pack."""
        async with workers.derivation(self.pack, self.layout, recipe, room, stored) as work:
            if not stored:
                for member in range(len(self.layout.members)):
                    work.arrived(member)
            yield work

    async def derive(self, workers: Workers, recipe: Recipe) -> bytes:
        """The result's bytes."""
        async with self.derivation(workers, recipe) as work:
            return await self.derive_planned(recipe, work)

    async def derive_planned(self, recipe: Recipe, work: Derivation) -> bytes:
        plan = await work.plan()
        volume = self.room(plan.volume.spec.nbytes)
        result = self.room(plan.spec.nbytes) if recipe.steps else None
        seconds = await work.derive(self.pack, volume, result)
        assert list(seconds) == (["decode", "recipe"] if recipe.steps else ["decode"])
        return self.read(result or volume)

    def expected(self, recipe: Recipe) -> bytes:
        """What deriving gives, computed in this process."""
        pack = memoryview(self.path.read_bytes())
        objects = [pack[member.offset : member.offset + member.nbytes] for member in self.layout.members]
        plan = plan_volume([read_header(data, n) for n, data in enumerate(objects)], recipe.volume)
        volume = np.empty(plan.spec.shape, plan.spec.dtype)
        decode_plan([objects[header.member] for header in plan.objects], plan, volume)
        return recipe.run(volume, plan.spec).tobytes()


class Holding:
    """A recipe whose step stays in its worker until the test lets it go."""

    def __init__(self, folder: Path, name: str) -> None:
        self._started, self._release = folder / f"{name}.started", folder / f"{name}.release"
        for fifo in (self._started, self._release):
            os.mkfifo(fifo)
        self.recipe = recipe({"op": "hold", "started": str(self._started), "release": str(self._release)})

    async def started(self) -> int:
        """The process that has begun the step."""
        ready = asyncio.Event()
        fifo = os.open(self._started, os.O_RDONLY | os.O_NONBLOCK)
        asyncio.get_running_loop().add_reader(fifo, ready.set)
        try:
            async with asyncio.timeout(60):
                await ready.wait()
            return int(os.read(fifo, 20))
        finally:
            asyncio.get_running_loop().remove_reader(fifo)
            os.close(fifo)

    async def release(self) -> None:
        await asyncio.to_thread(self._release.write_text, "")


class Counts(NullObserver):
    """An observer that keeps what it counts."""

    def __init__(self) -> None:
        self.counted: Counter[tuple[str, ...]] = Counter()

    def count(self, name: str, labels: Iterable[str] = (), amount: float = 1.0) -> None:
        self.counted[name, *labels] += int(amount)


def recipe(*steps: dict[str, object]) -> Recipe:
    return parse_recipe("test", {"version": 1, "ops": [{"op": "volume"}, *steps]}, PLUGINS)


def objects_of(folder: Path, syntax: str = EXPLICIT) -> list[bytes]:
    _, _, files = write_series(folder, slices=12, rows=64, columns=64, transfer_syntax=syntax, seed=1)
    return [file.read_bytes() for file in files]


def running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, objects_of(tmp_path / "series"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers() -> AsyncIterator[Workers]:
    """One worker, which the tests share, whatever they do to it."""
    pool = Workers(SETTINGS)
    await pool.start()
    yield pool
    await pool.close()


@pytest.mark.parametrize("syntax", [EXPLICIT, JPEG_2000])
async def test_derive_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str) -> None:
    """Slices decoded by several workers, and the recipe's steps, give what they give in one process, to the byte."""
    monkeypatch.setattr("cache.workers.pool._MOST_PER_JOB", 3 * 64 * 64 * 2)
    monkeypatch.setattr("cache.workers.pool._HEADERS_PER_JOB", 5)
    bench = Bench(tmp_path, objects_of(tmp_path / "series", syntax))
    pool = Workers(msgspec.structs.replace(SETTINGS, count=2))
    await pool.start()
    try:
        assert pool.decoders == decoders()
        for chain in (
            recipe(),
            recipe(
                {"op": "reorient", "to": "RAS"}, {"op": "resample", "spacing": 2}, {"op": "cast", "dtype": "float16"}
            ),
        ):
            assert await bench.derive(pool, chain) == bench.expected(chain)
    finally:
        await pool.close()


@pytest.mark.parametrize("syntax", [EXPLICIT, "1.2.840.10008.1.2.4.80"])
async def test_frames_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str) -> None:
    """The frames of one object are decoded by several workers, and make the volume they make in one process."""
    monkeypatch.setattr("cache.workers.pool._MOST_PER_JOB", 2 * 8 * 10 * 2)
    bench = Bench(
        tmp_path, [written(enhanced(frames=6, first=first, instance=f"1.2.3.{first}"), syntax) for first in (6, 0)]
    )
    pool = Workers(msgspec.structs.replace(SETTINGS, count=2))
    await pool.start()
    try:
        assert await bench.derive(pool, recipe()) == bench.expected(recipe())
    finally:
        await pool.close()


class Arriving:
    """A bench whose objects arrive when the test says so, with room for the volume that is foreseen."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.asked = asyncio.Event()
        self.volume: Extent | None = None

    def room(self, nbytes: int) -> Extent:
        self.volume = self.bench.room(nbytes)
        self.asked.set()
        return self.volume

    @asynccontextmanager
    async def until_foreseen(self, pool: Workers, chain: Recipe) -> AsyncIterator[tuple[Derivation, Extent]]:
        """A derivation whose first objects are there, so that room for its volume has been asked for."""
        async with pool.derivation(self.bench.pack, self.bench.layout, chain, self.room) as work:
            for member in range(ENOUGH):
                work.arrived(member)
            async with asyncio.timeout(60):
                await self.asked.wait()
            assert self.volume is not None
            yield work, self.volume

    def rest(self, work: Derivation) -> None:
        """Have all other objects arrive, the last ones first."""
        for member in range(len(self.bench.layout.members) - 1, ENOUGH - 1, -1):
            work.arrived(member)


@pytest.mark.parametrize("syntax", [EXPLICIT, JPEG_2000])
async def test_slices_are_decoded_before_all_are_there(tmp_path: Path, syntax: str) -> None:
    """Once all have arrived, every slice but the first few is in its place; the volume is the usual one."""
    bench = Bench(tmp_path, objects_of(tmp_path / "series", syntax))
    pool = Workers(msgspec.structs.replace(SETTINGS, count=2))
    await pool.start()
    try:
        for chain in (recipe(), recipe({"op": "reorient", "to": "RAS"})):
            arriving = Arriving(bench)
            async with arriving.until_foreseen(pool, chain) as (work, volume):
                arriving.rest(work)
                plan = await work.plan()
                expected = np.frombuffer(bench.expected(recipe()), np.int16).reshape(plan.volume.spec.shape)
                early = np.frombuffer(bench.read(volume), np.int16).reshape(plan.volume.spec.shape)
                assert [z for z in range(12) if not np.array_equal(early[z], expected[z])] == list(
                    range(12 - ENOUGH, 12)
                )
                result = bench.room(plan.spec.nbytes) if chain.steps else None
                await work.derive(bench.pack, volume, result)
                assert bench.read(result or volume) == bench.expected(chain)
    finally:
        await pool.close()


def misnumbered(objects: list[bytes]) -> list[bytes]:
    """Shuffled, and numbered from 0: what the numbers foretell is one slice off."""
    renumbered = [rewritten(data, InstanceNumber=number) for number, data in enumerate(objects)]
    return [renumbered[at] for at in (1, 0, 2, 5, 4, 7, 3, 6, 9, 8, 11, 10)]


def half_at_the_end(objects: list[bytes]) -> list[bytes]:
    """A slope that is no whole number comes last, and makes all values floats."""
    return [*objects[:-1], rewritten(objects[-1], RescaleSlope=0.5)]


@shared
@pytest.mark.parametrize("change", [misnumbered, half_at_the_end])
async def test_a_wrong_guess_does_no_harm(
    workers: Workers, tmp_path: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    """Where the plan says something else than was foreseen, it is the plan that is carried out."""
    bench = Bench(tmp_path, change(objects_of(tmp_path / "series")))
    arriving = Arriving(bench)
    async with arriving.until_foreseen(workers, recipe()) as (work, volume):
        arriving.rest(work)
        plan = await work.plan()
        nbytes = plan.volume.spec.nbytes
        place = volume if volume.nbytes == nbytes else bench.room(nbytes)
        await work.derive(bench.pack, place, None)
        assert bench.read(place) == bench.expected(recipe())


@shared
async def test_what_is_wrong_is_the_same_early_or_late(workers: Workers, tmp_path: Path) -> None:
    """A slice that cannot be decoded is refused by name, but only if the series is a volume at all."""
    objects = objects_of(tmp_path / "series", JPEG_2000)
    header = read_header(memoryview(objects[8]), 8)
    damage = header.pixel_offset + 16 + 60  # within the codestream, past its size
    objects[8] = objects[8][:damage] + bytes(60) + objects[8][damage + 60 :]
    broken = Arriving(Bench(tmp_path, objects))
    async with broken.until_foreseen(workers, recipe()) as (work, volume):
        broken.rest(work)
        await work.plan()
        with pytest.raises(UndecodablePixels) as caught:
            await work.derive(broken.bench.pack, volume, None)
    assert caught.value.instances == (header.instance,)
    gap = Arriving(Bench(tmp_path, [*objects[:5], *objects[6:]]))
    async with gap.until_foreseen(workers, recipe()) as (work, _):
        gap.rest(work)
        with pytest.raises(MissingSlice):
            await work.plan()


def stop_worker(pool: Workers) -> int:
    """Have the only worker stand still in the middle of what it does; its process."""
    [worker] = pool._workers
    os.kill(worker._process.pid, signal.SIGSTOP)
    return worker._process.pid


@shared
async def test_a_worker_killed_while_objects_arrive(workers: Workers, bench: Bench) -> None:
    """Its death fails the derivation, and the room it wrote to is nobody's any more; the next one is done."""
    arriving = Arriving(bench)
    async with arriving.until_foreseen(workers, recipe()) as (work, volume):
        pid = stop_worker(workers)
        arriving.rest(work)
        planning = asyncio.create_task(work.plan())
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            await planning
    assert not running(pid)
    assert set(bench.read(volume)) == {GUARD}
    assert await bench.derive(workers, recipe()) == bench.expected(recipe())


@shared
async def test_a_worker_stuck_while_objects_arrive(
    workers: Workers, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit holds for what is done early as for all jobs."""
    arriving = Arriving(bench)
    async with arriving.until_foreseen(workers, recipe()) as (work, _):
        pid = stop_worker(workers)
        with monkeypatch.context() as patch:
            patch.setattr(workers, "_settings", msgspec.structs.replace(SETTINGS, job_timeout_s=0.1))
            arriving.rest(work)
            with pytest.raises(WorkerTimeout):
                await work.plan()
    assert not running(pid)
    assert await bench.derive(workers, recipe()) == bench.expected(recipe())


@shared
@pytest.mark.parametrize("waiting", [True, False], ids=["while the plan is awaited", "while objects arrive"])
async def test_cancelled_while_objects_arrive(workers: Workers, bench: Bench, waiting: bool) -> None:
    """When a cancelled derivation has ended, no worker writes to its room, though objects were still to come."""
    arriving = Arriving(bench)
    begun = asyncio.Event()
    stopped: list[int] = []

    async def derive() -> None:
        async with arriving.until_foreseen(workers, recipe()) as (work, _):
            stopped.append(stop_worker(workers))
            work.arrived(7)
            await asyncio.sleep(0)
            begun.set()
            await (work.plan() if waiting else asyncio.Event().wait())

    task = asyncio.create_task(derive())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not running(stopped[0])
    assert arriving.volume is not None
    assert set(bench.read(arriving.volume)) == {GUARD}
    assert await bench.derive(workers, recipe()) == bench.expected(recipe())


@shared
async def test_headers_are_parsed_once(workers: Workers, bench: Bench) -> None:
    """A stored pack is planned by its index: its objects' headers may be gone. Without one they are read again."""
    expected = bench.expected(recipe())
    await bench.derive(workers, recipe())
    headers = [read_header(memoryview(bench.object(member)), member) for member in range(12)]
    whole = bench.path.read_bytes()
    with bench.path.open("r+b") as file:
        for header, member in zip(headers, bench.layout.members, strict=True):
            file.seek(member.offset)
            file.write(bytes(header.pixel_offset))
    async with bench.derivation(workers, recipe(), stored=True) as work:
        assert await bench.derive_planned(recipe(), work) == expected
    bench.path.write_bytes(whole)
    with bench.path.open("r+b") as file:
        file.seek(bench.layout.index.offset)
        file.write(b"\xff" * 64)
    async with bench.derivation(workers, recipe(), stored=True) as work:
        assert await bench.derive_planned(recipe(), work) == expected
    async with bench.derivation(workers, recipe(), stored=True) as work:
        assert await bench.derive_planned(recipe(), work) == expected


@pytest.mark.parametrize("syntax", [EXPLICIT, "1.2.840.10008.1.2.4.80"])
@shared
async def test_one_frame_of_a_stored_pack(workers: Workers, tmp_path: Path, syntax: str) -> None:
    """By the index, frame N comes without a look at the header, or at any frame but N."""
    data = written(enhanced(frames=6), syntax)
    header = read_header(memoryview(data), 0)
    bench = Bench(tmp_path, [data])
    every = parse_recipe("all", {"version": 1, "ops": [{"op": "volume", "kind": "frames"}]})
    frames = np.frombuffer(await bench.derive(workers, every), np.int16).reshape(6, -1)
    index = frame_spans(memoryview(data), header.pixel_offset, header.pixel_nbytes, header.format, header.frames)
    for number in range(6):
        kept = index.frame(memoryview(data), number)
        begin = data.index(kept) - (8 if header.frame_starts else 0)
        alone = bytearray(b"\xff" * len(data))
        alone[begin : begin + 8 + len(kept)] = data[begin : begin + 8 + len(kept)]
        with bench.path.open("r+b") as file:
            file.seek(bench.layout.members[0].offset)
            file.write(alone)
        one = parse_recipe("one", {"version": 1, "ops": [{"op": "volume", "kind": "frames", "frames": [number + 1]}]})
        async with bench.derivation(workers, one, stored=True) as work:
            assert await bench.derive_planned(one, work) == frames[number].tobytes()


@shared
async def test_identify(workers: Workers, tmp_path: Path) -> None:
    """The first bytes of a file tell its UIDs; bytes that are no DICOM are refused with their own error."""
    study, series, [file] = write_series(tmp_path, slices=1, rows=8, columns=8)
    assert await workers.identify(file.read_bytes()[:4096]) == (study, series, file.stem)
    with pytest.raises(NotDicom):
        await workers.identify(bytes(4096))


@shared
async def test_bad_sources(workers: Workers, tmp_path: Path) -> None:
    """What is wrong with a series arrives as its own error, with the instances at fault; the worker lives on."""
    objects = objects_of(tmp_path / "series", JPEG_2000)
    with pytest.raises(MissingSlice):
        await Bench(tmp_path, objects[:5] + objects[6:]).derive(workers, recipe())
    with pytest.raises(EmptySeries):
        await Bench(tmp_path, []).derive(workers, recipe())
    header = read_header(memoryview(objects[5]), 5)
    damage = header.pixel_offset + 16 + 60  # within the codestream, past its size
    broken = objects[5][:damage] + bytes(60) + objects[5][damage + 60 :]
    with pytest.raises(UndecodablePixels) as caught:
        await Bench(tmp_path, [*objects[:5], broken, *objects[6:]]).derive(workers, recipe())
    assert caught.value.instances == (header.instance,)
    whole = Bench(tmp_path, objects)
    assert await whole.derive(workers, recipe()) == whole.expected(recipe())


async def test_killed_worker(bench: Bench) -> None:
    """A dead worker fails its own job only, and another takes its place."""
    counts = Counts()
    pool = Workers(msgspec.structs.replace(SETTINGS, count=2), counts)
    await pool.start()
    try:
        held = Holding(bench.folder, "held")
        doomed = asyncio.create_task(bench.derive(pool, held.recipe))
        pid = await held.started()
        assert await bench.derive(pool, recipe()) == bench.expected(recipe())
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="SIGKILL"):
            await doomed

        both = [Holding(bench.folder, "left"), Holding(bench.folder, "right")]
        tasks = [asyncio.create_task(bench.derive(pool, each.recipe)) for each in both]
        pids = [await each.started() for each in both]
        assert len({pid, *pids}) == 3
        for each in both:
            await each.release()
        assert await asyncio.gather(*tasks) == [bench.expected(recipe())] * 2
        assert counts.counted == {("worker_restarts", "worker-died"): 1}
    finally:
        await pool.close()


async def test_stuck_worker(bench: Bench) -> None:
    """A job past its time limit is killed and fails as such; the next one is done."""
    pool = Workers(msgspec.structs.replace(SETTINGS, job_timeout_s=1.0))
    await pool.start()
    try:
        held = Holding(bench.folder, "held")
        stuck = asyncio.create_task(bench.derive(pool, held.recipe))
        pid = await held.started()
        with pytest.raises(WorkerTimeout):
            await stuck
        assert not running(pid)
        assert await bench.derive(pool, recipe()) == bench.expected(recipe())
    finally:
        await pool.close()


async def test_memory_limit(bench: Bench) -> None:
    """A job that takes more memory than it may have fails as such; its worker is replaced, and others go on."""
    counts = Counts()
    pool = Workers(msgspec.structs.replace(SETTINGS, job_memory=128 << 20), counts)
    await pool.start()
    try:
        hog = asyncio.create_task(bench.derive(pool, recipe({"op": "hog"})))
        other = asyncio.create_task(bench.derive(pool, recipe()))
        with pytest.raises(WorkerOutOfMemory):
            await hog
        assert await other == bench.expected(recipe())
        assert counts.counted == {("worker_restarts", "worker-out-of-memory"): 1}
    finally:
        await pool.close()


@shared
async def test_op_failure(workers: Workers, bench: Bench) -> None:
    """An op that raises fails its job by the error's type alone: its words may quote what it read."""
    with pytest.raises(WorkerFailed) as caught:
        await bench.derive(workers, recipe({"op": "fail"}))
    assert "ValueError" in str(caught.value)
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    ["ffffffff", "00000004" + b"null".hex(), "00000002" + b"{}".hex() + "00000001" + b"{".hex()],
    ids=["endless", "no reply", "more than one"],
)
@shared
async def test_hostile_answer(workers: Workers, bench: Bench, answer: str) -> None:
    """A worker that says what no worker says is killed; nothing of it reaches the next job."""
    with pytest.raises(WorkerFailed) as caught:
        await bench.derive(workers, recipe({"op": "forge", "answer": answer}))
        await bench.derive(workers, recipe())
    assert type(caught.value) is WorkerFailed
    assert await bench.derive(workers, recipe()) == bench.expected(recipe())


@pytest.mark.parametrize("data", [b"", b"null", b'{"value":["1","2"]}', b'{"value":7}', b'{"failure":{"code":"x"}}'])
def test_answers_are_checked(data: bytes) -> None:
    """An answer of another type than its job's is none."""
    with pytest.raises(msgspec.MsgspecError):
        read_reply(data, Identify(b""))


@pytest.mark.parametrize("code", ["nonsense", "range-not-satisfiable", "triton-refused"])
def test_errors_no_worker_raises(code: str) -> None:
    """An error that a worker cannot raise arrives as a failed worker."""
    data = msgspec.json.encode({"failure": {"code": code, "message": "no"}})
    assert type(read_reply(data, Identify(b""))) is WorkerFailed


async def test_cancel_kills(bench: Bench) -> None:
    """When a cancelled call returns, a job of it that would not end has been killed: nobody writes any more."""
    counts = Counts()
    pool = Workers(SETTINGS, counts)
    await pool.start()
    try:
        held = Holding(bench.folder, "held")
        task = asyncio.create_task(bench.derive(pool, held.recipe))
        pid = await held.started()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not running(pid)
        assert await bench.derive(pool, recipe()) == bench.expected(recipe())
        assert counts.counted == {("worker_restarts", "worker-died"): 1}
    finally:
        await pool.close()


async def test_cancel_waits(bench: Bench) -> None:
    """A job that ends within the grace period keeps its worker; the cancelled call returns only then."""
    pool = Workers(msgspec.structs.replace(SETTINGS, cancel_grace_s=60.0))
    await pool.start()
    try:
        held = Holding(bench.folder, "held")
        task = asyncio.create_task(bench.derive(pool, held.recipe))
        pid = await held.started()
        task.cancel()
        assert not (await asyncio.wait({task}, timeout=0))[0]
        await held.release()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running(pid)
    finally:
        await pool.close()


@shared
async def test_cancel_in_queue(workers: Workers, bench: Bench) -> None:
    """A cancelled job that still waits is never begun: its extent stays as it was."""
    held = Holding(bench.folder, "held")
    async with bench.derivation(workers, recipe()) as work:
        volume = bench.room((await work.plan()).volume.spec.nbytes)
        first = asyncio.create_task(bench.derive(workers, held.recipe))
        await held.started()
        second = asyncio.create_task(work.derive(bench.pack, volume, None))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
    await held.release()
    await first
    await bench.derive(workers, recipe())
    assert set(bench.read(volume)) == {GUARD}


@shared
async def test_priority(workers: Workers, bench: Bench) -> None:
    """A demand that comes after a warm-up is done before it."""
    held, notes = Holding(bench.folder, "held"), bench.folder / "notes"
    warm, demand = (recipe({"op": "note", "path": str(notes), "line": line}) for line in ("warm", "demand"))
    async with bench.derivation(workers, warm) as later, bench.derivation(workers, demand) as sooner:
        for work in (later, sooner):
            await work.plan()
        tasks = [asyncio.create_task(bench.derive(workers, held.recipe))]
        await held.started()
        for chain, work, urgency in ((warm, later, Urgency(10)), (demand, sooner, Urgency(0))):
            with working(urgency):
                tasks.append(asyncio.create_task(bench.derive_planned(chain, work)))
            await asyncio.sleep(0)
        await held.release()
        await asyncio.gather(*tasks)
    assert notes.read_text().split() == ["demand", "warm"]


async def test_what_a_worker_holds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker stands back for the daemon, holds no credentials, maps what it reads read-only, and that for its job."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-workers")
    pool = Workers(SETTINGS)
    await pool.start()
    try:
        held = Holding(bench.folder, "held")
        task = asyncio.create_task(bench.derive(pool, held.recipe))
        pid = await held.started()
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(os.getpriority(os.PRIO_PROCESS, 0) + 5, 19)
        assert "not-for-workers" not in _environment(pid)
        assert _mappings(pid, bench.path) == {"r--s"}
        await held.release()
        await task
        assert not _mappings(pid, bench.path)
    finally:
        await pool.close()


async def test_close(bench: Bench) -> None:
    """Closing kills every worker, stuck ones too; calls that wait, and later ones, fail."""
    pool = Workers(SETTINGS)
    await pool.start()
    held = Holding(bench.folder, "held")
    stuck = asyncio.create_task(bench.derive(pool, held.recipe))
    pid = await held.started()
    waiting = asyncio.create_task(pool.identify(b""))
    await asyncio.sleep(0)
    await pool.close()
    assert not running(pid)
    for task in (stuck, waiting):
        with pytest.raises(WorkerFailed):
            await task
    with pytest.raises(WorkerFailed):
        await pool.identify(b"")
    await pool.close()


async def test_bad_plugin() -> None:
    """A plugin that cannot be loaded stops the start, with its name."""
    pool = Workers(msgspec.structs.replace(SETTINGS, plugins=("tests.cache.faulty_ops:Nothing",)))
    with pytest.raises(ConfigError, match="Nothing"):
        await pool.start()


def test_daemon_killed(bench: Bench) -> None:
    """A worker dies with the daemon, even in the middle of a job that never ends."""
    fifos = [bench.folder / name for name in ("started", "release")]
    for each in fifos:
        os.mkfifo(each)
    program = "import sys; from tests.cache.test_workers import hold_forever; hold_forever(*sys.argv[1:])"
    started = os.open(fifos[0], os.O_RDONLY | os.O_NONBLOCK)
    with subprocess.Popen([sys.executable, "-c", program, *map(str, (bench.folder, *fifos))]) as daemon:
        try:
            assert select.select([started], [], [], 60)[0]
            worker = os.pidfd_open(int(os.read(started, 20)))
        finally:
            daemon.kill()
            os.close(started)
    try:
        assert select.select([worker], [], [], 60)[0]
    finally:
        os.close(worker)


def hold_forever(folder: str, started: str, release: str) -> None:
    """A daemon whose only worker never ends its job."""

    async def run() -> None:
        pool = Workers(SETTINGS)
        await pool.start()
        bench = Bench(Path(folder), objects_of(Path(folder) / "again"))
        await bench.derive(pool, recipe({"op": "hold", "started": started, "release": release}))

    asyncio.run(run())


def _environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


def _mappings(pid: int, path: Path) -> set[str]:
    """The permissions with which a process has mapped a file."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[1] for line in lines if line.endswith(str(path))}
