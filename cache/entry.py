"""What is stored under a key: its shape, its place in the patient, where it came from, and its checksums."""

import math
from typing import Final, Literal

import msgspec
import numpy as np
import xxhash

from .keys import Key

#: Bytes under one checksum. Large enough that sums are few, small enough to verify while the chunk is in the CPU cache.
CHUNK: Final = 4 << 20

DType = Literal["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64"]
Spacing = tuple[float, float, float]
Affine = tuple[
    tuple[float, float, float, float],
    tuple[float, float, float, float],
    tuple[float, float, float, float],
    tuple[float, float, float, float],
]


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """The meaning of a tensor's bytes: C-contiguous, little-endian.

    ``axes`` has one letter an axis: ``z`` ``y`` ``x`` are the volume's slices, rows and columns (whatever the
    anatomical direction: the affine tells it), ``c`` channels, ``t`` time points (or echoes, b-values, frames of a
    cine). ``spacing`` (mm) and the affine's first three columns follow the spatial axes in array order:
    ``affine @ (z, y, x, 1)`` is the centre of voxel ``[z, y, x]`` in the patient's LPS coordinates, in millimetres
    (PS3.3 §C.7.6.2.1.1). Without a ``z`` it is 0, and there is no patient: the affine's origin is the first pixel.
    ``units`` is what a value measures ("HU"), or "".

    An embedding lies nowhere in a patient: it has no ``axes``, and ``spacing`` and ``affine`` are None.
    """

    dtype: DType
    shape: tuple[int, ...]
    axes: str
    spacing: Spacing | None
    affine: Affine | None
    units: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def array(self, buffer: memoryview) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
        """A view of ``buffer`` (at least ``nbytes`` long) as this tensor; read-only if the buffer is."""
        return np.frombuffer(buffer, dtype=self.dtype, count=math.prod(self.shape)).reshape(self.shape)


class ModelIdentity(msgspec.Struct, frozen=True):
    """A model as a server has loaded it: its name, the version that answers, and a digest of its configuration."""

    name: str
    version: str
    config: str


class Lineage(msgspec.Struct, frozen=True, gc=False):
    """What an entry was made from and by, enough to make it again.

    The objects themselves are in the catalogue, under ``source_version``.
    """

    source_version: str
    objects: int
    source_bytes: int
    recipe_name: str = ""
    recipe: str = ""  # canonical text: the ops, their versions and parameters
    decoders: dict[str, str] = {}  # transfer syntax UID → decoder and its version
    software: str = ""
    made_at: float = 0.0  # Unix seconds
    stages: dict[str, float] = {}  # seconds each stage of the fill took
    modality: str = ""  # of the series (0008,0060); "" if unknown
    model: ModelIdentity | None = None  # what made an embedding of the tensor
    host: str = ""  # where it was made


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One immutable value: its key, size, spec (packs have none) and lineage.

    ``cost_s``: seconds it took to make, an embedding's tensor and its inference included.
    """

    key: Key
    nbytes: int
    spec: TensorSpec | None
    lineage: Lineage
    cost_s: float = 0.0


def checksum(data: memoryview) -> str:
    """XXH3-64 of ``data`` as 16 hex digits. It finds decay and torn writes; it is no defence against an attacker."""
    return xxhash.xxh3_64_hexdigest(data)


def checksums(payload: memoryview) -> tuple[str, ...]:
    """One checksum for each CHUNK of ``payload``, the last one perhaps shorter."""
    return tuple(checksum(payload[start : start + CHUNK]) for start in range(0, len(payload), CHUNK))
