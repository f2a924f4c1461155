"""What a miss costs, by what is to be spared: requests that miss, bytes made anew, or the time that takes."""

from typing import Literal

Aim = Literal["requests", "bytes", "cost"]


def worth(aim: Aim, size: int, cost: float) -> float:
    """What one hit of an entry of ``size`` bytes, made in ``cost`` seconds, spares."""
    match aim:
        case "requests":
            return 1.0
        case "bytes":
            return float(size)
        case "cost":
            return cost
