"""One client's stream of inferences: requests are passed on as they come, and answers as Triton gives them.

A tensor stays pinned until the last answer to its request has come, which Triton marks: decoupled models give none,
one or many. That is waited for also when the client has gone.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from cache.errors import TritonLost, VoxcacheError
from cache.stopwatch import Stopwatch, timing
from serving.front import Front
from serving.references import is_reference, split_name
from serving.triton import Server

from . import codec, wire
from .upstream import Metadata, Upstream

if TYPE_CHECKING:
    from .door import GrpcDoor

_FINAL: Final = "triton_final_response"
_ASKS_FOR_FINAL: Final = "triton_enable_empty_final_response"
#: Answers that may wait for the client to read them.
_AHEAD: Final = 16


class _Call:
    """A request by reference that Triton has not finished: whose it is, and what it was, for a second try."""

    def __init__(self, model: str, request_id: str, whole: bytes, *, wants_final: bool) -> None:
        self.model = model
        self.id = request_id
        self.whole = whole
        self.wants_final = wants_final
        self.tried_again = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        await self.over


class _Up:
    """The stream to one server, and what is unfinished on it, by the id that Triton knows it by."""

    def __init__(self, server: Server, call: Any) -> None:
        self.server = server
        self.call = call
        self.calls: dict[str, _Call] = {}
        self.told: dict[str, str] = {}  # clients' names for regions, by Triton's
        self.closing = False
        self._turn = asyncio.Lock()

    async def write(self, body: bytes) -> None:
        """Write one message: grpc takes one at a time, and both a client's requests and second tries are written."""
        async with self._turn:
            await self.call.write(body)

    async def close(self) -> None:
        """Write no more; what is unfinished may have to be written again first."""
        self.closing = True
        if not self.calls:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self.call.done_writing()

    async def end(self, request_id: str) -> None:
        """Triton has given its last answer to a request."""
        call = self.calls.pop(request_id)
        if not call.over.done():
            call.over.set_result(None)
        if self.closing:
            await self.close()


class Stream:
    """Answers of one stream. Each server that its models are on has a stream of its own, with the same life."""

    def __init__(
        self, front: Front, upstream: Upstream, door: "GrpcDoor", metadata: Metadata, part: Callable[[], Stopwatch]
    ) -> None:
        """``part`` begins the stopwatch of one of the stream's requests."""
        self._front = front
        self._part = part
        self._upstream = upstream
        self._door = door
        self._metadata = metadata
        self._ups: dict[Server, _Up] = {}
        self._reading: list[asyncio.Task[None]] = []
        self._out: asyncio.Queue[bytes | VoxcacheError | None] = asyncio.Queue(_AHEAD)
        self._gone = False
        self._prefix = secrets.token_hex(8)
        self._count = 0

    async def answers(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """What Triton answers, in the order in which it does. Raises: TritonDown, and what a request cannot be."""
        writing = asyncio.create_task(self._write_all(requests, context))
        try:
            while (answer := await self._out.get()) is not None:
                if isinstance(answer, VoxcacheError):
                    raise answer
                yield answer
        finally:
            self._gone = True
            writing.cancel()
            while not self._out.empty():  # whoever waits to put an answer there goes on
                self._out.get_nowait()
            await asyncio.gather(writing, return_exceptions=True)
            for up in self._ups.values():
                if up.calls:
                    await up.close()
                else:
                    up.call.cancel()

    # ------------------------------------------------------------------ client to Triton

    async def _write_all(self, requests: AsyncIterator[bytes], context: Any) -> None:
        try:
            async for body in requests:
                timing(self._part())
                try:
                    await self._write(body, context)
                except TritonLost:
                    break  # its reader says so
                except VoxcacheError as error:
                    await self._put(_refusal(body, error))
            for up in self._ups.values():
                await up.close()
            if self._reading:  # they go on if this is cancelled
                await asyncio.wait(self._reading)
            await self._put(None)
        except VoxcacheError as error:
            await self._put(error)

    async def _write(self, body: bytes, context: Any) -> None:
        request = codec.Request.read(body)
        model, by_ref = split_name(request.model)
        if not by_ref and not request.names_memory:
            await self._send(await self._up(model), body)
            return
        head = request.parsed()
        told = await self._door.own_regions(head, context) if request.names_memory else {}
        up = await self._up(model)
        up.told |= told
        given = codec.given(head, request.raw)
        if not by_ref and not any(is_reference(each.region) for each in given):
            await self._send(up, request.written(head, request.raw))
            return
        metadata = await up.server.metadata(model, request.version)
        parameters = codec.parameters(head.parameters)
        asked = self._front.binder.asked(metadata, given, parameters, by_ref=by_ref)
        rest, raw = codec.without(head, request.raw, asked, model)
        binding = await self._front.bound(metadata, asked, self._front.audit.who.grpc(context))
        try:
            inputs = self._front.triton.arena_inputs(metadata, binding.bound)
            self._count += 1
            rest.id = f"{self._prefix}-{self._count}"
            rest.parameters[_ASKS_FOR_FINAL].bool_param = True
            call = _Call(
                request.model,
                head.id,
                codec.with_inputs(rest.SerializeToString(), inputs, raw),
                wants_final=bool(parameters.get(_ASKS_FOR_FINAL)),
            )
        except BaseException:
            binding.release()
            raise
        up.calls[rest.id] = call
        # the pin is the server's from here on: it outlives this stream
        up.server.hold(call.run(), binding.release)
        await self._send(up, call.whole)

    async def _up(self, model: str) -> _Up:
        server = await self._front.triton.of(model)
        up = self._ups.get(server)
        if up is None:
            up = self._ups[server] = _Up(server, self._upstream.stream(server, self._metadata))
            self._reading.append(up.server.background(self._read_all(up)))
        return up

    async def _send(self, up: _Up, body: bytes) -> None:
        # a write that is cancelled takes the whole stream with it, and all that is still read on it
        writing = asyncio.create_task(up.write(body))
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.shield(writing)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise TritonLost("the stream to Triton has ended") from error

    # ------------------------------------------------------------------ Triton to client

    async def _read_all(self, up: _Up) -> None:
        failure: VoxcacheError | None = None
        try:
            async for answer in up.call:
                await self._answered(up, answer)
            if await up.call.code() is not grpc.StatusCode.OK:
                failure = TritonLost(f"Triton broke off: {await up.call.details()}")
        except grpc.aio.AioRpcError as error:
            failure = self._upstream.mapped(up.server, error)
        except asyncio.CancelledError:
            if not self._gone:
                failure = TritonLost("the stream to Triton was broken off")
        for call in up.calls.values():
            if not call.over.done():
                if failure is None:
                    call.over.set_result(None)
                else:
                    call.over.set_exception(failure)
        up.calls.clear()
        if failure is not None:
            await self._put(failure)

    async def _answered(self, up: _Up, answer: bytes) -> None:
        if not up.calls and not up.told:  # nothing here is ours
            await self._put(answer)
            return
        request_id, error = _looked_into(answer)
        call = up.calls.get(request_id)
        if call is None:
            for real, name in up.told.items():
                error = error.replace(real, name)
            await self._put(answer + wire.written(1, error.encode()) if error else answer)
            return
        if error:
            if up.server.arena_region in error and not call.tried_again:  # it has restarted, or was told to forget
                call.tried_again = True
                try:
                    await up.server.register()
                    await self._send(up, call.whole)
                except VoxcacheError as failed:
                    error = str(failed)
                else:
                    return
            await up.end(request_id)
            plain = up.server.unnamed(error)
            told = codec.stream_answer_of(answer, model=call.model, request_id=call.id)
            await self._put(told + wire.written(1, plain.encode()))
            return
        told, final, empty = _without_final(answer, keep=call.wants_final)
        if final:
            await up.end(request_id)
        if not empty or call.wants_final:
            await self._put(codec.stream_answer_of(told, model=call.model, request_id=call.id))

    async def _put(self, answer: bytes | VoxcacheError | None) -> None:
        if not self._gone:
            await self._out.put(answer)


def _looked_into(answer: bytes) -> tuple[str, str]:
    """The request's id and the error of a ModelStreamInferResponse."""
    view = memoryview(answer)
    request_id = error = ""
    for field in wire.fields(view):
        if field.kind != wire.BYTES:
            continue
        content = view[field.at : field.stop]
        if field.number == 1:
            error = bytes(content).decode(errors="replace")
        elif field.number == 2:
            for inner in wire.fields(content):
                if inner.number == 3 and inner.kind == wire.BYTES:
                    request_id = bytes(content[inner.at : inner.stop]).decode(errors="replace")
    return request_id, error


def _without_final(answer: bytes, *, keep: bool) -> tuple[bytes, bool, bool]:
    """The answer without the mark that we asked for; whether it was the last, and whether it holds nothing else."""
    if _FINAL.encode() not in answer:
        return answer, False, False
    told = service_pb2.ModelStreamInferResponse.FromString(answer)
    response = told.infer_response
    if _FINAL not in response.parameters:
        return answer, False, False
    final = response.parameters[_FINAL].bool_param
    empty = final and not response.outputs
    if not keep:
        del response.parameters[_FINAL]
    return bytes(told.SerializeToString()), final, empty


def _refusal(body: bytes, error: VoxcacheError) -> bytes:
    """What a stream says of a request that never reached Triton: as Triton says it, with the request's id."""
    told = service_pb2.ModelStreamInferResponse(error_message=str(error))
    with contextlib.suppress(VoxcacheError):
        head = codec.Request.read(body)
        told.infer_response.id = head.parsed().id
        told.infer_response.model_name = head.model
    return bytes(told.SerializeToString())
