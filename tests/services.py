"""Real servers for tests, on loopback ports of their own: an S3 gateway, a proxy before it that fails, and Redis.

The gateway is Ceph's (``deploy/services/ceph-rgw``), installed on first use under ``.services/``; Redis is the system's
(``deploy/setup redis``).
"""

import asyncio
import os
import socket
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import msgspec
import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from aiohttp import web
from yarl import URL

from cache.origin.s3 import S3Settings

ROOT = Path(__file__).resolve().parent.parent
_RGW = ROOT / "deploy" / "services" / "ceph-rgw"
_SESSION = get_session()  # it keeps what clients are made from, which takes longer to load than most tests run
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"}

_Result = TypeVar("_Result")

Mode = Literal["pass", "drop", "500", "503", "403", "stall", "cut"]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class S3Service(msgspec.Struct, frozen=True):
    """A running S3 server and the keys of a user who may do everything."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str

    def settings(self, bucket: str, **changes: Any) -> S3Settings:
        """An origin's settings for one of its buckets, with retries that come soon, and no request made twice."""
        given: dict[str, Any] = {
            "bucket": bucket,
            "endpoint_url": self.endpoint,
            "region": self.region,
            "access_key": self.access_key,
            "secret_key": self.secret_key,
            "backoff_s": 0.01,
            "hedge": 0.0,
        }
        return S3Settings(**(given | changes))

    def client(self) -> AbstractAsyncContextManager[Any]:
        """An aiobotocore client."""
        return self._open(
            "s3", config=AioConfig(s3={"addressing_style": "path"}, request_checksum_calculation="when_required")
        )

    def _open(self, service: str, **more: Any) -> AbstractAsyncContextManager[Any]:
        opened: AbstractAsyncContextManager[Any] = _SESSION.create_client(
            service,
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            **more,
        )
        return opened

    async def bucket(self, files: Mapping[str, bytes] | None = None, *, versioned: bool = False) -> str:
        """The name of a new bucket that holds ``files``."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        async with self.client() as client:
            await client.create_bucket(Bucket=name)
            if versioned:
                await client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        await self.put(name, files or {})
        return name

    async def put(self, bucket: str, files: Mapping[str, bytes]) -> dict[str, str]:
        """Store ``files``; their version ids ("" in a bucket without versions)."""
        slots = asyncio.Semaphore(16)
        async with self.client() as client:

            async def put(key: str, data: bytes) -> tuple[str, str]:
                async with slots:
                    answer = await client.put_object(Bucket=bucket, Key=key, Body=data)
                    return key, answer.get("VersionId", "")

            return dict(await asyncio.gather(*(put(key, data) for key, data in files.items())))

    async def delete(self, bucket: str, key: str) -> None:
        async with self.client() as client:
            await client.delete_object(Bucket=bucket, Key=key)

    async def announce(self, bucket: str, url: str) -> None:
        """Have what happens to the bucket's objects posted to ``url``, each time before the request that did it ends.

        https://docs.ceph.com/en/latest/radosgw/notifications/
        """
        topic = f"topic-{bucket}"
        async with self._open("sns") as sns:
            arn = (await sns.create_topic(Name=topic, Attributes={"push-endpoint": url}))["TopicArn"]
        events = ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"]
        configuration = {"TopicConfigurations": [{"Id": topic, "TopicArn": arn, "Events": events}]}
        async with self.client() as client:
            await client.put_bucket_notification_configuration(Bucket=bucket, NotificationConfiguration=configuration)


@contextmanager
def s3_gateway(state: Path) -> Iterator[S3Service]:
    """A real S3 gateway of its own, empty at the start; what it stores is under ``state``."""
    port = free_port()
    environment = os.environ | {
        "CEPH_RGW_DIR": str(ROOT / ".services" / "ceph"),
        "CEPH_RGW_STATE": str(state),
        "CEPH_RGW_PORT": str(port),
        "CEPH_RGW_ACCESS_KEY": "VOXCACHETESTS0000001",
        "CEPH_RGW_SECRET_KEY": "secretOfTheTestsOnly000000000000000000001",
    }

    def run(command: str) -> None:
        done = subprocess.run([_RGW, command], env=environment, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stderr

    run("install")
    run("start")
    try:
        yield S3Service(
            endpoint=f"http://127.0.0.1:{port}",
            access_key=environment["CEPH_RGW_ACCESS_KEY"],
            secret_key=environment["CEPH_RGW_SECRET_KEY"],
            region="us-east-1",
        )
    finally:
        run("stop")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Service]:
    """A real S3 gateway, empty at the start of the session."""
    with s3_gateway(tmp_path_factory.mktemp("ceph")) as service:
        yield service


class S3Proxy:
    """Stands before an S3 server, passes everything on unchanged, counts it, and fails on demand.

    It runs in a thread with a loop of its own, so tests, daemons and other processes can use it alike. Requests keep
    their Host header: signatures cover it, and the server checks them against what the client has signed.

    ``mode``: "pass"; "drop" closes the connection without an answer; "500", "503", "403" are the answer; "stall" says
    nothing until the mode changes; "cut" ends the body halfway. ``only`` limits faults to paths that contain it, and
    ``times`` to so many requests.
    """

    def __init__(self, target: S3Service) -> None:
        self.port = free_port()
        self.service = msgspec.structs.replace(target, endpoint=f"http://127.0.0.1:{self.port}")
        self.counts: Counter[tuple[str, str]] = Counter()
        self.stalled = threading.Event()
        self._target = target.endpoint
        self._faults: tuple[Mode, str, int] = ("pass", "", 0)
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="s3-proxy")

    def fail(self, mode: Mode, *, only: str = "", times: int = 1 << 30) -> None:
        """From now on answer in this way. Requests that stall go on."""

        async def change() -> None:
            self._faults = (mode, only, times)
            self._changed.set()
            self._changed = asyncio.Event()
            self.stalled.clear()

        self._run(change())

    def heal(self) -> None:
        self.fail("pass")

    def gets(self, part: str = "") -> int:
        """GETs of objects (not listings) whose path contains ``part``, failed ones included."""
        return sum(
            n for (method, path), n in self.counts.items() if method == "GET" and path.count("/") > 1 and part in path
        )

    def lists(self) -> int:
        """Listings."""
        return sum(n for (method, path), n in self.counts.items() if method == "GET" and path.count("/") == 1)

    def start(self) -> None:
        self._thread.start()
        self._run(self._listen())

    def stop(self) -> None:
        self.heal()
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> None:
        self._session = aiohttp.ClientSession(
            auto_decompress=False, skip_auto_headers=("Accept-Encoding", "User-Agent")
        )
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    def _fate(self, path: str) -> Mode:
        mode, only, times = self._faults
        if mode == "pass" or only not in path or times == 0:
            return "pass"
        self._faults = (mode, only, times - 1)
        return mode

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rstrip("/")
        self.counts[request.method, path] += 1
        fate = self._fate(path)
        if fate == "stall":
            self.stalled.set()
            await self._changed.wait()
            fate = "pass"
        if fate == "drop":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()  # nobody is there to read it
        if fate in ("500", "503", "403"):
            code = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}[fate]
            return web.Response(
                status=int(fate), text=f"<Error><Code>{code}</Code></Error>", content_type="application/xml"
            )
        async with self._passed_on(request) as answer:
            headers = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(request)
            left = int(answer.headers.get("Content-Length", 0)) // 2
            async for chunk in answer.content.iter_any():
                if fate == "cut":
                    await response.write(chunk[:left])
                    left -= len(chunk)
                    if left <= 0 and request.transport is not None:
                        request.transport.close()
                        return response
                else:
                    await response.write(chunk)
            await response.write_eof()
            return response

    @asynccontextmanager
    async def _passed_on(self, request: web.Request) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP]
        async with self._session.request(
            request.method,
            URL(self._target + request.raw_path, encoded=True),
            headers=headers,
            data=await request.read() or None,
            allow_redirects=False,
        ) as answer:
            yield answer


@contextmanager
def before(target: S3Service) -> Iterator[S3Proxy]:
    """A proxy before the gateway; its ``service`` is used in place of ``target``."""
    proxy = S3Proxy(target)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture
def s3_proxy(s3: S3Service) -> Iterator[S3Proxy]:
    """A proxy before the gateway; ``s3_proxy.service`` is used in place of ``s3``."""
    with before(s3) as proxy:
        yield proxy


class RedisServer:
    """A redis-server of a test's own, which keeps what it acknowledged: it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Return once it answers, with what it held before."""
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", *options]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        while not self.answers():
            assert self._process.poll() is None, (self._folder / "redis.log").read_text()
            time.sleep(0.01)  # another process, which tells this only when asked

    def answers(self) -> bool:
        """Whether it does what it is asked: not while it loads what it held."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def kill(self) -> None:
        """End it without a chance to write anything down."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def flush(self) -> None:
        """Forget everything."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.sendall(b"FLUSHALL\r\n")
            assert connection.recv(64).startswith(b"+OK")


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """A Redis that runs, until the block ends."""
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that is there during the whole session; each test uses a prefix of its own."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis for one test, which may stop and start it."""
    with redis_server(tmp_path / "redis") as server:
        yield server
