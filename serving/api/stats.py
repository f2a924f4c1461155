"""Routes that tell how the daemon is doing, at once or every second."""

import asyncio
from typing import Final

import msgspec
from aiohttp import web

from serving.stats import Stats

from .wire import json_answer

_EVERY_S: Final = 1.0


class StatsRoutes:
    """The handlers. Those who listen are told nothing any more once the daemon is about to stop."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._closing = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/stats", self.stats), web.get("/v1/stats/events", self.stats_events)]

    async def hush(self, _: object = None) -> None:
        """End what listens: the daemon is about to stop."""
        self._closing.set()

    async def stats(self, request: web.Request) -> web.Response:
        """How the daemon is doing: latencies by tier and stage, objectives, tiers, hits, what is under way and slow."""
        return json_answer(await self._stats.now(), headers={"Cache-Control": "no-store"})

    async def stats_events(self, request: web.Request) -> web.StreamResponse:
        """The same as server-sent events, one ``stats`` a second, until the client leaves."""
        response = web.StreamResponse(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        await response.prepare(request)
        while not self._closing.is_set():
            told = msgspec.json.encode(await self._stats.now())
            await response.write(b"event: stats\ndata: " + told + b"\n\n")
            try:
                async with asyncio.timeout(_EVERY_S):
                    await self._closing.wait()
            except TimeoutError:
                continue
        await response.write_eof()
        return response
