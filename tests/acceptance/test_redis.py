"""A daemon whose Redis comes and goes: it says so, accepts nothing meanwhile, and goes on with what it has."""

from pathlib import Path

import pytest

from tests.acceptance.arrivals import record
from tests.daemon import Bucket, Daemon
from tests.services import RedisServer

pytestmark = pytest.mark.service


def test_without_redis_for_a_while(tmp_path: Path, bucket: Bucket, own_redis: RedisServer) -> None:
    """Arrivals are refused while Redis is away, tensors are not; what was accepted before is warmed afterwards."""
    first, second = (bucket.series(slices=2, rows=16, columns=16, seed=seed) for seed in (1, 2))
    posts = [
        {"Records": [record(path.relative_to(bucket.path).as_posix(), 1) for path in bucket.files(ref)]}
        for ref in (first, second)
    ]
    own_redis.kill()
    # the quiet period is long enough for what follows, and ended by the restart's own events
    table = {
        "origin": bucket.origin,
        "redis": {"url": own_redis.url},
        "arrivals": {"warm": ["volume"], "quiet_s": 3600.0, "force_s": 7200.0},
    }
    with Daemon(tmp_path, table) as daemon:  # it starts without
        refused = daemon.ask("POST", "/v1/arrivals/s3", posts[0])
        assert (refused.status, refused.code, refused.headers["Retry-After"]) == (503, "queue-down", "5")
        own_redis.start()
        assert daemon.ask("POST", "/v1/arrivals/s3", posts[0]).json == {"accepted": 2, "new": 2}
        own_redis.kill()
        assert daemon.ask("POST", "/v1/arrivals/s3", posts[1]).code == "queue-down"
        ready = daemon.ask("GET", "/readyz")
        assert (ready.status, ready.json["checks"]["arrivals"]) == (200, False)
        told = daemon.ask("GET", f"/v1/studies/{first.study}").json
        assert (told["waiting"], told["ready"]) == (None, False)
        assert daemon.tensor(second).status == 200
        own_redis.start()
        assert daemon.ask("POST", "/v1/arrivals/s3", posts[0]).json == {"accepted": 2, "new": 0}
        complete = {"id": "1", "action": "created", "study": first.study, "series": first.series, "complete": True}
        assert daemon.ask("POST", "/v1/arrivals/plain", complete).status == 202
        while not daemon.ask("GET", f"/v1/studies/{first.study}").json["ready"]:
            assert daemon.pid
        assert daemon.ask("GET", "/readyz").json["checks"]["arrivals"]
        assert daemon.tensor(first).headers["Voxcache-Tier"] == "ram"
