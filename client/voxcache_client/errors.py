"""Every way a request to the daemon can fail.

VoxcacheError
├── BadRequest      400, 416      asked for something that cannot be
├── Denied          401, 403      the token does not allow it
├── NotFound        404, 410      no such study, series, recipe or lease
├── BadSource       422           the DICOM objects are at fault: a retry will not help
├── Refused         202, 409, 429, 503, 507   not now, or not with these budgets: see ``retry_after``
├── ServerFailed    other 5xx
└── Unreachable     no answer, or one that broke off (``status`` is 0)
"""

import json
import re
from collections.abc import Mapping
from typing import Final


class VoxcacheError(Exception):
    """A request that failed.

    ``code`` is the daemon's stable name of the problem ("missing-slice"), ``status`` the HTTP status (0: no answer),
    ``detail`` the sentence for people, ``retry_after`` the seconds after which asking again may help.
    """

    def __init__(self, detail: str, *, code: str = "error", status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.status = status
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.detail} ({self.code})"


class BadRequest(VoxcacheError):
    """The caller asked for something that cannot be."""


class Denied(VoxcacheError):
    """The token does not allow it."""


class NotFound(VoxcacheError):
    """No such study, series, recipe or lease."""


class BadSource(VoxcacheError):
    """The DICOM objects are at fault; a retry will not help."""


class Refused(VoxcacheError):
    """Asked rightly, but not now, or not with the daemon's budgets."""


class ServerFailed(VoxcacheError):
    """The daemon or its origin failed."""


class Unreachable(VoxcacheError):
    """No answer came, or it broke off."""


_BY_STATUS: Final[dict[int, type[VoxcacheError]]] = {
    202: Refused,
    401: Denied,
    403: Denied,
    404: NotFound,
    409: Refused,
    410: NotFound,
    422: BadSource,
    429: Refused,
    503: Refused,
    507: Refused,
}


def from_answer(status: int, retry_after: str | None, body: bytes) -> VoxcacheError:
    """The error that an HTTP answer stands for: a problem document (RFC 9457), or whatever a proxy made of it."""
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    return from_problem(problem if isinstance(problem, dict) else {}, status, _seconds(retry_after))


def from_problem(problem: Mapping[str, object], status: int, retry_after: float | None) -> VoxcacheError:
    """The error that a problem document stands for; what it does not say is made up from ``status``."""
    kind = _BY_STATUS.get(status, ServerFailed if status >= 500 else BadRequest)
    return kind(
        str(problem.get("detail") or problem.get("title") or f"the daemon answered {status}"),
        code=re.split("[/:]", str(problem.get("type") or f"http-{status}"))[-1],
        status=status,
        retry_after=retry_after,
    )


def _seconds(retry_after: str | None) -> float | None:
    try:
        return None if retry_after is None else float(retry_after)
    except ValueError:  # RFC 9110 also allows a date; the daemon never sends one
        return None
