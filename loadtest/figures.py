"""What benchmarks say: progress on stderr, quantiles, bars; and what a daemon's counters say."""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quantile(seconds: Sequence[float], share: float) -> float:
    """The nearest-rank quantile, in milliseconds: the least of ``seconds`` that ``share`` of them do not exceed."""
    # 0.07 × 100 is more than 7 in binary: what is that close to a rank is that rank
    rank = math.ceil(round(share * len(seconds), 9))
    return sorted(seconds)[max(rank, 1) - 1] * 1e3


def summary(seconds: Sequence[float]) -> dict[str, float]:
    return {"p50_ms": quantile(seconds, 0.5), "p99_ms": quantile(seconds, 0.99), "n": len(seconds)}


class Bar(msgspec.Struct, frozen=True):
    """What a figure has to reach: at least ``bar``, or at most."""

    name: str
    value: float
    bar: float
    ok: bool
    says: str = ""


def at_least(name: str, value: float, bar: float, says: str = "") -> Bar:
    """A bar that is met by ``value`` from ``bar`` on."""
    return Bar(name, round(value, 6), bar, value >= bar, says)


def at_most(name: str, value: float, bar: float, says: str = "") -> Bar:
    """A bar that is met by ``value`` up to ``bar``."""
    return Bar(name, round(value, 6), bar, value <= bar, says)


def plain(bars: Iterable[Bar]) -> list[dict[str, Any]]:
    """Bars as the last line of a benchmark has them."""
    return [{"name": bar.name, "value": bar.value, "bar": bar.bar, "ok": bar.ok} for bar in bars]


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry ``labels``, in Prometheus' text format.

    Raises: KeyError: there is no such metric; one that has counted nothing yet is 0.
    """
    total, known = 0.0, False
    for family in text_string_to_metric_families(text):
        known = known or family.name in (name, name.removesuffix("_total"))
        for sample in family.samples:
            if sample.name == name:
                known = True
                if labels.items() <= sample.labels.items():
                    total += sample.value
    if not known:
        raise KeyError(name)
    return total
