"""DICOM events of Azure Health Data Services, as Event Grid posts them: in its own schema or as CloudEvents.

https://learn.microsoft.com/azure/event-grid/event-schema-azure-health-data-services
https://learn.microsoft.com/azure/event-grid/end-point-validation-event-grid-events-schema
"""

from typing import Final

import msgspec

from cache.errors import BadRequest

from .event import Action, Event
from .post import Handshake, Post, made, one_or_many, read

PREFIX: Final = "Microsoft.HealthcareApis."

_VALIDATION: Final = "Microsoft.EventGrid.SubscriptionValidationEvent"
_ACTIONS: Final[dict[str, Action]] = {
    f"{PREFIX}DicomImageCreated": "created",
    f"{PREFIX}DicomImageUpdated": "changed",
    f"{PREFIX}DicomImageDeleted": "removed",
}


class Delivered(msgspec.Struct):
    """One event of a delivery: ``eventType``, ``eventTime`` in Event Grid's schema, ``type``, ``time`` in CloudEvents.

    Which of the two it is is not asked: Azure's own examples write ``specVersion`` as well as ``specversion``.
    """

    id: str
    data: msgspec.Raw
    eventType: str = ""  # noqa: N815  # Event Grid's own names
    eventTime: str = ""  # noqa: N815
    type: str = ""
    time: str = ""


class _Image(msgspec.Struct):
    imageStudyInstanceUid: str  # noqa: N815
    imageSeriesInstanceUid: str  # noqa: N815


class _Validation(msgspec.Struct):
    validationCode: str  # noqa: N815


def parse(post: Post) -> list[Event] | Handshake:
    """The events of a delivery (FHIR's and others are left out), or the answer to a validation. Raises: BadRequest."""
    events: list[Event] = []
    for told in one_or_many(post.body, Delivered, "a delivery of Event Grid"):
        kind = told.eventType or told.type
        if not kind:
            raise BadRequest("an event of Event Grid has neither eventType nor type")
        if kind == _VALIDATION:
            code = read(told.data, _Validation, "a validation of Event Grid").validationCode
            return Handshake(answer={"validationResponse": code})
        if (event := image_event(kind, told.data, (told.id,), told.eventTime or told.time)) is not None:
            events.append(event)
    return events


def image_event(kind: str, data: msgspec.Raw, identity: tuple[str, ...], time: str) -> Event | None:
    """The event of one image, or None if it is about no image. Raises: BadRequest."""
    if (action := _ACTIONS.get(kind)) is None:
        return None
    image = read(data, _Image, "a DICOM event of Azure Health Data Services")
    return made(
        "azure", action, identity, study=image.imageStudyInstanceUid, series=image.imageSeriesInstanceUid, time=time
    )
