"""What is in the origin is asked for by key or by URL; what is elsewhere is refused."""

from typing import Any

import pytest

from cache.errors import BadRequest
from serving.api.warming import Warming


def warming(bucket: str) -> Any:
    nothing: Any = None
    return Warming(filler=nothing, store=nothing, catalog=nothing, clock=nothing, bucket=bucket, max_body=1)


@pytest.mark.parametrize(
    ("place", "key"),
    [("", ""), ("a/b", "a/b"), ("s3://archive", ""), ("s3://archive/", ""), ("s3://archive/a/b", "a/b")],
)
def test_places_in_the_origin(place: str, key: str) -> None:
    """A key, a prefix, or the same within the bucket's URL."""
    assert warming("archive")._key(place) == key


@pytest.mark.parametrize(
    ("bucket", "place"), [("archive", "s3://other/a"), ("archive", "https://archive/a"), ("", "s3://archive/a")]
)
def test_places_elsewhere(bucket: str, place: str) -> None:
    """Another bucket, another scheme, or any URL where the origin is a directory."""
    with pytest.raises(BadRequest, match="not in the origin"):
        warming(bucket)._key(place)
