"""How the daemon watches itself: what it counts and keeps of its requests, and its heartbeat."""

import asyncio
from typing import Annotated, Final

import msgspec

from cache.interfaces import Clock, NullObserver, Observer

from .log import LogSettings
from .metrics import Metrics
from .price import PriceSettings, read_worth
from .recorder import Idle, Recorder
from .slo import Slo, track
from .slow import Slow
from .tracing import Spans, Tracing, TracingSettings
from .uids import Uids

_BEAT_S: Final = 0.1
_SETTLE_EVERY: Final = 10


class ObserveSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the daemon notes of its own work.

    record: whether requests are counted and timed at all; not to do it is there to measure what it costs.
    slow_kept: how many of the slowest requests of the last hour are kept with their stages; 0 for none.
    slos: service level objectives.
    """

    record: bool = True
    slow_kept: Annotated[int, msgspec.Meta(ge=0)] = 100
    slos: tuple[Slo, ...] = (Slo("ram", "ram", 0.005), Slo("miss", "origin", 4.0))


class Watched:
    """All that is known of how it does."""

    def __init__(
        self,
        metrics: Metrics,
        uids: Uids,
        *,
        observe: ObserveSettings,
        price: PriceSettings,
        log: LogSettings,
        tracing: TracingSettings,
        clock: Clock,
    ) -> None:
        """Raises: ConfigError: spans are wanted, and what sends them is not installed."""
        self.metrics = metrics
        self.observer: Observer = metrics if observe.record else NullObserver()
        self.uids = uids
        self.slow = Slow(observe.slow_kept, uids, clock)
        self.slos = track(observe.slos, metrics)
        self.tracing = Tracing(Spans(tracing) if tracing.endpoint else None)
        self.recorder = Recorder(metrics, self.slow, self.tracing, log.slow_ms) if observe.record else Idle()
        self._clock = clock
        read_worth(metrics, price)

    async def heartbeat(self) -> None:
        """See ten times a second how late the event loop is, and every second have counted what was recorded."""
        beats = 0
        while True:
            due = self._clock.monotonic() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            self.metrics.observe("event_loop_lag_seconds", max(self._clock.monotonic() - due, 0.0))
            beats += 1
            if beats % _SETTLE_EVERY == 0:
                self.metrics.settle()
                self.slow.forget()
