"""The store against a dict for as long as you like: the machine of the tests, a million steps of it.

    python -m tests.soak [--steps 1000000] [--processes N]

Progress goes to stderr; the last line on stdout is JSON. Whatever fails is printed with its steps, and where it stands
if no step ends for five minutes: that is a failure, too.
"""

import argparse
import asyncio
import contextlib
import faulthandler
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Final

from tests.cache.test_store_model import MACHINES, run

RESULTS: Final = Path(__file__).resolve().parent.parent / "loadtest" / "results" / "soak.json"
#: Steps between two words of progress, and the seconds after which there will be no more.
_PART: Final = 2000
_STALLED_S: Final = 300.0


def work(number: int, steps: int, done: "Queue[int]") -> None:
    """One process: the machines in turn, ``steps`` in all."""
    signal.signal(signal.SIGUSR1, _tell)
    taken = 0
    machines = MACHINES[number % len(MACHINES) :] + MACHINES[: number % len(MACHINES)]
    while taken < steps:
        for machine in machines:
            run(machine, _PART)
            taken += machine.steps
            done.put(machine.steps)


def _tell(*_: object) -> None:
    """Say where this process stands, and what its tasks wait for."""
    faulthandler.dump_traceback()
    with contextlib.suppress(RuntimeError):  # no loop runs
        for task in asyncio.all_tasks():
            task.print_stack()
    sys.stderr.flush()


def follow(
    processes: list[multiprocessing.Process],
    done: "Queue[int]",
    say: Callable[[int], None],
    stalled_s: float = _STALLED_S,
) -> int:
    """Add up what the processes do until all have ended, or are ended as they get no further; the steps they took."""
    total, last = 0, time.monotonic()
    while any(process.is_alive() for process in processes) or not done.empty():
        with contextlib.suppress(queue.Empty):
            total += done.get(timeout=0.2)  # or they end without a word, as one does that fails
            last = time.monotonic()
            say(total)
        if time.monotonic() - last > stalled_s:
            for process in processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGUSR1)
                    process.join(1.0)  # it has something to say first
                    process.kill()
            last = time.monotonic()
    return total


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    start = time.monotonic()

    def say(total: int) -> None:
        rate = total / (time.monotonic() - start)
        left = max(options.steps - total, 0) / rate / 60
        print(f"{total:>8} steps, {rate:.0f} a second, {left:.0f} minutes left", file=sys.stderr, flush=True)

    done: Queue[int] = multiprocessing.Queue()
    share = -(-options.steps // options.processes)
    processes = [multiprocessing.Process(target=work, args=(n, share, done)) for n in range(options.processes)]
    for process in processes:
        process.start()
    total = follow(processes, done, say)
    failed = sum(process.exitcode != 0 for process in processes)
    result = {
        "benchmark": "soak",
        "steps": total,
        "seconds": time.monotonic() - start,
        "failed_processes": failed,
        "bars": [
            {"name": "steps", "value": total, "bar": options.steps, "ok": total >= options.steps},
            {"name": "failed_processes", "value": failed, "bar": 0, "ok": failed == 0},
        ],
    }
    RESULTS.write_text(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)
    return int(failed > 0 or total < options.steps)


if __name__ == "__main__":
    sys.exit(main())
