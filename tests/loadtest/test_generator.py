"""The load generator's arithmetic: a server that stalls is not spared the requests that waited for it."""

import asyncio
import itertools
import time
from collections.abc import Callable

import aiohttp
import pytest
from aiohttp import web

from loadtest.generator import Closed, Http, Load, Open, Request, closed_loop, evenly, mixed, open_loop, poisson, run
from loadtest.measures import Answer, Recorder, Snapshot, Track, server_timing, together, window_width
from tests.loadtest.conftest import Serve

STALL_S = 0.4
RATE = 50
REQUEST = Request("all", "http://127.0.0.1/")


class Stalling:
    """A server that takes one request at a time, and stands still at the first of them."""

    def __init__(self) -> None:
        self._one = asyncio.Lock()
        self._first = True

    async def __call__(self, _: Request) -> Answer:
        async with self._one:
            if self._first:
                self._first = False
                await asyncio.sleep(STALL_S)  # the stall itself: loads are made by the clock
            return Answer(nbytes=1)


def figures(recorder: Recorder, seconds: float = 1.0) -> Track:
    return together([recorder.snapshot()], seconds)["all"]


async def test_a_stall_is_felt_by_all_who_were_due_meanwhile() -> None:
    """Open loop: of 20 requests due while the server stands still each waits until its end, not only the first one.

    Measured from when it was sent, as most tools do, all but a few would look fast if senders waited for one another.
    """
    recorder = Recorder(1.0)
    load = Load([REQUEST], Open([(number / RATE, 0) for number in range(int(STALL_S * RATE))]))
    assert isinstance(load.way, Open)
    await open_loop(load, load.way, Stalling(), recorder, time.monotonic())
    track = figures(recorder)
    assert track.n == 20 and not track.errors
    # the one due at t cannot have been answered before the stall's end: half of them waited for half of it
    assert track.latency_ms["p50"] >= STALL_S * 1e3 * 0.45
    assert track.latency_ms["max"] >= STALL_S * 1e3 * 0.999


async def test_users_who_wait_for_answers_notice_one_slow_one() -> None:
    """Closed loop: the same stall is one slow request, which is why the two are not to be confused."""
    recorder = Recorder(1.0)
    way = Closed(users=1, seconds=STALL_S)
    await closed_loop(Load([REQUEST], way), way, Stalling(), recorder, time.monotonic())
    assert figures(recorder).n == 1


async def test_a_late_start_counts_as_waiting() -> None:
    """What could not be sent when it was due, because the sender was busy, was late all the same."""
    recorder = Recorder(1.0)

    async def ask(_: Request) -> Answer:
        return Answer()

    way = Open([(0.0, 0)])
    await open_loop(Load([REQUEST], way), way, ask, recorder, time.monotonic() - 0.5)
    track = figures(recorder)
    assert track.latency_ms["max"] >= 500
    assert track.service_ms["max"] <= track.latency_ms["max"] - 499


async def test_what_is_never_answered_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends although a server never answers, and what it owes is counted."""
    monkeypatch.setattr("loadtest.generator._GRACE_S", 0.05)
    recorder = Recorder(1.0)

    async def ask(_: Request) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    way = Open([(0.0, 0), (0.0, 0)])
    await open_loop(Load([REQUEST], way), way, ask, recorder, time.monotonic())
    assert figures(recorder).errors == {"unanswered": 2}


async def test_a_user_that_is_never_answered_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed loop: what each user waits for when the run gives up is counted, too."""
    monkeypatch.setattr("loadtest.generator._GRACE_S", 0.05)
    recorder = Recorder(1.0)
    asked = 0

    async def ask(_: Request) -> Answer:
        nonlocal asked
        asked += 1
        if asked > 2:
            await asyncio.Event().wait()
        return Answer()

    way = Closed(users=2, seconds=0.05)
    await closed_loop(Load([REQUEST], way), way, ask, recorder, time.monotonic())
    track = figures(recorder)
    assert asked == 4 and (track.n, track.errors) == (2, {"unanswered": 2})


async def test_a_pause_at_the_end_is_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who thinks when the run gives up waits for nothing."""
    monkeypatch.setattr("loadtest.generator._GRACE_S", 0.05)
    recorder = Recorder(1.0)

    async def ask(_: Request) -> Answer:
        return Answer()

    way = Closed(users=1, seconds=0.05, think_s=1e6)
    await closed_loop(Load([REQUEST], way), way, ask, recorder, time.monotonic())
    assert (figures(recorder).n, figures(recorder).errors) == (1, {})


@pytest.mark.parametrize("after_s", [0.0, 0.02])
async def test_a_failure_of_the_generator_itself_ends_the_run(after_s: float) -> None:
    """Open loop: it is neither lost nor taken for the server's; also one that came long before the end."""
    recorder = Recorder(1.0)

    async def ask(_: Request) -> Answer:
        await asyncio.sleep(after_s)
        raise LookupError("no such thing")

    way = Open([(0.0, 0), (0.01, 0)])
    with pytest.raises(LookupError):
        await open_loop(Load([REQUEST], way), way, ask, recorder, time.monotonic())
    assert figures(recorder).errors == {"unanswered": 2}


async def test_each_request_is_counted_once_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered, failed and unanswered add up to what was due, also with answers in the very moment of the end."""
    monkeypatch.setattr("loadtest.generator._GRACE_S", 0.05)
    recorder = Recorder(1.0)
    numbers = itertools.count()

    async def ask(_: Request) -> Answer:
        number = next(numbers)
        await asyncio.sleep(0.05 if number % 3 else 10.0)
        return Answer(error="503" if number % 3 == 1 else "")

    way = Open([(0.0, 0)] * 300)
    await open_loop(Load([REQUEST], way), way, ask, recorder, time.monotonic())
    track = figures(recorder)
    assert track.n + sum(track.errors.values()) == 300 == recorder.counted[0]
    assert track.errors["unanswered"] >= 100


def test_errors_are_counted_and_not_timed() -> None:
    """An error that comes fast must not make a run look fast."""
    recorder = Recorder(10.0)
    recorder.note("all", 0.0, 0.0, 0.2, Answer(nbytes=5, tier="ram", stages={"fetch": 1.5}))
    recorder.note("all", 3.0, 3.0, 3.0001, Answer(error="503"))
    track = figures(recorder, 10.0)
    assert (track.n, track.errors, track.nbytes, track.tiers) == (1, {"503": 1}, 5, {"ram": 1})
    assert track.latency_ms["p50"] == pytest.approx(200, rel=2e-3)
    assert [(window.start, window.n, window.errors) for window in track.windows] == [(0.0, 1, 0), (3.0, 0, 1)]
    assert track.stages["fetch"].mean_ms == pytest.approx(1.5, rel=2e-3)
    assert track.hit_ratio == 1.0 and track.rate == pytest.approx(0.1)


def test_a_rate_is_by_the_time_until_the_last_answer() -> None:
    """What is all due at once takes as long as it takes; what fails adds no time."""
    recorder = Recorder(0.0)
    for number in range(10):
        recorder.note("all", 0.0, 0.0, number / 5, Answer())
    recorder.note("all", 0.0, 0.0, 30.0, Answer(error="unanswered"))
    assert figures(recorder, 0.0).rate == pytest.approx(10 / 1.8)
    assert figures(recorder, 5.0).rate == pytest.approx(10 / 5)


def test_processes_add_up() -> None:
    """Percentiles are of all requests together, not means of each process's percentiles."""
    fast, slow = Recorder(1.0), Recorder(1.0)
    for _ in range(98):
        fast.note("all", 0.0, 0.0, 0.001, Answer())
    for _ in range(2):
        slow.note("all", 0.0, 0.0, 1.0, Answer())
    track = together([fast.snapshot(), slow.snapshot()], 1.0)["all"]
    assert track.n == 100
    assert track.latency_ms["p50"] == pytest.approx(1.0, rel=2e-3)
    assert track.latency_ms["p99"] == pytest.approx(1000, rel=2e-3)
    with pytest.raises(ValueError, match="lengths"):
        together([Snapshot(1, {}), Snapshot(2, {})], 1.0)


def test_a_long_run_has_no_more_windows_than_can_be_seen() -> None:
    assert [window_width(seconds) for seconds in (0.5, 60, 120, 121, 1200)] == [1, 1, 1, 2, 10]


@pytest.mark.parametrize("make", [evenly, poisson])
def test_a_schedule_has_its_rate_and_repeats(make: Callable[..., Open]) -> None:
    """The same seed gives the same requests at the same times."""
    way = make(100, 20, range(5), seed=3)
    assert way == make(100, 20, range(5), seed=3)
    assert len(way.due) == pytest.approx(2000, rel=0.1)
    assert {number for _, number in way.due} == set(range(5))
    assert way.due == sorted(way.due)


def test_mixed_loads_keep_their_own_requests() -> None:
    other = Request("other", "http://127.0.0.1/other")
    load = mixed(([REQUEST], Open([(0.1, 0), (0.3, 0)])), ([other], Open([(0.2, 0)])))
    assert isinstance(load.way, Open)
    assert [(at, load.requests[number].track) for at, number in load.way.due] == [
        (0.1, "all"),
        (0.2, "other"),
        (0.3, "all"),
    ]
    assert load.seconds == 0.3


def test_server_timing_is_read_as_the_standard_says() -> None:
    """https://www.w3.org/TR/server-timing/: names without a duration, quoted values and descriptions occur."""
    told = server_timing('list;dur=1.5, cache;desc="hit", fetch;desc="a b";dur="20", ')
    assert told == {"list": 1.5, "fetch": 20.0}


async def test_several_processes_send_all_of_a_load(serve: Serve) -> None:
    """Each request is sent once, by one of them; leases are given back; a wrong answer is an error that says how."""
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(f"{request.method} {request.path}")
        if request.path == "/missing":
            return web.Response(status=404)
        if request.path == "/leases" and request.method == "POST":
            return web.json_response({"lease": "7"}, status=201)
        return web.Response(body=b"abc", headers={"Voxcache-Tier": "ram", "Server-Timing": "list;dur=2"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    url = await serve(app)
    requests = [
        Request("right", f"{url}/right", digest="78af5f94892f3950", nbytes=3),
        Request("flipped", f"{url}/right", digest="0" * 16),
        Request("short", f"{url}/right", nbytes=4),
        Request("missing", f"{url}/missing"),
        Request("lease", f"{url}/leases", "POST", b"{}", then="release"),
    ]
    way = Open([(0.001 * number, number % 5) for number in range(20)])
    tracks = await asyncio.to_thread(run, Load(requests, way), 2)
    assert {name: (track.n, track.errors) for name, track in tracks.items()} == {
        "right": (4, {}),
        "flipped": (0, {"wrong bytes": 4}),
        "short": (0, {"wrong length": 4}),
        "missing": (0, {"404": 4}),
        "lease": (4, {}),
    }
    assert tracks["right"].tiers == {"ram": 4} and tracks["right"].nbytes == 12
    assert tracks["right"].stages["list"].n == 4
    assert len(seen) == 24 and seen.count("DELETE /leases/7") == 4


async def test_several_processes_make_one_rate(serve: Serve) -> None:
    """The rate of a load is that of all its processes together, in a closed loop by all of its users."""
    app = web.Application()
    asked: set[str] = set()

    async def answer(request: web.Request) -> web.Response:
        asked.add(request.path)
        await asyncio.sleep(0.1)
        return web.Response()

    app.router.add_get("/{path:.*}", answer)
    url = await serve(app)
    requests = [Request("all", f"{url}/{number}") for number in range(6)]
    opened = (await asyncio.to_thread(run, Load(requests, evenly(40, 1.0, range(6))), 3))["all"]
    assert (opened.n, opened.errors) == (40, {})
    assert opened.rate == pytest.approx(40 / opened.seconds) and 1.0 <= opened.seconds < 1.5
    asked.clear()
    closed = (await asyncio.to_thread(run, Load(requests, Closed(6, 1.0, in_order=True)), 3))["all"]
    assert len(asked) == 6 and not closed.errors
    assert 30 <= closed.rate <= 60  # six users, a tenth of a second each


@pytest.mark.parametrize("body", [b"{}", b"no JSON", b""])
async def test_a_lease_that_is_none_is_an_error(serve: Serve, body: bytes) -> None:
    app = web.Application()

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body)

    app.router.add_post("/leases", answer)
    async with aiohttp.ClientSession() as session:
        told = await Http(session)(Request("all", f"{await serve(app)}/leases", "POST", b"{}", then="release"))
    assert told.error.startswith("malformed")


async def test_a_server_that_is_not_there_is_an_error_of_each_request() -> None:
    """A run goes on without it."""
    async with aiohttp.ClientSession() as session:
        told = await Http(session)(Request("all", "http://127.0.0.1:9/"))
    assert told.error == "ClientConnectorError"
