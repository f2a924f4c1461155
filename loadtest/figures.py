"""What benchmarks say and read: progress on stderr, quantiles, bars, a daemon's metrics."""

import sys
from collections.abc import Sequence

from prometheus_client.parser import text_string_to_metric_families


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quantile(seconds: Sequence[float], share: float) -> float:
    """The nearest-rank quantile, in milliseconds."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3


def summary(seconds: Sequence[float]) -> dict[str, float]:
    return {"p50_ms": quantile(seconds, 0.5), "p99_ms": quantile(seconds, 0.99), "n": len(seconds)}


def at_most(name: str, value: float, bar: float) -> dict[str, object]:
    """A bar that is met by ``value`` up to ``bar``."""
    return {"name": name, "value": round(value, 3), "bar": bar, "ok": value <= bar}


def metric(text: str, sample: str, **labels: str) -> float:
    """The sum of the samples of that name in a scrape's text that carry ``labels``.

    Raises: KeyError: there is no such metric.
    """
    total, known = 0.0, False
    for family in text_string_to_metric_families(text):
        if not sample.startswith(family.name):
            continue
        known = True
        total += sum(s.value for s in family.samples if s.name == sample and labels.items() <= s.labels.items())
    if not known:
        raise KeyError(sample)
    return total
