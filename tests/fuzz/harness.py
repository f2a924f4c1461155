"""The way of one object from anybody, as workers go it, and what must hold on it whatever its bytes are.

Refusals are fine, if they are ours. Found are: any other exception, more memory or time than bytes and volume account
for, a header or plan that does not survive its way between processes, and a volume with holes.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from cache.dicom.ahead import Guess, guess
from cache.dicom.assemble import VolumeOptions, VolumePlan, plan_volume
from cache.dicom.decode import decode_plan, decode_slice
from cache.dicom.header import InstanceHeader, identify, read_header
from cache.dicom.index import read_index, write_index
from cache.errors import BadRequest, BadSource

#: CPU seconds that one object may take; a whole one of these sizes takes milliseconds.
MOST_SECONDS: Final = 3.0
#: Private memory that an object may take besides its volume.
MOST_MEMORY: Final = 1 << 30

#: Larger volumes are planned, not decoded: in the daemon these come out of the arena, which may have no room.
_MOST_VOLUME: Final = 64 << 20
#: Slices of one plan that are decoded.
_MOST_SLICES: Final = 32

_ALONE: Final = (
    VolumeOptions(),
    VolumeOptions(rescale=False, monochrome1="invert"),
    VolumeOptions(units="real_world"),
    VolumeOptions(units="suvbw"),
    VolumeOptions(kind="frames"),
    VolumeOptions(kind="frames", rescale=False),
    VolumeOptions(kind="image"),
    VolumeOptions(dimensions="4d"),
)
_TOGETHER: Final = (VolumeOptions(), VolumeOptions(select="largest"), VolumeOptions(dimensions="4d"))

_T = TypeVar("_T")


class Broken(AssertionError):
    """A promise that an object made us break."""


class Harness:
    """Holds what an object may be put beside."""

    def __init__(self, neighbours: Sequence[bytes]) -> None:
        self._neighbours = [memoryview(data) for data in neighbours]
        self._headers = [read_header(data, 1 + number) for number, data in enumerate(self._neighbours)]

    def check(self, data: bytes) -> bool:
        """Whether anything could be made of the object. Raises: whatever should not happen."""
        began = time.process_time()
        made = self._check(data)
        if (spent := time.process_time() - began) > MOST_SECONDS:
            raise Broken(f"it took {spent:.1f} s")
        return made

    def _check(self, data: bytes) -> bool:
        for nbytes in (len(data), 1024, 300):
            _answer(identify, data[:nbytes])
        header = _answer(read_header, memoryview(data), 0)
        if header is None:
            return False
        _travels(header, InstanceHeader)
        # Where elements are out of order, its beginning may not tell; but it must not tell something else.
        if _answer(identify, data) not in (None, (header.study, header.series, header.instance)):
            raise Broken("its header and its beginning name different objects")
        made = False
        for options in _ALONE:
            made |= _make([header], options, [memoryview(data)])
        room = memoryview(bytearray(64 << 10))
        if write_index([header], room) and read_index(room) != (header,):
            raise Broken("its header is another one in an index")
        told = _answer(guess, [header, *self._headers], 3, VolumeOptions())
        if told is not None:
            _travels(told, Guess)
            _foreseen(told, header, memoryview(data))
        for options in _TOGETHER:
            made |= _make([header, *self._headers], options, [memoryview(data), *self._neighbours])
        return made


def _foreseen(told: Guess, header: InstanceHeader, data: memoryview) -> None:
    """What is decoded ahead stays within its slice, and may be refused as anything may."""
    piece = told.place(header)
    if piece is None or told.spec.nbytes > _MOST_VOLUME:
        return
    volume = np.zeros(told.spec.shape, told.spec.dtype)
    _answer(decode_slice, data, header, piece, volume[piece.at])


def _make(headers: Sequence[InstanceHeader], options: VolumeOptions, objects: Sequence[memoryview]) -> bool:
    plan = _answer(plan_volume, headers, options)
    if plan is None:
        return False
    _travels(plan, VolumePlan)
    if plan.spec.nbytes > _MOST_VOLUME:
        return False
    part = plan.part(plan.slices[:_MOST_SLICES])
    made = [_decoded(part, [objects[header.member] for header in part.objects], fill) for fill in (b"\x55", b"\xaa")]
    if made[0] is None or made[1] is None:
        if made != [None, None]:
            raise Broken("the same bytes are decoded once and refused once")
        return False
    if made[0].tobytes() != made[1].tobytes():
        raise Broken("its volume has values that nothing gave it")
    return True


def _decoded(plan: VolumePlan, objects: Sequence[memoryview], fill: bytes) -> npt.NDArray[Any] | None:
    """The planned slices, which were ``fill`` before; None if they are refused."""
    volume = np.frombuffer(bytearray(fill) * plan.spec.nbytes, plan.spec.dtype).reshape(plan.spec.shape)
    return _answer(_decode, objects, plan, volume)


def _decode(objects: Sequence[memoryview], plan: VolumePlan, volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
    decode_plan(objects, plan, volume)
    picture = volume.shape[-3:] if plan.spec.axes.endswith("c") else volume.shape[-2:]
    return volume.reshape(-1, *picture)[[piece.at for piece in plan.slices]]


def _answer(ask: Callable[..., _T], *asked: Any) -> _T | None:
    """The answer, or None if it is a refusal that says what is wrong with the object."""
    try:
        return ask(*asked)
    except (BadSource, BadRequest) as refusal:
        cause: BaseException | None = refusal
        while cause is not None:
            if isinstance(cause, MemoryError):
                raise cause from refusal
            cause = cause.__cause__ or cause.__context__
        return None


def _travels(value: Any, kind: Any) -> None:
    if msgspec.json.decode(msgspec.json.encode(value), type=kind) != value:
        raise Broken(f"a {kind.__name__} that is another one after its way between processes")
