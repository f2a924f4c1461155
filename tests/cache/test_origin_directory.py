"""A directory as origin."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from cache.errors import OriginDown
from cache.interfaces import Origin
from cache.keys import SourceObject
from cache.origin.directory import DirectoryOrigin, DirectorySettings
from tests.conformance.origin import OriginConformance


class TestDirectoryOrigin(OriginConformance):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path) -> None:
        self.root = tmp_path / "archive"
        self.root.mkdir()

    @pytest.fixture
    async def origin(self, place: None) -> AsyncIterator[Origin]:
        async with opened(self.root) as origin:
            yield origin

    async def put(self, files: Mapping[str, bytes]) -> None:
        for key, data in files.items():
            path = self.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            arriving = path.with_name("arriving")
            arriving.write_bytes(data)
            arriving.rename(path)

    async def remove(self, key: str) -> None:
        (self.root / key).unlink()

    @asynccontextmanager
    async def denied(self) -> AsyncIterator[Origin]:
        async with opened(self.root) as origin:
            mode = self.root.stat().st_mode
            self.root.chmod(0)
            # root may do everything, whatever the mode
            me = os.geteuid()
            if me == 0:
                os.seteuid(65534)
            try:
                yield origin
            finally:
                if me == 0:
                    os.seteuid(me)
                self.root.chmod(mode)

    def down(self) -> AbstractAsyncContextManager[Origin]:
        return opened(self.root / "not mounted")

    async def test_links_are_not_followed(self, origin: Origin, tmp_path: Path) -> None:
        """No link, of a file or of a folder, leads out of the root: what lies behind it has no key."""
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "a").write_bytes(b"secret")
        (self.root / "s").mkdir()
        (self.root / "s" / "file").symlink_to(tmp_path / "outside" / "a")
        (self.root / "s" / "folder").symlink_to(tmp_path / "outside")
        assert await origin.list("") == []
        assert await origin.list("s/folder/") == []
        for key in ("s/file", "s/folder/a", "../outside/a", "s/../../outside/a", str(tmp_path / "outside" / "a")):
            assert await origin.read(key) is None

    async def test_the_root_may_be_a_link(self, origin: Origin, tmp_path: Path) -> None:
        """The root itself is as configured, link or not."""
        await self.put({"s/a": b"1"})
        (tmp_path / "link").symlink_to(self.root)
        async with opened(tmp_path / "link") as linked:
            assert await linked.read("s/a") == b"1"

    async def test_what_is_no_file_has_no_key(self, origin: Origin) -> None:
        """A FIFO, a folder and a name that is not UTF-8 are no objects, and hold nobody up."""
        os.mkfifo(self.root / "fifo")
        (self.root / "folder").mkdir()
        (self.root / os.fsdecode(b"\xff.dcm")).write_bytes(b"")
        assert await origin.list("") == []
        for key in ("fifo", "folder", "\udcff.dcm", "a\0b", "x" * 300, ""):
            assert await origin.read(key) is None

    async def test_a_file_rewritten_in_place_is_another(self, origin: Origin) -> None:
        """A file that keeps its inode and size, but not its mtime, has another ETag."""
        source = await self.one(origin, "s/a", b"before")
        path = self.root / "s" / "a"
        path.write_bytes(b"after!")
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        (now,) = await origin.list("s/a")
        assert now.etag != source.etag

    async def test_a_root_that_is_not_mounted(self, origin: Origin) -> None:
        """A root that is not there is an origin that is down, never an empty archive."""
        async with self.down() as away:
            with pytest.raises(OriginDown, match="not there"):
                await away.list("")

    async def test_a_cancelled_fetch_writes_no_more(self, origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
        """A fetch that was cancelled ends once its thread has let go of the memory, however often it is cancelled."""
        source = await self.one(origin, "s/a", bytes(100))
        reading, go_on, written = threading.Event(), threading.Event(), threading.Event()
        preadv = os.preadv

        def slow(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            reading.set()
            go_on.wait()
            count = preadv(fd, buffers, offset)
            written.set()
            return count

        monkeypatch.setattr(os, "preadv", slow)
        task = asyncio.create_task(_fetch(origin, source))
        await asyncio.to_thread(reading.wait)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert written.is_set()


async def _fetch(origin: Origin, source: SourceObject) -> None:
    await origin.fetch(source, memoryview(bytearray(source.size)))


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[Origin]:
    origin = DirectoryOrigin(DirectorySettings(str(root)))
    try:
        yield origin
    finally:
        await origin.close()
