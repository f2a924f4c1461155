"""Workflow requests of MONAI Deploy's Informatics Gateway, as it publishes them when a payload is complete.

https://github.com/Project-MONAI/monai-deploy-informatics-gateway ("Workflow Request event")
"""

import re
from collections import Counter
from typing import Annotated, Final

import msgspec

from .event import Event
from .post import Post, made, read

_FILE: Final = re.compile(r"(?:.*/)?([0-9.]+)/([0-9.]+)/[^/]+")


class _File(msgspec.Struct):
    path: str


class Request(msgspec.Struct):
    """A workflow request: what the gateway has stored, and where."""

    payload_id: str
    bucket: str
    file_count: Annotated[int, msgspec.Meta(ge=0)]
    correlation_id: str = ""
    timestamp: str = ""
    payload: list[_File] = []


def parse(post: Post) -> list[Event]:
    """One event for each series whose files lie under study and series UID, one for each other file.

    The gateway waits until a payload is complete, so nothing more will come; how many instances a series has is known
    where all ``file_count`` files are listed. A request that lists none stands for the payload's whole folder.

    Raises: BadRequest.
    """
    request = read(post.body, Request, "a workflow request of the Informatics Gateway")
    if post.bucket not in ("", request.bucket):
        return []
    if not request.payload:
        return [_event(request, key=f"{request.payload_id}/", expected=request.file_count)]
    whole = len(request.payload) == request.file_count
    series: Counter[tuple[str, str]] = Counter()
    events = []
    for file in request.payload:
        if (placed := _FILE.fullmatch(file.path)) is not None:
            series[placed[1], placed[2]] += 1
        else:
            events.append(_event(request, key=file.path))
    for (study, uid), files in series.items():
        events.append(_event(request, study=study, series=uid, expected=files if whole else None))
    return events


def _event(request: Request, key: str = "", study: str = "", series: str = "", expected: int | None = None) -> Event:
    return made(
        "monai",
        "created",
        (request.payload_id, request.correlation_id, key, study, series),
        key=key,
        study=study,
        series=series,
        expected=expected,
        complete=True,
        time=request.timestamp,
    )
