"""What entries there are, noted as they come, so that a start need not read the head of every file.

It only hastens: a note counts if the file is the one it was made of (same name, inode, size and time of writing), what
has none has its head read, and all of it may be deleted. A block is a length, a checksum, and compressed notes; what
follows a torn one is not read. Nothing is noted of what goes: its notes match no file any more.
"""

import asyncio
import contextlib
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from cache.arena import aligned
from cache.entry import Entry

from .head import FORMAT

#: With the version of heads: notes of others are not read.
_MAGIC: Final = b"voxcache notes 1, heads %d\n" % FORMAT
#: Notes a block, where there are many to write.
_BLOCK: Final = 256
#: Below this a rewrite is not worth it, in bytes.
_SMALL: Final = 256 << 10
_FRAME: Final = 12
#: Less than this would hold too little to be of use, in bytes.
_LEAST: Final = 64 << 10


class Identity(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A file as the filesystem tells it from any other: its inode, bytes of disk, and when it was written."""

    inode: int
    allocated: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        return cls(status.st_ino, status.st_blocks * 512, status.st_mtime_ns)


class Note(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One file of the entries folder, and what its head says."""

    name: str
    identity: Identity
    entry: Entry
    sums: str


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(list[Note])


class Journal:
    """Notes in ``path``, and while they are written anew in a second file: both together within ``nbytes``.

    With less than _LEAST it does without. Written by a thread of its own; what it cannot write is left out.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self._new = path.with_name(path.name + ".new")
        self.nbytes = nbytes if nbytes >= _LEAST else 0
        self._most = self.nbytes // 2
        self._thread = ThreadPoolExecutor(1, "voxcache-nvme-journal")
        self._waiting: list[Note] = []
        self._size = 0
        self._rewrite_at = _SMALL
        self._left_out = 0

    @property
    def paths(self) -> tuple[Path, Path]:
        return self.path, self._new

    @property
    def taken(self) -> int:
        """Bytes of disk, when nothing is being written anew."""
        return aligned(self._size)

    @property
    def overgrown(self) -> bool:
        """Whether it is time for ``rewrite``."""
        return self._size > self._rewrite_at or (self._left_out > _BLOCK and self.nbytes > 0)

    async def load(self) -> dict[str, Note]:
        """The last note of each name. Notes that cannot be read are as if they had not been made."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    def note(self, notes: Iterable[Note]) -> None:
        """Have these written soon."""
        self._waiting += notes
        self._thread.submit(self._append)

    def rewrite(self, notes: Callable[[], Iterable[Note]]) -> None:
        """Have ``notes()``, which is called in the thread, written in place of all before."""
        self._rewrite_at = self._most  # once is enough
        self._left_out = 0
        self._thread.submit(self._rewrite, notes)

    async def settled(self) -> None:
        """Return when all that was asked for before is written."""
        await asyncio.get_running_loop().run_in_executor(self._thread, int)

    async def close(self) -> None:
        """Write what is waiting. Harmless when repeated."""
        await asyncio.to_thread(self._thread.shutdown)

    # -- in the thread

    def _load(self) -> dict[str, Note]:
        found: dict[str, Note] = {}
        with contextlib.suppress(OSError):
            self._new.unlink(missing_ok=True)
            with self.path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    return found
                self._size = len(_MAGIC)
                while block := _read_block(file.read):
                    notes, size = block
                    found.update((note.name, note) for note in notes)
                    self._size += size
            # what follows a torn block would not be read either, if more came after it
            os.truncate(self.path, self._size)
        self._rewrite_at = max(self._size, _SMALL)
        return found

    def _append(self) -> None:
        notes, self._waiting = self._waiting, []
        if not notes or not self.nbytes:
            return
        data = b"" if self._size else _MAGIC
        data += b"".join(_blocks(notes))
        if self._size + len(data) > self._most:
            self._left_out += len(notes)
            return
        with contextlib.suppress(OSError), self.path.open("r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.write(data)
            self._size += len(data)

    def _rewrite(self, notes: Callable[[], Iterable[Note]]) -> None:
        with contextlib.suppress(OSError):
            size = len(_MAGIC)
            with self._new.open("wb") as file:
                file.write(_MAGIC)
                for block in _blocks(notes()):
                    if size + len(block) > self._most:
                        break
                    size += file.write(block)
            self._new.replace(self.path)
            self._size = size
            self._rewrite_at = max(2 * size, _SMALL)


def _blocks(notes: Iterable[Note]) -> Iterable[bytes]:
    some: list[Note] = []
    for note in notes:
        some.append(note)
        if len(some) == _BLOCK:
            yield _block(some)
            some = []
    if some:
        yield _block(some)


def _block(notes: list[Note]) -> bytes:
    data = zlib.compress(_encoder.encode(notes), 1)
    return len(data).to_bytes(4, "little") + xxhash.xxh3_64_digest(data) + data


def _read_block(read: Callable[[int], bytes]) -> tuple[list[Note], int] | None:
    """The next block's notes and its size; None at the end, or where it is torn."""
    frame = read(_FRAME)
    data = read(int.from_bytes(frame[:4], "little"))
    if len(frame) < _FRAME or xxhash.xxh3_64_digest(data) != frame[4:]:
        return None
    try:
        return _decoder.decode(zlib.decompress(data)), _FRAME + len(data)
    except (zlib.error, msgspec.MsgspecError):
        return None
