"""How bodies of the API are read and written: JSON, checked against its type, within a bound."""

from typing import Any, TypeVar

import msgspec
from aiohttp import web

from cache.errors import BadRequest

T = TypeVar("T")


async def read_body(request: web.Request, limit: int) -> bytes:
    """The whole body. Raises: BadRequest: it is longer than ``limit`` bytes."""
    body = await request.content.read(limit + 1)
    while len(body) <= limit and not request.content.at_eof():
        body += await request.content.read(limit + 1 - len(body))
    if len(body) > limit:
        raise BadRequest(f"the body is larger than server.max_body, {limit} bytes")
    return body


async def body_of(request: web.Request, kind: type[T], limit: int) -> T:
    """The body as a ``kind``; an empty one as ``{}``. Raises: BadRequest."""
    try:
        return msgspec.json.decode(await read_body(request, limit) or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not what is asked for: {error}") from error


def json_answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """``body`` as JSON."""
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json", headers=headers)
