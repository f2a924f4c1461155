"""Traces: which one a request is part of, by W3C's Trace Context, and its spans where they are wanted.

https://www.w3.org/TR/trace-context/. Without an endpoint OpenTelemetry is not needed: a trace that a client names is
passed on as it is.
"""

import random
import re
import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from cache import __version__
from cache.errors import ConfigError
from cache.stopwatch import Stopwatch

#: What a client tells of its trace, and what is told on.
NAMES: Final = ("traceparent", "tracestate")

_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED: Final = 1


class TracingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Spans of requests and their stages, for a collector of OpenTelemetry's. It needs the extra ``tracing``.

    endpoint: where spans are sent, OTLP over HTTP, such as "http://127.0.0.1:4318/v1/traces"; "" for nowhere.
    sample: the part that is traced of the requests that name no trace; where one is named, its client decides.
    """

    endpoint: str = ""
    sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01


class Named(msgspec.Struct, frozen=True):
    """A trace as a header names it. ``sampled``: its spans are wanted."""

    trace: str
    sampled: bool


def named(traceparent: str) -> Named | None:
    """The trace that a header names; None for a header that is none."""
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    if found[2] == "0" * 32 or found[3] == "0" * 16:
        return None
    return Named(found[2], bool(int(found[4], 16) & _SAMPLED))


class _Traced(Stopwatch):
    """A request whose spans are wanted. Laps are timed from anywhere; spans want the time of day."""

    __slots__ = ("offset_ns", "span")

    def __init__(self) -> None:
        super().__init__()
        self.offset_ns = time.time_ns() - int(self.times[0] * 1e9)
        self.span: Any = None

    def at_ns(self, moment: float) -> int:
        return int(moment * 1e9) + self.offset_ns


class Tracing:
    """Begins the stopwatches of requests as their traces want it."""

    def __init__(self, spans: "Spans | None" = None) -> None:
        self.spans = spans

    def begin(self, told: Mapping[str, str]) -> Stopwatch:
        """A request begins; ``told``: what its client says of its trace, by name, if it says anything."""
        trace = named(told["traceparent"]) if "traceparent" in told else None
        if self.spans is not None:
            wanted = trace.sampled if trace is not None else random.random() < self.spans.sample  # noqa: S311 - no secret
            if wanted:
                return self.spans.begin(_told(told) if trace is not None else {})
        watch = Stopwatch()
        if trace is not None:
            watch.trace = trace.trace
            watch.told = tuple(_told(told).items())
        return watch

    def end(self, watch: Stopwatch, route: str, tier: str, status: int) -> None:
        """The request has been answered."""
        if isinstance(watch, _Traced) and self.spans is not None:
            self.spans.end(watch, route, tier, status)

    def close(self) -> None:
        """Send what waits to be sent."""
        if self.spans is not None:
            self.spans.close()


def _told(told: Mapping[str, str]) -> dict[str, str]:
    """What is told on, but for what no header may hold (RFC 9110 §5.5): HTTP's parser lets more in than that."""
    named = ((name, told[name]) for name in NAMES if name in told)
    return {name: value for name, value in named if value.isascii() and value.isprintable()}


class Spans:
    """Spans in OpenTelemetry's form, sent by a thread of its own."""

    def __init__(self, settings: TracingSettings) -> None:
        """Raises: ConfigError: the extra is not installed."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(f"tracing.endpoint needs voxcache[tracing] to be installed: {error}") from None
        self.sample = settings.sample
        resource = Resource.create({"service.name": "voxcache", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.endpoint)))
        self._tracer = self._provider.get_tracer("voxcache", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._server, self._inside = trace.SpanKind.SERVER, trace.set_span_in_context

    def begin(self, told: Mapping[str, str]) -> Stopwatch:
        watch = _Traced()
        parent, start = self._propagator.extract(told), watch.at_ns(watch.times[0])
        watch.span = span = self._tracer.start_span("request", context=parent, kind=self._server, start_time=start)
        watch.trace = format(span.get_span_context().trace_id, "032x")
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=self._inside(span))
        watch.told = tuple(carrier.items())
        return watch

    def end(self, watch: _Traced, route: str, tier: str, status: int) -> None:
        span = watch.span
        inside = self._inside(span)
        for lap in watch.laps():
            child = self._tracer.start_span(lap.stage, context=inside, start_time=watch.at_ns(lap.began))
            child.end(watch.at_ns(lap.ended))
        span.update_name(route)
        span.set_attributes({"http.route": route, "http.response.status_code": status, "voxcache.tier": tier})
        span.end(watch.at_ns(watch.times[-1]))

    def close(self) -> None:
        self._provider.shutdown()
