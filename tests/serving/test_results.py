"""Answers that are kept: found for the same question only, and never for another model's."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from cache.entry import ModelIdentity
from cache.errors import ModelChanged, TritonDown
from cache.keys import SeriesRef, TensorRef
from cache.store import StoreSettings
from serving.models import Models, Served
from serving.results import Place, Question, Results
from serving.triton import TritonSettings, VirtualModel
from tests.cache.walk import MIB, Walk, walking

ONE = TensorRef(SeriesRef("1.2.1", "1.2.1.1"), "plain")
TWO = TensorRef(SeriesRef("1.2.2", "1.2.2.1"), "plain")
SETTINGS = TritonSettings(models={"m": VirtualModel(results=True), "n": VirtualModel()}, max_result=1000)
ASKED = Question("m", "", {"V": ((ONE, ""),)}, "http", b"outputs")


class Triton:
    """Who the models are, in place of Models, which asks a real one."""

    def __init__(self) -> None:
        self.served = Served(ModelIdentity("m", "1", "c1"), repeats=True)
        self.down = False

    def known(self, model: str, version: str = "") -> Served | None:
        return self.served

    async def identify(self, model: str, version: str = "") -> Served:
        return self.served

    async def confirm(self, model: ModelIdentity, version: str = "") -> None:
        if self.down:
            raise TritonDown("gone")
        if model != self.served.identity:
            raise ModelChanged("another")


class Cached:
    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.triton = Triton()
        self.results = Results(walk.store, cast(Models, self.triton), SETTINGS, walk.clock, walk.ears)

    async def place(self, asked: Question = ASKED) -> Place:
        place = await self.results.place(asked)
        assert place is not None
        return place

    async def answer(self, asked: Question = ASKED) -> bytes | None:
        kept = await self.results.find(await self.place(asked))
        return None if kept is None else kept.answer

    async def keep(self, place: Place, answer: bytes = b"answer") -> None:
        """Keep it, and wait until it is, or is not."""
        self.results.keep(place, answer, 0.5)
        await asyncio.gather(*self.results._behind)


@pytest.fixture
async def cached(tmp_path: Path) -> AsyncIterator[Cached]:
    """Results over a store that has two series at its origin, and nothing of either."""
    async with walking(tmp_path, settings=StoreSettings(revalidate="events")) as walk:
        for number, want in enumerate((ONE, TWO)):
            walk.archive.write(want.ref, [bytes([number]) * 100])
        yield Cached(walk)


async def test_an_answer_is_found_again_without_its_tensor(cached: Cached) -> None:
    """Only the series' listing is needed: nothing is fetched, decoded or read; also from NVMe."""
    assert await cached.answer() is None
    await cached.keep(await cached.place())
    assert await cached.answer() == b"answer"
    await cached.walk.settled()
    cached.walk.evict_ram(ONE.ref)
    assert await cached.answer() == b"answer"
    assert (cached.walk.fetched(), cached.walk.echo.derived) == (0, 0)
    assert (cached.walk.ears.counts["results/hit"], cached.walk.ears.counts["results/miss"]) == (2, 1)


async def test_an_answer_is_an_entry(cached: Cached) -> None:
    """It is in both tiers and their budgets, says who made it and of what, and goes with its series' version."""
    await cached.keep(await cached.place())
    await cached.walk.settled()
    held = list(cached.walk.store.residents(ONE.ref.study))
    assert [(each.key.kind, each.tier) for each in held] == [("result", "ram"), ("result", "nvme")]
    entry = cached.walk.store.entry(held[0].key)
    assert entry is not None
    assert (entry.lineage.model, entry.lineage.recipe_name, entry.cost_s) == (cached.triton.served.identity, "m", 0.5)
    assert (await cached.walk.store.key(ONE)).digest in entry.lineage.recipe
    cached.walk.archive.write(ONE.ref, [b"another"])
    cached.walk.store.changed(ONE.ref)
    assert await cached.answer() is None
    assert cached.walk.store.residents(ONE.ref.study) == []


@pytest.mark.parametrize(
    "other",
    [
        {"named": {"V": ((TWO, ""),)}},
        {"named": {"V": ((msgspec.structs.replace(ONE, recipe="turned"), ""),)}},
        {"named": {"V": ((msgspec.structs.replace(ONE, namespace="staging"), ""),)}},
        {"named": {"V": ((ONE, "0-3"),)}},
        {"named": {"W": ((ONE, ""),)}},
        {"named": {"V": ((ONE, ""), (TWO, ""))}},
        {"named": {"V": ((ONE, ""),), "W": ((TWO, ""),)}},
        {"form": "grpc"},
        {"rest": b"other outputs"},
    ],
)
async def test_another_question_has_another_answer(cached: Cached, other: dict[str, Any]) -> None:
    """Whatever can make a difference, does."""
    await cached.keep(await cached.place())
    assert await cached.answer(msgspec.structs.replace(ASKED, **other)) is None


async def test_the_same_question_written_otherwise_has_the_same_answer(cached: Cached) -> None:
    """The order of inputs is none of the model's business."""
    both = {"V": ((ONE, ""),), "W": ((TWO, ""),)}
    turned = dict(reversed(both.items()))
    place = await cached.place(msgspec.structs.replace(ASKED, named=both))
    assert await cached.place(msgspec.structs.replace(ASKED, named=turned)) == place


async def test_another_model_answers_for_itself(cached: Cached) -> None:
    """A new version or configuration has no answers yet; those of the old one can be dropped together."""
    before = cached.triton.served
    await cached.keep(await cached.place())
    cached.triton.served = Served(ModelIdentity("m", "1", "c2"), repeats=True)
    assert await cached.answer() is None
    await cached.walk.settled()
    await cached.walk.store.drop_made_by({before.identity})
    assert cached.walk.store.residents() == []


async def test_what_may_not_be_kept_is_not(cached: Cached) -> None:
    """Answers too long, empty, or of a model that was replaced while it ran, or that nobody can ask about any more."""
    place = await cached.place()
    await cached.keep(place, b"x" * 1001)
    await cached.keep(place, b"")
    cached.triton.down = True
    await cached.keep(place)
    cached.triton.down = False
    cached.triton.served = Served(ModelIdentity("m", "2", "c1"), repeats=True)
    await cached.keep(place)
    assert cached.walk.store.residents() == []


async def test_which_questions_have_kept_answers(cached: Cached) -> None:
    """None of models that are not set to, none within a sequence, none of models whose answers differ by nature."""
    assert cached.results.keeps("m", {"priority": 1})
    assert not cached.results.keeps("n", {})
    assert not cached.results.keeps("m", {"sequence_id": 7, "sequence_start": True})
    assert await cached.results.place(msgspec.structs.replace(ASKED, named={})) is None
    cached.triton.served = Served(cached.triton.served.identity, repeats=False)
    assert await cached.results.place(ASKED) is None


async def test_answers_stay_within_the_budget(tmp_path: Path) -> None:
    """Many answers push out each other, never more; where all is held, an answer is not kept."""
    async with walking(tmp_path, ram=64 << 10, nvme=8 * MIB, settings=StoreSettings(revalidate="events")) as walk:
        walk.archive.write(ONE.ref, [b"x"])
        cached = Cached(walk)
        for number in range(40):
            asked = msgspec.structs.replace(ASKED, rest=str(number).encode())
            await cached.keep(await cached.place(asked))
        usage = walk.ram.usage("serving")
        assert 0 < usage.used <= usage.budget
        assert await cached.answer(asked) == b"answer"
