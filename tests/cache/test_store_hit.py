"""``Store.hit``: what can be answered without waiting, and what cannot."""

from pathlib import Path
from typing import Literal

import pytest

from cache.errors import UnknownRecipe
from cache.keys import SeriesRef, TensorRef
from cache.origin.faults import FaultPlan
from cache.store import StoreSettings
from tests.cache.walk import Walk, made, walking

REF = SeriesRef("1.2.1", "1.2.1.1")
WANT = TensorRef(REF, "plain")
OBJECTS = [b"first" * 100, b"second" * 100]

Revalidate = Literal["request", "interval", "events"]


def hit(walk: Walk, want: TensorRef = WANT) -> bytes | None:
    """The bytes of a hit, which is let go."""
    found = walk.store.hit(want)
    if found is None:
        return None
    with found.pin as pin:
        assert found.tier == "ram"
        return bytes(pin.view)


@pytest.mark.parametrize(("revalidate", "at_once"), [("request", False), ("interval", True), ("events", True)])
async def test_what_is_in_ram_is_answered_at_once(tmp_path: Path, revalidate: Revalidate, at_once: bool) -> None:
    """Unless every answer has to be confirmed by the origin first."""
    async with walking(tmp_path, settings=StoreSettings(revalidate=revalidate)) as walk:
        walk.archive.write(REF, OBJECTS)
        assert hit(walk) is None, "nobody has asked for it yet"
        await walk.get(REF)
        calls = walk.origin.calls.total()
        assert hit(walk) == (made("plain", OBJECTS) if at_once else None)
        assert walk.origin.calls.total() == calls


async def test_what_is_on_nvme_only_has_to_be_waited_for(tmp_path: Path) -> None:
    """It is no hit until it is in RAM again."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="events")) as walk:
        walk.archive.write(REF, OBJECTS)
        await walk.get(REF)
        await walk.settled()
        walk.evict_ram(REF)
        assert hit(walk) is None
        assert (await walk.get(REF))[0] == "nvme"
        assert hit(walk) is not None


async def test_a_changed_series_is_no_hit(tmp_path: Path) -> None:
    """Once an arrival says that it changed, what is in RAM waits for the origin's word."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="events")) as walk:
        walk.archive.write(REF, OBJECTS)
        await walk.get(REF)
        walk.store.changed(REF)
        assert hit(walk) is None


async def test_an_interval_that_is_over_is_checked_behind(tmp_path: Path) -> None:
    """The hit is given at once, one check goes to the origin, and a change that it finds is the next answer."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="interval", revalidate_s=60.0)) as walk:
        walk.archive.write(REF, OBJECTS)
        await walk.get(REF)
        lists = walk.origin.count("list")
        walk.archive.write(REF, [*OBJECTS, b"third" * 100])
        walk.clock.advance(61)
        assert [hit(walk), hit(walk)] == [made("plain", OBJECTS)] * 2
        await walk.settled()
        assert walk.origin.count("list") == lists + 1
        assert hit(walk) is None
        assert (await walk.get(REF))[1] == made("plain", [*OBJECTS, b"third" * 100])


async def test_a_hit_is_a_use_and_holds_the_bytes(tmp_path: Path) -> None:
    """It counts like any other answer from RAM; until it is released nothing evicts the entry."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="events")) as walk:
        walk.archive.write(REF, OBJECTS)
        await walk.get(REF)
        [before] = walk.ram.residents()
        found = walk.store.hit(WANT)
        assert found is not None
        await walk.settled()
        [during] = walk.ram.residents()
        assert (during.uses, during.pins) == (before.uses + 1, 1)
        assert not walk.ram.evict(during.key)
        found.release()
        assert walk.ram.evict(during.key)


async def test_other_recipes_and_namespaces_are_other_entries(tmp_path: Path) -> None:
    """A hit is exact; a recipe that is not there is refused as by ``get``, and nobody asks the origin."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="events")) as walk:
        walk.archive.write(REF, OBJECTS)
        await walk.get(REF)
        walk.origin.plan = FaultPlan(down=1)
        assert hit(walk, TensorRef(REF, "turned")) is None
        assert hit(walk, TensorRef(REF, "plain", "staging")) is None
        assert hit(walk, TensorRef(REF, "plain", "nobody")) is None
        with pytest.raises(UnknownRecipe, match="plain, turned"):
            walk.store.hit(TensorRef(REF, "unheard-of"))
