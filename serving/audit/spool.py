"""The files of records: appended to, synced, rotated, bounded, and gone on with after a crash.

A file is named after its first record. One that is full is closed for good, and may be taken away; the last one is the
daemon's. What was written last is noted elsewhere too, signed: that tells when records are missing from the end.
"""

import contextlib
import hashlib
import hmac
import os
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Final

import msgspec

from cache.errors import ConfigError
from serving import durable

from .record import NOTHING, STOP, Details, Said, digest, read, record

_PATTERN: Final = "audit-*.jsonl"
_NUMBER_WIDTH: Final = 12


class AuditSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is recorded of who did what.

    enabled: whether anything is.
    path: directory of the records; unless it is set: audit in state.path.
    budget: bytes that records may take there until somebody takes files away; past that nothing is recorded but how
        much could not be.
    file_bytes: a file that has so many is closed, and may be taken away.
    flush_s: seconds in which acts are gathered; so much may be missing after a crash. Acts that are alike become one
        record with their number.
    waiting: acts that may wait in memory while the disk is full or does not write; past that they are only counted.
    head_s: seconds between two notes of what was recorded last, in the log and in audit.head in state.path.
    user_header: the header (over gRPC: metadata) in which a proxy in front tells who asks; "" for none. It is believed,
        so set it only if nobody gets past the proxy.
    """

    enabled: bool = True
    path: str = ""
    budget: Annotated[int, msgspec.Meta(ge=8 << 20)] = 1 << 30
    file_bytes: Annotated[int, msgspec.Meta(ge=1 << 16)] = 64 << 20
    flush_s: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    waiting: Annotated[int, msgspec.Meta(ge=1)] = 1 << 16
    head_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    user_header: str = ""

    def folder(self, state: Path) -> Path:
        return Path(self.path) if self.path else state / "audit"


class State(IntEnum):
    """Whether acts are recorded."""

    RECORDING = 0
    FULL = 1  # the budget, or the disk, has no room
    FAILING = 2  # the disk does not write


class Full(Exception):
    """The records have all the bytes that they may have."""


class Head(msgspec.Struct, frozen=True):
    """What was recorded last. ``seal`` is a keyed hash over the rest."""

    record: int
    digest: str
    seal: str = ""

    def sealed(self, key: bytes) -> "Head":
        told = f"{self.record}:{self.digest}".encode()
        return Head(self.record, self.digest, hmac.new(_head_key(key), told, hashlib.sha256).hexdigest())

    def genuine(self, key: bytes) -> bool:
        return hmac.compare_digest(self.seal, self.sealed(key).seal)


class Batch(msgspec.Struct, frozen=True):
    """Records that go to disk together: their lines, and what is last then."""

    data: bytes
    head: Head


class Before(msgspec.Struct, frozen=True):
    """How the records of before end: what is left of a line that a crash tore, and what is missing.

    ``unclean``: the daemon did not end by itself, so what it had not written is missing. ``missing``: the numbers of
    records that were there once, as the head tells.
    """

    torn: bytes = b""
    unclean: bool = False
    missing: str = ""

    @property
    def details(self) -> Details:
        torn = digest(self.torn) if self.torn else ""
        told = (("torn", torn), ("unclean", "yes" if self.unclean else ""), ("missing", self.missing))
        return tuple((name, value) for name, value in told if value)


def files(folder: Path) -> list[Path]:
    """The files of records in a folder, oldest first."""
    return sorted(folder.glob(_PATTERN))


def first_record(path: Path) -> int:
    """The number of a file's first record, by its name; 0 if its name is another's."""
    number = path.name.removeprefix("audit-").removesuffix(".jsonl")
    return int(number) if number.isdecimal() else 0


def read_head(path: Path) -> Head | None:
    """The head as it was noted last, whether it is genuine or not; None if there is none that can be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError, msgspec.MsgspecError):
        return msgspec.json.decode(path.read_bytes(), type=Head)
    return None


class Spool:
    """Appends records. One at a time, by one thread."""

    def __init__(self, settings: AuditSettings, folder: Path, head: Path, key: bytes, node: str) -> None:
        """``head``: the file of the head; ``key`` seals it."""
        self._settings = settings
        self._folder = folder
        self._head_path = head
        self._key = key
        self._node = node
        self._file = -1
        self._size = 0  # of the file, as far as it is certain
        self.filled = 0.0  # the part of the budget that was used when it was looked at last
        self.head = Head(0, NOTHING)

    def open(self) -> Before:
        """Go on where the last record ends; how it ends. Raises: ConfigError."""
        try:
            self._folder.mkdir(mode=0o750, parents=True, exist_ok=True)
            noted = read_head(self._head_path)
            if noted is not None and not noted.genuine(self._key):
                noted = None
            # one that was begun, and has nothing yet, will be begun again
            found = [path for path in files(self._folder) if path.stat().st_size]
            if not found:
                if noted is None:
                    return Before()
                # whoever took the files away took the last one along: the chain goes on all the same
                self.head = noted
                return Before()
            return self._go_on(found[-1], noted)
        except OSError as error:
            raise ConfigError(f"audit records cannot be kept in {self._folder}: {error.strerror}") from error

    def batch(self, acts: Sequence[Said]) -> Batch:
        """The records of ``acts``, to be committed before others are made."""
        number, before = self.head.record, self.head.digest
        lines = []
        for number, said in enumerate(acts, number + 1):  # noqa: B020 - it goes on from there
            line = record(number, before, said, self._node)
            before = digest(line)
            lines.append(line + b"\n")
        return Batch(b"".join(lines), Head(number, before))

    def commit(self, batch: Batch) -> None:
        """Have them on disk. If this fails, the same batch may be tried again.

        Raises: Full, OSError.
        """
        nbytes = self.nbytes() + len(batch.data)
        self.filled = min(nbytes / self._settings.budget, 1.0)
        if nbytes > self._settings.budget:
            raise Full
        taken_away = self._file >= 0 and not os.fstat(self._file).st_nlink
        if self._file < 0 or taken_away or self._size >= self._settings.file_bytes:
            self._begin(self.head.record + 1)
        view = memoryview(batch.data)
        at = self._size
        while view:
            # always at the same place: what a failed try has left is written over
            written = os.pwrite(self._file, view, at)
            at, view = at + written, view[written:]
        os.fdatasync(self._file)
        self._size = at
        self.head = batch.head

    def note_head(self) -> Head:
        """Note what was recorded last where a change of the files does not reach. Raises: OSError."""
        head = self.head.sealed(self._key)
        durable.write(self._head_path, msgspec.json.encode(head), 0o600)
        return head

    def nbytes(self) -> int:
        """Bytes of the files that nobody has taken away yet. Raises: OSError."""
        total = 0
        with os.scandir(self._folder) as found:
            for entry in found:
                if entry.name.startswith("audit-"):
                    with contextlib.suppress(FileNotFoundError):  # taken away at this moment
                        total += entry.stat().st_size
        return total

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _begin(self, first: int) -> None:
        self.close()
        path = self._folder / f"audit-{first:0{_NUMBER_WIDTH}}.jsonl"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
        self._size = 0
        durable.sync_folder(self._folder)

    def _go_on(self, path: Path, noted: Head | None) -> Before:
        data = path.read_bytes()
        number, before, clean, end = _last_record(data)
        if not number:  # nothing but what a crash tore of the first batch of this file
            number = first_record(path) - 1
            earlier = [other for other in files(self._folder) if other < path]
            if earlier:
                _, before, _, _ = _last_record(earlier[-1].read_bytes())
        torn = data[end:].strip(b"\n")
        missing = ""
        if noted is not None and noted.record > number:
            missing = f"{number + 1}-{noted.record}"
            number, before = noted.record, noted.digest
        self._file = os.open(path, os.O_RDWR)
        self._size = len(data)
        if not data.endswith(b"\n"):
            os.pwrite(self._file, b"\n", self._size)
            os.fdatasync(self._file)
            self._size += 1
        self.head = Head(number, before)
        return Before(torn, unclean=bool(torn) or (not clean and number > 0), missing=missing)


def _last_record(data: bytes) -> tuple[int, str, bool, int]:
    """The number and digest of the last record in a file, whether it is an end's, and where it ends; 0: none is."""
    end = len(data)
    while end > 0:
        start = data.rfind(b"\n", 0, end) + 1
        line = data[start:end]
        if line and (told := read(line)) is not None:
            return told.number, digest(line), told.act == STOP.name, end
        end = start - 1
    return 0, NOTHING, False, 0


def _head_key(key: bytes) -> bytes:
    return hashlib.blake2b(key=key, person=b"voxcache audit").digest()
