"""The condition of the daemon's parts, in words."""

import pytest

from cache.nvme import State
from serving import condition
from serving.condition import HealthAnswer


@pytest.mark.parametrize(
    ("found", "ok", "says"),
    [
        (condition.origin(0, 0), True, "was not asked in the last minute"),
        (condition.origin(120, 0), True, "answers"),
        (condition.origin(120, 60), True, "failed 60 of 120 requests in the last minute"),
        (condition.origin(120, 61), False, "failed 61 of 120 requests in the last minute"),
        (condition.disk({"read": State.HEALTHY, "write": State.HEALTHY}), True, "is healthy"),
        (condition.disk({"read": State.HEALTHY, "write": State.SLOW}), True, "is slow at writes"),
        (condition.disk({"read": State.OUT, "write": State.OUT}), False, "is out of use for reads and writes"),
        (
            condition.disk({"read": State.FAILING, "write": State.OUT}),
            False,
            "is failing at reads, is out of use for writes",
        ),
        (condition.workers(True, 0, 8), True, "are idle, all 8"),
        (condition.workers(True, 2, 8), True, "are busy, 2 of 8"),
        (condition.workers(False, 0, 8), False, "carry out nothing any more"),
        (condition.redis(True), True, "answers"),
        (condition.redis(False), False, "does not answer"),
        (condition.triton({"triton": True, "triton.arena": True}), True, "is ready"),
        (condition.triton({"triton": True, "triton.arena": False}), False, "does not know the arena"),
        (condition.triton({"triton": False, "triton.arena": False}), False, "does not answer"),
        (
            condition.triton({"triton.a": True, "triton.a.arena": True, "triton.b": True, "triton.b.arena": True}),
            True,
            "is ready on 2 servers",
        ),
        (
            condition.triton({"triton.a": False, "triton.a.arena": False, "triton.b": True, "triton.b.arena": True}),
            False,
            "a does not answer",
        ),
    ],
)
def test_each_condition_has_its_words(found: HealthAnswer | None, ok: bool, says: str) -> None:
    """What is well and what is not, as the end of a sentence that begins with the part."""
    assert found is not None
    assert (found.ok, found.says) == (ok, says)


def test_a_triton_that_is_not_set_up_is_not_missed() -> None:
    """A daemon without any has nothing to say of it."""
    assert condition.triton({"triton": False, "workers": True}) is None
