"""What people are told of a job: a live line on a terminal, a line now and then elsewhere."""

import io
from typing import Any

import pytest

from serving.progress import Progress, clock, left, shown, size


def job(**changes: Any) -> dict[str, Any]:
    base = {"kind": "warm", "total": 8, "done": 2, "ready": 0, "failures": 0, "bytes": 0, "ended": False}
    return base | changes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_says_it_all() -> None:
    """A bar, entries, bytes, rate, what was ready, what failed, and the time it will take."""
    line = shown(job(done=4, ready=2, failures=1, bytes=30_000_000), 10.0)
    assert line == "[###############.........] 5/8 entries  30.0 MB  3.0 MB/s  2 were ready  1 failed  0:10 left"
    assert shown(job(total=0, done=0), 3.2) == "finding out what there is to do … 3 s"
    assert shown(job(kind="index", done=8, ended=True), 61.0).endswith("8/8 series  0 B  0 B/s  took 1:01")
    assert shown(job(total=0, done=0, ended=True), 1.0).startswith("[########################] 0/0")


def test_what_is_left() -> None:
    """What was ready took no time, and says nothing of the rest."""
    assert left(job(done=4, ready=2), 10.0) == 20.0
    assert left(job(done=2, ready=2), 10.0) is None


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (157_286_400, "157.3 MB"), (5e15, "5000.0 TB")]
)
def test_sizes(nbytes: float, text: str) -> None:
    """Sizes are told in a unit that fits."""
    assert size(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (0.4, "0:00"), (75, "1:15"), (3725, "1:02:05")])
def test_times(seconds: float | None, text: str) -> None:
    """Times are told as people write them."""
    assert clock(seconds) == text


def test_a_terminal_has_one_live_line() -> None:
    """Each message overwrites the one before; the last one stays."""
    out = Terminal()
    progress = Progress(out, lambda: 0.0)
    progress.tell(job())
    progress.tell(job(done=8, ended=True))
    assert out.getvalue().count("\r\x1b[K") == 2
    assert out.getvalue().count("\n") == 1


def test_elsewhere_there_are_plain_lines() -> None:
    """A line every few seconds, and one at the end; nothing that only a terminal understands."""
    out, times = io.StringIO(), iter([0.0, 0.0, 1.0, 6.0, 6.5])
    progress = Progress(out, lambda: next(times))
    for done in (0, 1, 2):
        progress.tell(job(done=done))
    progress.tell(job(done=8, ended=True))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0/8", "2/8", "8/8"]
    assert "\x1b" not in out.getvalue()
