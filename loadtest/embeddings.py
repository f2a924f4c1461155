"""What looking for the nearest embeddings costs, by how many are held, and how long others wait for their turn.

A store's real tiers are filled with random vectors; then queries and the floor take turns: the same vectors in one
matrix, multiplied by BLAS. Meanwhile a ticker tells how long the event loop kept it waiting. For the last size the
vectors are also read from NVMe alone, as after a restart.

    python -m loadtest.embeddings [--sizes 1000,10000,100000] [--length 64] [--rounds N]

Progress goes to stderr; the last line on stdout is JSON. Raw figures: loadtest/results/embeddings.json.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import uvloop

from cache.arena import ALIGN, Arena
from cache.catalog import Catalog, CatalogSettings
from cache.entry import Entry, Lineage, ModelIdentity, TensorSpec
from cache.flight import FlightSettings
from cache.interfaces import Encoder, NullObserver, Origin, SystemClock
from cache.keys import Key
from cache.nvme import NvmeSettings, NvmeTier
from cache.origin.find import Finder
from cache.ram import RamSettings, RamTier
from cache.recipe.chain import Infer, parse_recipe
from cache.restore import Restores, RestoreSettings
from cache.store import Store, StoreSettings
from cache.workers.pool import Workers, WorkerSettings
from serving.neighbours import QueryRequest, query

from .figures import at_most, plain, say, summary

RESULTS: Final = Path(__file__).resolve().parent / "results" / "embeddings.json"
MODEL: Final = ModelIdentity("encoder", "1", "c" * 32)
OPS: Final = [{"op": "volume"}, {"op": "infer", "model": "encoder", "output": "E"}]
RECIPE: Final = parse_recipe("vector", {"version": 1, "ops": OPS})
K: Final = 10
#: Milliseconds of CPU, which other programs on the machine do not change as they do the time: what a query of 10 000
#: takes, and what a turn of the event loop that a query has.
BARS: Final = {"query_10000_cpu_p50_ms": 50.0, "turn_cpu_ms": 2.0}
#: Embeddings that are gone through in a turn.
TURN: Final = 200


class Known:
    """An Encoder that knows its model and never runs it."""

    def known(self, infer: Infer) -> ModelIdentity:
        return MODEL


@contextlib.asynccontextmanager
async def holding(vectors: npt.NDArray[np.float32], folder: Path, *, in_ram: bool) -> AsyncIterator[Store]:
    """A store whose tiers hold ``vectors``: RAM, or else NVMe alone."""
    clock = SystemClock()
    count = len(vectors)
    whole = {"serving": 1.0}
    nbytes = (count + count // 4 + 64) * ALIGN
    arena = Arena.create(nbytes)
    try:
        ram = RamTier(arena, RamSettings(nbytes, whole), clock)
        budget = (64 << 20) + (0 if in_ram else count * (40 << 10))
        nvme = await NvmeTier.open(NvmeSettings(str(folder), budget, whole), clock, reserved_bytes=4 << 20)
        catalog = Catalog.open(folder / "catalog.sqlite", CatalogSettings(reserve=4 << 20))
        workers = Workers(WorkerSettings())
        nowhere = cast(Origin, None)
        store = Store(
            settings=StoreSettings(),
            flights=FlightSettings(),
            ram=ram,
            nvme=nvme,
            catalog=catalog,
            origin=nowhere,
            finder=cast(Finder, None),
            workers=workers,
            encoder=cast(Encoder, Known()),
            recipes={RECIPE.name: RECIPE},
            patient_key=b"",
            restores=Restores(RestoreSettings(), nowhere, catalog, clock, NullObserver()),
            clock=clock,
            observer=NullObserver(),
        )
        digest = RECIPE.digest(workers.decoders, MODEL)
        spec = TensorSpec("float32", vectors.shape[1:], "", None, None)
        for number, vector in enumerate(vectors):
            key = Key("serving", "embedding", f"1.2.{number}", f"1.2.{number}.1", "v" * 32, digest)
            lineage = Lineage("v" * 32, 300, 1 << 27, RECIPE.name, RECIPE.canonical(), modality="CT", model=MODEL)
            tier: RamTier | NvmeTier = ram if in_ram else nvme
            assert await tier.write(Entry(key, spec.nbytes, spec, lineage, 1.0), memoryview(vector.tobytes()))
        yield store
        await store.close()
        catalog.close()
        await nvme.close()
    finally:
        arena.close()


@contextlib.asynccontextmanager
async def ticking(late: list[float]) -> AsyncIterator[None]:
    """Note by how much each turn of a millisecond comes late."""
    over = False

    async def tick() -> None:
        while not over:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - start - 0.001)

    ticker = asyncio.create_task(tick())
    yield
    over = True
    await ticker


def floor(matrix: npt.NDArray[np.float32], lengths: npt.NDArray[np.float32], vector: npt.NDArray[np.float32]) -> Any:
    """The nearest by cosine of a matrix that is there already."""
    scores = matrix @ vector / lengths
    best = np.argpartition(scores, -K)[-K:]
    return best[np.argsort(-scores[best])]


async def timed(store: Store, vector: npt.NDArray[np.float32], took: list[float], cpu: list[float]) -> list[str]:
    start, spent = time.perf_counter(), time.thread_time()
    answer = await query(store, QueryRequest(vector=vector.tolist(), model=MODEL.name, k=K))
    took.append(time.perf_counter() - start)
    cpu.append(time.thread_time() - spent)
    return [neighbour.study for neighbour in answer.neighbours]


async def measured(count: int, length: int, rounds: int, folder: Path) -> dict[str, Any]:
    random = np.random.default_rng(count)
    vectors = random.normal(size=(count, length)).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    queries, cpu, floors, late, alone = (list[float]() for _ in range(5))
    async with holding(vectors, folder, in_ram=True) as store:
        for _ in range(rounds):
            vector = random.normal(size=length).astype(np.float32)
            async with ticking(late):
                found = await timed(store, vector, queries, cpu)
            async with ticking(alone):
                await asyncio.sleep(queries[-1])
            start = time.perf_counter()
            best = floor(vectors, lengths, vector)
            floors.append(time.perf_counter() - start)
            assert found == [f"1.2.{at}" for at in best]
    result = {
        "query": summary(queries),
        "floor": summary(floors),
        "query_cpu": summary(cpu),
        "stall": summary(late),
        "stall_alone": summary(alone),
    }
    result["ratio_to_floor"] = {"p50": round(result["query"]["p50_ms"] / result["floor"]["p50_ms"], 1)}
    say(f"{count}: {result}")
    return result


async def from_nvme(count: int, length: int, folder: Path) -> dict[str, Any]:
    """The first query after a restart, and the second."""
    vectors = np.random.default_rng(count).normal(size=(count, length)).astype(np.float32)
    took = list[float]()
    async with holding(vectors, folder, in_ram=False) as store:
        for _ in range(2):
            await timed(store, vectors[0], took, [])
    say(f"{count} from NVMe: {took}")
    return {"first_s": round(took[0], 3), "second_s": round(took[1], 3), "n": count}


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,10000,100000")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=0, help="0: fewer for larger sizes")
    parser.add_argument("--nvme", type=int, default=1000, help="embeddings for the query after a restart")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folders = (Path(temporary) / str(number) for number in itertools.count())
        held = {}
        for size in sizes:
            rounds = arguments.rounds or max(10, min(200, 10**6 // size))
            held[size] = await measured(size, arguments.length, rounds, next(folders))
        restarted = await from_nvme(arguments.nvme, arguments.length, next(folders))
    cpu = {size: result["query_cpu"]["p50_ms"] for size, result in held.items()}
    values = {
        "query_10000_cpu_p50_ms": cpu.get(10_000),
        "turn_cpu_ms": max(each / -(-size // TURN) for size, each in cpu.items()),
    }
    report = {
        "length": arguments.length,
        "held": {str(size): result for size, result in held.items()},
        "from_nvme": restarted,
        "bars": plain(at_most(name, value, BARS[name]) for name, value in values.items() if value is not None),
    }
    machine = {"python": platform.python_version(), "machine": platform.platform(), "numpy": np.__version__}
    RESULTS.write_text(json.dumps({"machine": machine, **report}, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if all(bar["ok"] for bar in report["bars"]) else 1


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
