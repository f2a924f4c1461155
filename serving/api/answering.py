"""What happens around every request over HTTP: errors become answers, and all of them are timed and recorded."""

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from cache.errors import VoxcacheError
from cache.stopwatch import timing
from serving.log import logger
from serving.recorder import Recorder

from .problem import headers_of, problem, status_of


def answering(recorder: Recorder) -> Middleware:
    """The middleware that turns errors into answers, has every answer recorded, and logs what failed."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        watch = recorder.begin(request.headers)
        timing(watch)  # until the connection's next request: headers are sent after this has returned
        route = request.match_info.route.resource.canonical if request.match_info.route.resource else "unknown"
        status, tier, code, endless = 499, "none", "", False  # nginx's number for a client that has left
        try:
            try:
                response = await handler(request)
            except VoxcacheError as error:
                code = error.code
                response = _told(request, route, error)
            except (web.HTTPException, ConnectionError):
                raise
            except Exception:
                logger().exception("request broke", route=route)
                response = _told(request, route, VoxcacheError(_UNFORESEEN))
            status = response.status
            tier = response.headers.get("Voxcache-Tier", tier)
            endless = response.content_type == "text/event-stream"
            if not response.prepared:  # what it takes to send it is part of the request
                await response.prepare(request)
                await response.write_eof()
        except web.HTTPException as error:
            status = error.status
            raise
        finally:
            recorder.answered(route, tier, status, watch, code=code, endless=endless)
        return response

    return answer


_UNFORESEEN = "voxcache failed in a way it does not know; its log says more"


def _told(request: web.Request, route: str, error: VoxcacheError) -> web.Response:
    """The answer that tells of an error, in the form that the route's clients know."""
    status = status_of(error)
    if not request.path.startswith("/v2"):
        told = problem(error)
    else:
        if status < 400:  # "not yet", which its clients would take for the model's answer
            status = 503
        told = web.json_response({"error": str(error)}, status=status, headers=headers_of(error))
    if status >= 500 and str(error) != _UNFORESEEN:
        logger().warning("request failed", route=route, code=error.code, detail=str(error))
    return told
