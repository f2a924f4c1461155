"""The arena and its extents: fixed, private to those meant to see it, and exactly accounted for."""

import errno
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cache.arena import ALIGN, SHARED_MEMORY, Arena, Extents
from cache.errors import ConfigError
from cache.interfaces import Extent
from tests.conformance.policy import lines_run

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(MIB)
    yield arena
    arena.close()


def test_is_allocated_in_full(arena: Arena) -> None:
    """All of the memory is taken at start, none of it later."""
    status = Path(arena.path).stat()
    assert status.st_size == MIB
    assert status.st_blocks * 512 >= MIB


def test_is_for_user_and_group_only(arena: Arena) -> None:
    """The object is readable and writable by user and group, and by nobody else."""
    assert stat.S_IMODE(Path(arena.path).stat().st_mode) == 0o660


def test_another_process_sees_the_bytes(arena: Arena) -> None:
    """What is written to an extent is there for whoever maps the object by its path."""
    extent = Extent(arena.path, 3 * ALIGN, 5)
    arena.view(extent)[:] = b"bytes"
    with Path(arena.path).open("rb") as file:
        file.seek(extent.offset)
        assert file.read(5) == b"bytes"


def test_names_are_random_and_not_shown(arena: Arena) -> None:
    """No two arenas share a name, and a name does not get into logs by accident."""
    other = Arena.create(ALIGN)
    other.close()
    assert other.name != arena.name
    assert arena.name not in repr(arena)


@pytest.mark.parametrize(("offset", "nbytes"), [(MIB, 1), (-ALIGN, ALIGN), (0, MIB + 1)])
def test_extents_lie_within(arena: Arena, offset: int, nbytes: int) -> None:
    """There is no view of what is outside the arena."""
    with pytest.raises(ValueError, match="not within"):
        arena.view(Extent(arena.path, offset, nbytes))


def test_extents_of_other_files_are_refused(arena: Arena) -> None:
    """An extent of another file is no extent of this arena."""
    with pytest.raises(ValueError, match="not within"):
        arena.view(Extent("/elsewhere", 0, 1))


def test_close_unlinks_and_spares_views_in_use() -> None:
    """Closing removes the name at once; arrays over the memory stay valid until they are dropped."""
    arena = Arena.create(MIB)
    array = np.frombuffer(arena.view(Extent(arena.path, 0, 8)), np.uint8)
    arena.close()
    arena.close()
    assert not Path(arena.path).exists()
    assert array.sum() == 0


def test_too_large_for_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little shared memory is said at start, in words, and leaves nothing behind."""

    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="lower the RAM budget"):
        Arena.create(MIB)


@pytest.mark.parametrize("nbytes", [0, -ALIGN, ALIGN + 1])
def test_sizes_are_whole_pages(nbytes: int) -> None:
    """A size that is not in pages is a mistake in the settings."""
    with pytest.raises(ConfigError, match="multiple of 4096"):
        Arena.create(nbytes)


def test_unknown_group() -> None:
    """A group that does not exist is a mistake in the settings."""
    with pytest.raises(ConfigError, match="no group"):
        Arena.create(ALIGN, group="no-such-group-here")


def test_huge_pages_where_the_system_gives_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What has to be changed for huge pages is said at start, and nothing is left behind."""
    told = tmp_path / "shmem_enabled"
    monkeypatch.setattr("cache.arena.HUGE_PAGES", told)
    before = set(SHARED_MEMORY.glob("voxcache-*"))
    for modes in (None, "always within_size advise [never] deny force"):
        if modes is not None:
            told.write_text(modes)
        with pytest.raises(ConfigError, match="write 'advise' to"):
            Arena.create(MIB, huge_pages=True)
    assert set(SHARED_MEMORY.glob("voxcache-*")) <= before


def test_an_arena_that_wants_huge_pages_is_an_arena(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether or not the kernel finds huge pages, all of the memory is taken and readable."""
    told = tmp_path / "shmem_enabled"
    told.write_text("always within_size [advise] never deny force")
    monkeypatch.setattr("cache.arena.HUGE_PAGES", told)
    arena = Arena.create(4 * MIB, huge_pages=True)
    assert Path(arena.path).stat().st_blocks * 512 >= 4 * MIB
    arena.view(Extent(arena.path, 3 * MIB, 5))[:] = b"bytes"
    arena.close()


def test_a_locked_arena_is_locked() -> None:
    """The system counts its pages as locked until it is closed."""

    def locked_kb() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmLck"))

    before = locked_kb()
    arena = Arena.create(4 * ALIGN, lock=True)
    assert locked_kb() == before + 16
    arena.close()
    assert locked_kb() == before


def test_more_than_may_be_locked() -> None:
    """A limit on locked memory is named, with where to raise it."""
    code = """
import os, resource
from cache.arena import Arena
from cache.errors import ConfigError
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
if os.getuid() == 0:
    os.setuid(65534)  # root may lock what it wants
try:
    Arena.create(1 << 20, lock=True)
except ConfigError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "LimitMEMLOCK" in run.stdout, run.stderr


def test_a_killed_daemons_arena_is_removed_a_live_ones_is_not(arena: Arena) -> None:
    """Memory that a killed daemon left is given back at the next start; a running daemon's is left alone."""
    code = "import sys; from cache.arena import Arena; print(Arena.create(4096).path, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        path = Path(daemon.stdout.readline().strip())
        Arena.create(ALIGN).close()
        assert path.exists()
        daemon.send_signal(signal.SIGKILL)
    assert path.exists()
    Arena.create(ALIGN).close()
    assert not path.exists()
    assert Path(arena.path).exists()


class ExtentsMachine(RuleBasedStateMachine):
    """Extents against a plain set of pages, all of them or those of two ranges."""

    PAGES = 24
    PARTS = (range(20 * ALIGN, 24 * ALIGN), range(3 * ALIGN, 15 * ALIGN))

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(self.PAGES * ALIGN)
        self.taken: dict[int, int] = {}

    def free_runs(self, within: Sequence[range] = ()) -> list[int]:
        used = {
            page for offset, pages in self.taken.items() for page in range(offset // ALIGN, offset // ALIGN + pages)
        }
        line = "".join("x" if page in used else "." for page in range(self.PAGES))
        parts = within or [range(self.PAGES * ALIGN)]
        return [len(run) for part in parts for run in line[part.start // ALIGN : part.stop // ALIGN].split("x") if run]

    @rule(nbytes=st.integers(0, 10 * ALIGN), within=st.sampled_from([(), PARTS]))
    def allocate(self, nbytes: int, within: Sequence[range]) -> None:
        pages = max(1, -(-nbytes // ALIGN))
        fits = max(self.free_runs(within), default=0) >= pages
        offset = self.extents.allocate(nbytes, within)
        assert (offset is not None) == fits
        if offset is not None:
            assert offset not in self.taken
            parts = within or [range(self.PAGES * ALIGN)]
            assert any(part.start <= offset and offset + pages * ALIGN <= part.stop for part in parts)
            self.taken[offset] = pages

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        self.extents.free(offset)
        del self.taken[offset]

    @rule(data=st.data(), pages=st.integers(1, PAGES), within=st.sampled_from([(), PARTS]))
    def plan(self, data: st.DataObject, pages: int, within: Sequence[range]) -> None:
        expendable = data.draw(st.lists(st.sampled_from(sorted(self.taken)), unique=True)) if self.taken else []
        freed = self.extents.to_free(pages * ALIGN, expendable, within)
        before = dict(self.taken)
        for offset in expendable if freed is None else freed:
            del self.taken[offset]
        assert (max(self.free_runs(within), default=0) >= pages) == (freed is not None)
        assert freed is None or set(freed) <= set(expendable)
        self.taken = before

    @invariant()
    def exact(self) -> None:
        assert self.extents.check() == []
        runs = self.free_runs()
        assert self.extents.free_bytes == sum(runs) * ALIGN
        assert self.extents.largest_hole == max(runs, default=0) * ALIGN


ExtentsMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestExtents = ExtentsMachine.TestCase


def test_freeing_what_is_not_taken() -> None:
    """Giving back twice is a bug that is told, not hidden."""
    extents = Extents(4 * ALIGN)
    offset = extents.allocate(1)
    assert offset is not None
    extents.free(offset)
    with pytest.raises(ValueError, match="nothing taken"):
        extents.free(offset)


def pages(*sizes: int) -> Extents:
    """Extents without a hole, of so many pages each."""
    extents = Extents(sum(sizes) * ALIGN)
    for size in sizes:
        assert extents.allocate(size * ALIGN) is not None
    return extents


def test_spares_what_would_not_help() -> None:
    """Of the expendable, only those within the hole that opens are given up."""
    extents = pages(1, 1, 1, 1, 1, 1)
    assert extents.to_free(2 * ALIGN, [0, 5 * ALIGN, 2 * ALIGN, 3 * ALIGN]) == [2 * ALIGN, 3 * ALIGN]


def test_takes_the_window_that_is_worth_least() -> None:
    """Of the windows among the first to go, that one goes whose extents are worth least together."""
    order = [0, ALIGN, 2 * ALIGN]
    # two that nobody wants, or a third that is worth more than both: all that there is
    assert pages(1, 1, 3).to_free(2 * ALIGN, order) == [0, ALIGN]
    # of many that stay, the third is hardly worth more than one of the two
    assert pages(1, 1, 3, *[1] * 10).to_free(2 * ALIGN, order) == [2 * ALIGN]


@pytest.mark.slow
def test_work_does_not_grow_with_extents() -> None:
    """Making room takes about as many steps among thousands of extents as among hundreds."""

    def work_at(entries: int) -> float:
        rng = random.Random(1)
        extents = Extents(entries * 10 * ALIGN)
        order: dict[int, None] = {}

        def churn() -> None:
            for _ in range(entries):
                wanted = rng.choice((5, 10)) * ALIGN
                for offset in extents.to_free(wanted, order) or ():
                    extents.free(offset)
                    del order[offset]
                taken = extents.allocate(wanted)
                assert taken is not None
                order[taken] = None

        churn()
        churn()
        return lines_run(churn, "cache.arena") / entries

    assert work_at(1600) <= 2 * work_at(200)
