"""Routes of what is kept: pins, and who made them why."""

from typing import Annotated

import msgspec
from aiohttp import web

from cache.interfaces import Clock
from cache.keys import check_uid
from serving.audit import SILENT, Auditor
from serving.retention import Pin, Retention

from .wire import body_of, json_answer


class PinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``PUT /v1/studies/{study}/pin``: as what to keep it, why (no patient data), and for how long.

    ``series``: only this one of it. ``ttl_s``: seconds; unless it is given, until it is unpinned.
    """

    series: str = ""
    tag: Annotated[str, msgspec.Meta(max_length=64)] = ""
    reason: Annotated[str, msgspec.Meta(max_length=500)] = ""
    ttl_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


class PinsAnswer(msgspec.Struct, frozen=True):
    """Pins, as they were made, and the bytes that they hold, by namespace."""

    pins: list[Pin]
    nbytes: dict[str, int]


class Keeping:
    """The handlers, over the pins."""

    def __init__(self, retention: Retention, clock: Clock, max_body: int, audit: Auditor = SILENT) -> None:
        self._who = audit.who
        self._retention = retention
        self._clock = clock
        self._max_body = max_body

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/pins", self.pins),
            web.put("/v1/studies/{study}/pin", self.pin),
            web.delete("/v1/studies/{study}/pin", self.unpin),
        ]

    async def pins(self, request: web.Request) -> web.Response:
        """All pins, or those of one study: ``?study=``."""
        study = request.query.get("study", "")
        found = self._retention.pins(check_uid(study) if study else "")
        return json_answer(PinsAnswer(found, self._retention.pinned_bytes()))

    async def pin(self, request: web.Request) -> web.Response:
        """Keep a study on NVMe however full it gets; a pin of the same series and tag is replaced."""
        study = check_uid(request.match_info["study"])
        asked = await body_of(request, PinRequest, self._max_body)
        series = check_uid(asked.series) if asked.series else ""
        now = self._clock.now()
        expires = None if asked.ttl_s is None else now + asked.ttl_s
        pin = Pin(study, series, asked.tag, asked.reason, now, expires)
        await self._retention.pin(pin, self._who.http(request))
        return json_answer(pin)

    async def unpin(self, request: web.Request) -> web.Response:
        """Let go of the pin of a study (of one series: ``?series=``) with this tag: ``?tag=``."""
        study = check_uid(request.match_info["study"])
        series, tag = request.query.get("series", ""), request.query.get("tag", "")
        await self._retention.unpin(study, series, tag, self._who.http(request))
        return web.Response(status=204)
