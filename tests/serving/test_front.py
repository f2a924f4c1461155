"""What both doors share, on a real Triton: parts and batches of tensors, several servers, clients apart, turns."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from cache.errors import DeadlinePassed, Overloaded
from serving.admission import Admission, AdmissionSettings
from serving.demo.tritonserver import MODELS, TritonServer
from serving.peers import Process, far_end, listener
from tests.cache.walk import until
from tests.serving.doors import (
    SERIES,
    STUDY,
    Doors,
    by_region,
    fifo,
    gated,
    open_doors,
    own_memory,
    readable,
    reference,
    tensor,
    volume,
)

DOORS = pytest.mark.parametrize(("door", "client"), [("http", http_client), ("grpc", grpc_client)])


def texts(name: str, *references: str, client: Any) -> Any:
    return tensor(name, np.array([text.encode() for text in references], object), "BYTES", client=client)


def asking(model: str, given: list[Any]) -> Callable[[Any], Any]:
    """What a client is to ask."""
    return lambda c: c.infer(model, given)


def scaled(client: Any, scan: Any, count: int) -> list[Any]:
    """The inputs of the scale model, for ``count`` scans."""
    return [scan, tensor("SCALE", np.arange(1, count + 1, dtype=np.float32).reshape(-1, 1), "FP32", client=client)]


# ---------------------------------------------------------------------- parts, pairs, batches


@pytest.mark.service
@DOORS
async def test_frames_are_read_where_they_lie(front: Doors, door: str, client: Any) -> None:
    """A range of the first axis gets the answer of those bytes, and nothing is copied for it."""
    array = volume(20, 16, 16)
    front.shelf.put("ct", array)
    for frames, part in (("3-7", array[3:8]), ("19", array[19:]), ("0-19", array)):
        sent = await front.over(door, asking("embed", [tensor("VOLUME", part, "FP32", client=client)]))
        given = [reference(f"{STUDY}/{SERIES}/ct?frames={frames}", client=client)]
        named = await front.over(door, asking("embed.ref", given))
        assert named.as_numpy("EMBEDDING").tobytes() == sent.as_numpy("EMBEDDING").tobytes()
    assert front.shelf.joints == 0
    with pytest.raises(InferenceServerException, match="has 20"):
        given = [reference(f"{STUDY}/{SERIES}/ct?frames=3-20", client=client)]
        await front.over(door, lambda c: c.infer("embed.ref", given))


@pytest.mark.service
@DOORS
async def test_several_references_and_a_tensor_in_one_request(front: Doors, door: str, client: Any) -> None:
    """A study and its prior by reference, a scalar by value; or the prior as bytes, whose input is declared a text."""
    study, prior = volume(8, 9, 10), volume(7, 9, 10) + 1
    front.shelf.put("ct", study)
    front.shelf.put("ct", prior, series="1.2.3.5")
    weight = tensor("WEIGHT", np.array([0.5], np.float32), "FP32", client=client)
    by_value = [tensor("STUDY", study, "FP32", client=client), tensor("PRIOR", prior, "FP32", client=client)]
    by_name = [
        texts("STUDY", f"{STUDY}/{SERIES}/ct", client=client),
        texts("PRIOR", f"{STUDY}/1.2.3.5/ct", client=client),
    ]
    answers = [
        await front.over(door, asking(model, [*given, weight]))
        for model, given in (
            ("pair", by_value),
            ("pair.ref", by_name),
            ("pair.ref", [by_name[0], by_value[1]]),
            ("pair.ref", [by_value[0], by_name[1]]),
        )
    ]
    assert len({answer.as_numpy("CHANGE").tobytes() for answer in answers}) == 1
    told = await front.sync(lambda c: c.get_model_metadata("pair.ref"))
    assert [(each["name"], each["datatype"]) for each in told["inputs"]] == [
        ("STUDY", "BYTES"),
        ("PRIOR", "BYTES"),
        ("WEIGHT", "BYTES"),
    ]


@pytest.mark.service
@DOORS
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
async def test_a_batch_of_references_is_one_request(
    front: Doors, door: str, client: Any, shape: tuple[int, ...]
) -> None:
    """Three studies of one shape get the answers of the three, put together; a copy is made for it, and let go."""
    arrays = [volume(6, 7, 8, dtype="int16") + number for number in range(3)]
    for number, array in enumerate(arrays):
        front.shelf.put("raw", array, series=f"1.2.3.{number}")
    named = np.array([f"{STUDY}/1.2.3.{number}".encode() for number in (2, 0, 1)], object).reshape(shape)
    whole = tensor("SCAN", np.stack([arrays[2], arrays[0], arrays[1]]), "INT16", client=client)
    sent = await front.over(door, lambda c: c.infer("scale", scaled(client, whole, 3)))
    given = scaled(client, tensor("REFERENCE", named, "BYTES", client=client), 3)
    answer = await front.over(door, lambda c: c.infer("scale.ref", given))
    assert answer.as_numpy("SCALED").tobytes() == sent.as_numpy("SCALED").tobytes()
    assert (front.shelf.joints, front.shelf.pins) == (1, 0)


@pytest.mark.service
async def test_a_batch_that_lies_together_is_not_copied(front: Doors) -> None:
    """Successive frames of one tensor are handed over as they are; frames out of order are put together."""
    array = volume(8, 32, 32, dtype="int16")  # 2 KiB a frame
    front.shelf.put("raw", array)
    for frames, copies in ((("0-1", "2-3"), 0), (("4-5", "2-3"), 1)):
        names = [f"{STUDY}/{SERIES}/raw?frames={each}" for each in frames]
        given = scaled(http_client, texts("REFERENCE", *names, client=http_client), 2)
        answer = await front.sync(asking("scale.ref", given))
        starts = [int(each.split("-")[0]) for each in frames]
        for number, start in enumerate(starts):
            expected = array[start : start + 2].astype(np.float32) * np.float32(number + 1)
            assert np.array_equal(answer.as_numpy("SCALED")[number], expected)
        assert front.shelf.joints == copies


@pytest.mark.service
async def test_a_batch_of_unequal_shapes_is_refused(front: Doors) -> None:
    """With the reason, and nothing pinned."""
    front.shelf.put("raw", volume(6, 7, 8, dtype="int16"), series="1.2.3.1")
    front.shelf.put("raw", volume(6, 7, 9, dtype="int16"), series="1.2.3.2")
    names = [f"{STUDY}/1.2.3.{number}" for number in (1, 2)]
    given = scaled(http_client, texts("REFERENCE", *names, client=http_client), 2)
    with pytest.raises(InferenceServerException, match="one shape"):
        await front.sync(lambda c: c.infer("scale.ref", given))
    assert front.shelf.pins == 0


@pytest.mark.service
async def test_parameters_in_lower_case_find_their_recipe(front: Doors) -> None:
    """perf_analyzer writes parameters so."""
    front.shelf.put("MixedCase", volume(4, 4, 4))
    parameters = {"study": STUDY, "series": SERIES, "recipe": "mixedcase"}
    answer = await front.sync(lambda c: c.infer("embed.ref", [], parameters=parameters))
    assert answer.as_numpy("EMBEDDING").shape == (64,)


# ---------------------------------------------------------------------- several servers, and one that comes late


@pytest.mark.service
@pytest.mark.slow
async def test_each_model_is_asked_of_the_server_that_has_it(triton: TritonServer, tmp_path: Path) -> None:
    """Two servers, one of them late: models of both at both doors; one that restarts takes the other's nothing away."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "solo").symlink_to(MODELS / "embed")
    config = (MODELS / "embed" / "config.pbtxt").read_text().replace('"embed"', '"solo"')
    (models / "solo").unlink()
    (models / "solo" / "1").mkdir(parents=True)
    (models / "solo" / "config.pbtxt").write_text(config)
    (models / "solo" / "1" / "model.py").write_text((MODELS / "embed" / "1" / "model.py").read_text())
    other = TritonServer(tmp_path / "log", [models])
    async with open_doors(triton, other) as front:
        array = volume(8, 9, 10)
        front.shelf.put("ct", array)
        front.front.triton.keep_registered()

        async def ask(model: str, door: str = "http", client: Any = http_client) -> bytes:
            given = [reference(f"{STUDY}/{SERIES}/ct", client=client)]
            answer = await front.over(door, lambda c: c.infer(f"{model}.ref", given))
            return bytes(answer.as_numpy("EMBEDDING").tobytes())

        before = await ask("embed")
        with pytest.raises(InferenceServerException) as caught:
            await ask("solo")
        assert caught.value.status() == "503"
        assert (await front.say("GET", "/v2/health/ready"))[0] == 503
        checks = await front.front.triton.checks()
        assert checks == {
            "triton.gpu0": True,
            "triton.gpu0.arena": True,
            "triton.gpu1": False,
            "triton.gpu1.arena": False,
        }
        await asyncio.to_thread(other.start)
        try:
            while not all((await front.front.triton.checks()).values()):
                await asyncio.sleep(0.02)  # another process, which tells this only when asked
            for door, client in (("http", http_client), ("grpc", grpc_client)):
                assert await ask("solo", door, client) == await ask("embed", door, client) == before
            _, index = await front.say("POST", "/v2/repository/index")
            assert {"embed", "solo"} <= {each["name"] for each in index}
            _, stats = await front.say("GET", "/v2/models/stats")
            assert {"embed", "solo"} <= {each["name"] for each in stats["model_stats"]}
            listed = await front.over_grpc(lambda c: c.get_model_repository_index())
            assert {"embed", "solo"} <= {each.name for each in listed.models}
            assert (await front.say("GET", "/v2/health/ready"))[0] == 200
        finally:
            await asyncio.to_thread(other.stop)
        assert await ask("embed") == before


@pytest.mark.service
async def test_the_arena_is_registered_before_anybody_asks(front: Doors) -> None:
    """Also again, when Triton has restarted."""
    front.front.triton.keep_registered()
    [server] = front.front.triton.servers
    await until(lambda: server.registered)
    assert await front.region() == front.front.triton.arena.region


# ---------------------------------------------------------------------- clients apart

PEER = """
import json, sys
import tritonclient.{kind} as client
with client.InferenceServerClient(sys.argv[1]) as c:
    for line in sys.stdin:
        name, *given = json.loads(line)
        try:
            answer = getattr(c, name)(*given)
            if name.startswith("get"):
                answer = sorted(each["name"] for each in answer) if isinstance(answer, list) else sorted(answer.regions)
            print(json.dumps(answer), flush=True)
        except Exception as error:
            print(json.dumps(str(error)), flush=True)
"""


class Peer:
    """An unchanged client in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, kind: str, address: str) -> "Peer":
        pipe = asyncio.subprocess.PIPE
        code = PEER.format(kind=kind)
        return cls(await asyncio.create_subprocess_exec(sys.executable, "-c", code, address, stdin=pipe, stdout=pipe))

    async def call(self, name: str, *given: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, *given]).encode() + b"\n")
        return json.loads(await self._process.stdout.readline())

    async def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


@pytest.mark.service
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["http", "grpc"])
async def test_clients_regions_are_kept_apart(front: Doors, kind: str) -> None:
    """Two processes use one name for two memories: neither has the other's; who ends leaves none."""
    one, two = volume(4, 4, 4), volume(4, 4, 4) + 1
    front.shelf.put("ct", one)
    await front.sync(lambda c: c.infer("embed.ref", [reference(f"{STUDY}/{SERIES}/ct")]))
    address = front.url.removeprefix("http://") if kind == "http" else front.grpc
    client = http_client if kind == "http" else grpc_client
    with own_memory(one) as mine, own_memory(one) as other, own_memory(two) as theirs:
        await front.over(kind, lambda c: c.register_system_shared_memory("data", mine, one.nbytes))
        peer = await Peer.start(kind, address)
        assert await peer.call("get_system_shared_memory_status") == []
        assert await peer.call("register_system_shared_memory", "data", theirs, two.nbytes) is None
        assert "data" in await peer.call("register_system_shared_memory", "data", theirs, two.nbytes)
        assert await peer.call("get_system_shared_memory_status") == ["data"]
        assert await peer.call("unregister_system_shared_memory") is None
        assert await peer.call("get_system_shared_memory_status") == []
        assert await peer.call("register_system_shared_memory", "left", theirs, two.nbytes) is None
        await peer.end()
        shared = await front.over(kind, lambda c: c.infer("embed", [by_region("VOLUME", "data", one, client=client)]))
        sent = await front.over(kind, lambda c: c.infer("embed", [tensor("VOLUME", one, "FP32", client=client)]))
        assert shared.as_numpy("EMBEDDING").tobytes() == sent.as_numpy("EMBEDDING").tobytes()
        assert len(front.front.regions) == 2
        await front.over(kind, lambda c: c.register_system_shared_memory("more", other, one.nbytes))
        assert len(front.front.regions) == 2  # the ended client's went when another was registered
        await front.over(kind, lambda c: c.unregister_system_shared_memory())
        assert len(front.front.regions) == 0
    await front.region()


def loopbacks() -> list[str]:
    """This machine's loopback addresses: not each has IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return ["127.0.0.1"]
    return ["127.0.0.1", "::1"]


async def test_the_other_end_of_a_connection_is_a_process() -> None:
    """Found by the kernel's tables, over IPv4 and IPv6; a connection of nobody here is none."""
    for host in loopbacks():
        server = await asyncio.start_server(lambda r, w: None, host, 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            _, writer = await asyncio.open_connection(host, port)
            theirs = writer.get_extra_info("sockname")[:2]
            end = far_end(theirs, port)
            assert end is not None
            assert end.process == Process.of(os.getpid()) == listener((host, port))
            assert end.holds
            writer.close()
            await writer.wait_closed()
            assert not end.holds
    assert far_end(("192.0.2.1", 1), port) is None
    assert listener(("127.0.0.1", 1)) is None


async def test_the_end_of_a_process_is_noticed() -> None:
    """At once, also if it had ended before somebody asked, or its id were another's by then."""
    process = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE)
    seen = Process.of(process.pid)
    assert seen is not None
    waiting = asyncio.create_task(seen.ended())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert process.stdin is not None
    process.stdin.close()
    await waiting
    await process.wait()
    await seen.ended()
    assert not seen.lives
    await Process(os.getpid(), seen.started - 1).ended()


# ---------------------------------------------------------------------- turns


@pytest.mark.service
@DOORS
async def test_more_than_can_wait_are_told_to_come_back(
    triton: TritonServer, tmp_path: Path, door: str, client: Any
) -> None:
    """One runs, one waits, the next is refused with a hint; when the first has ended, the one that waited runs."""
    async with open_doors(triton, admission=AdmissionSettings(calls=1, max_waiting=1)) as front:
        front.shelf.put("ct", volume(4, 4, 4))
        with fifo(tmp_path / "begun") as begun, fifo(tmp_path / "go") as go:
            running = asyncio.create_task(front.say("POST", "/v2/models/gate.ref/infer", gated(tmp_path)))
            await readable(begun)
            given = [reference(f"{STUDY}/{SERIES}/ct", client=client)]
            waiting = asyncio.create_task(front.over(door, lambda c: c.infer("embed.ref", given)))
            await until(lambda: front.front.admission.waiting > 0)
            with pytest.raises(InferenceServerException, match="retry later") as caught:
                await front.over(door, lambda c: c.infer("embed.ref", given))
            assert caught.value.status() == {"http": "503", "grpc": "StatusCode.RESOURCE_EXHAUSTED"}[door]
            os.write(go, b"!")
            assert (await running)[0] == 200
            assert (await waiting).as_numpy("EMBEDDING").shape == (64,)


async def test_the_urgent_go_first() -> None:
    """1 before 2, either before those that say nothing, those in the order they came."""
    admission = Admission(AdmissionSettings(calls=1))
    leave = await admission.enter()
    order: list[str] = []

    async def one(name: str, priority: int) -> None:
        left = await admission.enter(priority)
        order.append(name)
        left()

    tasks = [asyncio.create_task(one(*each)) for each in (("a", 0), ("b", 2), ("c", 0), ("d", 1))]
    while admission.waiting < 4:
        await asyncio.sleep(0)
    leave()
    await asyncio.gather(*tasks)
    assert order == ["d", "b", "a", "c"]
    assert (admission.waiting, admission.under_way) == (0, 0)


async def test_who_cannot_be_in_time_is_refused_at_once() -> None:
    """The expected wait is longer than its deadline: better told now; a wait that turned out too long is told then."""
    admission = Admission(AdmissionSettings(calls=1))
    first = await admission.enter()
    with pytest.raises(DeadlinePassed):
        await admission.enter(deadline_s=0.0)  # nothing is known yet of how long a turn takes
    admission._seconds = 5.0
    with pytest.raises(Overloaded) as caught:
        await admission.enter(deadline_s=1.0)
    assert caught.value.retry_after_s == 5.0
    first()
    assert admission.under_way == 0


async def test_who_gives_up_takes_no_turn() -> None:
    """A waiter that is cancelled leaves its place, and one that is cancelled as its turn comes gives it on."""
    admission = Admission(AdmissionSettings(calls=1))
    first = await admission.enter()
    second, third = (asyncio.create_task(admission.enter()) for _ in range(2))
    while admission.waiting < 2:
        await asyncio.sleep(0)
    first()
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    (await third)()
    assert (admission.waiting, admission.under_way) == (0, 0)
