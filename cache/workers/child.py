"""A worker: ``python -m cache.workers.child FD`` answers jobs from the socket FD, one at a time, until it is closed.

It holds as little as it can: no credentials, no more memory than a job may have, and only the extents of its current
job are mapped, those it reads from read-only. It dies with the daemon, even in the middle of a job.
"""

import contextlib
import ctypes
import functools
import gc
import math
import mmap
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cache.dicom.ahead import Guess, guess
from cache.dicom.assemble import SlicePlan, plan_volume
from cache.dicom.decode import decode_plan, decode_slice, decoders
from cache.dicom.header import InstanceHeader, describe, identify, read_header
from cache.dicom.index import read_index, write_index
from cache.errors import BadSource, VoxcacheError, WorkerFailed, WorkerOutOfMemory
from cache.interfaces import Extent
from cache.pack import Member, member_name
from cache.recipe.chain import Recipe, known_ops, read_canonical

from .wire import (
    Ahead,
    Arrange,
    Decode,
    Describe,
    Failure,
    Foresee,
    Headers,
    Identify,
    Job,
    Plan,
    ReadHeaders,
    Reply,
    RunSteps,
    Setup,
    frame,
    read_job,
)

_PR_SET_PDEATHSIG = 1


def main(fd: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for stop in (signal.SIGINT, signal.SIGTERM):
        # Sent to the whole process group as a rule; the daemon decides when its drain is over.
        signal.signal(stop, signal.SIG_IGN)
    with socket.socket(fileno=fd) as sock, sock.makefile("rwb") as stream:
        worker = Worker()
        while (job := read_job(stream)) is not None:
            stream.write(frame(worker.answer(job)))
            stream.flush()


class Worker:
    """What a job may use that outlives it."""

    def __init__(self) -> None:
        self._plugins: tuple[str, ...] = ()
        self._recipe = functools.lru_cache(maxsize=64)(self._read_recipe)

    def answer(self, job: Job) -> Reply:
        """The reply to ``job``. Never raises for what a job does; once it returns, no extent is mapped any more."""
        try:
            value = self._do(job)
            reply = Reply(value=msgspec.Raw(msgspec.json.encode(value)))
        except Exception as exc:
            reply = Reply(failure=Failure.of(_error(exc, type(job).__name__)))
        gc.collect()
        return reply

    def _do(self, job: Job) -> object:  # noqa: PLR0911 - one for each kind of job
        match job:
            case Setup():
                return self._setup(job)
            case Identify():
                return identify(job.head)
            case Describe():
                return describe(job.head, job.key)
            case ReadHeaders():
                return self._read_headers(job)
            case Foresee():
                return self._foresee(job)
            case Arrange():
                return self._arrange(job)
            case Decode():
                self._decode(job)
            case RunSteps():
                self._run(job)
        return None

    def _setup(self, job: Setup) -> dict[str, str]:
        known_ops(job.plugins)
        self._plugins = job.plugins
        os.nice(job.nice)
        import scipy.ndimage  # noqa: F401 - loaded now, so that the first job need not wait for it

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Private memory only: the extents are shared mappings, which this limit does not count.
        limit = _private_bytes() + job.memory
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        # Up to here a failed start may say why. From now on libraries might print what they read.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)
        found = decoders()
        gc.freeze()
        return found

    def _read_headers(self, job: ReadHeaders) -> Headers:
        pack = _map(job.pack)
        objects = [_of(pack, member) for _, member in job.members]
        headers = tuple(_read_header(data, number) for data, (number, _) in zip(objects, job.members, strict=True))
        return Headers(headers, _decode_ahead(objects, headers, job.ahead) if job.ahead else ())

    def _foresee(self, job: Foresee) -> Guess | None:
        recipe = self._recipe(job.recipe)
        return guess(job.headers, job.count, recipe.volume)

    def _arrange(self, job: Arrange) -> Plan | None:
        headers = job.headers
        if headers is None:
            headers = read_index(_map(job.index))
            if headers is None:
                return None
        else:
            write_index(headers, _map(job.index, writable=True))
        recipe = self._recipe(job.recipe)
        plan = plan_volume(headers, recipe.volume)
        return Plan(plan, recipe.plan(plan.spec), headers[0].modality[:16])

    def _decode(self, job: Decode) -> None:
        pack = _map(job.pack)
        places = {piece.at for piece in job.plan.slices}
        first, last = min(places), max(places) + 1
        dense = len(places) == last - first
        part = _slices(job.volume, job.plan.spec.dtype, job.plan.objects[0].picture, range(first, last), whole=dense)
        decode_plan([_of(pack, member) for member in job.members], job.plan, part, first)

    def _run(self, job: RunSteps) -> None:
        recipe = self._recipe(job.recipe)
        made = recipe.run(job.spec.array(_map(job.volume)), job.spec)
        np.copyto(recipe.plan(job.spec).array(_map(job.result, writable=True, whole=True)), made, casting="no")

    def _read_recipe(self, canonical: str) -> Recipe:
        return read_canonical("job", canonical, self._plugins)


def _decode_ahead(
    objects: list[memoryview], headers: tuple[InstanceHeader, ...], ahead: Ahead
) -> tuple[SlicePlan, ...]:
    """The slices that could be decoded to their place. What cannot is tried again by the plan, and refused there."""
    decoded = []
    for data, header in zip(objects, headers, strict=True):
        piece = ahead.guess.place(header)
        if piece is not None:
            with contextlib.suppress(BadSource):
                [place] = _slices(
                    ahead.volume, ahead.guess.spec.dtype, header.picture, range(piece.at, piece.at + 1), whole=True
                )
                decode_slice(data, header, piece, place)
                decoded.append(piece)
    return tuple(decoded)


def _slices(volume: Extent, dtype: str, picture: tuple[int, ...], places: range, whole: bool) -> Any:
    """Some consecutive slices of a volume, writable, shape (slices, *picture)."""
    first, last = places.start, places.stop
    each = math.prod(picture) * np.dtype(dtype).itemsize
    if not 0 <= first < last <= volume.nbytes // each:
        raise ValueError("a slice beyond the end of its volume")
    part = Extent(volume.path, volume.offset + first * each, (last - first) * each)
    return np.frombuffer(_map(part, writable=True, whole=whole), dtype, (last - first) * math.prod(picture)).reshape(
        -1, *picture
    )


def _read_header(data: memoryview, number: int) -> InstanceHeader:
    try:
        return read_header(data, number)
    except BadSource as error:
        error.instances = error.instances or (member_name(number),)  # it may be too broken to have a UID
        raise


def _error(exc: BaseException, job: str) -> VoxcacheError:
    """``exc`` as one of ours."""
    cause: BaseException | None = exc
    while cause is not None:
        # Decoders report it as an object at fault, which it is not.
        if isinstance(cause, MemoryError):
            return WorkerOutOfMemory(f"a {job} job needed more memory than a job may have (workers.job_memory)")
        cause = cause.__cause__ or cause.__context__
    if isinstance(exc, VoxcacheError):
        return exc
    # The type alone: messages of decoders may quote what they read.
    return WorkerFailed(f"a {job} job failed with {type(exc).__name__}")


def _map(extent: Extent, writable: bool = False, whole: bool = False) -> memoryview:
    """The bytes of ``extent``, mapped until nothing refers to them. No page before or after it is within reach.

    ``whole``: all of it will be touched, so its pages are found at once, which takes a fraction of a fault for each.
    """
    if extent.nbytes < 1:
        raise ValueError("an empty extent")
    lead = extent.offset % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if whole else 0)
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    fd = os.open(extent.path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        mapping = mmap.mmap(fd, lead + extent.nbytes, flags, access, offset=extent.offset - lead)
    finally:
        os.close(fd)
    return memoryview(mapping)[lead:]


def _of(pack: memoryview, member: Member) -> memoryview:
    return pack[member.offset : member.offset + member.nbytes]


def _private_bytes() -> int:
    """Private writable memory of this process now (proc(5), statm: data + stack)."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * mmap.PAGESIZE


if __name__ == "__main__":
    main(int(sys.argv[1]))
