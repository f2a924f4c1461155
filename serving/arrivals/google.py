"""What Google Pub/Sub pushes: DICOM stores of the Healthcare API, and buckets of Cloud Storage.

https://cloud.google.com/pubsub/docs/push
https://cloud.google.com/healthcare-api/docs/dicom-pubsub
https://cloud.google.com/storage/docs/pubsub-notifications
"""

import base64
import binascii
import re
from typing import Final

import msgspec

from cache.errors import BadRequest

from .event import Action, Event
from .post import Post, made, read

_PLACE: Final = re.compile(r"(?:^|/)dicomWeb/studies/([^/]+)(?:/series/([^/]+))?(?:/instances/[^/]+)?/?")

#: By Cloud Storage's event type, and by the last word of Eventarc's.
_OBJECT_ACTIONS: Final[dict[str, Action]] = {
    "OBJECT_FINALIZE": "created",
    "OBJECT_METADATA_UPDATE": "changed",
    "OBJECT_DELETE": "removed",
    "OBJECT_ARCHIVE": "removed",  # the live version is no more
    "finalized": "created",
    "metadataUpdated": "changed",
    "deleted": "removed",
    "archived": "removed",
}


class _Message(msgspec.Struct):
    messageId: str = ""  # noqa: N815  # Pub/Sub's own names
    publishTime: str = ""  # noqa: N815
    attributes: dict[str, str] = {}
    data: str = ""


class Push(msgspec.Struct):
    """One message, as Pub/Sub pushes it."""

    message: _Message


class _Object(msgspec.Struct):
    bucket: str
    name: str
    generation: str | int = ""
    size: str | int = 0
    etag: str = ""


def parse(post: Post) -> list[Event]:
    """The event of one pushed message, or none if it is about nothing of ours. Raises: BadRequest."""
    message = read(post.body, Push, "a push of Pub/Sub").message
    told = message.attributes
    if "eventType" in told and "objectId" in told:
        found = _from_storage(message, post.bucket)
        return [] if found is None else [found]
    study, series = told.get("studyInstanceUID", ""), told.get("seriesInstanceUID", "")
    if not study:
        # a store that was set up earlier sends the resource's path alone
        place = _PLACE.search(_text(message.data))
        if place is None:
            raise BadRequest("the message names no study: neither in its attributes, nor a resource's path in its data")
        study, series = place[1], place[2] or ""
    event = made(
        "pubsub",
        _action(told.get("action", "")),
        (message.messageId,) if message.messageId else (),
        study=study,
        series=series,
        modality=told.get("modality", ""),
        version=told.get("versionId", ""),
        time=told.get("lastUpdatedTime") or message.publishTime,
    )
    return [event]


def object_event(kind: str, data: msgspec.Raw, bucket: str, source: str, identity: tuple[str, ...]) -> Event | None:
    """The event of an object in Cloud Storage as Eventarc describes it, or None if it is none of ours.

    Raises: BadRequest.
    """
    if (action := _OBJECT_ACTIONS.get(kind.rpartition(".")[2])) is None:
        return None
    told = read(data, _Object, "an object of Cloud Storage")
    if bucket not in ("", told.bucket):
        return None
    size = str(told.size)
    if not size.isdecimal():
        raise BadRequest(f"the object's size is no number: {size[:40]!r}")
    return made(source, action, identity, key=told.name, etag=told.etag, size=int(size), version=str(told.generation))


def _from_storage(message: _Message, bucket: str) -> Event | None:
    told = message.attributes
    action = _OBJECT_ACTIONS.get(told["eventType"])
    if action is None or bucket not in ("", told.get("bucketId")):
        return None
    if action == "removed" and "overwrittenByGeneration" in told:
        return None  # the new generation is announced by itself
    return made(
        "pubsub",
        action,
        (told.get("bucketId", ""), told["objectId"], told["eventType"], message.messageId),
        key=told["objectId"],
        version=told.get("objectGeneration", ""),
        time=told.get("eventTime") or message.publishTime,
    )


def _action(endpoint: str) -> Action:
    """By the endpoint's name, such as StoreInstances, ImportDicomData, SetBlobSettings or DeleteSeries."""
    if endpoint.startswith("Delete"):
        return "removed"
    return "changed" if endpoint.startswith(("Set", "Update")) else "created"


def _text(data: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode()
    except (binascii.Error, ValueError):
        raise BadRequest("the message's data is not base64 of UTF-8 text") from None
