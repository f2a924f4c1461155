"""What a webhook is sent, what its parser may make of it, and what no event can be."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from cache.errors import BadRequest
from cache.keys import check_uid, digest

from .event import Action, Event

T = TypeVar("T")

#: Bytes of an object's key, in UTF-8: no store takes a longer one (S3 user guide, "Naming Amazon S3 objects").
KEY_BYTES: Final = 1024
#: PS3.5 §6.2, CS. What is none is left out: it only decides how long is waited.
_MODALITY: Final = re.compile(r"[A-Z0-9 _]{1,16}")


class Post(msgspec.Struct, frozen=True):
    """One request to a webhook. Only objects of ``bucket`` count; with "" those of every bucket do."""

    body: bytes
    headers: Mapping[str, str] = {}
    bucket: str = ""

    def header(self, name: str) -> str:
        """A header's value, "" if there is none; ``name`` in lower case."""
        return next((value for key, value in self.headers.items() if key.lower() == name), "")


class Handshake(msgspec.Struct, frozen=True):
    """The sender wants to know whether it is welcome: what it waits to hear, or the URL that it waits to be visited."""

    answer: dict[str, str] = {}
    visit: str = ""


#: From a request to its events, or to what proves that they are wanted. Pure; raises BadRequest.
Parser = Callable[[Post], list[Event] | Handshake]


def read(body: bytes | msgspec.Raw, kind: type[T], what: str) -> T:
    """``body`` as JSON of this form. Raises: BadRequest: it is not ``what``."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadRequest(f"this is not {what}: {error}") from None


def made(
    source: str,
    action: Action,
    identity: Sequence[str],
    *,
    key: str = "",
    study: str = "",
    series: str = "",
    modality: str = "",
    expected: int | None = None,
    complete: bool = False,
    etag: str = "",
    size: int = 0,
    version: str = "",
    time: str = "",
) -> Event:
    """An event that is possible; ``identity`` is what its repeats have in common, and nothing else has.

    With an empty ``identity`` the event has no id yet: the sender gives nothing that would tell news from a repeat.

    Raises:
        BadRequest: it names nothing, or something that cannot be.
    """
    if study:
        check_uid(study)
    if series:
        check_uid(series)
    if series and not study:
        raise BadRequest(f"the event names series {series}, and no study")
    if not study and not key:
        raise BadRequest("the event names neither an object nor a study")
    try:
        nbytes = len(key.encode())
    except UnicodeEncodeError:
        raise BadRequest("the event names an object whose key is no Unicode text") from None
    if nbytes > KEY_BYTES or "\0" in key:
        raise BadRequest(f"the event names an object whose key no store takes: {KEY_BYTES} bytes at most, no NUL")
    if size < 0 or (expected is not None and expected < 0):
        raise BadRequest("the event tells of a size or a number of instances below 0")
    try:
        name = digest(source, *identity) if identity else ""
    except UnicodeEncodeError:
        raise BadRequest("the event's id is no Unicode text") from None
    return Event(
        id=name,
        source=source,
        action=action,
        key=key,
        study=study,
        series=series,
        modality=modality if _MODALITY.fullmatch(modality) else "",
        expected=expected,
        complete=complete,
        etag=etag.strip('"'),
        size=size,
        version=version,
        time=time[:64],
    )


def one_or_many(body: bytes | msgspec.Raw, kind: type[T], what: str) -> list[T]:
    """``body`` as JSON of one such object, or of a list of them. Raises: BadRequest."""
    union: Any = kind | list[kind]  # type: ignore[valid-type]  # made for msgspec, not for mypy
    found: T | list[T] = read(body, union, what)
    return found if isinstance(found, list) else [found]
