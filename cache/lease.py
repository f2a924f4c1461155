"""The pin ledger: each lease holds one pin, and gives it back on release, or some grace after its time is over.

A client may read to the very end of its lease; the grace covers what it had under way by then. Neither ids nor the
arena's name are ever used twice: what was granted before a restart cannot be taken for anything granted since.
"""

import math
import secrets
from collections import OrderedDict

import msgspec

from .errors import BadRequest, LeaseExpired, Overloaded, UnknownLease
from .interfaces import Clock
from .ram import Pin


class LeaseSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long memory may be held by those who asked for it.

    default_ttl_s: seconds a lease lasts unless its holder says otherwise.
    max_ttl_s: the most it may ask for; more is cut to this.
    grace_s: seconds the bytes stay after the lease has expired.
    max_leases: leases at a time; more are refused with Overloaded.
    """

    default_ttl_s: float = 60.0
    max_ttl_s: float = 3600.0
    grace_s: float = 5.0
    max_leases: int = 10_000


class Lease(msgspec.Struct, frozen=True):
    """The right to read ``pin``'s bytes until ``expires`` (Unix seconds). ``id``: 32 random hex digits."""

    id: str
    pin: Pin
    expires: float


class _Held(msgspec.Struct, frozen=True):
    lease: Lease
    deadline: float  # monotonic: a clock that is set must not end or prolong a lease
    since: float  # monotonic too
    among: set[str]


class Leases:
    """The leases that were granted. Used from the event loop's thread only."""

    def __init__(self, settings: LeaseSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._held: dict[str, _Held] = {}
        # remembered for a while, to tell an expired lease from one that never was
        self._expired: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def grant(self, pin: Pin, ttl_s: float | None = None, among: set[str] | None = None) -> Lease:
        """Take over ``pin`` for ``ttl_s`` seconds. If this raises, the pin is still the caller's.

        ``among`` holds the lease's id from now on, for as long as the lease is held: what one holder has, so that it
        can be ended together.

        Raises:
            Overloaded: as many leases as may be are held.
            BadRequest: ``ttl_s`` is no positive number.
        """
        ttl_s = self._ttl(ttl_s)
        if len(self._held) >= self._settings.max_leases and not self.expire():
            raise Overloaded(f"{len(self._held)} leases are held already; release some or retry later")
        among = set() if among is None else among
        return self._hold(secrets.token_hex(16), pin, ttl_s, among, self._clock.monotonic())

    def renew(self, lease: str, ttl_s: float | None = None) -> Lease:
        """Let the lease last ``ttl_s`` seconds from now.

        Raises:
            LeaseExpired: its time is over, even if its bytes have a grace left: ask for a new one.
            UnknownLease: never granted, or released.
            BadRequest: ``ttl_s`` is no positive number.
        """
        ttl_s = self._ttl(ttl_s)
        held = self._find(lease)
        if held.deadline <= self._clock.monotonic():
            raise LeaseExpired(f"lease {lease} has expired")
        return self._hold(lease, held.lease.pin, ttl_s, held.among, held.since)

    def release(self, lease: str) -> None:
        """End the lease. Raises: LeaseExpired, UnknownLease."""
        self._end(self._find(lease))

    def expire(self) -> int:
        """Release the pins of leases whose time and grace are over, and return how many those were."""
        over = self._clock.monotonic() - self._settings.grace_s
        ended = [held for held in self._held.values() if held.deadline <= over]
        for held in ended:
            self._end(held)
            self._expired[held.lease.id] = None
        while len(self._expired) > self._settings.max_leases:
            self._expired.popitem(last=False)
        return len(ended)

    def ages(self) -> list[float]:
        """For how many seconds each lease has been held."""
        now = self._clock.monotonic()
        return [now - held.since for held in self._held.values()]

    def next_expiry(self) -> float | None:
        """When ``expire`` will next have something to do, on the monotonic clock; None if nothing is held."""
        first = min((held.deadline for held in self._held.values()), default=None)
        return None if first is None else first + self._settings.grace_s

    def close(self) -> None:
        """Release every pin."""
        for held in list(self._held.values()):
            self._end(held)

    def _ttl(self, ttl_s: float | None) -> float:
        if ttl_s is None:
            ttl_s = self._settings.default_ttl_s
        if not (math.isfinite(ttl_s) and ttl_s > 0):
            raise BadRequest(f"a lease of {ttl_s} seconds cannot be: ask for a positive number")
        return min(ttl_s, self._settings.max_ttl_s)

    def _find(self, lease: str) -> _Held:
        try:
            return self._held[lease]
        except KeyError:
            if lease in self._expired:
                raise LeaseExpired(f"lease {lease} has expired") from None
            raise UnknownLease("no such lease: never granted, released, or granted before a restart") from None

    def _hold(self, lease: str, pin: Pin, ttl_s: float, among: set[str], since: float) -> Lease:
        granted = Lease(lease, pin, self._clock.now() + ttl_s)
        self._held[lease] = _Held(granted, self._clock.monotonic() + ttl_s, since, among)
        among.add(lease)
        return granted

    def _end(self, held: _Held) -> None:
        del self._held[held.lease.id]
        held.among.discard(held.lease.id)
        held.lease.pin.release()
