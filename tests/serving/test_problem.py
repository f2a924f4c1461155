"""Errors on the wire: what is in an archive, or on its way from there, is told apart from what failed."""

import grpc
import msgspec

from cache.errors import Archived, OriginDown, Restoring, Shed, Unauthorized
from serving.api.problem import headers_of, problem_of, status_of
from serving.grpc.status import code_of, trailers_of


def test_what_is_archived() -> None:
    """409, and whether a restore was requested; of other errors nothing of the kind is said."""
    told = msgspec.to_builtins(problem_of(Archived("archived", restore_requested=True)))
    assert (told["status"], told["type"], told["restore_requested"]) == (409, "urn:voxcache:error:archived", True)
    assert msgspec.to_builtins(problem_of(Archived("archived")))["restore_requested"] is False
    assert "restore_requested" not in msgspec.to_builtins(problem_of(OriginDown("down")))
    assert code_of(Archived("archived")) is grpc.StatusCode.FAILED_PRECONDITION


def test_what_is_on_its_way() -> None:
    """202 and when to come again, rounded up; gRPC knows no such thing, and says unavailable."""
    error = Restoring("on its way", retry_after_s=17.2, look_again_s=3.0)
    assert (status_of(error), headers_of(error)) == (202, {"Retry-After": "18"})
    assert code_of(error) is grpc.StatusCode.UNAVAILABLE
    assert ("retry-after", "18") in trailers_of(error)


def test_publishers_are_told_what_they_know() -> None:
    """429 with when to come again, and a challenge with 401, without which SNS sends no password."""
    assert (status_of(Shed("full")), headers_of(Shed("full"))) == (429, {"Retry-After": "2"})
    assert status_of(Unauthorized("no")) == 401
    assert 'Basic realm="voxcache"' in headers_of(Unauthorized("no"))["WWW-Authenticate"]
