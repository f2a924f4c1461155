"""What is worth a write to NVMe."""

from cache.policy.admission import All, SecondUse
from tests.conformance.tier import tensor

KEYS = [tensor(number, 1).key for number in range(4)]


def test_all() -> None:
    """Whatever is made is written, each time."""
    assert [All().admits(key, 1) for key in KEYS + KEYS] == [True] * 8


def test_the_second_time() -> None:
    """The first making is not written, the second is; a third, after it has left NVMe too, begins anew."""
    admission = SecondUse()
    assert [admission.admits(KEYS[0], 1) for _ in range(4)] == [False, True, False, True]


def test_only_so_many_are_remembered() -> None:
    """The longest unmade is forgotten, so memory is bounded."""
    admission = SecondUse(remembered=2)
    assert [admission.admits(key, 1) for key in KEYS[:3]] == [False] * 3
    assert admission.admits(KEYS[1], 1)
    assert not admission.admits(KEYS[0], 1)
