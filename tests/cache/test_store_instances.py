"""Single objects of a series, read from its pack: one set of GETs, from whichever tier has them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cache.errors import NotFound, OriginDown, UnknownStudy
from cache.keys import SeriesRef
from cache.origin.faults import FaultPlan
from cache.store import StoreSettings
from cache.store.outcome import Instance
from tests.cache.walk import Walk, made, objects, walking

ONE = SeriesRef("1.2.1", "1.2.1.1")


@pytest.fixture
async def walk(tmp_path: Path) -> AsyncIterator[Walk]:
    async with walking(tmp_path, settings=StoreSettings(revalidate="events")) as walk:
        walk.archive.write(ONE, objects(1))
        yield walk


async def content(instance: Instance) -> bytes:
    return b"".join([bytes(chunk) async for chunk in instance.chunks(0, instance.source.size)])


async def get(walk: Walk, name: str) -> tuple[str, bytes]:
    """The tier that answered, and the bytes."""
    instance = await walk.store.instance(ONE, name)
    try:
        return instance.tier, await content(instance)
    finally:
        instance.release()


async def test_each_object_is_as_the_origin_has_it(walk: Walk) -> None:
    """By number and by name; the first brings the whole series, then RAM answers, and NVMe once RAM let it go."""
    assert await get(walk, "0") == ("origin", objects(1)[0])
    assert [await get(walk, name) for name in ("1", "2", "000", "002")] == [
        ("ram", objects(1)[1]),
        ("ram", objects(1)[2]),
        ("ram", objects(1)[0]),
        ("ram", objects(1)[2]),
    ]
    await walk.settled()
    walk.evict_ram(ONE)
    assert await get(walk, "1") == ("nvme", objects(1)[1])
    assert await get(walk, "2") == ("ram", objects(1)[2])
    assert walk.fetched() == 3


async def test_a_part_of_an_object(walk: Walk) -> None:
    instance = await walk.store.instance(ONE, "1")
    assert b"".join([bytes(chunk) async for chunk in instance.chunks(7, 9)]) == objects(1)[1][7:9]
    instance.release()
    await walk.settled()
    assert walk.pins() == 0


async def test_the_pack_serves_tensors_too(walk: Walk) -> None:
    """What was fetched for single objects is not fetched again for a tensor of the series, and the other way round."""
    await get(walk, "0")
    await walk.settled()
    assert await walk.get(ONE) == ("origin", made("plain", objects(1)))
    await walk.settled()
    walk.evict_ram(ONE)
    assert (await get(walk, "1"))[0] == "nvme"
    assert walk.fetched() == 3


async def test_callers_share_one_fetch(walk: Walk) -> None:
    """Thirty readers of three objects cost three GETs."""
    walk.origin.plan = FaultPlan(stall=1, methods=("fetch",))
    asking = [asyncio.create_task(get(walk, str(number % 3))) for number in range(30)]
    await walk.origin.until_stalled(3)
    walk.origin.plan = FaultPlan()
    walk.origin.resume()
    told = await asyncio.gather(*asking)
    assert [data for _, data in told] == [objects(1)[number % 3] for number in range(30)]
    assert walk.fetched() == 3
    await walk.settled()
    assert walk.leaks() == [] and walk.pins() == 0


async def test_a_replaced_object_is_never_served_beside_old_ones(walk: Walk) -> None:
    """The series changed after it was listed: it is listed anew, and what is answered is of the new version."""
    await get(walk, "0")
    await walk.settled()
    walk.store.evict(ONE.study)
    walk.archive.write(ONE, objects(2))
    assert await get(walk, "1") == ("origin", objects(2)[1])


async def test_what_is_too_large_for_ram_comes_from_nvme(tmp_path: Path) -> None:
    """A pack larger than the arena is fetched to its file, and read from there, verified."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="events")) as walk:
        large = objects(3, count=4, nbytes=walk.ram.usage().budget // 3)
        walk.archive.write(ONE, large)
        assert await get(walk, "2") == ("bypass", large[2])
        await walk.settled()
        assert await get(walk, "3") == ("bypass", large[3])
        assert walk.fetched() == 4
        assert walk.leaks() == [] and walk.pins() == 0


@pytest.mark.parametrize("name", ["3", "nobody", "..", "1.2.3", "9" * 40, "²", ""])
async def test_an_object_that_is_not_there(walk: Walk, name: str) -> None:
    """Says so, and costs no GET."""
    with pytest.raises(NotFound, match="no instance"):
        await walk.store.instance(ONE, name)
    assert walk.fetched() == 0


async def test_a_series_that_is_not_there(walk: Walk) -> None:
    with pytest.raises(UnknownStudy):
        await walk.store.instance(SeriesRef("1.2.9", "1.2.9.1"), "0")


async def test_a_fetch_that_fails_leaves_nothing(walk: Walk) -> None:
    """The error is the origin's, the space is given back, and the next request goes well."""
    walk.origin.plan = FaultPlan(down=1, methods=("fetch",))
    with pytest.raises(OriginDown, match="down, as planned"):
        await walk.store.instance(ONE, "0")
    await walk.settled()
    assert walk.leaks() == []
    walk.heal()
    assert await get(walk, "0") == ("origin", objects(1)[0])
