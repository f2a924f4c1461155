"""A daemon in miniature: the wire format the client speaks, over a real socket and a real shared-memory file."""

import asyncio
import json
import mmap
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import numpy.typing as npt
from aiohttp import web

STUDY, SERIES = "1.2.826.0.1", "1.2.826.0.1.1"
OFFSET = 8192


class Double:
    """One tensor, leased and served. The test changes its attributes to change how it answers."""

    def __init__(self) -> None:
        self.volume = np.arange(24 * 16 * 16, dtype=np.int16).reshape(24, 16, 16)
        self.affine = np.array([[0, 0, 0.7, -90], [0, 0.7, 0, -80], [2.5, 0, 0, 5], [0, 0, 0, 1]], np.float64)
        self.shm = f"voxcache-test-{uuid.uuid4().hex}"  # a name that is told but does not exist stands for another node
        self.path = Path("/dev/shm", f"voxcache-test-{uuid.uuid4().hex}")
        self.socket = ""
        self.refusal: tuple[int, dict[str, str], bytes] | None = None
        self.refused_renewal: int | None = None
        self.granted_s: float | None = None
        self.body = "whole"
        self.spec_shape: list[int] | None = None
        self.token: str | None = None
        self.before_answer: Callable[[], None] = lambda: None
        self.counts: Counter[str] = Counter()
        self.connections: set[tuple[str, int]] = set()
        self.leases: dict[str, float] = {}
        self.renewed: Queue[str] = Queue()
        self.released: Queue[str] = Queue()
        self.order: list[str] = []
        self.url = ""

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "dtype": "int16",
            "shape": self.spec_shape or list(self.volume.shape),
            "axes": "zyx",
            "spacing": [2.5, 0.7, 0.7],
            "affine": self.affine.tolist(),
            "units": "HU",
        }

    # -- its life

    def start(self) -> None:
        with self.path.open("wb") as file:
            file.truncate(1 << 20)
            file.seek(OFFSET)
            file.write(self.volume.tobytes())
        self.shm = self.path.name
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="double")
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self.path.unlink(missing_ok=True)

    def overwrite(self, value: int) -> None:
        """Change the tensor's bytes in the shared memory, as only a daemon can."""
        with self.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            there: npt.NDArray[np.int16] = np.frombuffer(memory, np.int16, self.volume.size, OFFSET)
            there[:] = value
            del there

    def drop_connections(self) -> None:
        """Close every idle connection, as a server does after its keep-alive time."""

        async def close() -> None:
            assert self._runner.server is not None
            for connection in list(self._runner.server.connections):
                connection.force_close()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._observe])
        app.router.add_post("/v1/leases", self._grant)
        app.router.add_post("/v1/leases/{lease}/renew", self._renew)
        app.router.add_delete("/v1/leases/{lease}", self._release)
        app.router.add_get("/v1/studies/{study}/series/{series}/tensors/{recipe}", self._tensor)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    # -- its answers

    @web.middleware
    async def _observe(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername"))
        self.counts[f"{request.method} {request.match_info.handler.__name__.strip('_')}"] += 1
        self.order.append(request.method)
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self._problem(401, "unauthenticated", "a token is needed")
        answer: web.StreamResponse = await handler(request)
        self.before_answer()
        return answer

    def _problem(self, status: int, code: str, detail: str, **headers: str) -> web.Response:
        body = {"type": f"https://voxcache.dev/problems/{code}", "title": code, "status": status, "detail": detail}
        return web.Response(
            status=status, body=json.dumps(body).encode(), content_type="application/problem+json", headers=headers
        )

    async def _grant(self, request: web.Request) -> web.Response:
        if self.refusal is not None:
            status, headers, body = self.refusal
            return web.Response(status=status, headers=headers, body=body)
        wanted = await request.json()
        assert (wanted["study"], wanted["series"]) == (STUDY, SERIES)
        ttl = wanted["ttl_s"] if self.granted_s is None else self.granted_s
        lease = uuid.uuid4().hex
        self.leases[lease] = ttl
        told = {
            **self.spec,
            "lease": lease,
            "shm": self.shm,
            "offset": OFFSET,
            "nbytes": self.volume.nbytes,
            "tier": "ram",
            "expires": time.time() + ttl,
            "socket": self.socket,
        }
        return web.json_response(told, status=201)

    async def _renew(self, request: web.Request) -> web.Response:
        lease = request.match_info["lease"]
        self.renewed.put(lease)
        if self.refused_renewal is not None:
            return self._problem(self.refused_renewal, "refused", "no")
        if lease not in self.leases:
            return self._problem(404, "unknown-lease", "never given, or released")
        return web.json_response({"lease": lease, "expires": time.time() + self.leases[lease]})

    async def _release(self, request: web.Request) -> web.Response:
        lease = request.match_info["lease"]
        if self.leases.pop(lease, None) is None:
            return self._problem(404, "unknown-lease", "never given, or released")
        self.released.put(lease)
        return web.Response(status=204)

    async def _tensor(self, request: web.Request) -> web.StreamResponse:
        assert request.query["namespace"] == "serving"
        headers = {"Voxcache-Spec": json.dumps(self.spec), "Voxcache-Tier": "nvme"}
        content = self.volume.tobytes()
        if self.body == "whole":
            return web.Response(body=content, headers=headers)
        answer = web.StreamResponse(headers=headers)
        if self.body == "chunked":
            answer.enable_chunked_encoding()
        elif self.body == "until the connection closes":
            answer.force_close()
        else:
            answer.content_length = len(content)
        await answer.prepare(request)
        if self.body == "too short":
            content = content[:1000]
        await answer.write(content)
        if self.body == "too short":
            assert request.transport is not None
            request.transport.close()
        return answer
