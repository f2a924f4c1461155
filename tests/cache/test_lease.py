"""Leases: each holds one pin, until its release or the end of its time and grace."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cache.arena import ALIGN, Arena
from cache.errors import BadRequest, LeaseExpired, Overloaded, UnknownLease
from cache.lease import Lease, Leases, LeaseSettings
from cache.ram import Pin, RamSettings, RamTier
from tests.conformance.tier import FakeClock, payload_of, tensor

TTL, GRACE = 10.0, 2.0
SETTINGS = LeaseSettings(default_ttl_s=TTL, max_ttl_s=20.0, grace_s=GRACE, max_leases=3)


class Rig:
    """A RAM tier of three entries, its clock and its leases."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.arena = Arena.create(4 * ALIGN)
        self.tier = RamTier(self.arena, RamSettings(4 * ALIGN, {"serving": 1.0}), self.clock)
        self.leases = Leases(SETTINGS, self.clock)
        self.entries = [tensor(number, 100) for number in range(3)]
        for entry in self.entries:
            space = self.tier.reserve("serving", 100)
            space.view[:] = payload_of(entry)
            self.tier.admit(entry, space).release()

    def pin(self, number: int = 0) -> Pin:
        pin = self.tier.pin(self.entries[number].key)
        assert pin is not None
        return pin

    def pins(self) -> list[int]:
        found = {resident.key: resident.pins for resident in self.tier.residents()}
        return [found[entry.key] for entry in self.entries]


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Rig:
    rig = Rig()
    request.addfinalizer(rig.arena.close)
    return rig


def test_holds_the_bytes_until_released(rig: Rig) -> None:
    """A lease keeps its entry from being evicted; once released, the lease is unknown."""
    lease = rig.leases.grant(rig.pin())
    assert not rig.tier.evict(lease.pin.entry.key)
    rig.leases.release(lease.id)
    with pytest.raises(UnknownLease):
        rig.leases.release(lease.id)
    assert rig.tier.evict(lease.pin.entry.key)


def test_what_one_holder_has_is_told(rig: Rig) -> None:
    """The holder's set names its leases for as long as they are held: renewed, not yet released, not yet expired."""
    mine: set[str] = set()
    first, second = rig.leases.grant(rig.pin(0), among=mine), rig.leases.grant(rig.pin(1), TTL * 2, among=mine)
    rig.leases.grant(rig.pin(2))
    assert mine == {first.id, second.id}
    rig.leases.renew(second.id, TTL * 2)
    rig.clock.advance(TTL + GRACE)
    rig.leases.expire()
    assert mine == {second.id}
    rig.leases.release(second.id)
    assert mine == set()


def test_says_when_it_expires(rig: Rig) -> None:
    """The holder is told the end in Unix seconds; no lease outlasts what the settings allow."""
    now = rig.clock.now()
    assert rig.leases.grant(rig.pin()).expires == now + TTL
    assert rig.leases.grant(rig.pin(), 3.0).expires == now + 3.0
    assert rig.leases.grant(rig.pin(), 1e9).expires == now + SETTINGS.max_ttl_s


def test_bytes_stay_for_the_grace(rig: Rig) -> None:
    """Between expiry and the end of the grace the lease is over, but its bytes stay."""
    lease = rig.leases.grant(rig.pin())
    due = rig.leases.next_expiry()
    rig.clock.advance(TTL)
    assert rig.leases.expire() == 0
    with pytest.raises(LeaseExpired):
        rig.leases.renew(lease.id)
    assert rig.pins() == [1, 0, 0]
    rig.clock.advance(GRACE)
    assert due == rig.clock.monotonic()
    assert rig.leases.expire() == 1
    assert rig.pins() == [0, 0, 0]
    assert rig.leases.next_expiry() is None


def test_expired_is_not_unknown(rig: Rig) -> None:
    """A holder who comes too late learns so; one who made an id up learns that instead."""
    lease = rig.leases.grant(rig.pin())
    rig.clock.advance(TTL + GRACE)
    rig.leases.expire()
    for call in (rig.leases.renew, rig.leases.release):
        with pytest.raises(LeaseExpired):
            call(lease.id)
        with pytest.raises(UnknownLease):
            call("0" * 32)


def test_expired_leases_are_forgotten_in_the_end(rig: Rig) -> None:
    """The memory of expired leases is bounded."""
    first = rig.leases.grant(rig.pin())
    for _ in range(SETTINGS.max_leases + 1):
        rig.clock.advance(TTL + GRACE)
        rig.leases.expire()
        rig.leases.grant(rig.pin())
    rig.clock.advance(TTL + GRACE)
    rig.leases.expire()
    with pytest.raises(UnknownLease):
        rig.leases.renew(first.id)


def test_renewal_counts_from_now(rig: Rig) -> None:
    """A renewed lease lasts its new time from the moment of renewal, under the same id and pin."""
    lease = rig.leases.grant(rig.pin())
    rig.clock.advance(TTL - 1)
    renewed = rig.leases.renew(lease.id, 5.0)
    assert renewed == Lease(lease.id, lease.pin, rig.clock.now() + 5.0)
    rig.clock.advance(4.0)
    rig.leases.renew(lease.id)


def test_too_many(rig: Rig) -> None:
    """Beyond the limit a lease is refused and its pin left to the caller; what is over makes room."""
    for _ in range(SETTINGS.max_leases):
        rig.leases.grant(rig.pin())
    pin = rig.pin(1)
    with pytest.raises(Overloaded):
        rig.leases.grant(pin)
    assert rig.pins() == [SETTINGS.max_leases, 1, 0]
    rig.clock.advance(TTL + GRACE)
    rig.leases.grant(pin)
    assert rig.pins() == [0, 1, 0]


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be(rig: Rig, ttl: float) -> None:
    """A lease without a positive, finite time is refused."""
    with pytest.raises(BadRequest):
        rig.leases.grant(rig.pin(), ttl)


def test_close_releases_everything(rig: Rig) -> None:
    """After the last word no pin is left."""
    rig.leases.grant(rig.pin())
    rig.leases.grant(rig.pin(2))
    rig.leases.close()
    assert rig.pins() == [0, 0, 0]
    assert len(rig.leases) == 0


class LeaseMachine(RuleBasedStateMachine):
    """Leases against a dict of deadlines: pins are exact after any interleaving."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.model: dict[str, tuple[int, float]] = {}
        self.over: set[str] = set()

    def sweep(self) -> None:
        now = self.rig.clock.monotonic()
        gone = {lease for lease, (_, deadline) in self.model.items() if deadline + GRACE <= now}
        self.over |= gone
        for lease in gone:
            del self.model[lease]

    @rule(target=ids, number=st.integers(0, 2), ttl=st.integers(1, 30))
    def grant(self, number: int, ttl: int) -> object:
        pin = self.rig.pin(number)
        if len(self.model) >= SETTINGS.max_leases:
            self.sweep()
        if len(self.model) >= SETTINGS.max_leases:
            with pytest.raises(Overloaded):
                self.rig.leases.grant(pin, ttl)
            pin.release()
            return multiple()
        lease = self.rig.leases.grant(pin, ttl)
        self.model[lease.id] = (number, self.rig.clock.monotonic() + min(ttl, 20))
        return lease.id

    @rule(lease=ids, ttl=st.integers(1, 30))
    def renew(self, lease: str, ttl: int) -> None:
        now = self.rig.clock.monotonic()
        if lease in self.model and self.model[lease][1] > now:
            self.rig.leases.renew(lease, ttl)
            self.model[lease] = (self.model[lease][0], now + min(ttl, 20))
        else:
            with pytest.raises((LeaseExpired, UnknownLease)):
                self.rig.leases.renew(lease, ttl)

    @rule(lease=consumes(ids))
    def release(self, lease: str) -> None:
        if self.model.pop(lease, None) is not None:
            self.rig.leases.release(lease)
        else:
            with pytest.raises((LeaseExpired, UnknownLease)):
                self.rig.leases.release(lease)

    @rule(seconds=st.integers(0, 15))
    def wait(self, seconds: int) -> None:
        self.rig.clock.advance(seconds)

    @rule()
    def expire(self) -> None:
        before = len(self.model)
        self.sweep()
        assert self.rig.leases.expire() == before - len(self.model)

    @invariant()
    def pins_are_exact(self) -> None:
        held = [number for number, _ in self.model.values()]
        assert self.rig.pins() == [held.count(number) for number in range(3)]
        assert len(self.rig.leases) == len(self.model)
        for number, entry in enumerate(self.rig.entries):
            if number in held:
                assert not self.rig.tier.evict(entry.key)

    def teardown(self) -> None:
        self.rig.leases.close()
        assert self.rig.pins() == [0, 0, 0]
        self.rig.arena.close()


LeaseMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestLeaseMachine = LeaseMachine.TestCase
