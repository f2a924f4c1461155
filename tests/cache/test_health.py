"""When a disk counts as slow, failing, or out, and how it comes back."""

import msgspec
import pytest

from cache.errors import ConfigError
from cache.nvme.health import Health, HealthSettings, State

SETTINGS = HealthSettings(strikes=3, recovery=2, probe_s=1.0, out_s=60.0)


def struck(times: int, now: float = 0.0) -> Health:
    """A health after so many bad ones in a row."""
    health = Health(SETTINGS)
    for _ in range(times):
        health.bad(now)
    return health


def state(health: Health) -> State:
    return health.state


def test_one_bad_read_makes_it_slow_and_good_ones_healthy() -> None:
    """A single hiccup is remembered until a few have gone well in a row; meanwhile the disk is asked as before."""
    health = struck(1)
    assert (state(health), health.admits) == (State.SLOW, True)
    health.good()
    assert state(health) is State.SLOW
    health.good()
    assert state(health) is State.HEALTHY


def test_only_bad_ones_in_a_row_are_strikes() -> None:
    """A disk that is bad now and then stays slow, and is asked."""
    health = Health(SETTINGS)
    for _ in range(20):
        health.bad(0)
        health.good()
    assert state(health) is State.SLOW


def test_strikes_in_a_row_leave_it_alone() -> None:
    """At the last strike the disk is failing: requests do not use it any more."""
    assert struck(2).admits
    health = struck(3)
    assert (state(health), health.admits) == (State.FAILING, False)


def test_without_a_good_probe_it_is_out() -> None:
    """A disk that fails for long is out, and as good a probe brings it back."""
    health = struck(3, now=100)
    health.bad(159.9)
    assert state(health) is State.FAILING
    health.bad(160)
    assert (state(health), health.admits) == (State.OUT, False)
    health.good()
    assert state(health) is State.SLOW


def test_after_a_good_probe_one_strike_is_enough() -> None:
    """What came back is trusted little: the next bad one, and not a third, has it left alone again."""
    health = struck(3)
    health.good()
    assert health.admits
    health.bad(5)
    assert state(health) is State.FAILING
    health.good()
    health.good()
    health.good()
    assert state(health) is State.HEALTHY
    health.bad(6)
    health.bad(6)
    assert health.admits


def test_probes_become_rarer() -> None:
    """The pause before a probe doubles up to 64 times the first, and starts anew once one has gone well."""
    health = struck(3)
    pauses = []
    now = 0.0
    for _ in range(8):
        pauses.append(health.probe_in(now))
        now += pauses[-1]
        health.bad(now)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64]
    health.good()
    health.bad(now)
    assert health.probe_in(now) == 1
    assert health.probe_in(now + 5) == 0


@pytest.mark.parametrize("wrong", [{"deadline_s": 0}, {"probe_s": 0}, {"out_s": -1}, {"strikes": 0}, {"recovery": 0}])
def test_settings_that_cannot_be(wrong: dict[str, float]) -> None:
    """Settings that no disk could live up to are refused."""
    with pytest.raises(ConfigError, match=r"nvme\.health"):
        msgspec.structs.replace(SETTINGS, **wrong).check()
