"""KServe over HTTP in front of a real Triton: unchanged clients, references for tensors, a region nobody can touch."""

import asyncio
import contextlib
import functools
import os
import secrets
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import tritonclient.http as sync_client
import tritonclient.http.aio as aio_client
from tritonclient.utils import InferenceServerException

from serving.api.kserve import MAX_HEAD
from serving.triton import TritonSettings
from tests.serving.doors import (
    NBYTES,
    SERIES,
    STUDY,
    Doors,
    Shelf,
    before,
    by_region,
    fifo,
    gated,
    readable,
    reference,
    tensor,
    volume,
)

service = pytest.mark.service


# ---------------------------------------------------------------------- the answer by reference is the answer by bytes


@service
@pytest.mark.parametrize("binary", [True, False])
async def test_a_reference_gets_the_same_answer_as_the_bytes(front: Doors, binary: bool) -> None:
    """The synchronous client, unchanged: bytes to the model, or a reference to its virtual twin."""
    array = volume(40, 50, 60)
    front.shelf.put("ct", array)
    sent = await front.sync(lambda c: c.infer("embed", [tensor("VOLUME", array, "FP32")]))
    named = await front.sync(
        lambda c: c.infer("embed.ref", [reference(f"voxcache:{STUDY}/{SERIES}/ct", binary=binary)], model_version="1")
    )
    assert named.as_numpy("EMBEDDING").tobytes() == sent.as_numpy("EMBEDDING").tobytes()
    assert np.isclose(np.linalg.norm(sent.as_numpy("EMBEDDING")), 1.0)
    assert named.get_response()["model_name"] == "embed.ref"
    assert sent.get_response()["model_name"] == "embed"


@service
@pytest.mark.parametrize("binary", [True, False])
async def test_the_asynchronous_client_works_as_well(front: Doors, binary: bool) -> None:
    """Both of Triton's HTTP clients, answers as JSON or as binary tensors; measures equal what NumPy says."""
    array = volume(30, 40, 50)
    front.shelf.put("ct", array)
    names = ("VOXELS", "FRACTION", "MEAN", "CENTROID")
    async with aio_client.InferenceServerClient(front.url.removeprefix("http://")) as client:
        outputs = [aio_client.InferRequestedOutput(name, binary_data=binary) for name in names]
        sent = await client.infer("measure", [tensor("VOLUME", array, "FP32", client=aio_client)], outputs=outputs)
        given = [reference(f"{STUDY}/{SERIES}/ct", client=aio_client, binary=binary)]
        named = await client.infer("measure.ref", given, outputs=outputs, request_id='a "model_name":"measure" b')
    for name in names:
        assert named.as_numpy(name).tobytes() == sent.as_numpy(name).tobytes()
    above = array > 300
    assert named.as_numpy("VOXELS")[0] == above.sum()
    assert np.allclose(named.as_numpy("CENTROID"), np.argwhere(above).mean(axis=0))
    assert named.get_response()["model_name"] == "measure.ref"
    assert named.get_response()["id"] == 'a "model_name":"measure" b'


@service
async def test_parameters_and_regions_name_a_study_too(front: Doors) -> None:
    """Request parameters, and a shared-memory region on either name of the model, are references."""
    array = volume(20, 20, 20)
    front.shelf.put("ct", array)
    sent = await front.sync(lambda c: c.infer("embed", [tensor("VOLUME", array, "FP32")]))
    region = f"voxcache:{STUDY}/{SERIES}/ct"
    for ask in (
        lambda c: c.infer("embed.ref", [], parameters={"study": STUDY, "series": SERIES, "recipe": "ct"}),
        lambda c: c.infer("embed.ref", [], parameters={"study": STUDY, "series": SERIES}),
        lambda c: c.infer("embed.ref", [reference(f"{STUDY}/{SERIES}")]),
        lambda c: c.infer("embed", [by_region("VOLUME", region, array)]),
        lambda c: c.infer("embed.ref", [by_region("VOLUME", region, array)]),
    ):
        named = await front.sync(ask)
        assert named.as_numpy("EMBEDDING").tobytes() == sent.as_numpy("EMBEDDING").tobytes()


@service
async def test_other_inputs_pass_and_large_answers_are_whole(front: Doors) -> None:
    """A batch dimension, a channel, inputs on both sides of the reference, and an answer of several megabytes."""
    array = volume(60, 100, 120, dtype="int16")
    front.shelf.put("raw", array)
    note = np.array([["über".encode()]], object)
    given = [
        tensor("NOTE", note, "BYTES"),
        reference(f"{STUDY}/{SERIES}"),
        tensor("SCALE", np.array([[2.5]], np.float32), "FP32"),
    ]
    answer = await front.sync(lambda c: c.infer("blend.ref", given))
    assert np.array_equal(answer.as_numpy("SCALED")[0, 0], array.astype(np.float32) * np.float32(2.5))
    assert answer.as_numpy("NOTE")[0, 0].decode() == "über"


@service
async def test_many_first_requests_at_once_are_all_answered(front: Doors) -> None:
    """Each finds the arena unknown to Triton; whoever registers it second is not refused."""
    front.shelf.put("ct", volume(8, 8, 8))
    async with aio_client.InferenceServerClient(front.url.removeprefix("http://")) as client:
        given = [reference(f"{STUDY}/{SERIES}", client=aio_client)]
        answers = await asyncio.gather(*(client.infer("embed.ref", given) for _ in range(8)))
    assert len({answer.as_numpy("EMBEDDING").tobytes() for answer in answers}) == 1


@service
async def test_large_bodies_pass_both_ways(front: Doors) -> None:
    """A volume sent as bytes goes through, as does one that is compressed on the way."""
    array = volume(60, 100, 120, dtype="int16")
    front.shelf.put("raw", array)
    given = [
        tensor("NOTE", np.array([[b"n"]], object), "BYTES"),
        tensor("SCAN", array[None, None], "INT16"),
        tensor("SCALE", np.array([[1.0]], np.float32), "FP32"),
    ]
    for compression in (None, "gzip"):
        infer = functools.partial(
            sync_client.InferenceServerClient.infer,
            model_name="blend",
            inputs=given,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        answer = await front.sync(infer)
        assert np.array_equal(answer.as_numpy("SCALED")[0, 0], array.astype(np.float32))


@service
async def test_an_answer_says_where_the_tensor_was_and_how_long_it_took(front: Doors) -> None:
    """Voxcache-Tier and Server-Timing are on answers by reference."""
    front.shelf.put("ct", volume(4, 4, 4))
    body = {"inputs": [{"name": "REFERENCE", "shape": [1], "datatype": "BYTES", "data": [f"{STUDY}/{SERIES}"]}]}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{front.url}/v2/models/embed.ref/infer", json=body) as response,
    ):
        assert response.status == 200
        assert response.headers["Voxcache-Tier"] == "ram"
        stages = [entry.split(";")[0] for entry in response.headers["Server-Timing"].split(", ")]
        assert stages == ["turn", "triton"]
        assert len((await response.json())["outputs"][0]["data"]) == 64


# ---------------------------------------------------------------------- what the virtual model says of itself


@service
async def test_the_virtual_model_declares_its_reference(front: Doors) -> None:
    """Metadata, configuration, statistics and readiness are those of a model that takes a reference."""
    metadata = await front.sync(lambda c: c.get_model_metadata("blend.ref"))
    assert metadata["name"] == "blend.ref"
    assert metadata["inputs"] == [
        {"name": "NOTE", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "REFERENCE", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "SCALE", "datatype": "FP32", "shape": [-1, 1]},
    ]
    config = await front.sync(lambda c: c.get_model_config("blend.ref", "1"))
    assert config["name"] == "blend.ref"
    assert config["max_batch_size"] == 4
    assert [(each["name"], each["dims"]) for each in config["input"]] == [
        ("NOTE", [1]),
        ("REFERENCE", [1]),
        ("SCALE", [1]),
    ]
    stats = await front.sync(lambda c: c.get_inference_statistics("blend.ref"))
    assert [each["name"] for each in stats["model_stats"]] == ["blend.ref"]
    assert await front.sync(lambda c: c.is_model_ready("blend.ref"))


@service
async def test_everything_else_is_tritons_own(front: Doors) -> None:
    """Server and model calls without a reference answer as Triton does."""
    for path in (
        *("/v2", "/v2/models/stats", "/v2/models/embed", "/v2/models/embed/versions/1", "/v2/models/embed/config"),
        *("/v2/models/nope", "/v2/models/nope/config"),
    ):
        assert await front.say("GET", path) == await front.say("GET", path, behind=True)
    assert await front.sync(lambda c: c.is_server_live() and c.is_server_ready() and c.is_model_ready("embed"))
    assert not await front.sync(lambda c: c.is_model_ready("nope.ref"))
    _, index = await front.say("POST", "/v2/repository/index")
    assert {each["name"] for each in index} == {"blend", "embed", "gate", "measure", "pair", "repeat", "scale"}


@service
@pytest.mark.parametrize(
    ("method", "path", "body", "refused"),
    [
        ("POST", "/v2/repository/models/embed/load", {}, 403),
        ("POST", "/v2/repository/models/embed/unload", {}, 403),
        ("POST", "/v2/logging", {"log_file": "elsewhere"}, 400),
        ("POST", "/v2/trace/setting", {"trace_file": "elsewhere"}, 400),
        ("POST", "/v2/models/embed/trace/setting", {"trace_file": "elsewhere"}, 400),
        ("GET", "/v2/nothing", None, 404),
        ("POST", "/v2/models/embed.ref/generate", {}, 404),
    ],
)
async def test_what_runs_code_or_writes_files_is_not_offered(
    front: Doors, method: str, path: str, body: Any, refused: int
) -> None:
    """Loading models, and saying where logs and traces are written, stay with whoever runs Triton."""
    status, answer = await front.say(method, path, body)
    assert status == refused
    assert set(answer) == {"error"}


@service
async def test_logging_and_tracing_are_tritons_own(front: Doors) -> None:
    """Their settings are read and changed as without the daemon, under either name of a model."""
    for path in ("/v2/logging", "/v2/trace/setting", "/v2/models/embed/trace/setting"):
        assert await front.say("GET", path) == await front.say("GET", path, behind=True)
    before = await front.say("GET", "/v2/models/embed/trace/setting", behind=True)
    assert await front.say("GET", "/v2/models/embed.ref/trace/setting") == before
    verbose = (await front.say("GET", "/v2/logging"))[1]["log_verbose_level"]
    try:
        assert (await front.say("POST", "/v2/logging", {"log_verbose_level": verbose + 1}))[0] == 200
        _, now = await front.say("GET", "/v2/logging", behind=True)
        assert now["log_verbose_level"] == verbose + 1
    finally:
        await front.say("POST", "/v2/logging", {"log_verbose_level": verbose}, behind=True)


# ---------------------------------------------------------------------- refusals


@service
@pytest.mark.parametrize(
    ("model", "text", "status", "message"),
    [
        ("embed.ref", f"{STUDY}/{SERIES}/raw", "400", "cast"),
        ("embed.ref", f"{STUDY}/{SERIES}/flat", "400", "crop_pad|dimensions"),
        ("embed.ref", "not a reference", "400", "study/series/recipe"),
        ("measure.ref", f"{STUDY}/{SERIES}", "400", "study/series/recipe"),
        ("embed.ref", "1.2.9/1.2.9.1/ct", "404", "1.2.9"),
        ("nope.ref", f"{STUDY}/{SERIES}/ct", "404", "unknown model"),
    ],
)
async def test_a_wrong_reference_is_an_error_triton_clients_understand(
    front: Doors, model: str, text: str, status: str, message: str
) -> None:
    """A wrong dtype, form, study or model is told in words, with a status, and pins nothing."""
    front.shelf.put("raw", volume(4, 4, 4, dtype="int16"))
    front.shelf.put("flat", volume(1, 4, 4, 4))
    with pytest.raises(InferenceServerException, match=message) as caught:
        await front.sync(lambda c: c.infer(model, [reference(text)]))
    assert caught.value.status() == status
    assert front.shelf.pins == 0


@service
async def test_a_request_that_triton_refuses_gets_tritons_own_words(front: Doors) -> None:
    """Its status and message are passed on, without the region's name."""
    front.shelf.put("ct", volume(4, 4, 4))
    front.shelf.put("beyond", volume(4, 4, 4), offset=NBYTES)
    extra = tensor("EXTRA", np.zeros(1, np.float32), "FP32")
    with pytest.raises(InferenceServerException, match="EXTRA") as caught:
        await front.sync(lambda c: c.infer("embed.ref", [reference(f"{STUDY}/{SERIES}"), extra]))
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="shared memory region: 'arena'") as caught:
        await front.sync(lambda c: c.infer("embed.ref", [reference(f"{STUDY}/{SERIES}/beyond")]))
    assert await front.region() not in str(caught.value)


@service
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"inputs": 3}', b'{"inputs": []}', b'{"inputs": [{"name": "REFERENCE"}]}'],
)
async def test_a_body_that_is_no_request_is_refused(front: Doors, body: bytes) -> None:
    """Malformed JSON gets a 400 with a reason."""
    status, answer = await front.say("POST", "/v2/models/embed.ref/infer", body)
    assert status == 400
    assert answer["error"]


@service
async def test_a_volume_written_as_json_is_refused(front: Doors) -> None:
    """What would have to be held in memory to be looked at is refused, with the way to send it."""
    body = msgspec.json.encode({"inputs": [{"name": "VOLUME", "data": [0] * (MAX_HEAD // 2)}]})
    status, answer = await front.say("POST", "/v2/models/embed/infer", body)
    assert status == 400
    assert "binary" in answer["error"]


# ---------------------------------------------------------------------- the region nobody can touch


@service
async def test_clients_use_shared_memory_of_their_own(front: Doors, tmp_path: Path) -> None:
    """Registering, using, listing and unregistering a client's own region works as without the daemon."""
    array = volume(8, 8, 8)
    own = Path("/dev/shm") / f"voxcache-test-own-{secrets.token_hex(8)}"
    own.write_bytes(array.tobytes())
    try:
        await front.sync(lambda c: c.register_system_shared_memory("own", f"/{own.name}", array.nbytes))
        assert [each["name"] for each in await front.sync(lambda c: c.get_system_shared_memory_status())] == ["own"]
        mine = await front.sync(lambda c: c.infer("embed", [by_region("VOLUME", "own", array)]))
        sent = await front.sync(lambda c: c.infer("embed", [tensor("VOLUME", array, "FP32")]))
        assert mine.as_numpy("EMBEDDING").tobytes() == sent.as_numpy("EMBEDDING").tobytes()
        await front.sync(lambda c: c.unregister_system_shared_memory("own"))
        assert await front.sync(lambda c: c.get_system_shared_memory_status()) == []
    finally:
        own.unlink()


@service
async def test_unregistering_everything_leaves_the_arena(front: Doors) -> None:
    """A client that clears all regions, as perf_analyzer does, clears the clients' only."""
    front.shelf.put("ct", volume(8, 8, 8))
    await front.sync(lambda c: c.infer("embed.ref", [reference(f"{STUDY}/{SERIES}")]))
    region = await front.region()
    own = Path("/dev/shm") / f"voxcache-test-own-{secrets.token_hex(8)}"
    own.write_bytes(bytes(4096))
    try:
        for name in ("one", "two%20two"):
            await front.say(
                "POST", f"/v2/systemsharedmemory/region/{name}/register", {"key": f"/{own.name}", "byte_size": 4096}
            )
        await front.sync(lambda c: c.unregister_system_shared_memory())
    finally:
        own.unlink()
    _, left = await front.say("GET", "/v2/systemsharedmemory/status", behind=True)
    assert [each["name"] for each in left] == [region]


@service
async def test_the_arenas_region_does_not_exist_for_clients(front: Doors) -> None:
    """Even who knows its name cannot list it, read it, write it, take it away or put another in its place."""
    array = volume(8, 8, 8)
    front.shelf.put("ct", array)
    await front.sync(lambda c: c.infer("embed.ref", [reference(f"{STUDY}/{SERIES}")]))
    name = await front.region()
    region = f"/v2/systemsharedmemory/region/{name}"

    assert await front.say("GET", "/v2/systemsharedmemory/status") == (200, [])
    assert (await front.say("GET", f"{region}/status"))[0] == 404
    assert (await front.say("POST", f"{region}/register", {"key": "/nothing", "byte_size": 1}))[0] == 500
    taken = {"key": "/" + front.key, "byte_size": 4096}
    assert (await front.say("POST", "/v2/systemsharedmemory/region/mine/register", taken))[0] == 400
    twice = msgspec.json.encode(taken).replace(b"{", b'{"key": "/x",', 1)
    assert (await front.say("POST", "/v2/systemsharedmemory/region/mine/register", twice))[0] == 400

    shared = {"shared_memory_region": name, "shared_memory_byte_size": array.nbytes}
    reads = {"inputs": [{"name": "VOLUME", "shape": [8, 8, 8], "datatype": "FP32", "parameters": shared}]}
    by_name = {"name": "REFERENCE", "shape": [1], "datatype": "BYTES", "data": [f"{STUDY}/{SERIES}"]}
    writes = {"inputs": [by_name], "outputs": [{"name": "EMBEDDING", "parameters": shared}]}
    escaped = msgspec.json.encode(reads).replace(b"shared_", b"\\u0073hared_")
    for model, body in (("embed", reads), ("embed", escaped), ("embed.ref", writes)):
        assert (await front.say("POST", f"/v2/models/{model}/infer", body))[0] == 404

    assert await front.say("POST", f"{region}/unregister") == (200, None)
    assert await front.region() == name


# ---------------------------------------------------------------------- when Triton goes, and when clients do


@service
async def test_a_triton_that_restarted_is_told_again(front: Doors) -> None:
    """Without Triton there is a 503; once it is back, the next request is answered."""
    array = volume(8, 8, 8)
    front.shelf.put("ct", array)

    async def ask() -> bytes:
        answer = await front.sync(lambda c: c.infer("embed.ref", [reference(f"{STUDY}/{SERIES}")]))
        return bytes(answer.as_numpy("EMBEDDING").tobytes())

    before = await ask()
    await asyncio.to_thread(front.server.stop)
    try:
        with pytest.raises(InferenceServerException) as caught:
            await ask()
        assert caught.value.status() == "503"
        assert (await front.say("GET", "/v2/health/ready"))[0] == 503
        assert front.shelf.pins == 0
    finally:
        await asyncio.to_thread(front.server.start)
    assert await ask() == before
    assert (await front.say("GET", "/v2/health/ready"))[0] == 200


@service
async def test_a_client_that_leaves_does_not_take_the_pin_with_it(front: Doors, tmp_path: Path) -> None:
    """Triton still reads after the client has disconnected: the tensor stays pinned until its call has ended."""
    front.shelf.put("ct", volume(8, 8, 8))
    with contextlib.ExitStack() as doors:
        begun, go = (doors.enter_context(fifo(tmp_path / name)) for name in ("begun", "go"))
        asking = asyncio.create_task(front.say("POST", "/v2/models/gate.ref/infer", gated(tmp_path)))
        await readable(begun)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(front.left.wait(), 30)
        assert front.shelf.pins == 1
        assert not front.shelf.unpinned.is_set()
        os.write(go, b"!")
        await asyncio.wait_for(front.shelf.unpinned.wait(), 30)
    assert front.shelf.pins == 0


async def test_half_an_answer_is_never_taken_for_a_whole_one() -> None:
    """When Triton breaks off in the middle, so do we: the client sees a broken connection, not a short body."""

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(500_000))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with (
        server,
        before(TritonSettings(f"http://{host}:{port}"), "/arena", Shelf(Path())) as (_, _, url, _),
        aiohttp.ClientSession() as s,
        s.get(f"{url}/v2") as response,
    ):
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()
