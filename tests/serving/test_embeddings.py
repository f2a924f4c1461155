"""Embeddings, made by a real Triton: named after the model that made them, and served like any other entry."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import tritonclient.http

from cache.errors import BadRequest, TritonRefused
from cache.keys import SeriesRef
from cache.recipe.chain import Infer
from serving.demo.tritonserver import MODELS, TritonServer
from serving.models import embedding
from tests.daemon import Answer, Bucket, Daemon
from voxcache_client import Client

service = pytest.mark.service

_SEEDS = itertools.count(100)  # each makes another study

_TENSOR = [{"op": "volume"}, {"op": "cast", "dtype": "float32"}]
_INFER = {"op": "infer", "model": "embed", "output": "EMBEDDING"}
RECIPES = {
    "tensor": {"version": 1, "ops": _TENSOR},
    "vector": {"version": 1, "ops": [*_TENSOR, _INFER]},
    "unfit": {"version": 1, "ops": [{"op": "volume"}, _INFER]},
    "unnamed": {"version": 1, "ops": [*_TENSOR, {**_INFER, "output": "NONE"}]},
    "unserved": {"version": 1, "ops": [*_TENSOR, {**_INFER, "model": "nobody"}]},
    "unkept": {"version": 1, "ops": [*_TENSOR, {"op": "infer", "model": "measure", "output": "VOXELS"}]},
}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    return Bucket(tmp_path_factory.mktemp("embeddings") / "bucket")


@pytest.fixture
def ref(bucket: Bucket) -> SeriesRef:
    return bucket.series(slices=6, rows=48, columns=40, seed=next(_SEEDS))


def before(server: TritonServer, bucket: Bucket, folder: Path, **more: Any) -> Daemon:
    """A daemon in front of ``server``."""
    triton = {"url": server.url, "identify_s": 0.1}
    return Daemon(folder, {"origin": bucket.origin, "recipes": RECIPES, "triton": triton, **more})


@pytest.fixture(scope="module")
def daemon(triton: TritonServer, bucket: Bucket) -> Iterator[Daemon]:
    """One daemon for all: each test has a series of its own."""
    with before(triton, bucket, bucket.path.parent) as process:
        yield process


@pytest.fixture
def own(tmp_path: Path) -> Iterator[TritonServer]:
    """A server with the model ``embed`` that a test may stop, change and start."""
    shutil.copytree(MODELS / "embed", tmp_path / "models" / "embed")
    with TritonServer(tmp_path / "triton.log", [tmp_path / "models"]) as server:
        yield server


def direct(server: TritonServer, tensor: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """What Triton answers to the tensor's bytes."""
    with tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        given = tritonclient.http.InferInput("VOLUME", list(tensor.shape), "FP32")
        given.set_data_from_numpy(tensor)
        found: npt.NDArray[Any] = client.infer("embed", [given]).as_numpy("EMBEDDING")
        return found


def held(daemon: Daemon, ref: SeriesRef) -> list[tuple[str, str, str]]:
    entries = daemon.ask("GET", f"/v1/studies/{ref.study}").json["entries"]
    return sorted((e["tier"], e["kind"], e["recipe"]) for e in entries)


# ---------------------------------------------------------------------- reading an answer, without Triton

ASKED = Infer("m", "E")


def answer(*outputs: dict[str, Any], data: bytes = b"") -> tuple[bytes, int]:
    head = json.dumps({"model_name": "m", "model_version": "1", "outputs": outputs}).encode()
    return head + data, len(head)


def test_an_answer_is_read_as_it_is_described() -> None:
    """Element type and shape are what the model says they are."""
    output = {"name": "E", "datatype": "FP16", "shape": [1, 3], "parameters": {"binary_data_size": 6}}
    found = embedding(*answer(output, data=b"abcdef"), ASKED)
    assert (found.spec.dtype, found.spec.shape, found.data) == ("float16", (1, 3), b"abcdef")


@pytest.mark.parametrize(
    ("outputs", "data", "error"),
    [
        ([], b"", TritonRefused),
        ([{"name": "E", "datatype": "FP32", "shape": [1]}] * 2, b"abcd", TritonRefused),
        ([{"name": "X", "datatype": "FP32", "shape": [1]}], b"abcd", TritonRefused),
        ([{"name": "E", "datatype": "FP32", "shape": [2]}], b"abcd", TritonRefused),
        ([{"name": "E", "datatype": "FP32", "shape": [0]}], b"", BadRequest),
        ([{"name": "E", "datatype": "BYTES", "shape": [1]}], b"\0\0\0\0", BadRequest),
    ],
)
def test_an_answer_that_is_no_embedding_is_refused(
    outputs: list[dict[str, Any]], data: bytes, error: type[Exception]
) -> None:
    """Nothing is guessed from an answer to another question, and what no entry holds is said to be so."""
    with pytest.raises(error):
        embedding(*answer(*outputs, data=data), ASKED)
    with pytest.raises(TritonRefused):
        embedding(b"no json", 7, ASKED)


# ---------------------------------------------------------------------- served


@service
def test_an_embedding_is_what_triton_says_of_the_tensor(daemon: Daemon, triton: TritonServer, ref: SeriesRef) -> None:
    """Made once, bit for bit Triton's own answer, in every representation and by lease; its tensor is there too."""
    made = daemon.tensor(ref, "vector")
    assert made.headers["Voxcache-Tier"] == "origin"
    assert made.headers["Voxcache-Model"].startswith("embed/1/")
    assert {part.split(";")[0] for part in made.headers["Server-Timing"].split(", ")} >= {"decode", "triton"}
    spec = json.loads(made.headers["Voxcache-Spec"])
    assert (spec["dtype"], spec["shape"], spec["spacing"], spec["affine"]) == ("float32", [64], None, None)
    tensor = daemon.tensor(ref, "tensor")
    assert tensor.headers["Voxcache-Tier"] == "ram"
    shape = json.loads(tensor.headers["Voxcache-Spec"])["shape"]
    expected = direct(triton, np.frombuffer(tensor.body, np.float32).reshape(shape))
    assert made.body == expected.tobytes()
    st = daemon.tensor(ref, "vector", Accept="application/vnd.safetensors")
    assert st.headers["Voxcache-Tier"] == "ram"
    assert np.array_equal(safetensors.numpy.load(st.body)["tensor"], expected)
    with Client(daemon.url) as client, client.tensor(ref.study, ref.series, "vector") as leased:
        assert leased.local
        assert np.array_equal(leased.array, expected)
        assert leased.axes == ""
        with pytest.raises(ValueError, match="nowhere"):
            _ = leased.affine
    (entry,) = daemon.ask("GET", made.headers["Voxcache-Lineage"]).json["entries"]
    lineage = entry["entry"]["lineage"]
    assert (lineage["model"]["name"], lineage["model"]["version"], lineage["modality"]) == ("embed", "1", "CT")
    assert len(entry["manifest"]["objects"]) == 6


@service
def test_a_warm_up_leaves_the_embedding_ready(daemon: Daemon, ref: SeriesRef) -> None:
    """It is in both tiers with its tensor and its pack; nobody had to ask for it first."""
    daemon.ask("POST", "/v1/warm", {"tensors": [f"{ref.study}/{ref.series}/vector"]})
    while len(held(daemon, ref)) < 5:
        assert daemon.pid
    assert held(daemon, ref) == [
        ("nvme", "embedding", "vector"),
        ("nvme", "pack", ""),
        ("nvme", "tensor", "vector"),
        ("ram", "embedding", "vector"),
        ("ram", "tensor", "vector"),
    ]
    assert daemon.tensor(ref, "vector").headers["Voxcache-Tier"] == "ram"


@service
def test_what_cannot_be_is_refused_by_its_reason(daemon: Daemon, ref: SeriesRef) -> None:
    """A tensor the model does not take, outputs that are not there or cannot be kept, a model that nobody serves."""
    unfit = daemon.tensor(ref, "unfit")
    assert (unfit.status, unfit.code) == (400, "bad-request")
    assert "cast op" in unfit.json["detail"]
    unkept = daemon.tensor(ref, "unkept")
    assert (unkept.status, unkept.code) == (400, "bad-request")
    for recipe in ("unnamed", "unserved"):
        refused = daemon.tensor(ref, recipe)
        assert (refused.code, 400 <= refused.status < 500) == ("triton-refused", True)
    entries = daemon.ask("GET", f"/v1/studies/{ref.study}").json["entries"]
    assert {entry["kind"] for entry in entries} <= {"pack", "tensor"}


@service
def test_the_nearest_are_found(daemon: Daemon, bucket: Bucket) -> None:
    """By a reference, whose embedding is made, and by its numbers: the same series in the same order."""
    for study in bucket.path.iterdir():
        daemon.ask("DELETE", f"/v1/studies/{study.name}")
    refs = [bucket.series(slices=4, rows=32, columns=32, seed=n, study_uid=f"1.9.{n}") for n in range(3)]
    vectors = [np.frombuffer(daemon.tensor(ref, "vector").body, np.float32) for ref in refs[:2]]

    def query(**asked: Any) -> Answer:
        return daemon.ask("POST", "/v1/embeddings/query", asked)

    like = f"{refs[2].study}/{refs[2].series}/vector"
    found = query(like=like).json
    vectors.append(np.frombuffer(daemon.tensor(refs[2], "vector").body, np.float32))
    assert (found["searched"], found["model"]["name"]) == (2, "embed")
    cosines = [float(vectors[2].astype(float) @ vectors[n].astype(float)) for n in (0, 1)]
    expected = sorted(zip(cosines, (refs[0].study, refs[1].study), strict=True), reverse=True)
    assert [n["study"] for n in found["neighbours"]] == [study for _, study in expected]
    assert np.allclose([n["score"] for n in found["neighbours"]], [score for score, _ in expected])
    numbers = query(model="embed", vector=vectors[2].tolist(), metric="l2", k=1).json
    assert numbers["searched"] == 3
    (itself,) = numbers["neighbours"]
    assert (itself["study"], itself["series"], itself["score"]) == (refs[2].study, refs[2].series, 0)
    assert itself["etag"] in daemon.tensor(refs[2], "vector").headers["ETag"]
    assert query(like=like, modality="CT").json == found
    assert query(like=like, modality="MR").json["neighbours"] == []
    assert query(like=like, namespace="staging").json["searched"] == 0

    for asked, status, code in (
        ({}, 400, "bad-request"),
        ({"like": like, "vector": [1.0]}, 400, "bad-request"),
        ({"like": f"{refs[0].study}/{refs[0].series}/tensor"}, 400, "bad-request"),
        ({"like": "1.2.3"}, 400, "malformed-reference"),
        ({"vector": [1.0], "model": "stranger"}, 404, "unknown-model"),
        ({"vector": [1.0], "model": "embed", "version": "7"}, 404, "unknown-model"),
        ({"vector": [1.0, 2.0], "model": "embed"}, 400, "bad-request"),
        ({"vector": [1e999], "model": "embed"}, 400, "bad-request"),
        ({"like": like, "k": 1001}, 400, "bad-request"),
        ({"like": like, "metric": "hamming"}, 400, "bad-request"),
        ({"like": like, "namespace": "elsewhere"}, 404, "unknown-namespace"),
    ):
        refused = query(**asked)
        assert (refused.status, refused.code) == (status, code), asked


@service
@pytest.mark.slow
def test_a_changed_model_makes_embeddings_anew(
    own: TritonServer, bucket: Bucket, ref: SeriesRef, tmp_path: Path
) -> None:
    """While Triton is away, what is there is served under the old name; a new configuration replaces it by itself."""
    other = bucket.series(slices=4, rows=32, columns=32, study_uid="1.2.9", series_uid="1.2.9.1")
    with before(own, bucket, tmp_path) as daemon:
        old = daemon.tensor(ref, "vector")
        own.stop()
        assert daemon.tensor(ref, "vector").headers["Voxcache-Model"] == old.headers["Voxcache-Model"]
        missing = daemon.tensor(other, "vector")
        assert (missing.status, missing.code, "Retry-After" in missing.headers) == (503, "triton-down", True)
        daemon.until_written(ref)
        daemon.stop()
        daemon.start()
        assert daemon.tensor(ref, "vector").headers["Voxcache-Model"] == old.headers["Voxcache-Model"]
        config = tmp_path / "models" / "embed" / "config.pbtxt"
        config.write_text(config.read_text() + 'parameters [{ key: "again" value: { string_value: "yes" } }]\n')
        own.start()
        while any(kind == "embedding" for _, kind, _ in held(daemon, ref)):
            assert daemon.pid
        new = daemon.tensor(ref, "vector")
        assert new.headers["Voxcache-Tier"] == "origin"
        assert new.headers["Voxcache-Model"] != old.headers["Voxcache-Model"]
        assert new.headers["ETag"] != old.headers["ETag"]
        assert new.body == old.body, "the model's weights are the same"
        assert daemon.tensor(other, "vector").status == 200
