"""Headers survive in a pack's index, or there is none: never others, never half of them."""

import msgspec
import pytest

from cache.dicom import index
from cache.dicom.header import read_header
from cache.dicom.index import read_index, write_index
from cache.keys import Manifest, SeriesRef, SourceObject
from cache.pack import Layout

from .test_assemble import header
from .test_enhanced import JPEG_LS, enhanced, written


def room(nbytes: int) -> memoryview:
    return memoryview(bytearray(b"\xa5" * nbytes))


def test_headers_are_read_as_they_were_written(phantom: list[bytes]) -> None:
    """Of classic and enhanced objects, to the last attribute, in the room that a pack has for them."""
    objects = [*phantom, written(enhanced(), JPEG_LS)]
    headers = tuple(read_header(memoryview(data), member) for member, data in enumerate(objects))
    sources = [SourceObject(f"{n:03d}", len(data), "etag") for n, data in enumerate(objects)]
    layout = Layout.of(Manifest.of(SeriesRef("1.2", "1.3"), sources))
    place = room(layout.index.nbytes)
    assert write_index(headers, place)
    assert read_index(place) == headers


def test_a_new_pack_has_no_index() -> None:
    """Whatever was in the memory before, a pack that is being made says that there is none."""
    layout = Layout.of(Manifest.of(SeriesRef("1.2", "1.3"), [SourceObject("a", 1000, "etag")]))
    payload = room(layout.nbytes)
    layout.frame(payload)
    assert read_index(payload[layout.index.offset :][: layout.index.nbytes]) is None


@pytest.mark.parametrize("nbytes", [4, 8, 100])
def test_too_little_room_is_no_index(phantom: list[bytes], nbytes: int) -> None:
    """Headers that do not fit are not kept, and what lies behind the room is not touched."""
    headers = [read_header(memoryview(data), member) for member, data in enumerate(phantom)]
    place = room(nbytes + 8)
    assert not write_index(headers, place[:nbytes])
    assert read_index(place[:nbytes]) is None
    assert bytes(place[nbytes:]) == b"\xa5" * 8


def test_what_is_none_is_not_believed(phantom: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other software's headers, a length beyond the end, and bytes that are none of ours are no index."""
    headers = [read_header(memoryview(phantom[0]), 0)]
    place = room(4096)
    write_index(headers, place)
    for at in (0, 4, 40):
        broken = memoryview(bytearray(place))
        broken[at : at + 4] = b"\xff" * 4
        assert read_index(broken) is None
    monkeypatch.setattr(index, "_VERSION", "another")
    assert read_index(place) is None


def test_an_index_unfolds_to_no_more_than_it_may(phantom: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes that claim to be gigabytes are none."""
    place = room(4096)
    write_index([read_header(memoryview(phantom[0]), 0)], place)
    monkeypatch.setattr(index, "_MOST", 100)
    assert read_index(place) is None


def test_an_index_of_a_long_series_is_small() -> None:
    """Headers that differ in little take a few hundred bytes each."""
    headers = [
        msgspec.structs.replace(header(n), instance=f"1.2.826.0.1.3680043.8.498.{n * 7919**9 % 10**37}")
        for n in range(1000)
    ]
    place = room(1 << 20)
    assert write_index(headers, place)
    assert int.from_bytes(place[:4], "big") < 300 * len(headers)
