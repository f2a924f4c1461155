"""How a budget is divided: what each namespace may rely on, what it may borrow, and who gives way to whom."""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import TypeVar

import msgspec

from cache.errors import ConfigError

V = TypeVar("V")


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parts of the budget: what is a namespace's own, and up to where it may borrow what others do not use."""

    reservation: float
    ceiling: float = 1.0


#: A number is a reservation that is the ceiling too.
Shares = Mapping[str, Share | float]


class Limits(msgspec.Struct, frozen=True):
    """The bytes that no other namespace can make this one give up, and those it may never have more of."""

    reservation: int
    ceiling: int


def default_shares() -> Shares:
    """Most for what serves requests, which may borrow the rest; little for what is tried out."""
    return {"serving": Share(0.8), "staging": Share(0.1, 0.2)}


def check_shares(shares: Shares) -> None:
    """Raises: ConfigError unless each ceiling is above 0 and no less than its reservation, and these fit the budget."""
    if not shares:
        raise ConfigError("no namespace is configured: give at least one a share of the budget")
    for name, share in _each(shares).items():
        if not 0 <= share.reservation <= share.ceiling <= 1 or share.ceiling == 0:
            raise ConfigError(
                f"namespace {name!r} has the reservation {share.reservation} and the ceiling {share.ceiling}: "
                "write parts of the budget, from 0 to 1, the ceiling above 0 and no less than the reservation"
            )
    if math.fsum(share.reservation for share in _each(shares).values()) > 1 + 1e-9:
        raise ConfigError(f"the reservations of {', '.join(sorted(shares))} add up to more than the budget")


def check_kept(before: Iterable[str], after: Container[str]) -> None:
    """Raises: ConfigError if a namespace is missing: its entries would belong to nobody."""
    for name in before:
        if name not in after:
            raise ConfigError(f"namespace {name!r} cannot be given up while the daemon runs: restart it")


def limits(nbytes: int, shares: Shares, unit: int = 1) -> dict[str, Limits]:
    """What each namespace has of ``nbytes``, in multiples of ``unit``; the reservations are at most all of it.

    A namespace borrows what nobody reserved, not what others have reserved and do not use: they could not have it back
    while it is pinned. So no ceiling is above the reservation and all that is not reserved.
    """
    # rounding down to a unit first keeps shares such as 0.7 + 0.2 + 0.1 (a little above 1 in binary) within the whole
    whole = left = nbytes // unit
    own = {}
    for name, share in _each(shares).items():
        own[name] = min(int(whole * share.reservation + 1e-6), left)
        left -= own[name]
    found = {}
    for name, share in _each(shares).items():
        lent = min(int(whole * (share.ceiling - share.reservation) + 1e-6), left)
        found[name] = Limits(own[name] * unit, (own[name] + lent) * unit)
    return found


def expendable(  # noqa: PLR0917 - the ledger, what there is to give, and who asks for how much
    used: Mapping[str, int],
    limits: Mapping[str, Limits],
    victims: Mapping[str, Iterator[V]],
    size: Callable[[V], int],
    namespace: str | None = None,
    need: int = 0,
) -> Iterator[V]:
    """What may go so that ``namespace`` can have ``need`` bytes more, the first to go first.

    Whoever has borrowed most gives first, so that what nobody reserved is divided evenly, and nobody is brought below
    its reservation for another. What ``namespace`` itself has reserved comes last. Without one, all come down to their
    reservations.
    """
    over = {each: used[each] - limit.reservation + need * (each == namespace) for each, limit in limits.items()}
    givers = sorted(limits)
    while givers:
        giver = max(givers, key=over.__getitem__)
        if over[giver] <= 0:
            if namespace not in givers:
                return
            giver = namespace
        victim = next(victims[giver], None)
        if victim is None or (namespace not in (None, giver) and size(victim) > over[giver]):
            givers.remove(giver)
        else:
            over[giver] -= size(victim)
            yield victim


def _each(shares: Shares) -> dict[str, Share]:
    return {name: share if isinstance(share, Share) else Share(share, share) for name, share in shares.items()}
