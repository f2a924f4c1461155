"""Kept answers at both doors, before a real Triton: what is said again is what it said, and it is not asked again."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from cache.keys import SeriesRef
from serving.demo.tritonserver import MODELS, TritonServer, free_ports
from serving.models import repeats
from tests.daemon import Bucket, Daemon

service = pytest.mark.service

_SEEDS = itertools.count(100)  # each makes another study

RECIPES = {"tensor": {"version": 1, "ops": [{"op": "volume"}, {"op": "cast", "dtype": "float32"}]}}
KEPT = {"recipe": "tensor", "results": True}


class Front:
    """A daemon that keeps the answers of ``embed``, and its clients."""

    def __init__(self, server: TritonServer, folder: Path, bucket: Bucket, **more: Any) -> None:
        [port] = free_ports(1)
        triton = {"url": server.url, "grpc": server.grpc_url, "identify_s": 0.1, "models": {"embed": KEPT}}
        table = {"origin": bucket.origin, "recipes": RECIPES, "grpc": {"port": port}, "triton": triton | more}
        self.server = server
        self.daemon = Daemon(folder, table)
        self.grpc_url = f"127.0.0.1:{port}"

    def http(self, ref: SeriesRef, **how: Any) -> Any:
        with tritonclient.http.InferenceServerClient(self.daemon.url.removeprefix("http://")) as client:
            return client.infer("embed.ref", [_reference(tritonclient.http, ref)], **how)

    def grpc(self, ref: SeriesRef, **how: Any) -> Any:
        with tritonclient.grpc.InferenceServerClient(self.grpc_url) as client:
            return client.infer("embed.ref", [_reference(tritonclient.grpc, ref)], **how)

    def ran(self) -> int:
        """How often Triton has run the model."""
        with tritonclient.http.InferenceServerClient(self.server.url.removeprefix("http://")) as client:
            [told] = client.get_inference_statistics("embed")["model_stats"]
            return int(told["inference_stats"]["success"]["count"])

    def until_ran(self, times: int) -> None:
        """Return once Triton has counted so many runs, which it does after it has answered."""
        while self.ran() < times:
            assert self.daemon.pid

    def lookups(self) -> list[float]:
        """How often an answer was looked for and found, and looked for in vain."""
        return [self.daemon.metric("voxcache_results_total", outcome=outcome) for outcome in ("hit", "miss")]

    def results(self, ref: SeriesRef) -> list[str]:
        entries = self.daemon.ask("GET", f"/v1/studies/{ref.study}").json["entries"]
        return [e["etag"] for e in entries if (e["kind"], e["tier"]) == ("result", "ram")]

    def until_kept(self, ref: SeriesRef, count: int) -> None:
        while len(self.results(ref)) < count:
            assert self.daemon.pid


def _reference(module: Any, ref: SeriesRef) -> Any:
    given = module.InferInput("REFERENCE", [1], "BYTES")
    given.set_data_from_numpy(np.array([f"{ref.study}/{ref.series}".encode()], object))
    return given


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    return Bucket(tmp_path_factory.mktemp("answers") / "bucket")


@pytest.fixture
def ref(bucket: Bucket) -> SeriesRef:
    return bucket.series(slices=4, rows=32, columns=32, seed=next(_SEEDS))


@pytest.fixture(scope="module")
def front(triton: TritonServer, bucket: Bucket) -> Iterator[Front]:
    """One daemon for all: each test has a series of its own."""
    front = Front(triton, bucket.path.parent, bucket)
    with front.daemon:
        yield front


@service
@pytest.mark.parametrize("door", ["http", "grpc"])
def test_an_answer_is_said_again(front: Front, ref: SeriesRef, door: str) -> None:
    """Bit for bit, under the request's own id, and Triton does not run; other outputs are another question."""
    ask = getattr(front, door)
    before, lookups = front.ran(), front.lookups()
    first = ask(ref, request_id="one")
    front.until_ran(before + 1)
    front.until_kept(ref, 1)
    again = ask(ref, request_id="two", priority=3, timeout=10_000_000)
    assert front.ran() == before + 1
    assert np.array_equal(again.as_numpy("EMBEDDING"), first.as_numpy("EMBEDDING"))
    told = [one if isinstance(one, dict) else _told(one) for one in (first.get_response(), again.get_response())]
    assert [one.pop("id") for one in told] == ["one", "two"]
    assert told[0] == told[1]
    assert told[0]["model_name"] == "embed.ref"
    module = getattr(tritonclient, door)
    some = ask(ref, outputs=[module.InferRequestedOutput("EMBEDDING")])
    assert np.array_equal(some.as_numpy("EMBEDDING"), first.as_numpy("EMBEDDING"))
    front.until_ran(before + 2)
    assert front.ran() == before + 2
    assert [now - then for now, then in zip(front.lookups(), lookups, strict=True)] == [1, 2]


def _told(answer: Any) -> dict[str, Any]:
    outputs = [(each.name, each.datatype, list(each.shape)) for each in answer.outputs]
    return {"model_name": answer.model_name, "model_version": answer.model_version, "id": answer.id, "outputs": outputs}


@service
def test_a_kept_answer_says_so(front: Front, ref: SeriesRef) -> None:
    """Which entry it is, and which tier had it, in plain JSON; its lineage names model and tensor."""
    body = {"inputs": [{"name": "REFERENCE", "datatype": "BYTES", "shape": [1], "data": [f"{ref.study}/{ref.series}"]}]}
    first = front.daemon.ask("POST", "/v2/models/embed.ref/infer", body)
    front.until_kept(ref, 1)
    again = front.daemon.ask("POST", "/v2/models/embed.ref/infer", body | {"id": "mine"})
    assert "Voxcache-Result" not in first.headers
    assert again.headers["Voxcache-Result"] == front.results(ref)[0]
    assert again.headers["Voxcache-Tier"] == "ram"
    assert again.json == first.json | {"id": "mine"}
    told = front.daemon.ask("GET", f"/v1/studies/{ref.study}/lineage?etag={again.headers['Voxcache-Result']}").json
    lineage = told["entries"][0]["entry"]["lineage"]
    assert (lineage["model"]["name"], lineage["model"]["version"]) == ("embed", "1")


@service
def test_errors_and_other_models_are_not_kept(front: Front, ref: SeriesRef) -> None:
    """What failed is tried again, and a model that nobody has set to keeps nothing."""
    reference = {"name": "REFERENCE", "datatype": "BYTES", "shape": [1], "data": [f"{ref.study}/{ref.series}/tensor"]}
    wrong = {"inputs": [reference], "outputs": [{"name": "NONE"}]}
    for _ in range(2):
        assert front.daemon.ask("POST", "/v2/models/embed.ref/infer", wrong).status == 400
    for _ in range(2):
        assert front.daemon.ask("POST", "/v2/models/measure.ref/infer", {"inputs": [reference]}).status == 200
    front.http(ref)
    front.until_kept(ref, 1)
    assert len(front.results(ref)) == 1


@service
@pytest.mark.slow
def test_a_model_that_is_loaded_anew_answers_anew(tmp_path: Path, bucket: Bucket, ref: SeriesRef) -> None:
    """Loaded through the daemon, with other weights under the same version and configuration."""
    models = tmp_path / "models"
    shutil.copytree(MODELS / "embed", models / "embed")
    more = ("--model-control-mode=explicit", "--load-model=embed")
    with TritonServer(tmp_path / "triton.log", [models], more=more) as server:
        front = Front(server, tmp_path, bucket, model_control=True)
        with front.daemon:
            old = front.http(ref).as_numpy("EMBEDDING")
            front.until_kept(ref, 1)
            code = models / "embed" / "1" / "model.py"
            code.write_text(code.read_text().replace("RandomState(20240229)", "RandomState(1)"))
            assert front.daemon.ask("POST", "/v2/repository/models/embed/load", {}).status == 200
            new = front.http(ref).as_numpy("EMBEDDING")
            assert not np.array_equal(new, old)
            while len(front.results(ref)) != 1:
                assert front.daemon.pid
            assert np.array_equal(front.http(ref).as_numpy("EMBEDDING"), new)


@pytest.mark.parametrize(
    ("config", "same"),
    [
        ({}, True),
        ({"model_transaction_policy": {"decoupled": False}}, True),
        ({"model_transaction_policy": {"decoupled": True}}, False),
        ({"sequence_batching": {"max_sequence_idle_microseconds": 5}}, False),
    ],
)
def test_which_models_repeat_themselves(config: dict[str, Any], same: bool) -> None:
    """Not those whose requests belong together, nor those with several answers to one."""
    assert repeats(config) is same
