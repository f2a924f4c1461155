"""What the daemon counts and times, for Prometheus and for its own eyes."""

from .observed import AT_ONCE, Metrics, Reading
from .table import METRICS, PREFIX, Metric, buckets, metrics_table

__all__ = ["AT_ONCE", "METRICS", "PREFIX", "Metric", "Metrics", "Reading", "buckets", "metrics_table"]
