"""The daemon's arena as this process sees it: one read-only mapping, and arrays that keep their lease alive."""

import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_FOLDER: Final = Path("/dev/shm")


class Arena:
    """A whole shared-memory object, mapped read-only. It is unmapped when nothing refers to it any more."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self._mapping = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._address = np.frombuffer(self._mapping, np.uint8).ctypes.data
        self.nbytes = nbytes

    def array(
        self, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], unused: Callable[[], object]
    ) -> npt.NDArray[Any]:
        """The tensor at ``offset``, read-only. ``unused`` is called once it and every view of it are gone."""
        return np.asarray(_Extent(self, self._address + offset, dtype, shape, unused))


class _Extent:
    """What NumPy takes for the owner of an array's memory.

    NumPy shortens chains of views to (view, owner), so only the owner sees the last view go. A memoryview would not
    do: NumPy makes one of its own from it.
    """

    def __init__(
        self, arena: Arena, address: int, dtype: np.dtype[Any], shape: tuple[int, ...], unused: Callable[[], object]
    ) -> None:
        self._arena = arena
        self._unused = unused
        self.__array_interface__ = {"version": 3, "data": (address, True), "typestr": dtype.str, "shape": shape}

    def __del__(self) -> None:
        self._unused()


_mapped: "weakref.WeakValueDictionary[str, Arena]" = weakref.WeakValueDictionary()


def open_arena(name: str) -> Arena | None:
    """The arena called ``name``, mapped once a process; None where it cannot be seen (another node, no access).

    A daemon takes a new random name at every start, so a name never stands for two arenas.
    """
    arena = _mapped.get(name)
    if arena is not None:
        return arena
    file = name.lstrip("/")
    if not file or "/" in file:
        return None
    try:
        descriptor = os.open(_FOLDER / file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _mapped.setdefault(name, Arena(descriptor, os.fstat(descriptor).st_size))
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    finally:
        os.close(descriptor)
