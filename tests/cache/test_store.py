"""The walk: which tier answers, what it costs, and that nothing is left behind however it ends."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from cache.errors import (
    AllPinned,
    EmptySeries,
    NotDicom,
    OriginChanged,
    OriginDenied,
    OriginDown,
    TooLarge,
    UnknownNamespace,
    UnknownRecipe,
    UnknownStudy,
    VoxcacheError,
    WorkerDied,
)
from cache.interfaces import Deriver
from cache.keys import SeriesRef, SourceObject, TensorRef
from cache.origin.directory import DirectoryOrigin, DirectorySettings
from cache.origin.faults import FaultPlan, FaultyOrigin
from cache.store import Bypassed, Filled, Hit, Outcome, StoreSettings
from cache.urgency import Priority
from cache.workers.pool import Workers, WorkerSettings
from tests.cache.walk import KIB, RECIPES, Echo, Walk, content, made, objects, until, walking

ONE = SeriesRef("1.2.1", "1.2.1.1")
TWO = SeriesRef("1.2.2", "1.2.2.1")
EVENTS = StoreSettings(revalidate="events")


@pytest.fixture
async def walk(tmp_path: Path) -> AsyncIterator[Walk]:
    """A store that trusts its manifests until an event, with two series at its origin."""
    async with walking(tmp_path, settings=EVENTS) as walk:
        walk.archive.write(ONE, objects(1))
        walk.archive.write(TWO, objects(2))
        yield walk


def test_workers_are_a_deriver() -> None:
    """The pool of processes and the light one of these tests fit the same seam."""
    derivers: list[Deriver] = [Workers(WorkerSettings()), Echo()]
    assert all(deriver.decoders is not None for deriver in derivers)


# ------------------------------------------------------------------ which tier answers


async def test_first_a_fill_then_ram_then_nvme(walk: Walk) -> None:
    """A series is fetched and decoded once; after that RAM answers, and NVMe once RAM has let it go."""
    expected = made("plain", objects(1))
    assert await walk.get(ONE) == ("origin", expected)
    assert await walk.get(ONE) == ("ram", expected)
    await walk.settled()
    walk.evict_ram(ONE)
    assert await walk.get(ONE) == ("nvme", expected)
    assert await walk.get(ONE) == ("ram", expected)
    assert (walk.fetched(), walk.echo.derived) == (3, 1)


async def test_a_second_recipe_uses_the_pack(walk: Walk) -> None:
    """Another tensor of the same series costs a decode, but no GET."""
    await walk.get(ONE)
    await walk.settled()
    assert await walk.get(ONE, "turned") == ("origin", made("turned", objects(1)))
    assert (walk.fetched(), walk.echo.derived) == (3, 2)


async def test_an_outcome_says_what_it_cost_and_is_made_of(walk: Walk) -> None:
    """Stages of a fill are timed; the entry's lineage names objects, recipe, decoders and time."""
    outcome = await walk.store.get(TensorRef(ONE, "turned"))
    outcome.release()
    assert isinstance(outcome, Filled)
    walked = ["lookup", "list", "queue", "reserve", "fetch", "inspect", "decode"]
    assert list(outcome.stages) == [*walked, "admit"]
    lineage = outcome.entry.lineage
    assert (lineage.objects, lineage.source_bytes) == (3, sum(map(len, objects(1))))
    assert (lineage.recipe_name, lineage.decoders) == ("turned", walk.echo.decoders)
    assert lineage.made_at == walk.clock.now()
    assert list(lineage.stages) == walked
    assert walk.store.entry(outcome.entry.key) == outcome.entry
    manifest = walk.store.manifest(outcome.entry.key)
    assert manifest is not None
    assert [source.key for source in manifest.objects] == [f"1.2.1/1.2.1.1/{n:03d}.dcm" for n in range(3)]
    hit = await walk.store.get(TensorRef(ONE, "turned"))
    hit.release()
    assert isinstance(hit, Hit)
    assert list(hit.stages) == ["lookup"]


async def test_callers_join_one_fill(walk: Walk) -> None:
    """Fifty callers at once cost one GET an object and one decode; each holds the entry for itself."""
    walk.origin.plan = FaultPlan(stall=1, methods=("fetch",))
    asking = [asyncio.create_task(walk.store.get(TensorRef(ONE, "plain"))) for _ in range(50)]
    await walk.origin.until_stalled(3)
    walk.origin.plan = FaultPlan()
    walk.origin.resume()
    outcomes = await asyncio.gather(*asking)
    assert {type(outcome) for outcome in outcomes} == {Filled}
    assert sum("join" in outcome.stages for outcome in outcomes) == 49
    assert (walk.fetched(), walk.origin.count("list"), walk.echo.derived) == (3, 1, 1)
    await walk.settled()
    for outcome in outcomes:
        assert walk.store.evict(ONE.study) <= 2  # NVMe's, the first time
        assert await content(outcome) == made("plain", objects(1))
        outcome.release()
    assert walk.store.evict(ONE.study) == 1


async def test_namespaces_are_apart(walk: Walk) -> None:
    """The same tensor in another namespace is another entry; a namespace without a share is refused."""
    await walk.get(ONE)
    await walk.get(ONE, namespace="staging")
    assert walk.echo.derived == 2
    assert {resident.key.namespace for resident in walk.store.residents(ONE.study)} == {"serving", "staging"}
    with pytest.raises(UnknownNamespace):
        await walk.get(ONE, namespace="elsewhere")
    with pytest.raises(UnknownRecipe, match="plain, turned"):
        await walk.get(ONE, "else")


async def test_evicting_leaves_what_is_held(walk: Walk) -> None:
    """Asked to drop a study, the store drops it from both tiers, but for what somebody holds."""
    await walk.get(ONE)
    held = await walk.store.get(TensorRef(TWO, "plain"))
    await walk.settled()
    assert walk.store.evict(ONE.study, TWO.series) == 0
    assert walk.store.evict(ONE.study) == 3  # the tensor in both tiers, and its pack
    assert walk.store.evict(TWO.study) == 2
    assert await content(held) == made("plain", objects(2))
    held.release()
    assert [resident.tier for resident in walk.store.residents()] == ["ram"]


def versions(walk: Walk) -> set[str]:
    """Versions of the series ONE that either tier holds anything of."""
    return {resident.key.source_version for resident in walk.store.residents(ONE.study)}


async def until_one_version(walk: Walk) -> None:
    async with asyncio.timeout(60):
        await until(lambda: len(versions(walk)) <= 1)


@pytest.mark.slow
async def test_an_old_version_goes_once_nobody_holds_it(walk: Walk) -> None:
    """What is held of it stays as it was, and goes from every tier after it was let go of."""
    held = await walk.store.get(TensorRef(ONE, "plain"))
    await walk.settled()
    [old] = versions(walk)
    walk.archive.write(ONE, objects(1, count=4))
    walk.store.changed(ONE)
    await walk.get(ONE)
    await walk.settled()
    assert old in versions(walk)
    assert await content(held) == made("plain", objects(1))
    held.release()
    await until_one_version(walk)
    assert old not in versions(walk)


@pytest.mark.slow
async def test_an_old_version_that_is_still_made(walk: Walk) -> None:
    """A fill that began before the series changed ends, for those who wait for it; nothing of it stays."""
    walk.echo.gate = asyncio.Event()
    asked = asyncio.create_task(walk.get(ONE))
    await until(lambda: walk.echo.derived > 0)
    walk.archive.write(ONE, objects(1, count=4))
    walk.store.changed(ONE)
    after = asyncio.create_task(walk.get(ONE))
    await until(lambda: walk.echo.derived >= 2)
    walk.echo.gate.set()
    assert (await asked)[1] == made("plain", objects(1))
    assert (await after)[1] == made("plain", objects(1, count=4))
    await walk.settled()
    await until_one_version(walk)
    assert (await walk.get(ONE))[0] == "ram"


async def test_an_old_version_that_a_crash_has_kept(tmp_path: Path) -> None:
    """A start drops what the catalogue knows to be outdated."""
    async with walking(tmp_path, settings=EVENTS) as walk:
        walk.archive.write(ONE, objects(1))
        held = await walk.store.get(TensorRef(ONE, "plain"))
        await walk.settled()
        walk.archive.write(ONE, objects(1, count=4))
        walk.store.changed(ONE)
        kept = walk.nvme.evict
        walk.nvme.evict = lambda key: False  # type: ignore[method-assign]  # as if the daemon had ended before
        await walk.get(ONE)
        await walk.settled()
        held.release()
        walk.nvme.evict = kept  # type: ignore[method-assign]  # the method that it was
    async with walking(tmp_path, settings=EVENTS) as walk:
        assert len(versions(walk)) == 2
        await walk.store.drop_outdated()
        assert len(versions(walk)) == 1
        assert await walk.get(ONE) == ("nvme", made("plain", objects(1, count=4)))


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize("recipe", ["plain", "turned"])
async def test_what_ram_cannot_hold_is_served_from_nvme(walk: Walk, recipe: str) -> None:
    """A tensor larger than its share of RAM is made in a file and served from there, with the same bytes."""
    large = objects(3, count=5, nbytes=100 * KIB)
    walk.archive.write(ONE, large)
    outcome = await walk.store.get(TensorRef(ONE, recipe))
    assert isinstance(outcome, Bypassed)
    assert "more than" in outcome.reason
    assert await content(outcome) == made(recipe, large)
    part = b"".join([bytes(piece) async for piece in outcome.chunks(1000, 300_000)])
    assert part == made(recipe, large)[1000:300_000]
    await walk.settled()
    assert walk.store.evict(ONE.study) == 1  # its pack: the tensor is held
    outcome.release()
    fetched = walk.fetched()
    assert await walk.get(ONE, recipe) == ("bypass", made(recipe, large))
    assert walk.fetched() == fetched


async def test_what_neither_tier_can_hold_is_refused(walk: Walk) -> None:
    """A series larger than both tiers is TooLarge, and costs nobody their place."""
    await walk.get(TWO)
    walk.archive.write(ONE, objects(1, count=4, nbytes=1 << 20))
    with pytest.raises(TooLarge):
        await walk.get(ONE)
    assert (await walk.get(TWO))[0] == "ram"


async def test_when_all_is_pinned_the_answer_is_a_refusal(walk: Walk) -> None:
    """With RAM held by others a request is refused for now, and served once they let go."""
    refs = [SeriesRef("1.2.3", f"1.2.3.{number}") for number in range(8)]
    for number, ref in enumerate(refs):
        walk.archive.write(ref, objects(number, nbytes=20 * KIB))
    held: list[Outcome] = []
    with pytest.raises(AllPinned) as refusal:
        for ref in refs:
            held.append(await walk.store.get(TensorRef(ref, "plain")))  # noqa: PERF401 - what came before counts
    assert refusal.value.retry_after_s
    assert len(held) >= 3
    for number, outcome in enumerate(held):
        assert await content(outcome) == made("plain", objects(number, nbytes=20 * KIB))
        outcome.release()
    refused = len(held)
    assert await walk.get(refs[refused]) == ("origin", made("plain", objects(refused, nbytes=20 * KIB)))


async def test_many_fills_at_once_in_little_room(walk: Walk) -> None:
    """More fills than RAM can hold packs and volumes for all end with the right bytes; none waits for another's."""
    refs = [SeriesRef("1.2.4", f"1.2.4.{number}") for number in range(12)]
    for number, ref in enumerate(refs):
        walk.archive.write(ref, objects(number, nbytes=15 * KIB))
    answers = await asyncio.gather(*(walk.get(ref, "turned") for ref in refs))
    assert [data for _, data in answers] == [made("turned", objects(n, nbytes=15 * KIB)) for n in range(12)]


async def test_a_pack_makes_way_for_its_own_result(walk: Walk) -> None:
    """With RAM enough for either beside what is pinned, but not for both, the pack goes on from NVMe."""
    walk.archive.write(ONE, objects(1, count=4, nbytes=20 * KIB))
    walk.archive.write(TWO, objects(2, count=4, nbytes=42 * KIB))
    held = await walk.store.get(TensorRef(ONE, "plain"))
    await walk.settled()
    for recipe in RECIPES:
        assert await walk.get(TWO, recipe) == ("origin", made(recipe, objects(2, count=4, nbytes=42 * KIB)))
        await walk.settled()
        walk.evict_ram(TWO)
    assert walk.fetched() == 8
    held.release()


async def test_a_result_waits_for_what_another_fill_holds(walk: Walk) -> None:
    """A fill whose result finds RAM taken by one still under way is served after it, not refused."""
    for seed, ref in enumerate((ONE, TWO)):
        walk.archive.write(ref, objects(seed, count=4, nbytes=33 * KIB))
    walk.echo.gate = asyncio.Event()
    first = asyncio.create_task(walk.get(ONE))
    await until(lambda: walk.echo.derived > 0)
    second = asyncio.create_task(walk.get(TWO))
    await until(lambda: walk.ears.stages["inspect"] >= 2)
    assert not second.done()
    walk.echo.gate.set()
    for seed, asked in enumerate((first, second)):
        assert await asked == ("origin", made("plain", objects(seed, count=4, nbytes=33 * KIB)))


# ------------------------------------------------------------------ decoded while it is fetched


@pytest.mark.parametrize("recipe", ["plain", "turned"])
async def test_what_was_decoded_early_is_kept(walk: Walk, recipe: str) -> None:
    """The room that workers were given while objects arrived is where the volume is made."""
    assert await walk.get(ONE, recipe) == ("origin", made(recipe, objects(1)))
    assert len(walk.echo.rooms) == 1
    assert walk.echo.volumes == walk.echo.rooms


@pytest.mark.parametrize("recipe", ["plain", "turned"])
async def test_room_of_another_size_is_given_back(walk: Walk, recipe: str) -> None:
    """A volume that was foreseen wrongly costs its room as long as the objects arrive, and no longer."""
    walk.echo.foresees = 5 * KIB
    assert await walk.get(ONE, recipe) == ("origin", made(recipe, objects(1)))
    assert [room.nbytes for room in walk.echo.rooms] == [5 * KIB]
    assert walk.echo.volumes[0].nbytes == sum(map(len, objects(1)))


async def test_no_room_is_no_reason_to_wait(walk: Walk) -> None:
    """Where RAM has no room to decode early, it is decoded when all is there."""
    walk.archive.write(ONE, objects(1, nbytes=50 * KIB))  # its pack and another 150 KiB are more than half of 384
    assert await walk.get(ONE, "turned") == ("origin", made("turned", objects(1, nbytes=50 * KIB)))
    assert walk.echo.rooms == []


async def test_what_was_decoded_early_makes_way_for_the_result(walk: Walk) -> None:
    """With RAM for the volume or the result, but not for both, the volume goes on elsewhere."""
    walk.archive.write(TWO, objects(2, nbytes=76 * KIB))
    walk.archive.write(ONE, objects(1, nbytes=20 * KIB))
    held = await walk.store.get(TensorRef(TWO, "plain"))
    await walk.settled()
    assert await walk.get(ONE, "turned") == ("origin", made("turned", objects(1, nbytes=20 * KIB)))
    [early] = walk.echo.rooms
    assert walk.echo.volumes[-1] != early
    held.release()


async def partly_decoded(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> tuple["asyncio.Task[Outcome]", asyncio.Event]:
    """A fill that has room for its volume while its last object is still at the origin, until the event is set."""
    fetch, there = walk.origin.fetch, asyncio.Event()

    async def held(source: SourceObject, into: memoryview) -> None:
        if source.key.endswith("002.dcm"):
            await there.wait()
        await fetch(source, into)

    monkeypatch.setattr(walk.origin, "fetch", held)
    asking = asyncio.create_task(walk.store.get(TensorRef(ONE, "plain")))
    await until(lambda: bool(walk.echo.rooms))
    return asking, there


async def test_an_object_that_changes_while_others_are_decoded(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt ends with all it has decoded; the series is listed anew, and the answer is the new version."""
    asking, there = await partly_decoded(walk, monkeypatch)
    (walk.archive.path / ONE.study / ONE.series / "002.dcm").write_bytes(b"other")
    there.set()
    outcome = await asking
    assert len(walk.echo.rooms) == 2
    assert await content(outcome) == made("plain", [*objects(1)[:2], b"other"])
    outcome.release()


async def test_closed_while_others_are_decoded(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fill that is cancelled between its objects gives back what it had; nothing writes there any more."""
    asking, _ = await partly_decoded(walk, monkeypatch)
    await walk.store.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_write_behind_is_bounded(tmp_path: Path) -> None:
    """Past the bound a tensor stays in RAM only, and that is counted; its pack is on NVMe all the same."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="events", write_behind=0)) as walk:
        walk.archive.write(ONE, objects(1))
        await walk.get(ONE)
        await walk.settled()
        assert walk.ears.counts["write_behind_skipped"] == 1
        assert [path.suffix for path in walk.files()] == [".tar"]
        walk.evict_ram(ONE)
        assert (await walk.get(ONE))[0] == "origin"
        assert walk.fetched() == 3


# ------------------------------------------------------------------ versions of a series


async def test_a_listing_that_has_grown_old_is_made_anew(walk: Walk) -> None:
    """An object that is not what the manifest says costs one more listing, and the answer is the new version."""
    await walk.get(ONE)
    walk.store.evict(ONE.study)
    await walk.settled()
    walk.store.evict(ONE.study)
    walk.archive.write(ONE, objects(7))
    assert await walk.get(ONE) == ("origin", made("plain", objects(7)))
    assert walk.origin.count("list") == 2


async def test_an_origin_that_keeps_changing_is_an_error(walk: Walk) -> None:
    """A second listing that is outdated too is not followed by a third."""
    walk.origin.plan = FaultPlan(changed=1)
    with pytest.raises(OriginChanged):
        await walk.get(ONE)
    assert walk.origin.count("list") == 2


async def test_asked_before_every_answer(tmp_path: Path) -> None:
    """Under "request" a change at the origin is in the very next answer, and an unchanged series stays a hit."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="request")) as walk:
        walk.archive.write(ONE, objects(1))
        await walk.get(ONE)
        assert await walk.get(ONE) == ("ram", made("plain", objects(1)))
        assert walk.origin.count("list") == 2
        walk.archive.write(ONE, objects(2, count=4))
        assert await walk.get(ONE) == ("origin", made("plain", objects(2, count=4)))
        walk.origin.plan = FaultPlan(down=1)
        with pytest.raises(OriginDown):
            await walk.get(ONE)


async def test_asked_now_and_then(tmp_path: Path) -> None:
    """Under "interval" an old manifest is answered from at once and checked behind, by one listing however many ask."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="interval", revalidate_s=60)) as walk:
        walk.archive.write(ONE, objects(1))
        await walk.get(ONE)
        walk.archive.write(ONE, objects(2))
        walk.clock.advance(60)
        assert (await walk.get(ONE))[1] == made("plain", objects(1))
        await walk.settled()
        assert walk.origin.count("list") == 1
        walk.clock.advance(1)
        walk.origin.plan = FaultPlan(stall=1, methods=("list",))
        for _ in range(10):
            assert (await walk.get(ONE))[1] == made("plain", objects(1))
        await walk.origin.until_stalled()
        waiting = [task for task in asyncio.all_tasks() if "_refresh" in repr(task.get_coro())]
        assert len(waiting) == 1
        walk.origin.plan = FaultPlan()
        walk.origin.resume()
        await walk.settled()
        assert walk.origin.count("list") == 2
        assert (await walk.get(ONE))[1] == made("plain", objects(2))


async def test_a_check_that_fails_takes_nothing_away(tmp_path: Path) -> None:
    """With the origin down, "interval" goes on with what it has, counts the failure, and checks again later."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="interval")) as walk:
        walk.archive.write(ONE, objects(1))
        await walk.get(ONE)
        walk.clock.advance(100)
        walk.origin.plan = FaultPlan(down=1)
        assert (await walk.get(ONE))[0] == "ram"
        await walk.settled()
        assert walk.ears.counts["revalidation_failures/origin-down"] == 1
        walk.origin.plan = FaultPlan()
        walk.archive.write(ONE, objects(2))
        await walk.get(ONE)
        await walk.settled()
        assert (await walk.get(ONE))[1] == made("plain", objects(2))


async def test_told_by_events(walk: Walk) -> None:
    """Under "events" the origin is not asked again until a change is announced."""
    await walk.get(ONE)
    walk.archive.write(ONE, objects(5))
    walk.clock.advance(1_000_000)
    for _ in range(2):
        assert (await walk.get(ONE))[1] == made("plain", objects(1))
        await walk.settled()
    walk.store.changed(ONE)
    assert (await walk.get(ONE))[1] == made("plain", objects(5))
    assert walk.origin.count("list") == 2


class SlowToTell(DirectoryOrigin):
    """Its listings are made at once and delivered later."""

    def __init__(self, path: Path) -> None:
        super().__init__(DirectorySettings(str(path)))
        self.listed = asyncio.Event()
        self.deliver = asyncio.Event()

    async def dated(self, prefix: str) -> Sequence[tuple[SourceObject, float]]:
        found = await super().dated(prefix)
        self.listed.set()
        await self.deliver.wait()
        return found


@pytest.mark.parametrize("before", [objects(1), []], ids=["changed", "arrived"])
async def test_a_listing_from_before_a_change_is_not_believed(tmp_path: Path, before: list[bytes]) -> None:
    """A change announced while a listing is under way is in the answers of all who wait for it."""
    slow = SlowToTell(tmp_path / "archive")
    async with walking(tmp_path, settings=EVENTS, origin=FaultyOrigin(slow)) as walk:
        walk.archive.write(ONE, before)
        first = asyncio.create_task(walk.get(ONE))
        await slow.listed.wait()
        walk.archive.write(ONE, objects(9))
        walk.store.changed(ONE)
        second = asyncio.create_task(walk.get(ONE))
        slow.deliver.set()
        assert {data for _, data in await asyncio.gather(first, second)} == {made("plain", objects(9))}
        assert walk.store._listings._asked == {}
    await slow.close()


async def test_a_new_version_takes_the_old_ones_place(walk: Walk) -> None:
    """Old versions leave both tiers as soon as the new one is known, but for what is held, which stays as it was."""
    held = await walk.store.get(TensorRef(ONE, "plain"))
    await walk.get(ONE, "turned")
    await walk.get(TWO)
    await walk.settled()
    walk.archive.write(ONE, objects(8))
    walk.store.changed(ONE)
    await walk.get(ONE)
    await walk.settled()
    old = held.entry.key.source_version
    left = [r for r in walk.store.residents(ONE.study) if r.key.source_version == old]
    assert [(resident.tier, resident.key) for resident in left] == [("ram", held.entry.key)]
    assert await content(held) == made("plain", objects(1))
    held.release()
    assert (await walk.get(TWO))[0] == "ram"


@pytest.mark.parametrize("revalidate", ["request", "interval", "events"])
async def test_what_was_deleted_is_not_answered(tmp_path: Path, revalidate: str) -> None:
    """Once the store knows that a series is gone from the origin, it is not found, and nothing is kept of it."""
    settings = StoreSettings(revalidate=revalidate, revalidate_s=1)  # type: ignore[arg-type]  # one of its literals
    async with walking(tmp_path, settings=settings) as walk:
        walk.archive.write(ONE, objects(1))
        walk.archive.write(TWO, objects(2))
        await walk.get(ONE)
        await walk.settled()
        walk.archive.write(ONE, [])
        walk.clock.advance(2)
        if revalidate == "interval":
            await walk.get(ONE)
            await walk.settled()
        elif revalidate == "events":
            walk.store.changed(ONE)
        for _ in range(2):
            with pytest.raises(UnknownStudy):
                await walk.get(ONE)
        assert walk.store.residents(ONE.study) == []
        with pytest.raises(EmptySeries):
            await walk.get(SeriesRef(TWO.study, "1.2.3.4"))


# ------------------------------------------------------------------ faults


def spoil(path: Path) -> None:
    """Turn a byte of the payload's round."""
    with path.open("r+b") as file:
        file.seek(-100 * 16, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(("kind", "fetched"), [("safetensors", 3), ("*", 6)])
async def test_a_corrupt_file_is_made_again(walk: Walk, kind: str, fetched: int) -> None:
    """A tensor that fails its checksum is made of its pack, and a pack of the origin; the answer is right."""
    await walk.get(ONE)
    await walk.settled()
    walk.evict_ram(ONE)
    for path in walk.files(kind):
        spoil(path)
    assert await walk.get(ONE) == ("origin", made("plain", objects(1)))
    assert (walk.fetched(), walk.echo.derived) == (fetched, 2)
    assert walk.nvme.corrupted == fetched // 3
    await walk.settled()
    walk.evict_ram(ONE)
    assert await walk.get(ONE) == ("nvme", made("plain", objects(1)))


async def test_a_file_that_vanished_is_made_again(walk: Walk) -> None:
    """An entry whose file somebody removed is no error."""
    await walk.get(ONE)
    await walk.settled()
    walk.evict_ram(ONE)
    for path in walk.files():
        path.unlink()
    assert await walk.get(ONE) == ("origin", made("plain", objects(1)))


def origin_fails(plan: FaultPlan) -> Callable[[Walk], None]:
    def fail(walk: Walk) -> None:
        walk.origin.plan = plan

    return fail


def inspecting_fails(walk: Walk) -> None:
    walk.echo.inspect_fault = NotDicom("no DICOM file", ("00001.dcm",))


def deriving_fails(walk: Walk) -> None:
    walk.echo.derive_fault = WorkerDied("gone")


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (origin_fails(FaultPlan(down=1, methods=("list",))), OriginDown),
        (origin_fails(FaultPlan(denied=1, methods=("fetch",))), OriginDenied),
        (origin_fails(FaultPlan(truncated=0.7, methods=("fetch",))), OriginDown),
        (inspecting_fails, NotDicom),
        (deriving_fails, WorkerDied),
    ],
    ids=["no listing", "no object", "half an object", "no plan", "no volume"],
)
@pytest.mark.parametrize("nbytes", [10 * KIB, 200 * KIB], ids=["in RAM", "beside RAM"])
async def test_a_failure_leaves_nothing_behind(
    walk: Walk, fail: Callable[[Walk], None], error: type[VoxcacheError], nbytes: int
) -> None:
    """Whatever fails, all who wait hear of it, every byte is given back, and the next request is served."""
    walk.archive.write(ONE, objects(1, nbytes=nbytes))
    fail(walk)
    outcomes = await asyncio.gather(*(walk.get(ONE, "turned") for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [error] * 3
    await walk.settled()
    assert walk.leaks() == []
    assert walk.pins() == 0
    assert list(walk.ram.residents()) == []
    walk.heal()
    assert (await walk.get(ONE, "turned"))[1] == made("turned", objects(1, nbytes=nbytes))


async def test_objects_at_fault_are_named_as_the_origin_does(walk: Walk) -> None:
    """Where a worker could only count members of a pack, the error names the object's key."""
    walk.echo.inspect_fault = NotDicom("no DICOM file", ("00001.dcm", "1.2.3"))
    with pytest.raises(NotDicom) as refusal:
        await walk.get(ONE)
    assert refusal.value.instances == ("1.2.1/1.2.1.1/001.dcm", "1.2.3")


async def test_a_caller_who_leaves_takes_nobody_along(walk: Walk) -> None:
    """The fill goes on when its only caller is cancelled: the next one hits, or joins it."""
    walk.origin.plan = FaultPlan(stall=1, methods=("fetch",))
    asking = asyncio.create_task(walk.store.get(TensorRef(ONE, "plain")))
    await walk.origin.until_stalled(3)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert walk.store.under_way == (1, 0)
    walk.origin.plan = FaultPlan()
    walk.origin.resume()
    await walk.settled()
    assert walk.pins() == 0
    assert await walk.get(ONE) == ("ram", made("plain", objects(1)))


async def test_demand_joins_a_warm_up(walk: Walk) -> None:
    """A request for what is just being warmed waits for that, and costs nothing of its own."""
    walk.origin.plan = FaultPlan(stall=1, methods=("fetch",))
    warming = asyncio.create_task(walk.store.get(TensorRef(ONE, "plain"), Priority.WARM))
    await walk.origin.until_stalled(3)
    asking = asyncio.create_task(walk.get(ONE))
    walk.origin.plan = FaultPlan()
    walk.origin.resume()
    (await warming).release()
    assert (await asking)[1] == made("plain", objects(1))
    assert walk.fetched() == 3


async def test_closing_leaves_nothing(tmp_path: Path) -> None:
    """Closed in the middle of a fetch, the store cancels it, gives its bytes back and ends."""
    async with walking(tmp_path, settings=EVENTS) as walk:
        walk.archive.write(ONE, objects(1))
        walk.archive.write(TWO, objects(2))
        await walk.get(TWO)
        walk.origin.plan = FaultPlan(stall=1, methods=("fetch",))
        asking = asyncio.create_task(walk.get(ONE))
        await walk.origin.until_stalled(3)
        await walk.store.close()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert walk.store.under_way == (0, 0)
        assert walk.leaks() == []
        assert {resident.key.ref for resident in walk.nvme.residents()} == {TWO}  # what waited was written


async def test_a_restart_answers_from_nvme(tmp_path: Path) -> None:
    """A store opened over what another one left asks the origin for nothing."""
    async with walking(tmp_path, settings=EVENTS) as walk:
        walk.archive.write(ONE, objects(1))
        await walk.get(ONE)
    async with walking(tmp_path, settings=EVENTS, clock=walk.clock) as walk:
        assert await walk.get(ONE) == ("nvme", made("plain", objects(1)))
        assert walk.origin.calls.total() == 0


async def test_only_what_is_made_again_is_worth_a_write(tmp_path: Path) -> None:
    """Under "second-use" what is made once stays in RAM; what had to be made again is written, and answers then."""
    settings = StoreSettings(revalidate="request", write_admission="second-use")
    async with walking(tmp_path, settings=settings) as walk:
        walk.archive.write(ONE, objects(1))
        for tier in ("origin", "origin", "nvme"):
            assert (await walk.get(ONE))[0] == tier
            await walk.settled()
            walk.evict_ram(ONE)
        assert walk.ears.counts["write_behind_declined"] == 2  # the pack and the tensor, once each
