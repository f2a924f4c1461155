"""Writes to NVMe let fills go first, and no longer than anybody can wait for them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from cache.keys import SeriesRef
from cache.store import StoreSettings
from tests.cache.walk import KIB, MIB, Walk, until, walking

FIRST, SECOND, THIRD = (SeriesRef("1.2", f"1.2.{number}") for number in range(3))
OBJECTS = tuple(bytes([number]) * 40 * KIB for number in range(2))
FOREVER = 1e6


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long nothing is filled, it is not taken for quiet: whatever the machine does between two requests."""
    monkeypatch.setattr("cache.store.behind._QUIET_S", FOREVER)


@pytest.fixture
async def walk(tmp_path: Path) -> AsyncIterator[Walk]:
    """With three series, and writes whose patience never ends by itself."""
    settings = StoreSettings(revalidate="events", write_behind=6, write_behind_patience_s=FOREVER)
    async with walking(tmp_path, ram=8 * MIB, settings=settings) as walk:
        for ref in (FIRST, SECOND, THIRD):
            walk.archive.write(ref, OBJECTS)
        yield walk


@pytest.fixture
async def filling(walk: Walk) -> AsyncIterator[asyncio.Task[tuple[str, bytes]]]:
    """The fill of the second series, which is held up, after that of the first."""
    await walk.get(FIRST)
    walk.echo.gate = asyncio.Event()
    task = asyncio.create_task(walk.get(SECOND))
    while walk.echo.derived < 2:
        await asyncio.sleep(0)
    yield task
    walk.echo.gate.set()
    await task


async def test_a_write_lets_fills_go_first(
    walk: Walk, filling: asyncio.Task[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins once none is under way; it is on its way meanwhile, and keeps its RAM."""
    assert walk.store._behind._quiet is None  # the fill has put off what would let it begin
    await walk.nvme._folder.settled()
    assert walk.disk.calls["write"] == 0
    assert walk.files() == []
    assert walk.store._behind.busy
    assert walk.echo.gate is not None
    monkeypatch.setattr("cache.store.behind._QUIET_S", 0.0)
    walk.echo.gate.set()
    await filling
    await walk.settled()
    assert len(walk.files("tar")) == len(walk.files("safetensors")) == 2


async def close(walk: Walk) -> None:
    await walk.store._behind.close(10)


@pytest.mark.parametrize(
    "asked", [lambda walk: walk.store.written(FIRST), lambda walk: walk.store._behind.progress(), close]
)
async def test_who_waits_for_a_write_has_it_begin(
    walk: Walk, filling: asyncio.Task[tuple[str, bytes]], asked: Callable[[Walk], Awaitable[None]]
) -> None:
    """Whether for the file, or for the RAM that is held until it is there."""
    await asked(walk)
    assert walk.files()


async def test_a_pack_that_is_wanted_is_written_at_once(walk: Walk, filling: asyncio.Task[tuple[str, bytes]]) -> None:
    """Another recipe of the series waits for its pack, sooner than it would fetch it again."""
    fetched = walk.fetched()
    other = asyncio.create_task(walk.get(FIRST, "turned"))
    while walk.echo.derived < 3:
        await asyncio.sleep(0)
    assert walk.fetched() == fetched
    assert walk.echo.gate is not None
    walk.echo.gate.set()
    assert (await other)[0] == "origin"


async def test_many_writes_wait_for_nobody(walk: Walk, filling: asyncio.Task[tuple[str, bytes]]) -> None:
    """Past half of those that may wait, they are written whatever else goes on."""
    assert walk.files() == []
    gate, walk.echo.gate = walk.echo.gate, None
    await walk.get(THIRD)
    await until(lambda: len(walk.files()) >= 4)
    walk.echo.gate = gate


@pytest.mark.parametrize(
    ("ram", "settings"),
    [
        # a quarter of RAM has what only passes through it, as packs do that wait to be written
        (512 * KIB, StoreSettings(revalidate="events", write_behind=100, write_behind_patience_s=FOREVER)),
        # it has let fills go first for as long as it may
        (8 * MIB, StoreSettings(revalidate="events", write_behind=100, write_behind_patience_s=0.01)),
    ],
    ids=["RAM is needed", "patience ends"],
)
async def test_a_write_waits_for_nobody_once(ram: int, settings: StoreSettings, tmp_path: Path) -> None:
    """It then begins beside the fill that is under way."""
    async with walking(tmp_path, ram=ram, settings=settings) as walk:
        for ref in (FIRST, SECOND):
            walk.archive.write(ref, OBJECTS)
        await walk.get(FIRST)
        walk.echo.gate = asyncio.Event()
        task = asyncio.create_task(walk.get(SECOND))
        await until(lambda: len(walk.files()) >= 2)
        assert not task.done()
        walk.echo.gate.set()
        await task
