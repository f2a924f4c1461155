"""What the daemon knows of its own work: rolling quantiles, objectives, slow requests, what hits are worth."""

import asyncio
import math

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given
from hypothesis import strategies as st

from cache.entry import Entry, Lineage
from cache.keys import Key
from cache.stopwatch import Stopwatch, current, timing
from serving.metrics import Metrics
from serving.metrics.rolling import BINS, WINDOWS, Rolling, Window, binned, quantiles
from serving.price import PriceSettings, read_worth, storage_cost
from serving.remote import told_slow
from serving.slo import Slo, Tracked
from serving.slow import Slow
from serving.uids import Uids
from tests.conformance.tier import FakeClock
from tests.serving.recording import recorder as recording
from tests.serving.test_metrics import value


def entry(cost_s: float, namespace: str = "serving", nbytes: int = 100) -> Entry:
    return Entry(Key(namespace, "tensor", "1.2.3", "1.2.4", "v", "r"), nbytes, None, Lineage("v", 1, 1), cost_s)


# ---------------------------------------------------------------------- rolling quantiles


@given(st.lists(st.floats(2e-6, 3000.0), min_size=1, max_size=300), st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_a_quantile_is_right_to_one_percent(seconds: list[float], share: float) -> None:
    """Of the nearest rank, from microseconds to most of an hour, however many there are."""
    [found] = quantiles(binned(np.array(seconds)), (share,))
    right = sorted(seconds)[max(math.ceil(share * len(seconds)) - 1, 0)]
    assert found == pytest.approx(right, rel=0.008)


def test_quantiles_are_those_of_hdrhistogram() -> None:
    """The library, one record at a time, comes to the same."""
    seconds = np.random.default_rng(7).lognormal(-5, 2, 5000)
    theirs = HdrHistogram(1, 10**12, 3)
    for each in seconds:
        theirs.record_value(int(each * 1e9))
    ours = quantiles(binned(seconds), (0.5, 0.95, 0.99))
    assert ours == pytest.approx([theirs.get_value_at_percentile(share) / 1e9 for share in (50, 95, 99)], rel=0.01)


def test_what_is_too_short_or_too_long_is_counted_all_the_same() -> None:
    """In the first and the last bin."""
    counts = binned(np.array([0.0, 1e-12, 1e9]))
    assert (counts[0], counts[BINS - 1], counts.sum()) == (2, 1, 3)
    assert quantiles(np.zeros(BINS, np.int64), (0.99,)) == [0.0]


@given(st.lists(st.tuples(st.floats(0, 500), st.integers(1, 9)), max_size=60))
def test_a_window_holds_what_is_not_too_long_ago(steps: list[tuple[float, int]]) -> None:
    """All of the last part but one, and nothing older than itself, whenever it is moved on."""
    window = Window(60.0, 6, width=1)
    now, happened = 0.0, []
    for pause, count in steps:
        now += pause
        window.add(np.array([count]), now)
        happened.append((now, count))
        surely = sum(count for at, count in happened if at > now - 50.0)
        at_most = sum(count for at, count in happened if at > now - 60.0)
        assert surely <= window.counts[0] <= at_most


def test_each_window_forgets_in_its_own_time() -> None:
    rolling = Rolling()
    rolling.add(np.array([0.001]), 1000.0)
    for later, left in ((30.0, {"1m", "5m", "1h"}), (90.0, {"5m", "1h"}), (400.0, {"1h"}), (4000.0, set())):
        rolling.move(1000.0 + later)
        assert {name for name in WINDOWS if rolling.windows[name].counts.sum()} == left


# ---------------------------------------------------------------------- objectives


def test_an_objective_tells_how_fast_its_budget_is_used_up() -> None:
    """Of a thousand requests ten may be slow; twenty are twice the budget, for as long as the window reaches back."""
    tracked = Tracked(Slo("ram", "ram", threshold_s=0.005, target=0.99))
    assert (tracked.budget_left, tracked.burn("5m", 0.0)) == (1.0, 0.0)
    tracked.add(np.array([0.001] * 980 + [0.0051] * 20), 10.0)
    assert tracked.burn("5m", 10.0) == pytest.approx(2.0)
    assert tracked.budget_left == pytest.approx(-1.0)
    tracked.add(np.array([0.005] * 1000), 400.0)
    assert tracked.burn("5m", 400.0) == 0.0
    assert tracked.burn("1h", 400.0) == pytest.approx(1.0)
    assert tracked.budget_left == pytest.approx(0.0)


# ---------------------------------------------------------------------- stopwatches


async def test_laps_leave_no_gap() -> None:
    """Whatever is done between two laps is the later one's; what was done elsewhere is split as its end tells."""
    watch = Stopwatch()
    with watch.stage("list"):
        await asyncio.sleep(0)
    watch.split({"decode": 1e9, "recipe": 1.0})
    watch.hand("lease")
    watch.lap("list")
    assert list(watch.stages) == ["list", "decode", "recipe", "lease"]
    assert sum(watch.stages.values()) == pytest.approx(watch.seconds, rel=1e-9)
    assert watch.stages["recipe"] == pytest.approx(0.0, abs=1e-9)
    assert watch.names[: watch.hand_at] == ["list", "decode", "recipe", "lease"]


async def test_a_stopwatch_travels_with_the_task() -> None:
    """And with those that it starts; another request's is another one."""
    watch = Stopwatch()

    async def request() -> None:
        timing(watch)
        assert await asyncio.create_task(seen()) is watch

    async def seen() -> Stopwatch:
        return current()

    await asyncio.create_task(request())
    assert current() is not watch


# ---------------------------------------------------------------------- slow requests


def test_the_slowest_of_an_hour_are_kept() -> None:
    """The others are not, nor who asked if that is not to be shown; after an hour they make room."""
    clock = FakeClock()
    slow = Slow(2, Uids("off"), clock)
    for seconds in (3.0, 1.0, 2.0):
        watch = Stopwatch()
        watch.times[0] -= seconds
        watch.study, watch.trace = "1.2.840.1.2.3.4", "t"
        watch.lap("fetch")
        slow.add("/v1/leases", "origin", 201, watch)
    assert [round(each.ms / 1e3) for each in slow.answers()] == [3, 2]
    assert slow.answers()[0].stages.keys() == {"fetch"}
    assert {(each.study, each.trace) for each in slow.answers()} == {(None, "t")}
    assert slow.floor >= 2.0
    clock.advance(3601.0)
    assert slow.answers() == []
    assert slow.floor == 0.0


def test_a_slow_request_in_words() -> None:
    """What it was, and its stages, the longest first; what took next to nothing is left out."""
    told = {
        "time": 1.8e9,
        "route": "/v1/leases",
        "tier": "origin",
        "status": 201,
        "ms": 1500.0,
        "stages": {"list": 300.0, "fetch": 1199.0, "lease": 1.0},
        "study": "1.2.3",
        "trace": None,
    }
    first, second = told_slow(told).split("\n")
    assert first.split() == ["1500.0", "ms", "08:00:00", "UTC", "201", "origin", "/v1/leases", "study", "1.2.3"]
    assert second.strip() == "fetch 1199.0, list 300.0"


# ---------------------------------------------------------------------- what hits are worth


def test_hits_save_what_their_entries_cost() -> None:
    """A miss saves nothing; GPUs that would have waited, and their price, follow."""
    metrics = Metrics()
    read_worth(metrics, PriceSettings(gpu_hour=3.6, gpus_waiting=2))
    assert metrics.hits() == (None, None, None)
    slow, quick = entry(10.0), entry(1.0, "staging", nbytes=300)
    for tier, got in (("origin", slow), ("ram", slow), ("nvme", slow), ("ram", quick)):
        metrics.answered(tier, got)
    assert value(metrics, "saved_seconds_total", namespace="serving") == 20.0
    assert value(metrics, "saved_seconds_total", namespace="staging") == 1.0
    assert value(metrics, "saved_gpu_seconds_total") == 42.0
    assert value(metrics, "saved_cost_total") == pytest.approx(0.042)
    assert metrics.hits() == (0.75, 500 / 600, 21 / 31)
    assert value(metrics, "answers_total", tier="ram", namespace="serving") == 1
    assert value(metrics, "answered_bytes_total", tier="origin", namespace="serving") == 100


def test_storage_has_its_price() -> None:
    """A thirtieth of a month's a day."""
    prices = PriceSettings(ram_gib_month=30.0, nvme_gib_month=3.0)
    assert storage_cost(prices, 1 << 30, 10 << 30) == pytest.approx(2.0)


# ---------------------------------------------------------------------- exemplars


def test_buckets_name_a_trace_where_openmetrics_is_spoken() -> None:
    """The last request of a trace in each bucket of tiers and stages; the older format has no room for it."""
    metrics = Metrics()
    for trace in ("a" * 32, ""):
        watch = Stopwatch()
        watch.trace = trace
        watch.times[0] -= 0.2
        watch.hand("list")
        metrics.request("/v1/leases", "ram", 201, watch)
    told = metrics.exposition("application/openmetrics-text; version=1.0.0").decode()
    assert told.endswith("# EOF\n")
    exemplars = [line for line in told.splitlines() if "trace_id" in line]
    assert len(exemplars) == 2
    assert all('{trace_id="' + "a" * 32 + '"} 0.2' in line for line in exemplars)
    assert 'tier="ram"' in exemplars[0]
    assert 'stage="list"' in exemplars[1]
    assert "trace_id" not in metrics.exposition().decode()


# ---------------------------------------------------------------------- what outlives its request


def test_a_fill_goes_on_without_its_request() -> None:
    """Whoever asked has left, and others wait: what the fill does then is counted, once each."""
    metrics = Metrics()
    recorder = recording(metrics)
    watch = recorder.begin()
    watch.lap("queue")
    recorder.answered("/v1/leases", "none", 499, watch)
    watch.lap("decode")
    for stage in ("queue", "response", "decode"):
        assert value(metrics, "stage_seconds_count", stage=stage) == 1


def test_parts_of_an_endless_request_are_counted_as_they_end() -> None:
    """A stream lasts as long as its client wants: its requests have stages, itself has no seconds."""
    metrics = Metrics()
    recorder = recording(metrics)
    watch = recorder.begin()
    for _ in range(2):
        recorder.part(watch).lap("turn")
    assert value(metrics, "stage_seconds_count", stage="turn") == 2
    recorder.answered("/inference.GRPCInferenceService/ModelStreamInfer", "none", 200, watch, endless=True)
    assert "voxcache_request_seconds_count" not in metrics.exposition().decode()
