"""How a scenario runs: its options, its progress on stderr, its result to a file, its figures as the last line."""

import argparse
import inspect
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from .figures import plain, say
from .outcome import Result

#: What a scenario is given: its options. It gives its result; ``took_s`` and ``says`` are filled in.
Run = Callable[[argparse.Namespace], Result]


def main(name: str, module: str, run: Run, more: Callable[[argparse.ArgumentParser], Any] = lambda _: None) -> int:
    """Run one; 0 if every bar is met."""
    says = inspect.cleandoc(sys.modules[module].__doc__ or "").partition("\n\n    python")[0]
    parser = argparse.ArgumentParser(prog=name, description=says, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="its short form")
    parser.add_argument("--out", type=Path, help="write the result there")
    more(parser)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, on_signal)  # what was started ends with its block
    start = time.perf_counter()
    say(f"{name}{', short form' if options.short else ''}")
    result = run(options)
    result = msgspec.structs.replace(result, says=" ".join(says.split()), took_s=time.perf_counter() - start)
    if options.out is not None:
        options.out.write_bytes(msgspec.json.encode(result) + b"\n")
    for phase in result.phases:
        for track, told in phase.tracks.items():
            shown = "  ".join(f"{key} {value:.3f}" for key, value in told.latency_ms.items() if key in ("p50", "p99"))
            say(
                f"  {phase.name}, {track}: {told.n} answered, {told.rate:.0f} a second, {shown} ms, {told.errors or ''}"
            )
    for bar in result.bars:
        say(f"  {'met   ' if bar.ok else 'missed'} {bar.name}: {bar.value:g} (wanted {bar.bar:g})")
    figures = {
        f"{phase.name}: {track}": {"n": told.n, "errors": told.errors, **told.latency_ms}
        for phase in result.phases
        for track, told in phase.tracks.items()
    }
    last = {"benchmark": name, "figures": figures, "missing": result.missing, "bars": plain(result.bars)}
    print(json.dumps(last), flush=True)
    return 0 if all(bar.ok for bar in result.bars) else 1


def on_signal(number: int, _: object) -> NoReturn:
    """End as Ctrl-C does, block by block; once is enough."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
