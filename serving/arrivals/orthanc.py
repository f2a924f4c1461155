"""What the scripts in deploy/orthanc post: a change that Orthanc went through, with the UIDs that Orthanc's id hides.

https://orthanc.uclouvain.be/book/users/rest.html#tracking-changes
"""

from typing import Annotated, Final

import msgspec

from cache.errors import BadRequest

from .event import Action, Event
from .post import Post, made, one_or_many

#: None for what changes nothing that is cached.
ACTIONS: Final[dict[str, Action | None]] = {
    "StableSeries": "created",
    "StableStudy": "created",
    "NewInstance": "created",
    "NewSeries": "created",
    "NewStudy": "created",
    "UpdatedMetadata": "changed",
    "UpdatedAttachment": "changed",
    "Deleted": "removed",
}
_STABLE: Final = ("StableSeries", "StableStudy")


class Change(msgspec.Struct, frozen=True):
    """One change. ``LastUpdate`` is Orthanc's own metadata, and tells one stable state from the next."""

    ChangeType: str
    ID: str = ""
    StudyInstanceUID: str = ""
    SeriesInstanceUID: str = ""
    Modality: str = ""
    Instances: Annotated[int, msgspec.Meta(ge=0)] | None = None
    LastUpdate: str = ""


def parse(post: Post) -> list[Event]:
    """The events of one change or a list of them. Raises: BadRequest."""
    found = (event_of(change) for change in one_or_many(post.body, Change, "a change of Orthanc"))
    return [event for event in found if event is not None]


def event_of(change: Change) -> Event | None:
    """The event of one change, or None if nothing that is cached has changed.

    Orthanc calls stable what has been quiet for its own ``StableAge``, so nothing more is waited for; nor is it once a
    series is gone.

    Raises: BadRequest.
    """
    if (action := ACTIONS.get(change.ChangeType)) is None:
        return None
    if not change.StudyInstanceUID:
        raise BadRequest(
            f"the change of {change.ID[:64]!r} has no StudyInstanceUID, and Orthanc's own id does not tell it:"
            " post with the scripts in deploy/orthanc, or have the changes polled (arrivals.orthanc)"
        )
    stable = change.ChangeType in _STABLE
    known = (change.ChangeType, change.ID, change.LastUpdate) if change.ID and change.LastUpdate else ()
    return made(
        "orthanc",
        action,
        known,
        study=change.StudyInstanceUID,
        series=change.SeriesInstanceUID,
        modality=change.Modality,
        expected=change.Instances if stable and change.SeriesInstanceUID else None,
        complete=stable or action == "removed",
        time=change.LastUpdate,
    )
