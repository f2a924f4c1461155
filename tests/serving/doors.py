"""Both doors of the daemon before a real Triton, over tensors that a test lays into a real arena."""

import asyncio
import contextlib
import io
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import aiohttp
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as sync_client
from aiohttp import web

from cache.entry import DType, Entry, Lineage, TensorSpec
from cache.errors import UnknownStudy, VoxcacheError
from cache.interfaces import NullObserver
from cache.keys import Key, SeriesRef, TensorRef
from serving.admission import Admission, AdmissionSettings
from serving.api.answering import answering
from serving.api.kserve import routes
from serving.api.problem import headers_of, status_of
from serving.api.timing import tell_timing
from serving.binding import Joined, Resolved
from serving.demo.tritonserver import TritonServer
from serving.front import Front
from serving.grpc.door import GrpcDoor, GrpcSettings
from serving.metrics import Metrics
from serving.triton import ServerSettings, Triton, TritonSettings, VirtualModel
from tests.serving.recording import recorder

T = TypeVar("T")
Array = npt.NDArray[Any]

STUDY, SERIES = "1.2.3", "1.2.3.4"
NBYTES = 64 << 20
AFFINE = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
SETTINGS = {
    "embed": VirtualModel(recipe="ct"),
    "gate": VirtualModel(recipe="ct", input="VOLUME"),
    "blend": VirtualModel(recipe="raw", input="SCAN"),
    "scale": VirtualModel(recipe="raw", input="SCAN"),
    "repeat": VirtualModel(recipe="ct", input="VOLUME"),
}

#: Set when a handler is cancelled because its client has left.
LEFT = web.AppKey("left", asyncio.Event)


class Shelf:
    """Tensors in a real arena, found by reference; every pin is counted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at: dict[TensorRef, tuple[TensorSpec, int]] = {}
        self._end = 0
        self.pins = 0
        self.joints = 0
        self.unpinned = asyncio.Event()

    def put(self, recipe: str, array: Array, *, offset: int | None = None, series: str = SERIES) -> None:
        """Lay ``array`` into the arena; with ``offset``, only claim that it lies there."""
        ref = TensorRef(SeriesRef.parse(STUDY, series), recipe)
        spec = TensorSpec(cast(DType, array.dtype.name), array.shape, "zyx", (1.0, 1.0, 1.0), AFFINE)
        if offset is None:
            offset = self._end
            self._write(offset, array.tobytes())
            self._end += -(-array.nbytes // 4096) * 4096
        self._at[ref] = spec, offset

    def reuse(self, recipe: str, array: Array) -> bool:
        """Put other bytes where a tensor lies, as the cache does once nobody holds it; False while somebody does."""
        if self.pins:
            return False
        _, offset = self._at[TensorRef(SeriesRef.parse(STUDY, SERIES), recipe)]
        self._write(offset, array.tobytes())
        return True

    def read(self, recipe: str) -> Array:
        """The bytes of a tensor as they are in the arena now."""
        spec, offset = self._at[TensorRef(SeriesRef.parse(STUDY, SERIES), recipe)]
        with self._path.open("rb") as arena:
            arena.seek(offset)
            return np.frombuffer(arena.read(spec.nbytes), spec.dtype).reshape(spec.shape)

    async def resolve(self, ref: TensorRef) -> Resolved:
        if ref not in self._at:
            raise UnknownStudy(f"the origin holds nothing of study {ref.ref.study}")
        spec, offset = self._at[ref]
        self.pins += 1
        key = Key("serving", "tensor", ref.ref.study, ref.ref.series, "v", ref.recipe)
        return Resolved(Entry(key, spec.nbytes, spec, Lineage("v", 1, 1)), offset, "ram", self._unpin)

    async def joined(self, namespace: str, pieces: Sequence[tuple[int, int]]) -> Joined:
        with self._path.open("rb") as arena:
            data = b"".join(os.pread(arena.fileno(), nbytes, offset) for offset, nbytes in pieces)
        offset = self._end
        self._write(offset, data)
        self._end += -(-len(data) // 4096) * 4096
        self.pins += 1
        self.joints += 1
        return Joined(offset, self._unpin)

    def spelled(self, name: str) -> str:
        return {"mixedcase": "MixedCase"}.get(name.lower(), name)

    def _write(self, offset: int, data: bytes) -> None:
        with self._path.open("r+b") as arena:
            arena.seek(offset)
            arena.write(data)

    def _unpin(self) -> None:
        self.pins -= 1
        if not self.pins:
            self.unpinned.set()


class Doors:
    """The daemon's KServe doors on ports of their own, before a real Triton."""

    def __init__(self, server: TritonServer, front: Front, app: web.Application, shelf: Shelf) -> None:
        self.server = server
        self.front = front
        self.app = app
        self.shelf = shelf
        self.url = ""
        self.grpc = ""

    @property
    def key(self) -> str:
        return self.front.triton.arena.shm

    @property
    def left(self) -> asyncio.Event:
        return self.app[LEFT]

    async def sync(self, work: Callable[[Any], T]) -> T:
        """What ``work`` gets from the synchronous client, which blocks its own thread."""

        def run() -> T:
            with sync_client.InferenceServerClient(self.url.removeprefix("http://")) as client:
                return work(client)

        return await asyncio.to_thread(run)

    async def over_grpc(self, work: Callable[[Any], T]) -> T:
        """What ``work`` gets from the synchronous gRPC client, which blocks its own thread."""

        def run() -> T:
            with grpc_client.InferenceServerClient(self.grpc) as client:
                return work(client)

        return await asyncio.to_thread(run)

    async def over(self, door: str, work: Callable[[Any], T]) -> T:
        """The same over "http" or "grpc"."""
        return await (self.sync if door == "http" else self.over_grpc)(work)

    async def say(self, method: str, path: str, body: Any = None, *, behind: bool = False) -> tuple[int, Any]:
        """Status and JSON of a plain request, to the daemon or to Triton ``behind`` it."""
        url = (self.server.url if behind else self.url) + path
        data = None if body is None else io.BytesIO(body if isinstance(body, bytes) else msgspec.json.encode(body))
        async with aiohttp.ClientSession() as session, session.request(method, url, data=data) as response:
            text = await response.read()
            return response.status, msgspec.json.decode(text) if text else None

    async def region(self) -> str:
        """The arena's secret name, from Triton itself."""
        _, regions = await self.say("GET", "/v2/systemsharedmemory/status", behind=True)
        (found,) = (each["name"] for each in regions if each["key"] == self.key)
        return str(found)


@web.middleware
async def told(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
    try:
        return await handler(request)
    except asyncio.CancelledError:
        request.app[LEFT].set()
        raise
    except VoxcacheError as error:
        return web.json_response({"error": str(error)}, status=status_of(error), headers=headers_of(error))


@contextlib.asynccontextmanager
async def before(
    settings: TritonSettings, key: str, shelf: Shelf, admission: AdmissionSettings | None = None
) -> AsyncIterator[tuple[Front, web.Application, str, str]]:
    """Both doors on ports of their own before the Tritons of ``settings``: their URL, and their gRPC address."""
    async with contextlib.AsyncExitStack() as stack:
        upstream = await Triton.open(settings, key, NBYTES, NullObserver())
        stack.push_async_callback(upstream.close)
        front = Front(upstream, shelf, Admission(admission or AdmissionSettings()))
        recording = recorder(Metrics())
        app = web.Application(middlewares=[answering(recording), told])
        app.on_response_prepare.append(tell_timing)
        app[LEFT] = asyncio.Event()
        app.add_routes(routes(front))
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        door = GrpcDoor(front, recording, drain_s=1.0)
        stack.push_async_callback(door.close)
        await door.listen(GrpcSettings(port=0))
        yield front, app, "http://{}:{}".format(*runner.addresses[0][:2]), f"127.0.0.1:{door.port}"


@contextlib.contextmanager
def arena() -> Iterator[Path]:
    """Shared memory of NBYTES."""
    path = Path("/dev/shm") / f"voxcache-test-{secrets.token_hex(8)}"
    try:
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, NBYTES)
        yield path
    finally:
        path.unlink()


def settings_of(*servers: TritonServer, **more: Any) -> TritonSettings:
    """The settings for these servers, with the tests' models."""
    if len(servers) == 1:
        return TritonSettings(servers[0].url, servers[0].grpc_url, models=SETTINGS, **more)
    several = {f"gpu{number}": ServerSettings(each.url, each.grpc_url) for number, each in enumerate(servers)}
    return TritonSettings(servers=several, models=SETTINGS, **more)


@contextlib.asynccontextmanager
async def open_doors(
    *servers: TritonServer, admission: AdmissionSettings | None = None, **more: Any
) -> AsyncIterator[Doors]:
    """Both doors before these servers; by the end nothing is pinned."""
    with arena() as path:
        shelf = Shelf(path)
        async with before(settings_of(*servers, **more), f"/{path.name}", shelf, admission) as (front, app, url, grpc):
            doors = Doors(servers[0], front, app, shelf)
            doors.url, doors.grpc = url, grpc
            yield doors
    assert shelf.pins == 0


@pytest.fixture
async def front(triton: TritonServer) -> AsyncIterator[Doors]:
    async with open_doors(triton) as doors:
        yield doors


def volume(*shape: int, dtype: str = "float32") -> Array:
    return np.random.default_rng(7).normal(100, 300, shape).astype(dtype)


def tensor(name: str, array: Array, kind: str, *, client: Any = sync_client, binary: bool = True) -> Any:
    given = client.InferInput(name, list(array.shape), kind)
    if client is grpc_client:
        given.set_data_from_numpy(array)
    else:
        given.set_data_from_numpy(array, binary_data=binary)
    return given


def reference(text: str, *, client: Any = sync_client, binary: bool = True) -> Any:
    return tensor("REFERENCE", np.array([text.encode()], object), "BYTES", client=client, binary=binary)


def by_region(name: str, region: str, array: Array, *, client: Any = sync_client) -> Any:
    given = client.InferInput(name, list(array.shape), "FP32")
    given.set_shared_memory(region, array.nbytes)
    return given


@contextlib.contextmanager
def own_memory(array: Array) -> Iterator[str]:
    """Shared memory of a client's own that holds ``array``: its key."""
    path = Path("/dev/shm") / f"voxcache-test-own-{secrets.token_hex(8)}"
    path.write_bytes(array.tobytes())
    try:
        yield f"/{path.name}"
    finally:
        path.unlink()


def gated(door: Path) -> dict[str, Any]:
    """A request that the gate model begins and ends by the FIFOs in ``door``."""
    path = os.fsencode(door)
    return {
        "inputs": [
            {"name": "REFERENCE", "shape": [1], "datatype": "BYTES", "data": [f"{STUDY}/{SERIES}"]},
            {"name": "DOOR", "shape": [len(path)], "datatype": "UINT8", "data": list(path)},
        ]
    }


@contextlib.contextmanager
def fifo(path: Path) -> Iterator[int]:
    """A FIFO with both its ends open, so that nobody waits to open it."""
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield end
    finally:
        os.close(end)


async def readable(end: int) -> None:
    """Returns when something has been written to the FIFO."""
    loop = asyncio.get_running_loop()
    written = asyncio.Event()
    loop.add_reader(end, written.set)
    try:
        await asyncio.wait_for(written.wait(), 30)
    finally:
        loop.remove_reader(end)
