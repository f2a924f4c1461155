"""The metrics of one daemon as they grow."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import numpy as np
from prometheus_client import exposition

from cache.entry import Entry
from cache.interfaces import Clock, SystemClock
from cache.stopwatch import Stopwatch

from .distribution import Distribution, Exemplar, Seconds
from .rolling import Rolling, Window
from .seen import Seen
from .table import METRICS, Metric, buckets

#: Reads a gauge, or a counter that is kept elsewhere, when it is scraped: pairs of label values and value.
Reading = Callable[[], Iterable[tuple[tuple[str, ...], float]]]

#: Hears of durations in seconds that were counted, and when that was by a clock that never goes back.
Heard = Callable[[Seconds, float], None]

#: Hears which tier had an entry that requests got.
HeardOf = Callable[[str, Entry], None]

_TABLE: Final = {metric.name: metric for metric in METRICS}
#: The stages of a hit that the hand-off socket answers at once.
AT_ONCE: Final = ("lookup", "lease", "response")
#: Outcomes of requests to the origin that are its fault.
_ORIGIN_FAULTS: Final = ("failed", "origin-down", "origin-denied")
#: Histograms of which it is known how they were lately.
_ROLLING: Final = ("tier_seconds", "stage_seconds")


class _Alike(NamedTuple):
    """Requests that went the same way: what they were, and the times of each, its start and the end of each stage.

    ``times`` has them one request after another: numbers in one list are nothing that the garbage collector looks
    through. ``hand_at``: which of a request's times is when the tensor was at hand, 0 for none.
    """

    route: str
    tier: str
    status: int
    hand_at: int
    stages: tuple[str, ...]
    times: list[float]


class _Worth:
    """What requests got from one tier and namespace."""

    __slots__ = ("count", "nbytes", "seconds")

    def __init__(self) -> None:
        self.count = 0
        self.nbytes = 0
        self.seconds = 0.0


class Shares(NamedTuple):
    """What parts of what requests got were hits; None while there was nothing."""

    requests: float | None
    bytes: float | None
    cost: float | None


class Metrics:
    """All metrics of one daemon. It is the Observer of the cache."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._counters: dict[str, dict[tuple[str, ...], float]] = {m.name: {} for m in METRICS if m.kind == "counter"}
        self._histograms: dict[str, dict[tuple[str, ...], Distribution]] = {
            m.name: {} for m in METRICS if m.kind == "histogram"
        }
        self._readings: dict[str, Reading] = {}
        self._heard: dict[str, list[Heard]] = {}
        self._requests: dict[tuple[str, str, int], int] = {}
        self._alike: dict[tuple[object, ...], _Alike] = {}
        self._at_once = _Alike("handoff", "ram", 201, 2, AT_ONCE, [])
        #: Takes the times of a hit that the hand-off socket answered at once: its start, and the ends of its stages.
        self.at_once = self._at_once.times.extend
        self._worth: dict[tuple[str, str], _Worth] = {}
        self._answers: dict[str, list[Entry]] = {}
        self._heard_of: list[HeardOf] = []
        self._origin = Window(60.0, 6, width=2)
        self._origin_before = np.zeros(2)
        self.read("requests", lambda: [((r, t, str(s)), float(n)) for (r, t, s), n in self._requests.items()])
        self.read("answers", lambda: [(labels, float(worth.count)) for labels, worth in self._worth.items()])
        self.read("answered_bytes", lambda: [(labels, float(worth.nbytes)) for labels, worth in self._worth.items()])
        self.read("answered_cost_seconds", lambda: [(labels, worth.seconds) for labels, worth in self._worth.items()])
        self.read("saved_seconds", lambda: [((name,), seconds) for name, seconds in self._saved().items()])

    def read(self, name: str, reading: Reading) -> None:
        """Have the gauge or counter ``name`` read by ``reading`` at every scrape. Raises: KeyError: there is none."""
        self._readings[_TABLE[name].name] = reading

    def hear(self, tier: str, heard: Heard) -> None:
        """Have ``heard`` told how long requests took that ``tier`` answered."""
        self._heard.setdefault(tier, []).append(heard)

    def hear_of(self, heard: HeardOf) -> None:
        """Have ``heard`` told of entries that requests got."""
        self._heard_of.append(heard)

    # ------------------------------------------------------------------ what happens

    def stage(self, name: str, seconds: float) -> None:
        self._child("stage_seconds", (name,)).record(seconds)

    def count(self, name: str, labels: Iterable[str] = (), amount: float = 1.0) -> None:
        counter, named = self._counters[name], tuple(labels)
        if named not in counter:
            _check(_TABLE[name], named)
        counter[named] = counter.get(named, 0.0) + amount

    def observe(self, name: str, seconds: float) -> None:
        """Something took so long that a histogram without labels is about."""
        self._child(name, ()).record(seconds)

    def answered(self, tier: str, entry: Entry) -> None:
        answers = self._answers.get(tier)
        if answers is None:
            answers = self._answers[tier] = []
        answers.append(entry)

    def request(self, route: str, tier: str, status: int, watch: Stopwatch) -> None:
        """A request was answered, as ``watch`` says. ``tier``: which had its tensor, "none" for none."""
        way = route, tier, status, watch.hand_at, *watch.names
        alike = self._alike.get(way)
        if alike is None:
            alike = self._alike[way] = _Alike(route, tier, status, watch.hand_at, tuple(watch.names), [])
        alike.times.extend(watch.times)
        if watch.trace:
            self._exemplify(tier, watch)

    def untimed(self, route: str, status: int) -> None:
        """A request was answered whose seconds mean nothing."""
        named = route, "none", status
        self._requests[named] = self._requests.get(named, 0) + 1

    def _exemplify(self, tier: str, watch: Stopwatch) -> None:
        now = self._clock.now()
        if watch.hand_at and tier != "none":
            at_hand = watch.times[watch.hand_at] - watch.times[0]
            self._child("tier_seconds", (tier,)).example(Exemplar(watch.trace, at_hand, now))
        for stage, began, ended in watch.laps():
            self._child("stage_seconds", (stage,)).example(Exemplar(watch.trace, ended - began, now))

    def settle(self) -> None:
        """Count what was recorded; to be called every second or so."""
        now = self._clock.monotonic()
        for tier, answers in self._answers.items():
            self._settle_answers(tier, answers)
            answers.clear()
        requests = self._counters["origin_requests"]
        counted = np.array(
            [sum(requests.values()), sum(n for (_, how), n in requests.items() if how in _ORIGIN_FAULTS)]
        )
        self._origin.add((counted - self._origin_before).astype(np.int64), now)
        self._origin_before = counted
        for children in self._histograms.values():
            for child in children.values():
                child.settle(now)
        alike, self._alike = self._alike, {}
        for each in alike.values():
            self._settle_alike(each, now)
        if self._at_once.times:
            self._settle_alike(self._at_once, now)
            self._at_once.times.clear()

    def _settle_alike(self, alike: _Alike, now: float) -> None:
        """Count requests that went the same way, all at once: one at a time would take as long as to answer them."""
        times = np.array(alike.times).reshape(-1, len(alike.stages) + 1)
        named = alike.route, alike.tier, alike.status
        self._requests[named] = self._requests.get(named, 0) + len(times)
        self._child("request_seconds", named[:2]).add(times[:, -1] - times[:, 0], now)
        if alike.hand_at and alike.tier != "none":
            at_hand = times[:, alike.hand_at] - times[:, 0]
            self._child("tier_seconds", (alike.tier,)).add(at_hand, now)
            for heard in self._heard.get(alike.tier, ()):
                heard(at_hand, now)
        for stage, seconds in zip(alike.stages, np.diff(times).T, strict=True):
            self._child("stage_seconds", (stage,)).add(np.ascontiguousarray(seconds), now)

    def _settle_answers(self, tier: str, answers: list[Entry]) -> None:
        # the same few entries are asked for again and again, and to hash one takes longer than to see which it is
        entries = {id(entry): entry for entry in answers}
        for number, count in Counter(map(id, answers)).items():
            entry = entries[number]
            worth = self._worth.setdefault((tier, entry.key.namespace), _Worth())
            worth.count += count
            worth.nbytes += count * entry.nbytes
            worth.seconds += count * entry.cost_s
            for heard in self._heard_of:
                heard(tier, entry)

    # ------------------------------------------------------------------ what was seen of it

    def lately(self) -> dict[str, dict[str, Rolling]]:
        """How durations were distributed lately, by histogram and its one label."""
        self.settle()
        return {
            name: {labels[0]: child.rolling for labels, child in self._histograms[name].items() if child.rolling}
            for name in _ROLLING
        }

    def hits(self) -> Shares:
        """What parts of what requests got were hits, since the start."""
        answers = [(tier in ("ram", "nvme"), worth) for (tier, _), worth in self._worth.items()]

        def share(of: Callable[[_Worth], float]) -> float | None:
            every = sum(of(worth) for _, worth in answers)
            return sum(of(worth) for hit, worth in answers if hit) / every if every else None

        return Shares(share(lambda w: w.count), share(lambda w: w.nbytes), share(lambda w: w.seconds))

    def origin_lately(self) -> tuple[int, int]:
        """Requests to the origin in the last minute, and those of them that failed."""
        self.settle()
        asked, failed = self._origin.counts
        return int(asked), int(failed)

    @property
    def saved_seconds(self) -> float:
        """Seconds that hits would have taken to make."""
        return sum(self._saved().values())

    def _saved(self) -> dict[str, float]:
        saved: dict[str, float] = {}
        for (tier, namespace), worth in self._worth.items():
            saved[namespace] = saved.get(namespace, 0.0) + (worth.seconds if tier in ("ram", "nvme") else 0.0)
        return saved

    # ------------------------------------------------------------------ Prometheus

    def exposition(self, accept: str = "") -> bytes:
        """All metrics in the text format that ``accept`` (a header's value) asks for."""
        return exposition.choose_encoder(accept)[0](self._seen())

    async def scraped(self, accept: str) -> tuple[bytes, str]:
        """The same and its media type, written in a thread: it takes longer than hits should wait."""
        write, media_type = exposition.choose_encoder(accept)
        return await asyncio.to_thread(write, self._seen()), media_type

    def _seen(self) -> Seen:
        self.settle()
        values = {
            m.name: dict(self._counters.get(m.name, {}))
            | dict(self._readings[m.name]() if m.name in self._readings else ())
            for m in METRICS
            if m.kind != "histogram"
        }
        for metric in METRICS:
            if metric.kind == "counter" and not metric.labels:
                values[metric.name].setdefault((), 0.0)
            if metric.kind == "histogram" and not metric.labels:
                self._child(metric.name, ())
        held = {
            name: {labels: child.held() for labels, child in children.items()}
            for name, children in self._histograms.items()
        }
        return Seen(values, held)

    def _child(self, name: str, labels: tuple[str, ...]) -> Distribution:
        children = self._histograms[name]
        child = children.get(labels)
        if child is None:
            _check(_TABLE[name], labels)
            child = children[labels] = Distribution(buckets(_TABLE[name]), Rolling() if name in _ROLLING else None)
        return child


def _check(metric: Metric, labels: tuple[str, ...]) -> None:
    if len(labels) != len(metric.labels):
        raise ValueError(f"{metric.name} has the labels {metric.labels}, not as many as {labels}")
