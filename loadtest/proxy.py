"""The least that could stand between a client and Triton: an empty proxy in the frameworks that the daemon is made of.

python -m loadtest.proxy HTTP_PORT GRPC_PORT TRITON_URL TRITON_GRPC
"""

import asyncio
import sys
from typing import Any

import aiohttp
import grpc
import grpc.aio
import uvloop
from aiohttp import web

_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
_KEPT = ("Content-Type", "Inference-Header-Content-Length")


def application(url: str) -> web.Application:
    """Passes every request on to ``url``, and its answer back."""
    session: list[aiohttp.ClientSession] = []

    async def open_session(app: web.Application) -> None:
        session.append(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                skip_auto_headers=("Accept-Encoding", "User-Agent", "Content-Type"),
                auto_decompress=False,
            )
        )

    async def forward(request: web.Request) -> web.Response:
        headers = {name: request.headers[name] for name in _KEPT if name in request.headers}
        body = await request.read()
        async with session[0].request(request.method, url + request.raw_path, headers=headers, data=body) as answer:
            kept = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
            return web.Response(status=answer.status, headers=kept, body=await answer.read())

    app = web.Application(client_max_size=1 << 30)
    app.on_startup.append(open_session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


class Everything(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc publishes no types
    """Passes every unary call on over ``channel``."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._calls: dict[str, Any] = {}

    def service(self, details: Any) -> Any:
        call = self._calls.get(details.method)
        if call is None:
            call = self._calls[details.method] = self._channel.unary_unary(details.method)

        async def forward(request: bytes, context: Any) -> bytes:
            try:
                answer: bytes = await call(request)
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details())
            return answer

        return grpc.unary_unary_rpc_method_handler(forward)


async def serve(http_port: int, grpc_port: int, url: str, address: str) -> None:
    """Until the process is ended."""
    runner = web.AppRunner(application(url), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", http_port).start()
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers([Everything(channel)])
        server.add_insecure_port(f"127.0.0.1:{grpc_port}")
        await server.start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]))
