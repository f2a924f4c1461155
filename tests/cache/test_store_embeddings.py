"""Embeddings: entries that a model makes of a tensor, as good as the model they are named after."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cache.entry import ModelIdentity
from cache.errors import TooLarge, TritonDown, UnknownModel, UnknownNamespace
from cache.flight import FlightSettings
from cache.interfaces import Encoder
from cache.keys import SeriesRef, TensorRef
from cache.store import Filled, Hit, StoreSettings
from cache.urgency import Priority
from serving.models import TritonEncoder
from tests.cache.walk import EMBEDDINGS, KIB, Oracle, Walk, content, made, said, until, walking

ONE = SeriesRef("1.2.1", "1.2.1.1")
TWO = SeriesRef("1.2.2", "1.2.2.1")
OBJECTS = {ONE: [b"one" * KIB, b"more" * KIB], TWO: [b"two" * KIB]}
FIRST = ModelIdentity("oracle", "1", "c1")
SECOND = ModelIdentity("oracle", "2", "c2")


@pytest.fixture
async def walk(tmp_path: Path) -> AsyncIterator[Walk]:
    """A store that trusts its manifests until an event, with two series at its origin."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="events")) as walk:
        for ref, objects in OBJECTS.items():
            walk.archive.write(ref, objects)
        yield walk
        await asyncio.gather(*walk.oracle.calls)


def word(model: ModelIdentity = FIRST, recipe: str = "plain", ref: SeriesRef = ONE) -> bytes:
    return said(model, made(recipe, OBJECTS[ref]))


def kinds(walk: Walk, tier: str) -> list[str]:
    return sorted(resident.key.kind for resident in walk.store.residents() if resident.tier == tier)


def test_tritons_encoder_fits_the_seam() -> None:
    """What serves and what tests use fit the same protocol."""
    derivers: list[type[Encoder]] = [Oracle, TritonEncoder]
    assert derivers


async def test_an_embedding_takes_the_walk_of_its_tensor(walk: Walk) -> None:
    """One fetch and one decode leave pack, tensor and embedding in both tiers, each found again where it is."""
    assert await walk.get(ONE, "word_of_plain") == ("origin", word())
    assert await walk.get(ONE, "word_of_plain") == ("ram", word())
    assert await walk.get(ONE, "plain") == ("ram", made("plain", OBJECTS[ONE]))
    await walk.settled()
    assert kinds(walk, "ram") == ["embedding", "tensor"]
    assert kinds(walk, "nvme") == ["embedding", "pack", "tensor"]
    walk.evict_ram(ONE)
    assert await walk.get(ONE, "word_of_plain") == ("nvme", word())
    assert kinds(walk, "ram") == ["embedding"], "its tensor is not needed again"
    assert (walk.echo.derived, walk.oracle.encoded) == (1, 1)


async def test_many_embeddings_may_wait_to_be_written(tmp_path: Path) -> None:
    """They hold little RAM, so a burst of them reaches NVMe where only one tensor may wait."""
    settings = StoreSettings(revalidate="events", write_behind=1)
    async with walking(tmp_path, settings=settings) as walk:
        refs = [SeriesRef(f"1.3.{n}", f"1.3.{n}.1") for n in range(10)]
        for ref in refs:
            walk.archive.write(ref, [ref.series.encode()])
        await asyncio.gather(*(walk.get(ref, "word_of_plain") for ref in refs))
        assert walk.ears.counts["write_behind_skipped"] == 0
        await walk.settled()
        assert kinds(walk, "nvme").count("embedding") == len(refs)


async def test_a_tensor_that_is_there_is_not_made_again(walk: Walk) -> None:
    """The recipe without its model is an ordinary one: whoever asked for it has done the work already."""
    await walk.get(ONE, "turned")
    assert await walk.get(ONE, "word_of_turned") == ("origin", word(recipe="turned"))
    assert walk.echo.derived == 1


async def test_its_entry_says_what_it_is_and_where_it_comes_from(walk: Walk) -> None:
    """Lineage tells series, recipe and model; the spec claims no place in a patient; the cost is all it took."""
    tensor = await walk.store.get(TensorRef(ONE, "plain"))
    tensor.release()
    outcome = await walk.store.get(TensorRef(ONE, "word_of_plain"))
    outcome.release()
    entry = outcome.entry
    assert isinstance(outcome, Filled)
    assert list(outcome.stages) == ["lookup", "identify", "queue", "triton", "admit"]
    assert entry.key.kind == "embedding"
    assert entry.lineage.model == FIRST
    assert (entry.lineage.recipe_name, entry.lineage.modality) == ("word_of_plain", "CT")
    assert entry.lineage.source_version == tensor.entry.lineage.source_version
    assert '"infer":{"model":"oracle","output":"WORD"}' in entry.lineage.recipe
    assert entry.spec is not None
    assert (entry.spec.shape, entry.spec.axes, entry.spec.spacing, entry.spec.affine) == ((1, 4), "", None, None)
    assert entry.cost_s > tensor.entry.cost_s
    await walk.settled()
    assert walk.nvme.lookup(entry.key) == entry


async def test_a_hit_asks_nobody(walk: Walk) -> None:
    """Who the model is, is known: a hit costs no question, and is right without the server."""
    await walk.get(ONE, "word_of_plain")
    asked = walk.oracle.asked
    walk.oracle.fault = TritonDown("gone")
    hit = walk.store.hit(TensorRef(ONE, "word_of_plain"))
    assert isinstance(hit, Hit)
    assert await content(hit) == word()
    hit.release()
    assert walk.oracle.asked == asked
    with pytest.raises(TritonDown):
        await walk.get(TWO, "word_of_plain")
    assert await walk.get(TWO, "plain") == ("ram", made("plain", OBJECTS[TWO])), "what could be done was"


async def test_an_unknown_model_is_asked_for_before_a_hit(walk: Walk) -> None:
    """Until the server has said who it is, nothing can be named after it."""
    await walk.get(ONE, "word_of_plain")
    walk.oracle.heard = None
    assert walk.store.hit(TensorRef(ONE, "word_of_plain")) is None
    assert await walk.get(ONE, "word_of_plain") == ("ram", word())


async def test_a_new_model_makes_new_embeddings_and_the_old_ones_go(walk: Walk) -> None:
    """Another version or configuration is another key; what it replaced is dropped unless somebody holds it."""
    await walk.get(ONE, "word_of_plain")
    held = await walk.store.get(TensorRef(TWO, "word_of_plain"))
    await walk.settled()
    walk.oracle.model = walk.oracle.heard = SECOND
    await walk.store.drop_made_by({FIRST})
    left = [resident.key.ref for resident in walk.store.residents() if resident.key.kind == "embedding"]
    assert left == [TWO]
    assert await content(held) == word(ref=TWO)
    held.release()
    assert await walk.get(ONE, "word_of_plain") == ("origin", word(SECOND))
    assert walk.echo.derived == 2, "tensors do not depend on the model"


async def test_only_what_the_model_made_is_dropped(walk: Walk) -> None:
    """Neither its tensors nor what others made."""
    await walk.get(ONE, "word_of_plain")
    await walk.settled()
    await walk.store.drop_made_by({SECOND})
    assert kinds(walk, "nvme") == ["embedding", "pack", "tensor"]
    await walk.store.drop_made_by({SECOND, FIRST})
    assert kinds(walk, "nvme") == ["pack", "tensor"]
    assert kinds(walk, "ram") == ["tensor"]


async def test_a_model_that_changes_while_it_runs_is_run_again(walk: Walk) -> None:
    """No embedding is named after a model that did not make it."""
    await walk.get(TWO, "word_of_plain")
    walk.oracle.gate = asyncio.Event()
    asking = asyncio.create_task(walk.get(ONE, "word_of_plain"))
    await until(lambda: bool(walk.oracle.calls))
    walk.oracle.model = SECOND
    walk.oracle.gate.set()
    assert await asking == ("origin", word(SECOND))
    outcome = await walk.store.get(TensorRef(ONE, "word_of_plain"))
    outcome.release()
    assert outcome.entry.lineage.model == SECOND


async def test_who_a_model_was_is_remembered_by_what_it_made(walk: Walk) -> None:
    """After a restart, the newest embedding says who the model of its recipe was."""
    assert walk.store.last_models() == {}
    await walk.get(ONE, "word_of_plain")
    walk.clock.advance(1)
    walk.oracle.model = walk.oracle.heard = SECOND
    await walk.get(TWO, "word_of_plain")
    await walk.settled()
    assert walk.store.last_models() == {EMBEDDINGS["word_of_plain"].infer: SECOND}


async def resident(walk: Walk, namespace: str = "serving") -> list[tuple[SeriesRef, bytes]]:
    model = await walk.store.model("oracle")
    found = [each async for some in walk.store.embeddings(model, namespace) for each in some]
    return sorted((entry.key.ref, payload) for entry, payload in found)


async def test_the_embeddings_of_a_model_are_found_in_either_tier(walk: Walk) -> None:
    """Each once, wherever it is, without counting as a use; what RAM has room for is put there."""
    both = [(ref, word(ref=ref)) for ref in (ONE, TWO)]
    for ref in (ONE, TWO):
        await walk.get(ref, "word_of_plain")
    await walk.get(ONE, "word_of_plain", "staging")
    await walk.settled()
    before = list(walk.ram.residents())
    assert await resident(walk) == both
    assert list(walk.ram.residents()) == before
    walk.evict_ram(ONE)
    assert await resident(walk) == both
    assert {r.key.ref for r in walk.ram.residents() if r.key.kind == "embedding"} == {ONE, TWO}
    assert await resident(walk, "staging") == both[:1]
    with pytest.raises(UnknownNamespace):
        await resident(walk, "elsewhere")


async def test_looking_at_all_embeddings_pushes_nothing_out_of_ram(tmp_path: Path) -> None:
    """What is read from NVMe stays out of a RAM that is full."""
    async with walking(tmp_path, ram=64 * KIB, settings=StoreSettings(revalidate="events")) as walk:
        refs = [SeriesRef(f"1.3.{n}", f"1.3.{n}.1") for n in range(12)]
        for ref in refs:
            walk.archive.write(ref, [ref.series.encode()])
            await walk.get(ref, "word_of_plain")
            await walk.settled()
        there = set(walk.ram.keys())
        assert len(await resident(walk)) == 12
        assert set(walk.ram.keys()) == there


async def test_models_are_found_by_name(walk: Walk) -> None:
    """A model that no recipe ends in, or not in that version, is nobody's; one that is not known is asked for."""
    assert await walk.store.model("oracle") == FIRST
    assert await walk.store.model("oracle", "1") == FIRST
    for name, version in (("oracle", "2"), ("nobody", "")):
        with pytest.raises(UnknownModel):
            await walk.store.model(name, version)


async def test_callers_join_one_inference(walk: Walk) -> None:
    """Twenty callers cost one decode and one inference, though the first of them leaves."""
    walk.oracle.gate = asyncio.Event()
    asking = [asyncio.create_task(walk.get(ONE, "word_of_plain")) for _ in range(20)]
    await until(lambda: bool(walk.oracle.calls))
    asking[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking[0]
    walk.oracle.gate.set()
    assert {answer for _, answer in await asyncio.gather(*asking[1:])} == {word()}
    assert (walk.echo.derived, walk.oracle.encoded) == (1, 1)


async def test_the_tensor_stays_until_the_model_has_read_it(walk: Walk) -> None:
    """An inference that nobody waits for any more still reads: until it ends, its tensor is pinned."""
    await walk.get(ONE, "plain")
    walk.oracle.gate = asyncio.Event()
    asking = asyncio.create_task(walk.get(ONE, "word_of_plain"))
    await until(lambda: bool(walk.oracle.calls))
    await walk.store.close()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    assert walk.store.evict(ONE.study) == 2, "pack and tensor on NVMe"
    assert walk.pins() == 1
    walk.oracle.gate.set()
    await asyncio.gather(*walk.oracle.calls)
    await asyncio.sleep(0)
    assert walk.pins() == 0


async def test_many_embeddings_at_once_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Each takes a tensor's fill on its way; with one slot for either, all are made."""
    async with walking(tmp_path, flights=FlightSettings(fills=1)) as walk:
        refs = [SeriesRef(f"1.3.{n}", f"1.3.{n}.1") for n in range(6)]
        for ref in refs:
            walk.archive.write(ref, [ref.series.encode()])
        answers = await asyncio.gather(*(walk.get(ref, "word_of_plain") for ref in refs))
        assert [answer for _, answer in answers] == [said(FIRST, ref.series.encode()) for ref in refs]


async def test_demand_moves_a_warm_embeddings_tensor_ahead(tmp_path: Path) -> None:
    """Who asks for an embedding that is only being warmed does not queue behind other warm-ups' tensors."""
    async with walking(tmp_path, flights=FlightSettings(fills=1)) as walk:
        refs = [SeriesRef(f"1.3.{n}", f"1.3.{n}.1") for n in range(4)]
        for ref in refs:
            walk.archive.write(ref, [ref.series.encode()])
        done: list[str] = []

        async def get(ref: SeriesRef, recipe: str, priority: Priority) -> None:
            (await walk.store.get(TensorRef(ref, recipe), priority)).release()
            done.append(f"{refs.index(ref)} {recipe} {priority.name}")

        walk.echo.gate = asyncio.Event()
        warm = [asyncio.create_task(get(ref, "plain", Priority.WARM)) for ref in refs[:3]]
        warm.append(asyncio.create_task(get(refs[3], "word_of_plain", Priority.WARM)))
        # a fill and the encoding that waits for its own; three fills wait
        await until(lambda: walk.store.under_way == (2, 3))
        demand = asyncio.create_task(get(refs[3], "word_of_plain", Priority.DEMAND))
        (flight,) = walk.store._encodings._flights.values()
        while flight.waiters < 2:
            await asyncio.sleep(0)
        walk.echo.gate.set()
        await asyncio.gather(*warm, demand)
        assert done[0] == "0 plain WARM", "what runs is not interrupted"
        assert done.index("2 plain WARM") > done.index("3 word_of_plain DEMAND")


async def test_a_tensor_too_large_for_the_arena_has_no_embedding(tmp_path: Path) -> None:
    """A model is given what is in the arena; anything else is refused with the reason, and nothing is left held."""
    async with walking(tmp_path, ram=64 * KIB, nvme=8192 * KIB) as walk:
        walk.archive.write(ONE, [b"x" * 100 * KIB])
        with pytest.raises(TooLarge, match="arena"):
            await walk.get(ONE, "word_of_plain")
