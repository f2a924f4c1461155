"""The metrics of one moment, as Prometheus reads them."""

from collections.abc import Iterator

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as ShownExemplar

from .distribution import Held
from .table import METRICS, PREFIX, Metric, buckets


class Seen(Collector):
    """All metrics as they were at one moment."""

    def __init__(
        self, values: dict[str, dict[tuple[str, ...], float]], held: dict[str, dict[tuple[str, ...], Held]]
    ) -> None:
        self._values = values
        self._held = held

    def collect(self) -> Iterator[Family]:
        for metric in METRICS:
            name = PREFIX + metric.name
            unit = metric.unit if name.endswith(f"_{metric.unit}") else ""
            if metric.kind == "histogram":
                histogram = HistogramMetricFamily(name, metric.help, labels=metric.labels, unit=unit)
                for labels, held in self._held[metric.name].items():
                    histogram.add_metric(labels, _shown(metric, held), held.sum)
                yield histogram
            else:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                family = kind(name, metric.help, labels=metric.labels, unit=unit)
                for labels, value in self._values[metric.name].items():
                    family.add_metric(labels, value)
                yield family


def _shown(metric: Metric, held: Held) -> list[tuple[str, float] | tuple[str, float, ShownExemplar]]:
    """A histogram's buckets as Prometheus knows them: each with what is in those before it too."""
    bounds = [*map(repr, buckets(metric)), "+Inf"]
    reached = np.cumsum(held.counts).tolist()
    shown: list[tuple[str, float] | tuple[str, float, ShownExemplar]] = list(zip(bounds, reached, strict=True))
    for bucket, (trace, seconds, at) in held.exemplars.items():
        exemplar = ShownExemplar({"trace_id": trace}, seconds, at)
        shown[bucket] = (bounds[bucket], reached[bucket], exemplar)
    return shown
