"""A radiology department as a cache sees it: which tensors and embeddings are asked for, when, and what a miss costs.

No public trace of medical-image access is known, so this stands for one. docs/workload.md gives each assumption and
where it comes from. The same settings, seed included, give the same requests.
"""

from bisect import bisect_left
from itertools import count
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

HOUR: Final = 3600.0
DAY: Final = 86400.0

#: ``time``: s since midnight before the first day, a Monday. ``size``: bytes. ``cost``: s that a miss takes to make.
REQUEST: Final = np.dtype([("time", "<f8"), ("key", "<u8"), ("size", "<u8"), ("cost", "<f8"), ("batch", "?")])

#: Parts of a weekday's arrivals in each hour from midnight: office hours, and emergencies around the clock.
BY_HOUR: Final = (15, 12, 10, 10, 10, 12, 18, 30, 60, 75, 80, 80, 68, 70, 75, 72, 65, 52, 42, 38, 34, 30, 24, 19)
#: What is left of them on Saturday and Sunday.
WEEKEND: Final = 0.4

#: Bytes/s from the origin, seconds to the first byte of an object, and objects fetched at a time.
FETCH: Final = 300e6
FIRST_BYTE: Final = 0.03
AT_A_TIME: Final = 16


class Modality(NamedTuple):
    """A kind of study: how often it comes, how large its series are, how many models look at them."""

    share: float
    series: int
    slices: float  # median of a series
    spread: float  # sigma of its logarithm
    slice_nbytes: int
    decode: float  # bytes/s, all workers together
    grid_nbytes: int  # resampled to what most models want
    models: int
    gpu_s: float  # of one embedding
    embedding_nbytes: int
    prior: float  # probability that an earlier study is compared with


MODALITIES: Final = {
    "CT": Modality(0.33, 2, 220, 0.7, 512 * 512 * 2, 600e6, 256**3 * 4, 4, 3.0, 1 << 20, 0.55),
    "MR": Modality(0.17, 3, 60, 0.7, 320 * 320 * 2, 600e6, 192**3 * 4, 3, 2.0, 1 << 20, 0.55),
    "DX": Modality(0.45, 1, 1.6, 0.3, 2500 * 2048 * 2, 200e6, 1024**2 * 4, 2, 0.2, 16 << 10, 0.55),
    "PT": Modality(0.05, 2, 300, 0.2, 200 * 200 * 2, 600e6, 192**3 * 4, 3, 2.0, 1 << 20, 0.70),
}

#: How soon a study is read: its part of all, the median delay in s, and the sigma of its logarithm.
URGENCIES: Final = ((0.35, 0.75 * HOUR, 0.6), (0.30, 3 * HOUR, 0.8), (0.35, 12 * HOUR, 0.7))

Form = Literal["native", "grid", "embedding"]


class Workload(NamedTuple):
    """What to model: ``days`` from a Monday on, ``studies`` on each weekday.

    tool: probability that whoever reads a study runs a model on it again.
    board: probability that a study, radiographs apart, is discussed in a conference some days later.
    research: studies from the archive that are scanned each night, once.
    cohort: studies that each new version of a model is tried on; one comes every ``release`` nights.
    """

    days: int = 14
    studies: int = 800
    seed: int = 1
    tool: float = 0.5
    board: float = 0.06
    research: int = 150
    cohort: int = 250
    release: int = 3


class _Series(NamedTuple):
    """One series in each of its forms: number, bytes, and seconds to make."""

    forms: dict[Form, tuple[int, int, float]]


class _Study(NamedTuple):
    time: float
    modality: str
    series: list[_Series]


class _Department:
    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.rng = np.random.default_rng(workload.seed)
        self.numbers = count()
        self.requests: list[tuple[float, int, int, float, bool]] = []
        self.studies: dict[str, list[_Study]] = {name: [] for name in MODALITIES}

    def run(self) -> npt.NDArray[np.void]:
        load = self.workload
        cohort = [self._make(-DAY, name) for name in self._modalities(load.cohort)]
        for day in range(load.days):
            weekday = day % 7 < 5
            today = self._arrivals(day, load.studies * (1.0 if weekday else WEEKEND))
            for study in today:
                self._arrives(study)
            night = (day + 1) * DAY + HOUR
            night = self._scan(night, today)
            night = self._scan(night, [self._make(-DAY, name) for name in self._modalities(load.research)])
            if day % load.release == load.release - 1:
                self._scan(night, cohort)
        found = np.array(self.requests, REQUEST)
        found = found[np.argsort(found["time"], kind="stable")]
        return found[found["time"] < load.days * DAY]

    def _modalities(self, studies: int) -> list[str]:
        shares = [modality.share for modality in MODALITIES.values()]
        return [str(name) for name in self.rng.choice(list(MODALITIES), studies, p=shares)]

    def _arrivals(self, day: int, mean: float) -> list[_Study]:
        studies = int(self.rng.poisson(mean))
        hours = self.rng.choice(24, studies, p=np.array(BY_HOUR) / sum(BY_HOUR))
        times = np.sort(day * DAY + (hours + self.rng.random(studies)) * HOUR)
        return [self._make(float(time), name) for time, name in zip(times, self._modalities(studies), strict=True)]

    def _make(self, time: float, name: str) -> _Study:
        kind = MODALITIES[name]
        series = []
        for _ in range(kind.series):
            slices = max(1, round(kind.slices * self.rng.lognormal(0, kind.spread)))
            nbytes = slices * kind.slice_nbytes
            made = FIRST_BYTE * -(-slices // AT_A_TIME) + nbytes / FETCH + nbytes / kind.decode
            resampled = made + (nbytes + kind.grid_nbytes) / 1e9
            series.append(
                _Series(
                    {
                        "native": (next(self.numbers), nbytes, made),
                        "grid": (next(self.numbers), kind.grid_nbytes, resampled),
                        "embedding": (next(self.numbers), kind.embedding_nbytes, resampled + kind.gpu_s),
                    }
                )
            )
        return _Study(time, name, series)

    def _ask(self, time: float, series: _Series, form: Form, *, batch: bool = False) -> None:
        self.requests.append((time, *series.forms[form], batch))

    def _soon(self, time: float, mean: float) -> float:
        return time + float(self.rng.exponential(mean))

    def _arrives(self, study: _Study) -> None:
        kind, rng = MODALITIES[study.modality], self.rng
        complete = study.time + float(rng.uniform(60, 300))
        for series in study.series:
            for model in range(kind.models):
                self._ask(self._soon(complete, 20), series, "native" if model == 0 else "grid")
            for _ in range(2):  # heads on one foundation model
                self._ask(self._soon(complete + 60, 60), series, "embedding")
        _, median, sigma = URGENCIES[rng.choice(len(URGENCIES), p=[part for part, *_ in URGENCIES])]
        read = complete + median * float(rng.lognormal(0, sigma))
        if rng.random() < self.workload.tool:
            self._look(read, study)
        if rng.random() < kind.prior:
            prior = self._prior(study)
            self._compare(complete, prior)
            if rng.random() < self.workload.tool:
                self._compare(read, prior)
        if study.modality != "DX" and rng.random() < self.workload.board:
            morning = (study.time // DAY + int(rng.integers(3, 11))) * DAY + 8 * HOUR
            self._look(morning + float(rng.uniform(0, HOUR)), study)
        self.studies[study.modality].append(study)

    def _look(self, time: float, study: _Study) -> None:
        """Someone works on a study: a few runs of models on one of its series."""
        series = study.series[int(self.rng.integers(len(study.series)))]
        for _ in range(int(self.rng.geometric(0.5))):
            time = self._soon(time, 300)
            form: Form = ("native", "grid", "embedding")[int(self.rng.choice(3, p=(0.4, 0.4, 0.2)))]
            self._ask(time, series, form)

    def _compare(self, time: float, prior: _Study) -> None:
        for series in prior.series[:1]:
            self._ask(self._soon(time, 30), series, "grid")
            self._ask(self._soon(time, 30), series, "embedding")

    def _prior(self, study: _Study) -> _Study:
        """An earlier study of its kind: most are days old, the rest months, which is before the first day here."""
        rng = self.rng
        age = float(rng.exponential(2 * DAY)) if rng.random() < 0.6 else 150 * DAY * float(rng.lognormal(0, 1.2))
        earlier = self.studies[study.modality]
        if not earlier or study.time - age < 0:
            return self._make(study.time - age, study.modality)
        at = bisect_left(earlier, study.time - age, key=lambda each: each.time)
        return earlier[min(at, len(earlier) - 1)]

    def _scan(self, time: float, studies: list[_Study]) -> float:
        """One request after another, for each series once; when it ends."""
        for study in studies:
            for series in study.series:
                self._ask(time, series, "grid", batch=True)
                time += 2.0
        return time


def requests(workload: Workload) -> npt.NDArray[np.void]:
    """The requests in order of time, as an array of ``REQUEST``."""
    return _Department(workload).run()
