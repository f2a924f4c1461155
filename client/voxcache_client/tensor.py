"""What a client hands out: an array, and what its values and axes mean."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .keeper import Lease
from .spec import Spec


class Tensor:
    """A tensor and its place in the patient. Use it in a ``with`` statement, or let its last view be collected.

    ``array``    read-only, C-contiguous; where ``local``, a view of the daemon's memory
    ``axes``     one letter an axis: z, y, x (slices, rows, columns), c (channels)
    ``spacing``  millimetres along z, y and x
    ``affine``   float64 [4, 4], read-only: ``affine @ (z, y, x, 1)`` is the centre of voxel [z, y, x] in the patient's
                 LPS coordinates, in millimetres (PS3.3 §C.7.6.2.1.1)
                 An embedding has no axes; to ask for its spacing or affine raises ValueError.
    ``units``    what a value measures ("HU"), or ""
    ``tier``     what answered: "ram", "nvme", "origin", …
    ``lease``    the lease's name, or None for a copy of one's own
    """

    def __init__(
        self, array: npt.NDArray[Any], spec: Spec, tier: str, lease: Lease | None, drop: Callable[[], None]
    ) -> None:
        self._array: npt.NDArray[Any] | None = array
        self._lease = lease
        self._drop = drop
        self.axes = spec.axes
        self._spec = spec
        self.units = spec.units
        self.tier = tier

    @property
    def array(self) -> npt.NDArray[Any]:
        """Raises ValueError once the tensor is closed."""
        if self._array is None:
            raise ValueError("the tensor is closed")
        return self._array

    @property
    def spacing(self) -> tuple[float, float, float]:
        return self._spec.spacing

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        return self._spec.affine

    @property
    def lease(self) -> str | None:
        return None if self._lease is None else self._lease.name

    @property
    def local(self) -> bool:
        """Whether the array is the daemon's memory, not a copy."""
        return self._lease is not None

    @property
    def held(self) -> bool:
        """Whether the bytes are certain not to change.

        False once closed, and after the lease was lost: it could not be renewed (the daemon is gone, or this process
        was stopped for longer than the lease's time), or the connection has ended that it was granted on.
        """
        return self._array is not None and (self._lease is None or self._lease.valid)

    def close(self) -> None:
        """Give the lease back now. Views taken before stay readable, but what they show may change."""
        self._array = None
        self._drop()

    def __enter__(self) -> "Tensor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        what = "closed" if self._array is None else f"{self._array.dtype} {list(self._array.shape)}"
        return f"<Tensor {what} {self.axes} from {self.tier}{', local' if self.local else ''}>"
