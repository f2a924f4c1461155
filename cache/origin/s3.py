"""The S3 origin: any bucket that speaks the S3 API.

aiobotocore knows the credentials, and where the bucket is; it asks about single objects and brings them back. What a
miss waits for, listings and bodies, comes from URLs signed here, a body straight into the caller's memory: that costs
the loop which also serves hits a fraction of what botocore's own ways do.
"""

import asyncio
import contextlib
import datetime
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeVar
from urllib.parse import unquote_plus, urlsplit
from xml.etree import ElementTree

import aiohttp
import msgspec
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from botocore.utils import get_environ_proxies

from cache.errors import Archived, ConfigError, OriginChanged, OriginDenied, OriginDown, OriginError
from cache.interfaces import Availability, NullObserver, Observer
from cache.keys import SourceObject
from cache.urgency import Slots

from .hedge import Hedge
from .presign import Presigner
from .together import each
from .wire import Answer, Wire

#: Storage classes whose objects have to be restored; of the others that can be archived, HeadObject says so.
_ARCHIVES: Final = ("GLACIER", "DEEP_ARCHIVE")
_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")

_Result = TypeVar("_Result")


class S3Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bucket as origin. The daemon needs s3:ListBucket and s3:GetObject (s3:GetObjectVersion); to bring objects
    back from an archive also s3:RestoreObject.

    bucket: its name.
    endpoint_url: of an S3 server other than AWS.
    region: which the server signs for.
    access_key, secret_key: both, or neither for botocore's own chain (environment, profile, instance role).
    addressing: bucket in the path, or as a host name of its own.
    ca_file: certificates (PEM) that sign the server's, where the system's do not.
    concurrency: requests at the same time.
    retries: further attempts after a failure that may pass: 5xx, 429, refused, reset, stalled or cut short.
    backoff_s: seconds before the first of them; doubled each time, up to 5, less a random part of up to a half.
    connect_timeout_s: seconds a connection may take.
    read_timeout_s: seconds a response may pause.
    deadline_s: seconds that an attempt may take, its body included; 0 for no limit.
    hedge: the part of requests that may be made once more because their answer is late, on top of ``concurrency``;
        whichever is answered first counts. 0 for none.
    part_bytes: larger objects are fetched in ranges of this size at the same time.
    """

    bucket: str
    endpoint_url: str | None = None
    region: str = "us-east-1"
    access_key: str | None = None
    secret_key: str | None = None
    addressing: Literal["path", "virtual"] = "path"
    ca_file: str | None = None
    concurrency: int = 32
    retries: int = 3
    backoff_s: float = 0.1
    connect_timeout_s: float = 3.0
    read_timeout_s: float = 10.0
    deadline_s: float = 60.0
    hedge: float = 0.05
    part_bytes: int = 8 << 20

    def __repr__(self) -> str:
        # the secret key must not reach a log through somebody's repr
        return f"S3Settings(bucket={self.bucket!r}, endpoint_url={self.endpoint_url!r}, region={self.region!r})"


class _MayPass(Exception):
    """An attempt failed in a way that another may not. It never leaves this module."""


class S3Origin:
    """Objects of one bucket; implements ``Origin``. ETags are S3's own, without quotes."""

    name = "s3"

    def __init__(
        self,
        settings: S3Settings,
        client: Any,  # botocore makes its clients' classes while it runs
        presigner: Presigner,
        wire: Wire,
        *,
        closing: contextlib.AsyncExitStack,
        observer: Observer,
    ) -> None:
        self._settings = settings
        self._client = client
        self._presigner = presigner
        self._wire = wire
        self._closing = closing
        self._observer = observer
        self._slots = Slots(settings.concurrency)
        self._hedge = Hedge(settings.hedge, self._observer)
        self._where = f"bucket {settings.bucket!r} at {settings.endpoint_url or 'AWS ' + settings.region}"

    @classmethod
    async def open(cls, settings: S3Settings, observer: Observer | None = None) -> "S3Origin":
        """An origin ready for use. The server is not asked: it may be down now and be back for the first request.

        Raises:
            ConfigError: settings that botocore or TLS cannot work with.
        """
        if (settings.access_key is None) != (settings.secret_key is None):
            raise ConfigError("origin.s3: give access_key and secret_key, or neither")
        if min(settings.concurrency, settings.part_bytes) < 1 or min(settings.retries, settings.backoff_s) < 0:
            raise ConfigError("origin.s3: concurrency and part_bytes start at 1, retries and backoff_s at 0")
        if settings.deadline_s < 0 or not 0 <= settings.hedge <= 1:
            raise ConfigError("origin.s3: deadline_s starts at 0, and hedge is from 0 to 1")
        async with contextlib.AsyncExitStack() as stack:
            try:
                tls = ssl.create_default_context(cafile=settings.ca_file)
                session = get_session()
                if settings.access_key is not None:
                    session.set_credentials(settings.access_key, settings.secret_key)
                client = await stack.enter_async_context(
                    session.create_client(
                        "s3",
                        endpoint_url=settings.endpoint_url,
                        region_name=settings.region,
                        verify=settings.ca_file,
                        config=_client_config(settings),
                    )
                )
                presigner = Presigner(client, await session.get_credentials(), settings.bucket)
                place = client.meta.endpoint_url
                wire = Wire(
                    tls=tls,
                    connect_timeout_s=settings.connect_timeout_s,
                    read_timeout_s=settings.read_timeout_s,
                    proxy=get_environ_proxies(place).get(urlsplit(place).scheme),  # as botocore does
                )
                stack.push_async_callback(wire.close)
            except (BotoCoreError, ValueError, OSError) as error:
                raise ConfigError(f"origin.s3: {error}") from None
            return cls(settings, client, presigner, wire, closing=stack.pop_all(), observer=observer or NullObserver())

    async def list(self, prefix: str) -> Sequence[SourceObject]:
        """All objects whose key starts with ``prefix``, sorted by key (ListObjectsV2).

        Raises: OriginDenied, OriginDown.
        """
        return [source for source, _ in await self.dated(prefix)]

    async def dated(self, prefix: str) -> Sequence[tuple[SourceObject, float]]:
        """As ``list``, each with when it was last written (Unix seconds). Raises: OriginDenied, OriginDown."""
        found: list[tuple[SourceObject, float]] = []
        doing = f"listing {prefix!r}"
        # some keys are nothing that XML could hold
        asked = {"list-type": "2", "prefix": prefix, "encoding-type": "url"}

        async def attempt() -> _Page:
            async with self._answer("list", doing, "", asked, {}) as answer:
                if answer.status != 200:
                    raise self._refusal(doing, answer.status, await _code(answer))
                return _page(await answer.read())

        while True:
            page = await self._attempts("list", doing, attempt)
            found += page.objects
            if page.next is None:
                # S3 sorts by UTF-8 bytes; so does this, as code points and their UTF-8 sort alike
                return sorted(found)
            asked["continuation-token"] = page.next

    async def read(self, key: str, limit: int | None = None) -> bytes | None:
        """The first ``limit`` bytes of an object, or None if there is none. Raises: OriginDenied, OriginDown."""
        doing = f"reading {key!r}"
        ranged = {} if limit is None else {"Range": f"bytes=0-{limit - 1}"}

        async def attempt() -> bytes | None:
            async with self._answer("read", doing, key, {}, ranged) as answer:
                if answer.status not in (200, 206):
                    code = await _code(answer)
                    if answer.status == 416:  # an empty object has no first byte
                        return b""
                    if answer.status == 404 and code != "NoSuchBucket":
                        return None
                    raise self._refusal(doing, answer.status, code)
                data = await answer.read(limit)
                self._observer.count("origin_bytes", (), len(data))
                return data

        return await self._attempts("read", doing, attempt)

    async def fetch(self, source: SourceObject, into: memoryview) -> None:
        """Write the object's bytes to ``into``, a large object in parts at the same time.

        Raises: OriginChanged, OriginDenied, OriginDown.
        """
        step = self._settings.part_bytes
        starts = range(0, max(source.size, 1), step)
        if len(starts) == 1:
            await self._fetch_part(source, 0, into)
        else:
            await each(
                lambda start: self._fetch_part(source, start, into[start : start + step]),
                starts,
                min(len(starts), self._settings.concurrency),
            )

    async def availability(self, source: SourceObject) -> Availability:
        """Whether the object can be read now (HeadObject). Raises: OriginDenied, OriginDown, OriginChanged."""
        head = await self._head(source)
        if 'ongoing-request="true"' in head.get("Restore", ""):
            return "restoring"
        # what was brought back has a date until which it can be read
        archived = head.get("StorageClass") in _ARCHIVES or "ArchiveStatus" in head
        return "archived" if archived and "expiry-date" not in head.get("Restore", "") else "there"

    async def restore(self, source: SourceObject, days: int, tier: str) -> None:
        """Ask for the object (RestoreObject). Raises: OriginDenied, OriginDown, OriginChanged."""
        request: dict[str, Any] = {"GlacierJobParameters": {"Tier": tier}}
        if (await self._head(source)).get("StorageClass") != "INTELLIGENT_TIERING":  # that keeps what it brings back
            request["Days"] = days

        async def attempt() -> None:
            try:
                await self._client.restore_object(**self._named(source), RestoreRequest=request)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") != "RestoreAlreadyInProgress":
                    raise

        await self._attempts("restore", f"restoring {source.key!r}", attempt)

    async def close(self) -> None:
        await self._closing.aclose()

    # ------------------------------------------------------------------ one request

    async def _fetch_part(self, source: SourceObject, start: int, into: memoryview) -> None:
        doing = f"fetching {source.key!r}"
        whole = len(into) == source.size
        which = {"versionId": source.version} if source.version else {}
        headers = {"If-Match": f'"{source.etag}"'}
        if not whole:
            headers["Range"] = f"bytes={start}-{start + len(into) - 1}"

        async def attempt() -> None:
            asked = time.perf_counter()
            async with self._answer("fetch", doing, source.key, which, headers) as answer:
                answered = time.perf_counter()
                if answer.status != (200 if whole else 206):
                    raise self._refusal(doing, answer.status, await _code(answer))
                self._observer.stage("origin_first_byte", answered - asked)
                size = answer.length if whole else _total(answer.headers.get("content-range", ""))
                if size not in (None, source.size):
                    raise OriginChanged(f"{doing}: {size} bytes where its manifest says {source.size}")
                try:
                    await answer.into(into)
                finally:
                    self._observer.count("origin_bytes", (), answer.received)
                if not answer.ended:
                    raise OriginChanged(f"{doing}: more bytes than the {source.size} its manifest says")
                if answer.received < len(into):
                    raise _MayPass("the body ended early")
                self._observer.stage("origin_body", time.perf_counter() - answered)

        await self._attempts("fetch", doing, attempt)

    async def _head(self, source: SourceObject) -> dict[str, Any]:
        def attempt() -> Awaitable[dict[str, Any]]:
            return self._hedge.first("head", lambda: self._client.head_object(**self._named(source)))

        return await self._attempts("head", f"asking about {source.key!r}", attempt)

    def _named(self, source: SourceObject) -> dict[str, str]:
        version = {"VersionId": source.version} if source.version else {}
        return {"Bucket": self._settings.bucket, "Key": source.key} | version

    @contextlib.asynccontextmanager
    async def _answer(
        self, kind: str, doing: str, key: str, query: dict[str, str], headers: dict[str, str]
    ) -> AsyncIterator[Answer]:
        """What the bucket says, its body yet to be read; of a request and its hedge, whichever is answered first.

        So a hedge ends before anything is written anywhere. Raises: _MayPass, for a status that may pass.
        """
        url = await self._presigner.url(key, **query)

        async def ask() -> Answer:
            answer = await self._wire.get(url, headers)
            if answer.status >= 500:  # a failure: the other request may still bring the object
                with answer:
                    raise self._refusal(doing, answer.status, await _code(answer))
            return answer

        with await self._hedge.first(kind, ask, Answer.close) as answer:
            yield answer

    async def _attempts(self, kind: str, doing: str, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        failure: OriginError | _MayPass = _MayPass()
        for number in range(self._settings.retries + 1):
            if number:
                self._observer.count("origin_retries", (kind,))
                await asyncio.sleep(pause_s(self._settings.backoff_s, number, random.random()))  # noqa: S311 - jitter
            try:
                async with self._slots.slot(), asyncio.timeout(self._settings.deadline_s or None):
                    result = await attempt()
            except (_MayPass, OriginError) as failed:
                failure = failed
            except ClientError as failed:
                status = failed.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                failure = self._refusal(doing, status, failed.response.get("Error", {}).get("Code", ""))
            except (NoCredentialsError, PartialCredentialsError):
                failure = OriginDenied(f"{doing}: no credentials for {self._where}")
            # aiobotocore lets aiohttp's errors through while it reads; a TimeoutError is an OSError
            except (BotoCoreError, aiohttp.ClientError, OSError) as failed:
                # its text may hold the presigned URL
                failure = _MayPass(type(failed).__name__)
            else:
                self._observer.count("origin_requests", (kind, "ok"))
                return result
            if isinstance(failure, OriginError):
                self._observer.count("origin_requests", (kind, failure.code))
                raise failure
            self._observer.count("origin_requests", (kind, "failed"))
        raise OriginDown(f"{doing} in {self._where}: {failure}, {self._settings.retries + 1} times")

    def _refusal(self, doing: str, status: int, code: str) -> OriginError | _MayPass:
        """What a status other than success means (S3 API reference, "Error responses")."""
        said = f"{status} {code}".strip()
        if code == "NoSuchBucket":
            return OriginDown(f"{doing}: there is no {self._where}")
        if status in (404, 412):
            return OriginChanged(f"{doing}: not the object that was listed any more ({said}); list the series again")
        if code == "InvalidObjectState":
            return Archived(f"{doing}: the object is archived and must be restored first")
        if status in (301, 307, 400, 403):
            self._presigner.refused()
        if status in (401, 403):
            return OriginDenied(f"{doing}: {self._where} answered {said}")
        if status >= 500 or status in (0, 408, 429):
            return _MayPass(said)
        return OriginDown(f"{doing}: {self._where} answered {said}")


def _client_config(settings: S3Settings) -> AioConfig:
    return AioConfig(
        signature_version="s3v4",
        s3={"addressing_style": settings.addressing},
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        max_pool_connections=settings.concurrency,
        retries={"total_max_attempts": 1},  # ours cover bodies too
        response_checksum_validation="when_required",
    )


def pause_s(base: float, number: int, chance: float) -> float:
    """Seconds to wait before retry ``number`` (from 1): exponential, at most 5, less up to a half by ``chance``."""
    return min(5.0, base * 2.0 ** (number - 1)) * (1 - chance / 2)


class _Page(NamedTuple):
    """A part of a listing: objects, each with when it was last written (Unix seconds), and what to ask for the rest."""

    objects: Sequence[tuple[SourceObject, float]]
    next: str | None


def _page(said: bytes) -> _Page:
    """What ListObjectsV2 answers (S3 API reference). Raises: _MayPass: something else."""
    try:
        # expat stops what would grow without end, and a bucket that wished harm has better ways
        root = ElementTree.fromstring(said)  # noqa: S314
        # servers differ in whether they name the namespace
        space, _, name = root.tag.rpartition("}")
        space += "}" if space else ""
        plain: Callable[[str], str] = unquote_plus if root.findtext(f"{space}EncodingType") == "url" else str
        objects = [
            (
                SourceObject(
                    plain(item.findtext(f"{space}Key") or ""),
                    int(item.findtext(f"{space}Size") or ""),
                    (item.findtext(f"{space}ETag") or "").strip('"'),
                ),
                datetime.datetime.fromisoformat(item.findtext(f"{space}LastModified") or "").timestamp(),
            )
            for item in root.iterfind(f"{space}Contents")
        ]
        following = root.findtext(f"{space}NextContinuationToken")
        truncated = root.findtext(f"{space}IsTruncated") == "true"
    except (ElementTree.ParseError, ValueError) as error:
        raise _MayPass(f"no listing: {error}") from None
    if name != "ListBucketResult" or (truncated and not following):
        raise _MayPass("half a listing, or none")
    return _Page(objects, following if truncated else None)


def _total(content_range: str) -> int | None:
    """The whole object's size from ``bytes a-b/size`` (RFC 9110 §14.4)."""
    size = content_range.rpartition("/")[2]
    return int(size) if size.isdecimal() else None


async def _code(answer: Answer) -> str:
    """The error code of an S3 answer, or "" where it has none."""
    found = _CODE.search(await answer.read(4096))
    return found[1].decode() if found else ""
