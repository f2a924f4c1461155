"""The NVMe tier: standard files, a budget that holds, every read verified, and recovery from anything."""

import asyncio
import errno
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from cache.arena import Arena
from cache.entry import CHUNK, DType, Entry
from cache.errors import AllPinned, ConfigError, CorruptEntry, TooLarge, UnknownNamespace
from cache.interfaces import Extent
from cache.keys import Manifest, SeriesRef, SourceObject
from cache.nvme import NvmeSettings, NvmeTier
from cache.nvme.disk import Disk, page_aligned
from cache.nvme.head import FORMAT, head_nbytes
from cache.pack import Layout
from tests.cache.walk import until
from tests.conformance.tier import FakeClock, TierConformance, held, pack, payload_of, tensor

MIB = 1 << 20


def settings_for(path: Path, budget: int = 16 * MIB, **changes: object) -> NvmeSettings:
    base = NvmeSettings(str(path / "cache"), budget, {"serving": 0.8, "staging": 0.2})
    return msgspec.structs.replace(base, **changes)


@asynccontextmanager
async def opened(settings: NvmeSettings, clock: FakeClock | None = None) -> AsyncIterator[NvmeTier]:
    tier = await NvmeTier.open(settings, clock or FakeClock())
    try:
        yield tier
    finally:
        await tier.close()


@pytest.fixture
def settings(tmp_path: Path) -> NvmeSettings:
    return settings_for(tmp_path)


@pytest.fixture
async def tier(settings: NvmeSettings) -> AsyncIterator[NvmeTier]:
    async with opened(settings) as tier:
        yield tier
        report = await tier.check()
        assert report.problems == ()


def file_of(settings: NvmeSettings, entry: Entry) -> Path:
    suffix = "tar" if entry.key.kind == "pack" else "safetensors"
    return Path(settings.path) / "entries" / f"{entry.key.digest}.{suffix}"


def du(folder: Path) -> int:
    """What ``du`` says: allocated bytes of the folder and all below."""
    found = subprocess.run(["du", "-s", "-B1", folder], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[0])


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


class TestConformance(TierConformance):
    @pytest.fixture
    def tier(self, tier: NvmeTier) -> NvmeTier:
        return tier


class TestConformanceBuffered(TierConformance):
    @pytest.fixture
    async def tier(self, tmp_path: Path) -> AsyncIterator[NvmeTier]:
        async with opened(settings_for(tmp_path, direct=False, threads=1)) as tier:
            yield tier


# -- standard files


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64"],
)
async def test_a_tensor_is_plain_safetensors(tier: NvmeTier, settings: NvmeSettings, dtype: DType) -> None:
    """The public library reads our file: the same array, named ``tensor``, with our description beside it."""
    entry = tensor(1, 4000, dtype=dtype)
    assert entry.spec is not None
    array = np.arange(entry.spec.shape[0]).reshape(entry.spec.shape).astype(dtype)
    assert await tier.write(entry, memoryview(array.tobytes()))
    found = safetensors.numpy.load_file(file_of(settings, entry))
    assert found.keys() == {"tensor"}
    assert found["tensor"].dtype == dtype
    np.testing.assert_array_equal(found["tensor"], array)
    with safetensors.safe_open(file_of(settings, entry), "np") as file:
        assert entry.key.series in file.metadata()["voxcache"]


async def test_a_pack_is_plain_tar(tier: NvmeTier, settings: NvmeSettings) -> None:
    """``tar`` reads our file: our description first, then each object of the series, then room for their index."""
    objects = [SourceObject(f"s/{number}", size, f"e{number}") for number, size in enumerate((700, 512, 0, 5000))]
    layout = Layout.of(Manifest.of(SeriesRef("1.2", "1.3"), objects))
    payload = memoryview(bytearray(layout.nbytes))
    layout.frame(payload)
    for member in layout.members:
        payload[member.offset : member.offset + member.nbytes] = b"x" * member.nbytes
    entry = pack(1, layout.nbytes)
    assert await tier.write(entry, payload)
    with tarfile.open(file_of(settings, entry)) as archive:
        assert archive.getnames() == [
            "voxcache.json",
            *(f"{number:05d}.dcm" for number in range(4)),
            "headers.index",
        ]
        assert [member.size for member in archive.getmembers()[1:]] == [700, 512, 0, 5000, layout.index.nbytes]
        assert msgspec.json.decode(archive.extractfile("voxcache.json").read())["format"] == FORMAT  # type: ignore[union-attr] # a regular member


async def test_payloads_are_page_aligned(tier: NvmeTier, settings: NvmeSettings) -> None:
    """A payload starts at a page, at a place that its size alone decides, however many chunks it has."""
    for nbytes in (1, CHUNK, 2 * CHUNK + 1):
        entry = tensor(nbytes, nbytes)
        assert await tier.write(entry, payload_of(entry))
        head = head_nbytes(nbytes)
        assert head % 4096 == 0
        assert file_of(settings, entry).read_bytes()[head:] == payload_of(entry)


async def test_files_are_private(tier: NvmeTier, settings: NvmeSettings) -> None:
    """Nobody but the daemon's user reads files or folders."""
    entry = tensor(1, 10)
    assert await tier.write(entry, payload_of(entry))
    for path in (file_of(settings, entry), *file_of(settings, entry).parents[:2]):
        assert path.stat().st_mode & 0o077 == 0


async def test_a_description_too_long_is_no_entry(tier: NvmeTier) -> None:
    """A lineage that does not fit the head refuses its own entry only."""
    entry = tensor(1, 1000)
    lineage = msgspec.structs.replace(entry.lineage, recipe="x" * 20_000)
    assert not await tier.write(msgspec.structs.replace(entry, lineage=lineage), payload_of(entry))
    assert tier.usage("serving").used == 0
    assert await tier.write(entry, payload_of(entry))


# -- moving bytes


async def test_several_chunks_straight_into_the_arena(tier: NvmeTier) -> None:
    """Payloads of several chunks, and a broken last page, arrive in shared memory by direct I/O as they left it."""
    arena = Arena.create(16 * MIB)
    try:
        for number, nbytes in enumerate((2 * CHUNK, CHUNK + 5, CHUNK - 4096)):
            entry = tensor(number, nbytes)
            source = arena.view(Extent(arena.path, 0, nbytes))
            target = arena.view(Extent(arena.path, 3 * CHUNK, nbytes)) if nbytes < CHUNK else page_aligned(nbytes)
            source[:] = payload_of(entry)
            assert await tier.write(entry, source)
            await tier.read_into(entry.key, target)
            assert target == source
            assert tier.evict(entry.key)
    finally:
        arena.close()


@pytest.mark.parametrize("shift", [0, 1])
def test_direct_and_buffered_are_the_same(tmp_path: Path, shift: int) -> None:
    """Direct or buffered, aligned or not: the same bytes reach the disk and come back."""
    data = np.random.default_rng(1).bytes(3 * 4096 + 77)
    for number, (out, back) in enumerate(((True, False), (False, True), (True, True))):
        buffer = page_aligned(len(data) + shift)[shift:]
        buffer[:] = data
        fd = os.open(tmp_path / str(number), os.O_RDWR | os.O_CREAT)
        try:
            Disk(direct=out).write(fd, buffer, 4096)
            again = page_aligned(len(data) + shift)[shift:]
            Disk(direct=back).read(fd, again, 4096)
            assert again == data
            with pytest.raises(EOFError):
                Disk(direct=back).read(fd, page_aligned(4 * 4096), 4096)
        finally:
            os.close(fd)


def test_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that refuses direct I/O is used without it, and asked once."""
    real, refused = os.preadv, []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.O_DIRECT & fcntl_flags(fd):
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    (tmp_path / "file").write_bytes(b"a" * 8192)
    disk = Disk(direct=True)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        for _ in range(2):
            out = page_aligned(8192)
            disk.read(fd, out, 0)
            assert out == b"a" * 8192
    finally:
        os.close(fd)
    assert refused == [0]


def fcntl_flags(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL)


async def test_reading_in_parts(tier: NvmeTier) -> None:
    """Any range comes in verified parts; the entry stays until the reader is done with it."""
    entry = tensor(1, 2 * CHUNK + 1000)
    assert await tier.write(entry, payload_of(entry))
    payload = tier.open_payload(entry.key)
    for start, stop in (
        (0, None),
        (0, 10),
        (CHUNK - 3, CHUNK + 3),
        (CHUNK, 2 * CHUNK),
        (5, 5),
        (2 * CHUNK + 999, None),
    ):
        parts = [bytes(part) async for part in payload.chunks(start, stop)]
        assert b"".join(parts) == payload_of(entry)[start:stop]
    with pytest.raises(ValueError, match="not within"):
        [part async for part in payload.chunks(0, entry.nbytes + 1)]
    assert not tier.evict(entry.key)
    other = payload.share()
    payload.release()
    payload.release()
    assert not tier.evict(entry.key)
    other.release()
    assert [resident.pins for resident in tier.residents()] == [0]
    assert tier.evict(entry.key)
    with pytest.raises(KeyError):
        tier.open_payload(entry.key)


async def test_a_cancelled_read_touches_its_target_no_more(tier: NvmeTier) -> None:
    """Once the caller has its cancellation, no thread writes to the memory it gave."""
    entry = tensor(1, 3 * CHUNK)
    assert await tier.write(entry, payload_of(entry))
    out = page_aligned(entry.nbytes)
    reading = asyncio.create_task(tier.read_into(entry.key, out))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    out[:] = bytes(entry.nbytes)
    assert await held(tier, entry)
    assert not any(out)


# -- spaces: files that workers fill


async def fill(tier: NvmeTier, entry: Entry) -> None:
    space = await tier.reserve(entry.key.namespace, entry.nbytes, entry.key.kind)
    write_at(space.extent, payload_of(entry))
    await tier.commit(entry, space)


def write_at(extent: Extent, data: memoryview) -> None:
    """As a worker does: by path and offset alone."""
    with Path(extent.path).open("r+b") as file:
        file.seek(extent.offset)
        file.write(data)


async def test_another_process_fills_a_space(settings: NvmeSettings) -> None:
    """What is written at the extent of a space, by whomever, becomes the entry, and outlives a restart."""
    entries = (tensor(1, CHUNK + 100), pack(1, 5000))
    async with opened(settings) as tier:
        for entry in entries:
            await fill(tier, entry)
            assert await held(tier, entry)
    async with opened(settings) as tier:
        for entry in entries:
            assert await held(tier, entry)


async def test_the_view_of_a_space_is_its_file(tier: NvmeTier) -> None:
    """The daemon itself can fill a space through its view; a space of nothing has a view of nothing."""
    entry = tensor(1, 10_000)
    space = await tier.reserve("serving", entry.nbytes, "tensor")
    space.view[:] = payload_of(entry)
    await tier.commit(entry, space)
    space.release()
    assert await held(tier, entry)
    empty = await tier.reserve("serving", 0, "tensor")
    assert len(empty.view) == 0
    empty.release()


async def test_a_released_space_leaves_nothing(tier: NvmeTier, settings: NvmeSettings) -> None:
    """Giving a space back removes its file and its charge; it cannot become an entry any more."""
    before = tier.usage()
    space = await tier.reserve("serving", MIB, "tensor")
    assert tier.usage("serving").used > MIB
    space.release()
    space.release()
    assert tier.usage() == before
    assert (await tier.check()).problems == ()
    assert not list((Path(settings.path) / "tmp").iterdir())
    with pytest.raises(ValueError, match="released"):
        await tier.commit(tensor(1, MIB), space)


async def test_a_cancelled_reservation_leaves_nothing(tier: NvmeTier) -> None:
    """A space that nobody waits for any more is given back."""
    before = tier.usage()
    reserving = asyncio.create_task(tier.reserve("serving", MIB, "tensor"))
    await asyncio.sleep(0)
    reserving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reserving
    assert tier.usage() == before


async def test_committing_what_is_held(tier: NvmeTier) -> None:
    """Of two makers of one entry the second's space is given back."""
    entry = tensor(1, 5000)
    await asyncio.gather(fill(tier, entry), fill(tier, entry))
    assert tier.usage().entries == 1
    assert await held(tier, entry)


async def test_a_space_is_of_its_entry(tier: NvmeTier) -> None:
    """A space of another size does not become an entry."""
    space = await tier.reserve("serving", 1000, "tensor")
    with pytest.raises(ValueError, match="not the entry's"):
        await tier.commit(tensor(1, 999), space)


async def test_refusals(tier: NvmeTier) -> None:
    """A reservation that cannot be is refused by name, and nothing is evicted for it."""
    size = tier.usage("serving").budget // 3
    entries = [tensor(number, size) for number in range(2)]
    for entry in entries:
        assert await tier.write(entry, payload_of(entry))
    readers = [tier.open_payload(entry.key) for entry in entries]
    with pytest.raises(AllPinned):
        await tier.reserve("serving", size, "tensor")
    with pytest.raises(TooLarge):
        await tier.reserve("serving", tier.usage("serving").budget, "tensor")
    with pytest.raises(UnknownNamespace):
        await tier.reserve("elsewhere", 1, "tensor")
    assert not await tier.write(tensor(2, size), payload_of(tensor(2, size)))
    assert tier.usage().entries == 2
    for reader in readers:
        reader.release()
    (await tier.reserve("serving", size, "tensor")).release()


# -- recovery


async def test_a_restart_finds_everything(settings: NvmeSettings) -> None:
    """Entries, their descriptions, their cost in the ledger and the order of use outlive the process."""
    clock = FakeClock()
    size = 2 * MIB
    entries = [tensor(number, size) for number in range(5)]
    async with opened(settings, clock) as tier:
        for entry in entries:
            clock.advance(1)
            assert await tier.write(entry, payload_of(entry))
        clock.advance(1)
        assert await held(tier, entries[0])
        before = tier.usage("serving").used
    async with opened(settings, clock) as tier:
        assert [tier.lookup(entry.key) for entry in entries] == entries
        assert tier.usage("serving").used == before
        for number in range(5, 7):
            assert await tier.write(tensor(number, size), payload_of(tensor(number, size)))
        assert await held(tier, entries[0])
        assert tier.lookup(entries[1].key) is None
        assert (await tier.check()).problems == ()


async def test_one_daemon_a_folder(settings: NvmeSettings) -> None:
    """A second daemon does not start on the folder of the first, and does it no harm."""
    async with opened(settings) as tier:
        space = await tier.reserve("serving", 1000, "tensor")
        with pytest.raises(ConfigError, match="another daemon"):
            await NvmeTier.open(settings, FakeClock())
        await tier.commit(tensor(1, 1000), space)
    async with opened(settings):
        pass


async def test_a_smaller_budget(settings: NvmeSettings, tmp_path: Path) -> None:
    """A budget that was lowered holds from the start; the longest unused go."""
    clock = FakeClock()
    entries = [tensor(number, MIB) for number in range(10)]
    async with opened(settings, clock) as tier:
        for entry in entries:
            clock.advance(1)
            assert await tier.write(entry, payload_of(entry))
    async with opened(settings_for(tmp_path, budget=6 * MIB), clock) as tier:
        assert du(Path(settings.path)) <= 6 * MIB
        kept = [entry for entry in entries if await held(tier, entry)]
        assert kept
        assert kept == entries[-len(kept) :]
        assert (await tier.check()).problems == ()


async def test_a_namespace_that_is_no_more(settings: NvmeSettings, tmp_path: Path) -> None:
    """Entries of a namespace without a share are removed: nobody can ask for them."""
    async with opened(settings) as tier:
        for entry in (tensor(1, 1000), tensor(2, 1000, "staging")):
            assert await tier.write(entry, payload_of(entry))
    async with opened(settings_for(tmp_path, namespaces={"serving": 1.0})) as tier:
        assert [resident.key for resident in tier.residents()] == [tensor(1, 1000).key]
        assert not file_of(settings, tensor(2, 1000, "staging")).exists()


@pytest.mark.parametrize("budget", [0, 4096, 40_000])
async def test_a_budget_for_nothing(tmp_path: Path, budget: int) -> None:
    """A budget that its own folders use up is a mistake in the settings."""
    with pytest.raises(ConfigError, match="leaves nothing"):
        await NvmeTier.open(settings_for(tmp_path, budget=budget), FakeClock())


async def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    """A path that is no folder is a mistake in the settings."""
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        await NvmeTier.open(settings_for(tmp_path), FakeClock())


@pytest.mark.parametrize("where", ["length", "json", "padding", "meta"])
@pytest.mark.parametrize("kind", ["tensor", "pack"])
async def test_a_flipped_bit_in_the_head(settings: NvmeSettings, kind: str, where: str) -> None:
    """A head that changed by a bit is found at start: its file is set aside and its entry gone."""
    entry = tensor(1, 5000) if kind == "tensor" else pack(1, 5000)
    other = tensor(2, 5000)
    async with opened(settings) as tier:
        for each in (entry, other):
            assert await tier.write(each, payload_of(each))
    path = file_of(settings, entry)
    start = 0 if kind == "tensor" else 124
    at = {"length": start + 1, "json": 600, "padding": 16_000, "meta": path.read_bytes().index(b"cost_s") + 10}
    flip(path, at[where])
    async with opened(settings) as tier:
        assert tier.lookup(entry.key) is None
        assert await held(tier, other)
        assert not path.exists()
        assert len(list((Path(settings.path) / "quarantine").iterdir())) == 1
        assert await tier.write(entry, payload_of(entry))
        assert await held(tier, entry)
        assert (await tier.check()).problems == ()


@pytest.mark.parametrize("size", [0, 7, 4096, 16 << 10, (16 << 10) + 4999])
async def test_a_file_cut_short(settings: NvmeSettings, size: int) -> None:
    """A file that lost its end is no entry any more."""
    entry = tensor(1, 5000)
    async with opened(settings) as tier:
        assert await tier.write(entry, payload_of(entry))
    os.truncate(file_of(settings, entry), size)
    async with opened(settings) as tier:
        assert tier.lookup(entry.key) is None
        assert (await tier.check()).problems == ()


async def test_another_entrys_file(settings: NvmeSettings) -> None:
    """A file under another entry's name is not taken for it."""
    entry, other = tensor(1, 5000), tensor(2, 5000)
    async with opened(settings) as tier:
        assert await tier.write(entry, payload_of(entry))
    file_of(settings, entry).rename(file_of(settings, other))
    async with opened(settings) as tier:
        assert tier.usage().entries == 0


async def test_foreign_files_are_counted_and_left_alone(settings: NvmeSettings) -> None:
    """What is not ours is never removed, and what it takes is not ours to fill."""
    root = Path(settings.path)
    (root / "entries" / "lost").mkdir(parents=True)
    foreign = [root / "entries" / "notes.txt", root / "entries" / "lost" / "found", root / "catalog.sqlite"]
    for path in foreign:
        path.write_bytes(bytes(MIB))
    async with opened(settings) as tier:
        await crowd(tier, 3 * MIB // 2)
        assert du(root) <= settings.budget
        assert (await tier.check(repair=True)).problems == ()
    assert all(path.exists() for path in foreign)


async def crowd(tier: NvmeTier, size: int) -> None:
    for number in range(20):
        entry = tensor(100 + number, size)
        assert await tier.write(entry, payload_of(entry))


async def test_a_format_from_the_future(tmp_path: Path) -> None:
    """Files of another format are not read; they stay until their room is needed."""
    settings = settings_for(tmp_path, namespaces={"serving": 1.0})
    entry = tensor(1, MIB)
    async with opened(settings) as tier:
        assert await tier.write(entry, payload_of(entry))
    path = file_of(settings, entry)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{\\"format\\":1', b'{\\"format\\":2', 1))
    async with opened(settings) as tier:
        assert tier.lookup(entry.key) is None
        assert path.exists()
        assert not list((Path(settings.path) / "quarantine").iterdir())
        await crowd(tier, 3 * MIB // 2)
        assert du(Path(settings.path)) <= settings.budget
        assert not path.exists()


KILLED = """
import asyncio, sys
from cache.interfaces import SystemClock
from cache.nvme import NvmeSettings, NvmeTier
from tests.conformance.tier import payload_of, tensor

async def main():
    tier = await NvmeTier.open(NvmeSettings(sys.argv[1], 16 << 20, {"serving": 0.8, "staging": 0.2}), SystemClock())
    space = await tier.reserve("serving", 100_000, "tensor")
    number = 0
    while True:
        entry = tensor(number, 700_000 + number)
        assert await tier.write(entry, payload_of(entry))
        print(number, flush=True)
        number += 1

asyncio.run(main())
"""


def kill_after(settings: NvmeSettings, written: int) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, settings.path], stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        for _ in range(written + 1):
            assert daemon.stdout.readline()
        daemon.send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 20])
async def test_kill_9_while_writing(settings: NvmeSettings, after: int) -> None:
    """After a kill at any instant, every entry there is whole, temporaries are gone and the budget holds."""
    kill_after(settings, after)
    assert du(Path(settings.path)) <= settings.budget
    async with opened(settings) as tier:
        assert not list((Path(settings.path) / "tmp").iterdir())
        assert await held(tier, tensor(after, 700_000 + after))
        report = await tier.check()
        assert report.problems == ()
        assert report.entries >= min(after + 1, 12)


# -- decay


async def test_a_flipped_bit_in_the_payload(tier: NvmeTier, settings: NvmeSettings) -> None:
    """A read never gives out wrong bytes: the entry is gone, its file set aside, and it can be written again."""
    for nbytes, at in ((5000, 4999), (3 * CHUNK, 2 * CHUNK + 17)):
        entry = tensor(nbytes, nbytes)
        assert await tier.write(entry, payload_of(entry))
        flip(file_of(settings, entry), head_nbytes(nbytes) + at)
        with pytest.raises(CorruptEntry, match=entry.key.series):
            await tier.read_into(entry.key, memoryview(bytearray(nbytes)))
        assert tier.lookup(entry.key) is None
        assert not file_of(settings, entry).exists()
        with pytest.raises(KeyError):
            await tier.read_into(entry.key, memoryview(bytearray(nbytes)))
        assert await tier.write(entry, payload_of(entry))
        assert await held(tier, entry)
    assert tier.corrupted == 2
    # the large one is larger than the quarantine
    assert len(list((Path(settings.path) / "quarantine").iterdir())) == 1


async def test_parts_before_a_bad_one_are_right(tier: NvmeTier, settings: NvmeSettings) -> None:
    """A reader in parts gets the good ones, then the error, never the bad one."""
    entry = tensor(1, 2 * CHUNK)
    assert await tier.write(entry, payload_of(entry))
    flip(file_of(settings, entry), head_nbytes(entry.nbytes) + CHUNK)
    payload = tier.open_payload(entry.key)
    parts = []
    with pytest.raises(CorruptEntry):
        async for part in payload.chunks():
            parts.append(bytes(part))  # noqa: PERF401 - a comprehension would lose those before the error
    assert parts == [payload_of(entry)[:CHUNK]]
    payload.release()


async def test_several_readers_of_a_bad_entry(tier: NvmeTier, settings: NvmeSettings) -> None:
    """Each of them is told; the entry is dropped once."""
    entry = tensor(1, 5000)
    assert await tier.write(entry, payload_of(entry))
    flip(file_of(settings, entry), head_nbytes(5000))
    outs = [memoryview(bytearray(5000)) for _ in range(4)]
    outcomes = await asyncio.gather(*(tier.read_into(entry.key, out) for out in outs), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [CorruptEntry] * 4
    assert tier.corrupted == 1
    assert tier.usage("serving").used == 0


async def test_a_file_that_vanished(tier: NvmeTier, settings: NvmeSettings) -> None:
    """A file somebody removed is a broken entry, not a broken daemon."""
    entry = tensor(1, 5000)
    assert await tier.write(entry, payload_of(entry))
    file_of(settings, entry).unlink()
    with pytest.raises(CorruptEntry):
        await tier.read_into(entry.key, memoryview(bytearray(5000)))
    assert await tier.write(entry, payload_of(entry))
    assert await held(tier, entry)


async def test_the_quarantine_is_bounded(tmp_path: Path) -> None:
    """Broken files are kept within their share, in number and size; the oldest go."""
    settings = settings_for(tmp_path, quarantine=0.05)
    clock = FakeClock()
    async with opened(settings, clock) as tier:
        for number in range(30):
            clock.advance(1)
            entry = tensor(number, 50_000)
            assert await tier.write(entry, payload_of(entry))
            flip(file_of(settings, entry), head_nbytes(50_000) + number)
            with pytest.raises(CorruptEntry):
                await tier.read_into(entry.key, memoryview(bytearray(50_000)))
        assert (await tier.check()).problems == ()
        kept = sorted(path.name for path in (Path(settings.path) / "quarantine").iterdir())
        assert 10 <= len(kept) <= 16
        assert kept[-1].endswith(f"{tensor(29, 50_000).key.digest}.safetensors")
    async with opened(settings, clock) as tier:
        assert sorted(path.name for path in (Path(settings.path) / "quarantine").iterdir()) == kept


# -- faults of the disk


@pytest.mark.parametrize("call", ["posix_fallocate", "fdatasync", "pwritev"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_refuses(
    tier: NvmeTier, settings: NvmeSettings, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """A disk that is full or fails costs the write, nothing else; the next one succeeds."""
    entry = tensor(1, 100_000)
    before = tier.usage()

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert not await tier.write(entry, payload_of(entry))
        with pytest.raises(AllPinned):
            await fill(tier, entry)
    assert tier.failed_writes == 2
    assert tier.usage() == before
    assert (await tier.check()).problems == ()
    assert not list((Path(settings.path) / "tmp").iterdir())
    assert await tier.write(entry, payload_of(entry))


async def test_what_cannot_be_removed_stays_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the victims' files cannot be unlinked, nothing is written in their place."""
    settings = settings_for(tmp_path, budget=4 * MIB)
    async with opened(settings) as tier:
        first = tensor(1, 2 * MIB)
        assert await tier.write(first, payload_of(first))

        def fail(self: Path, missing_ok: bool = False) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", fail)
            assert not await tier.write(tensor(2, 2 * MIB), payload_of(tensor(2, 2 * MIB)))
            assert du(Path(settings.path)) <= settings.budget
            assert tier.usage().used <= settings.budget


# -- fsck


async def test_check_finds_and_mends(settings: NvmeSettings) -> None:
    """What is broken, missing, unaccounted for or of another size is named; repair leaves nothing to name."""
    async with opened(settings) as tier:
        entries = [tensor(number, 50_000) for number in range(6)]
        for entry in entries:
            assert await tier.write(entry, payload_of(entry))
        flip(file_of(settings, entries[0]), head_nbytes(50_000) + 1)
        flip(file_of(settings, entries[1]), 700)
        file_of(settings, entries[2]).unlink()
        stray = file_of(settings, tensor(9, 1))
        stray.write_bytes(b"stray")
        (Path(settings.path) / "tmp" / "left").write_bytes(b"over")
        with file_of(settings, entries[3]).open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, 200_000)
        found = await tier.check()
        assert len(found.problems) == 6 + 1  # a longer file is both no entry and of another size
        assert found.repaired == 0
        assert await tier.check() == found
        mended = await tier.check(repair=True)
        assert mended.problems == found.problems
        assert mended.repaired == 7
        clean = await tier.check()
        assert clean.problems == ()
        assert clean.entries == 2
        assert clean.ledger == clean.on_disk == du(Path(settings.path))
        assert not stray.exists()
        for entry in entries[4:]:
            assert await held(tier, entry)


# -- the promise


class Watcher:
    """An observer of the folder in a thread of its own: the most it saw, over looks during which nothing changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.most = 0
        self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> dict[tuple[int, int], int] | None:
        found = {}
        try:
            for path in (self.folder, *self.folder.rglob("*")):
                status = path.lstat()
                found[status.st_ino, status.st_ctime_ns] = status.st_blocks * 512
        except FileNotFoundError:
            return None
        return found

    def _watch(self) -> None:
        last = None
        while not self._stop.is_set():
            now = self.look()
            # a look takes time: what was there at its start may have made room for what is there at its end, so only
            # two looks that agree show one instant
            if now is not None and now == last:
                self.most = max(self.most, sum(now.values()))
                self.looks += 1
            last = now


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_the_budget_holds_at_any_instant(tmp_path: Path, seed: int) -> None:
    """Under random reads, writes, spaces, evictions and decay, far too many for it, nobody ever sees more on disk."""
    settings = settings_for(tmp_path, budget=5 * MIB, quarantine=0.1)
    root = Path(settings.path)
    dice = random.Random(seed)

    async with opened(settings) as tier:

        def some() -> Entry:
            number = dice.randrange(40)
            namespace = "serving" if number % 4 else "staging"
            return (tensor if number % 3 else pack)(number, 1 + number * 17_001, namespace)

        async def write() -> None:
            entry = some()
            await tier.write(entry, payload_of(entry))

        async def space() -> None:
            entry = some()
            try:
                place = await tier.reserve(entry.key.namespace, entry.nbytes, entry.key.kind)
            except (AllPinned, TooLarge):
                return
            place.view[:] = payload_of(entry)
            if dice.random() < 0.5:
                await tier.commit(entry, place)
            place.release()

        async def read() -> None:
            entry = some()
            out = memoryview(bytearray(entry.nbytes))
            try:
                await tier.read_into(entry.key, out)
            except (KeyError, CorruptEntry):
                return
            assert out == payload_of(entry)

        async def evict() -> None:
            tier.evict(some().key)

        async def decay() -> None:
            entry = some()
            if tier.lookup(entry.key) is not None and entry.nbytes:
                # by the time of the flip it may be gone, which is fine
                try:
                    flip(file_of(settings, entry), head_nbytes(entry.nbytes))
                except FileNotFoundError:
                    return

        acts: list[Callable[[], Awaitable[None]]] = [write, write, write, write, space, space, read, read, evict, decay]
        with Watcher(root) as watcher:
            for _ in range(30):
                await asyncio.gather(*(dice.choice(acts)() for _ in range(4)))
                assert tier.usage().used <= settings.budget
                assert du(root) <= settings.budget
        assert watcher.looks
        assert watcher.most <= settings.budget
        assert max(watcher.most, du(root)) > settings.budget // 2
        report = await tier.check(repair=True)
        assert all("checksum" in problem for problem in report.problems)
        assert (await tier.check()).problems == ()


# -- scrubbing


async def test_a_scrub_finds_decay_that_nobody_reads(tmp_path: Path) -> None:
    """Broken payloads and heads are found without a read, and set aside; what is well stays."""
    async with opened(settings_for(tmp_path, scrub=1 << 40)) as tier:
        entries = [tensor(number, CHUNK + 1000 * number) for number in range(1, 4)]
        for entry in entries:
            assert await tier.write(entry, payload_of(entry))
        flip(file_of(tier._settings, entries[0]), head_nbytes(entries[0].nbytes) + CHUNK + 1)
        flip(file_of(tier._settings, entries[1]), 600)
        scrubbing = asyncio.create_task(tier.scrub())
        await until(lambda: tier.corrupted >= 2)
        scrubbing.cancel()
        await asyncio.wait([scrubbing])
        assert [await held(tier, entry) for entry in entries] == [False, False, True]
        assert (await tier.check()).problems == ()


async def test_a_scrub_that_is_turned_off(tmp_path: Path) -> None:
    """Without a rate nothing is verified but what is read."""
    async with opened(settings_for(tmp_path, scrub=0)) as tier:
        await tier.scrub()
