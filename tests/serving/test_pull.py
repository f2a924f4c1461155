"""Origins that are asked: nothing is left out, whatever fails in between, and what is known already is no event."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cache.catalog import Current
from cache.errors import ConfigError, OriginDenied, OriginDown, Overloaded, QueueDown
from cache.keys import Manifest, SeriesRef, SourceObject
from cache.origin.find import Survey
from serving.arrivals.changes import OrthancChanges, OrthancSettings
from serving.arrivals.cursors import Cursors
from serving.arrivals.event import Event
from serving.arrivals.listing import ListingSettings, NewObjects, Reconciler, ReconcileSettings, differences
from serving.arrivals.pull import Found, Puller, pause_s
from tests.cache.walk import Ears
from tests.conformance.tier import FakeClock

A, B, C = (SeriesRef("1.2.3", f"1.2.3.{n}") for n in range(3))


def objects(*names: str) -> list[SourceObject]:
    return [SourceObject(f"{name}.dcm", 10, f"e-{name}") for name in names]


# ------------------------------------------------------------------ the loop


class Taker:
    def __init__(self) -> None:
        self.taken: list[str] = []
        self.fault: Exception | None = None
        self.got = asyncio.Event()

    async def accept(self, events: Sequence[Event]) -> int:
        if self.fault is not None:
            raise self.fault
        self.taken += [event.id for event in events]
        self.got.set()
        return len(events)


class Numbers:
    """A pull that finds one number more at each look."""

    name = "numbers"

    def __init__(self) -> None:
        self.faults: list[Exception] = []
        self.closed = False

    async def look(self, cursor: str) -> Found:
        if self.faults:
            raise self.faults.pop(0)
        number = int(cursor or 0) + 1
        return Found([Event(str(number), "numbers", "created", key="k")], str(number), 0.0)

    def taken(self) -> None:
        return

    async def close(self) -> None:
        self.closed = True


async def test_a_cursor_goes_on_where_it_was(tmp_path: Path) -> None:
    """It is noted after the events were taken over, and outlives the daemon."""
    taker = Taker()
    for _ in range(2):
        puller = Puller([], taker, Cursors(tmp_path / "cursors.json"), Ears())
        for _ in range(2):
            await puller.step(Numbers())
    assert taker.taken == ["1", "2", "3", "4"]


async def test_many_events_are_handed_over_in_parts(tmp_path: Path) -> None:
    """A queue that could not take all of them at once takes them a thousand at a time."""

    class Many(Numbers):
        async def look(self, cursor: str) -> Found:
            return Found([Event(str(n), "numbers", "created", key="k") for n in range(2500)], "1", 0.0)

    sizes: list[int] = []

    class Counting(Taker):
        async def accept(self, events: Sequence[Event]) -> int:
            sizes.append(len(events))
            return await super().accept(events)

    taker = Counting()
    await Puller([], taker, Cursors(tmp_path / "cursors.json"), Ears()).step(Many())
    assert (sizes, len(set(taker.taken))) == ([1000, 1000, 500], 2500)


@pytest.mark.parametrize("fault", [Overloaded("full"), QueueDown("down")])
async def test_what_is_not_taken_over_comes_again(tmp_path: Path, fault: Exception) -> None:
    """As long as the queue takes nothing the cursor stays where it was."""
    taker = Taker()
    puller = Puller([], taker, Cursors(tmp_path / "cursors.json"), Ears())
    taker.fault = fault
    with pytest.raises(type(fault)):
        await puller.step(Numbers())
    taker.fault = None
    await puller.step(Numbers())
    assert taker.taken == ["1"]


async def test_it_goes_on_after_failures(tmp_path: Path) -> None:
    """An origin that cannot be asked is asked again, a bug of ours does not end it either; each is counted."""
    pull, taker, ears = Numbers(), Taker(), Ears()
    pull.faults = [OriginDown("down"), RuntimeError("a bug")]
    puller = Puller([pull], taker, Cursors(tmp_path / "cursors.json"), ears, chance=lambda: 4.0)  # no pause at all
    puller.start()
    await taker.got.wait()
    await puller.close()
    assert taker.taken[0] == "1"
    assert (ears.counts["pulls/numbers/origin-down"], ears.counts["pulls/numbers/error"]) == (1, 1)
    assert pull.closed


def test_pauses_grow_and_have_an_end() -> None:
    """Twice as long each time, five minutes at most."""
    assert [pause_s(n) for n in (0, 1, 2, 3)] == [1, 2, 4, 8]
    assert pause_s(10_000) == 300


async def test_cursors_on_disk(tmp_path: Path) -> None:
    """Each name has its own; a file that is none is a reason not to start; a disk that refuses changes nothing."""
    path = tmp_path / "cursors.json"
    cursors = Cursors(path)
    assert cursors.get("a") == ""
    await cursors.set("a", "1")
    await cursors.set("b", "2")
    assert (Cursors(path).get("a"), Cursors(path).get("b")) == ("1", "2")
    (tmp_path / "cursors.json.new").mkdir()
    with pytest.raises(QueueDown):
        await cursors.set("a", "3")
    assert cursors.get("a") == "1"
    path.write_text("nothing of ours")
    with pytest.raises(ConfigError, match=r"cursors\.json"):
        Cursors(path)


# ------------------------------------------------------------------ Orthanc's changes


def orthanc(answers: dict[str, Any]) -> web.Application:
    """What an Orthanc would answer, by path; None is a 404, a number that status."""
    app = web.Application()

    async def answer(request: web.Request) -> web.Response:
        found = answers.get(request.path_qs, answers.get(request.path))
        if found is None or isinstance(found, int):
            return web.Response(status=found or 404)
        return web.Response(text=found if isinstance(found, str) else json.dumps(found))

    app.router.add_get("/{path:.*}", answer)
    return app


def change(number: int, kind: str, level: str = "Series", name: str = "s") -> dict[str, Any]:
    return {"ChangeType": kind, "ID": name, "ResourceType": level, "Seq": number, "Path": f"/x/{name}", "Date": "2026"}


TAGS = {
    "/series/s": {
        "MainDicomTags": {"SeriesInstanceUID": "1.2.3.4", "Modality": "MR"},
        "ParentStudy": "p",
        "Instances": ["i", "j"],
        "LastUpdate": "20260102T030405",
    },
    "/studies/p": {"MainDicomTags": {"StudyInstanceUID": "1.2.3"}, "LastUpdate": "20260102T030405"},
}


async def looked(answers: dict[str, Any], cursor: str = "") -> Found:
    async with TestServer(orthanc(answers)) as server:
        pull = OrthancChanges(OrthancSettings(str(server.make_url("/")), "user", "password", limit=2))
        try:
            return await pull.look(cursor)
        finally:
            await pull.close()


async def test_orthanc_is_asked() -> None:
    """Stable series become the events that the script would have posted; more is asked for at once."""
    first = [change(1, "NewSeries"), change(2, "StableSeries")]
    found = await looked(TAGS | {"/changes?since=0&limit=2": {"Changes": first, "Done": False, "Last": 2}})
    (event,) = found.events
    assert (event.study, event.series, event.modality) == ("1.2.3", "1.2.3.4", "MR")
    assert (event.action, event.expected, event.complete) == ("created", 2, True)
    assert (found.cursor, found.wait_s) == ("2", 0.0)
    rest = [change(3, "StableStudy", "Study", "p"), change(4, "UpdatedMetadata", "Study", "p")]
    found = await looked(TAGS | {"/changes?since=2&limit=2": {"Changes": rest, "Done": True, "Last": 4}}, "2")
    assert [(event.action, event.study, event.series) for event in found.events] == [("changed", "1.2.3", "")]
    assert (found.cursor, found.wait_s) == ("4", 5.0)


async def test_what_orthanc_has_deleted_since() -> None:
    """A series, or its study, that is no more when it is asked about is left out; the rest goes on."""
    gone = [change(1, "StableSeries", name="gone"), change(2, "StableSeries")]
    answers = {"/changes?since=0&limit=2": {"Changes": gone, "Done": True, "Last": 2}}
    assert len((await looked(TAGS | answers)).events) == 1
    assert (await looked({"/series/s": TAGS["/series/s"]} | answers)).events == []


async def test_an_orthanc_that_was_set_up_anew() -> None:
    """It counts from the start again, and so it is asked from the start."""
    found = await looked({"/changes?since=9&limit=2": {"Changes": [], "Done": True, "Last": 3}}, "9")
    assert found == Found([], "0", 0.0)


@pytest.mark.parametrize(
    ("answer", "error"), [(None, OriginDown), (401, OriginDenied), (500, OriginDown), ("<html>", OriginDown)]
)
async def test_an_orthanc_that_does_not_answer(answer: Any, error: type[Exception]) -> None:
    """It is said what is wrong; nothing is taken for news."""
    with pytest.raises(error, match="Orthanc at http"):
        await looked({"/changes": answer})


async def test_nobody_answers() -> None:
    """Nor does a port behind which there is nothing."""
    pull = OrthancChanges(OrthancSettings("http://127.0.0.1:9"))
    with pytest.raises(OriginDown):
        await pull.look("")
    await pull.close()


# ------------------------------------------------------------------ listings


def listing(found: list[tuple[SourceObject, float]], clock: FakeClock, **changes: Any) -> NewObjects:
    async def dated(prefix: str) -> Sequence[tuple[SourceObject, float]]:
        return found

    return NewObjects(ListingSettings(**({"interval_s": 60.0, "overlap_s": 100.0} | changes)), dated, clock)


async def test_only_what_is_new_is_told() -> None:
    """The first look begins now, less the overlap; what the overlap brings again is told once."""
    clock = FakeClock()
    now = clock.now()
    a, b, c = objects("a", "b", "c")
    there = [(a, now - 1000), (b, now - 50)]
    pull = listing(there, clock)
    first = await pull.look("")
    assert [event.key for event in first.events] == ["b.dcm"]
    assert first.cursor == repr(now)
    assert (await pull.look("")).events == first.events  # they were not taken over yet
    pull.taken()
    there.append((c, now + 30))
    second = await pull.look(first.cursor)
    assert [event.key for event in second.events] == ["c.dcm"]
    assert (second.cursor, second.wait_s) == (repr(now + 30), 60.0)
    # a daemon that starts anew tells the overlap again, under the same ids
    again = await listing(there, clock).look(second.cursor)
    assert {event.id for event in again.events} == {event.id for event in [*first.events, *second.events]}


async def test_an_object_that_was_written_again() -> None:
    """The same bytes at another time are news: they may have been removed in between."""
    clock = FakeClock()
    (a,) = objects("a")
    there = [(a, clock.now())]
    pull = listing(there, clock)
    first = await pull.look("")
    pull.taken()
    there[:] = [(a, clock.now() + 5)]
    second = await pull.look(first.cursor)
    assert [event.key for event in second.events] == ["a.dcm"]
    assert second.events[0].id != first.events[0].id


def survey(series: dict[SeriesRef, list[SourceObject]], at: float = 0.0, **more: Any) -> Survey:
    base: dict[str, Any] = {"described": set(), "others": []}
    return Survey(series, dict.fromkeys(series, at), **(base | more))


def known(*series: tuple[SeriesRef, list[SourceObject]], at: float = 5.0) -> dict[SeriesRef, Current]:
    return {ref: Current(Manifest.of(ref, found).source_version, at) for ref, found in series}


async def told(there: Survey, before: dict[SeriesRef, Current], since: float = 100.0) -> list[tuple[str, SeriesRef]]:
    return [(event.action, SeriesRef(event.study, event.series)) for event in await differences(there, before, since)]


async def test_what_a_publisher_has_lost() -> None:
    """A series that grew, one that is gone and a young one that nobody knew are told; what is the same is not."""
    there = survey({A: objects("a", "b"), B: objects("c"), C: objects("d")}, at=200.0)
    before = known((A, objects("a")), (B, objects("c")), (SeriesRef("1.9", "1.9.1"), objects("z")))
    assert await told(there, before) == [("changed", A), ("created", C), ("removed", SeriesRef("1.9", "1.9.1"))]


async def test_what_an_archive_held_before() -> None:
    """Old series that nobody ever wanted are not warmed because they are there; ones the origin asks anyway neither."""
    assert await told(survey({A: objects("a")}, at=50.0), {}) == []
    assert await told(survey({A: objects("a", "b")}, at=200.0), known((A, objects("a")), at=0.0)) == []
    assert await told(survey({}), known((A, objects("a")), at=0.0)) == []


async def test_series_with_a_manifest_object() -> None:
    """Which objects they have it alone says, so that it is told by its key when it is young."""
    young, old = objects("young", "old")
    there = survey({}, described={A}, others=[(young, 200.0), (old, 50.0)])
    events = await differences(there, known((A, objects("a"))), 100.0)
    assert [(event.key, event.series) for event in events] == [("young.dcm", "")]


async def test_a_difference_is_told_once() -> None:
    """Until the catalogue says otherwise it has the same id; once the origin was asked in between, another one."""
    there = survey({A: objects("a", "b")}, at=200.0)
    first = await differences(there, known((A, objects("a"))), 100.0)
    assert await differences(there, known((A, objects("a"))), 100.0) == first
    assert await differences(there, known((A, objects("a")), at=6.0), 100.0) != first


async def test_a_comparison_is_due_in_time() -> None:
    """After a restart the rest of the interval is waited for; a clock that was put back makes nobody wait for ever."""
    clock = FakeClock()
    surveys = 0

    async def count() -> Survey:
        nonlocal surveys
        surveys += 1
        return survey({})

    nothing: Callable[[], dict[SeriesRef, Current]] = dict
    pull = Reconciler(ReconcileSettings(interval_s=100.0), count, nothing, clock)
    first = await pull.look("")
    clock.advance(30)
    assert await pull.look(first.cursor) == Found([], first.cursor, 70.0)
    clock.advance(70)
    second = await pull.look(first.cursor)
    assert (surveys, second.cursor, second.wait_s) == (2, repr(clock.now()), 100.0)
    await pull.look(repr(clock.now() + 1e6))
    assert surveys == 3
