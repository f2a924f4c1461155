"""CloudEvents 1.0 over HTTP: structured, batched or in headers; what they carry is one of a few known kinds of data.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md
https://github.com/cloudevents/spec/blob/main/cloudevents/adapters/aws-s3.md
"""

import base64
import binascii
from typing import Final
from urllib.parse import unquote

import msgspec

from cache.errors import BadRequest

from . import azure, google, plain, s3
from .event import Action, Event
from .post import Post, read

#: By the last word of a type of which nothing else is known, such as org.example.series.deleted.
_ACTIONS: Final[dict[str, Action]] = {
    "removed": "removed",
    "deleted": "removed",
    "changed": "changed",
    "updated": "changed",
    "restored": "restored",
}


class CloudEvent(msgspec.Struct):
    """One event; ``specVersion`` is how Azure's own examples spell it."""

    id: str
    source: str
    type: str
    specversion: str = ""
    specVersion: str = ""  # noqa: N815
    time: str = ""
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    data_base64: str = ""


def parse(post: Post) -> list[Event]:
    """The events of one request, in its order. Raises: BadRequest."""
    media_type = post.header("content-type").partition(";")[0].strip().lower()
    if media_type == "application/cloudevents-batch+json":
        told = read(post.body, list[CloudEvent], "a batch of CloudEvents")
    elif post.header("ce-specversion"):
        told = [_from_headers(post)]
    else:
        told = [read(post.body, CloudEvent, "a CloudEvent")]
    found = (_event(event, post.bucket) for event in told)
    return [event for event in found if event is not None]


def _from_headers(post: Post) -> CloudEvent:
    """Binary mode: attributes are headers, percent-encoded where they are not ASCII, and the body is the data."""
    attributes = {name: unquote(post.header(f"ce-{name}")) for name in ("id", "source", "type", "specversion", "time")}
    return CloudEvent(**attributes, data=msgspec.Raw(post.body))


def _event(told: CloudEvent, bucket: str) -> Event | None:
    if not (told.id and told.source and told.type):
        raise BadRequest("a CloudEvent needs id, source and type")
    version = told.specversion or told.specVersion
    if version != "1.0":
        raise BadRequest(f"CloudEvents 1.0 are taken, not of version {version[:20]!r}")
    identity = (told.source, told.id)
    data = told.data
    if told.data_base64:
        try:
            data = msgspec.Raw(base64.b64decode(told.data_base64, validate=True))
        except (binascii.Error, ValueError):
            raise BadRequest("a CloudEvent's data_base64 is no base64") from None
    if told.type.startswith(azure.PREFIX):
        return azure.image_event(told.type, data, identity, told.time)
    if told.type.startswith("google.cloud.storage.object."):
        return google.object_event(told.type, data, bucket, "cloudevents", identity)
    if told.type.startswith("com.amazonaws.s3."):
        return s3.event_of(read(data, s3.Record, "an S3 record"), bucket)
    announcement = read(data, plain.Announcement, f"an announcement, which CloudEvent {told.id[:80]!r} should carry")
    action = _ACTIONS.get(told.type.rpartition(".")[2].lower(), "created")
    return plain.event_of(announcement, "cloudevents", action, identity, told.time)
