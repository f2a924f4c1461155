"""Warm-ups and what they must leave alone: what was used lately, and most of a namespace's RAM."""

from pathlib import Path

import pytest

from cache.errors import AllPinned
from cache.interfaces import Residency
from cache.keys import SeriesRef, TensorRef
from cache.policy.warmup import outranks, within_share
from cache.store import StoreSettings
from cache.urgency import Priority
from tests.cache.walk import KIB, MIB, Walk, walking

SIZE = 60 * KIB
REFS = [SeriesRef("1.2", f"1.2.{number}") for number in range(1, 13)]


def settings(**changes: float) -> StoreSettings:
    return StoreSettings(revalidate="events", warm_use_s=100.0, **changes)  # type: ignore[arg-type]  # of these fields


async def warm(walk: Walk, ref: SeriesRef) -> None:
    (await walk.store.get(TensorRef(ref, "plain"), Priority.WARM)).release()
    await walk.settled()


def held(walk: Walk, tier: str) -> set[str]:
    """The series whose tensor the tier holds."""
    found: list[Residency] = walk.store.residents()
    return {each.key.series for each in found if each.tier == tier and each.key.kind == "tensor"}


def write_all(walk: Walk) -> None:
    for ref in REFS:
        walk.archive.write(ref, [bytes(SIZE)])


async def test_what_was_used_lately_stays(tmp_path: Path) -> None:
    """A warm-up takes what is free and what has been idle for longer than its own use is away, and NVMe after that."""
    async with walking(tmp_path, ram=512 * KIB, settings=settings(warm_share=1.0)) as walk:
        write_all(walk)
        for ref in REFS[:5]:
            await walk.get(ref)
        await walk.settled()
        full = held(walk, "ram")
        for ref in REFS[5:9]:
            await warm(walk, ref)
        assert full <= held(walk, "ram")
        assert {ref.series for ref in REFS[5:9]} <= held(walk, "ram") | held(walk, "nvme")
        walk.clock.advance(101)
        await walk.get(REFS[0])
        await warm(walk, REFS[9])
        assert REFS[0].series in held(walk, "ram")
        assert REFS[9].series in held(walk, "ram")


async def test_a_share_of_ram_is_all_that_is_warmed(tmp_path: Path) -> None:
    """Past it a warm-up is ready on NVMe; what somebody used is not counted any more."""
    async with walking(tmp_path, ram=MIB, settings=settings(warm_share=0.25)) as walk:
        write_all(walk)
        for ref in REFS[:6]:
            await warm(walk, ref)
        in_ram = held(walk, "ram")
        assert len(in_ram) == 3  # of 60 KiB in a quarter of 768 KiB
        assert {ref.series for ref in REFS[:6]} <= held(walk, "nvme")
        for ref in REFS[:3]:
            assert (await walk.get(ref))[0] == "ram"
        await warm(walk, REFS[6])
        assert REFS[6].series in held(walk, "ram")


async def test_a_request_that_joins_gets_ram(tmp_path: Path) -> None:
    """What a warm-up had to leave on NVMe is read into RAM for whoever asks, with room made for it."""
    async with walking(tmp_path, ram=MIB, settings=settings(warm_share=0.0)) as walk:
        write_all(walk)
        await warm(walk, REFS[0])
        assert held(walk, "ram") == set()
        assert (await walk.get(REFS[0]))[0] == "nvme"
        assert held(walk, "ram") == {REFS[0].series}


async def test_where_there_is_room_nowhere(tmp_path: Path) -> None:
    """A warm-up is refused, and may be tried later; nothing has gone for it."""
    async with walking(tmp_path, ram=512 * KIB, nvme=2 * MIB, settings=settings()) as walk:
        write_all(walk)
        for ref in REFS[:4]:
            await walk.get(ref)
        await walk.settled()
        before = held(walk, "ram") | held(walk, "nvme")
        with pytest.raises(AllPinned):
            for ref in REFS[4:]:
                await warm(walk, ref)
        assert before <= held(walk, "ram") | held(walk, "nvme")


def test_the_decisions() -> None:
    """Recent use outranks a warm-up for as long as its own use is away; a share is a share."""
    assert outranks(last_use=1000.0, now=1099.0, expected_use_s=100.0)
    assert not outranks(last_use=1000.0, now=1100.0, expected_use_s=100.0)
    assert within_share(warmed=30, nbytes=20, budget=100, share=0.5)
    assert not within_share(warmed=31, nbytes=20, budget=100, share=0.5)
