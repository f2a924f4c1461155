"""A bucket as origin, on a real S3 gateway; what the gateway does not do on demand, a proxy before it does."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import ConfigError, OriginChanged, OriginDenied, OriginDown
from cache.interfaces import NullObserver, Origin
from cache.keys import SourceObject
from cache.origin.s3 import S3Origin, S3Settings, pause_s
from tests.conformance.origin import OriginConformance
from tests.services import Mode, S3Proxy, S3Service, free_port

PART = 1 << 20


class Counts(NullObserver):
    """Keeps what was counted."""

    def __init__(self) -> None:
        self.counted: list[tuple[str, tuple[str, ...]]] = []

    @property
    def tries(self) -> list[tuple[str, tuple[str, ...]]]:
        """Requests and retries, in their order; bytes are counted whenever some have come."""
        return [each for each in self.counted if each[0] != "origin_bytes"]

    def count(self, name: str, labels: Iterable[str] = (), amount: float = 1.0) -> None:
        self.counted.append((name, tuple(labels)))


@pytest.mark.service
class TestS3Origin(OriginConformance):
    @pytest.fixture
    async def bucket(self, s3: S3Service) -> str:
        self.s3 = s3
        self.bucket_name = await s3.bucket()
        return self.bucket_name

    @pytest.fixture
    async def origin(self, bucket: str) -> AsyncIterator[Origin]:
        async with opened(self.s3.settings(bucket, part_bytes=PART)) as origin:
            yield origin

    async def put(self, files: Mapping[str, bytes]) -> None:
        await self.s3.put(self.bucket_name, files)

    async def remove(self, key: str) -> None:
        await self.s3.delete(self.bucket_name, key)

    def denied(self) -> AbstractAsyncContextManager[Origin]:
        return opened(self.s3.settings(self.bucket_name, secret_key="not the secret"))

    def down(self) -> AbstractAsyncContextManager[Origin]:
        return opened(self.s3.settings(self.bucket_name, endpoint_url=f"http://127.0.0.1:{free_port()}", retries=1))

    async def test_a_bucket_that_does_not_exist(self, s3: S3Service) -> None:
        """A bucket that is not there is an origin that is down, and says so; it is no study without objects."""
        async with opened(s3.settings("nobody-made-this")) as origin:
            await self.each_fails(origin, SourceObject("s/a", 6, "0" * 32), OriginDown)
            with pytest.raises(OriginDown, match="there is no bucket 'nobody-made-this'"):
                await origin.read("s/a")

    async def test_a_version_of_an_object(self, s3: S3Service) -> None:
        """An object that was listed with its version id is delivered even after it was replaced."""
        bucket = await s3.bucket(versioned=True)
        versions = await s3.put(bucket, {"s/a": b"before"})
        async with opened(s3.settings(bucket)) as origin:
            (listed,) = await origin.list("s/a")
            await s3.put(bucket, {"s/a": b"after!"})
            into = bytearray(6)
            await origin.fetch(SourceObject(listed.key, 6, listed.etag, versions["s/a"]), memoryview(into))
            assert into == b"before"
            with pytest.raises(OriginChanged):
                await origin.fetch(listed, memoryview(into))


@pytest.mark.service
class TestFailures:
    """What becomes of an origin's faults. The proxy counts the requests each of them costs."""

    DATA = random.Random(2).randbytes(3 * PART // 2)

    @pytest.fixture
    async def bucket(self, s3: S3Service) -> str:
        return await s3.bucket({"s/a": self.DATA})

    @pytest.fixture
    def observer(self) -> Counts:
        return Counts()

    @pytest.fixture
    async def origin(self, s3_proxy: S3Proxy, bucket: str, observer: Counts) -> AsyncIterator[S3Origin]:
        settings = s3_proxy.service.settings(bucket, retries=2, read_timeout_s=0.3)
        origin = await S3Origin.open(settings, observer)
        try:
            yield origin
        finally:
            await origin.close()

    @pytest.fixture
    async def source(self, origin: S3Origin) -> SourceObject:
        (listed,) = await origin.list("s/")
        return listed

    @pytest.mark.parametrize("mode", ["500", "503", "stall", "cut"])
    async def test_what_may_pass_is_tried_again(
        self, mode: Mode, s3_proxy: S3Proxy, origin: S3Origin, source: SourceObject, observer: Counts
    ) -> None:
        """An answer that fails, stalls or breaks off is asked for again, and the bytes are right in the end."""
        s3_proxy.fail(mode, times=2)
        into = bytearray(source.size)
        await origin.fetch(source, memoryview(into))
        assert into == self.DATA
        assert s3_proxy.gets() == 3
        assert observer.tries[-5:] == [
            ("origin_requests", ("fetch", "failed")),
            ("origin_retries", ("fetch",)),
            ("origin_requests", ("fetch", "failed")),
            ("origin_retries", ("fetch",)),
            ("origin_requests", ("fetch", "ok")),
        ]

    @pytest.mark.parametrize("mode", ["500", "503", "stall"])
    async def test_what_does_not_pass_is_down(
        self, mode: Mode, s3_proxy: S3Proxy, origin: S3Origin, source: SourceObject
    ) -> None:
        """After its retries a fetch, a read or a listing fails as OriginDown; once the fault is over, all goes well."""
        s3_proxy.fail(mode)
        with pytest.raises(OriginDown, match="3 times"):
            await origin.fetch(source, memoryview(bytearray(source.size)))
        with pytest.raises(OriginDown):
            await origin.read("s/a", 10)
        assert s3_proxy.gets() == 6
        before = s3_proxy.lists()
        with pytest.raises(OriginDown):
            await origin.list("s/")
        assert s3_proxy.lists() == before + 3
        s3_proxy.heal()
        assert await origin.read("s/a", 10) == self.DATA[:10]

    async def test_a_late_answer_is_asked_for_once_more(
        self, s3_proxy: S3Proxy, bucket: str, source: SourceObject, observer: Counts
    ) -> None:
        """The bucket says nothing to one GET, and to one listing: another one brings the answer, and nothing failed."""
        origin = await S3Origin.open(s3_proxy.service.settings(bucket, hedge=0.05, part_bytes=2 * PART), observer)
        try:
            s3_proxy.fail("stall", times=1)
            into = bytearray(source.size)
            await origin.fetch(source, memoryview(into))
            assert into == self.DATA
            s3_proxy.fail("stall", times=1)
            assert await origin.list("s/") == [source]
        finally:
            await origin.close()
        assert s3_proxy.gets() == 2
        told = [labels for name, labels in observer.counted if name == "hedges"]
        assert told == [("fetch", "won"), ("list", "won")]

    async def test_an_attempt_has_a_deadline(
        self, s3_proxy: S3Proxy, bucket: str, source: SourceObject, observer: Counts
    ) -> None:
        """An answer that neither comes nor pauses for as long as it may is asked for again all the same."""
        settings = s3_proxy.service.settings(bucket, read_timeout_s=60.0, deadline_s=0.2, part_bytes=2 * PART)
        origin = await S3Origin.open(settings, observer)
        try:
            s3_proxy.fail("stall", times=1)
            into = bytearray(source.size)
            await origin.fetch(source, memoryview(into))
            assert into == self.DATA
        finally:
            await origin.close()
        assert observer.tries[-3:] == [
            ("origin_requests", ("fetch", "failed")),
            ("origin_retries", ("fetch",)),
            ("origin_requests", ("fetch", "ok")),
        ]

    async def test_connections_that_break(self, s3_proxy: S3Proxy, origin: S3Origin, source: SourceObject) -> None:
        """A connection that ends without an answer is made anew; where none holds, the origin is down."""
        s3_proxy.fail("drop", times=2)
        assert await _fetched(origin, source) == self.DATA
        s3_proxy.fail("drop")
        with pytest.raises(OriginDown, match="ConnectionResetError, 3 times"):
            await _fetched(origin, source)
        with pytest.raises(OriginDown):
            await origin.list("s/")

    async def test_a_refusal_is_not_tried_again(
        self, s3_proxy: S3Proxy, origin: S3Origin, source: SourceObject, observer: Counts
    ) -> None:
        """A 403 will not pass by asking again."""
        s3_proxy.fail("403")
        with pytest.raises(OriginDenied, match="403 AccessDenied"):
            await origin.fetch(source, memoryview(bytearray(source.size)))
        with pytest.raises(OriginDenied):
            await origin.list("s/")
        assert s3_proxy.gets() == 1
        assert observer.tries[-2:] == [
            ("origin_requests", ("fetch", "origin-denied")),
            ("origin_requests", ("list", "origin-denied")),
        ]

    async def test_a_large_object_comes_in_ranges(self, s3_proxy: S3Proxy, bucket: str) -> None:
        """An object larger than a part is fetched in ranges; a part that fails is asked for again alone."""
        settings = s3_proxy.service.settings(bucket, part_bytes=PART // 4)
        async with opened(settings) as origin:
            (source,) = await origin.list("s/")
            s3_proxy.fail("503", times=1)
            into = bytearray(source.size)
            await origin.fetch(source, memoryview(into))
        assert into == self.DATA
        assert s3_proxy.gets() == 6 + 1

    async def test_a_part_that_fails_ends_the_others(self, s3_proxy: S3Proxy, bucket: str) -> None:
        """The error of one part is the fetch's own, bare, and when it is out nothing writes to the memory any more."""
        settings = s3_proxy.service.settings(bucket, part_bytes=PART // 4, concurrency=1)
        async with opened(settings) as origin:
            (source,) = await origin.list("s/")
            s3_proxy.fail("403")
            with pytest.raises(OriginDenied):
                await origin.fetch(source, memoryview(bytearray(source.size)))
        assert s3_proxy.gets() == 1

    async def test_no_more_requests_at_once_than_allowed(self, s3_proxy: S3Proxy, bucket: str) -> None:
        """Requests past the configured number wait for one to end."""
        async with opened(s3_proxy.service.settings(bucket, concurrency=2)) as origin:
            (source,) = await origin.list("s/")
            s3_proxy.fail("stall")
            async with asyncio.TaskGroup() as group:
                for _ in range(6):
                    group.create_task(origin.fetch(source, memoryview(bytearray(source.size))))
                await asyncio.to_thread(s3_proxy.stalled.wait)
                under_way = s3_proxy.gets()
                s3_proxy.heal()
        assert under_way <= 2
        assert s3_proxy.gets() == 6

    async def test_a_cancelled_fetch_frees_its_slot(self, s3_proxy: S3Proxy, bucket: str) -> None:
        """A fetch that is cancelled while the origin stalls gives its slot back."""
        async with opened(s3_proxy.service.settings(bucket, concurrency=1)) as origin:
            (source,) = await origin.list("s/")
            s3_proxy.fail("stall")
            task = asyncio.create_task(_fetched(origin, source))
            await asyncio.to_thread(s3_proxy.stalled.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            s3_proxy.heal()
            assert await _fetched(origin, source) == self.DATA


@pytest.mark.parametrize(
    "said",
    [
        "<html>",
        "<html></html>",
        "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        "<ListBucketResult><Contents><Key>s/a</Key></Contents></ListBucketResult>",
    ],
)
async def test_what_is_no_listing(said: str) -> None:
    """Whatever answers instead of a bucket: that is no bucket without objects."""

    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response(text=said)

    async with serving(answer) as url:
        settings = S3Settings("b", endpoint_url=url, access_key="a", secret_key="s", retries=0)
        async with opened(settings) as origin:
            with pytest.raises(OriginDown, match="listing"):
                await origin.list("s/")


@asynccontextmanager
async def serving(answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


class Proxy:
    """An HTTP proxy that answers itself. ``asked``: what for, as a proxy is told; ``headers``: with what."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: list[Mapping[str, str]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async def answer(request: web.BaseRequest) -> web.Response:
            self.asked.append(request.raw_path)
            self.headers.append(request.headers)
            return web.Response(body=b"from the proxy")

        async with serving(answer) as url:
            yield url


async def test_the_environment_names_a_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As for everything else on the machine; but who ~/.netrc says one is at a host is no business of a signed URL."""
    (tmp_path / "netrc").write_text("machine s3.example login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    settings = S3Settings("b", endpoint_url="http://s3.example", access_key="a", secret_key="s", retries=0)
    proxy = Proxy()
    async with proxy.running() as url:
        monkeypatch.setenv("http_proxy", url)
        async with opened(settings) as origin:
            assert await origin.read("s/a") == b"from the proxy"
        [asked] = proxy.asked
        assert asked.startswith("http://s3.example/b/s/a?X-Amz-Algorithm=")
        assert "Authorization" not in proxy.headers[0]
        monkeypatch.setenv("no_proxy", ".example")
        async with opened(settings) as origin:
            with pytest.raises(OriginDown):
                await origin.read("s/a")
        assert len(proxy.asked) == 1


async def test_settings_that_cannot_work() -> None:
    """What cannot work is said at the start."""
    impossible = [
        S3Settings("b", endpoint_url="no url", access_key="a", secret_key="s"),
        S3Settings("b", access_key="only one"),
        S3Settings("b", concurrency=0),
        S3Settings("b", retries=-1),
        S3Settings("b", ca_file="/nowhere.pem"),
    ]
    for settings in impossible:
        with pytest.raises(ConfigError, match=r"origin\.s3: "):
            await S3Origin.open(settings)


def test_secrets_stay_out_of_the_repr() -> None:
    """No log that shows the settings shows the keys."""
    shown = repr(S3Settings("b", access_key="the key", secret_key="the secret"))
    assert "'b'" in shown
    assert "the" not in shown


@given(number=st.integers(1, 50), chance=st.floats(0, 1, exclude_max=True))
def test_pauses_grow_and_end(number: int, chance: float) -> None:
    """A pause doubles each time up to five seconds; chance takes up to a half of it away."""
    longest = min(5.0, 0.1 * 2 ** (number - 1))
    assert longest / 2 <= pause_s(0.1, number, chance) <= longest


async def _fetched(origin: Origin, source: SourceObject) -> bytes:
    into = bytearray(source.size)
    await origin.fetch(source, memoryview(into))
    return bytes(into)


@asynccontextmanager
async def opened(settings: S3Settings) -> AsyncIterator[Origin]:
    origin = await S3Origin.open(settings)
    try:
        yield origin
    finally:
        await origin.close()
