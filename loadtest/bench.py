"""All scenarios, one after another, and the report of them.

    python -m loadtest.bench [--full] [--only NAME,NAME] [--out DIR] [--no-readme]

Each runs as a process of its own, with an end: what does not end in time is killed with all that it started, and the
report says so; the others go on. What misses a bar is profiled. The short forms end within a quarter of an hour,
whatever becomes of them. A run that is interrupted reports what it has come to. ``DIR`` (loadtest/results/DATE) gets
each result, the profiles, report.json, report.html and summary.svg; if all have ended, the README's summary is made
anew.
Progress goes to stderr; the last line on stdout is JSON.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from .figures import plain, say
from .outcome import ROOT, Profile, Report, Result, commit, machine
from .report import END, put_into, summary, write
from .scenario import on_signal
from .stand import folder

#: Seconds that a scenario has to end what it started, once it is told to.
_END_S: Final = 30.0
#: The short forms together: what does not fit is not begun, or ended.
SHORT_S: Final = 15 * 60.0


class Scenario(NamedTuple):
    """How long its short and its full form may take (s)."""

    short_s: float
    full_s: float


SCENARIOS: Final = {
    "compare": Scenario(420, 3600),
    "behaviour": Scenario(240, 900),
    "ramp": Scenario(300, 5 * 240 + 900),
    "slow_origin": Scenario(240, 1800),
    "restart": Scenario(240, 1200),
    "reading_room": Scenario(180, 1800),
    "burst": Scenario(180, 1800),
    "series_sizes": Scenario(240, 3600),
    "modalities": Scenario(240, 1800),
}


#: By how its name begins: the profile that tells what a bar was missed by, and the seconds that it may take.
PROFILES: Final = {
    "first miss": "miss",
    "burst": "miss",
    "hit": "hit",
    "objects over HTTP": "hit",
    "ramp: images": "hit",
}
_PROFILE_S: Final = 120.0


def bench(options: argparse.Namespace) -> Report:
    wanted = [name for name in options.only.replace("-", "_").split(",") if name] or list(SCENARIOS)
    if unknown := set(wanted) - SCENARIOS.keys():
        raise SystemExit(f"bench: no scenario is called {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    began_on = machine()
    results: list[Result] = []
    failures: dict[str, str] = {}
    end = time.monotonic() + (math.inf if options.full else SHORT_S - _END_S)
    interrupted = False
    for name in wanted:
        file = options.out / f"{name.replace('_', '-')}.json"
        file.unlink(missing_ok=True)
        shown = name.replace("_", "-")
        say(f"—— {shown}")
        start = time.monotonic()
        scenario = SCENARIOS[name]
        limit = min(scenario.full_s if options.full else scenario.short_s, end - start)
        arguments = [*([] if options.full else ["--short"]), "--out", str(file)]
        try:
            why = "it was not begun" if interrupted else one(f"scenarios.{name}", arguments, limit)
        except (KeyboardInterrupt, SystemExit):
            interrupted, why = True, "it was interrupted"
        if file.exists():
            results.append(msgspec.json.decode(file.read_bytes(), type=Result))
            why = "done"
        else:
            failures[shown] = why
        say(f"—— {shown}: {why}, {time.monotonic() - start:.0f} s")
    profiles: list[Profile] = []
    missed = [bar.name for result in results for bar in result.bars if not bar.ok and not interrupted]
    for what in sorted({PROFILES[begin] for begin in PROFILES if any(name.startswith(begin) for name in missed)}):
        file = options.out / f"profile-{what}.json"
        file.unlink(missing_ok=True)
        say(f"—— profile-{what}, for what was missed")
        why = one(
            "profile", [what, "--seconds", "8", "--out", str(options.out)], min(_PROFILE_S, end - time.monotonic())
        )
        if file.exists():
            profiles += msgspec.json.decode(file.read_bytes(), type=list[Profile])
        else:
            failures[f"profile-{what}"] = why
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Report(today, commit(), began_on, results, failures, profiles)


def one(module: str, arguments: list[str], limit: float) -> str:
    """Run a module of this package for ``limit`` seconds at most; why it left no result, if it left none."""
    command = [sys.executable, "-m", f"loadtest.{module}", *arguments]
    if limit <= 0:
        return f"it was not begun: the short forms together may take {SHORT_S / 60:.0f} minutes"
    with folder("bench") as place:
        environment = os.environ | {"TMPDIR": str(place)}
        # in a session of its own, so that a terminal's Ctrl-C comes here alone
        started = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = started.wait(limit)
        except subprocess.TimeoutExpired:
            return f"it did not end within {limit:.0f} s"
        finally:
            _end(started, place)
    return f"exit status {status}; what it said is above"


def _end(started: subprocess.Popen[bytes], place: Path) -> None:
    """End a scenario and all that it has started, whatever session and parent that has by now."""
    try:
        started.terminate()  # its blocks end what they started
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(_END_S)
    finally:
        end = time.monotonic() + _END_S
        while (left := _living(place)) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        started.wait()
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in mounts:
            if Path(mount).is_relative_to(place):  # its folder could not be removed
                subprocess.run(["fusermount3", "-uz", mount], check=False, capture_output=True)


def _living(place: Path) -> list[int]:
    """Processes whose temporary files are at ``place``: those that a scenario was given, and its children inherit."""
    mark = f"TMPDIR={place}".encode()
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if each.name.isdecimal() and mark in (each / "environ").read_bytes().split(b"\0"):
                found.append(int(each.name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="long forms: an hour and a half")
    parser.add_argument("--only", default="", help="scenarios, separated by commas")
    parser.add_argument("--out", type=Path, help="where results go (default: loadtest/results/DATE)")
    parser.add_argument("--no-readme", action="store_true", help="leave README.md as it is")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, on_signal)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    options.out = (options.out or ROOT / "loadtest" / "results" / today).resolve()
    report = bench(options)
    write(report, options.out)
    readme = ROOT / "README.md"
    whole = len(report.results) == len(SCENARIOS)
    if whole and not options.no_readme and END in readme.read_text() and options.out.is_relative_to(ROOT):
        readme.write_text(put_into(readme.read_text(), summary(report, str(options.out.relative_to(ROOT)))))
    say(f"the report: {options.out / 'report.html'}")
    bars = plain(report.bars)
    missing = {f"{r.scenario}: {name}": why for r in report.results for name, why in r.missing.items()}
    told = {"benchmark": "bench", "report": str(options.out / "report.html"), "failures": report.failures}
    print(json.dumps({**told, "missing": missing, "bars": bars}), flush=True)
    return 0 if all(bar["ok"] for bar in bars) and not report.failures else 1


if __name__ == "__main__":
    sys.exit(main())
