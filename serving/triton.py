"""Triton: the arena registered with it under a name nobody learns, and inference on tensors that stay where they are.

Triton reads a tensor in place, so its pin is held until the upstream call has really ended: a call whose client gave
up may still run, and read. Where a connection broke nobody can say whether it has: then the pin is held until that
server process is gone.
"""

import asyncio
import contextlib
import functools
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Annotated, Any, Final, Protocol, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from cache.entry import TensorSpec
from cache.errors import BadRequest, TritonDown, TritonLost, TritonRefused, VoxcacheError
from cache.interfaces import Observer
from cache.stopwatch import current

from .connection import Connection, Connections
from .peers import Process, listener
from .tracing import NAMES

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: The header that says where the JSON of a body ends and its binary tensors begin (binary tensor data extension).
HEAD_LENGTH: Final = "Inference-Header-Content-Length"

#: The element types of tensors as KServe calls them.
DATATYPES: Final[dict[str, str]] = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}

_CHUNK: Final = 1 << 20


class VirtualModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model takes references under the name ``<model>.ref``.

    recipe: the recipe of references that name none.
    input: the input that the tensor goes to; by default the model's only input that is no BYTES. Of several, each takes
        references under its own name.
    reference: the name of the BYTES input that holds the reference.
    results: whether its answers to references are kept, so that it need not run for the same question again. Only for
        a model that always answers the same to the same.
    """

    recipe: str | None = None
    input: str | None = None
    reference: str = "REFERENCE"
    results: bool = False


class ServerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of several inference servers.

    url: where its HTTP API is, on this node.
    grpc: host and port of its gRPC API; unless set, the URL's host and port 8001.
    """

    url: str
    grpc: str = ""


class TritonSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The inference servers behind the daemon.

    url: where its HTTP API is, on this node; "" for none.
    grpc: host and port of its gRPC API; unless set, the URL's host and port 8001.
    servers: several servers, such as one for each GPU, in place of url and grpc; a model is asked of the one that has
        it.
    models: models whose references need more than the defaults, by name.
    model_control: whether clients may load and unload models, which runs code of theirs where they can write to the
        model repository.
    quarantine_s: seconds that a tensor stays pinned after a connection broke during a call that reads it, where it
        cannot be seen whether that Triton has ended. More than its --exit-timeout-secs.
    identify_s: seconds between looks at which version and configuration of a model is served, where a recipe ends in
        it or its answers are kept.
    max_result: the longest answer that is kept, in bytes.
    """

    url: str = "http://127.0.0.1:8000"
    grpc: str = ""
    servers: dict[str, ServerSettings] = {}
    models: dict[str, VirtualModel] = {}
    model_control: bool = False
    quarantine_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    identify_s: float = 10.0
    max_result: int = 1 << 20

    def virtual(self, model: str) -> VirtualModel:
        """How ``model`` takes references."""
        return self.models.get(model, VirtualModel())


class TensorMetadata(msgspec.Struct, frozen=True):
    """An input or output of a model. A dimension of -1 takes any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(msgspec.Struct, frozen=True):
    """What a model takes and gives (KServe v2, model metadata)."""

    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorMetadata, ...] = ()
    outputs: tuple[TensorMetadata, ...] = ()


class InferInput(msgspec.Struct, frozen=True, omit_defaults=True):
    """One input of a request. ``data`` is kept as it was written."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] = {}
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class InferOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """One output that a request asks for."""

    name: str
    parameters: dict[str, Any] = {}


class InferHead(msgspec.Struct, frozen=True, omit_defaults=True):
    """The JSON of an inference request (KServe v2, inference)."""

    id: str = ""
    parameters: dict[str, Any] = {}
    inputs: tuple[InferInput, ...] = ()
    outputs: tuple[InferOutput, ...] = ()


class Bound(msgspec.Struct, frozen=True):
    """A tensor in the arena that goes to a model's input: ``spec.nbytes`` bytes from ``offset`` of the arena."""

    spec: TensorSpec
    offset: int


def tensor_input(metadata: ModelMetadata, virtual: VirtualModel) -> TensorMetadata:
    """The input that takes the tensor.

    Raises:
        BadRequest: the model has no such input, or several that could be it.
    """
    wanted = [
        each
        for each in metadata.inputs
        if (each.name == virtual.input if virtual.input is not None else each.datatype != "BYTES")
    ]
    if len(wanted) != 1:
        names = ", ".join(each.name for each in metadata.inputs)
        raise BadRequest(
            f"which input of {metadata.name!r} ({names}) takes the tensor? Set triton.models.{metadata.name}.input"
        )
    return wanted[0]


def fitted(spec: TensorSpec, wanted: TensorMetadata) -> tuple[int, ...]:
    """The tensor's shape as the input takes it: with as many leading 1s as its rank asks for.

    Raises:
        BadRequest: dtype, rank or a dimension do not fit; it says which op the recipe needs.
    """
    if DATATYPES[spec.dtype] != wanted.datatype:
        raise BadRequest(
            f"{wanted.name} takes {wanted.datatype}, the recipe makes {DATATYPES[spec.dtype]}: "
            "end the recipe with a cast op"
        )
    shape = (1,) * (len(wanted.shape) - len(spec.shape)) + spec.shape
    if len(shape) != len(wanted.shape):
        raise BadRequest(
            f"{wanted.name} takes {len(wanted.shape)} dimensions, the recipe makes {len(shape)}: use another recipe"
        )
    if any(takes not in (-1, has) for takes, has in zip(wanted.shape, shape, strict=True)):
        raise BadRequest(
            f"{wanted.name} takes {list(wanted.shape)}, the recipe makes {list(shape)}: add a crop_pad op to it"
        )
    return shape


class Answer:
    """Triton's answer: its status and headers are here, its body is read once, whole or in chunks.

    ``nbytes``: how long the whole body is; None if Triton does not say.
    """

    def __init__(
        self,
        status: int,
        headers: CIMultiDict[str] | CIMultiDictProxy[str],
        nbytes: int | None,
        content: asyncio.StreamReader | aiohttp.StreamReader,
        release: Callable[[], object],
    ) -> None:
        self.status = status
        self.headers = headers
        self.nbytes = nbytes
        self._content = content
        self._release = release

    async def start(self, limit: int) -> bytes:
        """The first ``limit`` bytes of the body, or all of a shorter one. Raises: TritonDown."""
        if self.nbytes is not None:
            limit = min(limit, self.nbytes)
        with _mapped():
            try:
                return await self._content.readexactly(limit)
            except asyncio.IncompleteReadError as error:
                return error.partial

    async def read(self) -> bytes:
        """What is left of the body. Raises: TritonDown."""
        with _mapped():
            return await self._content.read()

    async def chunks(self) -> AsyncIterator[bytes]:
        """What is left of the body, bit by bit. Raises: TritonDown."""
        with _mapped():
            while chunk := await self._content.read(_CHUNK):
                yield chunk

    async def message(self) -> str:
        """Triton's own words for an error. Nothing is left of the answer then."""
        try:
            text = (await self.read()).decode(errors="replace")
        finally:
            self.close()
        try:
            return str(json.loads(text)["error"])
        except (ValueError, LookupError, TypeError):
            return text or f"Triton answered with status {self.status}"

    def close(self) -> None:
        """Let go of the connection; one whose body was read to its end is kept for the next call."""
        self._release()


class Begun(Protocol[T_co]):
    """A call to Triton that is under way, and goes on whoever waits for it."""

    async def result(self) -> T_co:
        """What it ends with. Who is cancelled meanwhile may ask again.

        Raises: TritonRefused, TritonLost.
        """


class Posted:
    """An inference over HTTP that is under way; ``refused`` is called if Triton refuses it."""

    def __init__(self, connection: Connection, refused: Callable[[], None]) -> None:
        self._connection = connection
        self._refused = refused
        self._answer: Answer | None = None

    async def result(self) -> Answer:
        """See ``Begun``."""
        answer = self._answer
        if answer is not None:  # whoever asked first has left while the refusal was read
            raise TritonRefused("Triton refused it", answer.status)
        reply = await self._connection.reply()
        answer = Answer(reply.status, reply.headers, reply.nbytes, reply.content, reply.release)
        if answer.status != 200:
            self._answer = answer
            self._refused()
            raise TritonRefused(await answer.message(), answer.status)
        return answer


#: Seconds in which a server that is ready says so: what asks tells of other things too.
_READY_S: Final = 2.0


class Server:
    """One Triton server, and the arena as it knows it."""

    def __init__(
        self,
        name: str,
        settings: ServerSettings,
        arena: "Arena",
        *,
        observer: Observer,
        session: aiohttp.ClientSession,
        quarantine_s: float,
    ) -> None:
        self.name = name
        self.settings = settings
        self.registered = False
        self._arena = arena
        self._observer = observer
        self._session = session
        self._connections = Connections(settings.url)
        self._quarantine_s = quarantine_s
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}
        self._batches: dict[tuple[str, str], bool] = {}
        self._registering: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        self._awaited = 0  # calls whose caller waits for them itself
        self._quarantined: set[asyncio.Task[None]] = set()
        self._works: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Server {self.name}: {self.calls} calls on the arena, {self.quarantined} in quarantine>"

    @property
    def grpc(self) -> str:
        """Host and port of its gRPC API."""
        return self.settings.grpc or f"{urlsplit(self.settings.url).hostname}:8001"

    @property
    def calls(self) -> int:
        """Calls under way that may read the arena."""
        return self._awaited + len(self._calls)

    @property
    def quarantined(self) -> int:
        """Calls that broke off, and may still read the arena."""
        return len(self._quarantined)

    async def close(self) -> None:
        """Break off the calls on the arena and have Triton forget it: only when nothing will be put there any more."""
        tasks = [
            *self._works,
            *self._calls,
            *self._quarantined,
            *([self._registering] if self._registering is not None else []),
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._connections.close()
        with contextlib.suppress(TritonDown):
            (await self.request("POST", f"/v2/systemsharedmemory/region/{self._arena.region}/unregister")).close()

    # ------------------------------------------------------------------ asking

    async def ready(self) -> bool:
        """Whether Triton answers, within some seconds, and has all its models."""
        try:
            async with asyncio.timeout(_READY_S):
                answer = await self.request("GET", "/v2/health/ready")
        except (TritonDown, TimeoutError):
            return False
        answer.close()
        return answer.status == 200

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """What the model takes and gives; remembered until Triton restarts or refuses a request for the model.

        Raises: TritonDown, TritonRefused.
        """
        known = self._metadata.get((model, version))
        if known is None:
            known = msgspec.json.decode(await self.get(model_path(model, version)), type=ModelMetadata)
            self._metadata[model, version] = known
        return known

    async def batches(self, model: str, version: str = "") -> bool:
        """Whether the model's tensors begin with a batch dimension. Remembered as metadata is.

        Raises: TritonDown, TritonRefused.
        """
        known = self._batches.get((model, version))
        if known is None:
            config = msgspec.json.decode(await self.get(model_path(model, version, "config")))
            known = self._batches[model, version] = config.get("max_batch_size", 0) > 0
        return known

    def has(self, model: str) -> bool:
        """Whether it is known to have the model."""
        return any(name == model for name, _ in self._metadata)

    def forget(self, model: str | None = None) -> None:
        """Ask anew for what is known of a model, or of all."""
        for known in [each for each in self._metadata if model in (None, each[0])]:
            del self._metadata[known]
            self._batches.pop(known, None)

    async def get(self, path: str) -> bytes:
        """The body of a successful GET. Raises: TritonDown, TritonRefused."""
        answer = await self.request("GET", path)
        if answer.status != 200:
            raise TritonRefused(await answer.message(), answer.status)
        return await answer.read()

    async def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | AsyncIterator[bytes | memoryview] | None = None,
    ) -> Answer:
        """Send any request on to Triton; ``path`` is quoted already. Streamed bodies come with a Content-Length header.

        Raises:
            TritonDown: it is not reachable.
            TritonLost: it broke off.
        """
        if isinstance(body, bytes) and len(body) > _CHUNK:  # in one piece it would hold up the loop
            headers = {**(headers or {}), "Content-Length": str(len(body))}
            body = _sliced(body)
        with _mapped():
            response = await self._session.request(
                method, _url(self.settings.url, path), headers=headers, data=body, allow_redirects=False
            )
        return Answer(response.status, response.headers, response.content_length, response.content, response.release)

    async def post(self, model: str, path: str, head: bytes, tail: bytes) -> "Posted":
        """Send an inference: its JSON, and the binary tensors behind it. Raises: TritonDown."""
        told = f"Content-Type: application/octet-stream\r\n{HEAD_LENGTH}: {len(head)}\r\n"
        told += "".join(f"{name}: {value}\r\n" for name, value in current().told)
        return Posted(await self._connections.post(path, told, head + tail), lambda: self.forget(model))

    # ------------------------------------------------------------------ the arena

    async def register(self) -> None:
        """Tell Triton where the arena is. Harmless when it knows; who asks meanwhile waits for the same answer.

        Raises:
            TritonDown: it is not reachable.
            TritonRefused: it cannot open the arena.
        """
        if self._registering is None:
            self._registering = asyncio.create_task(self._register())
            self._registering.add_done_callback(self._registered)
        await asyncio.shield(self._registering)

    def _registered(self, task: "asyncio.Task[None]") -> None:
        self._registering = None
        if not task.cancelled():
            self.registered = task.exception() is None

    async def _register(self) -> None:
        began = time.perf_counter()
        self.registered = False
        self.forget()
        place = urlsplit(self.settings.url)
        address = (place.hostname or "", place.port or 80)
        self._process = await asyncio.to_thread(listener, address)
        answer = await self.request(
            "POST",
            f"/v2/systemsharedmemory/region/{self._arena.region}/register",
            body=msgspec.json.encode({"key": self._arena.shm, "offset": 0, "byte_size": self._arena.nbytes}),
        )
        if answer.status == 200:
            answer.close()
        elif "already" not in (message := self._arena.unnamed(await answer.message())):
            raise TritonRefused(f"Triton cannot use the arena: {message}", answer.status)
        if self._process is not None and not self._process.lives:  # it ended between the look and the answer
            self._process = await asyncio.to_thread(listener, address)
        self._observer.stage("register", time.perf_counter() - began)

    def maps(self, path: str) -> bool:
        """Whether Triton has the file mapped, as far as we may know."""
        return self._process is not None and bool(self._process.maps(path))

    async def keep_registered(self) -> None:
        """Have Triton know the arena as soon as it runs, and again after each restart. It never returns.

        So no request has to pay for it, or to wait for a Triton that starts slowly. What nobody can see from here (a
        client of Triton's own that unregisters everything) the next request repairs.
        """
        delay = _FIRST_TRY_S
        while True:
            try:
                if not self.registered:
                    await self.register()
                delay = _FIRST_TRY_S
                if self._process is None:
                    await asyncio.sleep(_LAST_TRY_S)
                    self.registered = await self._knows_arena()
                    continue
                await self._process.ended()
                self.registered = False
                self.forget()
            except VoxcacheError:
                # jitter, so that several servers, and several daemons, do not all knock at once
                await asyncio.sleep(delay * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
                delay = min(delay * 2, _LAST_TRY_S)

    async def _knows_arena(self) -> bool:
        answer = await self.request("GET", f"/v2/systemsharedmemory/region/{self._arena.region}/status")
        answer.close()
        return answer.status == 200

    async def on_arena(
        self, begin: Callable[[], Awaitable[Begun[T]]], release: Callable[[], None], discard: Callable[[T], None]
    ) -> T:
        """The result of a call that reads the arena; it is begun once more if Triton did not know the arena.

        ``release`` is called once, when Triton is done with the tensors, also if the caller has long gone: then
        ``discard`` gets the late result. After a broken connection, that is when the process that was asked has ended.

        Raises: what the call raises, without the region's name.
        """
        asked: Process | None = None

        async def begun() -> Begun[T]:
            nonlocal asked
            asked = self._process
            return await begin()

        with _released_on_error(release):
            call = await begun()
        self._awaited += 1
        try:
            # no task for it: that would take as long as all else that is done here
            result = await call.result()
        except asyncio.CancelledError:
            # the caller has left: the call goes on, and so does Triton, reading
            held = self.hold(call.result(), release, lambda: asked)
            held.add_done_callback(lambda ended: _discarded(ended, discard))
            raise
        except VoxcacheError as error:
            return await self.held(self._repaired(begun, error, asked), release, discard, lambda: asked)
        except BaseException:
            release()
            raise
        finally:
            self._awaited -= 1
        release()
        return result

    async def held(
        self,
        call: Coroutine[Any, Any, T],
        release: Callable[[], None],
        discard: Callable[[T], None],
        asked: Callable[[], Process | None] | None = None,
    ) -> T:
        """The result of ``call``, held as by ``hold``. A cancelled caller leaves it going: ``discard`` gets it then."""
        task = self.hold(call, release, asked)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda ended: _discarded(ended, discard))
            raise

    def hold(
        self,
        call: Coroutine[Any, Any, T],
        release: Callable[[], None],
        asked: Callable[[], Process | None] | None = None,
    ) -> "asyncio.Task[T]":
        """Run ``call`` whoever waits for it, and ``release`` when Triton is done with what it reads.

        ``asked`` tells which process that was asked of, as far as it is known; by default, that it is asked now.
        """
        task = asyncio.create_task(call)
        self._calls.add(task)
        now = self._process

        def ended(_: object) -> None:
            self._calls.discard(task)
            if not task.cancelled() and isinstance(task.exception(), TritonLost):
                # by now another may run, or be looked for: that one's end says nothing
                self._keep_apart(release, (now if asked is None else asked()) or self._process)
            else:
                release()

        task.add_done_callback(ended)
        return task

    def background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run ``work`` until it ends, or this is closed."""
        task = asyncio.create_task(work)
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return task

    @property
    def arena_region(self) -> str:
        """The arena's secret name, for what is sent to Triton alone."""
        return self._arena.region

    def unnamed(self, message: str) -> str:
        """The message without the secret name."""
        return self._arena.unnamed(message)

    async def _repaired(
        self, begin: Callable[[], Awaitable[Begun[T]]], error: VoxcacheError, asked: Process | None
    ) -> T:
        """The result of another try, if the first, which was ``asked``, ended with an ``error`` that calls for one.

        Raises: what is left.
        """
        try:
            if isinstance(error, TritonRefused):
                if self._arena.region not in str(error):
                    raise error
            # a connection that was open from before a restart: nothing reads any more, so it may be asked again
            elif not isinstance(error, TritonLost) or asked is None or asked.lives:
                raise error
            await self.register()  # a Triton that has restarted does not know the arena
            return await (await begin()).result()
        except TritonRefused as refusal:
            raise TritonRefused(self._arena.unnamed(str(refusal)), refusal.status) from None

    def _keep_apart(self, release: Callable[[], None], asked: Process | None) -> None:
        self._observer.count("triton_quarantines")
        task = asyncio.create_task(self._gone(asked))
        self._quarantined.add(task)
        task.add_done_callback(self._quarantined.discard)
        task.add_done_callback(lambda _: release())

    async def _gone(self, process: Process | None) -> None:
        if process is None:
            await asyncio.sleep(self._quarantine_s)
        else:
            await process.ended()


_FIRST_TRY_S: Final = 0.05
_LAST_TRY_S: Final = 5.0


class Arena(msgspec.Struct, frozen=True):
    """The shared memory as Triton is told of it: its key, its length in bytes, and its secret name there."""

    shm: str
    nbytes: int
    region: str

    def unnamed(self, message: str) -> str:
        """The message without the secret name."""
        return message.replace(self.region, "arena")


class Triton:
    """The Triton servers of the node.

    The region's name is random, so that it cannot be guessed, and new at every start, so that Triton never takes an
    earlier arena for this one. Nothing here tells it to anybody but Triton.
    """

    def __init__(
        self, settings: TritonSettings, shm: str, nbytes: int, observer: Observer, session: aiohttp.ClientSession
    ) -> None:
        self.settings = settings
        self.arena = Arena(shm, nbytes, f"voxcache-{secrets.token_hex(16)}")
        self._session = session
        alone = {"triton": ServerSettings(settings.url, settings.grpc)} if settings.url else {}
        self.servers = tuple(
            Server(name, each, self.arena, observer=observer, session=session, quarantine_s=settings.quarantine_s)
            for name, each in (settings.servers or alone).items()
        )
        self._keepers: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<Triton {list(self.servers) or 'none'}>"

    @classmethod
    async def open(cls, settings: TritonSettings, shm: str, nbytes: int, observer: Observer) -> Self:
        """Get ready to talk to Triton; it need not run yet. ``shm`` names the arena, ``nbytes`` long."""
        session = aiohttp.ClientSession(
            # Inference takes as long as it takes: an upstream deadline would free bytes that are still being read.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            connector=aiohttp.TCPConnector(limit=0),
            # Asked for nothing else, Triton sends bodies as they are; compressing volumes on loopback helps nobody.
            skip_auto_headers=("Accept-Encoding", "User-Agent", "Content-Type"),
            auto_decompress=False,
            read_bufsize=_CHUNK,
        )
        return cls(settings, shm, nbytes, observer, session)

    def keep_registered(self) -> None:
        """From now on, have every server know the arena as soon as it runs."""
        self._keepers = [asyncio.create_task(server.keep_registered()) for server in self.servers]

    async def close(self) -> None:
        """Break off the calls on the arena and have Triton forget it: only when nothing will be put there any more."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self.servers))
        await self._session.close()

    # ------------------------------------------------------------------ asking

    def first(self) -> Server:
        """The server that answers what is asked of none in particular. Raises: TritonDown if there is none."""
        if not self.servers:
            raise TritonDown("no Triton is configured: set triton.url")
        return self.servers[0]

    async def of(self, model: str) -> Server:
        """The server that has the model; of several, the one with the fewest calls on the arena.

        A model that none has is asked of the first, whose refusal says so.

        Raises:
            TritonDown: none is configured, or none of those that answer has it.
        """
        first = self.first()
        if len(self.servers) == 1:
            return first
        known = [server for server in self.servers if server.has(model)]
        if not known:
            found = await asyncio.gather(*(server.metadata(model) for server in self.servers), return_exceptions=True)
            for error in found:
                if isinstance(error, BaseException) and not isinstance(error, VoxcacheError):
                    raise error
            known = [server for server in self.servers if server.has(model)]
            if not known:
                down = next((error for error in found if isinstance(error, TritonDown)), None)
                if down is not None:
                    raise TritonDown(f"no Triton that answers has {model!r}, and one does not: {down}")
                return first
        return min(known, key=lambda server: server.calls)

    async def ready(self) -> bool:
        """Whether every server answers and has all its models."""
        return bool(self.servers) and all(await asyncio.gather(*(server.ready() for server in self.servers)))

    async def checks(self) -> dict[str, bool]:
        """What is there and what is missing, by name: each server, and the arena as each knows it."""
        if not self.servers:
            return {"triton": False}
        found = await asyncio.gather(*(server.ready() for server in self.servers))
        alone = len(self.servers) == 1
        checks: dict[str, bool] = {}
        for server, ready in zip(self.servers, found, strict=True):
            name = "triton" if alone else f"triton.{server.name}"
            checks |= {name: ready, f"{name}.arena": ready and server.registered}
        return checks

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """What the model takes and gives; remembered until Triton restarts or refuses a request for the model.

        Raises: TritonDown, TritonRefused.
        """
        return await (await self.of(model)).metadata(model, version)

    def forget(self, model: str) -> None:
        """The model was loaded anew: ask what it takes and gives when that is needed next."""
        for server in self.servers:
            server.forget(model)

    # ------------------------------------------------------------------ the arena

    def is_arena(self, region: object = None, key: object = None) -> bool:
        """Whether a client's region name, or shared-memory key, means the arena."""
        return region == self.arena.region or (isinstance(key, str) and key.lstrip("/") == self.arena.shm.lstrip("/"))

    async def infer(
        self,
        model: str,
        version: str,
        head: InferHead,
        tail: bytes,
        *,
        bound: Mapping[str, Bound],
        release: Callable[[], None],
    ) -> Answer:
        """Run a model on tensors in the arena.

        ``head`` and ``tail`` hold the other inputs as they were sent; ``bound`` says by name which inputs the tensors
        are. ``release`` is called once, when Triton is done with the tensors, also if the caller has long gone.

        Raises:
            BadRequest: a tensor does not fit its input.
            TritonDown: it is not reachable.
            TritonLost: it broke off.
            TritonRefused: its own refusal.
        """
        with _released_on_error(release):
            server = await self.of(model)
            inputs = self.arena_inputs(await server.metadata(model, version), bound)
        text = msgspec.json.encode(msgspec.structs.replace(head, inputs=(*head.inputs, *inputs)))
        path = model_path(model, version, "infer")

        return await server.on_arena(lambda: server.post(model, path, text, tail), release, lambda late: late.close())

    def arena_inputs(self, metadata: ModelMetadata, bound: Mapping[str, Bound]) -> list[InferInput]:
        """The inputs that lie in the arena, as a request tells of them. Raises: BadRequest."""
        wanted = {each.name: each for each in metadata.inputs}
        inputs = []
        for name, tensor in bound.items():
            if name not in wanted:
                raise BadRequest(f"{metadata.name!r} has no input {name!r}")
            place = {
                "shared_memory_region": self.arena.region,
                "shared_memory_offset": tensor.offset,
                "shared_memory_byte_size": tensor.spec.nbytes,
            }
            inputs.append(InferInput(name, wanted[name].datatype, fitted(tensor.spec, wanted[name]), place))
        return inputs


@contextlib.contextmanager
def _released_on_error(release: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        release()
        raise


@functools.lru_cache(maxsize=1024)
def model_path(model: str, version: str = "", *rest: str) -> str:
    """Where a model is in Triton's API, quoted."""
    parts = ["models", model, *(["versions", version] if version else []), *rest]
    return "/v2/" + "/".join(quote(part, safe="") for part in parts)


def passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The headers of a client's request that are for Triton: not the ones about this connection, or about us."""
    passed = {name: value for name, value in headers.items() if name.lower() not in _OURS}
    return CIMultiDict([*passed.items(), *current().told])


_OURS: Final = frozenset(
    {
        *("authorization", "cookie", "proxy-authorization"),
        *NAMES,
        *("accept-encoding", "content-encoding", "content-length", "expect", "host"),
        *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)


@functools.lru_cache(maxsize=1024)
def _url(server: str, path: str) -> URL:
    return URL(server.rstrip("/") + path, encoded=True)


async def _sliced(body: bytes) -> AsyncIterator[memoryview]:
    view = memoryview(body)
    for start in range(0, len(body), _CHUNK):
        yield view[start : start + _CHUNK]


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise TritonDown(f"Triton does not answer: {error}") from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise TritonLost(f"Triton broke off: {error or type(error).__name__}") from error


def _discarded(task: "asyncio.Task[T]", discard: Callable[[T], None]) -> None:
    if not task.cancelled() and task.exception() is None:
        discard(task.result())
