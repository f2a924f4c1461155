"""KServe v2 over HTTP: what an unchanged Triton client says, passed on to Triton, with references to studies resolved.

Every model is there twice: as itself, and as the virtual model ``<model>.ref``, which takes a reference in place of
the tensor. The tensor never passes through here: Triton reads it in the arena.

What a request names is decided in ``serving/references``; here it is only read from JSON and binary tensors.

Bodies without a reference are streamed, and an answer's tensors always are. Sources: the KServe Open Inference
Protocol v2, and Triton's extensions for binary tensor data, shared memory, statistics and model configuration.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from cache.errors import BadRequest, DeadlinePassed, Forbidden, NotFound, TritonDown, TritonRefused
from cache.stopwatch import current
from serving.binding import Binder
from serving.front import Front
from serving.references import (
    REGION,
    SUFFIX,
    Asked,
    Given,
    check_settings,
    is_reference,
    split_name,
    strings,
    takes,
    virtual_config,
    virtual_metadata,
)
from serving.regions import Client, Kind
from serving.results import INDIFFERENT, Results
from serving.triton import (
    HEAD_LENGTH,
    Answer,
    InferHead,
    InferInput,
    InferOutput,
    ModelMetadata,
    Server,
    model_path,
    passed_on,
)

T = TypeVar("T")

#: The longest JSON that is read, in bytes: larger tensors are sent as binary data.
MAX_HEAD: Final = 8 << 20

#: The longest tensors beside a reference, in bytes, all together. They are kept for a second try.
MAX_TAIL: Final = 16 << 20

_START: Final = 1 << 16

#: Requests that are remembered, each no longer than this in bytes.
_REMEMBERED: Final = 1024
_SHORT: Final = 4096

_MODEL: Final = "/v2/models/{model}"
_VERSION: Final = _MODEL + "/versions/{version}"
_SHARED: Final = "/v2/{kind:system|cuda}sharedmemory"
_REGION: Final = _SHARED + "/region/{region}"
_MODELS: Final = "/v2/repository/models/{model}"


def routes(front: Front) -> list[web.RouteDef]:
    """The API's routes. Their handlers raise VoxcacheErrors, for the application to answer with ``{"error": …}``."""
    api = _KServe(front)
    get, post = "GET", "POST"
    table = [
        # the first of those that a path is compared with: this is what is asked most
        (post, _MODEL + "/infer", api.infer),
        (post, _VERSION + "/infer", api.infer),
        *((get, path, api.forward) for path in ("/v2", "/v2/health/live")),
        (get, "/v2/health/ready", api.ready),
        (get, "/v2/models/stats", api.all_stats),
        (post, "/v2/repository/index", api.index),
        *((post, _MODELS + rest, api.control) for rest in ("/load", "/unload")),
        (get, "/v2/logging", api.forward),
        (post, "/v2/logging", api.change),
        (get, "/v2/trace/setting", api.forward),
        (post, "/v2/trace/setting", api.change),
        (get, _MODEL + "/trace/setting", api.trace),
        (post, _MODEL + "/trace/setting", api.change),
        *(
            (method, model + rest, handler)
            for model in (_MODEL, _VERSION)
            for method, rest, handler in (
                (get, "", api.metadata),
                (get, "/config", api.config),
                (get, "/ready", api.model_ready),
                (get, "/stats", api.stats),
                (post, "/generate", api.generate),
                (post, "/generate_stream", api.generate),
            )
        ),
        (get, _SHARED + "/status", api.regions),
        (post, _SHARED + "/unregister", api.unregister),
        (get, _REGION + "/status", api.region),
        (post, _REGION + "/register", api.register),
        (post, _REGION + "/unregister", api.unregister),
        ("*", "/v2/{rest:.*}", api.absent),
    ]
    return [web.route(method, path, handler) for method, path, handler in table]


def binary_parts(head: InferHead, tail: bytes) -> list[bytes]:
    """The binary data of each input, in order. Raises: BadRequest if sizes and body disagree."""
    parts = []
    position = 0
    for each in head.inputs:
        size = each.parameters.get("binary_data_size", 0)
        if not isinstance(size, int) or not 0 <= size <= len(tail) - position:
            raise BadRequest(f"input {each.name!r}: binary_data_size does not fit the body")
        parts.append(tail[position : position + size])
        position += size
    return parts


def given(head: InferHead, parts: Sequence[bytes]) -> list[Given]:
    """A request's inputs as both protocols tell of them; ``parts`` are their binary data."""

    def texts(each: InferInput, data: bytes) -> Callable[[], list[str]]:
        return lambda: _texts(each, data)

    return [
        Given(each.name, each.datatype, each.shape, each.parameters.get(REGION), texts(each, data))
        for each, data in zip(head.inputs, parts, strict=True)
    ]


def without(head: InferHead, parts: Sequence[bytes], asked: Asked) -> tuple[InferHead, bytes]:
    """The request without its references."""
    kept = tuple(head.inputs[number] for number in asked.kept)
    parameters = {name: value for name, value in head.parameters.items() if name not in asked.parameters}
    rest = msgspec.structs.replace(head, inputs=kept, parameters=parameters)
    return rest, b"".join(parts[number] for number in asked.kept)


def _texts(given: InferInput, data: bytes) -> list[str]:
    """The strings of a BYTES input: from JSON, or each after its length (4 bytes, little-endian)."""
    if given.data is msgspec.UNSET:
        return strings(data, given.name)
    flat: list[object] = []
    pending: list[object] = [msgspec.json.decode(given.data)]
    while pending:
        each = pending.pop(0)
        if isinstance(each, list):
            pending = [*each, *pending]
        else:
            flat.append(each)
    texts = [each for each in flat if isinstance(each, str)]
    if len(texts) != len(flat) or len(texts) != math.prod(given.shape):
        raise BadRequest(f"{given.name}: as many strings as its shape {list(given.shape)} says")
    return texts


class _Known:
    """A request that was read. Clients ask the same again, word for word: then it need not be read again."""

    def __init__(self, head: InferHead, tail: bytes) -> None:
        self.head = head
        self._tail = tail
        self._read: tuple[ModelMetadata, Asked, InferHead, bytes] | None = None

    def understood(
        self, binder: Binder, metadata: ModelMetadata, *, by_ref: bool
    ) -> tuple[ModelMetadata, Asked, InferHead, bytes]:
        """What it asks of a model with this metadata, and what is left of it without its references.

        Raises: BadRequest.
        """
        if self._read is None or self._read[0] is not metadata:
            parts = binary_parts(self.head, self._tail)
            asked = binder.asked(metadata, given(self.head, parts), self.head.parameters, by_ref=by_ref)
            self._read = (metadata, asked, *without(self.head, parts, asked))
        return self._read


class _KServe:
    def __init__(self, front: Front) -> None:
        self._before: dict[tuple[bytes, bytes, bytes], _Known] = {}
        self._front = front
        self._triton = front.triton

    # ------------------------------------------------------------------ passed on

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on as it is."""
        return await self._forward(request, self._triton.first(), request.rel_url.raw_path)

    async def ready(self, request: web.Request) -> web.StreamResponse:
        """Triton's own answer; of several servers, that of the first that is not ready."""
        for server in self._triton.servers[1:]:
            if not await server.ready():
                return await self._forward(request, server, request.rel_url.raw_path)
        return await self.forward(request)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        model, version, by_ref = _model(request)
        if by_ref:
            raise NotFound(f"{model + SUFFIX!r} takes inference requests only")
        path = model_path(model, version, request.path.rpartition("/")[2])
        return await self._forward(request, await self._triton.of(model), path)

    async def absent(self, request: web.Request) -> web.StreamResponse:
        raise NotFound(f"{request.method} {request.path} is not offered here")

    async def control(self, request: web.Request) -> web.StreamResponse:
        """Loading models runs code: it stays with whoever runs Triton, unless that is set otherwise."""
        if not self._triton.settings.model_control:
            raise Forbidden("models are loaded and unloaded by whoever runs Triton (triton.model_control)")
        model = request.match_info["model"]
        try:
            return await self._forward(request, await self._triton.of(model), request.rel_url.raw_path)
        finally:
            self._front.loaded(model)

    async def change(self, request: web.Request) -> web.StreamResponse:
        """Change logging or tracing, of every server, but not where they write."""
        written = await _rest(request, MAX_HEAD)
        check_settings(_decoded(written or b"{}", dict[str, Any]))
        path = request.rel_url.raw_path
        servers = self._triton.servers
        if "model" in request.match_info:
            model, _, _ = _model(request)
            path = model_path(model, "", "trace", "setting")
            servers = (await self._triton.of(model),)
        for server in servers[1:]:
            (await server.request("POST", path, body=written)).close()
        return await self._forward(request, servers[0] if servers else self._triton.first(), path, written)

    async def trace(self, request: web.Request) -> web.StreamResponse:
        model, _, _ = _model(request)
        return await self._forward(request, await self._triton.of(model), model_path(model, "", "trace", "setting"))

    async def _forward(
        self,
        request: web.Request,
        server: Server,
        path: str,
        read: bytes = b"",
        *,
        instead: bytes | None = None,
        renamed: Sequence[tuple[bytes, bytes]] = (),
    ) -> web.StreamResponse:
        """Pass a request on. ``read`` is what has been read of its body already, sent on as ``instead`` if given."""
        start = read if instead is None else instead
        headers = passed_on(request.headers)
        if not request.can_read_body and not start:
            return await _relay(request, await server.request(request.method, path, headers))
        if instead is not None and HEAD_LENGTH in headers:
            headers[HEAD_LENGTH] = str(len(instead))
        body: bytes | AsyncIterator[bytes]
        if request.content_length is None or "Content-Encoding" in request.headers:
            # of unknown length: Triton gets no chunked bodies, which have been its weak spot
            body = start + await _rest(request, MAX_TAIL)
        else:
            headers["Content-Length"] = str(request.content_length - len(read) + len(start))
            body = _chained(start, request)
        return await _relay(request, await server.request(request.method, path, headers, body), renamed=renamed)

    # ------------------------------------------------------------------ models

    async def metadata(self, request: web.Request) -> web.StreamResponse:
        model, version, by_ref = _model(request)
        server = await self._triton.of(model)
        if not by_ref:
            return await self._forward(request, server, model_path(model, version))
        known = await server.metadata(model, version)
        batches = await server.batches(model, version)
        return _json(virtual_metadata(known, self._triton.settings.virtual(model), batches=batches))

    async def config(self, request: web.Request) -> web.StreamResponse:
        model, version, by_ref = _model(request)
        server = await self._triton.of(model)
        path = model_path(model, version, "config")
        if not by_ref:
            return await self._forward(request, server, path)
        declared = takes(await server.metadata(model, version), self._triton.settings.virtual(model))
        return _json(virtual_config(msgspec.json.decode(await server.get(path)), declared))

    async def model_ready(self, request: web.Request) -> web.StreamResponse:
        model, version, _ = _model(request)
        return await self._forward(request, await self._triton.of(model), model_path(model, version, "ready"))

    async def stats(self, request: web.Request) -> web.StreamResponse:
        model, version, by_ref = _model(request)
        server = await self._triton.of(model)
        path = model_path(model, version, "stats")
        if not by_ref:
            return await self._forward(request, server, path)
        found = msgspec.json.decode(await server.get(path))
        return _json({"model_stats": [each | {"name": model + SUFFIX} for each in found["model_stats"]]})

    async def all_stats(self, request: web.Request) -> web.StreamResponse:
        """The statistics of every server's models."""
        if len(self._triton.servers) < 2:
            return await self.forward(request)
        found = await asyncio.gather(*(server.get("/v2/models/stats") for server in self._triton.servers))
        return _json({"model_stats": [each for text in found for each in msgspec.json.decode(text)["model_stats"]]})

    async def index(self, request: web.Request) -> web.StreamResponse:
        """The models of every server."""
        if len(self._triton.servers) < 2:
            return await self.forward(request)
        written = await _rest(request, MAX_HEAD)
        answers = [
            await server.request("POST", "/v2/repository/index", body=written) for server in self._triton.servers
        ]
        return _json([each for answer in answers for each in msgspec.json.decode(await answer.read())])

    # ------------------------------------------------------------------ inference

    async def infer(self, request: web.Request) -> web.StreamResponse:
        model, version, by_ref = _model(request)
        path = model_path(model, version, "infer")
        written, rest = await _whole_request(request) if by_ref else (await _head(request), None)
        # without shared memory there can be no reference: the daemon need not understand what Triton will
        if not by_ref and b"shared_memory_region" not in written and b"\\u" not in written:
            async with self._front.turn():
                return await self._forward(request, await self._triton.of(model), path, written)
        if by_ref and b"shared_memory_region" not in written and b"\\u" not in written:
            if rest is None:
                rest = await _rest(request, MAX_TAIL)
            return await self._by_reference(request, self._known(path, written, rest), ())
        head = _decoded(written, InferHead)
        head, told = await self._own(request, head)
        if not by_ref and not any(is_reference(each.parameters.get(REGION)) for each in head.inputs):
            # written anew, so that Triton reads what was checked
            checked = msgspec.json.encode(head)
            async with self._front.turn(_number(head, "priority")):
                server = await self._triton.of(model)
                return await self._forward(request, server, path, written, instead=checked, renamed=told)
        try:
            if rest is None:
                rest = await _rest(request, MAX_TAIL)
            return await self._by_reference(request, _Known(head, rest), told)
        except TritonRefused as refusal:
            text = str(refusal)
            for real, name in told:
                text = text.replace(real.decode(), name.decode())
            raise TritonRefused(text, refusal.status) from None

    def _known(self, path: str, written: bytes, tail: bytes) -> "_Known":
        """The request, if it was asked before word for word as it was read then."""
        key = path.encode(), written, tail
        known = self._before.get(key)
        if known is None:
            known = _Known(_decoded(written, InferHead), tail)
            if len(written) + len(tail) <= _SHORT:
                if len(self._before) >= _REMEMBERED:
                    self._before.clear()
                self._before[key] = known
        return known

    async def _by_reference(
        self, request: web.Request, known: "_Known", told: Sequence[tuple[bytes, bytes]]
    ) -> web.StreamResponse:
        model, version, by_ref = _model(request)
        head = known.head
        who = self._front.audit.who.http(request)
        deadline_s = _number(head, "timeout") / 1e6 or None
        names = [(_model_name(model), _model_name(request.match_info["model"])), *told]
        try:
            async with asyncio.timeout(deadline_s):
                metadata = await self._triton.metadata(model, version)
                _, asked, rest, tail = known.understood(self._front.binder, metadata, by_ref=by_ref)
                place = None
                if not told and self._front.keeps(model, head.parameters):
                    # an answer is nobody's own: it is asked for, and kept, without an id
                    rest = msgspec.structs.replace(rest, id="")
                    names = [*names, *_identified(head.id)]
                    place = await self._front.place(model, version, asked, "http", _question(rest, tail))
                if place is not None and (kept := await self._results.find(place)) is not None:
                    self._front.answered(model, asked, who)
                    headers = {"Voxcache-Tier": kept.tier, "Voxcache-Result": place.key.digest}
                    return _answer(kept.answer, headers, names)
                binding = await self._front.bound(metadata, asked, who, _number(head, "priority"), deadline_s)
                answer = await self._triton.infer(
                    model, version, rest, tail, bound=binding.bound, release=binding.release
                )
                said = {"Voxcache-Tier": binding.tier}
                if place is not None and answer.nbytes is not None and answer.nbytes < self._results.longest:
                    watch = current()
                    with watch.stage("triton"):
                        whole = await _whole(answer)
                    self._results.keep(place, whole, watch.seconds)
                    return _answer(whole, said, names)
        except TimeoutError:
            raise DeadlinePassed(f"no answer within the {deadline_s} s that the request allowed") from None
        return await _relay(request, answer, said, names)

    @property
    def _results(self) -> Results:
        assert self._front.results is not None  # there is a place in them
        return self._front.results

    async def _own(self, request: web.Request, head: InferHead) -> tuple[InferHead, list[tuple[bytes, bytes]]]:
        """The request with the client's own regions as Triton calls them, and what to call them in its answer.

        Raises: NotFound for a region that is neither the client's nor a reference.
        """
        if not any(REGION in parameters for parameters in (*_parameters(head.inputs), *_parameters(head.outputs))):
            return head, []
        client = await self._client(request)
        told: list[tuple[bytes, bytes]] = []

        def real(parameters: dict[str, Any]) -> dict[str, Any]:
            found = self._front.regions.real(client, parameters[REGION])
            told.append((found.encode(), str(parameters[REGION]).encode()))
            return parameters | {REGION: found}

        inputs = tuple(
            msgspec.structs.replace(each, parameters=real(each.parameters))
            if REGION in each.parameters and not is_reference(each.parameters[REGION])
            else each
            for each in head.inputs
        )
        outputs = tuple(
            msgspec.structs.replace(each, parameters=real(each.parameters)) if REGION in each.parameters else each
            for each in head.outputs
        )
        return msgspec.structs.replace(head, inputs=inputs, outputs=outputs), told

    # ------------------------------------------------------------------ clients' own shared memory

    async def regions(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._front.regions.status(await self._client(request), _kind(request)))

    async def region(self, request: web.Request) -> web.StreamResponse:
        client, name = await self._client(request), request.match_info["region"]
        return _json(await self._front.regions.status(client, _kind(request), name))

    async def register(self, request: web.Request) -> web.StreamResponse:
        client, name = await self._client(request), request.match_info["region"]
        body = _decoded(await _rest(request, MAX_HEAD), dict[str, Any])
        await self._front.regions.register(client, _kind(request), name, body)
        return web.Response()

    async def unregister(self, request: web.Request) -> web.StreamResponse:
        client, name = await self._client(request), request.match_info.get("region", "")
        await self._front.regions.unregister(client, _kind(request), name)
        return web.Response()

    async def _client(self, request: web.Request) -> Client:
        assert request.transport is not None
        theirs, ours = (request.transport.get_extra_info(name) for name in ("peername", "sockname"))
        return await self._front.clients.of(theirs[:2], ours[1])


def _model(request: web.Request) -> tuple[str, str, bool]:
    """The real model's name, its version, and whether the virtual model was named."""
    model, by_ref = split_name(request.match_info["model"])
    return model, request.match_info.get("version", ""), by_ref


def _parameters(tensors: Sequence[InferInput] | Sequence[InferOutput]) -> list[dict[str, Any]]:
    return [each.parameters for each in tensors]


def _kind(request: web.Request) -> Kind:
    return "cuda" if request.match_info["kind"] == "cuda" else "system"


def _number(head: InferHead, name: str) -> int:
    """A request parameter that is a number, such as ``priority``; 0 without it. Some clients write it as a string."""
    value = head.parameters.get(name, 0)
    return int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else 0


# ---------------------------------------------------------------------- bodies


async def _head(request: web.Request) -> bytes:
    """The JSON of an inference request."""
    declared = request.headers.get(HEAD_LENGTH)
    if declared is None:
        return await _rest(request, MAX_HEAD)
    if not declared.isdecimal() or int(declared) > MAX_HEAD:
        raise BadRequest(f"{HEAD_LENGTH} is a number of bytes, {MAX_HEAD} at most")
    try:
        return await request.content.readexactly(int(declared))
    except asyncio.IncompleteReadError as error:
        raise BadRequest(f"the body ends before its {declared} bytes of JSON do") from error


async def _whole_request(request: web.Request) -> tuple[bytes, bytes | None]:
    """The JSON of an inference request, and what follows it: None if that is long, and has not been read yet."""
    nbytes = request.content_length
    if nbytes is None or nbytes > _SHORT or "Content-Encoding" in request.headers:
        return await _head(request), None
    declared = request.headers.get(HEAD_LENGTH, str(nbytes))
    if not declared.isdecimal() or int(declared) > nbytes:
        raise BadRequest(f"{HEAD_LENGTH} is a number of bytes, no more than the body has")
    whole = await request.read()
    return whole[: int(declared)], whole[int(declared) :]


async def _rest(request: web.Request, limit: int) -> bytes:
    """What has not been read of a body yet."""
    chunks = []
    size = 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
        if size > limit:
            raise BadRequest(
                f"more than {limit} bytes: send tensors as binary data, with a Content-Length and not compressed"
            )
        chunks.append(chunk)
    return b"".join(chunks)


async def _chained(start: bytes, request: web.Request) -> AsyncIterator[bytes]:
    if start:
        yield start
    async for chunk in request.content.iter_any():
        yield chunk


def _decoded(written: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(written, type=kind)
    except msgspec.DecodeError as error:
        raise BadRequest(f"not the JSON this takes: {error}") from error


def _question(rest: InferHead, tail: bytes) -> bytes:
    """What of a request is left that its answer may depend on."""
    parameters = {name: value for name, value in rest.parameters.items() if name not in INDIFFERENT}
    return msgspec.json.encode(msgspec.structs.replace(rest, parameters=parameters), order="sorted") + tail


async def _whole(answer: Answer) -> bytes:
    """An answer as it is kept: 4 bytes with the length of its JSON (0: it is nothing else), and its body."""
    body = await answer.read()
    answer.close()
    return int(answer.headers.get(HEAD_LENGTH, 0)).to_bytes(4, "little") + body


def _answer(whole: bytes, headers: Mapping[str, str], renamed: Sequence[tuple[bytes, bytes]]) -> web.Response:
    """The response to a client that a kept answer makes. What is ``renamed`` is replaced once, in its JSON."""
    length = int.from_bytes(whole[:4], "little")
    stop = 4 + length if length else len(whole)
    text = whole[4:stop]
    for each in renamed:
        text = text.replace(*each, 1)
    sent = CIMultiDict(headers, **{"Content-Type": "application/octet-stream" if length else "application/json"})
    if length:
        sent[HEAD_LENGTH] = str(len(text))
    return web.Response(headers=sent, body=text + whole[stop:])


def _identified(request_id: str) -> list[tuple[bytes, bytes]]:
    """How an answer without an id gets one: the first brace is where its JSON begins."""
    return [(b"{", b'{"id":' + msgspec.json.encode(request_id) + b",")] if request_id else []


def _model_name(name: str) -> bytes:
    return b'"model_name":' + msgspec.json.encode(name)


async def _relay(
    request: web.Request,
    answer: Answer,
    headers: Mapping[str, str] | None = None,
    renamed: Sequence[tuple[bytes, bytes]] = (),
) -> web.StreamResponse:
    """Pass an answer on, streamed if it is long. What is ``renamed`` is replaced once, in the JSON at its start."""
    with current().stage("triton"):
        start = await answer.start(_START)
    sent = CIMultiDict(headers or {})
    for name in ("Content-Type", "Content-Encoding", HEAD_LENGTH):
        if name in answer.headers:
            sent[name] = answer.headers[name]
    grown = 0
    if renamed:
        before = len(start)
        for each in renamed:
            # JSON escapes the quotes within its strings, so a quoted one is the field itself and nobody's text
            start = start.replace(*each, 1)
        grown = len(start) - before
        if HEAD_LENGTH in sent:
            sent[HEAD_LENGTH] = str(int(sent[HEAD_LENGTH]) + grown)
    if answer.nbytes is not None and answer.nbytes <= _START:
        answer.close()
        return web.Response(status=answer.status, headers=sent, body=start)

    response = web.StreamResponse(status=answer.status, headers=sent)
    response.content_length = None if answer.nbytes is None else answer.nbytes + grown
    await response.prepare(request)
    try:
        await response.write(start)
        async for chunk in answer.chunks():
            await response.write(chunk)
    except TritonDown:
        # half an answer is out: only a broken connection can say that the rest will not come
        if request.transport is not None:
            request.transport.abort()
        return response
    finally:
        answer.close()
    await response.write_eof()
    return response


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
