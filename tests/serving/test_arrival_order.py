"""Whatever order events come in, late, twice or long after: what is held in the end is what the origin has."""

import asyncio
import itertools
import os
import tempfile
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import NotFound
from cache.keys import SeriesRef
from cache.store import StoreSettings
from serving.arrivals.event import Event
from serving.arrivals.queue import ArrivalSettings
from serving.arrivals.sqlite import SqliteQueue
from serving.filler import Filler, WarmSettings
from serving.plan import PlanSettings, default_rule
from serving.warm import Warmer
from tests.cache.walk import KIB, Walk, made, until, walking
from tests.conformance.queue import A, B
from tests.serving.test_arrivals import Hurry

SERIES = (A, B)
TICKS = itertools.count(2_000_000)


class Step(msgspec.Struct, frozen=True):
    """An object is written or removed, and its event delivered after these later steps, in some order among others."""

    series: int
    number: int
    action: Literal["created", "removed"]
    delivered: tuple[tuple[int, int], ...]
    settle: bool


STEPS = st.lists(
    st.builds(
        Step,
        series=st.integers(0, 1),
        number=st.integers(0, 2),
        action=st.sampled_from(["created", "created", "removed"]),
        delivered=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=3).map(tuple),
        settle=st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


def change(walk: Walk, step: Step) -> Event:
    """Carry out the step at the origin; what its source says of it."""
    ref, tick = SERIES[step.series], next(TICKS)
    path = walk.archive.path / ref.study / ref.series / f"{step.number:03d}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    if step.action == "created":
        path.write_bytes(tick.to_bytes(4, "little") * KIB)
        os.utime(path, (tick, tick))
    else:
        path.unlink(missing_ok=True)
    return Event(f"id-{tick}", "s3", step.action, path.relative_to(walk.archive.path).as_posix())


def objects(walk: Walk, ref: SeriesRef) -> list[bytes]:
    folder = walk.archive.path / ref.study / ref.series
    return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.exists() else []


async def carried_out(queue: SqliteQueue, walk: Walk) -> None:
    """Return when no event waits, and nothing is written or dropped any more."""
    async with asyncio.timeout(100):
        while (depth := await queue.depth()).new or depth.assigned:
            await asyncio.sleep(0.001)  # its file is written by threads, and is only asked
        assert depth.dead == 0
        await walk.settled()
        await until(lambda: not walk.store._outdated.keys)


async def check(walk: Walk) -> None:
    """Catalogue and entries are what the origin says."""
    for ref in SERIES:
        held = {(each.key.kind, each.key.source_version) for each in walk.store.residents() if each.key.ref == ref}
        recorded = walk.store._catalog.recorded(ref)
        try:
            manifest = await walk.store._finder.manifest(ref)
        except NotFound:
            assert (recorded, held) == (None, set())
        else:
            assert recorded is not None
            assert recorded.manifest == manifest
            assert held == {(kind, manifest.source_version) for kind in ("pack", "tensor")}
            assert await walk.get(ref) == ("ram", made("plain", objects(walk, ref)))


async def story(folder: Path, steps: list[Step]) -> None:
    chosen = ArrivalSettings(warm=("plain",), quiet_s=0.0)
    clock = Hurry()
    async with walking(folder, settings=StoreSettings(revalidate="events", write_behind=100)) as walk:
        queue = await SqliteQueue.open(folder / "arrivals.sqlite", chosen)
        filler = Filler(
            settings=WarmSettings(),
            plan=PlanSettings(),
            default=default_rule(chosen.warm, chosen.namespace),
            store=walk.store,
            catalog=walk.catalog,
            clock=clock,
            observer=walk.ears,
        )
        warmer = Warmer(chosen, queue, walk.store, filler, clock=clock, observer=walk.ears)
        warmer.start()
        try:
            waiting: list[tuple[int, int, Event]] = []  # delivered after which step, in which order, what
            for at, step in enumerate(steps):
                event = change(walk, step)
                waiting += [(max(at, after), order, event) for after, order in step.delivered]
                ready = sorted((e for e in waiting if e[0] <= at or at == len(steps) - 1), key=lambda e: e[:2])
                for each in ready:
                    waiting.remove(each)
                    await warmer.accept([each[2]])
                if step.settle:
                    await carried_out(queue, walk)
            await carried_out(queue, walk)
            await check(walk)
        finally:
            await warmer.close()
            await filler.close()
            await queue.close()


@pytest.mark.slow
@given(steps=STEPS)
@settings(max_examples=30, deadline=None)
def test_any_order_ends_alike(steps: list[Step]) -> None:
    """Late slices, deletions, repeats, reordered and replayed events: catalogue and entries end as the origin is."""
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(story(Path(name), steps))
