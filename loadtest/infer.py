"""What an inference costs beside the model: by reference through voxcache, and every other way to hand a volume over.

The model reads only the ends of its volume, where they lie (``loadtest/ends``). In turn, a few calls in a row: the
bytes to Triton, by gRPC and HTTP; a region of shared memory straight to Triton (the floor); the same region through an
empty proxy in the same frameworks (``loadtest/proxy.py``); by reference through voxcache; Triton's own response cache
with the region; voxcache's kept answers. A second part has perf_analyzer send references to voxcache, and regions
through the empty proxy, at several concurrencies.

    python -m loadtest.infer [--sizes 1,32,128,512] [--rounds N] [--repeats N] [--no-perf]

Progress goes to stderr; the last line on stdout is JSON. Raw times: loadtest/results/infer.json.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.http

from cache.dicom.phantom import write_series
from serving.demo.tritonserver import TritonServer
from voxcache_client import Client

from . import ends, servers
from .figures import Bar, at_least, at_most, plain, say, summary
from .scenario import on_signal

RESULTS: Final = Path(__file__).resolve().parent / "results" / "infer.json"
PERF: Final = Path(__file__).resolve().parents[1] / ".services" / "perf" / "perf_analyzer"
MIB: Final = 1 << 20
SLICE: Final = 512 * 512 * 2
#: Rounds of what moves or hashes the bytes, by MiB; everything else takes ROUNDS.
SLOW: Final = {1: 60, 32: 12, 128: 6, 512: 2}
ROUNDS: Final = 400
IN_A_ROW: Final = 10
CONCURRENCIES: Final = (1, 4, 16)
STUDIES: Final = 20

#: By reference at this size: so many times faster than the bytes over gRPC.
SPEEDUP: Final = (128, 200.0)
#: What voxcache adds to the bare region call, by what the empty proxy adds.
OVERHEAD: Final = 1.3
#: perf_analyzer's throughput by reference, by that through the empty proxy.
THROUGHPUT: Final = 0.9

CLIENTS: Final = {"http": tritonclient.http, "grpc": tritonclient.grpc}


class Study(NamedTuple):
    """A phantom whose tensor has ``mib`` MiB, and where its bytes lie in the region."""

    mib: int
    study: str
    series: str
    shape: tuple[int, ...]
    offset: int

    @property
    def reference(self) -> str:
        return f"{self.study}/{self.series}/volume"


class Places(NamedTuple):
    """Where everybody listens, and the region as Triton and the proxy's clients know it."""

    triton: dict[str, str]
    ours: dict[str, str]
    proxy: dict[str, str]
    region: str


@contextlib.contextmanager
def proxy(folder: Path, triton: TritonServer) -> Iterator[dict[str, str]]:
    """The empty proxy as a process. Yields where it listens."""
    http_port, grpc_port = servers.free_port(), servers.free_port()
    command = [sys.executable, "-m", "loadtest.proxy", str(http_port), str(grpc_port), triton.url, triton.grpc_url]
    with servers.process(command, folder / "proxy.log", servers.answers(http_port, "/v2/health/ready")):
        yield {"http": f"127.0.0.1:{http_port}", "grpc": f"127.0.0.1:{grpc_port}"}


@contextlib.contextmanager
def region(studies: list[Study], client: Client) -> Iterator[tuple[Path, dict[int, npt.NDArray[Any]]]]:
    """Shared memory with every study's tensor, as a client of Triton's would lay it out; and the tensors."""
    path = Path("/dev/shm") / f"voxcache-bench-{secrets.token_hex(8)}"
    tensors = {}
    try:
        with path.open("xb") as file:
            for study in studies:
                with client.tensor(study.study, study.series, "volume") as tensor:
                    tensors[study.mib] = tensor.array.copy()
                file.seek(study.offset)
                file.write(tensors[study.mib].data)
        yield path, tensors
    finally:
        path.unlink()


# ------------------------------------------------------------------ part one: turn by turn

Call = Callable[[], Any]


def calls(study: Study, array: npt.NDArray[Any], places: Places, stack: contextlib.ExitStack) -> dict[str, Call]:
    """Every way to have the model look at the study, each having proved right once."""
    found: dict[str, Call] = {}
    for door, module in CLIENTS.items():
        shared = module.InferInput("VOLUME", list(array.shape), "INT16")
        shared.set_shared_memory(places.region, array.nbytes, offset=study.offset)
        named = module.InferInput("REFERENCE", [1], "BYTES")
        named.set_data_from_numpy(np.array([study.reference.encode()], object))
        triton, ours, through = (
            stack.enter_context(module.InferenceServerClient(place[door]))
            for place in (places.triton, places.ours, places.proxy)
        )
        found |= {
            f"bytes_{door}": functools.partial(by_bytes, module, triton, array),
            f"region_{door}": functools.partial(triton.infer, "ends", [shared]),
            f"proxy_{door}": functools.partial(through.infer, "ends", [shared]),
            f"reference_{door}": functools.partial(ours.infer, "ends.ref", [named]),
            f"triton_cache_{door}": functools.partial(triton.infer, "ends_cached", [shared]),
            f"kept_{door}": functools.partial(ours.infer, "ends_kept.ref", [named]),
        }
    for name, call in found.items():
        told = call().as_numpy("ENDS").tolist()
        assert told == [array.flat[0], array.flat[-1]], f"{name} gave another answer"
    return found


def by_bytes(module: Any, client: Any, array: npt.NDArray[Any]) -> Any:
    """The volume in the request, written there anew, as a caller with a new volume does."""
    given = module.InferInput("VOLUME", list(array.shape), "INT16")
    given.set_data_from_numpy(array)
    return client.infer("ends", [given])


def take_turns(found: dict[str, Call], slow: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    wanted = {name: slow if name.startswith(("bytes", "triton_cache")) else rounds for name in names}
    turn = 0
    while any(len(seconds[name]) < wanted[name] for name in names):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            left = min(IN_A_ROW if wanted[name] == rounds else 1, wanted[name] - len(seconds[name]))
            for _ in range(left):
                start = time.perf_counter()
                found[name]()
                seconds[name].append(time.perf_counter() - start)
        turn += 1
    for name in names:
        told = summary(seconds[name])
        say(f"  {name:18} p50 {told['p50_ms']:10.3f} ms   p99 {told['p99_ms']:10.3f} ms   n {len(seconds[name])}")
    return seconds


# ------------------------------------------------------------------ part two: perf_analyzer


def throughput(address: str, door: str, concurrency: int, arguments: list[str]) -> float:
    """Inferences a second, as perf_analyzer measures them."""
    command = [
        *(str(PERF), "-u", address, "-i", door, "--concurrency-range", str(concurrency)),
        *("--measurement-interval", "1000", "--stability-percentage", "999", "--max-trials", "6", *arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = re.search(r"Throughput: ([0-9.]+) infer/sec", done.stdout)
    if told is None:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return float(told[1])


def perf(studies: list[Study], places: Places, folder: Path, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Pairs of throughputs, by reference and through the empty proxy, by door and concurrency."""
    references = folder / "references.json"
    references.write_text(
        json.dumps({"data": [{"REFERENCE": {"content": [study.reference], "shape": [1]}} for study in studies]})
    )
    shape = ",".join(map(str, studies[0].shape))
    ours = ["-m", "ends.ref", "--input-data", str(references)]
    bare = ["-m", "ends", "--shared-memory", "system", "--shape", f"VOLUME:{shape}"]
    pairs: dict[str, list[tuple[float, float]]] = {}
    for door in CLIENTS:
        for concurrency in CONCURRENCIES:
            name = f"{door}_{concurrency}"
            for turn in range(repeats):
                ways = [(places.ours, ours), (places.proxy, bare)]
                told = {}
                for number in (0, 1) if turn % 2 == 0 else (1, 0):
                    where, arguments = ways[number]
                    told[number] = throughput(where[door], door, concurrency, arguments)
                pairs.setdefault(name, []).append((told[0], told[1]))
            ratios = [ours_rate / bare_rate for ours_rate, bare_rate in pairs[name]]
            say(f"  perf_analyzer {name:8} {pairs[name]}  ratio {statistics.median(ratios):.2f}")
    return pairs


# ------------------------------------------------------------------ the run


def verdict(raw: dict[str, dict[str, list[float]]], pairs: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians, tails, ratios and bars."""
    sizes = {size: {name: summary(seconds) for name, seconds in by.items()} for size, by in raw.items()}
    bars: list[Bar] = []
    ratios: dict[str, dict[str, float]] = {}
    for size, by in sizes.items():
        ratios[size] = {
            f"{way}_{door}_vs_reference_{door}": by[f"{way}_{door}"]["p50_ms"] / by[f"reference_{door}"]["p50_ms"]
            for door in CLIENTS
            for way in ("bytes", "region", "proxy", "triton_cache", "kept")
        }
    at, times = SPEEDUP
    if f"{at}MiB" in sizes:
        value = ratios[f"{at}MiB"]["bytes_grpc_vs_reference_grpc"]
        bars.append(at_least(f"bytes_vs_reference_grpc_{at}MiB", value, times))
    # none of these touches the volume, so all sizes count together
    together = {
        name: summary([each for by in raw.values() for each in by[name]])["p50_ms"] for name in next(iter(raw.values()))
    }
    overhead = {}
    for door in CLIENTS:
        floor = together[f"region_{door}"]
        added = {way: together[f"{way}_{door}"] - floor for way in ("reference", "proxy", "kept")}
        overhead[door] = {"region_ms": floor, **{f"{way}_adds_ms": value for way, value in added.items()}}
        value = added["reference"] / added["proxy"]
        bars.append(at_most(f"overhead_vs_proxy_{door}", value, OVERHEAD))
    for name, told in pairs.items():
        value = statistics.median(ours / bare for ours, bare in told)
        bars.append(at_least(f"throughput_vs_proxy_{name}", value, THROUGHPUT))
    return {
        "benchmark": "infer",
        "machine": {"cores": os.cpu_count(), "python": sys.version.split()[0]},
        "sizes": sizes,
        "ratios": ratios,
        "overhead": overhead,
        "throughput": pairs,
        "bars": plain(bars),
    }


def write_studies(sizes: list[int], count: int, origin: Path) -> tuple[list[Study], list[Study]]:
    """A phantom of each size, and ``count`` more of the smallest."""
    made = []
    offset = 0
    for number, mib in enumerate([*sizes, *([min(sizes)] * count)]):
        slices = mib * MIB // SLICE
        study, series, _ = write_series(origin, slices=slices, rows=512, columns=512, seed=number)
        made.append(Study(mib, study, series, (slices, 512, 512), offset))
        offset += mib * MIB
    return made[: len(sizes)], made[len(sizes) :]


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    parser = argparse.ArgumentParser(prog="infer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="1,32,128,512", help="MiB, separated by commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="calls of each kind that moves no bytes, by size")
    parser.add_argument("--repeats", type=int, default=3, help="runs of perf_analyzer, for each of the two")
    parser.add_argument("--no-perf", action="store_true", help="leave perf_analyzer out")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="voxcache-infer-")))
        say("writing phantoms")
        studies, more = write_studies(sizes, 0 if options.no_perf else STUDIES, folder / "origin")
        models = {"ends": "", "ends_cached": "response_cache { enable: true }", "ends_kept": ""}
        repository = ends.build(folder, models)
        triton = stack.enter_context(
            TritonServer(folder / "triton.log", [repository], more=["--cache-config=local,size=67108864"])
        )
        room = (sum(sizes) + len(more) * min(sizes)) * MIB
        port = servers.free_port()
        settings = f'url = "{triton.url}"\ngrpc = "{triton.grpc_url}"\n[triton.models.ends_kept]\nresults = true'
        url = stack.enter_context(
            servers.daemon(
                folder,
                folder / "origin",
                ram=3 * room + 256 * MIB,
                nvme=4 * room + 1024 * MIB,
                triton=settings,
                grpc_port=port,
            )
        )
        with Client(url) as client:
            path, tensors = stack.enter_context(region(studies, client))
            for study in more:
                with client.tensor(study.study, study.series, "volume"):
                    pass
        places = Places(
            {"http": triton.url.removeprefix("http://"), "grpc": triton.grpc_url},
            {"http": url.removeprefix("http://"), "grpc": f"127.0.0.1:{port}"},
            stack.enter_context(proxy(folder, triton)),
            "bench",
        )
        with tritonclient.http.InferenceServerClient(places.triton["http"]) as client:
            client.register_system_shared_memory(places.region, f"/{path.name}", path.stat().st_size)
        raw = {}
        for study in studies:
            say(f"{study.mib} MiB, turn by turn")
            with contextlib.ExitStack() as clients:
                found = calls(study, tensors[study.mib], places, clients)
                raw[f"{study.mib}MiB"] = take_turns(found, SLOW.get(study.mib, 6), options.rounds)
        pairs = perf(more, places, folder, options.repeats) if more else {}
    result = verdict(raw, pairs)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**result, "raw_s": raw}) + "\n")
    print(json.dumps(result), flush=True)
    return 0 if all(bar["ok"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
