"""Arrivals under kills, the short way: ``make crash-arrivals`` does the same with 10 000 events and 500 arrivals."""

from pathlib import Path

import pytest

from tests.acceptance.arrivals import bars, killed, shared
from tests.services import RedisServer, S3Proxy

pytestmark = pytest.mark.service


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_what_was_accepted_is_carried_out_once(tmp_path: Path, own_redis: RedisServer, kind: str) -> None:
    """Whatever is killed while events are posted, each accepted one is carried out, and nothing is made anew for it."""
    redis = own_redis if kind == "redis" else None
    outcome = killed(tmp_path, events=240, series=8, kills=1, redis=redis, redis_kills=1 if redis else 0)
    assert outcome.wrong == []
    assert [bar for bar in bars({kind: outcome}) if not bar["ok"]] == []


def test_two_nodes_share_their_arrivals(tmp_path: Path, own_redis: RedisServer, s3_proxy: S3Proxy) -> None:
    """Killed half-way, a node leaves its arrivals to the other; what was warm is not fetched again."""
    outcome = shared(tmp_path, arrivals=16, redis=own_redis, proxy=s3_proxy)
    assert outcome.wrong == []
    assert [bar for bar in bars({"shared": outcome}) if not bar["ok"]] == []
