"""The benchmarks' frame: what breaks or does not end is reported by name, and nothing of it goes on running."""

import argparse
import asyncio
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import pytest
from aiohttp import web

from loadtest import bench, floors
from loadtest.figures import at_least, at_most
from loadtest.generator import Request
from loadtest.measures import Answer, Recorder, Track, together, window_width
from loadtest.outcome import Phase, Profile, Result
from loadtest.peers import PEERS
from loadtest.peers.archives import parts
from loadtest.peers.base import Tensor, check, expected
from loadtest.peers.ours import OverHttp, OverLease
from loadtest.peers.ready import RedisTensors
from loadtest.scenarios.compare import excused
from loadtest.scenarios.ramp import users
from loadtest.scenarios.restart import Away, _break, windows
from loadtest.scenarios.slow_origin import BARE, WAYS, _bars
from loadtest.stand import descendants, make_series
from tests.loadtest.conftest import Serve
from tests.loadtest.test_report import track


def options(out: Path, only: str) -> argparse.Namespace:
    return argparse.Namespace(full=False, only=only, out=out)


@pytest.mark.parametrize("name", bench.SCENARIOS)
def test_every_scenario_says_what_it_is(name: str) -> None:
    """Each is a module that tells a reader what it does and how it is run."""
    told = importlib.import_module(f"loadtest.scenarios.{name}").__doc__ or ""
    assert f"python -m loadtest.scenarios.{name}" in told


def test_the_short_forms_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However each of them goes wrong, all are over after so many minutes, and the report says what is missing."""
    assert bench.SHORT_S <= 900
    monkeypatch.setattr(bench, "SHORT_S", bench._END_S + 0.2)
    start = time.monotonic()
    report = bench.bench(options(tmp_path, ""))
    assert time.monotonic() - start < bench.SHORT_S
    first, *others = report.failures.values()
    assert first == "it did not end within 0 s"
    assert len(others) == len(bench.SCENARIOS) - 1 and all("not begun" in why for why in others)


def test_peers_say_how_they_are_set() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    assert all(len(peer.settings) > 20 for peer in PEERS)


def test_an_unknown_scenario_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no scenario is called nothing"):
        bench.bench(options(tmp_path, "nothing"))


def test_a_scenario_that_breaks_is_a_line_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on; an old result of the same name is not mistaken for a new one."""
    monkeypatch.setitem(bench.SCENARIOS, "broken", bench.Scenario(30, 30))
    (tmp_path / "broken.json").write_text("{}")
    report = bench.bench(options(tmp_path, "broken"))
    assert report.results == []
    assert report.failures["broken"].startswith("exit status 1")


def test_what_misses_a_bar_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One profile for all bars that it explains; what met its bar needs none."""
    begun: list[str] = []

    def one(module: str, arguments: list[str], _: float) -> str:
        begun.append(" ".join([module, *arguments[:1]]))
        out = Path(arguments[-1])
        if module == "profile":
            (out / "profile-miss.json").write_bytes(msgspec.json.encode([Profile("miss", "profile-miss.svg", {})]))
        else:
            missed = [at_most("burst: p99 of leases", 3, 2), at_most("burst: p99 of instances", 3, 2)]
            bars = [*missed, at_least("hit, times faster", 200, 100), at_most("errors", 1, 0)]
            out.write_bytes(msgspec.json.encode(Result("burst", "", True, {}, bars=bars)))
        return "done"

    monkeypatch.setattr(bench, "one", one)
    report = bench.bench(options(tmp_path, "burst"))
    assert begun == ["scenarios.burst --short", "profile miss"]
    assert [profile.name for profile in report.profiles] == ["miss"]
    assert report.failures == {}


def test_what_was_measured_before_an_interrupt_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more is begun, nor profiled, but an hour's figures are not thrown away."""

    def one(module: str, arguments: list[str], _: float) -> str:
        if module == "scenarios.ramp":
            raise SystemExit(143)
        bars = [at_most("first miss", 2, 1)]
        Path(arguments[-1]).write_bytes(msgspec.json.encode(Result("compare", "", True, {}, bars=bars)))
        return "done"

    monkeypatch.setattr(bench, "one", one)
    report = bench.bench(options(tmp_path, "compare,ramp,restart"))
    assert [result.scenario for result in report.results] == ["compare"]
    assert report.failures == {"ramp": "it was interrupted", "restart": "it was not begun"}


def test_a_scenario_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It and all that it started."""
    before = set(descendants(os.getpid()))
    monkeypatch.setitem(bench.SCENARIOS, "burst", bench.Scenario(0.2, 0.2))
    report = bench.bench(options(tmp_path, "burst"))
    assert report.failures == {"burst": "it did not end within 0 s"}
    assert set(descendants(os.getpid())) <= before


def failures(*at: float, seconds: float = 9.0) -> Track:
    recorder = Recorder(seconds)
    for due in at:
        recorder.note("reads", due, due, due, Answer(error="503"))
    return together([recorder.snapshot()], seconds)["reads"]


def strays(track: str, at: float, away: list[Away]) -> int:
    return windows({track: failures(at)}, away, 1)[1]


def test_an_error_belongs_to_what_was_away() -> None:
    """A row for each that was killed, and class: how many failed, and from when until when."""
    tracks = {"hits": failures(1.2, 3.1, 4.0, 5.5), "misses": failures(0.1, 1.9)}
    rows, _ = windows(tracks, [Away("gateway", 1.5, 1.0), Away("daemon", 4.5, 1.0)], 1)
    assert [(row[0], *row[3:]) for row in rows] == [
        ("nothing yet", "misses", 1, 1.0),
        ("gateway", "hits", 2, 3.0),
        ("gateway", "misses", 1, 1.0),
        ("daemon", "hits", 2, 2.0),
    ]


def test_windows_of_a_long_run_are_as_wide_as_they_are() -> None:
    """Of 270 s each is three seconds wide: what belongs to whom does not change by that."""
    width = window_width(270)
    assert width == 3
    away = [Away("gateway", 30.5, 1.0), Away("daemon", 90.5, 2.0)]
    tracks = {"hits": failures(91.0, 92.0, seconds=270), "misses": failures(31.0, 35.0, seconds=270)}
    rows, stray = windows(tracks, away, width)
    assert [(row[0], *row[3:]) for row in rows] == [("gateway", "misses", 2, 6.0), ("daemon", "hits", 2, 3.0)]
    assert stray == 0


def test_what_fails_while_all_it_needs_is_there_is_stray() -> None:
    """Hits need the daemon, and nothing once it answers; others need one thing more, which may take a while."""
    away = [Away("Redis", 1.5, 1.0), Away("gateway", 3.5, 1.0), Away("daemon", 5.5, 1.0)]
    assert [strays("hits", at, away) for at in (0.5, 1.7, 3.7, 5.2, 6.4, 7.0)] == [1, 1, 1, 0, 0, 1]
    assert [strays("misses", at, away) for at in (0.5, 1.7, 3.7, 5.0, 7.0)] == [1, 1, 0, 0, 0]
    assert [strays("arrivals", at, away) for at in (0.5, 1.7, 3.0, 4.5, 7.0)] == [1, 0, 0, 1, 0]
    assert strays("hits", 0.5, []) == 1


class Broken:
    """What cannot be started again."""

    def kill(self) -> None:
        return

    def start(self) -> None:
        raise RuntimeError("it does not answer")


def test_what_does_not_come_back_fails_the_run() -> None:
    """Nor is anything killed once the run is over."""
    over = threading.Event()
    with pytest.raises(RuntimeError, match="does not answer"):
        _break({"gateway": Broken()}, 0.0, time.monotonic() - 1.0, [], over)
    over.set()
    away: list[Away] = []
    _break({"gateway": Broken()}, 60.0, time.monotonic(), away, over)
    assert away == []


@pytest.mark.parametrize("short", [False, True])
def test_a_slow_origin_is_compared_with_what_was_run(short: bool) -> None:
    """The short form leaves a phase out, and has all the bars nevertheless."""
    of = {"misses": track(), "hits": track()}
    names = ["calm", "late, as it comes", BARE[short]]
    bars = _bars({name: Phase(name, of) for name in names}, BARE[short])
    assert [bar.ok for bar in bars] == [False, True, False]
    assert all(name in WAYS for name in names)


def test_ours_is_no_peer_that_may_be_left_out() -> None:
    """A wrong answer of another's is a line of the report, one of ours is the end of the comparison."""
    missing: dict[str, str] = {}
    excused(RedisTensors, RuntimeError("another tensor"), missing)
    assert missing == {RedisTensors.name: "RuntimeError: another tensor"}
    for ours in (OverLease, OverHttp):
        with pytest.raises(RuntimeError, match="another tensor"):
            excused(ours, RuntimeError("another tensor"), missing)


def test_every_tensor_is_compared_with_the_files(tmp_path: Path) -> None:
    """One voxel, the order of the slices, the type: each of them is another tensor."""
    right = expected(make_series(tmp_path, 0, seed=0, slices=4, rows=32, columns=32))
    assert right.shape == (4, 32, 32) and right.min() < -500 < 0 < right.max()
    check(right.copy(), right)
    flipped, unsigned = right.copy(), right.view(np.uint16)
    flipped[2, 3, 4] ^= 1
    for wrong in (flipped, right[::-1], right[:3], cast(Tensor, unsigned)):
        with pytest.raises(AssertionError):
            check(wrong, right)


@pytest.mark.service
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: int) -> None:
    """Neither processes, whatever session they are in, nor folders, nor a scenario that goes on."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    command = [sys.executable, "-m", "loadtest.bench", "--only", "burst", "--no-readme", "--out", str(out)]
    running = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(work)}, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if "storing" in line:  # the gateway runs, with a session for each of its three processes
            break
    [place] = work.iterdir()
    assert len(bench._living(place)) >= 4
    running.send_signal(number)
    running.stderr.read()
    assert running.wait() != 0
    assert bench._living(place) == [] == list(work.iterdir())
    assert "burst gave no result: it was interrupted" in (out / "report.html").read_text()


@pytest.mark.slow
def test_what_does_not_listen_is_ended_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scenario that does not end when it is told to, with a child in a session of its own."""
    monkeypatch.setattr(bench, "_END_S", 0.5)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", f"{parent}; {stubborn}"], env=environment, stdout=subprocess.PIPE
    ) as started:
        assert started.stdout is not None
        assert started.stdout.read(2) == b"\n\n"
        assert len(bench._living(tmp_path)) == 2
        bench._end(started, tmp_path)
    assert bench._living(tmp_path) == []


def test_an_answer_of_many_parts_is_taken_apart() -> None:
    """Bodies may hold what looks like a boundary: their length decides."""
    answer = (
        b"--b\r\nContent-Type: a\r\nContent-Length: 5\r\n\r\n--b\r\n\r\n--b\r\ncontent-length: 2\r\n\r\nxy\r\n--b--"
    )
    assert parts(answer) == [b"--b\r\n", b"xy"]


def test_loopback_sends_all_of_it_either_way(tmp_path: Path) -> None:
    """The floor is a floor of the whole content, and its sender ends."""
    path = tmp_path / "content"
    path.write_bytes(os.urandom(3 << 20))
    loopback = floors.Loopback(path)
    with loopback.running() as ways:
        assert set(ways) == {"sendfile", "writes"}
        for send in ways.values():
            loopback._into[:] = bytes(len(loopback._into))
            send()
            assert loopback._into == path.read_bytes()


@pytest.mark.slow
async def test_a_process_of_locust_that_ends_early_fails_the_run(serve: Serve, tmp_path: Path) -> None:
    """Its users' figures are gone: those of the others must not be taken for all."""
    app = web.Application()
    asked = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        asked.set()
        return web.Response(body=b"abc")

    app.router.add_get("/{path:.*}", answer)
    requests = [Request("images", f"{await serve(app)}/there", nbytes=3)]
    running = asyncio.create_task(asyncio.to_thread(users, tmp_path, requests, 4, 4.0))
    await asked.wait()
    # the last of a chain of children is a worker
    os.kill(descendants(os.getpid())[-1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="lasted until the end"):
        await running


@pytest.mark.slow
async def test_users_leave_figures_of_all_they_asked(serve: Serve, tmp_path: Path) -> None:
    """Locust's users, whose number grows: every answer is in the histograms, and an error is one."""
    seen: Counter[str] = Counter()

    async def answer(request: web.Request) -> web.Response:
        seen[request.path] += 1
        return web.Response(body=b"abc", status=404 if request.path == "/missing" else 200)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    url = await serve(app)
    requests = [Request("images", f"{url}/{name}", nbytes=3) for name in ("there", "missing")]
    figures = await asyncio.to_thread(users, tmp_path, requests, 4, 4.0)
    # what was under way when the time was over is counted by nobody
    assert 0 <= seen["/there"] - figures.n <= 4
    assert figures.nbytes == 3 * figures.n > 0
    assert figures.errors.keys() == {"404"} and 0 <= seen["/missing"] - figures.errors["404"] <= 4
