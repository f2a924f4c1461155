"""URLs that carry the permission for a GET, made for a fraction of what a client takes for one.

A client serialises, validates and resolves each time what is the same for all objects of a bucket. Here it makes one
URL, which tells where the bucket is and which region it signs for; the rest is a few hashes. Source: AWS S3 API,
"Authenticating Requests: Using Query Parameters (AWS Signature Version 4)".
"""

import datetime
import hashlib
import hmac
from functools import lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

from botocore.exceptions import NoCredentialsError

#: A URL is used at once; the rest is for clocks that differ.
_VALID_S: Final = 300
_KEY: Final = "key"
_ALGORITHM: Final = "AWS4-HMAC-SHA256"


class _Place(NamedTuple):
    """Where the bucket is: what every object's URL begins with, as host and path, and the region that it is in."""

    scheme: str
    host: str
    path: str
    region: str


class Presigner:
    """Makes the URLs of one bucket and its objects."""

    def __init__(self, client: Any, credentials: Any, bucket: str) -> None:
        """``client``: aiobotocore's, for signature version 4; ``credentials``: what it signs with, None for none."""
        self._client = client
        self._credentials = credentials
        self._bucket = bucket
        self._place: _Place | None = None

    async def url(self, key: str = "", **query: str) -> str:
        """The URL of an object, or of the bucket, with these parameters. Raises: NoCredentialsError, BotoCoreError."""
        if self._credentials is None:
            raise NoCredentialsError
        place = self._place or await self._find()
        credentials = await self._credentials.get_frozen_credentials()  # renewed, where they have an end
        time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        scope = f"{time[:8]}/{place.region}/s3/aws4_request"
        query |= {
            "X-Amz-Algorithm": _ALGORITHM,
            "X-Amz-Credential": f"{credentials.access_key}/{scope}",
            "X-Amz-Date": time,
            "X-Amz-Expires": str(_VALID_S),
            "X-Amz-SignedHeaders": "host",
        }
        if credentials.token:
            query["X-Amz-Security-Token"] = credentials.token
        path = place.path + quote(key, safe="/~")
        asked = "&".join(sorted(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in query.items()))
        request = f"GET\n{path}\n{asked}\nhost:{place.host}\n\nhost\nUNSIGNED-PAYLOAD"
        text = f"{_ALGORITHM}\n{time}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        signature = _hmac(_signing_key(credentials.secret_key, time[:8], place.region), text).hex()
        return f"{place.scheme}://{place.host}{path}?{asked}&X-Amz-Signature={signature}"

    def refused(self) -> None:
        """The place may be wrong: a client learns from a bucket's answers that it is in another region."""
        self._place = None

    async def _find(self) -> _Place:
        named = {"Bucket": self._bucket, "Key": _KEY}
        parts = urlsplit(await self._client.generate_presigned_url("get_object", Params=named))
        _, _, region, _, _ = parse_qs(parts.query)["X-Amz-Credential"][0].split("/")
        self._place = _Place(parts.scheme, parts.netloc, parts.path.removesuffix(_KEY), region)
        return self._place


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")


@lru_cache(maxsize=4)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = _hmac(key, part)
    return key
