"""The least that an HTTP server in the daemon's framework does to send objects: files, from its memory.

python -m loadtest.pages PORT FOLDER
"""

import sys
from pathlib import Path

import uvloop
from aiohttp import web


def application(folder: Path) -> web.Application:
    """GET /{name}: the file of this name, as the daemon writes what is in its arena."""
    files = {path.name: memoryview(path.read_bytes()) for path in folder.iterdir()}

    async def page(request: web.Request) -> web.StreamResponse:
        content = files[request.match_info["name"]]
        response = web.StreamResponse()
        response.content_length = len(content)
        await response.prepare(request)
        await response.write(content[:1024])  # aiohttp copies what goes out with the headers
        await response.write(content[1024:])
        await response.write_eof()
        return response

    async def ready(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/readyz", ready)
    app.router.add_get("/{name}", page)
    return app


if __name__ == "__main__":
    web.run_app(
        application(Path(sys.argv[2])),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        print=None,
        access_log=None,
        loop=uvloop.new_event_loop(),
    )
