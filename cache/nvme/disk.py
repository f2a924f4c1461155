"""Moving bytes between memory and files: past the page cache where memory and filesystem allow it."""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cache.arena import ALIGN


class Disk:
    """What is asked of a file's bytes. ``direct``: use O_DIRECT for page-aligned memory, until the filesystem refuses.

    Direct reads reach what the device can give and leave no second copy of the payload in the page cache.
    """

    def __init__(self, *, direct: bool) -> None:
        self.direct = direct

    def read(self, fd: int, out: memoryview, offset: int) -> None:
        """Fill ``out``. Raises: OSError, EOFError if the file ends before."""
        self._move(os.preadv, fd, out, offset, self.direct)

    def read_cached(self, fd: int, out: memoryview, offset: int) -> None:
        """Fill ``out`` with what others have just written through a mapping. Raises: OSError, EOFError."""
        self._move(os.preadv, fd, out, offset, False)

    def write(self, fd: int, data: memoryview, offset: int) -> None:
        """Write all of ``data``. Raises: OSError."""
        self._move(os.pwritev, fd, data, offset, self.direct)

    def allocate(self, fd: int, nbytes: int) -> None:
        """Take all the room of a file that is to have ``nbytes``. Raises: OSError."""
        os.posix_fallocate(fd, 0, nbytes)

    def sync(self, fd: int) -> None:
        """Have what was written outlive a power cut. Raises: OSError."""
        os.fdatasync(fd)

    def _move(
        self, step: Callable[[int, list[memoryview], int], int], fd: int, buffer: memoryview, offset: int, direct: bool
    ) -> None:
        done = 0
        whole = len(buffer) // ALIGN * ALIGN
        if direct and whole and offset % ALIGN == 0 and _address(buffer) % ALIGN == 0:
            try:
                with _unbuffered(fd):
                    done = _until(step, fd, buffer[:whole], offset, ALIGN)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
        # what is left is the last part of a page, or all of it where direct I/O is not to be had
        done += _until(step, fd, buffer[done:], offset + done, 1)
        if done < len(buffer):
            raise EOFError(f"the file ends at {offset + done}")


def opened(path: Path) -> int:
    """A descriptor to read ``path`` by, without a trace in its access time where we may. Raises: OSError."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOATIME)
    except PermissionError:  # another user's
        return os.open(path, os.O_RDONLY)


def allocated(path: Path) -> int:
    """The bytes of disk that ``path`` itself takes, as ``du`` counts them."""
    return path.lstat().st_blocks * 512


def allocated_below(path: Path) -> int:
    """The bytes of disk that ``path`` and everything under it take. What vanishes meanwhile takes none."""
    try:
        below = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
        return allocated(path) + sum(allocated_below(child) for child in below)
    except FileNotFoundError:
        return 0


def page_aligned(nbytes: int) -> memoryview:
    """Fresh memory for ``nbytes``, fit for direct I/O."""
    return memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]


def _address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


@contextlib.contextmanager
def _unbuffered(fd: int) -> Iterator[None]:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _until(
    step: Callable[[int, list[memoryview], int], int], fd: int, buffer: memoryview, offset: int, unit: int
) -> int:
    """Repeat ``step`` until the buffer is done, or it moved nothing or a broken unit; return the bytes moved."""
    done = 0
    while done < len(buffer):
        count = step(fd, [buffer[done:]], offset + done)
        done += count
        if count == 0 or count % unit:
            break
    return done
