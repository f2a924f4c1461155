"""How errors look on the wire: RFC 9457 problem documents, one HTTP status for each error type."""

import math
from typing import Final

import msgspec
from aiohttp import web

from cache import errors

MEDIA_TYPE: Final = "application/problem+json"

#: The nearest class in an error's ancestry decides. 5xx says "ours or the origin's", 4xx "yours", 503 and 202 "later".
STATUS: Final[dict[type[errors.VoxcacheError], int]] = {
    errors.VoxcacheError: 500,
    errors.BadRequest: 400,
    errors.UnknownModel: 404,
    errors.UnknownRecipe: 404,
    errors.UnknownNamespace: 404,
    errors.Forbidden: 403,
    errors.RangeNotSatisfiable: 416,
    errors.Unauthorized: 401,
    errors.NotFound: 404,
    errors.LeaseExpired: 410,
    errors.BadSource: 422,
    errors.OriginError: 502,
    errors.OriginDown: 503,
    errors.Archived: 409,
    errors.Restoring: 202,
    errors.OriginChanged: 503,
    errors.Refused: 503,
    errors.Shed: 429,
    errors.NotConfirmed: 502,
    errors.TooLarge: 507,
    errors.OverQuota: 507,
    errors.DeadlinePassed: 504,
    errors.WorkerFailed: 500,
    errors.WorkerTimeout: 504,
    errors.TritonError: 502,
    errors.TritonDown: 503,
    errors.ModelChanged: 503,
}


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every error answer (RFC 9457 §3). ``type`` is stable: its last part is the error's code."""

    type: str
    title: str
    status: int
    detail: str
    instances: tuple[str, ...] = ()
    restore_requested: bool | None = None


def status_of(error: errors.VoxcacheError) -> int:
    """The HTTP status that says what kind of error this is."""
    if isinstance(error, errors.TritonRefused):
        return error.status
    return next(STATUS[ancestor] for ancestor in type(error).__mro__ if ancestor in STATUS)


def headers_of(error: errors.VoxcacheError) -> dict[str, str]:
    """The headers that go with the status: Retry-After where waiting helps, what 401 and 416 ask for."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, errors.RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.nbytes}"
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer, Basic realm="voxcache"'
    return headers


def problem_of(error: errors.VoxcacheError) -> Problem:
    """What is said about ``error``."""
    return Problem(
        type=f"urn:voxcache:error:{error.code}",
        title=error.code.replace("-", " ").capitalize(),
        status=status_of(error),
        detail=str(error),
        instances=error.instances[:20] if isinstance(error, errors.BadSource) else (),
        restore_requested=error.restore_requested if isinstance(error, errors.Archived) else None,
    )


def problem(error: errors.VoxcacheError) -> web.Response:
    """The answer to a request that ended in ``error``."""
    body = problem_of(error)
    return web.Response(
        status=body.status, body=msgspec.json.encode(body), content_type=MEDIA_TYPE, headers=headers_of(error)
    )
