"""Traces: taken from clients, told on to Triton, named in metrics; spans where a collector wants them."""

import ast
import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving.demo.tritonserver import TritonServer, free_ports
from serving.tracing import Tracing, named
from serving.triton import TritonSettings
from tests.daemon import Bucket, Daemon
from tests.serving.doors import SERIES, SETTINGS, STUDY, Shelf, arena, before, volume

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@pytest.mark.parametrize(
    ("header", "trace", "sampled"),
    [
        (SAMPLED, TRACE, True),
        (UNSAMPLED, TRACE, False),
        (f" {SAMPLED} ", TRACE, True),
        (f"cc-{TRACE}-{PARENT}-09-what-is-to-come", TRACE, True),
        (f"00-{TRACE}-{PARENT}-01-more", "", False),
        (f"ff-{TRACE}-{PARENT}-01", "", False),
        (f"00-{'0' * 32}-{PARENT}-01", "", False),
        (f"00-{TRACE}-{'0' * 16}-01", "", False),
        (SAMPLED.upper(), "", False),
        ("nonsense", "", False),
    ],
)
def test_a_header_names_a_trace_or_none(header: str, trace: str, sampled: bool) -> None:
    """As the recommendation says; of later versions what is known of them is read."""
    found = named(header)
    assert (found.trace, found.sampled) == (trace, sampled) if found is not None else trace == ""


@pytest.mark.parametrize("state", ["vendor=é", "vendor=1\x0b", "vendor=\x7f"])
def test_what_no_header_may_hold_is_not_told_on(state: str) -> None:
    """The trace is known all the same; what Triton would be told of it is well-formed."""
    watch = Tracing().begin({"traceparent": UNSAMPLED, "tracestate": state})
    assert watch.trace == TRACE
    assert watch.told == (("traceparent", UNSAMPLED),)


def test_what_makes_spans_is_not_imported_unless_they_are_wanted() -> None:
    """Who does not trace does not pay for it, and need not have it installed."""
    code = "import sys, serving.cli; print([name for name in sys.modules if name.startswith('opentelemetry.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    # redis looks for what makes OpenTelemetry's metrics, and takes it where it is
    assert not [name for name in ast.literal_eval(done.stdout) if "sdk.trace" in name or "exporter" in name]


# ---------------------------------------------------------------------- what Triton is told


class Tap:
    """Stands before a real Triton, passes everything on, and keeps the headers and metadata that come by."""

    def __init__(self, triton: TritonServer) -> None:
        self.triton = triton
        self.http: list[dict[str, str]] = []
        self.grpc: list[dict[str, Any]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[TritonSettings]:
        http_port, grpc_port = free_ports(2)
        async with (
            aiohttp.ClientSession(self.triton.url, auto_decompress=False) as session,
            grpc.aio.insecure_channel(self.triton.grpc_url) as channel,
        ):

            async def over_http(request: web.Request) -> web.Response:
                self.http.append(dict(request.headers))
                headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
                asked = session.request(request.method, request.path, headers=headers, data=await request.read())
                async with asked as answer:
                    told = {k: v for k, v in answer.headers.items() if k.lower() not in ("content-length",)}
                    return web.Response(status=answer.status, headers=told, body=await answer.read())

            class Every(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc publishes no types
                def service(self, details: Any) -> Any:
                    async def over_grpc(body: bytes, context: Any) -> bytes:
                        tap.grpc.append(dict(context.invocation_metadata()))
                        answer: bytes = await channel.unary_unary(details.method)(body)
                        return answer

                    return grpc.unary_unary_rpc_method_handler(over_grpc)

            tap = self
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", over_http)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", http_port).start()
            server = grpc.aio.server()
            server.add_generic_rpc_handlers([Every()])
            server.add_insecure_port(f"127.0.0.1:{grpc_port}")
            await server.start()
            try:
                yield TritonSettings(f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", models=SETTINGS)
            finally:
                await server.stop(None)
                await runner.cleanup()


def traces(told: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """What calls were told of a trace; those that have none were made for nobody in particular."""
    return {(each["traceparent"], each["tracestate"]) for each in told if "traceparent" in each}


@pytest.mark.service
async def test_triton_is_told_of_the_trace(triton: TritonServer) -> None:
    """A reference, and bytes, over HTTP and over gRPC: each call to Triton has the client's traceparent and state."""
    told = {"traceparent": UNSAMPLED, "tracestate": "vendor=1"}
    reference = {"name": "REFERENCE", "shape": [1], "datatype": "BYTES", "data": [f"{STUDY}/{SERIES}/ct"]}
    array = volume(4, 4, 4)
    sent = {"name": "VOLUME", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}
    tap = Tap(triton)
    with arena() as path:
        shelf = Shelf(path)
        shelf.put("ct", array)
        async with (
            tap.running() as settings,
            before(settings, f"/{path.name}", shelf) as (_, _, url, address),
            aiohttp.ClientSession(url, headers=told) as session,
        ):
            for model, given in (("embed.ref", reference), ("embed", sent)):
                tap.http.clear()
                async with session.post(f"/v2/models/{model}/infer", json={"inputs": [given]}) as answer:
                    assert answer.status == 200, await answer.text()
                assert traces(tap.http) == {tuple(told.values())}
            name = grpc_client.InferInput("REFERENCE", [1], "BYTES")
            name.set_data_from_numpy(np.array([f"{STUDY}/{SERIES}/ct".encode()], object))
            data = grpc_client.InferInput("VOLUME", list(array.shape), "FP32")
            data.set_data_from_numpy(array)
            for model, asked in (("embed.ref", name), ("embed", data)):
                tap.grpc.clear()

                def infer(model: str = model, asked: Any = asked) -> None:
                    with grpc_client.InferenceServerClient(address) as client:
                        client.infer(model, [asked], headers=told)

                await asyncio.to_thread(infer)
                assert traces(tap.grpc) == {tuple(told.values())}


# ---------------------------------------------------------------------- spans


@asynccontextmanager
async def collector() -> AsyncIterator[tuple[str, "asyncio.Queue[Any]"]]:
    """Where spans can be sent by OTLP over HTTP, and those that were."""
    spans: asyncio.Queue[Any] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        sent = ExportTraceServiceRequest.FromString(await request.read())
        for resource in sent.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    spans.put_nowait(span)
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield "http://{}:{}/v1/traces".format(*runner.addresses[0][:2]), spans
    finally:
        await runner.cleanup()


@pytest.mark.service
async def test_a_request_and_its_stages_are_spans(tmp_path: Path, bucket: Bucket) -> None:
    """They are those of the client's trace, under its span, one after another; unless it does not want any."""
    ref = bucket.series(slices=4)
    async with collector() as (endpoint, spans):
        settings = {"origin": bucket.origin, "tracing": {"endpoint": endpoint, "sample": 0.0}}

        def ask() -> None:
            with Daemon(tmp_path, settings, {"OTEL_BSP_SCHEDULE_DELAY": "100"}) as daemon:
                assert daemon.tensor(ref, traceparent=UNSAMPLED.replace(TRACE, "1" * 32)).status == 200
                assert daemon.tensor(ref).status == 200
                daemon.ask("DELETE", f"/v1/studies/{ref.study}")
                assert daemon.tensor(ref, traceparent=SAMPLED).status == 200

        await asyncio.to_thread(ask)  # what waits is sent before the daemon has ended
        found = [spans.get_nowait() for _ in range(spans.qsize())]
    assert {span.trace_id.hex() for span in found} == {TRACE}
    [request] = [span for span in found if span.parent_span_id.hex() == PARENT]
    assert request.name == "/v1/studies/{study}/series/{series}/tensors/{recipe}"
    stages = sorted((span for span in found if span is not request), key=lambda span: span.start_time_unix_nano)
    assert all(span.parent_span_id == request.span_id for span in stages)
    assert [span.name for span in stages][:2] == ["lookup", "list"]
    assert stages[-1].name == "response"
    taken = sum(span.end_time_unix_nano - span.start_time_unix_nano for span in stages)
    assert taken == pytest.approx(request.end_time_unix_nano - request.start_time_unix_nano, rel=0.01)
