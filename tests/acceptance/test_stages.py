"""Where the time of requests went, when much goes wrong: their stages say."""

import http.client
import json
import random
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cache.keys import SeriesRef
from tests.daemon import MIB, Bucket, Daemon

pytestmark = [pytest.mark.service, pytest.mark.slow]

REQUESTS = 100
DELAY_S = 0.04
#: An origin and a disk that are slow, and fail now and then.
FAULTS = {
    "seed": 7,
    "origin": {"delay_s": DELAY_S, "down": 0.03, "truncated": 0.01, "changed": 0.01, "flipped": 0.01},
    "disk": {"delay_s": 0.01, "error": 0.02, "short": 0.02, "flipped": 0.02},
}


def asked(ref: SeriesRef, how: str) -> tuple[str, str, bytes | None]:
    """Method, path and body of a request for the series' tensor."""
    if how == "lease":
        body = {"study": ref.study, "series": ref.series, "recipe": "volume", "ttl_s": 0.1}
        return "POST", "/v1/leases", json.dumps(body).encode()
    return "GET", f"/v1/studies/{ref.study}/series/{ref.series}/tensors/volume", None


def test_the_stages_of_a_request_explain_its_time(tmp_path: Path, bucket: Bucket) -> None:
    """A hundred random requests, some of which fail: of each, the stages add up to 95 % of its time and more, by the
    daemon's clock; and so they do by the client's, sending and waking included. No stage has time of another's: all of
    them together have no more than there was, and a delay shows where it was made."""
    refs = [bucket.series(slices=4, rows=256, columns=256, seed=seed) for seed in range(12)]
    settings = {
        "origin": bucket.origin,
        "faults": FAULTS,
        "ram": {"budget": 5 * MIB},
        "observe": {"slow_kept": 10 * REQUESTS},
    }
    chance = random.Random(7)
    took: dict[str, float] = {}
    with Daemon(tmp_path, settings) as daemon:
        place = urlsplit(daemon.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        for number in range(REQUESTS):
            method, path, body = asked(chance.choice(refs), chance.choice(("tensor", "lease")))
            trace = f"{number + 1:032x}"
            start = time.perf_counter()
            connection.request(method, path, body, {"traceparent": f"00-{trace}-{'1' * 16}-00"})
            answer = connection.getresponse()
            answer.read()
            took[trace] = (time.perf_counter() - start) * 1e3
            assert "Server-Timing" in answer.headers
        connection.close()
        slow = [each for each in daemon.ask("GET", "/v1/stats").json["slow"] if each["trace"] in took]
    assert {each["trace"] for each in slow} == took.keys()
    assert {each["tier"] for each in slow} == {"ram", "nvme", "origin", "none"}
    assert {each["status"] // 100 for each in slow} == {2, 5}
    explained = {each["trace"]: sum(each["stages"].values()) for each in slow}
    assert [each for each in slow if explained[each["trace"]] < 0.95 * each["ms"]] == []
    # each stage is rounded for itself
    assert [each for each in slow if explained[each["trace"]] > each["ms"] + 0.1] == []
    # a client may have read all of an answer before the daemon notes that it was sent
    before = {each["trace"]: explained[each["trace"]] - each["stages"]["response"] for each in slow}
    assert [trace for trace in took if before[trace] > took[trace] + 0.1] == []
    for stage in ("list", "fetch"):
        # the daemon's loop counts whole milliseconds
        assert min(each["stages"][stage] for each in slow if stage in each["stages"]) >= DELAY_S * 1e3 - 1
    assert not any("fetch" in each["stages"] for each in slow if each["tier"] in ("ram", "nvme"))
    assert statistics.median(explained[trace] / took[trace] for trace in took) >= 0.95
    named = {stage for each in slow for stage in each["stages"]}
    assert named >= {"lookup", "list", "queue", "reserve", "fetch", "inspect", "decode", "admit", "lease", "response"}
    assert named >= {"nvme_read"}
