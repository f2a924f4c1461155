"""Triton's gRPC API as the daemon calls it: bytes in, bytes out, and errors told apart by what they mean for a pin."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio

from cache.errors import TritonDown, TritonLost, VoxcacheError
from serving.triton import Server

from .status import refused

SERVICE: Final = "inference.GRPCInferenceService"

Metadata = tuple[tuple[str, str | bytes], ...]

_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # a Triton that comes back is found soon
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    # upstream calls have no deadline, and none is made again behind our back
    ("grpc.enable_retries", 0),
)
# What a code leaves open: whether Triton has said so, or the connection ended and this side made it up. grpc tells no
# difference, so words decide, and then whether the connection is still there: in doubt, Triton may still be reading.
_UNCLEAR: Final = frozenset(
    {
        *(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN),
        *(grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED),
    }
)
_NEVER_SENT: Final = ("failed to connect", "dns resolution", "name resolution")
_BROKEN: Final = ("stream removed", "socket closed", "rst_stream", "goaway", "broken pipe", "connection reset", "eof")


class Begun:
    """A unary call that is under way, and goes on whoever waits for it."""

    def __init__(self, call: Any, mapped: Callable[[grpc.aio.AioRpcError], VoxcacheError]) -> None:
        self._call = call
        self._mapped = mapped
        self._waiter: asyncio.Future[None] | None = None
        call.add_done_callback(self._ended)

    async def result(self) -> bytes:
        """Its answer. Who is cancelled meanwhile may ask again. Raises: as ``Upstream.unary``."""
        if not self._call.done():
            # the call itself would be cancelled with whoever awaits it
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        try:
            answer: bytes = await self._call
        except grpc.aio.AioRpcError as error:
            raise self._mapped(error) from None
        return answer

    def _ended(self, _: object) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Upstream:
    """Channels to the Triton servers, made when they are first needed."""

    def __init__(self) -> None:
        self._channels: dict[Server, grpc.aio.Channel] = {}
        self._calls: dict[tuple[Server, str], Any] = {}

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    async def unary(self, server: Server, method: str, request: bytes, metadata: Metadata = ()) -> bytes:
        """One call, without a deadline.

        Raises:
            TritonRefused: Triton's own refusal.
            TritonDown: it is not reachable.
            TritonLost: it broke off.
        """
        try:
            answer: bytes = await self._called(server, method, request, metadata)
        except grpc.aio.AioRpcError as error:
            raise self.mapped(server, error) from None
        return answer

    def begin(self, server: Server, method: str, request: bytes, metadata: Metadata = ()) -> "Begun":
        """The same call, which goes on though its caller leaves."""
        return Begun(self._called(server, method, request, metadata), lambda error: self.mapped(server, error))

    def _called(self, server: Server, method: str, request: bytes, metadata: Metadata) -> Any:
        call = self._calls.get((server, method))
        if call is None:
            call = self._calls[server, method] = self._channel(server).unary_unary(f"/{SERVICE}/{method}")
        return call(request, metadata=metadata)

    def stream(self, server: Server, metadata: Metadata = ()) -> Any:
        """A ModelStreamInfer call, to write to and read from; what it raises is for ``mapped``."""
        return self._channel(server).stream_stream(f"/{SERVICE}/ModelStreamInfer")(metadata=metadata)

    def _channel(self, server: Server) -> grpc.aio.Channel:
        if server not in self._channels:
            self._channels[server] = grpc.aio.insecure_channel(server.grpc, options=_OPTIONS)
        return self._channels[server]

    def mapped(self, server: Server, error: grpc.aio.AioRpcError) -> VoxcacheError:
        """What a call's error means."""
        said = error.details() or ""
        words = said.lower()
        if error.code() is grpc.StatusCode.UNAVAILABLE and any(each in words for each in _NEVER_SENT):
            return TritonDown(f"Triton does not answer: {said}")
        ready = self._channel(server).get_state() is grpc.ChannelConnectivity.READY
        if error.code() in _UNCLEAR and (not ready or any(each in words for each in _BROKEN)):
            return TritonLost(f"Triton broke off: {said}")
        return refused(error.code(), said)
