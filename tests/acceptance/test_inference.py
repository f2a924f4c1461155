"""The daemon itself before a real Triton: references over gRPC, perf_analyzer, and a Triton that is killed."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from cache.keys import SeriesRef
from serving.demo.tritonserver import TritonServer
from tests.conftest import ROOT
from tests.daemon import Bucket, Daemon
from tests.services import free_port

pytestmark = [pytest.mark.service, pytest.mark.slow]

REAL = {"version": 1, "ops": [{"op": "volume"}, {"op": "cast", "dtype": "float32"}]}
RAW = {"version": 1, "ops": [{"op": "volume"}]}


class Served:
    """A daemon, its origin, and the address of its gRPC door."""

    def __init__(self, daemon: Daemon, bucket: Bucket, grpc: str, triton: TritonServer) -> None:
        self.daemon = daemon
        self.bucket = bucket
        self.http = daemon.url.removeprefix("http://")
        self.grpc = grpc
        self.triton = triton


@pytest.fixture
def served(tmp_path: Path, bucket: Bucket, triton: TritonServer) -> Iterator[Served]:
    port = free_port()
    table = {
        "origin": bucket.origin,
        "grpc": {"port": port},
        "triton": {
            "url": triton.url,
            "grpc": triton.grpc_url,
            "models": {"embed": {"recipe": "real"}, "scale": {"recipe": "raw", "input": "SCAN"}},
        },
        "recipes": {"real": REAL, "raw": RAW},
    }
    with Daemon(tmp_path, table) as daemon:
        yield Served(daemon, bucket, f"127.0.0.1:{port}", triton)


def text(client: Any, name: str, *references: str) -> Any:
    given = client.InferInput(name, [len(references)], "BYTES")
    given.set_data_from_numpy(np.array([each.encode() for each in references], object))
    return given


def array(served: Served, ref: SeriesRef, recipe: str) -> Any:
    answer = served.daemon.tensor(ref, recipe)
    spec = json.loads(answer.headers["Voxcache-Spec"])
    return np.frombuffer(answer.body, spec["dtype"]).reshape(spec["shape"])


@pytest.mark.parametrize("client", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def test_references_over_the_whole_walk(served: Served, client: Any) -> None:
    """A first request fills, a second hits; frames, a version and a batch are those of the tensors."""
    one, two = (served.bucket.series(slices=6, rows=32, columns=32) for _ in range(2))
    name = f"{one.study}/{one.series}"
    with client.InferenceServerClient(served.http if client is tritonclient.http else served.grpc) as c:

        def embedded(reference: str) -> bytes:
            answer = c.infer("embed.ref", [text(client, "REFERENCE", reference)])
            return bytes(answer.as_numpy("EMBEDDING").tobytes())

        def direct(volume: Any) -> bytes:
            given = client.InferInput("VOLUME", list(volume.shape), "FP32")
            given.set_data_from_numpy(volume)
            return bytes(c.infer("embed", [given]).as_numpy("EMBEDDING").tobytes())

        assert embedded(name) == embedded(name)
        volume = array(served, one, "real")
        assert embedded(name) == direct(volume)
        assert embedded(f"{name}/real?frames=1-4") == direct(volume[1:5])

        [entry] = [
            each["entry"]
            for each in served.daemon.ask("GET", f"/v1/studies/{one.study}/lineage").json["entries"]
            if each["entry"]["lineage"]["recipe_name"] == "real"
        ]
        version = entry["key"]["source_version"]
        assert embedded(f"{name}?version={version}") == direct(volume)
        with pytest.raises(client.InferenceServerException, match="no version"):
            embedded(f"{name}?version={'0' * 32}")

        scale = client.InferInput("SCALE", [2, 1], "FP32")
        scale.set_data_from_numpy(np.array([[1], [2]], np.float32))
        both = text(client, "REFERENCE", f"{two.study}/{two.series}", name)
        scaled = c.infer("scale.ref", [both, scale]).as_numpy("SCALED")
        assert np.array_equal(scaled[0], array(served, two, "raw").astype(np.float32))
        assert np.array_equal(scaled[1], array(served, one, "raw").astype(np.float32) * 2)
    assert served.daemon.metric("voxcache_triton_calls") == 0


PERF = ROOT / ".services" / "perf" / "perf_analyzer"


def perf(*arguments: str) -> str:
    """What perf_analyzer says, run for a short while."""
    window = ("--measurement-interval", "500", "--stability-percentage", "999", "--max-trials", "10")
    done = subprocess.run([PERF, *window, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def perf_analyzer() -> None:
    subprocess.run([ROOT / "deploy" / "services" / "perf-analyzer", "install"], check=True)


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_perf_analyzer_as_it_is(served: Served, tmp_path: Path, door: str) -> None:
    """Twenty studies by reference, streamed too; then shared memory on the plain model, and references still work."""
    refs = [served.bucket.series(slices=2, rows=16, columns=16) for _ in range(20)]
    given = tmp_path / "references.json"
    data = [{"REFERENCE": {"content": [f"{ref.study}/{ref.series}/real"], "shape": [1]}} for ref in refs]
    given.write_text(json.dumps({"data": data}))
    address = ("-u", served.http if door == "http" else served.grpc, "-i", door)
    named = ("-m", "embed.ref", "--input-data", str(given))
    shared = (
        "-m",
        "embed",
        "--shared-memory",
        "system",
        "--shape",
        "VOLUME:2,16,16",
        "--output-shared-memory-size",
        "256",
    )
    runs = [named, (*named, "--concurrency-range", "4"), shared, named]
    if door == "grpc":
        runs.insert(1, (*named, "--streaming"))
    for arguments in runs:
        told = perf(*address, *arguments)
        assert float(re.findall(r"Throughput: ([0-9.]+) infer/sec", told)[0]) > 0
    assert served.daemon.metric("voxcache_triton_calls") == 0
    study = served.daemon.ask("GET", f"/v1/studies/{refs[-1].study}").json
    assert {each["tier"] for each in study["entries"]} >= {"ram"}


def test_inferences_survive_the_death_of_triton() -> None:
    """No wrong answer, every failure typed, nothing held at the end (`make chaos-triton`, shorter)."""
    command = [sys.executable, "-m", "loadtest.chaos_triton", "--infers", "300", "--kills", "2", "--every", "1"]
    done = subprocess.run([*command, "--no-results"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
