"""Where slices will lie, told from a few objects while the rest of the series is still being fetched.

A guess costs nothing but work: what was decoded by it counts only where the plan of the whole series says the same.
"""

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from cache.entry import TensorSpec
from cache.errors import BadSource

from .assemble import SPACING_RTOL, SlicePlan, VolumeOptions, plan_volume
from .header import InstanceHeader

#: Objects that a guess is made from: two make a line, the third has to lie on it.
ENOUGH: Final = 3


class Guess(msgspec.Struct, frozen=True):
    """A volume of ``spec`` (its place in the patient left open), one slice an object like ``first``.

    With ``numbered`` an object's rank is its Instance Number, which begins at 1, else its place in the pack. Positions
    go on from the first object's by ``step`` (millimetres, LPS) a rank; z runs along the ranks, or ``against`` them.
    """

    spec: TensorSpec
    options: VolumeOptions
    first: InstanceHeader
    slice: SlicePlan
    numbered: bool
    step: tuple[float, float, float]
    against: bool

    def place(self, header: InstanceHeader) -> SlicePlan | None:
        """Which slice the object becomes, with its member's number as ``object``; None if it does not fit in."""
        rank = _rank(header, self.numbered)
        count = self.spec.shape[0]
        if rank is None or not 0 <= rank < count or not _on_line(header, self.first, self.numbered, self.step):
            return None
        values = self.slice
        if _alike(header, self.first) != self.first:
            alone = _alone(header, self.options)
            if alone is None or (alone[0].dtype, alone[0].shape[1:]) != (self.spec.dtype, self.spec.shape[1:]):
                return None
            values = alone[1]
        at = count - 1 - rank if self.against else rank
        return msgspec.structs.replace(values, object=header.member, at=at)


def guess(headers: Sequence[InstanceHeader], count: int, options: VolumeOptions) -> Guess | None:
    """What a series of ``count`` objects will be, by ENOUGH of them or more; None where there is nothing to go by."""
    if len(headers) < ENOUGH or (options.kind, options.select, options.dimensions) != ("volume", "all", "refuse"):
        return None
    first = headers[0]
    alone = _alone(first, options)
    if alone is None or alone[0].affine is None:
        return None
    spec, piece = alone
    for numbered in (False, True):
        step = _step(headers, numbered)
        if step is not None:
            normal = np.array([row[0] for row in alone[0].affine[:3]])
            against = float(np.array(step) @ normal) < 0
            whole = msgspec.structs.replace(spec, shape=(count, *spec.shape[1:]))
            return Guess(whole, options, first, piece, numbered, step, against)
    return None


def _alone(header: InstanceHeader, options: VolumeOptions) -> tuple[TensorSpec, SlicePlan] | None:
    """The object as a volume of its own, if it is one slice."""
    try:
        plan = plan_volume([header], options)
    except BadSource:
        return None
    return (plan.spec, plan.slices[0]) if len(plan.slices) == 1 else None


def _alike(header: InstanceHeader, first: InstanceHeader) -> InstanceHeader:
    """The header, as far as slices of one series do not differ."""
    return msgspec.structs.replace(
        header,
        member=first.member,
        instance=first.instance,
        instance_number=first.instance_number,
        position=first.position,
        distinguishing=first.distinguishing,
        pixel_offset=first.pixel_offset,
        pixel_nbytes=first.pixel_nbytes,
    )


def _rank(header: InstanceHeader, numbered: bool) -> int | None:
    if not numbered:
        return header.member
    return None if header.instance_number is None else header.instance_number - 1


def _step(headers: Sequence[InstanceHeader], numbered: bool) -> tuple[float, float, float] | None:
    """By how much positions go on from rank to rank, if they do so evenly."""
    ranked = [(rank, header) for header in headers if (rank := _rank(header, numbered)) is not None]
    if len(ranked) < len(headers):
        return None
    (low, one), *_, (high, other) = sorted(ranked, key=lambda pair: pair[0])
    if low == high or one.position is None or other.position is None:
        return None
    x, y, z = ((b - a) / (high - low) for a, b in zip(one.position, other.position, strict=True))
    even = all(_on_line(header, headers[0], numbered, (x, y, z)) for header in headers)
    return (x, y, z) if even else None


def _on_line(header: InstanceHeader, first: InstanceHeader, numbered: bool, step: tuple[float, float, float]) -> bool:
    rank, origin = _rank(header, numbered), _rank(first, numbered)
    if rank is None or origin is None or header.position is None or first.position is None:
        return False
    due = [start + (rank - origin) * along for start, along in zip(first.position, step, strict=True)]
    length = math.hypot(*step)
    return length > 0 and math.dist(header.position, due) <= SPACING_RTOL * length
