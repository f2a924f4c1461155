"""The API's description, made from the same structs and handlers that serve it (OpenAPI 3.1)."""

import inspect
import re
from typing import Any, Final

import msgspec
from aiohttp import web

from cache import __version__
from cache.errors import every_error
from serving.arrivals.sources import SOURCES, Source
from serving.filler import Job
from serving.leasing import LeaseAnswer, LeaseRequest, RenewRequest
from serving.neighbours import QueryAnswer, QueryRequest
from serving.retention import Pin
from serving.stats import StatsAnswer

from .arrivals import ArrivalAnswer
from .keeping import PinRequest, PinsAnswer
from .letters import LettersAnswer, RequeueAnswer, RequeueRequest
from .native import InstancesAnswer, LineageAnswer, StudyAnswer
from .problem import MEDIA_TYPE, Problem, status_of
from .verifying import VerifyAnswer
from .warming import IndexRequest, PlanAnswer, WantedAnswer, WarmRequest

_Body = type[msgspec.Struct]

#: Described once for each source, since each takes another form.
_ARRIVALS: Final = "/v1/arrivals/{source}"

#: What bodies a route takes and gives, where it does, and the status of its success.
_BODIES: Final[dict[tuple[str, str], tuple[_Body | None, _Body | None, int]]] = {
    ("POST", "/v1/leases"): (LeaseRequest, LeaseAnswer, 201),
    ("POST", "/v1/leases/{lease}/renew"): (RenewRequest, LeaseAnswer, 200),
    ("DELETE", "/v1/leases/{lease}"): (None, None, 204),
    ("GET", "/v1/studies/{study}"): (None, StudyAnswer, 200),
    ("GET", "/v1/studies/{study}/series/{series}/instances"): (None, InstancesAnswer, 200),
    ("POST", _ARRIVALS): (None, ArrivalAnswer, 202),
    ("GET", "/v1/studies/{study}/plan"): (None, PlanAnswer, 200),
    ("GET", "/v1/pins"): (None, PinsAnswer, 200),
    ("PUT", "/v1/studies/{study}/pin"): (PinRequest, Pin, 200),
    ("DELETE", "/v1/studies/{study}/pin"): (None, None, 204),
    ("POST", "/v1/plan"): (WarmRequest, WantedAnswer, 200),
    ("GET", "/v1/dead-letters"): (None, LettersAnswer, 200),
    ("POST", "/v1/dead-letters"): (RequeueRequest, RequeueAnswer, 200),
    ("POST", "/v1/embeddings/query"): (QueryRequest, QueryAnswer, 200),
    ("POST", "/v1/index"): (IndexRequest, Job, 202),
    ("GET", "/v1/stats"): (None, StatsAnswer, 200),
    ("POST", "/v1/studies/{study}/verify"): (None, VerifyAnswer, 200),
    ("POST", "/v1/warm"): (WarmRequest, Job, 202),
    ("GET", "/v1/warm/{job}"): (None, Job, 200),
}


def document(routes: list[web.RouteDef]) -> dict[str, Any]:
    """The OpenAPI document of ``routes``."""
    bodies = {LineageAnswer, Problem} | {b for told in _BODIES.values() for b in told[:2] if b is not None}
    ordered = sorted(bodies, key=lambda body: body.__name__)
    forms = [form for source in SOURCES.values() for form in source.takes]
    schemas, components = msgspec.json.schema_components([*forms, *ordered], ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if (route.method, route.path) == ("POST", _ARRIVALS):
            told = iter(schemas)
            for source in SOURCES.values():
                taken = [next(told) for _ in source.takes]
                paths[_ARRIVALS.replace("{source}", source.name)] = {"post": _webhook(route, source, taken)}
        else:
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    codes = ", ".join(sorted(error.code for error in every_error() if isinstance(error.code, str)))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "voxcache",
            "version": __version__,
            "description": f"Errors are RFC 9457 problems of type `urn:voxcache:error:CODE`; the codes: {codes}.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(route: web.RouteDef) -> dict[str, Any]:
    takes, gives, status = _BODIES.get((route.method, route.path), (None, None, 200))
    summary = " ".join((inspect.getdoc(route.handler) or route.path).split("\n\n")[0].split())
    success: dict[str, Any] = {"description": summary}
    if gives is not None:
        success["content"] = {"application/json": {"schema": _reference(gives)}}
    elif route.path.endswith("/events"):
        success["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    elif route.path.endswith("/tensors/{recipe}"):
        binary = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
        kinds = ("application/octet-stream", "application/x-npy", "application/vnd.safetensors")
        success["content"] = {kind: binary for kind in kinds}
    elif route.path.endswith("/instances/{instance}"):
        success["content"] = {
            "application/dicom": {"schema": {"type": "string", "contentMediaType": "application/dicom"}}
        }
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": getattr(route.handler, "__name__", route.path),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", route.path)
        ],
        "responses": {
            str(status): success,
            "default": {
                "description": "It did not work: the problem says what happened and what to do.",
                "content": {MEDIA_TYPE: {"schema": _reference(Problem)}},
            },
        },
    }
    if takes is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(takes)}}}
    return operation


def _webhook(route: web.RouteDef, source: Source, taken: list[dict[str, Any]]) -> dict[str, Any]:
    """The operation of one source's webhook."""
    operation = _operation(route)
    del operation["parameters"]
    operation["operationId"] += f"_{source.name}"
    operation["description"] = f"Takes {source.sends} ({source.defined})."
    operation["requestBody"] = {
        "required": True,
        "content": {source.content_type: {"schema": {"anyOf": taken}, "example": msgspec.json.decode(source.example)}},
    }
    operation["responses"]["200"] = {
        "description": "What proves to a publisher that its events are wanted, before it sends any.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
    return operation


def _reference(body: _Body) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{body.__name__}"}


def errors_table() -> str:
    """Every error as a Markdown table: its code, its status, and whether waiting helps."""
    lines = ["| code | status | retry after | means |", "|---|---|---|---|"]
    tree = inspect.getdoc(inspect.getmodule(every_error)) or ""
    for error in every_error():
        meaning = re.search(rf"(?m)^[│├└─ ]*{error.__name__} +(.+)$", tree)
        status = "as Triton says" if error.__name__ == "TritonRefused" else str(status_of(_bare(error)))
        retry = f"{error.retry_after_s:g} s" if error.retry_after_s is not None else ""
        lines.append(f"| `{error.code}` | {status} | {retry} | {meaning[1] if meaning else ''} |")
    return "\n".join(lines) + "\n"


def _bare(error: type[Exception]) -> Any:
    return error.__new__(error)
