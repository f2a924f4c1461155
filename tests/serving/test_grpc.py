"""KServe over gRPC before a real Triton: unchanged clients, the same references and the same refusals as over HTTP."""

import asyncio
import functools
import queue
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as client
import tritonclient.grpc.aio as aio_client
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from serving.grpc.stream import _Up
from tests.serving.doors import NBYTES, SERIES, STUDY, Doors, by_region, own_memory, reference, tensor, volume

pytestmark = pytest.mark.service


def refer(text: str = f"{STUDY}/{SERIES}") -> Any:
    return reference(text, client=client)


# ---------------------------------------------------------------------- the answer by reference is the answer by bytes


async def test_a_reference_gets_the_same_answer_as_the_bytes(front: Doors) -> None:
    """The synchronous client, unchanged: bytes to the model, or a reference to its virtual twin."""
    array = volume(40, 50, 60)
    front.shelf.put("ct", array)
    given = [tensor("VOLUME", array, "FP32", client=client)]
    sent = await front.over_grpc(lambda c: c.infer("embed", given))
    named = await front.over_grpc(
        lambda c: c.infer("embed.ref", [refer(f"voxcache:{STUDY}/{SERIES}/ct")], model_version="1", request_id="me")
    )
    assert named.as_numpy("EMBEDDING").tobytes() == sent.as_numpy("EMBEDDING").tobytes()
    assert (named.get_response().model_name, named.get_response().id) == ("embed.ref", "me")
    assert sent.get_response().model_name == "embed"


async def test_the_asynchronous_client_works_as_well(front: Doors) -> None:
    """Its answers, by bytes and by reference, are those of the synchronous one."""
    array = volume(30, 40, 50)
    front.shelf.put("ct", array)
    names = ("VOXELS", "FRACTION", "MEAN", "CENTROID")
    outputs = [aio_client.InferRequestedOutput(name) for name in names]
    async with aio_client.InferenceServerClient(front.grpc) as c:
        sent = await c.infer("measure", [tensor("VOLUME", array, "FP32", client=client)], outputs=outputs)
        named = await c.infer("measure.ref", [refer(f"{STUDY}/{SERIES}/ct")], outputs=outputs)
    for name in names:
        assert named.as_numpy(name).tobytes() == sent.as_numpy(name).tobytes()
    assert named.as_numpy("VOXELS")[0] == (array > 300).sum()


async def test_parameters_and_regions_name_a_study_too(front: Doors) -> None:
    """Request parameters, and a shared-memory region on either name of the model, are references."""
    array = volume(20, 20, 20)
    front.shelf.put("ct", array)
    sent = await front.over_grpc(lambda c: c.infer("embed", [tensor("VOLUME", array, "FP32", client=client)]))
    region = f"voxcache:{STUDY}/{SERIES}/ct"
    for ask in (
        lambda c: c.infer("embed.ref", [], parameters={"study": STUDY, "series": SERIES, "recipe": "ct"}),
        lambda c: c.infer("embed", [by_region("VOLUME", region, array, client=client)]),
        lambda c: c.infer("embed.ref", [by_region("VOLUME", region, array, client=client)]),
    ):
        named = await front.over_grpc(ask)
        assert named.as_numpy("EMBEDDING").tobytes() == sent.as_numpy("EMBEDDING").tobytes()


async def test_other_inputs_pass_and_large_answers_are_whole(front: Doors) -> None:
    """Inputs on both sides of the reference keep their bytes; an answer of several megabytes arrives whole."""
    array = volume(60, 100, 120, dtype="int16")
    front.shelf.put("raw", array)
    note = tensor("NOTE", np.array([["über".encode()]], object), "BYTES", client=client)
    scale = tensor("SCALE", np.array([[2.5]], np.float32), "FP32", client=client)
    answer = await front.over_grpc(lambda c: c.infer("blend.ref", [note, refer(), scale]))
    assert np.array_equal(answer.as_numpy("SCALED")[0, 0], array.astype(np.float32) * np.float32(2.5))
    assert answer.as_numpy("NOTE")[0, 0].decode() == "über"


async def test_large_bodies_pass_both_ways(front: Doors) -> None:
    """A volume sent as bytes goes through unread, as does its answer."""
    array = volume(60, 100, 120, dtype="int16")
    note = tensor("NOTE", np.array([[b"n"]], object), "BYTES", client=client)
    scan = tensor("SCAN", array[None, None], "INT16", client=client)
    scale = tensor("SCALE", np.array([[1.0]], np.float32), "FP32", client=client)
    for compression in (None, "gzip"):
        ask = functools.partial(
            client.InferenceServerClient.infer,
            model_name="blend",
            inputs=[note, scan, scale],
            compression_algorithm=compression,
        )
        answer = await front.over_grpc(ask)
        assert np.array_equal(answer.as_numpy("SCALED")[0, 0], array.astype(np.float32))


async def test_an_answer_says_where_the_tensor_was_and_how_long_it_took(front: Doors) -> None:
    """voxcache-tier and server-timing are in the trailing metadata of answers by reference."""
    front.shelf.put("ct", volume(4, 4, 4))
    async with grpc.aio.insecure_channel(front.grpc) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(by_name())
        await call
        told = dict(await call.trailing_metadata())
    assert told["voxcache-tier"] == "ram"
    assert [entry.split(";")[0] for entry in told["server-timing"].split(", ")] == ["turn", "triton"]


def by_name(model: str = "embed.ref", text: str = f"{STUDY}/{SERIES}") -> Any:
    request = service_pb2.ModelInferRequest(model_name=model)
    given = request.inputs.add(name="REFERENCE", datatype="BYTES", shape=[1])
    given.contents.bytes_contents.append(text.encode())
    return request


# ---------------------------------------------------------------------- streams


async def test_a_stream_answers_by_reference_as_by_bytes(front: Doors) -> None:
    """Requests of both kinds in one stream: each is answered once, under its own id and model."""
    array = volume(20, 30, 40)
    front.shelf.put("ct", array)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def ask(c: Any) -> dict[str, Any]:
        c.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(4):
            c.async_stream_infer("embed", [tensor("VOLUME", array, "FP32", client=client)], request_id=f"sent{number}")
            c.async_stream_infer("embed.ref", [refer()], request_id=f"named{number}")
        found = [answers.get(timeout=60) for _ in range(8)]
        c.stop_stream()
        assert [error for _, error in found if error is not None] == []
        return {result.get_response().id: result for result, _ in found}

    found = await front.over_grpc(ask)
    assert set(found) == {f"{kind}{number}" for kind in ("sent", "named") for number in range(4)}
    assert len({result.as_numpy("EMBEDDING").tobytes() for result in found.values()}) == 1
    assert {result.get_response().model_name for name, result in found.items() if "named" in name} == {"embed.ref"}


@pytest.mark.parametrize("wants_final", [True, False])
@pytest.mark.parametrize("times", [0, 1, 3])
async def test_a_decoupled_model_gives_as_many_answers_as_by_bytes(front: Doors, times: int, wants_final: bool) -> None:
    """None, one or several; the empty final one comes if it was asked for, and the tensor is let go after the last."""
    array = volume(4, 5, 6)
    front.shelf.put("ct", array)
    count = tensor("TIMES", np.array([times], np.int32), "INT32", client=client)

    async def ask(model: str, given: Any) -> list[tuple[Any, ...]]:
        async def requests() -> Any:
            yield {
                "model_name": model,
                "inputs": [given, count],
                "request_id": "me",
                "enable_empty_final_response": wants_final,
            }

        async with aio_client.InferenceServerClient(front.grpc) as c:
            found = []
            async for result, error in c.stream_infer(requests()):
                assert error is None, error.message()
                told = result.get_response()
                outputs = {each.name: result.as_numpy(each.name).tobytes() for each in told.outputs}
                final = told.parameters["triton_final_response"].bool_param if wants_final else None
                found.append((told.id, outputs, final))
            return found

    sent = await ask("repeat", tensor("VOLUME", array, "FP32", client=client))
    named = await ask("repeat.ref", reference(f"{STUDY}/{SERIES}/ct", client=client))
    assert named == sent
    assert sum(bool(outputs) for _, outputs, _ in named) == times
    assert front.shelf.pins == 0


async def test_a_wrong_request_in_a_stream_is_answered_and_the_stream_goes_on(front: Doors) -> None:
    """A reference to nothing and a region of nobody's are refused by id, as Triton refuses; the next is answered."""
    array = volume(4, 4, 4)
    front.shelf.put("ct", array)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def ask(c: Any) -> list[tuple[Any, Any]]:
        c.start_stream(lambda result, error: answers.put((result, error)))
        c.async_stream_infer("embed.ref", [refer("1.2.9/1.2.9.1/ct")])
        c.async_stream_infer("embed", [by_region("VOLUME", "nobodys", array, client=client)])
        c.async_stream_infer("embed.ref", [refer()], request_id="good")
        found = [answers.get(timeout=60) for _ in range(3)]
        c.stop_stream()
        return found

    found = await front.over_grpc(ask)
    refused = [str(error) for _, error in found if error is not None]
    assert len(refused) == 2
    assert "1.2.9" in refused[0]
    assert "nobodys" in refused[1]
    assert [result.get_response().id for result, error in found if error is None] == ["good"]


# ---------------------------------------------------------------------- everything that is not inference


async def test_the_virtual_model_declares_its_reference(front: Doors) -> None:
    """Metadata, configuration, statistics and readiness are those of a model that takes a reference."""
    told = await front.over_grpc(lambda c: c.get_model_metadata("blend.ref", as_json=True))
    assert told["name"] == "blend.ref"
    assert [(each["name"], each["datatype"], each["shape"]) for each in told["inputs"]] == [
        ("NOTE", "BYTES", ["-1", "1"]),
        ("REFERENCE", "BYTES", ["-1", "1"]),
        ("SCALE", "FP32", ["-1", "1"]),
    ]
    config = (await front.over_grpc(lambda c: c.get_model_config("blend.ref"))).config
    assert (config.name, config.max_batch_size) == ("blend.ref", 4)
    assert [(each.name, list(each.dims)) for each in config.input] == [
        ("NOTE", [1]),
        ("REFERENCE", [1]),
        ("SCALE", [1]),
    ]
    stats = await front.over_grpc(lambda c: c.get_inference_statistics("blend.ref"))
    assert [each.name for each in stats.model_stats] == ["blend.ref"]
    assert await front.over_grpc(lambda c: c.is_model_ready("blend.ref"))


async def test_everything_else_is_tritons_own(front: Doors) -> None:
    """What names nothing of ours is answered byte for byte as Triton does."""
    empty = b""
    embed = service_pb2.ModelMetadataRequest(name="embed").SerializeToString()
    async with (
        grpc.aio.insecure_channel(front.grpc) as ours,
        grpc.aio.insecure_channel(front.server.grpc_url) as theirs,
    ):
        for method, request in (
            *(("ServerLive", empty), ("ServerReady", empty), ("ServerMetadata", empty), ("RepositoryIndex", empty)),
            *(("ModelReady", embed), ("ModelMetadata", embed), ("ModelConfig", embed), ("ModelStatistics", embed)),
            *(("ModelStatistics", empty), ("TraceSetting", empty), ("LogSettings", empty)),
        ):
            path = f"/inference.GRPCInferenceService/{method}"
            got = [await channel.unary_unary(path)(request) for channel in (ours, theirs)]
            parsed = [getattr(service_pb2, f"{method}Response").FromString(each) for each in got]
            assert parsed[0] == parsed[1], method


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="embed"), "PERMISSION_DENIED"),
        ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="embed"), "PERMISSION_DENIED"),
        ("ModelMetadata", service_pb2.ModelMetadataRequest(name="nope.ref"), "NOT_FOUND"),
        ("ModelConfig", service_pb2.ModelConfigRequest(name="nope"), "NOT_FOUND"),
        ("Nothing", service_pb2.ServerLiveRequest(), "UNIMPLEMENTED"),
    ],
)
async def test_what_is_not_offered_has_a_code_that_says_so(front: Doors, method: str, request_: Any, code: str) -> None:
    """Loading models stays with whoever runs Triton; unknown models and methods have Triton's own codes."""
    async with grpc.aio.insecure_channel(front.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(request_.SerializeToString())
    assert caught.value.code().name == code


async def test_logging_and_tracing_are_tritons_own_but_for_their_files(front: Doors) -> None:
    """Settings are changed; where they are written is for whoever runs Triton to say."""
    before = await front.over_grpc(lambda c: c.get_log_settings(as_json=True))
    level = int(before["settings"]["log_verbose_level"]["uint32_param"])
    try:
        told = await front.over_grpc(lambda c: c.update_log_settings({"log_verbose_level": level + 1}, as_json=True))
        assert int(told["settings"]["log_verbose_level"]["uint32_param"]) == level + 1
    finally:
        await front.over_grpc(lambda c: c.update_log_settings({"log_verbose_level": level}))
    trace = await front.over_grpc(lambda c: c.get_trace_settings("embed.ref", as_json=True))
    assert trace == await front.over_grpc(lambda c: c.get_trace_settings("embed", as_json=True))
    for change in (
        lambda c: c.update_log_settings({"log_file": "elsewhere"}),
        lambda c: c.update_trace_settings("embed", {"trace_file": "elsewhere"}),
    ):
        with pytest.raises(InferenceServerException, match="leave out"):
            await front.over_grpc(change)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "text", "code", "message"),
    [
        ("embed.ref", f"{STUDY}/{SERIES}/raw", "INVALID_ARGUMENT", "cast"),
        ("embed.ref", "not a reference", "INVALID_ARGUMENT", "study/series/recipe"),
        ("embed.ref", "1.2.9/1.2.9.1/ct", "NOT_FOUND", "1.2.9"),
        ("nope.ref", f"{STUDY}/{SERIES}/ct", "NOT_FOUND", "unknown model"),
    ],
)
async def test_a_wrong_reference_is_an_error_triton_clients_understand(
    front: Doors, model: str, text: str, code: str, message: str
) -> None:
    """A wrong dtype, form, study or model is told in words, with a code, and pins nothing."""
    front.shelf.put("raw", volume(4, 4, 4, dtype="int16"))
    with pytest.raises(InferenceServerException, match=message) as caught:
        await front.over_grpc(lambda c: c.infer(model, [refer(text)]))
    assert caught.value.status() == f"StatusCode.{code}"
    assert front.shelf.pins == 0


async def test_a_request_that_triton_refuses_gets_tritons_own_words(front: Doors) -> None:
    """Its code and message are passed on, without the region's name."""
    front.shelf.put("ct", volume(4, 4, 4))
    front.shelf.put("beyond", volume(4, 4, 4), offset=NBYTES)
    extra = tensor("EXTRA", np.zeros(1, np.float32), "FP32", client=client)
    with pytest.raises(InferenceServerException, match="EXTRA") as caught:
        await front.over_grpc(lambda c: c.infer("embed.ref", [refer(), extra]))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match="shared memory region: 'arena'") as caught:
        await front.over_grpc(lambda c: c.infer("embed.ref", [refer(f"{STUDY}/{SERIES}/beyond")]))
    assert await front.region() not in str(caught.value)


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05a", b"\x0b", b"\x0a\x09embed.ref\x2a\x02\x0a\x7f"])
async def test_a_body_that_is_no_request_is_refused(front: Doors, body: bytes) -> None:
    """What is no protobuf, or ends too soon, gets INVALID_ARGUMENT, and the door stays open."""
    async with grpc.aio.insecure_channel(front.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(body)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await front.over_grpc(lambda c: c.is_server_live())


# ---------------------------------------------------------------------- clients' shared memory


async def test_clients_use_shared_memory_of_their_own(front: Doors) -> None:
    """Registering, using, listing and unregistering works as without the daemon, and is the same at both doors."""
    array = volume(8, 8, 8)
    with own_memory(array) as key:
        await front.over_grpc(lambda c: c.register_system_shared_memory("own", key, array.nbytes))
        status = await front.over_grpc(lambda c: c.get_system_shared_memory_status(as_json=True))
        assert status["regions"] == {"own": {"name": "own", "key": key, "byte_size": str(array.nbytes)}}
        assert [each["name"] for each in await front.sync(lambda c: c.get_system_shared_memory_status())] == ["own"]
        mine = await front.over_grpc(lambda c: c.infer("embed", [by_region("VOLUME", "own", array, client=client)]))
        sent = await front.over_grpc(lambda c: c.infer("embed", [tensor("VOLUME", array, "FP32", client=client)]))
        assert mine.as_numpy("EMBEDDING").tobytes() == sent.as_numpy("EMBEDDING").tobytes()
        await front.over_grpc(lambda c: c.unregister_system_shared_memory("own"))
        assert await front.over_grpc(lambda c: c.get_system_shared_memory_status(as_json=True)) == {}


async def test_the_arenas_region_does_not_exist_for_clients(front: Doors) -> None:
    """Even who knows its name cannot list it, read it, write it, take it away or put another in its place."""
    array = volume(8, 8, 8)
    front.shelf.put("ct", array)
    await front.over_grpc(lambda c: c.infer("embed.ref", [refer()]))
    name = await front.region()
    assert await front.over_grpc(lambda c: c.get_system_shared_memory_status(as_json=True)) == {}
    output = client.InferRequestedOutput("EMBEDDING")
    output.set_shared_memory(name, 256)
    for work, code in (
        (lambda c: c.get_system_shared_memory_status(name), "NOT_FOUND"),
        (lambda c: c.register_system_shared_memory("mine", front.key, 4096), "INVALID_ARGUMENT"),
        (lambda c: c.infer("embed", [by_region("VOLUME", name, array, client=client)]), "NOT_FOUND"),
        (lambda c: c.infer("embed.ref", [refer()], outputs=[output]), "NOT_FOUND"),
    ):
        with pytest.raises(InferenceServerException) as caught:
            await front.over_grpc(work)
        assert caught.value.status() == f"StatusCode.{code}"
    await front.over_grpc(lambda c: c.unregister_system_shared_memory(name))
    await front.over_grpc(lambda c: c.unregister_system_shared_memory())
    assert await front.region() == name


async def test_a_triton_that_restarted_is_told_again(front: Doors) -> None:
    """Without Triton a call is UNAVAILABLE; once it is back, the next is answered."""
    front.shelf.put("ct", volume(8, 8, 8))

    async def ask() -> bytes:
        answer = await front.over_grpc(lambda c: c.infer("embed.ref", [refer()]))
        return bytes(answer.as_numpy("EMBEDDING").tobytes())

    before = await ask()
    await asyncio.to_thread(front.server.stop)
    try:
        with pytest.raises(InferenceServerException) as caught:
            await ask()
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
        assert front.shelf.pins == 0
    finally:
        await asyncio.to_thread(front.server.start)
    async with grpc.aio.insecure_channel(front.server.grpc_url) as channel:
        await channel.channel_ready()
    for attempt in range(100):
        try:
            assert await ask() == before
        except InferenceServerException as error:  # the channel finds it again after its back-off
            assert attempt < 99, error
            continue
        break


async def test_a_second_try_waits_for_what_is_being_written(front: Doors) -> None:
    """grpc takes one message at a time on a stream, and has it stand still for ever if two are written at once."""

    written = []
    writing = asyncio.Lock()

    class Call:
        async def write(self, body: bytes) -> None:
            assert not writing.locked()
            async with writing:
                await asyncio.sleep(0)
                written.append(body)

    up = _Up(front.front.triton.servers[0], Call())
    await asyncio.gather(*(up.write(body) for body in (b"request", b"second try")))
    assert written == [b"request", b"second try"]
