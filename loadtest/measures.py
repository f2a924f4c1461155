"""What a run measures: latencies as HDR histograms, by track and by second, which several processes can add up.

A *track* is a class of requests whose figures stand together ("hits", "misses", "slices in order"). Latency counts from
when a request was *due*, whether or not it could be sent then; a server that stalls is not spared the requests that
waited for it (Tene, "How NOT to Measure Latency": coordinated omission). ``service`` counts from when it was sent.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from hdrh.histogram import HdrHistogram

#: Microseconds: from the least a clock tells to twenty minutes, to 3 significant digits.
_LEAST: Final = 1
_MOST: Final = 1200 * 1_000_000
_DIGITS: Final = 3
#: A run is told in at most so many windows of whole seconds.
_WINDOWS: Final = 120
#: Percentiles of the curve, evenly spaced in "nines", where tails can be seen.
CURVE: Final = (0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 97.5, 99.0, 99.5, 99.9, 99.95, 99.99, 100.0)


class Answer(msgspec.Struct, frozen=True):
    """How a request ended: bytes of its body, the tier that answered, and milliseconds by stage; or an error."""

    nbytes: int = 0
    tier: str = ""
    stages: dict[str, float] = {}
    error: str = ""


class Window(msgspec.Struct, frozen=True):
    """What was due from ``start`` on (seconds), until the next window: latencies in ms (None: all failed), and hits."""

    start: float
    n: int
    errors: int
    nbytes: int
    hits: int
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None


class Stage(msgspec.Struct, frozen=True):
    """Seconds of one stage, as Server-Timing told them, over all the requests that had it."""

    n: int
    mean_ms: float
    p50_ms: float
    p99_ms: float


class Track(msgspec.Struct, frozen=True):
    """The figures of one track. ``seconds``, which rates are by: the length of the run, or until the last answer."""

    n: int
    errors: dict[str, int]
    nbytes: int
    seconds: float
    latency_ms: dict[str, float]
    service_ms: dict[str, float]
    curve: list[tuple[float, float]]
    windows: list[Window]
    tiers: dict[str, int]
    stages: dict[str, Stage]
    hdr: str

    @property
    def rate(self) -> float:
        """Requests answered well, a second."""
        return self.n / self.seconds if self.seconds else 0.0

    @property
    def hit_ratio(self) -> float | None:
        """The part that RAM or NVMe answered; None where no tier is told."""
        told = sum(self.tiers.values())
        return sum(self.tiers.get(tier, 0) for tier in ("ram", "nvme")) / told if told else None


def quantiles(histogram: Any) -> dict[str, float]:
    """The figures of a histogram, in ms."""
    if not histogram.get_total_count():
        return {}
    wanted = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
    values = histogram.get_percentile_to_value_dict(list(wanted.values()))  # all in one pass
    found = {name: values[share] / 1e3 for name, share in wanted.items()}
    return {**found, "max": histogram.get_max_value() / 1e3, "mean": histogram.get_mean_value() / 1e3}


class _Counts(msgspec.Struct):
    """One track of one process, as it travels: histograms are encoded (HdrHistogram V2, base64)."""

    latency: str
    service: str
    windows: dict[int, tuple[str, int, int, int]]
    stages: dict[str, str]
    errors: dict[str, int]
    tiers: dict[str, int]
    nbytes: int
    ended: float


class Snapshot(msgspec.Struct):
    """All that one process recorded."""

    width: int
    tracks: dict[str, _Counts]


class _Window:
    def __init__(self) -> None:
        self.latency = _histogram(2)
        self.errors = self.nbytes = self.hits = 0


class _Track:
    def __init__(self) -> None:
        self.latency = _histogram()
        self.service = _histogram()
        self.windows: defaultdict[int, _Window] = defaultdict(_Window)
        self.stages: defaultdict[str, Any] = defaultdict(_histogram)
        self.errors: Counter[str] = Counter()
        self.tiers: Counter[str] = Counter()
        self.nbytes = 0
        self.ended = 0.0


class Recorder:
    """Takes what requests came to. All times are seconds since the run's start."""

    def __init__(self, seconds: float) -> None:
        self._width = window_width(seconds)
        self._tracks: defaultdict[str, _Track] = defaultdict(_Track)

    def note(self, track: str, due: float, sent: float, ended: float, answer: Answer) -> None:
        """One request. Of errors only their number counts: an error that comes fast must not make a run look fast."""
        of = self._tracks[track]
        window = of.windows[int(due // self._width)]
        if answer.error:
            of.errors[answer.error] += 1
            window.errors += 1
            return
        latency = _microseconds(ended - due)
        of.latency.record_value(latency)
        of.service.record_value(_microseconds(ended - sent))
        window.latency.record_value(latency)
        of.ended = max(of.ended, ended)
        of.nbytes += answer.nbytes
        window.nbytes += answer.nbytes
        if answer.tier:
            of.tiers[answer.tier] += 1
            window.hits += answer.tier in ("ram", "nvme")
        for name, milliseconds in answer.stages.items():
            of.stages[name].record_value(_microseconds(milliseconds / 1e3))

    @property
    def counted(self) -> tuple[int, int]:
        """Requests so far, and how many of them failed."""
        errors = sum(sum(track.errors.values()) for track in self._tracks.values())
        return errors + sum(int(track.latency.get_total_count()) for track in self._tracks.values()), errors

    def snapshot(self) -> Snapshot:
        return Snapshot(
            self._width,
            {
                name: _Counts(
                    _text(track.latency),
                    _text(track.service),
                    {
                        at: (_text(window.latency), window.errors, window.nbytes, window.hits)
                        for at, window in track.windows.items()
                    },
                    {stage: _text(histogram) for stage, histogram in track.stages.items()},
                    dict(track.errors),
                    dict(track.tiers),
                    track.nbytes,
                    track.ended,
                )
                for name, track in self._tracks.items()
            },
        )


def together(snapshots: Iterable[Snapshot], seconds: float) -> dict[str, Track]:
    """The figures of all processes, by track. Raises: ValueError: they were not made for runs of one length."""
    snapshots = list(snapshots)
    if len({snapshot.width for snapshot in snapshots}) > 1:
        raise ValueError("snapshots of runs of different lengths")
    names = sorted({name for snapshot in snapshots for name in snapshot.tracks})
    width = snapshots[0].width if snapshots else 1
    return {name: _added([s.tracks[name] for s in snapshots if name in s.tracks], width, seconds) for name in names}


def _added(counts: list[_Counts], width: int, seconds: float) -> Track:
    latency = _sum((each.latency for each in counts), _DIGITS)
    windows = []
    for at in sorted({at for each in counts for at in each.windows}):
        parts = [each.windows[at] for each in counts if at in each.windows]
        histogram = _sum((part[0] for part in parts), 2)
        told = quantiles(histogram)
        windows.append(
            Window(
                float(at * width),
                int(histogram.get_total_count()),
                sum(part[1] for part in parts),
                sum(part[2] for part in parts),
                sum(part[3] for part in parts),
                told.get("p50"),
                told.get("p99"),
                told.get("max"),
            )
        )
    stages = {}
    for name in sorted({name for each in counts for name in each.stages}):
        histogram = _sum((each.stages[name] for each in counts if name in each.stages), _DIGITS)
        told = quantiles(histogram)
        stages[name] = Stage(int(histogram.get_total_count()), told["mean"], told["p50"], told["p99"])
    return Track(
        n=int(latency.get_total_count()),
        errors=_total(each.errors for each in counts),
        nbytes=sum(each.nbytes for each in counts),
        seconds=max(seconds, *(each.ended for each in counts)),
        latency_ms=quantiles(latency),
        service_ms=quantiles(_sum((each.service for each in counts), _DIGITS)),
        curve=[(share, us / 1e3) for share, us in latency.get_percentile_to_value_dict(list(CURVE)).items()],
        windows=windows,
        tiers=_total(each.tiers for each in counts),
        stages=stages,
        hdr=_text(latency),
    )


def window_width(seconds: float) -> int:
    """Whole seconds, so that a run has no more than 120 windows."""
    return max(1, math.ceil(seconds / _WINDOWS))


def server_timing(header: str) -> dict[str, float]:
    """Milliseconds by stage (https://www.w3.org/TR/server-timing/); entries without a duration are left out."""
    found = {}
    for entry in header.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key == "dur" and name:
                found[name] = float(value.strip('"'))
    return found


def _histogram(digits: int = _DIGITS) -> Any:
    return HdrHistogram(_LEAST, _MOST, digits)


def _microseconds(seconds: float) -> int:
    return min(max(round(seconds * 1e6), _LEAST), _MOST)


def _text(histogram: Any) -> str:
    encoded: bytes = histogram.encode()
    return encoded.decode("ascii")


def _sum(encoded: Iterable[str], digits: int) -> Any:
    total = _histogram(digits)
    for text in encoded:
        total.add(HdrHistogram.decode(text.encode()))
    return total


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
