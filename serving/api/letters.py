"""Arrivals that were tried too often: what they are, and how they start again."""

from typing import Annotated, Final

import msgspec
from aiohttp import web

from cache.errors import BadRequest
from serving.arrivals.queue import DeadLetter
from serving.audit import SILENT, Auditor
from serving.audit.record import REQUEUE
from serving.warm import Warmer

from .wire import body_of, json_answer

_MOST: Final = 1000


class LettersAnswer(msgspec.Struct, frozen=True):
    """Dead letters, latest first: the event, why it was given up, and when (Unix seconds)."""

    letters: list[DeadLetter]


class RequeueRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/dead-letters``: ids of the events that start again; all of them, if it names none."""

    ids: Annotated[list[str], msgspec.Meta(max_length=10_000)] | None = None


class RequeueAnswer(msgspec.Struct, frozen=True):
    """How many dead letters started again."""

    requeued: int


class DeadLetters:
    """The handlers, over the warmer."""

    def __init__(self, warmer: Warmer, max_body: int, audit: Auditor = SILENT) -> None:
        self._audit = audit
        self._warmer = warmer
        self._max_body = max_body

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/dead-letters", self.letters), web.post("/v1/dead-letters", self.requeue)]

    async def letters(self, request: web.Request) -> web.Response:
        """Arrivals that were set aside, and why (``?limit=``, 1000 at most)."""
        limit = request.query.get("limit", str(_MOST))
        if not limit.isdecimal() or not 1 <= int(limit) <= _MOST:
            raise BadRequest(f"limit is a number from 1 to {_MOST}")
        return json_answer(LettersAnswer(await self._warmer.dead_letters(int(limit))))

    async def requeue(self, request: web.Request) -> web.Response:
        """Have arrivals that were set aside tried anew."""
        asked = await body_of(request, RequeueRequest, self._max_body)
        count = await self._warmer.requeue(asked.ids)
        self._audit.note(REQUEUE, self._audit.who.http(request), None, details=(("letters", str(count)),))
        return json_answer(RequeueAnswer(count))
