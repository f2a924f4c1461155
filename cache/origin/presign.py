"""URLs that carry the permission to GET an object, made for a fraction of what a client takes for one.

A client serialises, validates and resolves each time what is the same for all objects of a bucket. Here it makes one
URL, which tells where the bucket is and which region it signs for; botocore's signer alone does the rest. Source: AWS
S3 API, "Authenticating Requests: Using Query Parameters".
"""

from typing import Any, Final
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import NoCredentialsError

#: A URL is used at once; the rest is for clocks that differ.
_VALID_S: Final = 300
_KEY: Final = "key"


class Presigner:
    """Makes the URLs of one bucket's objects."""

    def __init__(self, client: Any, credentials: Any, bucket: str) -> None:
        """``client``: aiobotocore's, for signature version 4; ``credentials``: what it signs with, None for none."""
        self._client = client
        self._credentials = credentials
        self._bucket = bucket
        self._place: tuple[str, str] | None = None  # the URL that all objects' begin with, and the region

    async def url(self, key: str, version: str = "") -> str:
        """The URL of an object, or of one version of it. Raises: NoCredentialsError, BotoCoreError."""
        if self._credentials is None:
            raise NoCredentialsError
        base, region = self._place or await self._find()
        which = f"?{urlencode({'versionId': version}, quote_via=quote)}" if version else ""
        request = AWSRequest("GET", f"{base}{quote(key, safe='/~')}{which}")
        credentials = await self._credentials.get_frozen_credentials()  # renewed, where they have an end
        S3SigV4QueryAuth(credentials, "s3", region, expires=_VALID_S).add_auth(request)
        return str(request.url)

    def refused(self) -> None:
        """The place may be wrong: a client learns from a bucket's answers that it is in another region."""
        self._place = None

    async def _find(self) -> tuple[str, str]:
        named = {"Bucket": self._bucket, "Key": _KEY}
        parts = urlsplit(await self._client.generate_presigned_url("get_object", Params=named))
        _, _, region, _, _ = parse_qs(parts.query)["X-Amz-Credential"][0].split("/")
        self._place = f"{parts.scheme}://{parts.netloc}{parts.path.removesuffix(_KEY)}", region
        return self._place
