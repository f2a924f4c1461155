"""kill -9 at random instants under load, again and again: wrong bytes, overrun budgets, and how long recovery takes.

Each round starts the daemon on what the last kill left, asks for every study that is on NVMe, then puts load on it
(GETs, ranges, leases whose bytes are read in shared memory, evictions) with studies several times the size of the
tiers, and kills it at a random instant: under load, or while it still starts. Every byte that is answered or leased is
compared with what an undisturbed daemon made. An observer adds up the disk that the cache folder takes, all the time.
Recovery is what passes from the start of the process to its first answer, beside the same on an empty folder.

    python -m loadtest.crash [--rounds 500] [--seed 1]

Progress goes to stderr; the last line on stdout is JSON. Raw times: loadtest/results/crash.json.
"""

import argparse
import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from cache.dicom.phantom import write_series
from cache.keys import SeriesRef
from cache.nvme.disk import allocated_below
from serving.demo.daemon import DaemonError, DaemonProcess

from . import servers
from .figures import at_most, plain, say
from .scenario import on_signal

RESULTS: Final = Path(__file__).resolve().parent / "results" / "crash.json"
MIB: Final = 1 << 20
RAM: Final = 12 * MIB
NVME: Final = 24 * MIB
CALLERS: Final = 4
#: A round is killed at most so long after its load began.
LOAD_S: Final = 0.6
#: The share of kills that meet a daemon which still starts.
WHILE_STARTING: Final = 0.2
#: Statuses that a tier too small for its load may answer with.
FINE: Final = {200, 201, 204, 206, 404, 410, 503, 507}


class Answer(NamedTuple):
    status: int
    tier: str
    body: bytes


def ask(url: str, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Answer:
    """One request on a connection of its own. Raises: OSError, HTTPException if the daemon dies meanwhile."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers or {})
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers.get("Voxcache-Tier", ""), answer.read())
    finally:
        connection.close()


def path_of(ref: SeriesRef) -> str:
    return f"/v1/studies/{ref.study}/series/{ref.series}/tensors/volume"


class Observer(threading.Thread):
    """Adds up what the folder takes, as often as it can; ``most`` is the most it saw."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._over = threading.Event()
        self.looks = 0
        self.most = 0

    def run(self) -> None:
        before = 0
        while not self._over.wait(0.002):
            # a look takes a while: it may meet a file under two names, or a victim and what came in its place, so only
            # what two looks in turn agree on was there at one time
            seen = allocated_below(self._folder)
            if seen == before:
                self.most = max(self.most, seen)
                self.looks += 1
            before = seen

    def stop(self) -> None:
        self._over.set()
        self.join()


class Load:
    """Callers that go on until the daemon is gone, and what they saw."""

    def __init__(self, right: dict[SeriesRef, bytes]) -> None:
        self._right = right
        self.answers = 0
        self.answered = threading.Event()  # since load was put on
        self.wrong: list[str] = []
        self.odd: list[str] = []

    def put_on(self, url: str, seed: str) -> list[threading.Thread]:
        """Start the callers."""
        self.answered.clear()
        callers = [threading.Thread(target=self._call, args=(url, f"{seed}/{n}"), daemon=True) for n in range(CALLERS)]
        for caller in callers:
            caller.start()
        return callers

    def check(self, url: str) -> int:
        """Ask for what is on NVMe; how many of it answered from there."""
        found = 0
        for ref in self._right:
            entries = json.loads(ask(url, "GET", f"/v1/studies/{ref.study}").body).get("entries", [])
            if any(entry["tier"] == "nvme" and entry["kind"] == "tensor" for entry in entries):
                answer = ask(url, "GET", path_of(ref))
                self._compare(ref, answer, slice(None))
                found += answer.tier == "nvme"
        return found

    def _call(self, url: str, seed: str) -> None:
        chance = random.Random(seed)  # noqa: S311 - dice
        refs = list(self._right)
        try:
            while True:
                self._once(url, chance, chance.choice(refs))
        except (OSError, http.client.HTTPException):
            return  # it was killed under this request, as it was meant to be

    def _once(self, url: str, chance: random.Random, ref: SeriesRef) -> None:
        what = chance.random()
        if what < 0.65:
            self._compare(ref, ask(url, "GET", path_of(ref)), slice(None))
        elif what < 0.8:
            self._compare(ref, ask(url, "GET", path_of(ref), headers={"Range": "bytes=1000-70000"}), slice(1000, 70001))
        elif what < 0.95:
            wanted = {"study": ref.study, "series": ref.series, "recipe": "volume", "ttl_s": 30}
            answer = ask(url, "POST", "/v1/leases", wanted)
            if answer.status == 201:
                self._read_lease(ref, json.loads(answer.body))
            self._note(answer)
        else:
            self._note(ask(url, "DELETE", f"/v1/studies/{ref.study}"))

    def _read_lease(self, ref: SeriesRef, lease: dict[str, Any]) -> None:
        with Path("/dev/shm", lease["shm"]).open("rb") as arena:
            arena.seek(lease["offset"])
            self._compare(ref, Answer(200, "ram", arena.read(lease["nbytes"])), slice(None))

    def _compare(self, ref: SeriesRef, answer: Answer, part: slice) -> None:
        self._note(answer)
        if answer.status in {200, 206} and answer.body != self._right[ref][part]:
            self.wrong.append(f"{ref.series} from {answer.tier}: {hashlib.sha256(answer.body).hexdigest()}")

    def _note(self, answer: Answer) -> None:
        self.answers += 1
        self.answered.set()
        if answer.status not in FINE:
            self.odd.append(f"{answer.status} {answer.body[:200]!r}")


class Recovery(NamedTuple):
    """One start after a kill: seconds, and the entries on NVMe that answered."""

    seconds: float
    entries: int


def daemon(folder: Path, origin: Path, *, nvme: int = NVME, ram: int = RAM) -> DaemonProcess:
    """A daemon that keeps what it has in ``folder``."""
    folder.mkdir(exist_ok=True)
    extra = f'[catalog]\nreserve = {MIB}\n[store]\nrevalidate = "events"\n[workers]\ncount = 2'
    settings = servers.settings(folder, origin, ram=ram, nvme=nvme, extra=extra)
    return DaemonProcess(settings, folder / "voxcache.log", dict(os.environ))


def started(process: DaemonProcess) -> float:
    """Start it; the seconds until it answers."""
    start = time.perf_counter()
    process.start()
    assert ask(process.url, "GET", "/livez").status == 200
    return time.perf_counter() - start


def kill_while_starting(process: DaemonProcess, after_s: float) -> None:
    """Start it, and kill it after so many seconds, ready or not."""
    timer = threading.Timer(after_s, lambda: process.signal(9))
    timer.start()
    try:
        process.start()
    except DaemonError:
        pass
    finally:
        timer.join()
        process.kill()


def check_folder(folder: Path) -> bool:
    """Whether ``voxcache fsck`` finds what a kill left in order."""
    command = [sys.executable, "-m", "serving.cli", "fsck", "--config", str(folder / "voxcache.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"fsck: {done.stdout}{done.stderr}")
    return done.returncode == 0


def run(rounds: int, seed: int, folder: Path, tell: Callable[[str], None] = say) -> dict[str, Any]:
    """All rounds, and their result."""
    chance = random.Random(seed)  # noqa: S311 - dice
    origin = folder / "origin"
    refs = [
        SeriesRef(*write_series(origin, slices=slices, rows=side, columns=side, seed=number)[:2])
        for number, (slices, side) in enumerate([(12, 64)] * 12 + [(24, 128)] * 12 + [(40, 192)] * 6)
    ]
    with daemon(folder / "undisturbed", origin, nvme=256 * MIB, ram=128 * MIB) as undisturbed:
        right = {ref: ask(undisturbed.url, "GET", path_of(ref)).body for ref in refs}
    empty = []
    for _ in range(3):
        shutil.rmtree(folder / "undisturbed")
        bare = daemon(folder / "undisturbed", origin)
        empty.append(started(bare))
        bare.stop()
    tell(f"{len(refs)} studies, {sum(map(len, right.values())) / MIB:.0f} MiB; a start on an empty folder: {empty}")

    process = daemon(folder / "killed", origin)
    observer = Observer(folder / "killed" / "nvme")
    observer.start()
    load = Load(right)
    recoveries: list[Recovery] = []
    starting = fscks = bad_fscks = 0
    for number in range(rounds):
        if chance.random() < WHILE_STARTING:
            kill_while_starting(process, chance.uniform(0, median(empty)))
            starting += 1
            continue
        seconds = started(process)
        recoveries.append(Recovery(seconds, load.check(process.url)))
        callers = load.put_on(process.url, f"{seed}/{number}")
        if chance.random() < 0.5 or not load.answers:
            load.answered.wait(120)  # the others may be killed in their first fills
        time.sleep(chance.uniform(0, LOAD_S))  # the instant of the kill is to be nothing that the daemon does
        process.kill()
        for caller in callers:
            caller.join()
        if number % 50 == 2:
            fscks += 1
            bad_fscks += not check_folder(folder / "killed")
        if number % 10 == 0:
            took = median(recovery.seconds for recovery in recoveries)
            tell(f"round {number}: {load.answers} answers, {len(load.wrong)} wrong; recovery {took:.2f} s (median)")
    observer.stop()
    return {
        "benchmark": "crash",
        "rounds": rounds,
        "killed_while_starting": starting,
        "answers": load.answers,
        "entries_found_after_kills": sum(recovery.entries for recovery in recoveries),
        "wrong": load.wrong[:10],
        "odd": load.odd[:10],
        "fscks": fscks,
        "most_disk": observer.most,
        "looks": observer.looks,
        "recovery_s": {"median": median(r.seconds for r in recoveries), "max": max(r.seconds for r in recoveries)},
        "empty_start_s": {"median": median(empty), "max": max(empty)},
        "raw_s": [recovery.seconds for recovery in recoveries],
        "bars": [
            *plain([at_most("wrong_answers", len(load.wrong), 0), at_most("odd_statuses", len(load.odd), 0)]),
            {"name": "most_disk", "value": observer.most, "bar": NVME, "ok": 0 < observer.most <= NVME},
            *plain([at_most("bad_fscks", bad_fscks, 0)]),
            {"name": "rounds", "value": rounds, "bar": rounds, "ok": bool(load.answers)},
        ],
    }


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    parser = argparse.ArgumentParser(prog="crash", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="voxcache-crash-") as folder:
        result = run(options.rounds, options.seed, Path(folder))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result) + "\n")
    del result["raw_s"]
    print(json.dumps(result), flush=True)
    return 0 if all(bar["ok"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
