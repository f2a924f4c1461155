"""Planned entries are made ready in the order of their urgency, within bounds, and jobs tell how far they are."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache.attributes import Attributes
from cache.errors import NotFound, OriginDown, UnknownStudy, WorkerDied
from cache.flight import FlightSettings
from cache.keys import SeriesRef, TensorRef
from cache.origin.faults import FaultPlan
from cache.store import StoreSettings
from serving.filler import Filler, Job, WarmSettings
from serving.log import code_of
from serving.plan import Fill, PlanSettings, PriorsRule, Rule, default_rule
from tests.cache.walk import Walk, until, walking

SERIES = [SeriesRef("1.2", f"1.2.{number}") for number in range(1, 5)]
DAY = 86400.0


@asynccontextmanager
async def filling(
    path: Path, settings: WarmSettings | None = None, rules: Sequence[Rule] = (), recipes: Sequence[str] = ("plain",)
) -> AsyncIterator[tuple[Walk, Filler]]:
    """A filler over a real store, and four series of three objects in its origin."""
    async with walking(path, settings=StoreSettings(revalidate="events"), flights=FlightSettings(fills=8)) as walk:
        for ref in SERIES:
            walk.archive.write(ref, [f"{ref.series}/{n}".encode() for n in range(3)])
        filler = Filler(
            settings=settings or WarmSettings(),
            plan=PlanSettings(tuple(rules)),
            default=default_rule(recipes, "serving"),
            store=walk.store,
            catalog=walk.catalog,
            clock=walk.clock,
            observer=walk.ears,
        )
        try:
            yield walk, filler
        finally:
            await filler.close()
            await walk.settled()


def fill(ref: SeriesRef, recipe: str = "plain", priority: int = 10) -> Fill:
    return Fill(TensorRef(ref, recipe), priority, "as the test wants it")


async def ended(filler: Filler, job: Job) -> Job:
    """The job once it has ended."""
    async with asyncio.timeout(60):
        async for _ in filler.follow(job.id):
            pass
    return job


async def test_a_job_makes_what_is_not_ready(tmp_path: Path) -> None:
    """Entries are made once; asked for again, all of it is ready, and nothing is fetched or read."""
    async with filling(tmp_path) as (walk, filler):
        wanted = [fill(ref, recipe) for ref in SERIES for recipe in ("plain", "turned")]
        job = await ended(filler, filler.warm_all(wanted))
        assert (job.kind, job.total, job.done, job.ready, job.failed) == ("warm", 8, 8, 0, {})
        assert job.bytes == 2 * sum(len(f"{ref.series}/0") * 3 for ref in SERIES)
        assert walk.fetched() == 12
        assert all(walk.store.held(each.want) for each in wanted)
        again = await ended(filler, filler.warm_all(wanted))
        assert (again.done, again.ready, again.bytes) == (8, 8, 0)
        assert walk.fetched() == 12


async def test_failures_are_told_and_hold_up_nobody(tmp_path: Path) -> None:
    """Each failure has its code; a rerun makes what failed, and leaves the rest alone."""
    async with filling(tmp_path) as (walk, filler):
        gone = SeriesRef("1.9", "1.9.1")
        walk.origin.plan = FaultPlan(down=1.0, methods=("fetch",), times=1)
        job = await ended(filler, filler.warm_all([fill(ref) for ref in (*SERIES, gone)]))
        assert job.failed == dict.fromkeys((f"{ref.study}/{ref.series}/plain" for ref in SERIES), "origin-down") | {
            "1.9/1.9.1/plain": "unknown-study"
        }
        assert (job.total, job.done, job.failures) == (5, 0, 5)
        assert walk.ears.counts["warm_failures/origin-down"] == 4
        walk.heal()
        job = await ended(filler, filler.warm_all([fill(ref) for ref in SERIES]))
        assert (job.done, job.failures) == (4, 0)


async def test_the_most_urgent_goes_first(tmp_path: Path) -> None:
    """Within a job and across jobs; no more are under way than the settings say."""
    order: list[str] = []
    async with filling(tmp_path, WarmSettings(parallel=1)) as (walk, filler):
        walk.echo.gate = asyncio.Event()
        jobs = [filler.warm_all([fill(SERIES[0], priority=50)])]
        while walk.store.under_way[0] == 0:
            await asyncio.sleep(0)
        jobs.append(filler.warm_all([fill(SERIES[1], priority=90)]))
        jobs.append(filler.warm_all([fill(SERIES[2], priority=70), fill(SERIES[3], priority=20)]))
        for _ in range(50):
            await asyncio.sleep(0)
        assert walk.store.under_way[0] == 1
        watch = [asyncio.create_task(_note(filler, job, order, name)) for job, name in zip(jobs, "abc", strict=True)]
        walk.echo.gate.set()
        await asyncio.gather(*watch)
        made = sorted(walk.ram.residents(), key=lambda resident: walk.ram.lookup(resident.key).lineage.made_at)  # type: ignore[union-attr]  # it is resident
        assert {resident.key.series for resident in made} == {ref.series for ref in SERIES}
        assert order == ["a", "c", "b"]


async def _note(filler: Filler, job: Job, order: list[str], name: str) -> None:
    await ended(filler, job)
    order.append(name)


async def test_bytes_on_their_way_are_bounded(tmp_path: Path) -> None:
    """What would exceed the bound waits; what is larger than all of it goes alone."""
    async with filling(tmp_path, WarmSettings(parallel=4, origin_bytes=40)) as (walk, filler):
        walk.echo.gate = asyncio.Event()
        job = filler.warm_all([fill(ref) for ref in SERIES])  # 21 bytes each
        while walk.store.under_way[0] == 0:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert walk.store.under_way == (1, 0)
        walk.echo.gate.set()
        await ended(filler, job)
        walk.archive.write(big := SeriesRef("1.3", "1.3.1"), [bytes(100)])
        assert (await ended(filler, filler.warm_all([fill(big)]))).done == 1


class Rests:
    """Stands for ``asyncio.sleep`` of the filler's: keeps how long it is to rest, and lets it go when told."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun = asyncio.Event()
        self.over = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.begun.set()
        await self.over.wait()


@asynccontextmanager
async def asked_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch, took: float
) -> AsyncIterator[tuple[Walk, Filler, Job, Rests]]:
    """Two series are warmed in one lane: while the first was, which took so long, a request was answered."""
    async with filling(path, WarmSettings(parallel=1)) as (walk, filler):
        rests = Rests()
        # the filler's alone: the store and the event loop go by the real ones
        monkeypatch.setattr("serving.filler.asyncio", SimpleNamespace(**(vars(asyncio) | {"sleep": rests.sleep})))
        monkeypatch.setattr("serving.filler.time", SimpleNamespace(perf_counter=walk.clock.monotonic))
        await walk.get(SERIES[3])
        walk.echo.gate = asyncio.Event()
        job = filler.warm_all([fill(SERIES[0]), fill(SERIES[1])])
        await until(lambda: walk.echo.derived == 2)
        assert (await walk.get(SERIES[3]))[0] == "ram"
        walk.clock.advance(took)
        walk.echo.gate.set()
        yield walk, filler, job, rests


@pytest.mark.parametrize(("took", "rest"), [(0.25, 0.25), (30.0, 0.5)])
async def test_a_lane_rests_where_somebody_was_answered(
    took: float, rest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as its entry took, within a bound: that is told as done, and the next, made after that, needs no rest."""
    async with asked_meanwhile(tmp_path, monkeypatch, took) as (walk, filler, job, rests):
        await rests.begun.wait()
        assert rests.seconds == [rest]
        assert (job.done, walk.echo.derived, walk.store.under_way) == (1, 2, (0, 0))
        rests.over.set()
        await ended(filler, job)
        assert (job.done, rests.seconds) == (2, [rest])


async def test_a_lane_whose_warm_up_fails_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It took its time on the cores all the same: it is told at once, and the next one is tried after the rest."""
    async with asked_meanwhile(tmp_path, monkeypatch, 30.0) as (walk, filler, job, rests):
        walk.echo.derive_fault = WorkerDied("died")
        await rests.begun.wait()
        assert (job.failures, walk.echo.derived, rests.seconds) == (1, 2, [0.5])
        rests.over.set()
        await ended(filler, job)
        assert job.failed == {f"{ref.study}/{ref.series}/plain": WorkerDied.code for ref in SERIES[:2]}
        assert (job.done, walk.echo.derived, rests.seconds) == (0, 3, [0.5])
        walk.heal()
        again = await ended(filler, filler.warm_all([fill(SERIES[0]), fill(SERIES[1])]))
        assert (again.done, again.failures) == (2, 0)


async def test_demand_joins_a_warm_up(tmp_path: Path) -> None:
    """A request for what is being warmed costs no second fill."""
    async with filling(tmp_path) as (walk, filler):
        walk.echo.gate = asyncio.Event()
        job = filler.warm_all([fill(SERIES[0])])
        while walk.store.under_way[0] == 0:
            await asyncio.sleep(0)
        asked = asyncio.create_task(walk.get(SERIES[0]))
        await asyncio.sleep(0)
        walk.echo.gate.set()
        assert (await asked)[0] == "origin"
        await ended(filler, job)
        assert (walk.fetched(), walk.echo.derived) == (3, 1)


async def test_a_study_by_the_rules(tmp_path: Path) -> None:
    """Its series are described first, and the rules decide; what no rule wants is not made."""
    rules = [Rule("mr", modality=("MR",), recipes=("turned",)), Rule("few", max_slices=2)]
    async with filling(tmp_path, rules=rules) as (walk, filler):
        walk.echo.attributes = Attributes(modality="MR", patient="p", taken_at=5 * DAY)
        walk.archive.write(SeriesRef("1.2", "1.2.9"), [b"one"])
        decisions = await filler.explain("1.2")
        assert {decision.rule for decision in decisions} == {"mr"}
        assert all(decision.series.attributes == walk.echo.attributes for decision in decisions)
        assert walk.fetched() == 0
        failures: dict[str, str] = {}
        fills = await filler.wanted(
            [], ["1.2", "1.77"], [SERIES[0]], lambda what, error: failures.update({what: code_of(error)})
        )
        assert failures == {"1.77": "unknown-study"}
        assert {each.want for each in fills} == {TensorRef(decision.series.ref, "turned") for decision in decisions}
        assert filler.decisions("1.2") == decisions
        with pytest.raises(UnknownStudy):
            await filler.explain("1.77")


async def test_a_series_that_arrives(tmp_path: Path) -> None:
    """It is read before the rules decide, and its patient's earlier studies are called for."""
    rules = [Rule("ct", modality=("CT",), recipes=("plain",), priors=PriorsRule(recipes=("turned",)))]
    async with filling(tmp_path, rules=rules) as (walk, filler):
        before = SeriesRef("1.1", "1.1.1")
        walk.archive.write(before, [b"one"])
        walk.echo.attributes = Attributes(modality="CT", patient="p", taken_at=2 * DAY)
        await ended(filler, filler.index("1.1/"))
        walk.echo.attributes = Attributes(modality="CT", patient="p", taken_at=5 * DAY)
        decision = await filler.decide(SERIES[0])
        assert [str(each.want) for each in decision.fills] == ["1.2/1.2.1/plain"]
        assert [str(each.want) for each in decision.priors] == ["1.1/1.1.1/turned"]


async def test_without_rules_nothing_is_read(tmp_path: Path) -> None:
    """The default needs no attributes: a series that arrives costs no request of its own."""
    async with filling(tmp_path, recipes=("plain", "turned")) as (walk, filler):
        decision = await filler.decide(SERIES[0])
        assert [each.want.recipe for each in decision.fills] == ["plain", "turned"]
        assert walk.origin.calls.total() == 0


async def test_an_index_from_headers_alone(tmp_path: Path) -> None:
    """Every series under the prefix is noted with its attributes; no object is fetched whole; again, it is the same."""
    async with filling(tmp_path) as (walk, filler):
        walk.archive.write(other := SeriesRef("1.3", "1.3.1"), [b"one"])
        walk.echo.attributes = Attributes(modality="CT", taken_at=3.0)
        job = await ended(filler, filler.index("1.2/"))
        assert (job.kind, job.total, job.done, job.failures) == ("index", 4, 4, 0)
        found = walk.catalog.taken_since(1.0, "CT")
        assert [(known.ref, known.objects) for known in found] == [(ref, 3) for ref in SERIES]
        assert (await ended(filler, filler.index(""))).total == 5
        assert [known.ref for known in walk.catalog.taken_since(1.0)] == [*SERIES, other]
        assert walk.fetched() == 0


async def test_an_index_that_cannot_begin(tmp_path: Path) -> None:
    """A job whose listing fails ends with the reason."""
    async with filling(tmp_path) as (walk, filler):
        walk.origin.plan = FaultPlan(down=1.0, methods=("list",))
        job = await ended(filler, filler.index(""))
        assert (job.ended, job.error) == (True, OriginDown.code)
        walk.heal()


async def test_who_follows_a_job(tmp_path: Path) -> None:
    """Followers see it end, also if it ended before; at a shutdown they are let go; a strange job is not found."""
    async with filling(tmp_path) as (walk, filler):
        job = await ended(filler, filler.warm_all([fill(SERIES[0])]))
        assert [told.ended async for told in filler.follow(job.id) if told is not None] == [True]
        walk.echo.gate = asyncio.Event()
        running = filler.warm_all([fill(SERIES[1])])
        follower = asyncio.create_task(ended(filler, running))
        while walk.store.under_way[0] == 0:
            await asyncio.sleep(0)
        await filler.hush()
        assert not (await follower).ended
        walk.echo.gate.set()
        await ended(filler, running)
        with pytest.raises(NotFound):
            filler.job("another")
        with pytest.raises(NotFound):
            await anext(filler.follow("another"))
