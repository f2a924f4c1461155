"""How a daemon is doing, in one answer and as it changes."""

import http.client
from urllib.parse import urlsplit

import msgspec
import pytest

from serving.stats import StatsAnswer
from tests.daemon import Bucket, Daemon

pytestmark = pytest.mark.service


def test_the_answer_tells_of_what_was_asked(daemon: Daemon, bucket: Bucket) -> None:
    """A miss and hits are in the latencies by tier and stage, in the objectives, among the slow and the recent."""
    ref = bucket.series()
    for _ in range(4):
        daemon.tensor(ref)
    told = msgspec.convert(daemon.ask("GET", "/v1/stats").json, StatsAnswer)
    latency = {(each.of, each.name): each.windows for each in told.latency}
    assert latency["request", "ram"]["1m"].n == latency["request", "ram"]["1h"].n == 3
    assert latency["request", "origin"]["5m"].n == 1
    assert latency["stage", "decode"]["1m"].max_ms <= latency["request", "origin"]["1m"].max_ms
    assert [(slo.name, slo.tier) for slo in told.slos] == [("ram", "ram"), ("miss", "origin")]
    assert (told.hits.requests, told.hits.cost) == (0.75, 0.75)
    assert told.saved_seconds > 0
    assert [(each.study, each.series, each.tier) for each in told.recent] == [(ref.study, ref.series, "ram")]
    assert told.slow[0].tier == "origin"
    assert {each.what: each.ok for each in told.health} == {"origin": True, "disk": True, "workers": True}
    assert {(tier.tier, tier.namespace) for tier in told.tiers} >= {("ram", "serving"), ("nvme", "serving")}


def test_events_come_while_somebody_listens(daemon: Daemon, bucket: Bucket) -> None:
    """Each is a whole answer, and newer than the one before."""
    place = urlsplit(daemon.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    connection.request("GET", "/v1/stats/events")
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"
    times = []
    for _ in range(2):
        assert answer.readline() == b"event: stats\n"
        told = msgspec.json.decode(answer.readline().removeprefix(b"data: "), type=StatsAnswer)
        times.append(told.time)
        assert answer.readline() == b"\n"
    connection.close()
    assert times[0] < times[1]
