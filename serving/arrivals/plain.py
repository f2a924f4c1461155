"""voxcache's own form, for whoever can choose: one JSON object, or a list of them."""

from typing import Annotated

import msgspec

from .event import Action, Event
from .post import Post, made, one_or_many


class Announcement(msgspec.Struct, frozen=True):
    """What arrived: an object (``key``), a folder of them (``key`` ending in ``/``), a series, or a whole study.

    ``expected``: instances the series will have in the end. ``complete``: nothing more will come. ``id``: what repeats
    of this announcement have in common; without it, repeats are known by key, ETag and version, or by ``time``.
    """

    study: str = ""
    series: str = ""
    key: str = ""
    modality: str = ""
    action: Action | None = None
    expected: Annotated[int, msgspec.Meta(ge=0)] | None = None
    complete: bool = False
    id: str = ""
    etag: str = ""
    size: Annotated[int, msgspec.Meta(ge=0)] = 0
    version: str = ""
    time: str = ""


def parse(post: Post) -> list[Event]:
    """The events of the announcements, in their order. Raises: BadRequest."""
    return [event_of(told, "plain", "created") for told in one_or_many(post.body, Announcement, "an announcement")]


def event_of(told: Announcement, source: str, action: Action, identity: tuple[str, ...] = (), time: str = "") -> Event:
    """The event of one announcement; ``action`` and ``time`` where it tells none. Raises: BadRequest."""
    action = told.action or action
    time = told.time or time
    if not identity:
        place = (told.key, told.study, told.series, action)
        if told.id:
            identity = ("id", told.id)
        elif told.etag or told.version or time:
            identity = (*place, told.version or told.etag.strip('"'), time)
    return made(
        source,
        action,
        identity,
        key=told.key,
        study=told.study,
        series=told.series,
        modality=told.modality,
        expected=told.expected,
        complete=told.complete,
        etag=told.etag,
        size=told.size,
        version=told.version,
        time=time,
    )
