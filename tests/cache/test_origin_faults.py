"""The origin that fails on purpose."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cache.errors import OriginChanged, OriginDenied, OriginDown, VoxcacheError
from cache.keys import SourceObject
from cache.origin.directory import DirectoryOrigin, DirectorySettings
from cache.origin.faults import FaultPlan, FaultyOrigin

DATA = b"0123456789"


@pytest.fixture
async def inner(tmp_path: Path) -> AsyncIterator[DirectoryOrigin]:
    for number in range(20):
        (tmp_path / f"{number:02d}").write_bytes(DATA)
    origin = DirectoryOrigin(DirectorySettings(str(tmp_path)))
    yield origin
    await origin.close()


async def fates(origin: FaultyOrigin, sources: list[SourceObject]) -> dict[str, list[str]]:
    """What becomes of three fetches of each object, all objects at the same time."""

    async def three(source: SourceObject) -> list[str]:
        seen = []
        for _ in range(3):
            try:
                await origin.fetch(source, memoryview(bytearray(source.size)))
                seen.append("")
            except VoxcacheError as error:
                seen.append(error.code)
        return seen

    return dict(zip((s.key for s in sources), await asyncio.gather(*map(three, sources)), strict=True))


async def test_without_a_plan_all_goes_well(inner: DirectoryOrigin) -> None:
    """Without faults it is the origin it stands before, and counts what is asked of it."""
    origin = FaultyOrigin(inner)
    listed = await origin.list("")
    assert list(listed) == list(await inner.list(""))
    into = bytearray(10)
    await origin.fetch(listed[0], memoryview(into))
    assert into == DATA
    assert await origin.read("01", 3) == b"012"
    assert origin.calls == {("list", ""): 1, ("fetch", "00"): 1, ("read", "01"): 1}
    assert origin.count("fetch") == 1


async def test_a_flipped_bit(inner: DirectoryOrigin) -> None:
    """A flipped fetch brings one wrong bit, and says nothing."""
    into = bytearray(10)
    (listed, *_) = await inner.list("")
    await FaultyOrigin(inner, FaultPlan(flipped=1)).fetch(listed, memoryview(into))
    assert sum((a ^ b).bit_count() for a, b in zip(into, DATA, strict=True)) == 1


async def test_the_same_seed_has_the_same_faults(inner: DirectoryOrigin) -> None:
    """Each object meets the same fates in every run of a seed, whatever the order of calls; another seed has others."""
    plan = FaultPlan(down=0.3, denied=0.1, changed=0.1, truncated=0.1)
    listed = list(await inner.list(""))
    first = await fates(FaultyOrigin(inner, plan, seed=7), listed)
    assert await fates(FaultyOrigin(inner, plan, seed=7), listed[::-1]) == first
    assert await fates(FaultyOrigin(inner, plan, seed=8), listed) != first
    assert {fate for seen in first.values() for fate in seen} == {"", "origin-down", "origin-denied", "origin-changed"}


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (FaultPlan(down=1), OriginDown),
        (FaultPlan(denied=1), OriginDenied),
        (FaultPlan(changed=1), OriginChanged),
        (FaultPlan(truncated=1), OriginDown),
    ],
)
async def test_a_certain_fault(inner: DirectoryOrigin, plan: FaultPlan, error: type[VoxcacheError]) -> None:
    """A share of one is every call; a fetch that breaks off has written some of its bytes, not all."""
    (source, *_) = await inner.list("")
    into = bytearray(b"x" * 10)
    with pytest.raises(error):
        await FaultyOrigin(inner, plan).fetch(source, memoryview(into))
    assert into == (b"01234" + b"x" * 5 if plan.truncated else b"x" * 10)


async def test_faults_end(inner: DirectoryOrigin) -> None:
    """After so many faults for a key its calls go well; methods that are not named always do."""
    origin = FaultyOrigin(inner, FaultPlan(down=1, times=2, methods=("read",)))
    await origin.list("")
    for key in ("00", "01"):
        for _ in range(2):
            with pytest.raises(OriginDown):
                await origin.read(key)
        assert await origin.read(key) == DATA
    origin.plan = FaultPlan()
    assert await origin.read("02") == DATA


async def test_a_stall_lasts_until_it_is_lifted(inner: DirectoryOrigin) -> None:
    """Calls that stall wait, may be cancelled, and go well once they are resumed."""
    origin = FaultyOrigin(inner, FaultPlan(stall=1))
    reads = [asyncio.create_task(origin.read(key)) for key in ("00", "01")]
    await origin.until_stalled(2)
    reads[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await reads[0]
    assert not reads[1].done()
    origin.resume()
    assert await reads[1] == DATA
