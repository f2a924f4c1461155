"""Quantiles, bars and counters, as every benchmark has them."""

import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import servers
from loadtest.figures import at_least, at_most, metric, plain, quantile

TEXT = """\
# HELP voxcache_hedges_total Late requests made once more.
# TYPE voxcache_hedges_total counter
voxcache_hedges_total{kind="fetch",outcome="won"} 3.0
voxcache_hedges_total{kind="list",outcome="won"} 2.0
voxcache_hedges_total{kind="fetch",outcome="lost"} 1e+02
# HELP voxcache_restores_total Of the archive.
# TYPE voxcache_restores_total counter
# HELP voxcache_leases Held.
# TYPE voxcache_leases gauge
voxcache_leases{who="a } b, \\"c\\""} 4.0
# HELP voxcache_tier_seconds Of requests.
# TYPE voxcache_tier_seconds histogram
voxcache_tier_seconds_bucket{le="0.1"} 1.0
voxcache_tier_seconds_bucket{le="+Inf"} 2.0
voxcache_tier_seconds_count 2.0
voxcache_tier_seconds_sum 0.5
"""


@given(st.lists(st.floats(0, 100), min_size=1), st.integers(1, 1000))
def test_a_quantile_is_the_nearest_rank(seconds: list[float], thousandths: int) -> None:
    """The least value that so many of them do not exceed: of 100 values the 99th is p99, not the 100th."""
    found = quantile(seconds, thousandths / 1000)
    enough = [each for each in seconds if 1000 * sum(other <= each for other in seconds) >= thousandths * len(seconds)]
    assert found == min(enough) * 1e3


def test_the_median_of_two_is_the_first() -> None:
    assert quantile([0.2, 0.1], 0.5) == pytest.approx(100)
    assert quantile([number / 1e3 for number in range(1, 101)], 0.99) == pytest.approx(99)
    assert quantile([0.1, 0.2], 0.0) == pytest.approx(100)


def test_a_bar_is_met_at_its_bound() -> None:
    """It is judged by the value itself, not by what is shown of it."""
    assert at_least("a", 2.0, 2.0).ok and at_most("a", 2.0, 2.0).ok
    assert not at_most("a", 2.0 + 1e-9, 2.0).ok and not at_least("a", 2.0 - 1e-9, 2.0).ok
    assert not at_most("a", math.nan, 2.0).ok and not at_least("a", math.nan, 2.0).ok
    assert plain([at_most("a", 1, 2, "why")]) == [{"name": "a", "value": 1, "bar": 2, "ok": True}]


def test_a_metric_is_the_sum_of_what_carries_the_labels() -> None:
    assert metric(TEXT, "voxcache_hedges_total") == 105
    assert metric(TEXT, "voxcache_hedges_total", outcome="won") == 5
    assert metric(TEXT, "voxcache_hedges_total", outcome="won", kind="list") == 2
    assert metric(TEXT, "voxcache_hedges_total", outcome="failed") == 0
    assert metric(TEXT, "voxcache_leases", who='a } b, "c"') == 4
    assert metric(TEXT, "voxcache_tier_seconds_count") == 2


def test_a_metric_that_there_is_not_is_no_zero() -> None:
    """One that has counted nothing yet is."""
    assert metric(TEXT, "voxcache_restores_total") == 0
    with pytest.raises(KeyError, match="voxcache_lease"):
        metric(TEXT, "voxcache_lease")


def test_a_forked_child_does_its_work_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither what its parent goes on with nor what is done at an end; a failure is told, and its status."""

    def fail() -> None:
        raise ValueError("this one fails")

    assert [os.waitpid(servers.forked(work), 0)[1] >> 8 for work in (lambda: None, fail)] == [0, 1]
    assert "this one fails" in capfd.readouterr().err
