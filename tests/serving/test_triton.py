"""What is decided about Triton without asking it; what a real one does is in test_kserve.py."""

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tritonclient.utils import np_to_triton_dtype

from cache.entry import DType, TensorSpec
from cache.errors import BadRequest, TritonDown
from cache.interfaces import NullObserver
from serving.demo.tritonserver import TritonServer, TritonServerError
from serving.triton import (
    DATATYPES,
    ModelMetadata,
    TensorMetadata,
    Triton,
    TritonSettings,
    VirtualModel,
    fitted,
    model_path,
    passed_on,
    tensor_input,
)

AFFINE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def spec(dtype: DType, *shape: int) -> TensorSpec:
    return TensorSpec(dtype, shape, "zyx", (1.0, 1.0, 1.0), AFFINE)


def model(*inputs: tuple[str, str]) -> ModelMetadata:
    return ModelMetadata("m", inputs=tuple(TensorMetadata(name, kind, (-1,)) for name, kind in inputs))


async def nowhere(url: str = "http://127.0.0.1:1") -> Triton:
    return await Triton.open(TritonSettings(url), "/arena", 4096, NullObserver())


# ---------------------------------------------------------------------- shapes and inputs


@pytest.mark.parametrize(
    ("wanted", "shape"),
    [
        ((-1, -1, -1), (4, 5, 6)),
        ((-1, 1, -1, -1, -1), (1, 1, 4, 5, 6)),
        ((1, 4, 5, 6), (1, 4, 5, 6)),
    ],
)
def test_leading_ones_make_up_the_rank(wanted: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """A volume fits an input of a higher rank with 1s in front."""
    assert fitted(spec("float32", 4, 5, 6), TensorMetadata("V", "FP32", wanted)) == shape


@pytest.mark.parametrize(
    ("wanted", "advice"),
    [
        (TensorMetadata("V", "INT16", (-1, -1, -1)), "cast"),
        (TensorMetadata("V", "FP32", (-1, -1)), "2 dimensions"),
        (TensorMetadata("V", "FP32", (-1, 8, -1)), "crop_pad"),
        (TensorMetadata("V", "FP32", (2, -1, -1, -1)), "crop_pad"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_with_advice(wanted: TensorMetadata, advice: str) -> None:
    """A wrong dtype, rank or size is the caller's to change, and the message says how."""
    with pytest.raises(BadRequest, match=advice):
        fitted(spec("float32", 4, 5, 6), wanted)


def test_an_embedding_fits_as_any_tensor_does() -> None:
    """That it lies nowhere in a patient is nothing to a model."""
    embedding = TensorSpec("float32", (64,), "", None, None)
    assert fitted(embedding, TensorMetadata("E", "FP32", (-1, 64))) == (1, 64)


def test_every_dtype_has_a_kserve_name() -> None:
    """Whatever a recipe can make, Triton can be told."""
    assert set(DATATYPES) == set(DType.__args__)  # type: ignore[attr-defined]  # what a Literal keeps its values in


def test_kserve_names_are_triton_clients_own() -> None:
    """Element types are called as the reference client calls them."""
    assert {name: np_to_triton_dtype(np.dtype(name)) for name in DATATYPES} == DATATYPES


def test_the_only_input_that_is_no_text_takes_the_tensor() -> None:
    """A model with one numeric input needs no configuration."""
    assert tensor_input(model(("NOTE", "BYTES"), ("V", "FP32")), VirtualModel()).name == "V"


def test_a_configured_input_takes_the_tensor() -> None:
    """With several numeric inputs, the configuration decides."""
    assert tensor_input(model(("A", "FP32"), ("B", "FP32")), VirtualModel(input="B")).name == "B"


@pytest.mark.parametrize(
    ("metadata", "virtual"),
    [
        (model(("A", "FP32"), ("B", "FP32")), VirtualModel()),
        (model(("A", "BYTES")), VirtualModel()),
        (model(("A", "FP32")), VirtualModel(input="B")),
    ],
)
def test_an_unclear_input_is_not_guessed(metadata: ModelMetadata, virtual: VirtualModel) -> None:
    """Where several inputs could be meant, or none, the answer says which setting to make."""
    with pytest.raises(BadRequest, match=r"triton\.models\.m\.input"):
        tensor_input(metadata, virtual)


# ---------------------------------------------------------------------- names and headers


def test_names_in_paths_are_quoted() -> None:
    """A model's name cannot reach another part of Triton's API."""
    assert model_path("../logging?x", "1", "infer") == "/v2/models/..%2Flogging%3Fx/versions/1/infer"


def test_credentials_and_connection_headers_stay_here() -> None:
    """Triton gets the headers that are for it, no token of ours, and traces from whoever takes them."""
    sent = {"Authorization": "Bearer x", "Cookie": "y", "Host": "h", "Accept-Encoding": "gzip", "traceparent": "t"}
    assert dict(passed_on(sent | {"X-Request-Id": "7"})) == {"X-Request-Id": "7"}


def test_unknown_settings_are_refused() -> None:
    """A misspelt setting does not pass for a default."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"models": {"m": {"recipes": "ct"}}}, TritonSettings)


async def test_each_start_has_a_region_of_its_own_that_nothing_shows() -> None:
    """A region's name is never used twice, and no repr tells it."""
    first, second = await nowhere(), await nowhere()
    assert first.arena.region != second.arena.region
    assert first.arena.region not in repr(first)
    assert first.is_arena(first.arena.region)
    assert not first.is_arena(second.arena.region)
    await first.close()
    await second.close()


async def test_the_arena_is_known_by_any_spelling_of_its_key() -> None:
    """POSIX drops leading slashes of a shared-memory name, and so do we."""
    here = await nowhere()
    assert all(here.is_arena(key=key) for key in ("/arena", "arena", "//arena"))
    assert not here.is_arena(key="/arena2")
    await here.close()


# ---------------------------------------------------------------------- calls that outlive their callers


class Call:
    """An upstream call that ends when told to, and what became of it."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.discarded = asyncio.Event()
        self.told: list[str] = []

    async def run(self) -> str:
        self.begun.set()
        await self.go.wait()
        self.told.append("ended")
        return "answer"

    def release(self) -> None:
        self.told.append("released")

    def discard(self, late: str) -> None:
        self.told.append(f"discarded {late}")
        self.discarded.set()


async def test_the_pin_outlives_a_caller_who_leaves() -> None:
    """Triton may still read after its client has gone: the pin goes when the call ends, and its answer is dropped."""
    here = await nowhere()
    call = Call()
    caller = asyncio.create_task(here.servers[0].held(call.run(), call.release, call.discard))
    await call.begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert call.told == []
    call.go.set()
    await call.discarded.wait()
    assert call.told == ["ended", "released", "discarded answer"]
    await here.close()


async def test_a_caller_who_stays_gets_the_answer_and_the_pin_goes() -> None:
    """One call, one release."""
    here = await nowhere()
    call = Call()
    call.go.set()
    assert await here.servers[0].held(call.run(), call.release, call.discard) == "answer"
    assert call.told == ["ended", "released"]
    await here.close()


async def test_closing_ends_calls_and_pins() -> None:
    """Nothing is left pinned by a daemon that ends."""
    here = await nowhere()
    call = Call()
    caller = asyncio.create_task(here.servers[0].held(call.run(), call.release, call.discard))
    await call.begun.wait()
    await here.close()
    assert call.told == ["released"]
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_without_triton_every_call_says_so() -> None:
    """An empty URL means that there is none: readiness says no, calls fail with a type of their own."""
    here = await nowhere("")
    assert not await here.ready()
    with pytest.raises(TritonDown, match=r"triton\.url"):
        await here.metadata("m")
    await here.close()


# ---------------------------------------------------------------------- the server of the demo and the tests


def test_a_server_that_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    """The message names the command."""
    with pytest.raises(TritonServerError, match="deploy/services/triton install"):
        TritonServer(tmp_path / "log", home=tmp_path).start()


@pytest.mark.service
def test_a_server_that_does_not_start_leaves_its_reason_and_nothing_else(triton: TritonServer, tmp_path: Path) -> None:
    """A broken model ends the start with the server's own words; no process and no shared memory stay behind."""
    broken = tmp_path / "models" / "broken"
    (broken / "1").mkdir(parents=True)
    (broken / "config.pbtxt").write_text('name: "broken" backend: "python"')
    (broken / "1" / "model.py").write_text("raise RuntimeError('no model today')")
    shared = set(Path("/dev/shm").glob("voxcache-triton-*"))
    server = TritonServer(tmp_path / "log", [tmp_path / "models"])
    with pytest.raises(TritonServerError, match="no model today"):
        server.start()
    assert not server.running
    assert set(Path("/dev/shm").glob("voxcache-triton-*")) == shared
