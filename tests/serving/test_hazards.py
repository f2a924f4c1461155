"""What goes wrong when memory is handed to Triton naively, each shown on the real thing, and ours safe from it."""

import asyncio
import contextlib
import functools
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.http as client
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from serving.demo.tritonserver import TritonServer
from tests.cache.walk import until
from tests.serving.doors import (
    NBYTES,
    SERIES,
    STUDY,
    Doors,
    Shelf,
    arena,
    by_region,
    fifo,
    gated,
    open_doors,
    readable,
    reference,
    tensor,
)

pytestmark = [pytest.mark.service, pytest.mark.slow]

RIGHT = np.full((8, 8, 8), 1.0, np.float32)
WRONG = np.full((8, 8, 8), 2.0, np.float32)
SUM = float(RIGHT.sum())


class Naive:
    """A hand-off as one would write it first: a region of a fixed name, requests with the client's own deadline."""

    def __init__(self, triton: TritonServer, path: Path) -> None:
        self.triton = triton
        self.path = path
        self.region = f"naive-{secrets.token_hex(4)}"
        self.shelf = Shelf(path)

    async def register(self) -> None:
        await self.ask(lambda c: c.register_system_shared_memory(self.region, f"/{self.path.name}", NBYTES))

    async def unregister(self) -> None:
        await self.ask(lambda c: c.unregister_system_shared_memory(self.region))

    async def ask(self, work: Any) -> Any:
        def run() -> Any:
            with client.InferenceServerClient(self.triton.url.removeprefix("http://")) as c:
                return work(c)

        return await asyncio.to_thread(run)

    def request(self, door: Path | None = None) -> Any:
        """A request to the gate model, or without a door to the embed model, by region."""
        asked = service_pb2.ModelInferRequest(model_name="gate" if door else "embed")
        given = asked.inputs.add(name="VOLUME", datatype="FP32", shape=RIGHT.shape)
        given.parameters["shared_memory_region"].string_param = self.region
        given.parameters["shared_memory_byte_size"].int64_param = RIGHT.nbytes
        return with_door(asked, door)


def with_door(asked: Any, door: Path | None) -> Any:
    if door is not None:
        path = os.fsencode(door)
        given = asked.inputs.add(name="DOOR", datatype="UINT8", shape=[len(path)])
        given.contents.uint_contents.extend(path)
    return asked


def named(door: Path) -> Any:
    """The same to our door, by reference."""
    asked = service_pb2.ModelInferRequest(model_name="gate.ref")
    given = asked.inputs.add(name="REFERENCE", datatype="BYTES", shape=[1])
    given.contents.bytes_contents.append(f"{STUDY}/{SERIES}/ct".encode())
    return with_door(asked, door)


@pytest.fixture
async def naive(triton: TritonServer) -> AsyncIterator[Naive]:
    with arena() as path:
        hand_off = Naive(triton, path)
        hand_off.shelf.put("ct", RIGHT)
        await hand_off.register()
        yield hand_off
        await hand_off.unregister()


class Gate:
    """Where a test holds the gate model up, and reads what it has read."""

    def __init__(self, path: Path, begun: int, go: int) -> None:
        self.path = path
        self._begun = begun
        self._go = go

    async def begun(self) -> None:
        await readable(self._begun)
        os.read(self._begun, 1)

    def open(self) -> None:
        os.write(self._go, b"!")

    async def sums(self, count: int) -> list[float]:
        """What the first ``count`` calls have read, once they have ended."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                found = [float(line) for line in (self.path / "sums").read_text().splitlines()]
                if len(found) >= count:
                    return found
            await asyncio.sleep(0.01)  # Triton, another process, writes it


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    with fifo(tmp_path / "begun") as begun, fifo(tmp_path / "go") as go:
        yield Gate(tmp_path, begun, go)


@contextlib.asynccontextmanager
async def stub(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


async def expires(call: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# ---------------------------------------------------------------------- a call that nobody waits for still reads


async def test_naive_a_call_whose_deadline_has_passed_reads_what_came_after(naive: Naive, gate: Gate) -> None:
    """It waits in Triton's queue, its client gives up, its bytes are given to others, and then it runs."""
    async with stub(naive.triton.grpc_url) as triton:
        first = triton.ModelInfer(naive.request(gate.path))
        await gate.begun()
        path = np.frombuffer(os.fsencode(gate.path), np.uint8)
        given = [by_region("VOLUME", naive.region, RIGHT), tensor("DOOR", path, "UINT8")]

        def late() -> None:
            place = naive.triton.url.removeprefix("http://")
            with client.InferenceServerClient(place, network_timeout=0.2) as c:
                c.infer("gate", given)

        with pytest.raises(TimeoutError):
            await asyncio.to_thread(late)
        assert naive.shelf.reuse("ct", WRONG)
        gate.open()
        await gate.begun()
        gate.open()
        assert await gate.sums(2) == [SUM, float(WRONG.sum())]
        await first


async def test_a_call_whose_deadline_has_passed_keeps_its_tensor(front: Doors, gate: Gate) -> None:
    """The client hears of its deadline at once; the tensor stays until Triton has read it."""
    front.shelf.put("ct", RIGHT)
    async with stub(front.grpc) as ours:
        first = asyncio.ensure_future(ours.ModelInfer(named(gate.path)))
        await gate.begun()
        late = ours.ModelInfer(named(gate.path), timeout=0.2)
        await expires(late)
        assert front.shelf.pins == 2
        assert not front.shelf.reuse("ct", WRONG)
        gate.open()
        await gate.begun()
        gate.open()
        assert await gate.sums(2) == [SUM, SUM]
        await first
        await asyncio.wait_for(front.shelf.unpinned.wait(), 30)


async def test_a_deadline_over_http_is_a_parameter(front: Doors, gate: Gate) -> None:
    """``timeout``, in microseconds: 504 when it passes, and the tensor stays as long as Triton needs it."""
    front.shelf.put("ct", RIGHT)
    asked = gated(gate.path) | {"parameters": {"timeout": 200_000}}
    status, answer = await front.say("POST", "/v2/models/gate.ref/infer", asked)
    assert (status, set(answer)) == (504, {"error"})
    assert not front.shelf.reuse("ct", WRONG)
    gate.open()
    assert await gate.sums(1) == [SUM]
    await asyncio.wait_for(front.shelf.unpinned.wait(), 30)


async def test_naive_a_call_whose_client_has_gone_reads_what_came_after(naive: Naive, gate: Gate) -> None:
    """Its request is whole when the connection ends, and Triton runs it."""
    async with stub(naive.triton.grpc_url) as triton:
        first = triton.ModelInfer(naive.request(gate.path))
        await gate.begun()
        shared = {"shared_memory_region": naive.region, "shared_memory_byte_size": RIGHT.nbytes}
        asked = gated(gate.path)
        asked["inputs"][0] = {"name": "VOLUME", "shape": [8, 8, 8], "datatype": "FP32", "parameters": shared}
        body = json.dumps(asked).encode()
        host, port = naive.triton.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST /v2/models/gate/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert naive.shelf.reuse("ct", WRONG)
        gate.open()
        await gate.begun()
        gate.open()
        assert await gate.sums(2) == [SUM, float(WRONG.sum())]
        await first


async def begun_over(door: str, front: Doors, ours: Any, gate: Gate) -> "asyncio.Future[Any]":
    """A call to the gate model by reference, over one of the doors, that the model has begun."""
    if door == "http":
        asking: asyncio.Future[Any] = asyncio.create_task(
            front.say("POST", "/v2/models/gate.ref/infer", gated(gate.path))
        )
    else:
        asking = asyncio.ensure_future(ours.ModelInfer(named(gate.path)))
    await gate.begun()
    return asking


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_a_call_whose_client_has_gone_keeps_its_tensor(front: Doors, gate: Gate, door: str) -> None:
    """Whichever way it leaves."""
    front.shelf.put("ct", RIGHT)
    async with stub(front.grpc) as ours:
        asking = await begun_over(door, front, ours, gate)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert not front.shelf.reuse("ct", WRONG)
        gate.open()
        assert await gate.sums(1) == [SUM]
        await asyncio.wait_for(front.shelf.unpinned.wait(), 30)


async def test_a_stream_whose_client_has_gone_keeps_its_tensors(front: Doors, gate: Gate) -> None:
    """Those of requests that are under way, and of requests that wait behind them."""
    front.shelf.put("ct", RIGHT)
    async with stub(front.grpc) as ours:
        stream = ours.ModelStreamInfer()
        await stream.write(named(gate.path))
        await stream.write(named(gate.path))
        await gate.begun()
        await until(lambda: front.shelf.pins >= 2)
        stream.cancel()
        assert not front.shelf.reuse("ct", WRONG)
        gate.open()
        await gate.begun()
        gate.open()
        assert await gate.sums(2) == [SUM, SUM]
        await asyncio.wait_for(front.shelf.unpinned.wait(), 30)


# ---------------------------------------------------------------------- a server that ends, or seems to


async def test_naive_a_triton_that_restarted_knows_no_region(naive: Naive) -> None:
    """Killed and started again, it refuses every request until somebody registers the region anew."""
    await naive.ask(lambda c: c.infer("embed", [by_region("VOLUME", naive.region, RIGHT)]))
    await asyncio.to_thread(naive.triton.kill)
    await asyncio.to_thread(naive.triton.start)
    with pytest.raises(InferenceServerException, match="Unable to find shared memory region"):
        await naive.ask(lambda c: c.infer("embed", [by_region("VOLUME", naive.region, RIGHT)]))


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_a_triton_killed_in_the_middle_of_a_call_is_forgiven(front: Doors, gate: Gate, door: str) -> None:
    """The call fails with a type, its tensor is let go once the process is gone, and the next Triton is told."""
    front.shelf.put("ct", RIGHT)
    async with stub(front.grpc) as ours:
        asking = await begun_over(door, front, ours, gate)
        assert front.shelf.pins == 1
        await asyncio.to_thread(front.server.kill)
        try:
            if door == "http":
                status, answer = await asking
                assert (status, "broke off" in answer["error"]) == (503, True)
            else:
                with pytest.raises(grpc.aio.AioRpcError, match="broke off") as caught:
                    await asking
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert ("voxcache-error", "triton-lost") in tuple(caught.value.trailing_metadata())
            await asyncio.wait_for(front.shelf.unpinned.wait(), 30)
        finally:
            await asyncio.to_thread(front.server.start)
    assert await embedded(front, door) == await embedded(front, "bytes")


async def embedded(front: Doors, door: str) -> bytes:
    """The embedding, by reference over one of the doors, or of the bytes."""
    if door == "grpc":
        async with stub(front.grpc) as ours:
            asked = service_pb2.ModelInferRequest(model_name="embed.ref")
            given = asked.inputs.add(name="REFERENCE", datatype="BYTES", shape=[1])
            given.contents.bytes_contents.append(f"{STUDY}/{SERIES}/ct".encode())
            answer = await ours.ModelInfer(asked, wait_for_ready=True)
            return bytes(answer.raw_output_contents[0])
    if door == "http":
        named = await front.sync(lambda c: c.infer("embed.ref", [reference(f"{STUDY}/{SERIES}/ct")]))
        return bytes(named.as_numpy("EMBEDDING").tobytes())
    sent = await front.sync(lambda c: c.infer("embed", [tensor("VOLUME", front.shelf.read("ct"), "FP32")]))
    return bytes(sent.as_numpy("EMBEDDING").tobytes())


async def broken(front: Doors, gate: Gate) -> None:
    """A call that the model has begun, whose connection to Triton breaks as a network breaks it."""
    [server] = front.front.triton.servers
    asking = asyncio.create_task(front.say("POST", "/v2/models/gate.ref/infer", gated(gate.path)))
    await gate.begun()
    for connection in list(server._connections.open):
        connection.abort()
    status, _ = await asking
    assert status == 503


async def test_a_call_whose_connection_broke_keeps_its_tensor_until_that_triton_has_ended(
    front: Doors, gate: Gate
) -> None:
    """Triton lives and reads on: only the end of its process lets the tensor go."""
    front.shelf.put("ct", RIGHT)
    [server] = front.front.triton.servers
    await server.register()
    await broken(front, gate)
    assert server.quarantined == 1
    assert not front.shelf.reuse("ct", WRONG)
    gate.open()
    assert await gate.sums(1) == [SUM]
    assert server.quarantined == 1
    await asyncio.to_thread(front.server.stop)
    await asyncio.wait_for(front.shelf.unpinned.wait(), 30)
    await asyncio.to_thread(front.server.start)


async def test_it_is_the_triton_that_was_asked_whose_end_counts(front: Doors, gate: Gate) -> None:
    """Another call has found it gone, and looks for who comes after it: for a while nobody is known."""
    front.shelf.put("ct", RIGHT)
    [server] = front.front.triton.servers
    await server.register()
    asking = asyncio.create_task(front.say("POST", "/v2/models/gate.ref/infer", gated(gate.path)))
    await gate.begun()
    server._process = None
    await asyncio.to_thread(front.server.kill)
    try:
        status, _ = await asking
        assert status == 503
        await asyncio.wait_for(front.shelf.unpinned.wait(), 30)  # triton.quarantine_s is a minute
    finally:
        await asyncio.to_thread(front.server.start)


async def test_where_the_process_cannot_be_seen_a_time_has_to_do(triton: TritonServer, gate: Gate) -> None:
    """In another PID namespace, say: the quarantine lasts ``triton.quarantine_s``."""
    async with open_doors(triton, quarantine_s=0.1) as front:
        front.shelf.put("ct", RIGHT)
        [server] = front.front.triton.servers
        await server.register()
        server._process = None
        await broken(front, gate)
        await asyncio.wait_for(front.shelf.unpinned.wait(), 30)
        gate.open()
        await gate.sums(1)


# ---------------------------------------------------------------------- regions that others take away, or name


def taken_away(c: Any) -> None:
    """Unregister everything. Triton refuses while it has not quite let go of an answer it has sent."""
    while True:
        with contextlib.suppress(InferenceServerException):
            return c.unregister_system_shared_memory()  # type: ignore[no-any-return]  # it returns nothing


async def test_naive_another_client_takes_the_region_away(naive: Naive) -> None:
    """perf_analyzer begins by unregistering everything."""
    await naive.ask(lambda c: c.infer("embed", [by_region("VOLUME", naive.region, RIGHT)]))
    await naive.ask(taken_away)
    with pytest.raises(InferenceServerException, match="Unable to find shared memory region"):
        await naive.ask(lambda c: c.infer("embed", [by_region("VOLUME", naive.region, RIGHT)]))


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_a_region_that_was_taken_away_is_registered_again(front: Doors, door: str) -> None:
    """Through our doors nobody can; whoever does so at Triton itself costs the next request one more try."""
    front.shelf.put("ct", RIGHT)
    before = await embedded(front, door)
    name = await front.region()
    await front.sync(lambda c: c.unregister_system_shared_memory())
    assert await front.region() == name
    assert (await front.say("POST", "/v2/systemsharedmemory/unregister", behind=True))[0] == 200
    assert await embedded(front, door) == before
    assert await front.region() == name


async def test_naive_whoever_knows_the_region_can_write_to_it(naive: Naive) -> None:
    """Named as an output, it takes a model's answer in place of the tensor."""
    output = client.InferRequestedOutput("EMBEDDING")
    output.set_shared_memory(naive.region, 256)
    await naive.ask(lambda c: c.infer("embed", [tensor("VOLUME", RIGHT, "FP32")], outputs=[output]))
    assert not np.array_equal(naive.shelf.read("ct"), RIGHT)


async def test_nobody_can_write_to_the_arena(front: Doors) -> None:
    """Neither under its own name nor under one that a client would give it."""
    front.shelf.put("ct", RIGHT)
    await embedded(front, "http")
    for name in (await front.region(), f"voxcache:{STUDY}/{SERIES}/ct", "nobodys"):
        output = client.InferRequestedOutput("EMBEDDING")
        output.set_shared_memory(name, 256)
        ask = functools.partial(
            client.InferenceServerClient.infer,
            model_name="embed",
            inputs=[tensor("VOLUME", RIGHT, "FP32")],
            outputs=[output],
        )
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region") as caught:
            await front.sync(ask)
        assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="belongs to the cache"):
        await front.sync(lambda c: c.register_system_shared_memory("mine", front.key, 4096))
    assert np.array_equal(front.shelf.read("ct"), RIGHT)


async def test_nobody_can_have_tritons_own_memory_read_or_written(front: Doors) -> None:
    """Its Python backend's: found by what its process maps, whatever it is called."""
    [server] = front.front.triton.servers
    await server.register()
    mapped = Path(f"/proc/{front.server.pid}/maps").read_text()
    internal = {line.rsplit("/", 1)[1] for line in mapped.splitlines() if "/dev/shm/voxcache-triton-" in line}
    assert internal
    for name in (*internal, "triton_python_backend_shm_region_1"):
        status, answer = await front.say(
            "POST", "/v2/systemsharedmemory/region/mine/register", {"key": f"/{name}", "byte_size": 64}
        )
        assert (status, "Triton's own" in answer["error"]) == (400, True)


async def test_naive_an_arena_made_anew_under_its_name_is_the_old_one_to_triton(triton: TritonServer) -> None:
    """A daemon that restarts with the same key: registering is refused as a repeat, and the old bytes are read."""
    with arena() as path:
        before = Naive(triton, path)
        before.shelf.put("ct", RIGHT)
        await before.register()
        path.unlink()
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, NBYTES)
        before.shelf.reuse("ct", WRONG)
        with pytest.raises(InferenceServerException, match="already"):
            await before.register()
        try:
            answer = await before.ask(lambda c: c.infer("measure", [by_region("VOLUME", before.region, RIGHT)]))
            assert answer.as_numpy("MEAN")[0] == RIGHT.mean()  # and not what is there now
        finally:
            await before.unregister()


async def test_an_arena_made_anew_is_a_new_one_to_triton(triton: TritonServer) -> None:
    """Each start has a name of its own for the memory and for the region: what is there now is what is read."""
    means = []
    for content in (RIGHT, WRONG):
        async with open_doors(triton) as front:
            front.shelf.put("ct", content)
            answer = await front.sync(lambda c: c.infer("measure.ref", [reference(f"{STUDY}/{SERIES}/ct")]))
            means.append(answer.as_numpy("MEAN")[0])
    assert means == [RIGHT.mean(), WRONG.mean()]


async def test_naive_an_arena_that_shrinks_takes_triton_with_it(naive: Naive) -> None:
    """What was cut off is read with a bus error: the arena never shrinks (tests/cache/test_arena.py)."""
    os.truncate(naive.path, 0)
    async with stub(naive.triton.grpc_url) as triton:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await triton.ModelInfer(naive.request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await asyncio.to_thread(naive.triton.stop)
    await asyncio.to_thread(naive.triton.start)
