"""Files that changed on the disk: never served, set aside or left alone, and the request succeeds from the origin."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.keys import SeriesRef, TensorRef
from cache.nvme.head import LEAST
from tests.cache.walk import Walk, content, walking

REFS = [SeriesRef("1.2", "1.2.1"), SeriesRef("1.2", "1.2.2")]
OBJECTS = {ref: tuple(bytes([number, part]) * 2500 for part in range(3)) for number, ref in enumerate(REFS)}
Damage = Callable[[Path, Path], None]


def flip(at: int) -> Damage:
    def damage(path: Path, other: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0x04
        path.write_bytes(data)

    return damage


def cut(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def exchange(path: Path, other: Path) -> None:
    """Each has the other's name."""
    between = path.with_name("between")
    path.rename(between)
    other.rename(path)
    between.rename(other)


def overwrite(path: Path, other: Path) -> None:
    """The other's bytes in this one's file."""
    path.write_bytes(other.read_bytes())


def renew(path: Path, other: Path) -> None:
    """A version of tomorrow wrote it, with other bytes."""
    data = path.read_bytes().replace(b'\\"format\\":1', b'\\"format\\":2', 1).replace(b'"format":1', b'"format":2', 1)
    path.write_bytes(data[:LEAST] + bytes(len(data) - LEAST))


DAMAGES: dict[str, Damage] = {
    "payload": flip(LEAST + 7),
    "head": flip(600),
    "cut": cut,
    "exchanged": exchange,
    "overwritten": overwrite,
    "newer": renew,
}


def files_of(walk: Walk, ref: SeriesRef) -> list[Path]:
    """The tensor's file and the pack's."""
    return sorted(walk.nvme._folder.path(resident.key) for resident in walk.nvme.residents() if resident.key.ref == ref)


async def filled(walk: Walk) -> None:
    for ref in REFS:
        walk.archive.write(ref, OBJECTS[ref])
        assert (await walk.get(ref))[0] == "origin"
    await walk.settled()


async def right(walk: Walk, fetched: int) -> None:
    """Both series come with the right bytes, so many objects having been fetched for it, and are on NVMe again."""
    before = walk.fetched()
    for ref in REFS:
        outcome = await walk.store.get(TensorRef(ref, "plain"))
        assert await content(outcome) == b"".join(OBJECTS[ref])
        outcome.release()
    await walk.settled()
    assert walk.fetched() - before == fetched
    assert (await walk.nvme.check(repair=True)).well


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
async def test_found_at_the_next_start(tmp_path: Path, name: str) -> None:
    """Damaged while no daemon ran: the series is fetched again, and the file is set aside; one of a newer version is
    left as it is until the entry is written anew."""
    async with walking(tmp_path) as walk:
        await filled(walk)
        pairs = list(zip(*(files_of(walk, ref) for ref in REFS), strict=True))
    for path, other in pairs:
        DAMAGES[name](path, other)
    async with walking(tmp_path) as walk:
        quarantined = list((tmp_path / "nvme" / "quarantine").iterdir())
        if name == "newer":
            assert quarantined == []
            assert all(path.exists() for path, _ in pairs)
        elif name != "payload":  # which is looked at when it is read
            assert len(quarantined) >= 2
        await right(walk, fetched=6 if name == "exchanged" else 3)


@pytest.mark.parametrize("name", ["payload", "cut", "exchanged", "overwritten"])
async def test_found_when_it_is_read(tmp_path: Path, name: str) -> None:
    """Damaged under a daemon that runs: no wrong byte leaves it, and the request is answered from the origin."""
    async with walking(tmp_path) as walk:
        await filled(walk)
        for path, other in zip(*(files_of(walk, ref) for ref in REFS), strict=True):
            DAMAGES[name](path, other)
        for ref in REFS:
            walk.evict_ram(ref)
        await right(walk, fetched=6 if name == "exchanged" else 3)
        assert list((tmp_path / "nvme" / "quarantine").iterdir())


async def test_a_newer_version_of_the_notes_is_not_read(tmp_path: Path) -> None:
    """A downgrade finds what it can read by the heads, and is as right as before."""
    async with walking(tmp_path) as walk:
        await filled(walk)
    notes = tmp_path / "nvme" / "journal"
    notes.write_bytes(notes.read_bytes().replace(b"voxcache notes 1", b"voxcache notes 2"))
    async with walking(tmp_path) as walk:
        await right(walk, fetched=0)
