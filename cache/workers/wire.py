"""What the pool and its workers say to each other: JSON frames, each checked against its type on arrival.

Never pickle: an answer comes from a process that has read hostile bytes, and must not become code here.
"""

from io import BufferedIOBase
from typing import Any, Final

import msgspec

from cache.attributes import Attributes
from cache.dicom.ahead import Guess
from cache.dicom.assemble import SlicePlan, VolumePlan
from cache.dicom.header import InstanceHeader
from cache.entry import TensorSpec
from cache.errors import BadSource, VoxcacheError, WorkerFailed, every_error
from cache.interfaces import Extent
from cache.pack import Member

#: Bytes of the longest answer taken: the plan of a series of some 50 000 instances.
LONGEST: Final = 64 << 20
PREFIX: Final = 4


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first job of a worker, answered by ``decoders()``.

    ``memory``: bytes that a job may allocate. ``nice``: how far it stands back for the daemon.
    """

    memory: int
    plugins: tuple[str, ...]
    nice: int


class Identify(msgspec.Struct, frozen=True, tag=True):
    """Answered by the study, series and SOP instance UIDs in the first bytes of a file."""

    head: bytes


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Answered by the Attributes in the first bytes of a file, the patient hashed with ``key``."""

    head: bytes
    key: bytes


class Ahead(msgspec.Struct, frozen=True):
    """A volume that is decoded to ``volume`` before all of its objects are there."""

    guess: Guess
    volume: Extent


class ReadHeaders(msgspec.Struct, frozen=True, tag=True):
    """Answered by the Headers of ``members``, each with its position in the pack.

    With ``ahead``, slices whose place it tells are decoded as well. One that cannot be is no failure of this job.
    """

    pack: Extent
    members: tuple[tuple[int, Member], ...]
    ahead: Ahead | None = None


class Headers(msgspec.Struct, frozen=True):
    """What was read, and the slices that were decoded, each with its member's position as ``object``."""

    headers: tuple[InstanceHeader, ...]
    decoded: tuple[SlicePlan, ...] = ()


class Foresee(msgspec.Struct, frozen=True, tag=True):
    """Answered by the Guess, or None, at what a series of ``count`` objects, some of them ``headers``, will become."""

    headers: tuple[InstanceHeader, ...]
    count: int
    recipe: str


class Arrange(msgspec.Struct, frozen=True, tag=True):
    """Answered by the Plan for a pack with these headers, which are kept in its ``index``.

    Without ``headers`` they are read from there; the answer is None if there are none.
    """

    headers: tuple[InstanceHeader, ...] | None
    recipe: str
    index: Extent


class Decode(msgspec.Struct, frozen=True, tag=True):
    """Decode the slices in ``plan``, whose objects are ``members``, in order, to their place in ``volume``."""

    pack: Extent
    members: tuple[Member, ...]
    plan: VolumePlan
    volume: Extent


class RunSteps(msgspec.Struct, frozen=True, tag=True):
    """Run the recipe's steps on ``volume``, writing to ``result``."""

    recipe: str
    spec: TensorSpec
    volume: Extent
    result: Extent


Job = Setup | Identify | Describe | ReadHeaders | Foresee | Arrange | Decode | RunSteps


class Plan(msgspec.Struct, frozen=True):
    """How a pack becomes a tensor: the volume that is decoded first, and the spec of the recipe's result.

    ``modality``: what the objects say of themselves (0008,0060).
    """

    volume: VolumePlan
    spec: TensorSpec
    modality: str = ""


class Failure(msgspec.Struct, frozen=True):
    """An error of ``cache.errors``, by its code."""

    code: str
    message: str
    instances: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: VoxcacheError) -> "Failure":
        return cls(error.code, str(error), error.instances if isinstance(error, BadSource) else ())

    def error(self) -> VoxcacheError:
        """The error again; a WorkerFailed if it is none that a worker can raise."""
        kind = _ERRORS.get(self.code, WorkerFailed)
        if issubclass(kind, BadSource):
            return kind(self.message, self.instances)
        return kind(self.message)


class Reply(msgspec.Struct, frozen=True):
    """A worker's answer to a job: its value as JSON, or why there is none."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    failure: Failure | None = None


_ANSWERS: Final[dict[type[Job], Any]] = {
    Setup: dict[str, str],
    Identify: tuple[str, str, str],
    Describe: Attributes,
    ReadHeaders: Headers,
    Foresee: Guess | None,
    Arrange: Plan | None,
    Decode: None,
    RunSteps: None,
}

# Errors made of a message alone; the few others speak of requests and of Triton, which workers know nothing about.
_ERRORS: Final[dict[str, type[VoxcacheError]]] = {
    error.code: error for error in every_error() if error.__init__ in (VoxcacheError.__init__, BadSource.__init__)
}


def frame(message: msgspec.Struct) -> bytes:
    """``message`` as it goes over the socket: its length (4 bytes, big-endian), then JSON."""
    data = msgspec.json.encode(message)
    return len(data).to_bytes(PREFIX, "big") + data


def read_job(stream: BufferedIOBase) -> Job | None:
    """The next job, or None when the pool has closed the socket. Jobs are trusted: the daemon wrote them."""
    prefix = stream.read(PREFIX)
    if len(prefix) < PREFIX:
        return None
    job: Job = msgspec.json.decode(stream.read(int.from_bytes(prefix, "big")), type=Job)
    return job


def read_reply(data: bytes, job: Job) -> object:
    """The value of the reply to ``job``, of the type its docstring names, or the error it failed with.

    Raises:
        msgspec.DecodeError: ``data`` is no such reply.
    """
    reply = msgspec.json.decode(data, type=Reply)
    if reply.failure is not None:
        return reply.failure.error()
    return msgspec.json.decode(reply.value, type=_ANSWERS[type(job)])
