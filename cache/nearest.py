"""The nearest of many vectors, found by looking at every one: exact, and the same however the vectors come."""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import BadRequest

K = TypeVar("K")

Metric = Literal["cosine", "dot", "l2"]
_Rows = npt.NDArray[Any]  # float64


def _cosine(rows: _Rows, vector: _Rows) -> _Rows:
    lengths = np.sqrt((rows * rows).sum(axis=1)) * np.sqrt((vector * vector).sum())
    # a vector of zeros has no direction: it is as far from all as what is at a right angle
    cosines: _Rows = np.divide(_dot(rows, vector), lengths, out=np.zeros(len(rows)), where=lengths != 0)
    return cosines


def _dot(rows: _Rows, vector: _Rows) -> _Rows:
    # row by row, not by BLAS: that adds up in an order that depends on a row's place, so that equals would not tie
    products: _Rows = (rows * vector).sum(axis=1)
    return products


def _l2(rows: _Rows, vector: _Rows) -> _Rows:
    apart = rows - vector
    distances: _Rows = np.sqrt((apart * apart).sum(axis=1))
    return distances


#: The score, and whether more of it is nearer.
_METRICS: Final[dict[Metric, tuple[Callable[[_Rows, _Rows], _Rows], bool]]] = {
    "cosine": (_cosine, True),
    "dot": (_dot, True),
    "l2": (_l2, False),
}


class Nearest(Generic[K]):
    """The ``k`` nearest to ``vector`` of all that is added. Of equals, those with the least keys.

    Scores are the cosine of the angle between two vectors (1: same direction), their dot product, or the Euclidean
    distance ("l2"); all in float64. Vectors of another length than ``vector``, or that are not finite, are passed over.

    Raises:
        BadRequest: ``vector`` is empty or not finite.
    """

    def __init__(self, vector: Sequence[float] | npt.NDArray[Any], k: int, metric: Metric = "cosine") -> None:
        self._vector = np.asarray(vector, np.float64).ravel()
        if not self._vector.size or not np.isfinite(self._vector).all():
            raise BadRequest("a vector is one number or more, all of them finite")
        self._k = k
        self._score, self._most = _METRICS[metric]
        self._best: list[tuple[float, K]] = []
        self.searched = 0
        self.other_lengths: set[int] = set()

    def add(self, key: Callable[[int], K], rows: npt.NDArray[Any]) -> None:
        """Consider ``rows`` [m, n], one vector each; ``key`` names the row of a number, if that comes to matter."""
        if rows.shape[1] != self._vector.size:
            self.other_lengths.add(rows.shape[1])
            return
        wide = rows.astype(np.float64)
        with np.errstate(all="ignore"):  # what becomes infinite or no number is passed over
            ranks = self._score(wide, self._vector) * (-1.0 if self._most else 1.0)
        seen = np.flatnonzero(np.isfinite(ranks))
        self.searched += len(seen)
        if len(self._best) == self._k:
            seen = seen[ranks[seen] <= self._best[-1][0]]
        if len(seen) > self._k:  # all up to the k-th, and its equals
            worst = np.partition(ranks[seen], self._k - 1)[self._k - 1]
            seen = seen[ranks[seen] <= worst]
        fresh = [(float(ranks[at]), key(at)) for at in seen.tolist()]
        self._best = heapq.nsmallest(self._k, [*self._best, *fresh])

    def found(self) -> list[tuple[K, float]]:
        """The nearest so far with their scores, the nearest first."""
        return [(key, -rank + 0.0 if self._most else rank) for rank, key in self._best]
