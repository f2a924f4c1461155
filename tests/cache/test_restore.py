"""Series in an archive: asked back once, looked for now and then, whatever happens in between."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cache.catalog import Catalog, CatalogSettings
from cache.errors import Archived, OriginDown, Restoring
from cache.interfaces import Availability
from cache.keys import Manifest, SeriesRef, SourceObject
from cache.restore import Restores, RestoreSettings
from tests.cache.walk import Ears
from tests.conformance.tier import FakeClock

REF = SeriesRef("1.2.3", "1.2.3.4")


def manifest(count: int = 40) -> Manifest:
    return Manifest.of(REF, [SourceObject(f"{n:03}.dcm", 10, f"e{n}") for n in range(count)])


class FakeArchive:
    """Objects and where they are; what is asked back is counted, and comes when the test says so."""

    name = "fake"

    def __init__(self) -> None:
        self.states: dict[str, Availability] = {}
        self.asked: Counter[str] = Counter()
        self.looks = 0
        self.fault: Exception | None = None

    async def availability(self, source: SourceObject) -> Availability:
        self.looks += 1
        return self.states.get(source.key, "archived")

    async def restore(self, source: SourceObject, days: int, tier: str) -> None:
        if self.fault is not None:
            raise self.fault
        self.asked[source.key] += 1
        self.states[source.key] = "restoring"

    async def list(self, prefix: str) -> Sequence[SourceObject]:
        return []

    async def dated(self, prefix: str) -> Sequence[tuple[SourceObject, float]]:
        return []

    async def read(self, key: str, limit: int | None = None) -> bytes | None:
        return None

    async def fetch(self, source: SourceObject, into: memoryview) -> None:
        if self.states.get(source.key, "archived") != "there":
            raise Archived("archived")

    async def close(self) -> None:
        return

    def thaw(self) -> None:
        self.states = dict.fromkeys((source.key for source in manifest(50).objects), "there")


class Scene:
    def __init__(self, catalog: Catalog, **settings: Any) -> None:
        base: dict[str, Any] = {"enabled": True, "expected_s": 1000.0, "poll_s": 100.0}
        self.archive = FakeArchive()
        self.clock = FakeClock()
        self.ears = Ears()
        self.told: list[tuple[SeriesRef, str]] = []
        self.restores = Restores(RestoreSettings(**(base | settings)), self.archive, catalog, self.clock, self.ears)
        self.restores.asked = self.tell

    async def tell(self, ref: SeriesRef, version: str) -> None:
        self.told.append((ref, version))

    async def read(self, wanted: Manifest) -> None:
        async with self.restores.watching(wanted):
            for source in wanted.objects:
                await self.archive.fetch(source, memoryview(b""))


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(tmp_path / "catalog.sqlite", CatalogSettings())
    yield catalog
    catalog.close()


async def test_asked_back_once(catalog: Catalog) -> None:
    """All of the series is asked for at the first read; until it is time to look further ones cost nothing there."""
    scene = Scene(catalog)
    with pytest.raises(Restoring, match=r"expected at ....-..-..T") as first:
        await scene.read(manifest())
    assert (first.value.retry_after_s, first.value.look_again_s) == (1000, 100)
    assert set(scene.archive.asked.values()) == {1}
    assert len(scene.archive.asked) == 40
    assert scene.told == [(REF, manifest().source_version)]
    looks = scene.archive.looks
    scene.clock.advance(99)
    with pytest.raises(Restoring) as second:
        await scene.read(manifest())
    assert (second.value.retry_after_s, second.value.look_again_s) == (901, 1)
    assert scene.archive.looks == looks
    assert scene.ears.counts["restores/requested"] == 1


async def test_looked_for_until_it_is_there(catalog: Catalog) -> None:
    """Each look puts the next one off; the one that finds all objects lets the read through, and that is the end."""
    scene = Scene(catalog)
    for _ in range(15):  # past the time at which it was expected, too
        with pytest.raises(Restoring) as error:
            await scene.read(manifest())
        assert error.value.look_again_s == 100
        assert error.value.retry_after_s is not None
        assert error.value.retry_after_s >= 60
        scene.clock.advance(100)
    scene.archive.thaw()
    await scene.read(manifest())
    assert catalog.restore(REF) is None
    assert set(scene.archive.asked.values()) == {1}
    assert scene.ears.counts["restores/ended"] == 1


async def test_an_event_is_a_reason_to_look(catalog: Catalog) -> None:
    """Once the origin has said something about the series nobody waits for the time to look."""
    scene = Scene(catalog)
    with pytest.raises(Restoring):
        await scene.read(manifest())
    scene.archive.thaw()
    with pytest.raises(Restoring):
        await scene.read(manifest())
    scene.restores.look(REF)
    await scene.read(manifest())


async def test_a_late_slice_is_asked_for_as_well(catalog: Catalog) -> None:
    """Another version of the series asks for what is still archived of it, and for nothing twice."""
    scene = Scene(catalog)
    with pytest.raises(Restoring):
        await scene.read(manifest(3))
    with pytest.raises(Restoring):
        await scene.read(manifest(4))
    assert dict(scene.archive.asked) == {f"{n:03}.dcm": 1 for n in range(4)}


async def test_a_request_that_fails(catalog: Catalog) -> None:
    """Nothing is noted, so that the next read asks again."""
    scene = Scene(catalog)
    scene.archive.fault = OriginDown("down")
    with pytest.raises(OriginDown):
        await scene.read(manifest(2))
    assert (scene.told, catalog.restore(REF)) == ([], None)
    scene.archive.fault = None
    with pytest.raises(Restoring):
        await scene.read(manifest(2))


async def test_what_came_back_and_went_again(catalog: Catalog) -> None:
    """Objects that are archived again when they are looked for are asked back once more."""
    scene = Scene(catalog)
    with pytest.raises(Restoring):
        await scene.read(manifest(2))
    scene.archive.states.clear()
    scene.clock.advance(100)
    with pytest.raises(Restoring):
        await scene.read(manifest(2))
    assert set(scene.archive.asked.values()) == {2}


async def test_not_from_here(catalog: Catalog) -> None:
    """Unless it is enabled nothing is asked for; whether somebody else has is told."""
    scene = Scene(catalog, enabled=False)
    with pytest.raises(Archived) as refused:
        await scene.read(manifest(2))
    assert not refused.value.restore_requested
    scene.archive.states["000.dcm"] = "restoring"
    with pytest.raises(Archived) as refused:
        await scene.read(manifest(2))
    assert refused.value.restore_requested
    assert not scene.archive.asked
