"""A disk that hangs, fails, is full or has vanished: who asks for a tensor gets it, and the disk comes back."""

import asyncio
import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from cache.errors import AllPinned, ConfigError, CorruptEntry, DiskFailing
from cache.keys import SeriesRef, TensorRef
from cache.nvme import NvmeSettings, NvmeTier
from cache.nvme.disk import page_aligned
from cache.nvme.faults import DiskFaultPlan, FaultyDisk
from tests.cache.walk import KIB, MIB, QUICK, Walk, content, until, walking
from tests.conformance.tier import FakeClock, held, payload_of, tensor

REFS = [SeriesRef("1.2", f"1.2.{number}") for number in range(6)]
OBJECTS = (b"a" * 5000, b"b" * 3000)
DATA = b"".join(OBJECTS)
READS_HANG = DiskFaultPlan(hang=1, methods=("read",))
#: Longer than any deadline here.
LONG = 3600.0


# -- the disk alone


def on_disk(tmp_path: Path, disk: FaultyDisk, what: Callable[[FaultyDisk, int], None]) -> str:
    """What becomes of an operation on a file of 8192 bytes: the name of an error, or ''."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    try:
        what(disk, fd)
    except EOFError:
        return "EOF"
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.close(fd)
    return ""


OPERATIONS: dict[str, Callable[[FaultyDisk, int], None]] = {
    "read": lambda disk, fd: disk.read(fd, page_aligned(8192), 0),
    "write": lambda disk, fd: disk.write(fd, page_aligned(8192), 0),
    "allocate": lambda disk, fd: disk.allocate(fd, 8192),
    "sync": lambda disk, fd: disk.sync(fd),
}


@pytest.mark.parametrize(
    ("plan", "fates"),
    [
        (DiskFaultPlan(), ["", "", "", ""]),
        (DiskFaultPlan(error=1), ["EIO", "EIO", "EIO", "EIO"]),
        (DiskFaultPlan(full=1), ["", "ENOSPC", "ENOSPC", ""]),
        (DiskFaultPlan(short=1), ["EOF", "EIO", "EIO", "EIO"]),
        (DiskFaultPlan(flipped=1), ["", "", "", ""]),
        (DiskFaultPlan(error=1, methods=("sync",)), ["", "", "", "EIO"]),
        (DiskFaultPlan(delay_s=0.001), ["", "", "", ""]),
    ],
)
def test_what_a_plan_does(tmp_path: Path, plan: DiskFaultPlan, fates: list[str]) -> None:
    """Each fault touches the operations it says, and no others."""
    assert [on_disk(tmp_path, FaultyDisk(plan), operation) for operation in OPERATIONS.values()] == fates


def test_a_plan_with_an_end(tmp_path: Path) -> None:
    """After so many calls the disk is well."""
    disk = FaultyDisk(DiskFaultPlan(error=1, times=2))
    assert [on_disk(tmp_path, disk, OPERATIONS["read"]) for _ in range(4)] == ["EIO", "EIO", "", ""]


def test_a_flipped_bit(tmp_path: Path) -> None:
    """A flipped read brings one wrong bit, a flipped write leaves one on the disk."""
    out = page_aligned(8192)
    on_disk(tmp_path, FaultyDisk(DiskFaultPlan(flipped=1)), lambda disk, fd: disk.read(fd, out, 0))
    assert sum(byte.bit_count() for byte in out) == 1
    on_disk(tmp_path, FaultyDisk(DiskFaultPlan(flipped=1)), OPERATIONS["write"])
    assert sum(byte.bit_count() for byte in (tmp_path / "file").read_bytes()) == 1


def test_the_same_seed_has_the_same_faults(tmp_path: Path) -> None:
    """The n-th call meets the same fate in every run of a seed; another seed has others."""

    def run(seed: int) -> list[str]:
        disk = FaultyDisk(DiskFaultPlan(error=0.3, short=0.3), seed)
        return [on_disk(tmp_path, disk, OPERATIONS["read"]) for _ in range(20)]

    assert run(1) == run(1) != run(2)
    assert {"EIO", "EOF", ""} == set(run(1))


# -- the tier


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def disk() -> FaultyDisk:
    """A disk that does as it is told."""
    return FaultyDisk()


@pytest.fixture
async def tier(tmp_path: Path, clock: FakeClock, disk: FaultyDisk) -> AsyncIterator[NvmeTier]:
    """It makes one read at a time."""
    settings = NvmeSettings(str(tmp_path / "cache"), 16 * MIB, threads=1, health=QUICK)
    tier = await NvmeTier.open(settings, clock, disk=disk)
    yield tier
    disk.plan = DiskFaultPlan()
    disk.resume()
    await tier.close()


Hang = Callable[[int, memoryview, Callable[[], None]], Awaitable[None]]


@pytest.fixture
def hang(tier: NvmeTier, clock: FakeClock, disk: FaultyDisk) -> Hang:
    """Have the read of an entry, by its number, hang and be late."""

    async def read(number: int, out: memoryview, freed: Callable[[], None]) -> None:
        disk.plan = READS_HANG
        before = disk.hanging
        reading = asyncio.create_task(tier.read_into(tensor(number, out.nbytes).key, out, freed))
        await asyncio.to_thread(disk.until_hanging, before + 1)
        clock.advance(LONG)
        with pytest.raises(DiskFailing):
            await reading

    return read


async def test_a_late_read_is_left_behind(tier: NvmeTier, disk: FaultyDisk, hang: Hang) -> None:
    """Its caller is let go; the memory it reads to is told free, and the entry unpinned, when it has really ended."""
    entry = tensor(1, 10_000)
    assert await tier.write(entry, payload_of(entry))
    freed: list[bool] = []
    out = page_aligned(entry.nbytes)
    await hang(1, out, lambda: freed.append(True))
    assert freed == []
    assert [resident.pins for resident in tier.residents()] == [1]
    assert not any(out)
    disk.plan = DiskFaultPlan()
    disk.resume()
    await until(lambda: freed == [True])
    assert [resident.pins for resident in tier.residents()] == [0]
    assert await held(tier, entry)


async def test_a_stuck_thread_holds_up_nobody_else(tier: NvmeTier, disk: FaultyDisk, hang: Hang) -> None:
    """With as many reads stuck as are made at a time, others are read all the same."""
    for number in (1, 2, 3):
        assert await tier.write(tensor(number, 10_000), payload_of(tensor(number, 10_000)))
    for number in (1, 2):
        await hang(number, page_aligned(10_000), lambda: None)
    disk.plan = DiskFaultPlan()  # those that hang stay
    assert await held(tier, tensor(3, 10_000))


async def test_a_cancelled_read_is_left_behind(tier: NvmeTier, disk: FaultyDisk) -> None:
    """Who is cancelled is let go at once, though the disk hangs; the memory is told free later."""
    entry = tensor(1, 10_000)
    assert await tier.write(entry, payload_of(entry))
    freed: list[bool] = []
    disk.plan = READS_HANG
    reading = asyncio.create_task(tier.read_into(entry.key, page_aligned(10_000), lambda: freed.append(True)))
    await asyncio.to_thread(disk.until_hanging)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert freed == []
    disk.resume()
    await until(lambda: freed == [True])


async def test_memory_is_told_free_once_whatever_happens(tier: NvmeTier, disk: FaultyDisk) -> None:
    """Absent, of a wrong length, corrupt: the memory is free by the time of the error. A success is not told."""
    entry = tensor(1, 10_000)
    assert await tier.write(entry, payload_of(entry))
    freed: list[str] = []
    await tier.read_into(entry.key, page_aligned(10_000), lambda: freed.append("success"))
    with pytest.raises(KeyError):
        await tier.read_into(tensor(2, 1).key, page_aligned(1), lambda: freed.append("absent"))
    with pytest.raises(ValueError, match="10000"):
        await tier.read_into(entry.key, page_aligned(1), lambda: freed.append("length"))
    disk.plan = DiskFaultPlan(flipped=1, methods=("read",))
    with pytest.raises(CorruptEntry):
        await tier.read_into(entry.key, page_aligned(10_000), lambda: freed.append("corrupt"))
    assert freed == ["absent", "length", "corrupt"]


async def test_writes_that_wait_behind_a_stuck_one_end(tier: NvmeTier, clock: FakeClock, disk: FaultyDisk) -> None:
    """A write the disk holds keeps its memory; those behind it are refused once the disk fails, and let theirs go."""
    disk.plan = DiskFaultPlan(hang=1, methods=("write",))
    entries = [tensor(number, 10_000) for number in range(3)]
    first, *behind = [asyncio.create_task(tier.write(entry, payload_of(entry))) for entry in entries]
    await asyncio.to_thread(disk.until_hanging)
    while tier.takes_writes:
        clock.advance(LONG)
        await asyncio.sleep(0.005)  # the tier looks every two milliseconds, and once is not enough
    assert await asyncio.gather(*behind) == [False, False]
    assert not first.done()
    with pytest.raises(DiskFailing):
        await tier.reserve("serving", 1000, "tensor")
    disk.plan = DiskFaultPlan()
    disk.resume()
    assert await first
    await until(lambda: tier.takes_writes)
    assert await tier.write(entries[1], payload_of(entries[1]))
    assert (await tier.check()).problems == ()


@pytest.mark.parametrize("plan", [DiskFaultPlan(error=1), DiskFaultPlan(full=1)], ids=["EIO", "ENOSPC"])
async def test_a_disk_that_takes_no_writes_is_left_alone(tier: NvmeTier, disk: FaultyDisk, plan: DiskFaultPlan) -> None:
    """After a few refused writes no more are tried; a probe that goes well ends that. Reads go on all the while."""
    entry = tensor(0, 10_000)
    assert await tier.write(entry, payload_of(entry))
    disk.plan = DiskFaultPlan(error=plan.error, full=plan.full, methods=("write", "allocate", "sync"))
    for number in range(1, 4):
        assert tier.takes_writes
        assert not await tier.write(tensor(number, 1000), payload_of(tensor(number, 1000)))
    assert not tier.takes_writes
    tried = disk.calls["allocate"]
    assert await held(tier, entry)
    await until(lambda: disk.calls["allocate"] > tried)  # probes
    assert not tier.takes_writes
    disk.plan = DiskFaultPlan()
    await until(lambda: tier.takes_writes)
    assert await tier.write(tensor(1, 1000), payload_of(tensor(1, 1000)))
    assert (await tier.check()).problems == ()


async def test_a_folder_that_vanished_comes_back(tier: NvmeTier) -> None:
    """Where the whole folder has gone (unmounted, moved) nothing is dropped from the index: it may come back."""
    entry = tensor(1, 10_000)
    assert await tier.write(entry, payload_of(entry))
    root = tier._folder.root
    away = root.with_name("away")
    root.rename(away)
    for _ in range(QUICK.strikes):
        with pytest.raises(DiskFailing):
            await tier.read_into(entry.key, page_aligned(10_000), lambda: None)
    assert not await tier.write(tensor(2, 1000), payload_of(tensor(2, 1000)))
    assert tier.lookup(entry.key) == entry
    away.rename(root)
    await until(lambda: tier.health["read"].name != "FAILING")
    assert await held(tier, entry)


# -- a filesystem that is full or read-only: a real one where this user may mount one


class Mounted:
    """A small tmpfs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        with (self.path / "other").open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(MIB))
                file.flush()

    def read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)

    def mend(self) -> None:
        subprocess.run(["mount", "-o", "remount,rw", self.path], check=True)
        (self.path / "other").unlink(missing_ok=True)


class Pretended:
    """A folder whose disk does as if."""

    def __init__(self, path: Path, disk: FaultyDisk) -> None:
        self.path = path
        self._disk = disk

    def fill(self) -> None:
        self._disk.plan = DiskFaultPlan(full=1)

    def read_only(self) -> None:
        self._disk.plan = DiskFaultPlan(error=1, methods=("write", "allocate", "sync"))

    def mend(self) -> None:
        self._disk.plan = DiskFaultPlan()


@pytest.fixture
def filesystem(tmp_path: Path, disk: FaultyDisk) -> Iterator[Mounted | Pretended]:
    path = tmp_path / "mounted"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        yield Pretended(path, disk)
        return
    try:
        yield Mounted(path)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.parametrize("trouble", ["fill", "read_only"])
async def test_a_filesystem_that_takes_nothing(
    filesystem: Mounted | Pretended, clock: FakeClock, disk: FaultyDisk, trouble: str
) -> None:
    """Full, or mounted read-only under the daemon: reads go on, writes are left alone, until it is mended."""
    settings = NvmeSettings(str(filesystem.path / "cache"), 16 * MIB, health=QUICK)
    tier = await NvmeTier.open(settings, clock, disk=disk)
    try:
        entry, large = tensor(1, 10_000), tensor(2, 6 * MIB)
        assert await tier.write(entry, payload_of(entry))
        getattr(filesystem, trouble)()
        while tier.takes_writes:
            assert not await tier.write(large, payload_of(large))
        assert await held(tier, entry)
        filesystem.mend()
        await until(lambda: tier.takes_writes)
        assert await tier.write(large, payload_of(large))
        assert await held(tier, large)
        assert (await tier.check()).problems == ()
    finally:
        await tier.close()


async def test_a_filesystem_smaller_than_the_budget(tmp_path: Path, clock: FakeClock) -> None:
    """A budget that the filesystem can never hold is a mistake in the settings, told at start."""
    found = os.statvfs(tmp_path)
    size = found.f_blocks * found.f_frsize
    with pytest.raises(ConfigError, match=rf"{size} bytes.*lower nvme\.budget"):
        await NvmeTier.open(NvmeSettings(str(tmp_path / "cache"), size + 1), clock)


# -- the walk


@pytest.fixture
async def walk(tmp_path: Path) -> AsyncIterator[Walk]:
    """A store whose series are on NVMe, and not in RAM."""
    async with walking(tmp_path, ram=128 * KIB, nvme=8 * MIB) as walk:
        for ref in REFS:
            walk.archive.write(ref, OBJECTS)
            assert (await walk.get(ref))[0] == "origin"
            await walk.settled()
            walk.evict_ram(ref)
        yield walk
        walk.heal()


async def asked(walk: Walk, ref: SeriesRef) -> str:
    """The tier that answers, whatever the disk does, the clock moving on past every deadline."""
    asking = asyncio.create_task(walk.get(ref))
    while not asking.done():
        walk.clock.advance(LONG)
        await asyncio.wait([asking], timeout=0.005)
    tier, data = await asking
    assert data == DATA
    return tier


async def test_a_disk_that_hangs_degrades_to_the_origin_and_comes_back(walk: Walk) -> None:
    """Slow at the first late read, failing at the third, out when it stays so: every request is answered by the
    origin meanwhile, a hit in RAM never waits, and once probes go well the disk answers again."""
    in_ram = REFS[0]
    assert (await walk.get(in_ram))[0] == "nvme"
    walk.disk.plan = DiskFaultPlan(hang=1)
    assert [await asked(walk, ref) for ref in REFS[1:]] == ["origin"] * 5
    assert (await walk.get(in_ram))[0] == "ram"
    while walk.states[-1] != "read out":
        walk.clock.advance(LONG)
        await asyncio.sleep(0.002)  # the tier looks as often, and once is not enough
    assert [state for state in walk.states if state.startswith("read")] == ["read slow", "read failing", "read out"]
    walk.heal()
    await until(lambda: walk.nvme.health["read"].name == "SLOW")
    await walk.settled()
    for ref in REFS[1:]:
        walk.evict_ram(ref)
        assert (await walk.get(ref))[0] == "nvme"
    assert walk.nvme.health["read"].name == "HEALTHY"


async def test_requests_while_a_read_is_stuck(walk: Walk) -> None:
    """The memory that a stuck read may still write to is nobody else's until it has ended."""
    walk.disk.plan = READS_HANG
    held = []
    for ref in REFS[:3]:
        assert await asked(walk, ref) == "origin"
        held.append(await walk.store.get(TensorRef(ref, "plain")))
    used = walk.ram.usage("serving").used
    assert used > 3 * 8192  # what the reads still hold beside what is leased
    walk.disk.plan = DiskFaultPlan()
    walk.disk.resume()
    await until(lambda: walk.ram.usage("serving").used == 3 * 8192)
    for outcome in held:
        assert await content(outcome) == DATA
        outcome.release()


async def test_nobody_waits_for_memory_that_a_stuck_read_holds(tmp_path: Path) -> None:
    """Where it is needed, and all else is pinned, the request is refused at once: the disk may hang for ever."""
    objects = [bytes([7]) * 24 * KIB]
    async with walking(tmp_path, ram=64 * KIB, nvme=8 * MIB, shares={"serving": 1.0}) as walk:
        for ref in REFS[:2]:
            walk.archive.write(ref, objects)
            await walk.get(ref)
            await walk.settled()
            walk.evict_ram(ref)
        held = await walk.store.get(TensorRef(REFS[1], "plain"))
        walk.disk.plan = READS_HANG
        asking = asyncio.create_task(walk.get(REFS[0], "turned"))  # made of the pack, which is on the disk
        await asyncio.to_thread(walk.disk.until_hanging)
        while not asking.done():
            walk.clock.advance(LONG)
            await asyncio.wait([asking], timeout=0.005)
        with pytest.raises(AllPinned):
            await asking
        assert walk.store._places.passing > 0  # the read still holds it
        walk.heal()
        await until(lambda: walk.store._places.passing == 0)
        assert (await walk.get(REFS[0], "turned"))[0] == "origin"
        held.release()


@pytest.mark.parametrize("plan", [DiskFaultPlan(error=1), DiskFaultPlan(short=1), DiskFaultPlan(flipped=1)])
async def test_a_disk_that_reads_wrongly_is_not_believed(walk: Walk, plan: DiskFaultPlan) -> None:
    """Errors, short reads and wrong bits: the request is answered by the origin, with the right bytes."""
    walk.disk.plan = plan
    for ref in REFS:
        tier, data = await walk.get(ref)
        assert (tier, data) == ("origin", DATA)
