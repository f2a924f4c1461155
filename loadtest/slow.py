"""A bucket that is late now and then: a proxy before a real gateway, as a process.

python -m loadtest.slow PORT GATEWAY SHARE SECONDS SEED

Of the GETs it passes on, ``SHARE`` wait ``SECONDS`` before anything is said, drawn from the seed. Everything is passed
on as it is, the Host header included: signatures cover it. ``/-/gets`` tells how many GETs of objects there were.
"""

import asyncio
import contextlib
import json
import random
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import aiohttp
import uvloop
from aiohttp import web
from yarl import URL

from . import servers
from .stand import Bucket

_HOP_BY_HOP: Final = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"}


def application(target: str, share: float, late_s: float, seed: int) -> web.Application:
    dice = random.Random(seed)  # noqa: S311 - dice
    session: list[aiohttp.ClientSession] = []
    gets: Counter[str] = Counter()

    async def open_session(_: web.Application) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        session.append(
            aiohttp.ClientSession(
                connector=connector, auto_decompress=False, skip_auto_headers=("Accept-Encoding", "User-Agent")
            )
        )

    async def forward(request: web.Request) -> web.StreamResponse:
        if request.path == "/-/ready":
            return web.Response()
        if request.path == "/-/gets":
            return web.json_response(gets.total())
        if request.method == "GET" and request.path.count("/") > 2:  # not a listing
            gets[request.path] += 1
        if request.method == "GET" and dice.random() < share:
            await asyncio.sleep(late_s)
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP]
        url = URL(target + request.raw_path, encoded=True)
        async with session[0].request(
            request.method, url, headers=headers, data=await request.read() or None
        ) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            return web.Response(status=answer.status, headers=kept, body=await answer.read())

    app = web.Application(client_max_size=1 << 30)
    app.on_startup.append(open_session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


@contextlib.contextmanager
def before(bucket: Bucket, place: Path, share: float, late_s: float, seed: int = 1) -> Iterator[Bucket]:
    """The same bucket, late now and then."""
    port = servers.free_port()
    command = [sys.executable, "-m", "loadtest.slow", *map(str, (port, bucket.endpoint, share, late_s, seed))]
    with servers.process(command, place / "slow.log", servers.answers(port, "/-/ready")):
        yield bucket._replace(endpoint=f"http://127.0.0.1:{port}")


def gets(bucket: Bucket) -> int:
    """GETs of objects that the proxy has seen."""
    with urllib.request.urlopen(f"{bucket.endpoint}/-/gets", timeout=30) as answer:  # noqa: S310 - our own
        return int(json.loads(answer.read()))


if __name__ == "__main__":
    loop = uvloop.new_event_loop()
    app = application(sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None, loop=loop)
