"""The headers of a series as a few bytes that stay with its pack, so that no object of it is ever parsed again."""

import zlib
from collections.abc import Sequence
from typing import Final

import msgspec

from cache import __version__

from .header import InstanceHeader

#: Raise it when a header comes to mean something else, or is read in another way.
_VERSION: Final = f"voxcache {__version__}, headers 3"
_PREFIX: Final = 4
#: What an index may unfold to: headers of some 50 000 objects.
_MOST: Final = 64 << 20


class _Index(msgspec.Struct, frozen=True, array_like=True):
    version: str
    headers: tuple[InstanceHeader, ...]


def write_index(headers: Sequence[InstanceHeader], room: memoryview) -> bool:
    """Write the headers to ``room``: their length (4 bytes, big-endian), then MessagePack, deflated.

    False, and none is there, if it is too small for them.
    """
    packed = zlib.compress(msgspec.msgpack.encode(_Index(_VERSION, tuple(headers))), level=1)
    fits = _PREFIX + len(packed) <= len(room)
    if fits:
        room[_PREFIX : _PREFIX + len(packed)] = packed
    room[:_PREFIX] = (len(packed) if fits else 0).to_bytes(_PREFIX, "big")
    return fits


def read_index(room: memoryview) -> tuple[InstanceHeader, ...] | None:
    """The headers that were written to ``room``; None if there are none, or none of this software's."""
    nbytes = int.from_bytes(room[:_PREFIX], "big")
    if not 0 < nbytes <= len(room) - _PREFIX:
        return None
    try:
        packed = zlib.decompressobj().decompress(room[_PREFIX : _PREFIX + nbytes], _MOST)
        index = msgspec.msgpack.decode(packed, type=_Index)
    except (zlib.error, msgspec.MsgspecError):
        return None
    return index.headers if index.version == _VERSION else None
