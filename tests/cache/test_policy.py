"""Eviction policies and shares: decisions over keys and sizes, without bytes."""

import math
import random
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import ConfigError
from cache.interfaces import EvictionPolicy
from cache.policy.adaptive import Adaptive
from cache.policy.choice import EvictionSettings
from cache.policy.gdsf import Gdsf, once, proved
from cache.policy.lru import Lru
from cache.policy.s3fifo import S3Fifo
from cache.policy.shares import Limits, Share, Shares, check_shares, expendable, limits
from cache.policy.sieve import Sieve
from cache.policy.simulation import Simulation
from cache.policy.worth import Aim
from tests.conformance.policy import PolicyConformance


class TestLruConforms(PolicyConformance):
    def make(self) -> EvictionPolicy[int]:
        return Lru()


class TestSieveConforms(PolicyConformance):
    def make(self) -> EvictionPolicy[int]:
        return Sieve()


class TestS3FifoConforms(PolicyConformance):
    def make(self) -> EvictionPolicy[int]:
        return S3Fifo()


class TestGdsfConforms(PolicyConformance):
    def make(self) -> EvictionPolicy[int]:
        return Gdsf()


class TestGreedyDualSizeConforms(PolicyConformance):
    def make(self) -> EvictionPolicy[int]:
        return Gdsf("requests", count=once)


class TestGreedyDualSizeWithDemotionConforms(PolicyConformance):
    def make(self) -> EvictionPolicy[int]:
        return Gdsf(count=proved)


class TestAdaptiveConforms(PolicyConformance):
    def make(self) -> EvictionPolicy[int]:
        return Adaptive()


def admit(policy: EvictionPolicy[int], *keys: int) -> None:
    for key in keys:
        policy.admitted(key, 1, 1.0, 0.0)


def test_lru_gives_up_the_longest_unused_first() -> None:
    """A use, like an arrival, puts a key last."""
    policy = Lru[int]()
    admit(policy, 0, 1, 2, 3)
    policy.used(0, 1.0)
    policy.removed(2)
    assert list(policy.victims()) == [1, 3, 0]


def test_sieve_passes_over_what_was_used() -> None:
    """The hand spares what was used since it came by, once, and goes on from where it took the last."""
    policy = Sieve[int]()
    admit(policy, 0, 1, 2, 3)
    policy.used(0, 1.0)
    assert list(policy.victims()) == [1, 2, 3, 0]
    policy.evicted(1)
    admit(policy, 4)
    assert list(policy.victims()) == [2, 3, 4, 0]
    for key in (2, 3, 4):
        policy.evicted(key)
    assert list(policy.victims()) == [0]


def test_s3fifo_lets_what_is_used_once_pass_through() -> None:
    """What has proved itself outlasts a scan, and what returns soon after it had to go counts as proved."""
    policy = S3Fifo[int]()
    admit(policy, *range(10))
    for key in range(1, 10):
        policy.used(key, 1.0)
        policy.used(key, 1.0)
    for key in range(100, 120):
        policy.evicted(next(policy.victims()))
        admit(policy, key)
    assert set(policy.victims()) == {*range(1, 10), 119}
    policy.evicted(119)
    admit(policy, 119, 120)
    order = list(policy.victims())
    assert order.index(120) < order.index(119)


@pytest.mark.parametrize(("aim", "order"), [("requests", [1, 2, 0]), ("bytes", [0, 1, 2]), ("cost", [1, 0, 2])])
def test_gdsf_weighs_by_its_aim(aim: Aim, order: list[int]) -> None:
    """Small, large and dear entries go in an order that the aim decides; of what weighs the same, the older first."""
    policy = Gdsf[int](aim)
    policy.admitted(0, 1, 1.0, 0.0)
    policy.admitted(1, 10, 1.0, 0.0)
    policy.admitted(2, 9, 90.0, 0.0)
    assert list(policy.victims()) == order


def test_gdsf_counts_uses_and_forgets_them() -> None:
    """What was used often stays longer, but not for ever: the floor rises with each victim."""
    policy = Gdsf[int]("requests")
    admit(policy, 0)
    for _ in range(3):
        policy.used(0, 1.0)
    gone = []
    for key in range(1, 8):
        admit(policy, key)
        gone.append(next(policy.victims()))
        policy.evicted(gone[-1])
    assert gone[:3] == [1, 2, 3]
    assert 0 in gone


def loop(keys: int, rounds: int) -> list[tuple[int, int, float]]:
    return [(key, 1, 1.0) for _ in range(rounds) for key in range(keys)]


def fresh(requests: int) -> list[tuple[int, int, float]]:
    """Each of the last 40 keys twice, then never again: what recency is right about."""
    return [(10_000 + number - back, 1, 1.0) for number in range(requests // 2) for back in (0, 40)]


def misses(policy: EvictionPolicy[int], requests: list[tuple[int, int, float]], capacity: int) -> int:
    simulation = Simulation(policy, capacity)
    return sum(not simulation.request(key, size, cost, now) for now, (key, size, cost) in enumerate(requests))


@pytest.mark.slow
def test_adaptive_follows_what_does_best() -> None:
    """On loads that suit different policies it comes close to the best of them, and on a change of load to each."""
    loads = {"loop": loop(120, 60), "fresh": fresh(6000), "both": loop(120, 40) + fresh(6000) + loop(120, 40)}
    for name, requests in loads.items():
        fixed = {kind.__name__: misses(kind(), requests, 100) for kind in (Lru, Sieve, S3Fifo, Gdsf)}
        assert misses(Adaptive(), requests, 100) <= 1.1 * min(fixed.values()), (name, fixed)


@pytest.mark.slow
def test_adaptive_aims_at_what_it_is_told() -> None:
    """With an aim of its own for requests and for bytes, each is better at its own than the other is."""
    rng = random.Random(1)
    sizes = [rng.choice((1, 1, 1, 40)) for _ in range(400)]
    requests = [(key, sizes[key], 1.0) for key in (min(int(rng.paretovariate(0.4)), 399) for _ in range(8000))]
    missed: dict[Aim, tuple[int, int]] = {}
    for aim in get_args(Aim):
        simulation = Simulation(Adaptive[int](aim), 400)
        lost = [size for now, (key, size, cost) in enumerate(requests) if not simulation.request(key, size, cost, now)]
        missed[aim] = len(lost), sum(lost)
    assert missed["requests"][0] < missed["bytes"][0]
    assert missed["bytes"][1] < missed["requests"][1]


def test_a_removed_entry_teaches_nothing() -> None:
    """What was dropped because someone asked is no experts' mistake: it is forgotten in the simulations too."""
    policy = Adaptive[int]()
    admit(policy, 0, 1)
    policy.removed(0)
    assert [0 in expert.simulation.sizes for expert in policy._experts] == [False] * 6


@pytest.mark.parametrize("name", get_args(EvictionSettings.__annotations__["policy"]))
def test_each_policy_can_be_chosen(name: str) -> None:
    """Every name in the settings builds a policy."""
    policy: EvictionPolicy[int] = msgspec.convert({"policy": name}, EvictionSettings).build()
    admit(policy, 0)
    assert list(policy.victims()) == [0]


def test_a_simulation_holds_no_more_than_its_capacity() -> None:
    """Room is made before an entry is held, and one that is too large alone pushes nothing out."""
    simulation = Simulation(Lru[int](), 10)
    assert [simulation.request(key, size, 1.0, 0.0) for key, size in ((0, 4), (1, 6), (0, 4), (2, 11), (3, 6))] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert simulation.sizes == {0: 4, 3: 6}
    assert simulation.bytes == 10
    assert simulation.gone == [1]


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"a": 0.0},
        {"a": -1.0},
        {"a": math.nan},
        {"a": 0.6, "b": 0.5},
        {"a": Share(0.5, 0.4)},
        {"a": Share(0.0, 0.0)},
        {"a": Share(0.5, 1.1)},
        {"a": Share(0.6), "b": Share(0.5)},
    ],
)
def test_shares_that_cannot_be(shares: Shares) -> None:
    """Shares that are none, promise more than there is, or have too low a ceiling are mistakes in the settings."""
    with pytest.raises(ConfigError):
        check_shares(shares)


def test_shares_of_tenths_fill_the_whole() -> None:
    """Seven, two and one tenth are a whole, whatever binary fractions make of them."""
    shares: Shares = {"a": 0.7, "b": 0.2, "c": 0.1}
    check_shares(shares)
    found = limits(100 * 4096, shares, 4096)
    assert found == {
        "a": Limits(70 * 4096, 70 * 4096),
        "b": Limits(20 * 4096, 20 * 4096),
        "c": Limits(4096 * 10, 40960),
    }


def test_what_is_reserved_is_not_lent() -> None:
    """A ceiling reaches no further than what others have not reserved."""
    assert limits(100, {"a": Share(0.5), "b": Share(0.2, 0.3)}) == {"a": Limits(50, 80), "b": Limits(20, 30)}


@given(
    nbytes=st.integers(0, 1 << 40),
    parts=st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1)), min_size=1, max_size=6),
    unit=st.sampled_from([1, 4096]),
)
def test_limits_stay_within_the_whole(nbytes: int, parts: list[tuple[int, float]], unit: int) -> None:
    """Whatever the shares, the reservations are never more than the budget, even with all that one may borrow."""
    total = sum(part for part, _ in parts)
    shares = {str(number): Share(part / total * own, part / total) for number, (part, own) in enumerate(parts)}
    check_shares(shares)
    found = limits(nbytes, shares, unit)
    reserved = sum(limit.reservation for limit in found.values())
    assert all(reserved - limit.reservation + limit.ceiling <= nbytes for limit in found.values())
    assert all(limit.reservation <= limit.ceiling for limit in found.values())
    assert all(size % unit == 0 for limit in found.values() for size in (limit.reservation, limit.ceiling))


def given_up(used: dict[str, int], bounds: dict[str, Limits], size: int, name: str | None, need: int = 0) -> str:
    """Whose entries, of ``size`` bytes each, may go, in their order."""
    victims = {each: iter([each] * (total // size)) for each, total in used.items()}
    return "".join(expendable(used, bounds, victims, lambda _: size, name, need))


def test_who_borrowed_most_gives_first() -> None:
    """What nobody reserved is divided evenly, nobody else gives what is reserved, and one's own comes last."""
    bounds = {"a": Limits(4, 10), "b": Limits(2, 8), "c": Limits(2, 2)}
    used = {"a": 4, "b": 6, "c": 2}
    assert given_up(used, bounds, 1, "a", 2) == "bbababaaa"[:8]
    assert given_up(used, bounds, 1, "c", 1) == "bbbbcc"
    assert given_up(used, bounds, 1, None) == "bbbb"


def test_an_entry_that_is_partly_reserved_is_not_taken() -> None:
    """Another's entry goes only if all of it was borrowed."""
    bounds = {"a": Limits(6, 10), "b": Limits(4, 10)}
    assert given_up({"a": 8, "b": 0}, bounds, 4, "b", 4) == ""
    assert given_up({"a": 12, "b": 0}, bounds, 4, "b", 4) == "a"
