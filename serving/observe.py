"""What the daemon notes of its own work, and what hits are worth: settings, and the metrics that follow from them."""

from collections.abc import Iterable
from typing import Annotated, Final

import msgspec

from .metrics import Metrics
from .slo import Slo, Tracked

_DAY_S: Final = 86400.0
_MONTH_S: Final = 30 * _DAY_S


class ObserveSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the daemon notes of its own work.

    record: whether requests are counted and timed at all; not to do it is there to measure what it costs.
    slow_kept: how many of the slowest requests of the last hour are kept with their stages; 0 for none.
    slos: service level objectives.
    """

    record: bool = True
    slow_kept: Annotated[int, msgspec.Meta(ge=0)] = 100
    slos: tuple[Slo, ...] = (Slo("ram", "ram", 0.005), Slo("miss", "origin", 4.0))


class PriceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What things cost, in any one currency, so that metrics can say what the cache is worth.

    gpu_hour: a GPU for an hour.
    gpus_waiting: GPUs that stand idle while a tensor is made: hits save each of them the time.
    ram_gib_month, nvme_gib_month: a GiB of each tier's budget for 30 days.
    active_s: seconds since its last use in which a study counts as active.
    """

    gpu_hour: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    gpus_waiting: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    ram_gib_month: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    nvme_gib_month: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    active_s: Annotated[float, msgspec.Meta(gt=0)] = _DAY_S


def track(slos: Iterable[Slo], metrics: Metrics) -> list[Tracked]:
    """Follow the objectives from now on, in metrics too."""
    tracked = [Tracked(slo) for slo in slos]
    for each in tracked:
        metrics.hear(each.slo.tier, each.add)
    metrics.read("slo_requests", lambda: [((each.slo.name,), float(each.requests)) for each in tracked])
    metrics.read("slo_slow_requests", lambda: [((each.slo.name,), float(each.slow)) for each in tracked])
    metrics.read("slo_target", lambda: [((each.slo.name,), each.slo.target) for each in tracked])
    return tracked


def read_worth(metrics: Metrics, prices: PriceSettings) -> None:
    """Have the metrics tell what hits saved."""

    def gpu_seconds() -> float:
        return metrics.saved_seconds * prices.gpus_waiting

    metrics.read("saved_gpu_seconds", lambda: [((), gpu_seconds())])
    metrics.read("saved_cost", lambda: [((), gpu_seconds() / 3600 * prices.gpu_hour)])


def storage_cost(prices: PriceSettings, ram: int, nvme: int) -> float:
    """What budgets of so many bytes cost in a day."""
    gib = 1 << 30
    return (ram / gib * prices.ram_gib_month + nvme / gib * prices.nvme_gib_month) * _DAY_S / _MONTH_S
