"""What the tiers cost beside the device, beside the origin, and beside doing without them.

    read      an entry from NVMe into the arena, beside the same bytes of the same file read by O_DIRECT and nothing
              else: one after another, and as many at a time as the tier makes (the better of the two is the floor)
    write     fills in a row while what they made is written behind, beside the same where nothing is written
    look-up   a hit and a lease in process, with 10, 1 000 and 100 000 entries in RAM
    start     the NVMe tier's start with 100 000 entries, from its notes; and without notes
    sick      a disk that takes 2 s a read: hits and misses, beside a daemon whose NVMe is empty; then it recovers

All that is compared takes turns in one run.

    python -m loadtest.tiers [--parts read,write,look-up,start,sick] [--entries 100000] [--rounds N]

Progress goes to stderr; the last line on stdout is JSON. Raw times: loadtest/results/tiers.json.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import numpy as np

from cache.arena import Arena
from cache.catalog import Catalog, CatalogSettings
from cache.dicom.phantom import write_series
from cache.entry import Entry, Lineage, TensorSpec
from cache.flight import FlightSettings
from cache.interfaces import NullObserver, SystemClock
from cache.keys import Key, Manifest, SeriesRef, SourceObject, TensorRef
from cache.lease import Leases, LeaseSettings
from cache.nvme import NvmeSettings, NvmeTier
from cache.nvme.head import Head, encode, head_nbytes
from cache.ram import RamSettings, RamTier
from cache.recipe.chain import parse_recipe
from cache.store import Store, StoreSettings
from cache.workers.pool import Workers, WorkerSettings

from . import servers
from .figures import at_least, at_most, metric, plain, quantile, say
from .scenario import on_signal

RESULTS: Final = Path(__file__).resolve().parent / "results" / "tiers.json"
MIB: Final = 1 << 20
BLOCK: Final = 4 * MIB
ALONE: Final = {"serving": 1.0}
EYE: Final = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
#: As long as those of a real entry are.
LINEAGE: Final = Lineage(
    source_version="0" * 32,
    objects=300,
    source_bytes=157_000_000,
    recipe_name="ct",
    recipe='{"version":1,"ops":[{"op":"volume"},{"op":"resample","spacing":[1.0,1.0,1.0]},{"op":"window"}]}',
    decoders={f"1.2.840.10008.1.2.4.{number}": "imagecodecs 2026.3.6" for number in range(50, 62)},
    software="voxcache 0.1",
    made_at=1.7e9,
    stages={"list": 0.01, "fetch": 0.5, "inspect": 0.02, "decode": 0.3, "recipe": 0.1},
)


def entry_of(number: int, nbytes: int) -> Entry:
    """A tensor entry, another one for each number."""
    series = f"1.2.826.0.1.3680043.10.1402.{number}"
    spec = TensorSpec("uint8", (nbytes, 1, 1), "zyx", (1.0, 1.0, 1.0), EYE)
    version = f"{number:032x}"
    key = Key("serving", "tensor", series, series, version, "r" * 32)
    return Entry(key, nbytes, spec, msgspec.structs.replace(LINEAGE, source_version=version), 1.0)


# ------------------------------------------------------------------ reading


def direct(fd: int, offset: int, out: memoryview, depth: int) -> None:
    """Fill ``out`` from a file opened with O_DIRECT, a block at a time, ``depth`` blocks at once."""

    def read(at: int) -> None:
        end = min(at + BLOCK, len(out))
        while at < end:
            at += os.preadv(fd, [out[at:end]], offset + at)

    if depth == 1:
        for at in range(0, len(out), BLOCK):
            read(at)
    else:
        with ThreadPoolExecutor(depth) as pool:
            list(pool.map(read, range(0, len(out), BLOCK)))


async def reads(folder: Path, sizes: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of each read, by size and reader."""
    raw: dict[str, Any] = {}
    for mib in sizes:
        nbytes = mib * MIB
        arena = Arena.create(nbytes)
        settings = NvmeSettings(str(folder / "read"), 4 * nbytes + 64 * MIB, ALONE, scrub=0)
        tier = await NvmeTier.open(settings, SystemClock())
        try:
            ram = RamTier(arena, RamSettings(nbytes, ALONE), SystemClock())
            entry = entry_of(mib, nbytes)
            content = np.random.default_rng(mib).integers(0, 255, nbytes, np.uint8)
            assert await tier.write(entry, content.data)
            [file] = (folder / "read" / "entries").iterdir()
            fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
            space = ram.reserve("serving", nbytes)
            seconds: dict[str, list[float]] = {"tier": [], "floor_sequential": [], "floor_deep": []}
            depths = {"floor_sequential": 1, "floor_deep": settings.threads}
            names = list(seconds)
            for turn in range(rounds + 1):
                for name in names[turn % 3 :] + names[: turn % 3]:
                    start = time.perf_counter()
                    if name == "tier":
                        await tier.read_into(entry.key, space.view, lambda: None)
                    else:
                        direct(fd, head_nbytes(nbytes), space.view, depths[name])
                    if turn:  # the first of each has everything in place for the others
                        seconds[name].append(time.perf_counter() - start)
            assert np.array_equal(np.frombuffer(space.view, np.uint8), content)
            os.close(fd)
            tier.evict(entry.key)
        finally:
            await tier.close()
            del space
            arena.close()
        raw[f"{mib}MiB"] = seconds
        say(f"read {mib} MiB: " + ", ".join(f"{n} {mib / 1024 / median(s):.2f} GiB/s" for n, s in seconds.items()))
    return raw


# ------------------------------------------------------------------ looking up


class _Nowhere:
    """What nobody may ask: all is in RAM."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for: that was no hit")


async def look_ups(folder: Path, counts: list[int], rounds: int) -> dict[str, Any]:
    """Seconds of a hit with its lease, and of giving it back, by number of entries."""
    raw: dict[str, Any] = {}
    clock = SystemClock()
    nowhere: Any = _Nowhere()
    for count in counts:
        arena = Arena.create(max(count, 16) * 4096 * 5 // 4 // 4096 * 4096)
        catalog = Catalog.open(folder / f"catalog-{count}", CatalogSettings(reserve=512 * MIB))
        nvme = await NvmeTier.open(NvmeSettings(str(folder / f"nvme-{count}"), 64 * MIB, ALONE, scrub=0), clock)
        try:
            workers = Workers(WorkerSettings(count=1))
            ram = RamTier(arena, RamSettings(arena.nbytes, ALONE), clock)
            recipe = parse_recipe("volume", {"version": 1, "ops": [{"op": "volume"}]})
            store = Store(
                settings=StoreSettings(revalidate="events"),
                ram=ram,
                nvme=nvme,
                catalog=catalog,
                recipes={"volume": recipe},
                clock=clock,
                observer=NullObserver(),
                flights=FlightSettings(),
                origin=nowhere,
                finder=nowhere,
                workers=workers,
                encoder=nowhere,
                patient_key=bytes(16),
                restores=nowhere,
            )
            digest = recipe.digest(workers.decoders)
            refs = []
            for number in range(count):
                ref = SeriesRef(f"1.2.{number}", f"1.2.{number}.1")
                manifest = Manifest.of(ref, [SourceObject(f"{ref.study}/{ref.series}/1.dcm", 100, "e")])
                catalog.record(manifest, clock.now())
                entry = msgspec.structs.replace(entry_of(number, 100), key=Key.tensor("serving", manifest, digest))
                ram.admit(entry, ram.reserve("serving", 100)).release()
                refs.append(TensorRef(ref, "volume"))
            leases = Leases(LeaseSettings(), clock)
            chance = random.Random(count)  # noqa: S311 - dice
            seconds = []
            for _ in range(rounds):
                want = chance.choice(refs)
                start = time.perf_counter()
                hit = store.hit(want)
                assert hit is not None
                lease = leases.grant(hit.pin)
                leases.release(lease.id)
                seconds.append(time.perf_counter() - start)
        finally:
            await nvme.close()
            catalog.close()
            arena.close()
        raw[str(count)] = seconds
        say(
            f"look-up among {count}: p50 {quantile(seconds, 0.5) * 1e3:.1f} µs, p99 {quantile(seconds, 0.99) * 1e3:.1f}"
        )
    return raw


# ------------------------------------------------------------------ starting


async def starts(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Seconds that the tier's start takes."""
    entries = folder / "start" / "entries"
    entries.mkdir(parents=True)
    for number in range(count):
        entry = entry_of(number, 1000)
        head = encode(Head(entry, "0" * 16))
        (entries / f"{entry.key.digest}.safetensors").write_bytes(head + bytes(1000))
        if number % 20_000 == 0:
            say(f"start: {number} files written")
    settings = NvmeSettings(str(folder / "start"), count * (64 << 10) + 64 * MIB, ALONE, scrub=0)
    raw: dict[str, list[float]] = {"without_notes": [], "from_notes": []}
    for turn in range(rounds + 1):
        start = time.perf_counter()
        tier = await NvmeTier.open(settings, SystemClock())
        raw["from_notes" if turn else "without_notes"].append(time.perf_counter() - start)
        assert tier.usage().entries == count
        await tier.close()
        del tier
    say(f"start with {count}: {median(raw['from_notes']):.2f} s from notes, {raw['without_notes'][0]:.2f} s without")
    return raw


def _starts(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    return asyncio.run(starts(folder, count, rounds))


def in_a_new_process(work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What ``work`` gives in a process of its own: a daemon that starts has no memory in pieces yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


# ------------------------------------------------------------------ daemons


class Caller:
    """One connection to a daemon."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of an answer; for other content its text."""
        self._connection.request(method, path, None if body is None else json.dumps(body))
        answer = self._connection.getresponse()
        text = answer.read().decode()
        assert answer.status < 400, text
        return json.loads(text) if answer.headers.get_content_type() == "application/json" else text

    def lease(self, ref: SeriesRef) -> tuple[float, str]:
        """The seconds until a lease of the series is granted, and the tier; it is given back."""
        start = time.perf_counter()
        granted = self.ask("POST", "/v1/leases", {"study": ref.study, "series": ref.series, "recipe": "volume"})
        seconds = time.perf_counter() - start
        self.ask("DELETE", f"/v1/leases/{granted['lease']}")
        return seconds, granted["tier"]

    def until_written(self, ref: SeriesRef) -> None:
        """Return once the series' pack and tensor are on NVMe."""
        while {e["kind"] for e in self.ask("GET", f"/v1/studies/{ref.study}")["entries"] if e["tier"] == "nvme"} != {
            "pack",
            "tensor",
        }:
            time.sleep(0.01)  # another process, which tells this only when asked

    def state(self) -> float:
        """The state of the disk's reads."""
        return metric(self.ask("GET", "/metrics"), "voxcache_nvme_state", side="read")


def series_of(origin: Path, count: int, mib: int, seed: int) -> list[SeriesRef]:
    """So many phantoms whose tensors have ``mib`` MiB."""
    return [
        SeriesRef(*write_series(origin, slices=2 * mib, rows=512, columns=512, seed=seed + number)[:2])
        for number in range(count)
    ]


def writes(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each fill, where what was made is written behind and where it is not.

    Fills go first, for a while, so "written" is what a few in a row take. What went before has touched all of the
    arena: else the daemon that needs more of it would pay for its pages.
    """
    mib, in_a_row, room = 32, 4, 16
    origin = folder / "write-origin"
    say(f"write: making {room + rounds * in_a_row} studies of {mib} MiB")
    refs = series_of(origin, room + rounds * in_a_row, mib, 1000)
    before, refs = refs[:room], refs[room:]
    budget = 3 * (room + len(refs)) * mib * MIB
    raw: dict[str, list[float]] = {"written": [], "not_written": []}
    with contextlib.ExitStack() as stack:
        callers = {}
        for name, admission in (("written", "all"), ("not_written", "second-use")):
            (folder / name).mkdir()
            extra = f'[store]\nwrite_admission = "{admission}"'
            running = servers.daemon(folder / name, origin, ram=room * mib * MIB, nvme=budget, extra=extra)
            callers[name] = Caller(stack.enter_context(running))
            for ref in before:
                callers[name].lease(ref)
                if name == "written":
                    callers[name].until_written(ref)
        for turn in range(rounds):
            some = refs[turn * in_a_row : (turn + 1) * in_a_row]
            for name in list(raw)[:: 1 if turn % 2 else -1]:
                raw[name] += [callers[name].lease(ref)[0] for ref in some]
                if name == "written":  # the other's turn is not to feel it
                    for ref in some:
                        callers[name].until_written(ref)
    say("write: " + ", ".join(f"{name} {median(seconds) * 1e3:.0f} ms a fill" for name, seconds in raw.items()))
    return raw


class Hits(threading.Thread):
    """Leases of one study at a steady rate while the block lasts; their seconds."""

    def __init__(self, url: str, ref: SeriesRef) -> None:
        super().__init__(daemon=True)
        self._caller = Caller(url)
        self._ref = ref
        self._over = threading.Event()
        self.seconds: list[float] = []

    def run(self) -> None:
        while not self._over.wait(0.005):
            seconds, tier = self._caller.lease(self._ref)
            assert tier == "ram", tier
            self.seconds.append(seconds)

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self._over.set()
            self.join()


def sick(folder: Path, count: int) -> dict[str, Any]:
    """Seconds of hits and misses on a daemon with a sick disk and on one with an empty one, and of the recovery."""
    mib = 16
    origin = folder / "sick-origin"
    say(f"sick: making {count + 1} studies of {mib} MiB")
    resident, *refs = series_of(origin, count + 1, mib, 2000)
    ram, nvme = 2 * (count + 4) * mib * MIB, 4 * (count + 4) * mib * MIB
    for name in ("sick", "empty"):
        (folder / name).mkdir()
    with servers.daemon(folder / "sick", origin, ram=ram, nvme=nvme) as url:
        caller = Caller(url)
        for ref in refs:
            caller.lease(ref)
            caller.until_written(ref)
    # some reads are needed to see it, then probes meet it, each after twice the pause, until it is over
    fault = '[faults.disk]\ndelay_s = 2.0\nmethods = ["read"]\ntimes = 9'
    raw: dict[str, Any] = {"miss": {"sick": [], "empty": []}, "hit": {"sick": [], "empty": []}}
    with (
        servers.daemon(folder / "sick", origin, ram=ram, nvme=nvme, extra=fault) as sick_url,
        servers.daemon(folder / "empty", origin, ram=ram, nvme=nvme) as empty_url,
    ):
        urls = {"sick": sick_url, "empty": empty_url}
        callers = {name: Caller(url) for name, url in urls.items()}
        for caller in callers.values():
            caller.lease(resident)
        states = []
        for number, ref in enumerate(refs):
            for name in list(urls)[:: 1 if number % 2 else -1]:
                hits = Hits(urls[name], resident)
                with hits.going_on():
                    seconds, tier = callers[name].lease(ref)
                if tier == "nvme":  # it has recovered already
                    break
                assert tier == "origin", tier
                raw["miss"][name].append(seconds)
                raw["hit"][name] += hits.seconds
            states.append(callers["sick"].state())
        raw["states"] = states
        raw["while_detecting"] = sum(state < 2 for state in states) + 1
        start = time.perf_counter()
        while callers["sick"].state() >= 2:
            time.sleep(0.1)  # another process, which tells this only when asked
        raw["recovered_after_s"] = time.perf_counter() - start
        lines = (folder / "sick" / "voxcache.log").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        raw["log"] = [line["state"] for line in events if line["event"] == "disk" and line["side"] == "read"]
    say(f"sick: {raw['while_detecting']} misses until it was left alone; states told: {raw['log']}")
    return raw


# ------------------------------------------------------------------ the run


def verdict(raw: dict[str, Any]) -> dict[str, Any]:
    """Medians, tails, ratios and bars."""
    figures: dict[str, Any] = {}
    bars = []
    if "read" in raw:
        figures["read_gib_s"] = {
            size: {name: int(size[:-3]) / 1024 / median(seconds) for name, seconds in by.items()}
            for size, by in raw["read"].items()
        }
        for size, by in raw["read"].items():
            ratio = min(median(by["floor_sequential"]), median(by["floor_deep"])) / median(by["tier"])
            bars.append(at_least(f"nvme_read_vs_floor_{size}", ratio, 0.8))
    if "write" in raw:
        cost = median(raw["write"]["written"]) / median(raw["write"]["not_written"]) - 1
        figures["fill_ms"] = {name: median(seconds) * 1e3 for name, seconds in raw["write"].items()}
        bars.append(at_most("write_behind_cost", cost, 0.05))
    if "look-up" in raw:
        figures["look_up_us"] = {
            count: {"p50": quantile(seconds, 0.5) * 1e3, "p99": quantile(seconds, 0.99) * 1e3}
            for count, seconds in raw["look-up"].items()
        }
        few, *_, many = (by["p50"] for by in figures["look_up_us"].values())
        bars += [at_most("look_up_p50_us", many, 100), at_most("look_up_flat", many / few, 4)]
    if "start" in raw:
        figures["start_s"] = {name: {"median": median(s), "max": max(s)} for name, s in raw["start"].items()}
        took = figures["start_s"]["from_notes"]["max"]
        bars.append(at_most("start_s", took, 5))
    if "sick" in raw:
        sick_raw = raw["sick"]
        known = {name: seconds[sick_raw["while_detecting"] :] for name, seconds in sick_raw["miss"].items()}
        miss = median(known["sick"]) / median(known["empty"])
        hit = quantile(sick_raw["hit"]["sick"], 0.99) / quantile(sick_raw["hit"]["empty"], 0.99)
        figures["sick"] = {
            "miss_ms": {name: median(seconds) * 1e3 for name, seconds in known.items()},
            "misses_while_detecting_ms": [s * 1e3 for s in sick_raw["miss"]["sick"][: sick_raw["while_detecting"]]],
            "hit_p99_ms": {name: quantile(seconds, 0.99) for name, seconds in sick_raw["hit"].items()},
            "recovered_after_s": sick_raw["recovered_after_s"],
            "states": sick_raw["log"],
        }
        bars += [at_most("sick_miss_vs_origin", miss, 1.1), at_most("sick_hit_p99", hit, 1.5)]
    return {
        "benchmark": "tiers",
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()},
        **figures,
        "bars": plain(bars),
    }


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    parser = argparse.ArgumentParser(prog="tiers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="read,write,look-up,start,sick")
    parser.add_argument("--sizes", default="64,256,512", help="MiB, of what is read")
    parser.add_argument("--entries", type=int, default=100_000, help="the most that are looked up, or started with")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: where temporary files are)")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    counts = [10, 1000, options.entries]
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="voxcache-tiers-", dir=options.folder) as name:
        folder = Path(name)
        parts: dict[str, Callable[[], Any]] = {
            "read": lambda: asyncio.run(reads(folder, sizes, options.rounds)),
            "write": lambda: writes(folder, 2 * options.rounds),  # a few per cent are to be told from noise
            "look-up": lambda: asyncio.run(look_ups(folder, counts, 20_000)),
            "start": lambda: in_a_new_process(_starts, folder, options.entries, 3),
            "sick": lambda: sick(folder, 2 * options.rounds),
        }
        for part in options.parts.split(","):
            raw[part] = parts[part]()
    result = verdict(raw)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**result, "raw_s": raw}) + "\n")
    print(json.dumps(result), flush=True)
    return 0 if all(each["ok"] for each in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
