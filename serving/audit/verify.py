"""Whether records are all there and as they were written; if not, which ones are not, and what can be told of it."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from cache.errors import NotFound, VoxcacheError

from .record import LOST, START, Read, digest, read
from .spool import AuditSettings, Head, files, first_record, read_head

#: What somebody, or a disk, has done; and what a crash or a full disk leaves, or cannot be told here.
Kind = Literal["changed", "missing", "added", "cut"] | Literal["torn", "lost", "unclean", "begins"]

_WRONG: Final = frozenset({"changed", "missing", "added", "cut"})


class Finding(msgspec.Struct, frozen=True):
    """One thing that was found at a line of a file (from 1), about the records ``first`` to ``last``."""

    kind: Kind
    path: Path
    line: int
    first: int
    last: int
    text: str

    @property
    def wrong(self) -> bool:
        """Whether it is more than what a crash or a full disk leaves."""
        return self.kind in _WRONG

    def __str__(self) -> str:
        return f"{self.path.name} line {self.line}: {self.text}"


class Verdict(msgspec.Struct, frozen=True):
    """All that was found, and how many records there are, from which to which."""

    findings: tuple[Finding, ...]
    records: int
    first: int
    last: int

    @property
    def whole(self) -> bool:
        return not any(finding.wrong for finding in self.findings)


def verify_all(settings: AuditSettings, state: Path, others: Sequence[Path], heads: Sequence[Head]) -> Verdict:
    """The daemon's own files, and ``others``: files, or folders of them, that were taken away before.

    Raises: VoxcacheError: there is nothing to look at, or it cannot be read; the head is not this installation's.
    """
    paths = {path.name: path for path in files(settings.folder(state))}
    for other in others:
        paths |= {path.name: path for path in (files(other) if other.is_dir() else [other])}
    if not paths:
        raise NotFound(f"there are no audit records in {settings.folder(state)}")
    noted = read_head(state / "audit.head")
    try:
        if noted is not None and not noted.genuine((state / "patient.key").read_bytes()):
            raise VoxcacheError(f"{state / 'audit.head'} is not sealed by this installation: somebody else wrote it")
        return verify(paths.values(), [*heads, *([noted] if noted is not None else [])])
    except OSError as error:
        raise VoxcacheError(f"audit records cannot be verified: {error}") from error


class _Line(msgspec.Struct, frozen=True):
    path: Path
    line: int
    raw: bytes
    digest: str
    told: Read | None

    def follows(self, number: int, before: str) -> bool:
        """Whether it is the record after that one."""
        return self.told is not None and self.told.number == number + 1 and self.told.before == before


_Find = Callable[[Finding], None]


def verify(paths: Iterable[Path], heads: Sequence[Head] = ()) -> Verdict:
    """Walk the files. ``heads`` tell of some records what their digests were, and how many there were at least.

    A digest vouches for the line before its own, so what was changed shows at the next line. Raises: OSError.
    """
    findings: list[Finding] = []
    walk = _Walk({head.record: head.digest for head in heads}, findings.append)
    lines = _without_torn(_lines(sorted(paths, key=first_record)), findings.append)
    for line, after in itertools.pairwise(itertools.chain(lines, (None,))):
        assert line is not None  # only the last of all is
        walk.step(line, after)
    return walk.end(findings)


def _lines(paths: Iterable[Path]) -> Iterator[_Line]:
    for path in paths:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.removesuffix(b"\n")
                yield _Line(path, number, line, digest(line), read(line))


def _without_torn(lines: Iterable[_Line], find: _Find) -> Iterator[_Line]:
    """The lines but for what a crash tore: the record of the next start vouches for it, or it is the last."""
    strays: list[_Line] = []
    for line in lines:
        if line.told is None:
            strays.append(line)
            continue
        if strays and line.told.act == START.name:
            left = digest(b"\n".join(stray.raw for stray in strays).strip(b"\n"))
            if left == line.told.details.get("torn"):
                find(_torn(strays, line.told.number))
                strays = []
        yield from strays
        strays = []
        yield line
    if strays:
        last = strays[-1].path.read_bytes().endswith(b"\n")
        if last or len(strays) > 1:
            yield from strays
        else:
            find(_torn(strays, 0))


def _torn(strays: Sequence[_Line], number: int) -> Finding:
    nbytes = sum(len(stray.raw) for stray in strays)
    after = f"; record {number} goes on from it" if number else "; nothing has gone on from it yet"
    return Finding(
        "torn", strays[0].path, strays[0].line, number, number, f"a crash tore it after {nbytes} bytes{after}"
    )


class _Walk:
    """The chain as far as it was walked: the last record's number and digest, and whether that digest says anything."""

    def __init__(self, heads: dict[int, str], find: _Find) -> None:
        self._heads = heads
        self._find = find
        self._at: _Line | None = None
        self._first = 0
        self._number = 0
        self._digest = ""
        self._blamed = False
        self._records = 0

    def step(self, line: _Line, after: _Line | None) -> None:
        """Go on to ``line``; ``after`` comes behind it."""
        told, next_number = line.told, self._number + 1
        if self._at is None:
            self._begin(line)
            return
        if after is not None and line.told != after.told and after.follows(self._number, self._digest):
            self._tell("added", line, told.number if told else next_number, "does not belong here")
            return
        if told is None:
            self._blame(line, next_number, "is none any more: it was changed")
            return
        chained, vouched = told.before == self._digest, self._vouched(line, after)
        if told.number != next_number and (chained or (vouched is False and _number(after) == next_number + 1)):
            self._blame(line, next_number, f"was changed: it says that it is {told.number}")
        elif told.number < next_number:
            self._tell("added", line, told.number, "does not belong here")
        elif told.number > next_number:
            which = (
                f"records {next_number} to {told.number - 1} are" if told.number > next_number + 1 else "record {} is"
            )
            which = which.format(next_number)
            doubt = "" if self._blamed else f"; record {self._number}, which only they vouched for, cannot be checked"
            self._find(
                Finding(
                    "missing", line.path, line.line, next_number, told.number - 1, f"before it {which} missing{doubt}"
                )
            )
            self._take(line, told)
        elif chained or self._blamed:
            self._take(line, told)
        elif vouched is False:
            self._blame(line, told.number, f"was changed; whether {self._number} was, too, cannot be told")
        elif vouched:
            self._tell("changed", self._at, self._number, "was changed")
            self._take(line, told)
        else:
            self._tell("changed", self._at, self._number, f"was changed, or {told.number} was")
            self._take(line, told)

    def end(self, findings: list[Finding]) -> Verdict:
        least = max(self._heads, default=0)
        if self._at is not None and least > self._number:
            text = (
                f"records {self._number + 1} to {least} are missing behind it: they were there once, as the head tells"
            )
            self._find(Finding("cut", self._at.path, self._at.line, self._number + 1, least, text))
        return Verdict(tuple(findings), self._records, self._first, self._number)

    def _begin(self, line: _Line) -> None:
        self._first = line.told.number if line.told is not None else max(first_record(line.path), 1)
        if self._first > 1:
            text = f"records before {self._first} are not here: they were taken away, or removed"
            self._find(Finding("begins", line.path, line.line, 1, self._first - 1, text))
        if line.told is None:
            self._at, self._number = line, self._first - 1
            self._blame(line, self._first, "is none any more: it was changed")
        else:
            self._take(line, line.told)

    def _take(self, line: _Line, told: Read) -> None:
        self._at, self._number, self._digest, self._blamed = line, told.number, line.digest, False
        self._records += 1
        if self._heads.get(told.number, line.digest) != line.digest:
            self._tell("changed", line, told.number, "is another one than the head tells of: it was changed")
            self._blamed = True
        if told.act == LOST.name:
            self._tell("lost", line, told.number, f"tells that {told.details.get('lost')} acts could not be recorded")
        if told.act == START.name and "unclean" in told.details:
            text = "begins after an end that was none: what was done just before may not have been recorded"
            self._tell("unclean", line, told.number, text)

    def _blame(self, line: _Line, number: int, text: str) -> None:
        self._tell("changed", line, number, text)
        self._at, self._number, self._digest, self._blamed = line, number, line.digest, True
        self._records += 1

    def _tell(self, kind: Kind, line: _Line, number: int, text: str) -> None:
        self._find(Finding(kind, line.path, line.line, number, number, f"record {number} {text}"))

    def _vouched(self, line: _Line, after: _Line | None) -> bool | None:
        """Whether the line is as it was: by the line after it, or a head; None if neither says."""
        if after is not None and after.told is not None:
            return after.told.before == line.digest
        if line.told is not None and line.told.number in self._heads:
            return self._heads[line.told.number] == line.digest
        return None


def _number(line: _Line | None) -> int:
    return line.told.number if line is not None and line.told is not None else 0
