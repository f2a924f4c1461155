"""A pack: the original objects of one series as one standard tar, in which any instance is one positioned read.

Where each object lies follows from the manifest alone, so objects are fetched in parallel straight to their place.
Members are named by their position in the manifest (``00000.dcm``): object keys stay out of paths. The last member is
room for an index of the objects' headers, which `cache.dicom.index` reads and writes.
"""

import tarfile
from functools import lru_cache
from typing import Final

import msgspec

from .keys import Manifest

_BLOCK: Final = tarfile.BLOCKSIZE
_INDEX: Final = "headers.index"


class Member(msgspec.Struct, frozen=True):
    """One object within a pack's payload: ``nbytes`` bytes from ``offset``."""

    offset: int
    nbytes: int


class Layout(msgspec.Struct, frozen=True):
    """Where the objects of a manifest lie in the payload of its pack, in the manifest's order, and their ``index``."""

    members: tuple[Member, ...]
    index: Member
    nbytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> "Layout":
        members = []
        end = 0
        for source in manifest.objects:
            members.append(Member(end + _BLOCK, source.size))
            end += _BLOCK + _padded(source.size)
        # Deflated, a header takes some 200 bytes; one of many frames grows with them, as its object does.
        index = Member(end + _BLOCK, _padded(4096 + 512 * len(members) + end // 1024))
        return cls(tuple(members), index, index.offset + index.nbytes + 2 * _BLOCK)

    def frame(self, payload: memoryview) -> None:
        """Write all that is not object bytes: around each object, and behind the last one (POSIX ustar)."""
        for number in range(len(self.members)):
            self.frame_object(payload, number)
        self.frame_end(payload)

    def frame_object(self, payload: memoryview, number: int) -> None:
        """Write the header before an object and the padding behind it."""
        _frame(payload, member_name(number), self.members[number])

    def frame_end(self, payload: memoryview) -> None:
        """Write what follows the objects: room for their index, empty, and the end-of-archive blocks."""
        _frame(payload, _INDEX, self.index)
        end = self.index.offset + self.index.nbytes
        payload[self.index.offset : end] = bytes(self.index.nbytes)
        payload[end : self.nbytes] = bytes(self.nbytes - end)


def _frame(payload: memoryview, name: str, member: Member) -> None:
    payload[member.offset - _BLOCK : member.offset] = _header(name, member.nbytes)
    end = member.offset + member.nbytes
    pad = _padded(member.nbytes) - member.nbytes
    payload[end : end + pad] = bytes(pad)


@lru_cache(maxsize=2048)
def _header(name: str, nbytes: int) -> bytes:
    # the same for each series of equal slices, and made during its fetch
    info = tarfile.TarInfo(name)
    info.size = nbytes
    return info.tobuf(tarfile.USTAR_FORMAT)


def member_name(number: int) -> str:
    """What the manifest's object ``number`` is called within its pack."""
    return f"{number:05d}.dcm"


def _padded(nbytes: int) -> int:
    return -(-nbytes // _BLOCK) * _BLOCK
