"""Entries that are made again and compared: what differs is given to nobody any more, and nothing goes for it."""

from pathlib import Path

import msgspec
import pytest

from cache.entry import Entry
from cache.errors import NotFound
from cache.keys import Key, SeriesRef, TensorRef
from cache.store import StoreSettings
from tests.cache.walk import KIB, Walk, made, walking

REF, OTHER = SeriesRef("1.2", "1.2.1"), SeriesRef("1.2", "1.2.2")
OBJECTS = [b"one", b"two"]


def key_of(walk: Walk, ref: SeriesRef, recipe: str = "plain") -> Key:
    """The key of the series' tensor by that recipe."""
    keys = {each.key for each in walk.store.residents() if each.key.ref == ref and each.key.kind == "tensor"}
    [key] = [key for key in keys if entry_of(walk, key).lineage.recipe_name == recipe]
    return key


def entry_of(walk: Walk, key: Key) -> Entry:
    entry = walk.store.entry(key)
    assert entry is not None
    return entry


async def held(walk: Walk, recipe: str = "plain") -> Key:
    """The series' tensor, in both tiers."""
    walk.archive.write(REF, OBJECTS)
    await walk.get(REF, recipe)
    await walk.settled()
    return key_of(walk, REF, recipe)


async def forge(walk: Walk, key: Key) -> None:
    """Have NVMe hold other bytes under the key, with checksums that are right for them."""
    entry = entry_of(walk, key)
    assert walk.nvme.evict(key)
    assert await walk.nvme.write(entry, memoryview(b"\0" * entry.nbytes))


@pytest.mark.parametrize("recipe", ["plain", "turned"])
async def test_what_is_right_is_said_to_be(recipe: str, tmp_path: Path) -> None:
    """The objects are fetched again, and neither a use nor an entry comes of it."""
    async with walking(tmp_path) as walk:
        key = await held(walk, recipe)
        before, fetched = walk.store.residents(), walk.fetched()
        verified = await walk.store.verify(key)
        assert (verified.outcome, verified.different) == ("same", ())
        assert walk.fetched() == fetched + len(OBJECTS)
        await walk.settled()
        assert walk.store.residents() == before
        with pytest.raises(NotFound):
            await walk.store.verify(msgspec.structs.replace(key, series="1.2.9"))


async def test_what_differs_is_given_to_nobody_any_more(tmp_path: Path) -> None:
    """In RAM, where somebody may have written to it, and on NVMe; asked again, it is made anew."""
    async with walking(tmp_path) as walk:
        key = await held(walk)
        pin = walk.ram.hold(key)
        assert pin is not None
        walk.ram._arena.view(pin.extent)[:1] = b"\xff"
        reader = await walk.store.get(TensorRef(REF, "plain"))
        pin.release()
        assert (await walk.store.verify(key)).different == ("ram",)
        tampered = bytes(reader.pin.view)  # type: ignore[union-attr]  # it is in RAM
        assert await walk.get(REF) == ("nvme", made("plain", OBJECTS))
        assert bytes(reader.pin.view) == tampered  # type: ignore[union-attr]  # who held it before has it still
        reader.release()
        await forge(walk, key)
        assert (await walk.store.verify(key)).different == ("nvme",)
        assert walk.nvme.lookup(key) is None
        assert [path.name for path in (tmp_path / "nvme" / "quarantine").iterdir()]
        assert await walk.get(REF) == ("ram", made("plain", OBJECTS))
        await walk.settled()
        walk.ram.reserve("serving", 1).release()  # what was condemned and is held no more is free now


async def test_what_cannot_be_made_again_is_left_alone(tmp_path: Path) -> None:
    """Objects that changed since, packs, and entries of a recipe that is another one now."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="events")) as walk:
        key = await held(walk)
        [pack] = {each.key for each in walk.store.residents() if each.key.kind == "pack"}
        assert (await walk.store.verify(pack)).outcome == "untold"
        walk.archive.write(REF, [b"other", b"two"])
        verified = await walk.store.verify(key)
        assert (verified.outcome, verified.why.partition(":")[0]) == ("untold", "origin-changed")
        walk.store._recipes["plain"] = walk.store._recipes["turned"]
        assert "another one" in (await walk.store.verify(key)).why
        assert await walk.get(REF, "turned")
        assert walk.ram.lookup(key) is not None


async def test_nothing_goes_for_it(tmp_path: Path) -> None:
    """In a full RAM it uses NVMe's spare room; without any it is refused, and every entry is where it was."""
    size = 60 * KIB
    refs = [SeriesRef("1.2", f"1.2.{number}") for number in range(1, 20)]
    async with walking(tmp_path, ram=256 * KIB, nvme=3 * 1024 * KIB) as walk:
        for ref in refs:
            walk.archive.write(ref, [bytes(size)])
            await walk.get(ref)
            await walk.settled()
        before = {(each.tier, each.key) for each in walk.store.residents()}
        keys = sorted({key for _, key in before if key.kind == "tensor"}, key=lambda key: key.digest)
        outcomes = [await walk.store.verify(key) for key in keys]
        await walk.settled()
        assert {(each.tier, each.key) for each in walk.store.residents()} == before
        assert {(each.outcome, each.why.partition(":")[0]) for each in outcomes} == {("untold", "all-pinned")}
        for key in keys[1:6]:  # what somebody else has let go is spare
            walk.nvme.evict(key)
        assert (await walk.store.verify(keys[0])).outcome == "same"
