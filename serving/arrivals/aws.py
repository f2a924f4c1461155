"""What AWS posts: S3 notifications as they are, or wrapped by SNS or EventBridge; HealthImaging's through EventBridge.

https://docs.aws.amazon.com/sns/latest/dg/sns-message-and-json-formats.html
https://docs.aws.amazon.com/AmazonS3/latest/userguide/ev-events.html
https://docs.aws.amazon.com/healthimaging/latest/devguide/event-notifications.html
"""

import re
from typing import Final

import msgspec

from cache.errors import BadRequest

from . import s3
from .event import Action, Event
from .post import Handshake, Post, made, read

_WHAT: Final = "a notification of S3, SNS or EventBridge"


class _Shape(msgspec.Struct):
    """Just enough to tell the envelopes apart."""

    Type: str = ""
    detail_type: str = msgspec.field(name="detail-type", default="")


def parse(post: Post) -> list[Event] | Handshake:
    """The events of one notification, in whichever envelope it came. Raises: BadRequest."""
    shape = read(post.body, _Shape, _WHAT)
    if shape.Type:
        return _from_sns(post)
    return _unwrapped(post.body, post.bucket)


def _unwrapped(body: bytes, bucket: str) -> list[Event]:
    if read(body, _Shape, _WHAT).detail_type:
        return _from_eventbridge(body, bucket)
    return s3.events(body, bucket)


# ------------------------------------------------------------------ SNS


class Sns(msgspec.Struct):
    """A message of SNS: a notification, or the question whether notifications are wanted."""

    Type: str
    TopicArn: str
    Message: str = ""
    SubscribeURL: str = ""


def _from_sns(post: Post) -> list[Event] | Handshake:
    """SNS asks first whether its messages are wanted, and holds them back until its URL has been visited."""
    envelope = read(post.body, Sns, "a message of SNS")
    if envelope.Type == "Notification":
        return _unwrapped(envelope.Message.encode(errors="replace"), post.bucket)
    if envelope.Type == "SubscriptionConfirmation":
        if not envelope.SubscribeURL:
            raise BadRequest("the subscription's confirmation has no SubscribeURL")
        return Handshake(visit=envelope.SubscribeURL)
    if envelope.Type == "UnsubscribeConfirmation":
        return []
    raise BadRequest(f"this is not a message of SNS: its Type is {envelope.Type[:80]!r}")


# ------------------------------------------------------------------ EventBridge

_S3_ACTIONS: Final[dict[str, Action]] = {
    "Object Created": "created",
    "Object Deleted": "removed",
    "Object Restore Completed": "restored",
    "Object Tags Added": "changed",
    "Object Tags Deleted": "changed",
}


class _Object(msgspec.Struct):
    key: str
    size: int = 0
    etag: str = ""
    version_id: str = msgspec.field(name="version-id", default="")
    sequencer: str = ""


class _Bucket(msgspec.Struct):
    name: str


class _S3Detail(msgspec.Struct):
    bucket: _Bucket
    object: _Object


class _ImportDetail(msgspec.Struct):
    inputS3Uri: str  # noqa: N815  # HealthImaging's own name


class EventBridge(msgspec.Struct):
    """An event of EventBridge, whatever it is about."""

    id: str
    source: str
    detail_type: str = msgspec.field(name="detail-type")
    detail: msgspec.Raw
    time: str = ""


def _from_eventbridge(body: bytes, bucket: str) -> list[Event]:
    event = read(body, EventBridge, "an event of EventBridge")
    if event.source == "aws.s3":
        found = _from_s3(event, bucket)
    elif event.source == "aws.medical-imaging":
        found = _from_healthimaging(event, bucket)
    else:
        raise BadRequest(f"no events are taken from {event.source[:80]!r}: the rule should name aws.s3")
    return [] if found is None else [found]


def _from_s3(event: EventBridge, bucket: str) -> Event | None:
    """Unlike in S3's own notifications the key is not percent-encoded here."""
    action = _S3_ACTIONS.get(event.detail_type)
    if action is None:
        return None
    detail = read(event.detail, _S3Detail, "an S3 event of EventBridge")
    if bucket not in ("", detail.bucket.name):
        return None
    told = detail.object
    return s3.object_event(
        detail.bucket.name,
        action,
        told.key,
        etag=told.etag,
        size=told.size,
        version=told.version_id,
        moment=told.sequencer or event.time,
        time=event.time,
    )


def _from_healthimaging(event: EventBridge, bucket: str) -> Event | None:
    """An import that is complete: the folder it was made from. Image sets have ids of their own, and no UIDs."""
    if event.detail_type != "Import Job Completed":
        return None
    uri = read(event.detail, _ImportDetail, "an import job's event of HealthImaging").inputS3Uri
    place = re.fullmatch(r"s3://([^/]+)/(.*)", uri, re.DOTALL)
    if place is None:
        raise BadRequest(f"the import's inputS3Uri is no place in S3: {uri[:200]!r}")
    if bucket not in ("", place[1]):
        return None
    folder = f"{place[2].rstrip('/')}/"
    return made("healthimaging", "created", (event.id,), key=folder, complete=True, time=event.time)
