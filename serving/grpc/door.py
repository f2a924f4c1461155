"""The gRPC server: what a client says is passed on unread, unless it names a virtual model or shared memory."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Final, NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio
import msgspec
from aiohttp import web
from tritonclient.grpc import service_pb2

from cache.errors import ConfigError, Forbidden, NotFound, VoxcacheError
from cache.stopwatch import Stopwatch, current, timing
from serving.api.problem import status_of
from serving.api.timing import server_timing
from serving.binding import Binder
from serving.front import Front
from serving.log import logger
from serving.recorder import Recorder
from serving.references import SUFFIX, Asked, check_settings, is_reference, split_name, takes, virtual_metadata
from serving.regions import Client, Kind
from serving.results import INDIFFERENT
from serving.tracing import NAMES as TRACE
from serving.triton import ModelMetadata

from . import codec
from .status import code_of, trailers_of
from .stream import Stream
from .upstream import SERVICE, Begun, Metadata, Upstream

_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, and not shared with who has it
)
#: Requests that are remembered, each no longer than this.
_REMEMBERED: Final = 1024
_SHORT: Final = 4096
_OURS: Final = frozenset({"authorization", "cookie", "user-agent", "te", "content-type"})

Context = Any  # grpc publishes no types
Answer = Callable[[bytes, Context], Awaitable[bytes]]


class GrpcSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The gRPC door.

    host: address it listens on. Leave it on loopback unless something in front checks who asks.
    port: its port; 0 takes a free one, and -1 leaves the door shut.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=-1, le=65535)] = 8601


class _Read(msgspec.Struct, frozen=True):
    """What a request asks of a model with this metadata, and what is left of it without its references."""

    metadata: ModelMetadata
    asked: Asked
    rest: bytes
    nameless: bytes  # the same without an id
    question: bytes
    raw: list[memoryview]


class _Known:
    """A request that was read. Clients ask the same again, word for word: then it need not be read again."""

    def __init__(self, request: codec.Request, head: Any) -> None:
        self.request = request
        self.head = head
        self.model, self.by_ref = split_name(request.model)
        self.parameters = codec.parameters(head.parameters)
        self.priority = _number(self.parameters.get("priority"))
        self._read: _Read | None = None

    def understood(self, binder: Binder, metadata: ModelMetadata) -> _Read:
        """What it asks. Raises: BadRequest."""
        if self._read is None or self._read.metadata is not metadata:
            given = codec.given(self.head, self.request.raw)
            asked = binder.asked(metadata, given, self.parameters, by_ref=self.by_ref)
            rest, raw = codec.without(self.head, self.request.raw, asked, self.model)
            named = bytes(rest.SerializeToString())
            rest.id = ""
            question = codec.question(rest, raw, INDIFFERENT)
            self._read = _Read(metadata, asked, named, bytes(rest.SerializeToString()), question, raw)
        return self._read


class GrpcDoor:
    """KServe over gRPC, before the same front as HTTP."""

    def __init__(self, front: Front, recorder: Recorder, *, drain_s: float) -> None:
        self.port = 0
        self._front = front
        self._triton = front.triton
        self._recorder = recorder
        self._drain_s = drain_s
        self._upstream = Upstream()
        self._server: grpc.aio.Server | None = None
        self._before: dict[bytes, _Known] = {}

    async def listen(self, settings: GrpcSettings, app: web.Application | None = None) -> None:
        """Answer calls, until ``app`` drains.

        Raises:
            ConfigError: the address is taken, or is none of this machine's.
        """
        self._server = grpc.aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, self._handlers())])
        try:
            self.port = self._server.add_insecure_port(f"{settings.host}:{settings.port}")
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {settings.host}:{settings.port} (grpc)") from error
        await self._server.start()
        if app is not None:
            app.on_shutdown.append(self._drain)

    async def close(self) -> None:
        """End what is still under way."""
        if self._server is not None:
            await self._server.stop(None)
        await self._upstream.close()

    async def _drain(self, app: web.Application) -> None:
        if self._server is not None:
            await self._server.stop(self._drain_s)

    # ------------------------------------------------------------------ calls and their answers

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        own: dict[str, Answer] = {
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._metadata,
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "ModelInfer": self._infer,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._control("RepositoryModelLoad"),
            "RepositoryModelUnload": self._control("RepositoryModelUnload"),
            "TraceSetting": self._trace,
            "LogSettings": self._log,
            **{
                f"{kind.capitalize()}SharedMemory{verb}": handler(kind)
                for kind in ("system", "cuda")
                for verb, handler in (
                    ("Status", self._regions),
                    ("Register", self._register),
                    ("Unregister", self._unregister),
                )
            },
        }
        passed = {name: self._passed(name) for name in ("ServerLive", "ServerMetadata")}
        unary = {
            name: grpc.unary_unary_rpc_method_handler(self._answering(name, answer))
            for name, answer in (own | passed).items()
        }
        return unary | {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream)}

    def _answering(self, name: str, answer: Answer) -> Answer:
        """The handler that turns errors into codes, counts every answer, and logs the slow and the failed."""
        route = f"/{SERVICE}/{name}"

        async def handle(request: bytes, context: Context) -> bytes:
            watch = self._begin(context)
            status = 499
            try:
                result = await answer(request, context)
                status = 200
                context.set_trailing_metadata((*(context.trailing_metadata() or ()), _timing(watch)))
            except VoxcacheError as error:
                status = status_of(error)
                await self._refuse(route, error, context)
            except asyncio.CancelledError:  # the client left, or its deadline passed
                raise
            except Exception:
                status = 500
                logger().exception("request broke", route=route)
                await self._refuse(route, VoxcacheError("voxcache failed in a way its log says more of"), context)
            finally:
                self._answered(route, context, status, watch)
            return result

        return handle

    async def _refuse(self, route: str, error: VoxcacheError, context: Context) -> NoReturn:
        if status_of(error) >= 500:
            logger().warning("request failed", route=route, code=error.code, detail=str(error))
        await context.abort(code_of(error), str(error), (*trailers_of(error), _timing(current())))
        raise AssertionError  # abort raises

    def _begin(self, context: Context) -> Stopwatch:
        metadata = context.invocation_metadata() or ()
        watch = self._recorder.begin({name: value for name, value in metadata if name in TRACE})
        timing(watch)
        return watch

    def _answered(self, route: str, context: Context, status: int, watch: Stopwatch, *, endless: bool = False) -> None:
        tier = next((value for name, value in context.trailing_metadata() or () if name == "voxcache-tier"), "none")
        self._recorder.answered(route, str(tier), status, watch, endless=endless)

    # ------------------------------------------------------------------ passed on

    def _passed(self, method: str) -> Answer:
        async def answer(request: bytes, context: Context) -> bytes:
            return await self._upstream.unary(self._triton.first(), method, request, passed_on(context))

        return answer

    async def _server_ready(self, request: bytes, context: Context) -> bytes:
        """Of several servers, the answer of the first that is not ready."""
        answer = b""
        for server in self._triton.servers or (self._triton.first(),):
            answer = await self._upstream.unary(server, "ServerReady", request)
            if not service_pb2.ServerReadyResponse.FromString(answer).ready:
                break
        return answer

    async def _index(self, request: bytes, context: Context) -> bytes:
        """Answers of several servers are one, written one behind the other."""
        self._triton.first()
        answers = [await self._upstream.unary(each, "RepositoryIndex", request) for each in self._triton.servers]
        return b"".join(answers)

    def _control(self, method: str) -> Answer:
        async def answer(request: bytes, context: Context) -> bytes:
            if not self._triton.settings.model_control:
                raise Forbidden("models are loaded and unloaded by whoever runs Triton (triton.model_control)")
            asked = service_pb2.RepositoryModelLoadRequest.FromString(request)
            try:
                return await self._upstream.unary(await self._triton.of(asked.model_name), method, request)
            finally:
                self._front.loaded(asked.model_name)

        return answer

    async def _trace(self, request: bytes, context: Context) -> bytes:
        asked = service_pb2.TraceSettingRequest.FromString(request)
        check_settings(asked.settings)
        if asked.model_name:
            asked.model_name, _ = split_name(asked.model_name)
            server = await self._triton.of(asked.model_name)
            return await self._upstream.unary(server, "TraceSetting", asked.SerializeToString())
        return await self._everywhere("TraceSetting", request)

    async def _log(self, request: bytes, context: Context) -> bytes:
        check_settings(service_pb2.LogSettingsRequest.FromString(request).settings)
        return await self._everywhere("LogSettings", request)

    async def _everywhere(self, method: str, request: bytes) -> bytes:
        """The first server's answer to what every server is told."""
        self._triton.first()
        answers = [await self._upstream.unary(server, method, request) for server in self._triton.servers]
        return answers[0]

    # ------------------------------------------------------------------ models

    async def _model_ready(self, request: bytes, context: Context) -> bytes:
        asked = service_pb2.ModelReadyRequest.FromString(request)
        asked.name, _ = split_name(asked.name)
        return await self._upstream.unary(
            await self._triton.of(asked.name), "ModelReady", asked.SerializeToString(), passed_on(context)
        )

    async def _metadata(self, request: bytes, context: Context) -> bytes:
        asked = service_pb2.ModelMetadataRequest.FromString(request)
        model, by_ref = split_name(asked.name)
        server = await self._triton.of(model)
        if not by_ref:
            return await self._upstream.unary(server, "ModelMetadata", request, passed_on(context))
        known = await server.metadata(model, asked.version)
        batches = await server.batches(model, asked.version)
        told = virtual_metadata(known, self._triton.settings.virtual(model), batches=batches)
        return bytes(codec.metadata_of(told).SerializeToString())

    async def _config(self, request: bytes, context: Context) -> bytes:
        asked = service_pb2.ModelConfigRequest.FromString(request)
        asked.name, by_ref = split_name(asked.name)
        server = await self._triton.of(asked.name)
        answer = await self._upstream.unary(server, "ModelConfig", asked.SerializeToString(), passed_on(context))
        if not by_ref:
            return answer
        declared = takes(await server.metadata(asked.name, asked.version), self._triton.settings.virtual(asked.name))
        told = codec.config_of(service_pb2.ModelConfigResponse.FromString(answer), declared)
        return bytes(told.SerializeToString())

    async def _statistics(self, request: bytes, context: Context) -> bytes:
        asked = service_pb2.ModelStatisticsRequest.FromString(request)
        asked.name, by_ref = split_name(asked.name)
        if not asked.name:
            self._triton.first()
            servers = self._triton.servers
            return b"".join([await self._upstream.unary(each, "ModelStatistics", request) for each in servers])
        server = await self._triton.of(asked.name)
        answer = await self._upstream.unary(server, "ModelStatistics", asked.SerializeToString(), passed_on(context))
        if not by_ref:
            return answer
        told = service_pb2.ModelStatisticsResponse.FromString(answer)
        for each in told.model_stats:
            each.name += SUFFIX
        return bytes(told.SerializeToString())

    # ------------------------------------------------------------------ inference

    async def _infer(self, body: bytes, context: Context) -> bytes:
        known = self._before.get(body)
        if known is not None:
            return await self._by_reference(known, context, keep=True)
        request = codec.Request.read(body)
        model, by_ref = split_name(request.model)
        if not by_ref and not request.names_memory:
            async with self._front.turn(deadline_s=context.time_remaining()):
                server = await self._triton.of(model)
                return await self._upstream.unary(server, "ModelInfer", body, passed_on(context))
        head = request.parsed()
        told = await self.own_regions(head, context) if request.names_memory else {}
        known = _Known(request, head)
        try:
            if not by_ref and not any(is_reference(each.region) for each in codec.given(head, request.raw)):
                async with self._front.turn(known.priority, context.time_remaining()):
                    server = await self._triton.of(model)
                    whole = request.written(head, request.raw)
                    return await self._upstream.unary(server, "ModelInfer", whole, passed_on(context))
            answer = await self._by_reference(known, context, keep=not told)
        except VoxcacheError as error:
            raise renamed(error, told) from None
        if len(body) <= _SHORT and not request.names_memory:
            if len(self._before) >= _REMEMBERED:
                self._before.clear()
            self._before[body] = known
        return answer

    async def _by_reference(self, known: "_Known", context: Context, *, keep: bool) -> bytes:
        who = self._front.audit.who.grpc(context)
        server = await self._triton.of(known.model)
        metadata = await server.metadata(known.model, known.request.version)
        read = known.understood(self._front.binder, metadata)
        name, request_id = (known.request.model if known.by_ref else "", "")
        rest = read.rest
        place = None
        if keep and self._front.keeps(known.model, known.parameters):
            # an answer is nobody's own: it is asked for, and kept, without an id
            rest, request_id = read.nameless, known.head.id
            place = await self._front.place(known.model, known.request.version, read.asked, "grpc", read.question)
        results = self._front.results
        if place is not None and results is not None and (kept := await results.find(place)) is not None:
            self._front.answered(known.model, read.asked, who)
            context.set_trailing_metadata((("voxcache-tier", kept.tier), ("voxcache-result", place.key.digest)))
            return codec.answer_of(name, kept.answer, request_id)
        binding = await self._front.bound(metadata, read.asked, who, known.priority, context.time_remaining())
        try:
            whole = codec.with_inputs(rest, self._triton.arena_inputs(metadata, binding.bound), read.raw)
        except BaseException:
            binding.release()
            raise
        metadata_on = passed_on(context)

        async def begin() -> Begun:
            return self._upstream.begin(server, "ModelInfer", whole, metadata_on)

        watch = current()
        with watch.stage("triton"):
            answer = await server.on_arena(begin, binding.release, lambda late: None)
        context.set_trailing_metadata((("voxcache-tier", binding.tier),))
        if place is not None and results is not None:
            results.keep(place, answer, watch.seconds)
        return codec.answer_of(name, answer, request_id)

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        route = f"/{SERVICE}/ModelStreamInfer"
        watch = self._begin(context)
        status = 499
        part = functools.partial(self._recorder.part, watch)
        stream = Stream(self._front, self._upstream, self, passed_on(context), part)
        try:
            async for answer in stream.answers(requests, context):
                yield answer
            status = 200
        except VoxcacheError as error:
            status = status_of(error)
            await self._refuse(route, error, context)
        finally:
            self._answered(route, context, status, watch, endless=True)

    async def own_regions(self, head: Any, context: Context) -> dict[str, str]:
        """Have a request name the client's own regions as Triton does; the client's names, by Triton's.

        Raises: NotFound for a region that is neither the client's nor a reference.
        """
        client = await self._client(context)
        return codec.rename_regions(head, lambda name: self._front.regions.real(client, name), is_reference)

    # ------------------------------------------------------------------ clients' own shared memory

    def _regions(self, kind: Kind) -> Answer:
        system = kind == "system"
        asks = service_pb2.SystemSharedMemoryStatusRequest if system else service_pb2.CudaSharedMemoryStatusRequest
        tells = service_pb2.SystemSharedMemoryStatusResponse if system else service_pb2.CudaSharedMemoryStatusResponse

        async def answer(request: bytes, context: Context) -> bytes:
            name = asks.FromString(request).name
            found = await self._front.regions.status(await self._client(context), kind, name)
            told = tells()
            for each in found:
                region = told.regions[each["name"]]
                for field, value in each.items():
                    if any(field == known.name for known in region.DESCRIPTOR.fields):
                        setattr(region, field, value)
            return bytes(told.SerializeToString())

        return answer

    def _register(self, kind: Kind) -> Answer:
        async def answer(request: bytes, context: Context) -> bytes:
            client = await self._client(context)
            if kind == "system":
                asked = service_pb2.SystemSharedMemoryRegisterRequest.FromString(request)
                body = {"key": asked.key, "offset": asked.offset, "byte_size": asked.byte_size}
            else:
                asked = service_pb2.CudaSharedMemoryRegisterRequest.FromString(request)
                handle = {"b64": asked.raw_handle.decode(errors="replace")}
                body = {"raw_handle": handle, "device_id": asked.device_id, "byte_size": asked.byte_size}
            await self._front.regions.register(client, kind, asked.name, body)
            return b""

        return answer

    def _unregister(self, kind: Kind) -> Answer:
        async def answer(request: bytes, context: Context) -> bytes:
            name = service_pb2.SystemSharedMemoryUnregisterRequest.FromString(request).name
            await self._front.regions.unregister(await self._client(context), kind, name)
            return b""

        return answer

    async def _client(self, context: Context) -> Client:
        scheme, _, place = context.peer().partition(":")
        host, _, port = unquote(place).rpartition(":")
        if scheme not in ("ipv4", "ipv6"):
            raise NotFound(f"shared memory of a client at {scheme}")
        return await self._front.clients.of((host.strip("[]"), int(port)), self.port)


def _timing(watch: Stopwatch) -> tuple[str, str]:
    if not watch.names:
        watch.lap("handle")
    return "server-timing", server_timing(watch.stages)


def passed_on(context: Context) -> Metadata:
    """The metadata of a client's call that is for Triton: not the one about this connection, or about us."""
    passed = (
        (name, value)
        for name, value in context.invocation_metadata() or ()
        if name not in _OURS and name not in TRACE and not name.startswith("grpc-")
    )
    return (*passed, *current().told)


def renamed(error: VoxcacheError, told: dict[str, str]) -> VoxcacheError:
    """The error with the client's own names for its regions."""
    text = str(error)
    for real, name in told.items():
        text = text.replace(real, name)
    error.args = (text,)
    return error


def _number(value: object) -> int:
    return int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else 0
