"""S3 event notifications, as AWS, MinIO and Ceph's gateway send them, and as EventBridge and CloudEvents carry them.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html
"""

from typing import Final
from urllib.parse import unquote_plus

import msgspec

from cache.errors import BadRequest

from .event import Action, Event
from .post import made, read

#: By the start of an event's name, the first that fits; None for what changes nothing that is cached.
_ACTIONS: Final[tuple[tuple[str, Action | None], ...]] = (
    ("ObjectCreated:PutTagging", "changed"),  # MinIO's names for what AWS calls ObjectTagging and ObjectAcl
    ("ObjectCreated:DeleteTagging", "changed"),
    ("ObjectCreated:PutRetention", "changed"),
    ("ObjectCreated:PutLegalHold", "changed"),
    ("ObjectCreated:", "created"),
    ("ObjectRemoved:", "removed"),
    ("LifecycleExpiration:", "removed"),
    ("ObjectLifecycle:Expiration:", "removed"),  # Ceph's
    ("ReducedRedundancyLostObject", "removed"),
    ("ObjectRestore:Completed", "restored"),
    ("ObjectTagging:", "changed"),
    ("", None),
)


class _Bucket(msgspec.Struct):
    name: str


class _Object(msgspec.Struct):
    key: str
    size: int | None = None
    eTag: str | None = None  # noqa: N815  # S3's own names
    versionId: str | None = None  # noqa: N815
    sequencer: str | None = None


class _S3(msgspec.Struct):
    bucket: _Bucket
    object: _Object


class Record(msgspec.Struct):
    """One record of a notification."""

    eventName: str  # noqa: N815
    s3: _S3
    eventSource: str = "aws:s3"  # noqa: N815
    eventTime: str = ""  # noqa: N815


class Notification(msgspec.Struct):
    """The records of a notification; ``Event`` is there in what AWS sends once, when notifications are set up."""

    Records: list[Record] | None = None
    Event: str = ""


def events(body: bytes | msgspec.Raw, bucket: str) -> list[Event]:
    """The events of one notification, in its order; records of other buckets and other kinds are left out.

    Raises:
        BadRequest: the body is no S3 notification.
    """
    notification = read(body, Notification, "an S3 event notification")
    if notification.Records is None:
        if notification.Event == "s3:TestEvent":
            return []
        raise BadRequest("this is not an S3 event notification: it has no Records")
    found = (event_of(record, bucket) for record in notification.Records)
    return [event for event in found if event is not None]


def event_of(record: Record, bucket: str) -> Event | None:
    """The event of one record, or None if nothing of ours has changed.

    AWS and MinIO percent-encode the key; Ceph (``eventSource`` ``ceph:s3``) sends it raw, and decoding it would spoil
    a ``+``. Ceph leaves out the ``s3:`` before the event's name, as does AWS. Ceph's sequencer is byte-swapped: it
    tells writes apart, but does not sort them, so nothing here relies on an order.

    Raises: BadRequest.
    """
    told = record.s3.object
    kind = record.eventName.removeprefix("s3:")
    action = next(action for start, action in _ACTIONS if kind.startswith(start))
    if action is None or bucket not in ("", record.s3.bucket.name):
        return None
    return object_event(
        record.s3.bucket.name,
        action,
        told.key if record.eventSource.startswith("ceph") else unquote_plus(told.key),
        etag=told.eTag or "",
        size=told.size or 0,
        version=told.versionId or "",
        moment=told.sequencer or record.eventTime,
        time=record.eventTime,
    )


def object_event(
    bucket: str, action: Action, key: str, *, etag: str, size: int, version: str, moment: str, time: str
) -> Event:
    """The same event by whatever way it came, direct or wrapped.

    A version is made once, so its announcements are repeats of each other. Without versions the same bytes can be
    written again after they were removed: only ``moment`` tells that from a repeat.

    Raises: BadRequest.
    """
    etag = etag.strip('"')
    once = bool(version) and action == "created"
    identity = (bucket, key, action, version or etag, "" if once else moment)
    return made("s3", action, identity, key=key, etag=etag, size=size, version=version, time=time)
