"""How far a job is, for people: one live line on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

#: Seconds between two lines where nobody watches.
_LINE_S: Final = 5.0
_BAR: Final = 24
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def shown(job: Mapping[str, Any], seconds: float) -> str:
    """One line on a job that has been under way for ``seconds``."""
    total, over = job["total"], job["done"] + job["failures"]
    if not total and not job["ended"]:
        return f"finding out what there is to do … {seconds:.0f} s"
    what = "series" if job["kind"] == "index" else "entries"
    share = over / total if total else 1.0
    bar = "#" * int(share * _BAR)
    parts = [
        f"[{bar:.<{_BAR}}] {over}/{total} {what}",
        size(job["bytes"]),
        f"{size(job['bytes'] / max(seconds, 1e-3))}/s",
    ]
    if job["ready"]:
        parts.append(f"{job['ready']} were ready")
    if job["failures"]:
        parts.append(f"{job['failures']} failed")
    parts.append(f"took {clock(seconds)}" if job["ended"] else f"{clock(left(job, seconds))} left")
    return "  ".join(parts)


def left(job: Mapping[str, Any], seconds: float) -> float | None:
    """Seconds until the job ends, if it goes on as it did; None before anything was done that took time."""
    worked: int = job["done"] + job["failures"] - job["ready"]
    to_do: int = job["total"] - job["done"] - job["failures"]
    return seconds / worked * to_do if worked else None


def size(nbytes: float) -> str:
    """Bytes in a unit that leaves up to three digits before the point."""
    for unit in _UNITS:
        if nbytes < 1000 or unit == _UNITS[-1]:
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds as people write them."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Tells of a job on ``out``, as often as is fit for it."""

    def __init__(self, out: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._now = now
        self._live = out.isatty()
        self._began = now()
        self._told = float("-inf")

    def tell(self, job: Mapping[str, Any]) -> None:
        """The job is this far."""
        now = self._now()
        if self._live:
            end = "\n" if job["ended"] else ""
            print(f"\r\x1b[K{shown(job, now - self._began)}", end=end, file=self._out, flush=True)
        elif job["ended"] or now - self._told >= _LINE_S:
            self._told = now
            print(shown(job, now - self._began), file=self._out, flush=True)
