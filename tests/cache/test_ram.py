"""The RAM tier: entries where other processes read them, never moved while they are pinned."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cache.arena import ALIGN, Arena, aligned
from cache.entry import Entry
from cache.errors import AllPinned, ConfigError, TooLarge, UnknownNamespace
from cache.ram import Pin, RamSettings, RamSpace, RamTier
from tests.conformance.tier import FakeClock, TierConformance, pack, payload_of, tensor

PAGES = 1024
SETTINGS = RamSettings(budget=PAGES * ALIGN, namespaces={"serving": 0.75, "staging": 0.25})


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(SETTINGS.budget)
    yield arena
    arena.close()


@pytest.fixture
def evicted() -> list[tuple[Entry, str]]:
    return []


@pytest.fixture
def tier(arena: Arena, evicted: list[tuple[Entry, str]]) -> RamTier:
    return RamTier(arena, SETTINGS, FakeClock(), on_evict=lambda entry, reason: evicted.append((entry, reason)))


class TestConformance(TierConformance):
    @pytest.fixture
    def tier(self, arena: Arena) -> RamTier:
        return RamTier(arena, SETTINGS, FakeClock())


def make(tier: RamTier, entry: Entry) -> Pin:
    """Make the entry in place, as a worker would."""
    space = tier.reserve(entry.key.namespace, entry.nbytes)
    space.view[:] = payload_of(entry)
    return tier.admit(entry, space)


def test_a_hit_moves_no_bytes(tier: RamTier, arena: Arena) -> None:
    """What was written in place is read in the same place, page-aligned and read-only."""
    entry = tensor(1, 5000, dtype="int16")
    made = make(tier, entry)
    hit = tier.pin(entry.key)
    assert hit is not None
    assert hit.extent == made.extent
    assert hit.extent.offset % ALIGN == 0
    assert hit.view.readonly
    assert arena.view(hit.extent) == payload_of(entry)
    assert entry.spec is not None
    assert np.shares_memory(entry.spec.array(hit.view), entry.spec.array(made.view))


def test_a_miss_pins_nothing(tier: RamTier) -> None:
    """There is nothing to pin of what is not held."""
    assert tier.pin(tensor(1, 1).key) is None


def test_pins_are_counted_once(tier: RamTier) -> None:
    """Releasing a pin twice does not release another's."""
    entry = tensor(1, 100)
    first, second = make(tier, entry), tier.pin(entry.key)
    assert second is not None
    first.release()
    first.release()
    assert not tier.evict(entry.key)
    with second:
        assert [resident.pins for resident in tier.residents()] == [1]
    assert tier.evict(entry.key)


def test_pinned_entries_stay_where_they_are(tier: RamTier, evicted: list[tuple[Entry, str]]) -> None:
    """Under pressure the unpinned go; the pinned neither move nor change."""
    size = 150 * ALIGN
    pins = [make(tier, tensor(number, size)) for number in range(5)]
    for pin in pins[1::2]:
        pin.release()
    before = [pin.extent for pin in pins[::2]]
    for number in range(5, 12):
        make(tier, tensor(number, 100 * ALIGN)).release()
    for pin, extent in zip(pins[::2], before, strict=True):
        assert pin.extent == extent
        assert pin.view == payload_of(pin.entry)
    gone = {entry.key for entry, _ in evicted}
    assert {pins[1].entry.key, pins[3].entry.key} <= gone
    assert {reason for _, reason in evicted} == {"room"}


def test_refuses_without_evicting_in_vain(tier: RamTier, evicted: list[tuple[Entry, str]]) -> None:
    """When the pinned leave no hole that is large enough, the refusal costs nobody their place."""
    pins = [make(tier, tensor(number, 192 * ALIGN)) for number in range(4)]
    pins[0].release()
    pins[2].release()
    with pytest.raises(AllPinned) as refusal:
        tier.reserve("serving", 300 * ALIGN)
    assert refusal.value.retry_after_s
    assert evicted == []
    pins[1].release()
    tier.reserve("serving", 300 * ALIGN)
    assert len(evicted) == 2


def test_spaces_count_as_taken(tier: RamTier) -> None:
    """Bytes that are being filled can be had by nobody else until they are given back."""
    space = tier.reserve("serving", 768 * ALIGN)
    with pytest.raises(AllPinned):
        tier.reserve("serving", 1)
    tier.reserve("staging", 256 * ALIGN)
    space.release()
    space.release()
    assert tier.usage("serving").used == 0
    tier.reserve("serving", 768 * ALIGN)


def test_what_can_never_fit(tier: RamTier) -> None:
    """More than the share, even if the arena would hold it, is refused for good."""
    with pytest.raises(TooLarge):
        tier.reserve("staging", 256 * ALIGN + 1)
    with pytest.raises(UnknownNamespace):
        tier.reserve("elsewhere", 1)


def test_admitting_what_is_held(tier: RamTier) -> None:
    """The second of two makers of one entry gets the first one's bytes, and its own are given back."""
    entry = pack(1, 1000)
    first, second = tier.reserve("serving", 1000), tier.reserve("serving", 1000)
    for space in (first, second):
        space.view[:] = payload_of(entry)
    one = tier.admit(entry, first)
    other = tier.admit(entry, second)
    assert one.extent == other.extent
    assert tier.usage("serving").used == ALIGN


def test_a_space_is_of_its_entry(tier: RamTier) -> None:
    """A space of another size or namespace, or one given back, does not become an entry."""
    entry = tensor(1, 1000)
    for wrong in (tier.reserve("serving", 999), tier.reserve("staging", 1000)):
        with pytest.raises(ValueError, match="not the entry's"):
            tier.admit(entry, wrong)
    space = tier.reserve("serving", 1000)
    space.release()
    with pytest.raises(ValueError, match="released"):
        tier.admit(entry, space)


def test_releasing_an_admitted_space_is_harmless(tier: RamTier) -> None:
    """A maker that cleans up after success takes nothing away."""
    entry = tensor(1, 1000)
    space = tier.reserve("serving", 1000)
    space.view[:] = payload_of(entry)
    pin = tier.admit(entry, space)
    space.release()
    assert pin.view == payload_of(entry)
    assert tier.usage("serving").used == ALIGN


def test_shares_that_cannot_be(arena: Arena) -> None:
    """Shares above the whole are a mistake in the settings."""
    with pytest.raises(ConfigError):
        RamTier(arena, RamSettings(SETTINGS.budget, {"serving": 0.9, "staging": 0.2}), FakeClock())


class RamMachine(RuleBasedStateMachine):
    """Entries, spaces and pins in a small arena: bytes stay right and shares hold after any interleaving."""

    spaces = Bundle("spaces")
    pins = Bundle("pins")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena.create(32 * ALIGN)
        budget = RamSettings(32 * ALIGN, {"serving": 0.75, "staging": 0.25})
        self.tier = RamTier(self.arena, budget, FakeClock())
        self.open: dict[int, tuple[Entry, RamSpace]] = {}
        self.held: dict[int, Pin] = {}

    @rule(target=spaces, number=st.integers(0, 15), namespace=st.sampled_from(["serving", "staging"]))
    def reserve(self, number: int, namespace: str) -> object:
        entry = tensor(number, (number + 1) * 3000, namespace)
        before = {resident.key for resident in self.tier.residents()}
        try:
            space = self.tier.reserve(namespace, entry.nbytes)
        except (AllPinned, TooLarge):
            assert {resident.key for resident in self.tier.residents()} == before
            return multiple()
        space.view[:] = payload_of(entry)
        self.open[id(space)] = (entry, space)
        return space

    @rule(target=pins, space=consumes(spaces))
    def admit(self, space: RamSpace) -> Pin:
        entry, _ = self.open.pop(id(space))
        pin = self.tier.admit(entry, space)
        self.held[id(pin)] = pin
        return pin

    @rule(space=consumes(spaces))
    def give_back(self, space: RamSpace) -> None:
        del self.open[id(space)]
        space.release()

    @rule(pin=consumes(pins))
    def release(self, pin: Pin) -> None:
        del self.held[id(pin)]
        pin.release()

    @rule(target=pins, pin=pins)
    def hit(self, pin: Pin) -> Pin:
        again = self.tier.pin(pin.entry.key)
        assert again is not None
        self.held[id(again)] = again
        return again

    @rule(pin=pins)
    def evict(self, pin: Pin) -> None:
        assert not self.tier.evict(pin.entry.key)

    @invariant()
    def bytes_are_right(self) -> None:
        for pin in self.held.values():
            assert pin.view == payload_of(pin.entry)
        for entry, space in self.open.values():
            assert space.view == payload_of(entry)

    @invariant()
    def the_ledger_is_exact(self) -> None:
        for namespace in ("serving", "staging"):
            usage = self.tier.usage(namespace)
            sizes = [r.nbytes for r in self.tier.residents() if r.key.namespace == namespace]
            sizes += [entry.nbytes for entry, _ in self.open.values() if entry.key.namespace == namespace]
            assert usage.used == sum(map(aligned, sizes)) <= usage.budget
        held = [pin.entry.key for pin in self.held.values()]
        assert all(resident.pins == held.count(resident.key) for resident in self.tier.residents())

    def teardown(self) -> None:
        self.arena.close()


RamMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestRamMachine = RamMachine.TestCase
