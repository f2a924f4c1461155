"""How errors look over gRPC: one canonical code for each HTTP status, so that both doors say the same."""

from typing import Final

import grpc

from cache.errors import Archived, DeadlinePassed, Refused, TritonRefused, VoxcacheError
from serving.api.problem import headers_of, status_of

Code = grpc.StatusCode

#: google.rpc.Code names the HTTP status of each of these.
CODES: Final[dict[int, grpc.StatusCode]] = {
    202: Code.UNAVAILABLE,  # not yet
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    409: Code.ALREADY_EXISTS,
    410: Code.NOT_FOUND,
    416: Code.OUT_OF_RANGE,
    422: Code.FAILED_PRECONDITION,
    429: Code.RESOURCE_EXHAUSTED,
    499: Code.CANCELLED,
    500: Code.INTERNAL,
    501: Code.UNIMPLEMENTED,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
    507: Code.RESOURCE_EXHAUSTED,
}

#: The other way, for what Triton answers over gRPC.
STATUSES: Final[dict[grpc.StatusCode, int]] = {
    Code.OK: 200,
    Code.INVALID_ARGUMENT: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 416,
    Code.FAILED_PRECONDITION: 422,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.CANCELLED: 499,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}


def code_of(error: VoxcacheError) -> grpc.StatusCode:
    """The canonical code of an error. What is full is RESOURCE_EXHAUSTED, what is down UNAVAILABLE."""
    if isinstance(error, Refused) and not isinstance(error, DeadlinePassed):
        return Code.RESOURCE_EXHAUSTED
    if isinstance(error, Archived):
        return Code.FAILED_PRECONDITION
    return CODES.get(status_of(error), Code.INTERNAL)


def refused(code: grpc.StatusCode, message: str) -> TritonRefused:
    """Triton's refusal over gRPC, as it would be over HTTP."""
    return TritonRefused(message, STATUSES.get(code, 500))


def trailers_of(error: VoxcacheError) -> tuple[tuple[str, str], ...]:
    """What goes with the code: the error's own, and when a retry makes sense (gRFC A6's pushback among it)."""
    told = [("voxcache-error", error.code)]
    if error.retry_after_s is not None:
        told.append(("retry-after", headers_of(error)["Retry-After"]))
        told.append(("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1e3))))
    return tuple(told)
