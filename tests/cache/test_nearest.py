"""The nearest vectors: as by brute force, whatever the order they come in."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import BadRequest
from cache.nearest import Metric, Nearest

#: Few values, so that many vectors are equally near.
coarse = st.integers(-2, 2).map(float)


def found(rows: list[list[float]], vector: list[float], k: int, metric: Metric, chunk: int) -> list[tuple[int, float]]:
    nearest: Nearest[int] = Nearest(vector, k, metric)
    for at in range(0, len(rows), chunk):
        nearest.add(range(at, len(rows)).__getitem__, np.array(rows[at : at + chunk], "float32"))
    assert nearest.searched == len(rows)
    return nearest.found()


def score(row: list[float], vector: list[float], metric: Metric) -> float:
    a, b = np.array(row), np.array(vector)
    if metric == "l2":
        return float(np.linalg.norm(a - b))
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b)) if metric == "cosine" else 1.0
    return float(a @ b) / lengths if lengths else 0.0


@settings(max_examples=50)
@given(
    rows=st.lists(st.lists(coarse, min_size=3, max_size=3), min_size=1, max_size=40),
    vector=st.lists(coarse, min_size=3, max_size=3),
    k=st.integers(1, 12),
    metric=st.sampled_from(get_args(Metric)),
    chunk=st.integers(1, 50),
)
def test_they_are_those_of_brute_force(
    rows: list[list[float]], vector: list[float], k: int, metric: Metric, chunk: int
) -> None:
    """The best scores, of equals the least keys, in whatever portions the vectors came."""
    answer = found(rows, vector, k, metric, chunk)
    sign = 1 if metric == "l2" else -1
    everyone = found(rows, vector, len(rows), metric, len(rows))
    assert answer == everyone[:k]
    assert [key for key, _ in everyone] == sorted(range(len(rows)), key=lambda n: (sign * dict(everyone)[n], n))
    for key, value in answer:
        assert value == pytest.approx(score(rows[key], vector, metric))


@pytest.mark.parametrize("length", [1, 7, 64, 1023])
@pytest.mark.parametrize("metric", get_args(Metric))
def test_equal_vectors_have_equal_scores(metric: Metric, length: int) -> None:
    """To the last bit, whatever their place among others: or ties would not be ties."""
    random = np.random.default_rng(length)
    row = random.normal(size=length).tolist()
    others = random.normal(size=(3, length)).tolist()
    rows = [row, *others, row, others[0], row, row]
    scores = dict(found(rows, random.normal(size=length).tolist(), len(rows), metric, 5))
    assert len({scores[at] for at in (0, 4, 6, 7)}) == 1


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "bool"])
def test_any_type_of_numbers_is_compared_in_float64(dtype: str) -> None:
    """Small integers do not wrap, half floats do not overflow."""
    rows = np.array([[1] * 300, [0] * 300], dtype)
    nearest: Nearest[str] = Nearest([1.0] * 300, 2, "dot")
    nearest.add(["ones", "zeros"].__getitem__, rows)
    assert nearest.found() == [("ones", 300.0), ("zeros", 0.0)]


def test_what_cannot_be_compared_is_passed_over() -> None:
    """Vectors of another length, and such with infinite numbers or none, are nobody's neighbours."""
    nearest: Nearest[str] = Nearest([1.0, 2.0], 10)
    nearest.add(["longer"].__getitem__, np.ones((1, 3)))
    nearest.add(["nan", "inf", "fine"].__getitem__, np.array([[np.nan, 1], [np.inf, 1], [1, 2]]))
    assert [key for key, _ in nearest.found()] == ["fine"]
    assert (nearest.searched, nearest.other_lengths) == (1, {3})


@pytest.mark.parametrize("vector", [[], [float("nan")], [1.0, float("inf")]])
def test_a_vector_that_is_none_is_refused(vector: list[float]) -> None:
    """Nothing is near to it."""
    with pytest.raises(BadRequest):
        Nearest(vector, 1)
