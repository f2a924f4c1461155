"""What goes wrong on purpose: drawn from a seed, so that the same call meets the same fate in every run."""

import random
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T", bound=str)


def fate(shares: Mapping[T, float], *call: object) -> T | None:
    """Which fault a call meets, if any, given the probability of each. ``call`` names it: seed, method, number, …"""
    # seeded by a text, as the order of concurrent calls differs from run to run
    chance = random.Random("/".join(map(str, call))).random()  # noqa: S311 - dice
    for fault, share in shares.items():
        chance -= share
        if chance < 0:
            return fault
    return None
