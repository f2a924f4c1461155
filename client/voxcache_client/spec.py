"""The meaning of a tensor's bytes, as the daemon tells it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


class Spec:
    """What a lease, or the ``Voxcache-Spec`` header, says of a tensor. Nothing in it can be changed by who gets it."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.dtype: np.dtype[Any] = np.dtype(told["dtype"]).newbyteorder("<")
        self.shape = tuple(map(int, told["shape"]))
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self.axes = str(told["axes"])
        self._place: tuple[tuple[float, float, float], npt.NDArray[np.float64]] | None = None
        if told["affine"] is not None:
            z, y, x = map(float, told["spacing"])
            affine: npt.NDArray[np.float64] = np.array(told["affine"], np.float64).reshape(4, 4)
            affine.flags.writeable = False
            self._place = (z, y, x), affine
        self.units = str(told.get("units") or "")

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres along z, y and x. Raises: ValueError for an embedding."""
        return self._placed()[0]

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """From voxel indices to the patient's LPS coordinates, [4, 4]. Raises: ValueError for an embedding."""
        return self._placed()[1]

    def _placed(self) -> tuple[tuple[float, float, float], npt.NDArray[np.float64]]:
        if self._place is None:
            raise ValueError("an embedding lies nowhere in a patient")
        return self._place
