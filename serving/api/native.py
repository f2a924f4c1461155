"""voxcache's own HTTP API: tensors, leases, residency, lineage, arrivals."""

import contextlib
import json
import re
import struct
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np
from aiohttp import web

from cache.entry import Entry, TensorSpec
from cache.errors import BadRequest, NotFound, QueueDown, RangeNotSatisfiable
from cache.interfaces import Residency
from cache.keys import Manifest, SeriesRef, TensorRef, check_name, check_uid
from cache.store import Instance, Outcome, Store
from serving.audit import SILENT, Agent, Auditor, failing
from serving.audit.record import DROP, EVICT, INSTANCE, READ
from serving.filler import Filler
from serving.leasing import LeaseRequest, Lessor, RenewRequest
from serving.warm import Warmer

from .wire import body_of, json_answer

_TENSOR: Final = "/v1/studies/{study}/series/{series}/tensors/{recipe}"

_INSTANCES: Final = "/v1/studies/{study}/series/{series}/instances"

#: Bytes of a payload that go out with the headers.
_WITH_HEADERS: Final = 1024

_SAFETENSORS_DTYPES: Final = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{letter}{bits}" for sign, letter in (("", "I"), ("u", "U")) for bits in (8, 16, 32)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}


# ------------------------------------------------------------------ what is said on the wire


class EntryAnswer(msgspec.Struct, frozen=True):
    """One entry of a study in one tier."""

    series: str
    kind: str
    namespace: str
    recipe: str
    etag: str
    tier: str
    nbytes: int
    last_use: float
    uses: int
    pins: int


class StudyAnswer(msgspec.Struct, frozen=True):
    """What is held of a study, and whether it is ready.

    It is ``ready`` when something is known of it, none of its arrivals is ``waiting``, and a tier holds every entry
    that is ``planned``; ``missing`` has the references of the others. While the arrival queue cannot be asked nobody
    knows what waits (null).
    """

    study: str
    ready: bool
    planned: int
    missing: list[str]
    waiting: int | None
    entries: list[EntryAnswer]


class InstanceAnswer(msgspec.Struct, frozen=True):
    """One object of a series: its number, which is its place by key, and what the origin says of it."""

    number: int
    key: str
    nbytes: int
    etag: str


class InstancesAnswer(msgspec.Struct, frozen=True):
    """The objects of a series as the origin has them."""

    study: str
    series: str
    source_version: str
    instances: list[InstanceAnswer]


class LineageAnswer(msgspec.Struct, frozen=True):
    """What one entry was made from, and by."""

    entry: Entry
    manifest: Manifest | None


# ------------------------------------------------------------------ the routes


class Native:
    """The handlers, over the store, the lessor and what is warmed."""

    def __init__(
        self, *, store: Store, lessor: Lessor, warmer: Warmer, filler: Filler, max_body: int, audit: Auditor = SILENT
    ) -> None:
        self._audit = audit
        self._store = store
        self._lessor = lessor
        self._warmer = warmer
        self._filler = filler
        self._max_body = max_body

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(_TENSOR, self.tensor),  # aiohttp answers HEAD with the same handler
            web.get(_INSTANCES, self.instances),
            web.get(f"{_INSTANCES}/{{instance}}", self.instance),
            web.post("/v1/leases", self.grant),
            web.delete("/v1/leases/{lease}", self.release),
            web.post("/v1/leases/{lease}/renew", self.renew),
            web.get("/v1/studies/{study}", self.study),
            web.delete("/v1/studies/{study}", self.evict),
            web.get("/v1/studies/{study}/lineage", self.lineage),
        ]

    async def tensor(self, request: web.Request) -> web.StreamResponse:
        """The tensor's bytes in the media type asked for, whole or a range, from the arena to the socket."""
        where = request.match_info
        namespace = check_name(request.query.get("namespace", "serving"), "namespace")
        want = TensorRef(
            SeriesRef.parse(where["study"], where["series"]), check_name(where["recipe"], "recipe"), namespace
        )
        framing = _framing(request.headers.get("Accept", "*/*"))
        who = self._audit.who.http(request)
        with failing(self._audit, READ, who, want):
            outcome = await self._store.get(want)
        try:
            return await self._send(request, outcome, framing, who)
        finally:
            outcome.release()

    async def _send(
        self, request: web.Request, outcome: Outcome, framing: "_Framing", who: Agent
    ) -> web.StreamResponse:
        entry = outcome.entry
        spec = _spec(entry)
        headers = {
            "ETag": f'"{entry.key.digest}{framing.mark}"',
            "Voxcache-Tier": outcome.tier,
            "Voxcache-Lineage": f"/v1/studies/{entry.key.study}/lineage?etag={entry.key.digest}",
            "Voxcache-Spec": msgspec.json.encode(spec).decode(),
            "Vary": "Accept",
        }
        if (model := entry.lineage.model) is not None:
            headers["Voxcache-Model"] = f"{model.name}/{model.version}/{model.config}"
        return await _bytes(
            request,
            outcome,
            entry.nbytes,
            media_type=framing.media_type,
            headers=headers,
            head=framing.head(spec),
            sending=lambda: self._audit.note(READ, who, entry),
        )

    async def instances(self, request: web.Request) -> web.Response:
        """The objects of a series, and the numbers by which they can be asked for."""
        ref = SeriesRef.parse(request.match_info["study"], request.match_info["series"])
        manifest = await self._store.objects_of(ref)
        listed = [
            InstanceAnswer(number, source.key, source.size, source.etag)
            for number, source in enumerate(manifest.objects)
        ]
        return json_answer(InstancesAnswer(ref.study, ref.series, manifest.source_version, listed))

    async def instance(self, request: web.Request) -> web.StreamResponse:
        """One object of the series as the origin has it, from the series' pack to the socket."""
        where = request.match_info
        namespace = check_name(request.query.get("namespace", "serving"), "namespace")
        ref = SeriesRef.parse(where["study"], where["series"])
        who = self._audit.who.http(request)
        with failing(self._audit, INSTANCE, who, ref):
            instance = await self._store.instance(ref, where["instance"], namespace)
        # what is neither a number nor a UID, somebody else has chosen
        name = where["instance"] if where["instance"].replace(".", "").isdecimal() else ""
        details = (("instance", name),) if name else ()
        try:
            headers = {"ETag": f'"{instance.source.etag}"', "Voxcache-Tier": instance.tier}
            return await _bytes(
                request,
                instance,
                instance.source.size,
                media_type="application/dicom",
                headers=headers,
                sending=lambda: self._audit.note(INSTANCE, who, instance.pack.entry, details=details),
            )
        finally:
            instance.release()

    async def grant(self, request: web.Request) -> web.Response:
        """A lease on the tensor: where its bytes lie in shared memory, and until when they stay there."""
        asked = await body_of(request, LeaseRequest, self._max_body)
        answer = await self._lessor.grant(asked, self._audit.who.http(request))
        return json_answer(answer, 201, {"Voxcache-Tier": answer.tier})

    async def renew(self, request: web.Request) -> web.Response:
        """Put the lease's end off."""
        asked = await body_of(request, RenewRequest, self._max_body)
        return json_answer(self._lessor.renew(request.match_info["lease"], asked.ttl_s))

    async def release(self, request: web.Request) -> web.Response:
        """Give the lease back."""
        self._lessor.release(request.match_info["lease"])
        return web.Response(status=204)

    async def study(self, request: web.Request) -> web.Response:
        """What is held of the study, and where; whether all of it is ready that the plan calls for."""
        study = check_uid(request.match_info["study"])
        waiting: int | None = None
        with contextlib.suppress(QueueDown):  # what is held can be told all the same
            waiting = await self._warmer.waiting(study)
        decisions = self._filler.decisions(study)
        fills = [fill for decision in decisions for fill in decision.fills]
        missing = [str(fill.want) for fill in fills if not self._store.held(fill.want)]
        return json_answer(
            StudyAnswer(
                study=study,
                ready=bool(decisions) and waiting == 0 and not missing,
                planned=len(fills),
                missing=missing,
                waiting=waiting,
                entries=[self._entry_answer(resident) for resident in self._store.residents(study)],
            )
        )

    async def evict(self, request: web.Request) -> web.Response:
        """Drop what nobody holds of the study (or of one series of it: ``?series=``) from both tiers."""
        series = request.query.get("series")
        study = check_uid(request.match_info["study"])
        evicted = self._store.evict(study, check_uid(series) if series else None)
        act, what = (DROP, SeriesRef(study, series)) if series else (EVICT, study)
        self._audit.note(act, self._audit.who.http(request), what, details=(("entries", str(evicted)),))
        return json_answer({"evicted": evicted})

    async def lineage(self, request: web.Request) -> web.Response:
        """What the study's entries (or the one with ``?etag=``) were made from, and by."""
        study = check_uid(request.match_info["study"])
        etag = request.query.get("etag", "").strip('"')
        keys = {r.key for r in self._store.residents(study) if etag in ("", r.key.digest)}
        answers = [LineageAnswer(entry, self._store.manifest(key)) for key in keys if (entry := self._store.entry(key))]
        if not answers:
            raise NotFound(f"nothing is held of study {study}" + (f" with ETag {etag}" if etag else ""))
        return json_answer({"entries": answers})

    def _entry_answer(self, resident: Residency) -> EntryAnswer:
        entry = self._store.entry(resident.key)
        return EntryAnswer(
            series=resident.key.series,
            kind=resident.key.kind,
            namespace=resident.key.namespace,
            recipe=entry.lineage.recipe_name if entry is not None else "",
            etag=resident.key.digest,
            tier=resident.tier,
            nbytes=resident.nbytes,
            last_use=resident.last_use,
            uses=resident.uses,
            pins=resident.pins,
        )


# ------------------------------------------------------------------ media types and ranges


async def _bytes(
    request: web.Request,
    source: Outcome | Instance,
    nbytes: int,
    *,
    media_type: str,
    headers: dict[str, str],
    sending: Callable[[], None],
    head: bytes = b"",
) -> web.StreamResponse:
    """``head`` and the source's bytes: all, the range that is asked for, or nothing if the client has them already.

    ``sending`` is called before any of them goes out.

    Raises: RangeNotSatisfiable, and what the source's chunks do.
    """
    etag = headers["ETag"]
    headers["Accept-Ranges"] = "bytes"
    asked = request.headers.get("If-None-Match", "")
    if asked == "*" or etag in (tag.strip().removeprefix("W/") for tag in asked.split(",")):
        return web.Response(status=304, headers=headers)
    total = len(head) + nbytes
    start, stop, status = 0, total, 200
    if request.headers.get("If-Range", etag) == etag and (span := byte_range(request.headers.get("Range"), total)):
        (start, stop), status = span, 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
    response = web.StreamResponse(status=status, headers=headers)
    response.content_type = media_type
    response.content_length = stop - start
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    sending()
    # with no buffer of its own the transport has passed everything to the kernel once a write returns, so that
    # nothing refers to the arena any more when the source is released
    if request.transport is not None:
        request.transport.set_write_buffer_limits(high=0)
    if start < len(head):
        await response.write(head[start:stop])
    alone = start < len(head)
    async for piece in source.chunks(max(start - len(head), 0), max(stop - len(head), 0)):
        if not alone:  # aiohttp copies what goes out with the headers
            await response.write(piece[:_WITH_HEADERS])
        await response.write(piece if alone else piece[_WITH_HEADERS:])
        alone = True
    await response.write_eof()
    return response


class _Framing:
    """How a tensor is put on the wire: a media type, and the bytes that go before the payload."""

    def __init__(self, media_type: str, mark: str, head: Callable[[TensorSpec], bytes]) -> None:
        self.media_type = media_type
        self.mark = mark  # keeps the strong ETags of two representations apart (RFC 9110 §8.8.3.3)
        self.head = head


def _npy_head(spec: TensorSpec) -> bytes:
    """https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, version 1.0"""
    order = np.dtype(spec.dtype).newbyteorder("<").str
    text = f"{{'descr': {order!r}, 'fortran_order': False, 'shape': {spec.shape!r}, }}"
    padded = text.ljust(-(-(10 + len(text) + 1) // 64) * 64 - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode("latin-1")


def _safetensors_head(spec: TensorSpec) -> bytes:
    """https://huggingface.co/docs/safetensors, "Format" """
    header = {
        "__metadata__": {"spec": msgspec.json.encode(spec).decode()},
        "tensor": {"dtype": _SAFETENSORS_DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": [0, spec.nbytes]},
    }
    text = json.dumps(header).encode()
    padded = text.ljust(-(-len(text) // 8) * 8)
    return len(padded).to_bytes(8, "little") + padded


_FRAMINGS: Final = (
    _Framing("application/octet-stream", "", lambda _: b""),
    _Framing("application/x-npy", "-npy", _npy_head),
    _Framing("application/vnd.safetensors", "-st", _safetensors_head),
)


def _framing(accept: str) -> _Framing:
    """The representation the client likes best (RFC 9110 §12.5.1); of equals what it names, then raw bytes.

    Raises: BadRequest.
    """
    weights = dict(_weight(part) for part in accept.split(",") if part.strip())

    def liking(framing: _Framing) -> tuple[float, bool]:
        patterns = (framing.media_type, "application/*", "*/*")  # the most specific one decides
        matching = next((pattern for pattern in patterns if pattern in weights), None)
        return (0.0, False) if matching is None else (weights[matching], matching == framing.media_type)

    best = max(_FRAMINGS, key=liking)
    if weights and liking(best)[0] == 0:
        offered = ", ".join(framing.media_type for framing in _FRAMINGS)
        raise BadRequest(f"Accept allows none of {offered}")
    return best


def _weight(accepted: str) -> tuple[str, float]:
    """A media range of an Accept header and its weight, 1 unless it says another one."""
    pattern, *parameters = (part.strip().lower() for part in accepted.split(";"))
    weights = [re.fullmatch(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)", parameter) for parameter in parameters]
    return pattern, next((float(weight[1]) for weight in weights if weight), 1.0)


def byte_range(header: str | None, total: int) -> tuple[int, int] | None:
    """The first and the last-plus-one byte a Range header asks for, or None to send everything (RFC 9110 §14.2).

    Several ranges, other units and malformed headers are ignored, as the RFC allows.

    Raises:
        RangeNotSatisfiable: it starts behind the end.
    """
    asked = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", (header or "").strip())
    if asked is None or asked[0] == "bytes=-":
        return None
    first, last = asked[1], asked[2]
    if not first:
        start, stop = max(total - int(last), 0), total
    else:
        start, stop = int(first), min(int(last) + 1, total) if last else total
        if last and int(last) < int(first):
            return None
    if start >= total or start >= stop:
        raise RangeNotSatisfiable(f"bytes {header} lie outside the {total} bytes there are", total)
    return start, stop


def _spec(entry: Entry) -> TensorSpec:
    assert entry.spec is not None  # only packs have none, and nobody is handed a pack
    return entry.spec
