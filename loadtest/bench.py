"""All scenarios, one after another, and the report of them.

    python -m loadtest.bench [--full] [--only NAME,NAME] [--out DIR] [--no-readme]

Each runs as a process of its own, with an end: what does not end in time is killed with all that it started, and the
report says so; the others go on. ``DIR`` (loadtest/results/DATE) gets each result, report.json, report.html and
summary.svg; the README's summary is made anew. Progress goes to stderr; the last line on stdout is JSON.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from .figures import say
from .outcome import ROOT, Report, Result, commit, machine
from .report import END, put_into, summary, write


class Scenario(NamedTuple):
    """Arguments of its short and its full form, and how long each may take (s)."""

    short: tuple[str, ...]
    full: tuple[str, ...]
    short_s: float
    full_s: float


SCENARIOS: Final = {
    "compare": Scenario(("--short",), (), 420, 3600),
    "behaviour": Scenario(("--short",), (), 240, 900),
    "ramp": Scenario(("--short", "--seconds", "20"), (), 300, 4 * 1200 + 1200),
    "slow_origin": Scenario(("--short",), (), 240, 1800),
    "restart": Scenario(("--short",), (), 240, 1200),
    "reading_room": Scenario(("--short",), (), 180, 1800),
    "burst": Scenario(("--short",), (), 180, 1800),
    "series_sizes": Scenario(("--short",), (), 240, 3600),
    "modalities": Scenario(("--short",), (), 240, 1800),
}


def bench(options: argparse.Namespace) -> Report:
    wanted = [name for name in options.only.replace("-", "_").split(",") if name] or list(SCENARIOS)
    if unknown := set(wanted) - SCENARIOS.keys():
        raise SystemExit(f"bench: no scenario is called {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    began_on = machine()
    results: list[Result] = []
    failures: dict[str, str] = {}
    for name in wanted:
        file = options.out / f"{name.replace('_', '-')}.json"
        file.unlink(missing_ok=True)
        shown = name.replace("_", "-")
        say(f"—— {shown}")
        start = time.monotonic()
        why = one(name, file, full=options.full)
        if file.exists():
            results.append(msgspec.json.decode(file.read_bytes(), type=Result))
            why = "done"
        else:
            failures[shown] = why
        say(f"—— {shown}: {why}, {time.monotonic() - start:.0f} s")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Report(today, commit(), began_on, results, failures)


def one(name: str, out: Path, *, full: bool) -> str:
    """Run a scenario; why it left no result, if it left none."""
    scenario = SCENARIOS[name]
    arguments = scenario.full if full else scenario.short
    command = [sys.executable, "-m", f"loadtest.scenarios.{name}", *arguments, "--out", str(out)]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    limit = scenario.full_s if full else scenario.short_s
    try:
        status = started.wait(limit)
    except subprocess.TimeoutExpired:
        started.terminate()  # its blocks end what they started
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(60)
        return f"it did not end within {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    return f"exit status {status}; what it said is above"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="long forms: some three hours")
    parser.add_argument("--only", default="", help="scenarios, separated by commas")
    parser.add_argument("--out", type=Path, help="where results go (default: loadtest/results/DATE)")
    parser.add_argument("--no-readme", action="store_true", help="leave README.md as it is")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    options.out = (options.out or ROOT / "loadtest" / "results" / today).resolve()
    report = bench(options)
    write(report, options.out)
    readme = ROOT / "README.md"
    if not options.no_readme and END in readme.read_text() and options.out.is_relative_to(ROOT):
        readme.write_text(put_into(readme.read_text(), summary(report, str(options.out.relative_to(ROOT)))))
    say(f"the report: {options.out / 'report.html'}")
    bars = [{"name": b.name, "value": b.value, "bar": b.bar, "ok": b.ok} for r in report.results for b in r.bars]
    missing = {f"{r.scenario}: {name}": why for r in report.results for name, why in r.missing.items()}
    told = {"benchmark": "bench", "report": str(options.out / "report.html"), "failures": report.failures}
    print(json.dumps({**told, "missing": missing, "bars": bars}), flush=True)
    return 0 if all(bar["ok"] for bar in bars) and not report.failures else 1


if __name__ == "__main__":
    sys.exit(main())
