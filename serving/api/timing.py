"""How long each stage of an answer took, as its headers tell it."""

from aiohttp import web

from cache.stopwatch import Stages, current


def server_timing(stages: Stages) -> str:
    """One entry a stage, in milliseconds (https://www.w3.org/TR/server-timing/). ``stages`` are in seconds."""
    return ", ".join(f"{name};dur={seconds * 1e3:.3f}" for name, seconds in stages.items())


async def tell_timing(request: web.Request, response: web.StreamResponse) -> None:
    """The stages so far, on every answer: to be called as its headers are sent."""
    watch = current()
    if not watch.names:
        watch.lap("handle")
    if watch.names:
        response.headers["Server-Timing"] = server_timing(watch.stages)
