"""What benchmarks say: progress on stderr, quantiles, bars."""

import sys
from collections.abc import Sequence


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
