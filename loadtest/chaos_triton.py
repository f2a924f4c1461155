"""Inferences by reference while Triton is killed every few seconds: no wrong answer, every failure typed, no pin left.

Several clients ask both doors for studies whose answers are known. Triton is killed with SIGKILL at random, started
again at once, and now and then told from behind to forget every region. At the end nothing may be pinned or in
quarantine.

    python -m loadtest.chaos_triton [--infers 10000] [--kills N] [--every S] [--clients N] [--seed N] [--no-results]

Progress goes to stderr; the last line on stdout is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from cache.dicom.phantom import write_series
from serving.demo.tritonserver import MODELS, TritonServer
from voxcache_client import Client

from . import servers
from .figures import at_least, at_most, metric, plain, say
from .scenario import on_signal

RESULTS: Final = Path(__file__).resolve().parent / "results" / "chaos_triton.json"
STUDIES: Final = 6
#: What an answer may be besides right: HTTP's and gRPC's word for a Triton that is down, or broke off.
TYPED: Final = {"503", "StatusCode.UNAVAILABLE"}
RECIPE: Final = """
[recipes.real]
version = 1
ops = [{ op = "volume" }, { op = "cast", dtype = "float32" }]
"""
#: What is back at zero when all is over.
HELD: Final = ("voxcache_triton_calls", "voxcache_triton_quarantined", "voxcache_inferences_waiting", "voxcache_leases")


class Question(NamedTuple):
    """A study by reference, and the mean of its voxels."""

    reference: str
    mean: float


class Tally:
    """What became of the inferences."""

    def __init__(self, wanted: int, kills: int) -> None:
        self.left = wanted
        self.least_kills = kills
        self.right = 0
        self.wrong = 0
        self.failed: Counter[str] = Counter()
        self.untyped: list[str] = []
        self.kills = 0

    def take(self) -> bool:
        """Whether there is one more to ask: until all have been, and Triton was killed often enough."""
        self.left -= 1
        return self.left >= 0 or self.kills < self.least_kills


async def ask(client: Any, module: Any, question: Question, tally: Tally) -> None:
    """One inference, and what became of it."""
    given = module.InferInput("REFERENCE", [1], "BYTES")
    given.set_data_from_numpy(np.array([question.reference.encode()], object))
    try:
        answer = await client.infer("measure.ref", [given])
    except InferenceServerException as error:
        tally.failed[str(error.status())] += 1
        if str(error.status()) not in TYPED:
            tally.untyped.append(str(error))
        await asyncio.sleep(0.02)  # as a client does that was told to retry
        return
    if answer.as_numpy("MEAN")[0] == question.mean:
        tally.right += 1
    else:
        tally.wrong += 1


async def keep_asking(door: str, address: str, questions: list[Question], tally: Tally, dice: random.Random) -> None:
    module: Any = tritonclient.http.aio if door == "http" else tritonclient.grpc.aio
    inputs: Any = tritonclient.http if door == "http" else tritonclient.grpc
    async with module.InferenceServerClient(address) as client:
        while tally.take():
            await ask(client, inputs, dice.choice(questions), tally)


async def keep_killing(triton: TritonServer, every_s: float, dice: random.Random, tally: Tally) -> None:
    """Kill it, start it; between two deaths, have it forget every region."""
    while True:
        await asyncio.sleep(every_s * dice.uniform(0.3, 0.7))
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with aiohttp.ClientSession() as session:
                (await session.post(f"{triton.url}/v2/systemsharedmemory/unregister")).close()
        await asyncio.sleep(every_s * dice.uniform(0.3, 0.7))
        await asyncio.to_thread(triton.kill)
        began = time.monotonic()
        await asyncio.to_thread(triton.start)
        tally.kills += 1
        say(f"  killed {tally.kills} times; it was away for {time.monotonic() - began:.1f} s")


def known(client: Client, origin: Path) -> list[Question]:
    """Studies, and what the model has to say of them."""
    questions = []
    for number in range(STUDIES):
        study, series, _ = write_series(origin, slices=4 + number, rows=48, columns=40, seed=number)
        with client.tensor(study, series, "real") as tensor:
            mean = float(np.asarray(tensor.array).mean(dtype=np.float64))
        questions.append(Question(f"{study}/{series}/real", mean))
    return questions


async def storm(addresses: dict[str, str], triton: TritonServer, questions: list[Question], options: Any) -> Tally:
    """All the inferences, while Triton is killed; it runs at the end."""
    tally = Tally(options.infers, options.kills)
    killing = asyncio.create_task(
        keep_killing(triton, options.every, random.Random(options.seed), tally)  # noqa: S311 - no secret
    )
    doors = list(addresses.items())
    asking = [
        keep_asking(*doors[number % 2], questions, tally, random.Random(options.seed + number))  # noqa: S311 - no secret
        for number in range(options.clients)
    ]
    await asyncio.gather(*asking)
    killing.cancel()
    await asyncio.gather(killing, return_exceptions=True)
    return tally


async def settled(url: str) -> dict[str, float]:
    """What is still held, once nothing is, or after ten seconds."""
    async with aiohttp.ClientSession() as session:
        for _ in range(100):
            async with session.get(f"{url}/metrics") as answer:
                text = await answer.text()
            held = {name: metric(text, name) for name in HELD}
            if not any(held.values()):
                break
            await asyncio.sleep(0.1)
    return held


def main() -> int:
    signal.signal(signal.SIGTERM, on_signal)
    parser = argparse.ArgumentParser(prog="chaos_triton", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--infers", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=3, help="go on until Triton was killed so often")
    parser.add_argument("--no-results", action="store_true", help="keep nothing in loadtest/results")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two deaths of Triton, about")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="voxcache-chaos-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        triton = stack.enter_context(TritonServer(folder / "triton.log", [MODELS]))
        port = servers.free_port()
        url = stack.enter_context(
            servers.daemon(
                folder,
                folder / "origin",
                ram=64 << 20,
                nvme=512 << 20,
                extra=RECIPE,
                triton=f'url = "{triton.url}"\ngrpc = "{triton.grpc_url}"',
                grpc_port=port,
            )
        )
        with Client(url) as client:
            questions = known(client, folder / "origin")
        addresses = {"http": url.removeprefix("http://"), "grpc": f"127.0.0.1:{port}"}
        tally = asyncio.run(storm(addresses, triton, questions, options))
        held = asyncio.run(settled(url))
    bars = [
        at_most("wrong_answers", tally.wrong, 0),
        at_most("untyped_failures", len(tally.untyped), 0),
        at_most("held_at_the_end", sum(map(abs, held.values())), 0),
        at_least("kills", tally.kills, options.kills),
        at_least("right_answers", tally.right, 1),
    ]
    result = {
        "benchmark": "chaos_triton",
        "infers": tally.right + tally.wrong + tally.failed.total(),
        "right": tally.right,
        "failed": dict(tally.failed),
        "untyped": tally.untyped[:10],
        "held": held,
        "bars": plain(bars),
    }
    if not options.no_results:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)
    return 0 if all(bar.ok for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
