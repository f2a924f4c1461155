"""The condition of each part that the daemon needs, in words: for people who are woken by it."""

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from cache.nvme import State

_STATES: Final = {State.SLOW: "is slow at", State.FAILING: "is failing at", State.OUT: "is out of use for"}


class HealthAnswer(msgspec.Struct, frozen=True):
    """Whether something that the daemon needs is well; ``says`` makes a sentence with its name before it."""

    what: Literal["origin", "triton", "redis", "disk", "workers"]
    ok: bool
    says: str


def origin(asked: int, failed: int) -> HealthAnswer:
    """Of so many requests in the last minute so many failed: well while most do not."""
    if not asked:
        return HealthAnswer("origin", True, "was not asked in the last minute")
    if not failed:
        return HealthAnswer("origin", True, "answers")
    return HealthAnswer("origin", failed * 2 <= asked, f"failed {failed} of {asked} requests in the last minute")


def disk(sides: Mapping[str, State]) -> HealthAnswer:
    """The states of its reads and of its writes."""
    found: dict[str, list[str]] = {}
    for side, state in sides.items():
        if state is not State.HEALTHY:
            found.setdefault(_STATES[state], []).append(f"{side}s")
    says = ", ".join(f"{what} {' and '.join(at)}" for what, at in found.items())
    return HealthAnswer("disk", max(sides.values()) <= State.SLOW, says or "is healthy")


def workers(alive: bool, busy: int, seats: int) -> HealthAnswer:
    """Whether jobs are carried out, by how many of how many."""
    if not alive:
        return HealthAnswer("workers", False, "carry out nothing any more")
    return HealthAnswer("workers", True, f"are busy, {busy} of {seats}" if busy else f"are idle, all {seats}")


def redis(answers: bool) -> HealthAnswer:
    return HealthAnswer("redis", answers, "answers" if answers else "does not answer")


def triton(checks: Mapping[str, bool]) -> HealthAnswer | None:
    """What each server, ``triton`` or ``triton.NAME``, was found to be, and its arena likewise. None without any."""
    servers = {name.removesuffix(".arena"): knows for name, knows in checks.items() if name.endswith(".arena")}
    if not servers:
        return None
    wrong = {
        name: "does not know the arena" if checks[name] else "does not answer"
        for name, knows in servers.items()
        if not knows
    }
    if len(servers) == 1:
        return HealthAnswer("triton", not wrong, next(iter(wrong.values()), "is ready"))
    says = ", ".join(f"{name.removeprefix('triton.')} {what}" for name, what in wrong.items())
    return HealthAnswer("triton", not wrong, says or f"is ready on {len(servers)} servers")
