"""The webhooks' route: what is posted is vouched for, parsed, and on disk before it is answered."""

import asyncio
import contextlib
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from cache.errors import BadRequest, NotConfirmed, NotFound, Overloaded, Shed, Unauthorized
from cache.interfaces import Clock
from cache.keys import SeriesRef
from serving.arrivals.auth import SecretSettings, check
from serving.arrivals.event import Event, Taker
from serving.arrivals.post import Handshake, Post
from serving.arrivals.sources import SOURCES, Source
from serving.audit import SILENT, Agent, Auditor
from serving.audit.record import ANNOUNCE, REFUSE

from .wire import json_answer, read_body

#: Seconds that a subscription's confirmation may take.
_VISIT_S: Final = 10.0
#: Seconds that a body may take to come: what it will need is counted until then.
_BODY_S: Final = 30.0
#: Bytes of a body that is parsed on the loop.
_AT_ONCE: Final = 32 << 10


class ArrivalAnswer(msgspec.Struct, frozen=True):
    """How many events were accepted, and how many of them were new."""

    accepted: int
    new: int


class WebhookSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may post arrivals, and how much at a time.

    secrets: what a source proves itself with, by the source's name.
    max_bytes: bytes of posts that are worked on at the same time; past that they are answered with 429. What is made
        of them in memory takes several times as much.
    confirm: where subscriptions may be confirmed: scheme and host of the URL that SNS wants visited; a * stands for
        one part of the name.
    """

    secrets: dict[str, SecretSettings] = {}
    max_bytes: int = 16 << 20
    confirm: tuple[str, ...] = ("https://sns.*.amazonaws.com", "https://sns.*.amazonaws.com.cn")


class Webhooks:
    """``POST /v1/arrivals/{source}``, for every source in the table."""

    def __init__(
        self,
        settings: WebhookSettings,
        taker: Taker,
        clock: Clock,
        *,
        bucket: str,
        max_body: int,
        audit: Auditor = SILENT,
    ) -> None:
        self._audit = audit
        self._settings = settings
        self._taker = taker
        self._clock = clock
        self._bucket = bucket
        self._max_body = max_body
        self._under_way = 0

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/arrivals/{source}", self.arrive), web.options("/v1/arrivals/{source}", self.ask)]

    async def arrive(self, request: web.Request) -> web.Response:
        """Accept a webhook's events: 202 once they are on disk; 200 for a sender that first asks to be confirmed."""
        source = _source(request)
        with self._room(request.content_length):
            try:
                async with asyncio.timeout(_BODY_S):
                    body = await read_body(request, self._max_body)
            except TimeoutError:
                raise BadRequest(f"the body did not come within {_BODY_S:g} s") from None
            post = Post(body, request.headers, self._bucket)
            secret = self._settings.secrets.get(source.name, SecretSettings())
            who = self._audit.who.arrival(source.name, request.remote or "")
            try:
                check(secret, post, request.query, self._clock.now())
            except Unauthorized as error:
                self._audit.note(REFUSE, who, None, error.code)
                raise
            # a large body takes tens of milliseconds, and the loop serves hits meanwhile
            found = source.parse(post) if len(body) <= _AT_ONCE else await asyncio.to_thread(source.parse, post)
            if isinstance(found, Handshake):
                return await self._welcome(found)
            events = [each if each.id else msgspec.structs.replace(each, id=secrets.token_hex(16)) for each in found]
            try:
                new = await self._taker.accept(events) if events else 0
            except Overloaded as error:
                raise Shed(str(error)) from error
            self._announced(events, who)
        return json_answer(ArrivalAnswer(len(events), new), 202)

    async def ask(self, request: web.Request) -> web.Response:
        """Tell a sender of CloudEvents, which asks before it sends, that it is welcome.

        https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/http-webhook.md#4-abuse-protection
        """
        _source(request)
        origin = request.headers.get("WebHook-Request-Origin", "")
        if not re.fullmatch(r"[A-Za-z0-9.-]{1,253}", origin):
            raise BadRequest("WebHook-Request-Origin names no host")
        return web.Response(
            status=200, headers={"Allow": "POST", "WebHook-Allowed-Origin": origin, "WebHook-Allowed-Rate": "*"}
        )

    def _announced(self, events: Sequence[Event], who: Agent) -> None:
        """Record which studies and series are named; objects by their keys are not, which somebody else has chosen."""
        named = Counter(SeriesRef(event.study, event.series) for event in events)
        for ref, count in named.items():
            self._audit.note(ANNOUNCE, who, ref, details=(("events", str(count)),))

    @contextlib.contextmanager
    def _room(self, announced: int | None) -> Iterator[None]:
        """Count a body against what may be worked on, for as long as it is in memory. Raises: Shed."""
        nbytes = min(self._max_body if announced is None else announced, self._max_body)
        # one is always taken: else a single large body would be refused for ever
        if self._under_way and self._under_way + nbytes > self._settings.max_bytes:
            raise Shed(f"{self._under_way} bytes of arrivals are being worked on already; retry later")
        self._under_way += nbytes
        try:
            yield
        finally:
            self._under_way -= nbytes

    async def _welcome(self, handshake: Handshake) -> web.Response:
        if handshake.visit:
            await visit(handshake.visit, self._settings.confirm)
        return json_answer(handshake.answer, 200)


async def visit(url: str, allowed: Sequence[str]) -> None:
    """Visit ``url`` if its scheme and host are ``allowed``; nothing of the answer is used, no redirect is followed.

    Raises:
        BadRequest: they are not.
        NotConfirmed: the visit did not go well.
    """
    try:
        place = URL(url)
        origin = str(place.origin())
    except ValueError:
        raise BadRequest("the subscription's URL is no URL of a host") from None
    if place.user is not None or place.password is not None or not any(_allows(each, origin) for each in allowed):
        raise BadRequest(f"subscriptions are not confirmed at {origin[:200]}: it is not in webhooks.confirm")
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_VISIT_S)) as session,
            session.get(URL(url, encoded=True), allow_redirects=False) as answer,
        ):
            status = answer.status
    except (aiohttp.ClientError, OSError, ValueError) as error:  # a TimeoutError is an OSError
        raise NotConfirmed(f"the subscription could not be confirmed at {origin}: {type(error).__name__}") from None
    if status != 200:
        raise NotConfirmed(f"the subscription could not be confirmed: {origin} answered {status}")


def _allows(pattern: str, origin: str) -> bool:
    return re.fullmatch(re.escape(pattern.rstrip("/")).replace(r"\*", "[a-z0-9-]+"), origin) is not None


def _source(request: web.Request) -> Source:
    name = request.match_info["source"]
    if name not in SOURCES:
        raise NotFound(f"no arrivals are taken from {name[:80]!r}; known: {', '.join(sorted(SOURCES))}")
    return SOURCES[name]
