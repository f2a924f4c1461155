"""The notes that make a start fast: they come back as they were made, and nothing depends on them."""

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cache.nvme import NvmeSettings, NvmeTier, folder
from cache.nvme.disk import allocated_below
from cache.nvme.journal import Identity, Journal, Note
from tests.conformance.tier import FakeClock, held, pack, payload_of, tensor

MIB = 1 << 20


def note(number: int, size: int = 4096) -> Note:
    """A note of the file ``number``, another one for each ``size``."""
    entry = tensor(number, 1000)
    return Note(f"{entry.key.digest}.safetensors", Identity(number, size, 7), entry, "0" * 16)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = Journal(tmp_path / "journal", MIB)
    yield journal
    await journal.close()


async def reloaded(path: Path) -> list[Note]:
    """What another process would find."""
    again = Journal(path, MIB)
    found = await again.load()
    await again.close()
    return sorted(found.values(), key=lambda note: note.identity.inode)


async def test_notes_come_back(journal: Journal) -> None:
    """All that was noted, one by one or together; of one name the last note."""
    assert await journal.load() == {}
    journal.note([note(1)])
    journal.note(note(number) for number in range(2, 600))
    journal.note([note(1, 8192)])
    await journal.settled()
    assert await reloaded(journal.path) == [note(1, 8192), *(note(number) for number in range(2, 600))]


@pytest.mark.parametrize("cut", [1, 11, 13, 200])
async def test_a_torn_end(journal: Journal, cut: int) -> None:
    """What comes before a torn note is read, what is noted after the next start too."""
    for number in range(5):
        journal.note([note(number)])
        await journal.settled()
    os.truncate(journal.path, journal.path.stat().st_size - cut)
    again = Journal(journal.path, MIB)
    assert list((await again.load()).values()) == [note(number) for number in range(4)]
    again.note([note(9)])
    await again.close()
    assert await reloaded(journal.path) == [*(note(number) for number in range(4)), note(9)]


@pytest.mark.parametrize("data", [b"", b"\0" * 5000, b"voxcache notes 2, heads 1\n" + b"\xff" * 5000])
async def test_another_file_in_its_place(journal: Journal, data: bytes) -> None:
    """Garbage, or notes of another version, are as if there were none, and make way for new ones."""
    journal.path.write_bytes(data)
    assert await journal.load() == {}
    journal.note([note(1)])
    await journal.settled()
    assert await reloaded(journal.path) == [note(1)]


async def test_it_stays_within_its_bytes(tmp_path: Path) -> None:
    """However much is noted, and written anew, both files together take no more than they may."""
    journal = Journal(tmp_path / "journal", 128 << 10)
    await journal.load()
    rewrites = 0
    for number in range(1500):
        journal.note([note(number)])
        if number % 20 == 0:
            await journal.settled()
            assert allocated_below(tmp_path) - tmp_path.stat().st_blocks * 512 <= journal.nbytes
        if journal.overgrown:
            journal.rewrite(lambda: map(note, range(1000)))
            rewrites += 1
    await journal.close()
    assert rewrites
    assert len(await reloaded(journal.path)) >= 200


async def test_too_few_bytes_are_none(tmp_path: Path) -> None:
    """A share too small to be of use is not taken at all."""
    journal = Journal(tmp_path / "journal", 1000)
    await journal.load()
    journal.note([note(1)])
    await journal.close()
    assert journal.nbytes == 0
    assert not journal.path.exists()


# -- the tier's starts


@pytest.fixture
def heads_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files whose heads a start has read."""
    names: list[str] = []
    real = folder.examine

    def examine(path: Path) -> object:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr("cache.nvme.tier.examine", examine)
    return names


ENTRIES = [tensor(1, 50_000), tensor(2, 50_000), pack(3, 50_000), tensor(4, 50_000, "staging")]


async def start(settings: NvmeSettings, missing: int = 0) -> None:
    """A start finds the entries, but for so many of the first, with the right bytes, and the ledger is exact."""
    tier = await NvmeTier.open(settings, FakeClock())
    assert [await held(tier, entry) for entry in ENTRIES] == [False] * missing + [True] * (len(ENTRIES) - missing)
    assert (await tier.check()).problems == ()
    await tier.close()


@pytest.fixture
async def settings(tmp_path: Path) -> NvmeSettings:
    """Of a folder that holds the entries."""
    settings = NvmeSettings(str(tmp_path / "cache"), 16 * MIB)
    tier = await NvmeTier.open(settings, FakeClock())
    for entry in ENTRIES:
        assert await tier.write(entry, payload_of(entry))
    await tier.close()
    return settings


async def test_a_start_reads_no_head_that_is_noted(settings: NvmeSettings, heads_read: list[str]) -> None:
    """Not after entries were used either, nor at the start after that."""
    for _ in range(3):
        await start(settings)
    assert heads_read == []


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"x" * 100_000)], ids=["none", "garbage"])
async def test_a_start_without_notes(
    settings: NvmeSettings, heads_read: list[str], spoil: Callable[[Path], object]
) -> None:
    """All heads are read, once: the next start has notes again."""
    spoil(Path(settings.path) / "journal")
    await start(settings)
    await start(settings)
    assert len(heads_read) == len(ENTRIES)


async def test_a_file_that_is_another_than_was_noted(settings: NvmeSettings, heads_read: list[str]) -> None:
    """Files that were swapped are told by their heads, not by their notes: neither is taken for the other."""
    one, two = (Path(settings.path) / "entries" / f"{entry.key.digest}.safetensors" for entry in ENTRIES[:2])
    between = one.with_suffix(".between")
    one.rename(between)
    two.rename(one)
    between.rename(two)
    await start(settings, missing=2)
    assert sorted(heads_read) == sorted([one.name, two.name])
