"""The directory origin: a tree of files as a system of record, for archives on a mount and for trying things out."""

import asyncio
import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import msgspec

from cache.errors import OriginChanged, OriginDenied, OriginDown, OriginError
from cache.interfaces import NullObserver, Observer
from cache.keys import SourceObject
from cache.urgency import Slots

#: Bytes read between two looks at whether anybody still wants them.
_PIECE: Final = 4 << 20
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a FIFO among the files must not hold a thread for ever
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_Result = TypeVar("_Result")


class DirectorySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A directory as origin.

    path: the root. Keys are the files' POSIX paths relative to it.
    threads: files read, and listings made, at the same time.
    """

    path: str
    threads: int = 8


class DirectoryOrigin:
    """Files under one root; implements ``Origin``.

    A file's ETag is made of its mtime, size and inode, so both replacing and rewriting it change the tag. Symbolic
    links below the root are not followed: nothing outside it can be read. Names that are not UTF-8 have no key.
    """

    name = "directory"

    def __init__(self, settings: DirectorySettings, observer: Observer | None = None) -> None:
        self._root = settings.path
        self._observer = observer or NullObserver()
        # threads of our own: a mount that stalls must not take those that others wait for
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="origin")
        self._slots = Slots(settings.threads)

    async def list(self, prefix: str) -> Sequence[SourceObject]:
        """All files whose path starts with ``prefix``, sorted by key. Raises: OriginDenied, OriginDown."""
        return [source for source, _ in await self.dated(prefix)]

    async def dated(self, prefix: str) -> Sequence[tuple[SourceObject, float]]:
        """As ``list``, each with when it was last written (Unix seconds). Raises: OriginDenied, OriginDown."""
        return await self._run("list", lambda stop: self._list(prefix, stop))

    async def read(self, key: str, limit: int | None = None) -> bytes | None:
        """The first ``limit`` bytes of a file, or None if there is none. Raises: OriginDenied, OriginDown."""
        data = await self._run("read", lambda _: self._read(key, limit))
        self._observer.count("origin_bytes", (), len(data or b""))
        return data

    async def fetch(self, source: SourceObject, into: memoryview) -> None:
        """Read the file straight into ``into``. Raises: OriginChanged, OriginDenied, OriginDown."""
        await self._run("fetch", lambda stop: self._fetch(source, into, stop))
        self._observer.count("origin_bytes", (), source.size)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, kind: str, work: Callable[[threading.Event], _Result]) -> _Result:
        """``work`` in a thread, to its end: the memory it writes to is the caller's again once this is over."""
        try:
            result = await self._in_thread(work)
        except OriginError as error:
            self._observer.count("origin_requests", (kind, error.code))
            raise
        self._observer.count("origin_requests", (kind, "ok"))
        return result

    async def _in_thread(self, work: Callable[[threading.Event], _Result]) -> _Result:
        stop = threading.Event()
        async with self._slots.slot():
            future = asyncio.get_running_loop().run_in_executor(self._threads, work, stop)
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                stop.set()
                while not future.done():
                    # cancelled again while it waits: still not before the thread has let go
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([future])
                future.exception()
                raise

    # ------------------------------------------------------------------ in the threads

    def _list(self, prefix: str, stop: threading.Event) -> Sequence[tuple[SourceObject, float]]:
        folder, slash, start = prefix.rpartition("/")
        found: list[tuple[SourceObject, float]] = []
        with self._mapped(f"listing {prefix!r}"), self._opened(folder.split("/") if slash else [], _FOLDER) as fd:
            if fd is not None:
                self._walk(fd, folder + slash, start, found, stop)
        return sorted(found)

    def _walk(
        self, fd: int, path: str, start: str, found: MutableSequence[tuple[SourceObject, float]], stop: threading.Event
    ) -> None:
        with os.scandir(fd) as listing:
            entries = [entry for entry in listing if entry.name.startswith(start) and _is_text(entry.name)]
        for entry in entries:
            if stop.is_set():
                return
            # what vanishes during a listing was never in it
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if entry.is_dir(follow_symlinks=False):
                    inner = os.open(entry.name, _FOLDER, dir_fd=fd)
                    try:
                        self._walk(inner, f"{path}{entry.name}/", "", found, stop)
                    finally:
                        os.close(inner)
                elif entry.is_file(follow_symlinks=False):
                    status = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
                    found.append((SourceObject(path + entry.name, status.st_size, _etag(status)), status.st_mtime))

    def _read(self, key: str, limit: int | None) -> bytes | None:
        with self._mapped(f"reading {key!r}"), self._opened(key.split("/"), _FILE) as fd:
            if fd is None or not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            with open(fd, "rb", buffering=0, closefd=False) as file:
                wanted = os.fstat(fd).st_size if limit is None else limit
                pieces = bytearray()
                while len(pieces) < wanted and (piece := file.read(min(wanted - len(pieces), _PIECE))):
                    pieces += piece
                return bytes(pieces)

    def _fetch(self, source: SourceObject, into: memoryview, stop: threading.Event) -> None:
        changed = OriginChanged(f"{source.key!r} is not the file that was listed any more; list the series again")
        with self._mapped(f"reading {source.key!r}"), self._opened(source.key.split("/"), _FILE) as fd:
            if fd is None:
                raise changed
            before = os.fstat(fd)
            if (before.st_size, _etag(before)) != (len(into), source.etag):
                raise changed
            at = 0
            while at < len(into) and not stop.is_set():
                count = os.preadv(fd, [into[at : at + _PIECE]], at)
                if count == 0:
                    raise changed
                at += count
            if _etag(os.fstat(fd)) != source.etag:
                raise changed

    @contextlib.contextmanager
    def _opened(self, parts: Sequence[str], flags: int) -> Iterator[int | None]:
        """A descriptor of what lies at ``parts`` below the root, reached without following a link; None if nothing."""
        try:
            fd: int | None = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            # a mount that is missing must not look like an empty archive
            raise OriginDown(f"the origin's directory {self._root!r} is not there") from None
        for number, part in enumerate(parts, 1):
            fd = _step(fd, part, flags if number == len(parts) else _FOLDER)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    @contextlib.contextmanager
    def _mapped(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OriginError:
            raise
        except PermissionError:
            raise OriginDenied(f"{doing}: the daemon may not read it") from None
        except OSError as error:
            raise OriginDown(f"{doing}: {error.strerror}") from None


def _step(folder: int | None, name: str, flags: int) -> int | None:
    """Open ``name`` within ``folder``, which this closes; None if there is no such thing, or only a link."""
    if folder is None:
        return None
    try:
        if name in ("", ".", "..") or "\0" in name or not _is_text(name):
            return None
        return os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise
    finally:
        os.close(folder)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"
