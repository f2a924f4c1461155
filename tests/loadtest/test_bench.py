"""The benchmarks' frame: what breaks or does not end is reported by name, and nothing of it goes on running."""

import argparse
import asyncio
import contextlib
import importlib
import os
import select
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
from aiohttp import web

from loadtest import bench, floors
from loadtest.generator import Request
from loadtest.peers import PEERS
from loadtest.peers.archives import parts
from loadtest.scenarios.ramp import users
from loadtest.scenarios.restart import windows
from tests.loadtest.conftest import Serve
from tests.loadtest.test_report import track


def options(out: Path, only: str) -> argparse.Namespace:
    return argparse.Namespace(full=False, only=only, out=out)


@pytest.mark.parametrize("name", bench.SCENARIOS)
def test_every_scenario_says_what_it_is(name: str) -> None:
    """Each is a module that tells a reader what it does and how it is run."""
    told = importlib.import_module(f"loadtest.scenarios.{name}").__doc__ or ""
    assert f"python -m loadtest.scenarios.{name}" in told


def test_the_short_forms_end_in_time() -> None:
    """However each of them goes wrong, a short run is bounded."""
    assert sum(scenario.short_s for scenario in bench.SCENARIOS.values()) < 2400


def test_peers_say_how_they_are_set() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    assert all(len(peer.settings) > 20 for peer in PEERS)


def test_an_unknown_scenario_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no scenario is called nothing"):
        bench.bench(options(tmp_path, "nothing"))


def test_a_scenario_that_breaks_is_a_line_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on; an old result of the same name is not mistaken for a new one."""
    monkeypatch.setitem(bench.SCENARIOS, "broken", bench.Scenario((), (), 30, 30))
    (tmp_path / "broken.json").write_text("{}")
    report = bench.bench(options(tmp_path, "broken"))
    assert report.results == []
    assert report.failures["broken"].startswith("exit status 1")


SHORT_S = 0.2


class Begun(subprocess.Popen[bytes]):
    """A scenario whose time begins once the program and its child run, however slow the machine is."""

    folder: ClassVar[Path]
    running: ClassVar[list[int]] = []  # handles of both, which can be read once their process has ended

    def wait(self, timeout: float | None = None) -> int:
        if timeout == SHORT_S:
            pids = (self.folder / "pids").read_text().split()
            self.running.extend(os.pidfd_open(int(pid)) for pid in pids)
        return super().wait(timeout)


STUCK = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
with open("pids", "w") as told:
    told.write(f"{os.getpid()} {child.pid}")
child.wait()
"""


def test_a_scenario_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It and all that it started, which would go on for days."""
    scenarios = tmp_path / "loadtest" / "scenarios"
    scenarios.mkdir(parents=True)
    for folder in (scenarios.parent, scenarios):
        (folder / "__init__.py").touch()
    (scenarios / "stuck.py").write_text(STUCK)
    os.mkfifo(tmp_path / "pids")  # to open it is to wait for the other side
    monkeypatch.setattr("loadtest.bench.ROOT", tmp_path)
    monkeypatch.setattr("subprocess.Popen", Begun)
    monkeypatch.setattr(Begun, "folder", tmp_path, raising=False)
    monkeypatch.setattr(Begun, "running", [])
    monkeypatch.setitem(bench.SCENARIOS, "stuck", bench.Scenario((), (), SHORT_S, SHORT_S))
    report = bench.bench(options(tmp_path / "out", "stuck"))
    assert report.failures == {"stuck": "it did not end within 0 s"}
    running = Begun.running
    assert len(running) == 2
    try:
        for process in running:
            assert select.select([process], [], [], 30)[0], "it goes on running"
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)


def test_an_error_belongs_to_what_was_away() -> None:
    """A hit that fails while the daemon is there is a stray one; its own absence excuses it."""
    failed = {"hits": track()}  # one error due at 1 s, one at 5 s
    rows, stray = windows(failed, [("gateway", 0.5, 1.0), ("daemon", 3.0, 1.0)])
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("gateway", "hits", 1),
        ("daemon", "hits", 1),
    ]
    assert stray == 1
    assert windows(failed, [("daemon", 0.5, 1.0)])[1] == 0


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
