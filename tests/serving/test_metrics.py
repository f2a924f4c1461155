"""The metrics as Prometheus reads them."""

import re

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from cache.stopwatch import Stopwatch
from serving.metrics import METRICS, Metrics, metrics_table
from tests.conftest import ROOT


def families(metrics: Metrics) -> dict[str, Metric]:
    """What a scrape finds, by name without the prefix; when a counter was made, which the library adds, is left out."""
    found = text_string_to_metric_families(metrics.exposition().decode())
    return {f.name.removeprefix("voxcache_"): f for f in found if not f.name.endswith("_created")}


def value(metrics: Metrics, sample: str, **labels: str) -> float:
    (found,) = [
        s.value
        for family in families(metrics).values()
        for s in family.samples
        if s.name == f"voxcache_{sample}" and s.labels == labels
    ]
    return float(found)


def test_a_scrape_finds_every_metric_of_the_table() -> None:
    """Each is there from the start with its kind and help, and nothing that the table does not name."""
    found = families(Metrics())
    assert {name: family.type for name, family in found.items()} == {m.name: m.kind for m in METRICS}
    assert {name: family.documentation for name, family in found.items()} == {m.name: m.help for m in METRICS}


def test_names_follow_the_conventions() -> None:
    """Snake case, base units, and no label that could hold an identifier."""
    for metric in METRICS:
        assert metric.name == metric.name.lower()
        assert not metric.name.endswith(("_total", "_ms", "_milliseconds"))
        if metric.unit in ("seconds", "bytes"):
            assert metric.name.endswith(f"_{metric.unit}")
        assert metric.help.endswith(".")
        assert not {"study", "series", "key", "instance", "patient"} & set(metric.labels)


def test_what_the_cache_tells_is_counted() -> None:
    """Counters add up, stages fall into buckets, requests are counted and timed."""
    metrics = Metrics()
    metrics.count("write_behind_skipped")
    metrics.count("evictions", ("ram", "room"), 2)
    metrics.count("evictions", ("ram", "room"))
    for seconds in (0.003, 0.004, 30.0):
        metrics.stage("fetch", seconds)
    watch = Stopwatch()
    watch.hand("lookup")
    metrics.request("/v1/tensor", "ram", 206, watch)
    assert value(metrics, "write_behind_skipped_total") == 1
    assert value(metrics, "evictions_total", tier="ram", reason="room") == 3
    assert value(metrics, "stage_seconds_count", stage="fetch") == 3
    assert value(metrics, "stage_seconds_bucket", stage="fetch", le="0.00356") == 1
    assert value(metrics, "stage_seconds_bucket", stage="fetch", le="0.00431") == 2
    assert value(metrics, "stage_seconds_sum", stage="fetch") == pytest.approx(30.007)
    assert value(metrics, "requests_total", route="/v1/tensor", tier="ram", status="206") == 1
    assert value(metrics, "request_seconds_count", route="/v1/tensor", tier="ram") == 1


def test_gauges_are_read_when_they_are_scraped() -> None:
    """A gauge shows what its reading says at that moment, with its labels."""
    metrics = Metrics()
    used = {"serving": 10, "staging": 0}
    metrics.read("tier_bytes", lambda: [(("ram", space), float(n)) for space, n in used.items()])
    assert value(metrics, "tier_bytes", tier="ram", namespace="serving") == 10
    used["serving"] = 20
    assert value(metrics, "tier_bytes", tier="ram", namespace="serving") == 20
    assert families(metrics)["pinned_bytes"].samples == []


def test_a_metric_that_is_not_in_the_table() -> None:
    """Counting what the table does not name, or with other labels, is a mistake that is heard of."""
    with pytest.raises(KeyError):
        Metrics().count("surprises")
    with pytest.raises(ValueError, match="label"):
        Metrics().count("evictions", ("ram",))


def test_everything_counted_is_in_the_table() -> None:
    """Every counter and gauge that some room feeds is in the table, and every one of the table is fed somewhere."""
    texts = [path.read_text() for room in ("cache", "serving") for path in sorted((ROOT / room).rglob("*.py"))]
    counted = {name for text in texts for name in re.findall(r"\.count\(\s*\"(\w+)\"", text)}
    read = {name for text in texts for name in re.findall(r"\.read\(\s*\"(\w+)\"", text)}
    assert not counted & read
    assert counted | read == {metric.name for metric in METRICS if metric.kind != "histogram"}


def test_two_daemons_in_a_process_do_not_mix() -> None:
    """Each has a registry of its own."""
    one, other = Metrics(), Metrics()
    one.count("write_behind_skipped")
    assert value(other, "write_behind_skipped_total") == 0


def test_the_table_names_metrics_as_they_are_scraped() -> None:
    """The documentation's names are those that a query has to use."""
    scraped = {s.name for family in families(Metrics()).values() for s in family.samples}
    table = metrics_table()
    assert "`voxcache_evictions_total`" in table
    assert "`voxcache_stage_seconds`" in table
    assert "`voxcache_event_loop_lag_seconds`" in table
    assert all(f"`{name}`" in table for name in scraped if name.endswith("_total"))
