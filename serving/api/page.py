"""The status page: a few files, served as they are packaged, to browsers that may load nothing else."""

import hashlib
from importlib import resources
from typing import Final

from aiohttp import ETag, web

_FILES: Final = {
    "index.html": "text/html",
    "style.css": "text/css",
    "page.js": "text/javascript",
    "chart.js": "text/javascript",
    "words.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}

#: It asks this daemon alone, and runs and looks as these files say: nothing inline, nothing framed, nothing sent.
#: https://www.w3.org/TR/CSP3/
_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)

_HEADERS: Final = {
    # asked again each time, and answered with 304: after an upgrade no file meets another of before
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Page:
    """The handlers. What is shown comes from ``/v1/stats``: the files themselves are the same on every node."""

    def __init__(self) -> None:
        folder = resources.files("serving") / "page"
        self._bodies = {name: (folder / name).read_bytes() for name in _FILES}
        self._etags = {name: hashlib.sha256(body).hexdigest()[:32] for name, body in self._bodies.items()}

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/", self.index), web.get("/page/{name}", self.part)]

    async def index(self, request: web.Request) -> web.Response:
        """The page."""
        return self._answer(request, "index.html")

    async def part(self, request: web.Request) -> web.Response:
        """What belongs to it."""
        name = request.match_info["name"]
        if name not in _FILES:
            raise web.HTTPNotFound
        return self._answer(request, name)

    def _answer(self, request: web.Request, name: str) -> web.Response:
        etag = ETag(self._etags[name])
        # https://www.rfc-editor.org/rfc/rfc9110#section-13.1.2
        known = request.if_none_match or ()
        if any(each.value in (etag.value, "*") for each in known):
            response = web.Response(status=304, headers=_HEADERS)
        else:
            response = web.Response(
                body=self._bodies[name], content_type=_FILES[name], charset="utf-8", headers=_HEADERS
            )
        response.etag = etag
        return response
