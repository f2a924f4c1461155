"""Is it alive, is it ready, what does it count: what orchestrators and Prometheus ask."""

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from serving.metrics import Metrics

#: Whether one thing the daemon needs is there, by name.
Checks = Callable[[], Awaitable[dict[str, bool]]]


#: Without these, tensors that are held are answered still.
_SOME_NEED: Final = {"triton", "arrivals"}


class Health:
    """The handlers. ``checks`` says what is there; ``draining`` turns readiness off before the end.

    ``look`` finds out what gauges tell that cannot be read at once; it is called before each scrape.
    """

    def __init__(self, checks: Checks, metrics: Metrics, look: Callable[[], Awaitable[None]]) -> None:
        self._checks = checks
        self._look = look
        self._metrics = metrics
        self.draining = False

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/livez", self.live),
            web.get("/readyz", self.ready),
            web.get("/metrics", self.metrics),
        ]

    async def live(self, request: web.Request) -> web.Response:
        """The event loop turns."""
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """Requests can be answered: 503 while draining. What only some need is told, but no reason to stay away."""
        checks = await self._checks()
        ready = not self.draining and all(
            well for name, well in checks.items() if name.partition(".")[0] not in _SOME_NEED
        )
        status = "ok" if ready else "draining" if self.draining else "not ready"
        return web.json_response({"status": status, "checks": checks}, status=200 if ready else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        """The metrics in the text format of Prometheus, or of OpenMetrics with exemplars, as Accept says."""
        await self._look()
        body, media_type = await self._metrics.scraped(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": media_type})
