"""What every origin does: the class that each implementation's tests subclass."""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

import pytest

from cache.errors import OriginChanged, OriginDenied, OriginDown
from cache.interfaces import Origin
from cache.keys import SourceObject

#: Names that some layer or other takes for something else.
AWKWARD = (
    "a+b.dcm",
    "a b.dcm",
    "a%20b.dcm",
    "a%2Bb.dcm",
    "x/ü-é-日本/ß.dcm",
    "x/&?=#;:@.dcm",
    "x/'\"<>[]{}|\\^~`$!*(),.dcm",
)


class OriginConformance(ABC):
    """Subclasses say how to put objects where the origin under test, the fixture ``origin``, reads them."""

    @abstractmethod
    async def put(self, files: Mapping[str, bytes]) -> None:
        """Store objects, in place of those that have the same keys."""

    @abstractmethod
    async def remove(self, key: str) -> None: ...

    @abstractmethod
    def denied(self) -> AbstractAsyncContextManager[Origin]:
        """The same objects, for somebody who may not read them."""

    @abstractmethod
    def down(self) -> AbstractAsyncContextManager[Origin]:
        """An origin that cannot be reached."""

    async def one(self, origin: Origin, key: str, data: bytes) -> SourceObject:
        """Store one object; how the origin lists it."""
        await self.put({key: data})
        (listed,) = [found for found in await origin.list(key) if found.key == key]
        return listed

    async def test_listing_is_sorted_by_key_and_knows_sizes(self, origin: Origin) -> None:
        """A listing holds every object under the prefix once, sorted by key, with size and ETag."""
        await self.put({"s/b": b"12", "s/a/z": b"1", "s/a.x": b"", "t/c": b"123"})
        listed = await origin.list("")
        assert [(found.key, found.size) for found in listed] == [("s/a.x", 0), ("s/a/z", 1), ("s/b", 2), ("t/c", 3)]
        assert all(found.etag and '"' not in found.etag for found in listed)

    async def test_a_listing_knows_when_objects_were_written(self, origin: Origin) -> None:
        """The same objects with times in Unix seconds, those of what is written again no earlier than before."""
        before = time.time()
        await self.put({"s/b": b"12", "s/a": b"1", "t": b""})
        first = await origin.dated("s/")
        assert [source for source, _ in first] == list(await origin.list("s/"))
        # a store's clock may have whole seconds only, and be another machine's
        assert all(before - 60 < at < time.time() + 60 for _, at in first)
        await self.put({"s/b": b"123"})
        (again,) = [at for source, at in await origin.dated("s/b") if source.size == 3]
        assert again >= dict((source.key, at) for source, at in first)["s/b"]

    async def test_a_prefix_is_text_not_a_folder(self, origin: Origin) -> None:
        """A prefix may end within a name; one that nothing starts with lists nothing."""
        await self.put(dict.fromkeys(("1.2/a", "1.23/a", "1.2x", "2/1.2/a"), b""))
        assert [found.key for found in await origin.list("1.2/")] == ["1.2/a"]
        assert len(await origin.list("1.2")) == 3
        assert len(await origin.list("1.23/a")) == 1
        for nothing in ("9", "1.2/a/", "1.2/b", "../", "/1.2"):
            assert await origin.list(nothing) == []

    async def test_a_long_listing_is_whole(self, origin: Origin) -> None:
        """A series of more objects than fit on one page of a listing is listed whole."""
        keys = [f"s/{number:04d} +.dcm" for number in range(1003)]
        await self.put(dict.fromkeys(keys, b""))
        assert [found.key for found in await origin.list("s/")] == keys

    @pytest.mark.parametrize("key", AWKWARD)
    async def test_awkward_keys(self, origin: Origin, key: str) -> None:
        """Whatever a key looks like, it is listed, read and fetched under the very same name."""
        source = await self.one(origin, key, key.encode())
        into = bytearray(source.size)
        await origin.fetch(source, memoryview(into))
        assert into == key.encode()
        assert await origin.read(key) == key.encode()

    async def test_an_empty_object(self, origin: Origin) -> None:
        """An empty object is an object."""
        source = await self.one(origin, "s/empty", b"")
        assert source.size == 0
        await origin.fetch(source, memoryview(bytearray()))
        assert await origin.read("s/empty") == b""
        assert await origin.read("s/empty", 10) == b""

    async def test_a_fetch_fills_its_place_alone(self, origin: Origin) -> None:
        """A large object, fetched in parts, is equal to what was stored; the bytes around its place are untouched."""
        data = random.Random(1).randbytes((9 << 20) + 12345)
        source = await self.one(origin, "s/large", data)
        into = bytearray(b"\xaa" * (len(data) + 20))
        await origin.fetch(source, memoryview(into)[10:-10])
        assert into[10:-10] == data
        assert into[:10] == into[-10:] == b"\xaa" * 10

    async def test_reading_the_start(self, origin: Origin) -> None:
        """A read gives as many bytes as it was limited to, or all; and None for what is not there."""
        await self.put({"s/a": b"0123456789"})
        assert await origin.read("s/a") == b"0123456789"
        assert await origin.read("s/a", 4) == b"0123"
        assert await origin.read("s/a", 10) == await origin.read("s/a", 11) == b"0123456789"
        for absent in ("s/b", "s", "s/", "s/a/b", "../s/a", "s//a"):
            assert await origin.read(absent) is None

    async def test_a_changed_object(self, origin: Origin) -> None:
        """An object that was replaced, even by one of the same size, is not delivered in place of the listed one."""
        source = await self.one(origin, "s/a", b"before")
        await self.put({"s/a": b"after!"})
        with pytest.raises(OriginChanged):
            await origin.fetch(source, memoryview(bytearray(6)))
        await self.put({"s/a": b"longer than before"})
        with pytest.raises(OriginChanged):
            await origin.fetch(source, memoryview(bytearray(6)))

    async def test_a_removed_object(self, origin: Origin) -> None:
        """An object that is gone is a changed one."""
        source = await self.one(origin, "s/a", b"before")
        await self.remove("s/a")
        with pytest.raises(OriginChanged):
            await origin.fetch(source, memoryview(bytearray(6)))

    @pytest.mark.parametrize("size", [5, 7])
    async def test_a_manifest_that_is_wrong_about_a_size(self, origin: Origin, size: int) -> None:
        """An object of another size than its manifest says is a changed one, and nothing is written past its place."""
        source = await self.one(origin, "s/a", b"before")
        into = bytearray(b"\xaa" * 20)
        with pytest.raises(OriginChanged):
            await origin.fetch(SourceObject(source.key, size, source.etag), memoryview(into)[:size])
        assert into[size:] == b"\xaa" * (20 - size)

    async def test_denied(self, origin: Origin) -> None:
        """Whatever is asked without permission is refused as such."""
        source = await self.one(origin, "s/a", b"before")
        async with self.denied() as closed:
            await self.each_fails(closed, source, OriginDenied)

    async def test_down(self, origin: Origin) -> None:
        """Whatever is asked of an origin that cannot be reached fails as such."""
        source = await self.one(origin, "s/a", b"before")
        async with self.down() as away:
            await self.each_fails(away, source, OriginDown)

    async def each_fails(self, origin: Origin, source: SourceObject, error: type[Exception]) -> None:
        with pytest.raises(error):
            await origin.list("s/")
        with pytest.raises(error):
            await origin.read(source.key)
        with pytest.raises(error):
            await origin.fetch(source, memoryview(bytearray(source.size)))
