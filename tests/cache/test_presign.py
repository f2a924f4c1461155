"""Presigned URLs: what the client of botocore makes, parameter by parameter, the signature among them."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import NoCredentialsError
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.origin.presign import Presigner

BUCKET = "studies"
NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=40)


def parts(url: str) -> tuple[str, list[tuple[str, str]]]:
    """All before the parameters, and these in any order, which signatures do not depend on."""
    place, _, query = url.partition("?")
    return place, sorted(parse_qsl(query, keep_blank_values=True, strict_parsing=True))


async def check(names: Sequence[tuple[str, str]], **place: Any) -> None:
    """Our URL of each key and version is the client's, signed within the same second."""
    session = get_session()
    session.set_credentials("someone", "secret", place.pop("token", None))
    config = AioConfig(signature_version="s3v4", s3={"addressing_style": place.pop("addressing", "path")})
    async with session.create_client("s3", config=config, **place) as client:
        presigner = Presigner(client, await session.get_credentials(), BUCKET)

        async def theirs() -> str:
            url: str = await client.generate_presigned_url("get_object", Params=named, ExpiresIn=300)
            return url

        for key, version in names:
            named = {"Bucket": BUCKET, "Key": key} | ({"VersionId": version} if version else {})
            asked = {"versionId": version} if version else {}
            before, ours, after = await theirs(), await presigner.url(key, **asked), await theirs()
            while before != after:  # the second has changed meanwhile
                before, ours, after = await theirs(), await presigner.url(key, **asked), await theirs()
            assert parts(ours) == parts(after)


@settings(max_examples=10)  # to make a client takes longer than to try many names
@given(st.lists(st.tuples(NAMES, st.one_of(st.just(""), NAMES)), min_size=20, max_size=40))
async def test_names_are_quoted_as_the_client_does(names: list[tuple[str, str]]) -> None:
    """Keys and versions of any characters."""
    await check(names, endpoint_url="http://127.0.0.1:9", region_name="us-east-1")


@pytest.mark.parametrize("addressing", ["path", "virtual"])
@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1", "cn-north-1"])
@pytest.mark.parametrize("token", [None, "a/session+token="])
async def test_a_bucket_is_where_the_client_finds_it(addressing: str, region: str, token: str | None) -> None:
    """On AWS, in each of its partitions, by path and by name; with credentials that have an end."""
    await check([("a/b c.dcm", ""), ("a/b", "1")], addressing=addressing, region_name=region, token=token)


async def test_without_credentials_there_is_no_url() -> None:
    with pytest.raises(NoCredentialsError):
        await Presigner(None, None, BUCKET).url("key")
