"""The arena: one shared-memory object, allocated in full at start, that never grows, shrinks or moves.

Truncating memory another process has mapped kills that process, and a name used twice gives it another's bytes: so
the object is complete before it has a name, and the name is random at every start.
"""

import bisect
import contextlib
import ctypes
import errno
import fcntl
import grp
import math
import mmap
import os
import re
import resource
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from .errors import ConfigError
from .interfaces import Extent

#: Where Linux keeps POSIX shared memory: what shm_open and Triton's shm_key name lies here.
SHARED_MEMORY: Final = Path("/dev/shm")

#: What Linux does about huge pages in shared memory.
HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

#: Have the pages there as if written to (Linux 5.14).
_MADV_POPULATE_WRITE: Final = 23

#: Extents start at multiples of this many bytes: a page, and what direct I/O asks for.
ALIGN: Final = 4096

#: Extents looked at for room, beyond which the first of them go even where they do not help, up to a part of the bytes
#: wanted: small ones between others that stay would be looked at again and again, and be worth less each time.
LOOK: Final = 64
SPARE: Final = 1 / 16

_NAME = re.compile(r"voxcache-[0-9a-f]{32}")


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages."""
    return -(-nbytes // ALIGN) * ALIGN


class Arena:
    """A mapped POSIX shared-memory object of ``nbytes`` bytes, called ``name`` (without a slash), at ``path``."""

    def __init__(self, path: Path, fd: int, mapping: mmap.mmap) -> None:
        self.name = path.name
        self.path = str(path)
        self.nbytes = len(mapping)
        self._fd = fd
        self._map = mapping
        self._view = memoryview(mapping)

    @classmethod
    def create(
        cls,
        nbytes: int,
        *,
        group: str | None = None,
        huge_pages: bool = False,
        lock: bool = False,
        directory: Path = SHARED_MEMORY,
    ) -> "Arena":
        """Allocate and map an arena, readable and writable by this user and ``group`` (mode 0660).

        With ``huge_pages`` of whole huge pages where the kernel finds some, and with ``lock`` never swapped out.
        Arenas whose daemon died without unlinking them are removed first.

        Raises:
            ConfigError: there is not that much shared memory, no such group, or the system refuses huge pages or to
                lock so much.
        """
        if nbytes <= 0 or nbytes % ALIGN:
            raise ConfigError(f"an arena of {nbytes} bytes cannot be: write a multiple of {ALIGN}")
        _remove_dead(directory)
        path = directory / f"voxcache-{secrets.token_hex(16)}"
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o660)
        try:
            # the lock lasts as long as this process: how a later start tells a dead daemon's arena from a live one's
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.fchmod(fd, 0o660)
            if group is not None:
                _give_to_group(fd, group)
            if huge_pages:
                _ask_for_huge_pages(fd, nbytes)
            _allocate(fd, nbytes, directory)
            mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            if lock:
                _lock(mapping)
            # only with a src_dir_fd (unused for an absolute path) does Python follow the link to the unnamed file
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, mapping)

    def __repr__(self) -> str:
        # whoever knows the name can write to the memory: it stays out of logs
        return f"<Arena of {self.nbytes} bytes>"

    def view(self, extent: Extent) -> memoryview:
        """The bytes of ``extent``, writable. Raises: ValueError if it is not within this arena."""
        if extent.path != self.path or extent.offset < 0 or extent.offset + extent.nbytes > self.nbytes:
            raise ValueError("the extent is not within this arena")
        return self._view[extent.offset : extent.offset + extent.nbytes]

    def close(self) -> None:
        """Unlink the object; who has mapped it keeps it. Views given out stay valid until they are dropped."""
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).unlink()
        # a view that lives on holds the mapping, which then goes with it
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _give_to_group(fd: int, group: str) -> None:
    try:
        os.fchown(fd, -1, grp.getgrnam(group).gr_gid)
    except KeyError:
        raise ConfigError(f"there is no group {group!r} to share the arena with") from None
    except PermissionError:
        raise ConfigError(f"this user may not share the arena with group {group!r}: make it a member") from None


def _ask_for_huge_pages(fd: int, nbytes: int) -> None:
    """Touch all of it through a mapping that wants huge pages (Linux, Documentation/admin-guide/mm/transhuge.rst)."""
    try:
        modes = HUGE_PAGES.read_text().split()
    except OSError:
        modes = []
    if not {"[advise]", "[always]", "[within_size]", "[force]"}.intersection(modes):
        raise ConfigError(f"the system gives shared memory no huge pages: write 'advise' to {HUGE_PAGES}")
    os.ftruncate(fd, nbytes)
    with mmap.mmap(fd, nbytes) as mapping:
        mapping.madvise(mmap.MADV_HUGEPAGE)
        # a store to a page that is not there could end the process, a call that cannot make it does not
        with contextlib.suppress(OSError):
            mapping.madvise(_MADV_POPULATE_WRITE)


def _lock(mapping: mmap.mmap) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.c_char.from_buffer(mapping)
    try:
        if libc.mlock(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapping))):
            reason = os.strerror(ctypes.get_errno())
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            raise ConfigError(
                f"the arena's {len(mapping)} bytes cannot be locked in memory ({reason}): raise this process's limit "
                f"of {limit} (systemd: LimitMEMLOCK=infinity; Docker: --ulimit memlock=-1)"
            )
    finally:
        del first  # while it lives, the mapping cannot be closed


def _allocate(fd: int, nbytes: int, directory: Path) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        found = os.statvfs(directory)
        free = found.f_bavail * found.f_frsize
        raise ConfigError(
            f"the arena needs {nbytes} bytes of shared memory and {directory} has {free} free: "
            "lower the RAM budget or enlarge it (Docker: --shm-size; Kubernetes: an emptyDir with medium Memory)"
        ) from error


def _remove_dead(directory: Path) -> None:
    """Unlink the arenas that no living process holds locked."""
    for path in directory.glob("voxcache-*"):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone already
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except OSError:  # it lives, or is not ours to remove
            continue
        finally:
            os.close(fd)


class Extents:
    """Which parts of ``[0, nbytes)`` are taken: best fit, whole pages, holes merged as they arise. No I/O.

    ``within`` are the ranges of offsets that may be used, the preferred first; all of it unless given.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0 or nbytes % ALIGN:
            raise ValueError(f"the size must be a multiple of {ALIGN}")
        self.nbytes = nbytes
        self.free_bytes = nbytes
        self._taken: dict[int, int] = {}
        self._holes: list[tuple[int, int]] = []  # size and start, the smallest first
        self._ends: dict[int, int] = {}  # of holes, by start
        self._starts: dict[int, int] = {}  # of holes, by end
        self._open(0, nbytes)

    @property
    def largest_hole(self) -> int:
        return self._holes[-1][0] if self._holes else 0

    def allocate(self, nbytes: int, within: Sequence[range] = ()) -> int | None:
        """Take ``nbytes`` (rounded up to pages, at least one) and return their offset; None if no hole is that big."""
        wanted = max(aligned(nbytes), ALIGN)
        for part in within or (range(self.nbytes),):
            found = self._fitting(wanted, part)
            if found is not None:
                start, end = found
                offset = max(start, part.start)
                self._shut(start, end)
                self._open(start, offset)
                self._open(offset + wanted, end)
                self._taken[offset] = wanted
                self.free_bytes -= wanted
                return offset
        return None

    def free(self, offset: int) -> None:
        """Give back what ``allocate`` returned. Raises: ValueError if nothing taken starts at ``offset``."""
        if offset not in self._taken:
            raise ValueError(f"nothing taken starts at {offset}")
        size = self._taken.pop(offset)
        self.free_bytes += size
        start, end = offset, offset + size
        if end in self._ends:
            after = self._ends[end]
            self._shut(end, after)
            end = after
        if start in self._starts:
            before = self._starts[start]
            self._shut(before, start)
            start = before
        self._open(start, end)

    def to_free(self, nbytes: int, expendable: Iterable[int], within: Sequence[range] = ()) -> list[int] | None:
        """Which taken offsets to free so that ``nbytes`` fit, given those that may go, the first to go first.

        Once enough are known for a hole to open, as many again are looked at, and of all windows within those and the
        holes the one is taken whose extents are worth least together. What one is worth is one over how many are worth
        as much or more, as the chance of a use falls with the time since the last. Beyond ``LOOK`` some of the
        first go too. None: even without all of them there is no hole that big. Nothing is changed.
        """
        wanted = max(aligned(nbytes), ALIGN)
        parts = within or (range(self.nbytes),)
        if any(self._fitting(wanted, part) is not None for part in parts):
            return []
        ranks: dict[int, int] = {}
        ends: dict[int, int] = {}  # of runs of expendable extents and the holes about them, by start
        starts: dict[int, int] = {}  # of the same, by end
        enough = 0
        for offset in expendable:
            ranks[offset] = len(ranks)
            start, end = offset, offset + self._taken[offset]
            # a run has the holes beside it, so that a neighbour is a run or a hole, not both
            end = ends.pop(end) if end in ends else self._ends.get(end, end)
            start = starts.pop(start) if start in starts else self._starts.get(start, start)
            ends[start], starts[end] = end, start
            if not enough and any(_overlap(start, end, part) >= wanted for part in parts):
                enough = 2 * len(ranks)
            if len(ranks) == enough:
                break
        if not enough:
            return None
        window = self._least(wanted, ranks, ends, parts)
        if len(ranks) > LOOK:
            spare = wanted * SPARE
            for offset in list(ranks)[: len(ranks) // 4]:
                if self._taken[offset] <= spare and offset not in window:
                    spare -= self._taken[offset]
                    window.append(offset)
        return window

    def _least(self, wanted: int, ranks: dict[int, int], runs: dict[int, int], parts: Sequence[range]) -> list[int]:
        """The extents within the window of ``wanted`` bytes that is worth least, the first to go first."""
        ordered = sorted(ranks)
        worth = {offset: 1 / (len(self._taken) - rank) for offset, rank in ranks.items()}
        best: tuple[float, list[int]] = (math.inf, [])
        for start, end in runs.items():
            inside = ordered[bisect.bisect_left(ordered, start) : bisect.bisect_left(ordered, end)]
            for part in parts:
                low, high = max(start, part.start), min(end, part.stop)
                first = last = 0
                total = 0.0
                # worth only falls where an extent's end comes to be outside: no other window can be the least
                for at in (low, *(offset + self._taken[offset] for offset in inside)):
                    if at < low or at + wanted > high:
                        continue
                    while last < len(inside) and inside[last] < at + wanted:
                        total += worth[inside[last]]
                        last += 1
                    while first < last and inside[first] + self._taken[inside[first]] <= at:
                        total -= worth[inside[first]]
                        first += 1
                    if total < best[0]:
                        best = total, inside[first:last]
        return sorted(best[1], key=ranks.__getitem__)

    def check(self) -> list[str]:
        """What is wrong: overlaps, gaps, holes that should be one. Nothing, unless there is a bug."""
        problems = []
        holes = [(start, size, "free") for size, start in self._holes]
        pieces = sorted([(offset, size, "taken") for offset, size in self._taken.items()] + holes)
        end, last = 0, ""
        for offset, size, state in pieces:
            if offset != end:
                problems.append(f"{'overlap' if offset < end else 'gap'} at {offset}")
            if offset % ALIGN or size % ALIGN or size <= 0:
                problems.append(f"{offset} or its size {size} is not in whole pages")
            if state == last == "free":
                problems.append(f"two holes meet at {offset}")
            end, last = offset + size, state
        if end != self.nbytes:
            problems.append(f"the last piece ends at {end}")
        if self.free_bytes != sum(size for _, size, _ in holes):
            problems.append(f"{self.free_bytes} bytes are counted as free")
        if {start: start + size for start, size, _ in holes} != self._ends:
            problems.append("holes are not where they are looked for")
        return problems

    def _fitting(self, wanted: int, part: range) -> tuple[int, int] | None:
        """The smallest hole with ``wanted`` bytes in ``part``: its start and end."""
        for at in range(bisect.bisect_left(self._holes, (wanted, 0)), len(self._holes)):
            size, start = self._holes[at]
            if _overlap(start, start + size, part) >= wanted:
                return start, start + size
        return None

    def _open(self, start: int, end: int) -> None:
        if start < end:
            bisect.insort(self._holes, (end - start, start))
            self._ends[start], self._starts[end] = end, start

    def _shut(self, start: int, end: int) -> None:
        del self._holes[bisect.bisect_left(self._holes, (end - start, start))]
        del self._ends[start], self._starts[end]


def _overlap(start: int, end: int, part: range) -> int:
    return min(end, part.stop) - max(start, part.start)
