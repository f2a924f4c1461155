"""What every eviction policy does: the class that each implementation's tests subclass."""

import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.interfaces import EvictionPolicy

#: What happens to a policy: the action, a number that chooses the key, a size and a cost.
Event = tuple[str, int, int, float]

events = st.lists(
    st.tuples(
        st.sampled_from(["request", "request", "request", "make room", "remove"]),
        st.integers(0, 12),
        st.integers(0, 1000),
        st.floats(0, 100),
    ),
    max_size=120,
)


#: One test of the class is one test for each policy: what Hypothesis learns of one may serve another.
_each = settings(suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow])


def play(policy: EvictionPolicy[int], history: list[Event]) -> set[int]:
    """Do to the policy what a tier does, and check its victims after each step; what is held at the end."""
    held: set[int] = set()
    for now, (action, number, size, cost) in enumerate(history):
        if action == "request":
            if number in held:
                policy.used(number, now)
            else:
                policy.admitted(number, size, cost, now)
                held.add(number)
        elif held:
            # pins make a tier take others than the first
            victim = list(policy.victims())[number % len(held)]
            (policy.evicted if action == "make room" else policy.removed)(victim)
            held.discard(victim)
        victims = list(policy.victims())
        assert sorted(victims) == sorted(held), "every key that is held is a victim, once"
        assert list(policy.victims()) == victims, "looking changes nothing"
    return held


def lines_run(work: Callable[[], object], room: str = "cache.policy") -> int:
    """How many lines of a room are run: work that no busy machine makes more."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if not frame.f_globals["__name__"].startswith(room):
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


class PolicyConformance(ABC):
    """Subclass it and provide ``make``."""

    @abstractmethod
    def make(self) -> EvictionPolicy[int]: ...

    def test_holds_nothing_at_first(self) -> None:
        """A new policy has no victims."""
        assert list(self.make().victims()) == []

    @_each
    @given(history=events)
    def test_yields_what_is_held_and_nothing_else(self, history: list[Event]) -> None:
        """Whatever happened, each key that is held is a victim once, and looking at them changes nothing."""
        play(self.make(), history)

    @_each
    @given(sizes=st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 100)), max_size=12), history=events)
    def test_restored_is_as_admitted(self, sizes: list[tuple[int, float]], history: list[Event]) -> None:
        """What a tier starts with is held as if it had come one by one, and goes on as any other."""
        entries = [(100 + number, size, cost, float(number)) for number, (size, cost) in enumerate(sizes)]
        restored, admitted = self.make(), self.make()
        restored.restored(entries)
        for entry in entries:
            admitted.admitted(*entry)
        assert list(restored.victims()) == list(admitted.victims())
        for policy in (restored, admitted):
            for key, *_ in entries:
                policy.used(key, 100)
        assert list(restored.victims()) == list(admitted.victims())
        for key, *_ in entries:
            restored.removed(key)
        play(restored, history)

    @_each
    @given(history=events)
    def test_is_deterministic(self, history: list[Event]) -> None:
        """The same history leads to the same victims."""
        one, other = self.make(), self.make()
        play(one, history)
        play(other, history)
        assert list(one.victims()) == list(other.victims())

    @_each
    @given(history=events)
    def test_can_be_emptied(self, history: list[Event]) -> None:
        """Always the first victim, again and again, ends with nothing held."""
        policy = self.make()
        held = play(policy, history)
        for _ in range(len(held)):
            victim = next(policy.victims())
            policy.evicted(victim)
            held.remove(victim)
        assert not held
        assert list(policy.victims()) == []

    def test_what_is_used_outlives_what_is_not(self) -> None:
        """A key that is used again and again stays while others of its kind come and go."""
        policy = self.make()
        policy.admitted(0, 1, 1.0, 0.0)
        for number in range(1, 400):
            policy.admitted(number, 1, 1.0, number)
            policy.used(0, number)
            if number >= 20:
                victim = next(policy.victims())
                assert victim != 0
                policy.evicted(victim)

    @pytest.mark.slow
    def test_work_does_not_grow_with_entries(self) -> None:
        """A request that misses costs about as much with thousands of entries as with hundreds."""

        def work_at(entries: int) -> float:
            policy = self.make()
            rng = random.Random(1)
            held = set(range(entries))
            for number in held:
                policy.admitted(number, rng.randint(1, 100), rng.random(), number)

            def churn() -> None:
                for now in range(2 * entries):
                    number = int(rng.paretovariate(0.5)) % (4 * entries)
                    if number in held:
                        policy.used(number, now)
                    else:
                        victim = next(policy.victims())
                        policy.evicted(victim)
                        held.remove(victim)
                        policy.admitted(number, rng.randint(1, 100), rng.random(), now)
                        held.add(number)

            return lines_run(churn) / entries

        assert work_at(3200) <= 2 * work_at(200)
