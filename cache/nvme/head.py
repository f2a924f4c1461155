"""What stands before an entry's payload in its file: standard for every reader, sealed for ours.

A pack's file is a tar (POSIX ustar) whose first member, ``voxcache.json``, comes before the members of the payload.
Every other entry's is safetensors (huggingface/safetensors, "Format"): header length, JSON, the tensor. The head's size
follows from the payload's alone, so that the payload can be written, page-aligned, before the entry is known.
"""

import tarfile
from typing import Final, NamedTuple

import msgspec

from cache.arena import aligned
from cache.entry import CHUNK, DType, Entry, checksum
from cache.errors import TooLarge
from cache.keys import Kind

#: The version of everything below. A file of another version is not read.
FORMAT: Final = 1

SUFFIXES: Final[dict[Kind, str]] = {
    "tensor": ".safetensors",
    "embedding": ".safetensors",
    "result": ".safetensors",
    "pack": ".tar",
}

#: The head of an entry of one chunk, and the least a head can be.
LEAST: Final = 16 << 10

_MEMBER: Final = "voxcache.json"
_DTYPES: Final[dict[DType, str]] = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


class BadHead(Exception):
    """The bytes are no head of ours, or not any more."""


class OtherFormat(Exception):
    """A head of ours in a version that this software does not read."""


class Head(NamedTuple):
    """An entry and the checksums of its payload's CHUNKs, 16 hex digits each, joined."""

    entry: Entry
    sums: str


class _Meta(msgspec.Struct, frozen=True):
    entry: Entry
    chunk: int
    sums: str  # 16 hex digits a chunk, joined


class _Safetensors(msgspec.Struct, frozen=True):
    metadata: dict[str, str] = msgspec.field(name="__metadata__")


class _Envelope(msgspec.Struct, frozen=True):
    format: int
    seal: str = ""
    meta: msgspec.Raw = msgspec.Raw(b"null")


def head_nbytes(nbytes: int) -> int:
    """The size of the head before a payload of ``nbytes``: whole pages, with 16 bytes for each chunk's checksum."""
    return aligned(LEAST + 16 * max(-(-nbytes // CHUNK) - 1, 0))


def encode(head: Head) -> bytes:
    """The head's bytes. Raises: TooLarge if its lineage does not fit."""
    entry = head.entry
    meta = msgspec.json.encode(_Meta(entry, CHUNK, head.sums))
    envelope = _Envelope(FORMAT, checksum(memoryview(meta)), msgspec.Raw(meta))
    framed = _frame(entry, msgspec.json.encode(envelope))
    if len(framed) > head_nbytes(entry.nbytes):
        raise TooLarge(f"the description of series {entry.key.series} is larger than a file's head can hold")
    return framed


def announced(kind: Kind, start: bytes) -> int:
    """How long the head says it is, from its first LEAST bytes; ``kind``: one with its suffix. Raises: BadHead."""
    try:
        if kind != "pack":
            return 8 + int.from_bytes(start[:8], "little")
        member = tarfile.TarInfo.frombuf(start[:512], "utf-8", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise BadHead(str(error)) from error
    return 512 + member.size


def decode(kind: Kind, data: bytes) -> Head:
    """Read a whole head; ``kind``: one with its suffix. Raises: BadHead, OtherFormat."""
    try:
        if kind != "pack":
            text = msgspec.json.decode(data[8:], type=_Safetensors).metadata["voxcache"].encode()
        else:
            text = data[512:].rstrip()
        envelope = msgspec.json.decode(text, type=_Envelope)
        if envelope.format != FORMAT:
            raise OtherFormat(f"format {envelope.format}")
        meta = msgspec.json.decode(envelope.meta, type=_Meta)
        intact = checksum(memoryview(bytes(envelope.meta))) == envelope.seal
        # what lies around the sealed part is fixed by it
        intact = intact and meta.chunk == CHUNK and data == _frame(meta.entry, text)
    except (ValueError, KeyError, RecursionError) as error:
        raise BadHead(f"{type(error).__name__}: {error}") from error
    if not intact or SUFFIXES[meta.entry.key.kind] != SUFFIXES[kind]:
        raise BadHead("the head fails its checksum")
    return Head(meta.entry, meta.sums)


def _frame(entry: Entry, envelope: bytes) -> bytes:
    size = head_nbytes(entry.nbytes)
    if entry.key.kind == "pack":
        member = tarfile.TarInfo(_MEMBER)
        member.size = size - 512
        return member.tobuf(tarfile.USTAR_FORMAT) + envelope.ljust(size - 512)
    if entry.spec is None:
        raise ValueError(f"a {entry.key.kind} without a spec")
    tensor = {"dtype": _DTYPES[entry.spec.dtype], "shape": entry.spec.shape, "data_offsets": (0, entry.nbytes)}
    header = msgspec.json.encode({"__metadata__": {"voxcache": envelope.decode()}, "tensor": tensor})
    return (size - 8).to_bytes(8, "little") + header.ljust(size - 8)
