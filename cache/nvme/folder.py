"""The folder: every change to it is made by one thread, the hand, in the order it was decided.

So whoever decides may count bytes as free as soon as their removal is decided: nothing decided later is created
before they are gone. Each of the hand's works is short; payloads are moved by others, into files the hand has
allocated in full.
"""

import asyncio
import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from cache.errors import ConfigError
from cache.interfaces import Extent
from cache.keys import Key, Kind

from .disk import Disk, allocated, allocated_below, opened
from .head import LEAST, SUFFIXES, BadHead, Head, OtherFormat, announced, decode
from .journal import Identity

T = TypeVar("T")

_OURS: Final = re.compile(r"[0-9a-f]{32}\.(?:safetensors|tar)")
_KINDS: Final[dict[str, Kind]] = {suffix: kind for kind, suffix in SUFFIXES.items()}


class File(NamedTuple):
    """A file that is ours by its name. ``used_at``: Unix seconds."""

    path: Path
    identity: Identity
    used_at: float


class Found(NamedTuple):
    """What is in the folder, in bytes of disk: ``files``, longest unused first, that are ours by name; ``foreign``
    among the entries; ``quarantined``, oldest first; and ``beside`` those three folders. ``filesystem``: what it can
    hold at most; 0 where it does not say."""

    files: list[File]
    foreign: dict[Path, int]
    quarantined: dict[Path, int]
    beside: int
    filesystem: int


class Folder:
    """``entries``, ``tmp`` and ``quarantine`` under one root, held by one process at a time.

    ``own`` is what the folders themselves take, ``stuck`` what could not be unlinked: bytes of disk, kept up to date
    by the hand.
    """

    def __init__(self, root: Path, disk: Disk) -> None:
        self.root = root
        self._disk = disk
        self.entries = root / "entries"
        self.tmp = root / "tmp"
        self.quarantine = root / "quarantine"
        self.own = 0
        self.stuck = 0
        self._hand = ThreadPoolExecutor(1, "voxcache-nvme-hand")
        self._lock = -1
        self._place = (-1, -1)

    @property
    def probe(self) -> Path:
        """What a look at whether the disk takes writes may create."""
        return self.tmp / "probe"

    def there(self) -> bool:
        """Whether the folder is still where it was taken: nobody has unmounted, moved or replaced it. It does I/O."""
        try:
            return self._where() == self._place
        except OSError:
            return False

    def _where(self) -> tuple[int, int]:
        found = self.entries.stat()
        return found.st_dev, found.st_ino

    def path(self, key: Key) -> Path:
        """Where the entry's file is, or would be."""
        return self.entries / f"{key.digest}{SUFFIXES[key.kind]}"

    async def take(self) -> None:
        """Make the folder ours: create it if need be, and lock it. Raises: ConfigError: another has it; OSError."""
        await self._run(self._take)

    async def look(self, apart: Iterable[Path]) -> Found:
        """Wipe the temporaries, and tell what is there.

        What lies beside the folders is counted, but for the files ``apart``. Raises: OSError.
        """
        return await self._run(self._look, frozenset(apart))

    async def create(self, extent: Extent) -> None:
        """Create and allocate, in full, the file of ``extent``, which reaches to its end. Raises: OSError."""
        await self._run(self._create, extent, self.stuck)

    async def publish(self, tmp: Path, path: Path, now: float) -> Identity:
        """Give a complete file its name, last used ``now``. Raises: OSError."""
        return await self._run(self._publish, tmp, path, now)

    def remove(self, path: Path) -> None:
        """Unlink before whatever is decided from now on."""
        self._hand.submit(self._unlink, path)

    async def move(self, path: Path, target: Path) -> int:
        """Rename, or unlink if that fails; return the bytes of disk that ``target`` takes then."""
        return await self._run(self._move, path, target)

    async def settled(self) -> None:
        """Return when all that was decided before is done."""
        await self._run(int)

    async def listing(self) -> tuple[int, dict[Path, int]]:
        """Bytes of disk of all under the root, and of each file where entries are kept, made or set aside.

        It shows what was decided before, and nothing of what is decided from now on.
        """
        return await self._run(self._listing)

    async def close(self) -> None:
        """Do what was decided and let the folder go. Harmless when repeated."""
        await asyncio.to_thread(self._hand.shutdown)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- the hand's works

    def _take(self) -> None:
        for folder in (self.root, self.entries, self.tmp, self.quarantine):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.root} is in use by another daemon") from None
        self._place = self._where()

    def _look(self, apart: frozenset[Path]) -> Found:
        for path in self.tmp.iterdir():
            path.unlink()
        files: list[File] = []
        foreign: dict[Path, int] = {}
        with os.scandir(self.entries) as scanned:
            for found in scanned:
                path = self.entries / found.name
                if _OURS.fullmatch(found.name) and found.is_file(follow_symlinks=False):
                    status = found.stat(follow_symlinks=False)
                    files.append(File(path, Identity.of(status), status.st_atime))
                else:
                    foreign[path] = allocated_below(path)
        quarantined = {path: allocated_below(path) for path in sorted(self.quarantine.iterdir())}
        ours = {self.entries, self.tmp, self.quarantine} | apart
        beside = sum(allocated_below(path) for path in self.root.iterdir() if path not in ours)
        self._measure()
        whole = os.statvfs(self.root)
        filesystem = whole.f_blocks * whole.f_frsize
        return Found(sorted(files, key=lambda file: file.used_at), foreign, quarantined, beside, filesystem)

    def _create(self, extent: Extent, stuck: int) -> None:
        if self.stuck != stuck:
            raise OSError(errno.ENOSPC, "what was to make room could not be removed")
        fd = os.open(extent.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            self._disk.allocate(fd, extent.offset + extent.nbytes)
        finally:
            os.close(fd)
            self._measure()

    def _publish(self, tmp: Path, path: Path, now: float) -> Identity:
        os.utime(tmp, (now, now))
        tmp.rename(path)
        self._measure()
        return Identity.of(path.lstat())

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            self.stuck += allocated_below(path)

    def _move(self, path: Path, target: Path) -> int:
        try:
            path.rename(target)
        except OSError:
            self._unlink(path)
            return 0
        return allocated(target)

    def _listing(self) -> tuple[int, dict[Path, int]]:
        files = (path for folder in (self.entries, self.tmp, self.quarantine) for path in folder.iterdir())
        return allocated_below(self.root), {path: allocated(path) for path in files}

    def _measure(self) -> None:
        self.own = sum(map(allocated, (self.root, self.entries, self.tmp, self.quarantine)))

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._hand, work, *args)


def read_head(path: Path) -> Head:
    """The head of an entry's file. Raises: BadHead, OtherFormat, OSError."""
    kind = _KINDS[path.suffix]
    with os.fdopen(opened(path), "rb", buffering=0) as file:
        start = file.read(LEAST)
        size = announced(kind, start)
        there = os.fstat(file.fileno()).st_size
        if size > there:
            raise BadHead(f"a head of {size} bytes in a file of {there}")
        start += file.read(max(size - len(start), 0))
    head = decode(kind, start)
    if size + head.entry.nbytes != there:
        raise BadHead(f"the file has {there} bytes, its head says {size + head.entry.nbytes}")
    if head.entry.key.digest != path.stem:
        raise BadHead("the file is another entry's")
    return head


def examine(path: Path) -> Head | BadHead | OtherFormat:
    """``read_head`` whose outcome is never an exception: a file that cannot be read is a bad one."""
    try:
        return read_head(path)
    except (BadHead, OtherFormat) as outcome:
        return outcome
    except OSError as error:
        return BadHead(str(error))
