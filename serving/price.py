"""What hits are worth and tiers cost, in money: settings, and the metrics that follow from them."""

from typing import Annotated, Final

import msgspec

from .metrics import Metrics

_DAY_S: Final = 86400.0
_MONTH_S: Final = 30 * _DAY_S


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
