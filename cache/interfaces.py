"""The seams: what the rooms ask of each other, as small protocols. No implementation lives here.

Tier and Origin have one conformance test class each (``tests/conformance``); whatever implements them passes it.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

import msgspec

from .attributes import Attributes
from .entry import Entry, ModelIdentity, TensorSpec
from .keys import Key, SourceObject

if TYPE_CHECKING:  # they are made of what is defined here
    from .pack import Layout
    from .recipe.chain import Infer, Recipe
    from .workers.wire import Plan


class Clock(Protocol):
    """Time, injected wherever it decides something."""

    def now(self) -> float:
        """Unix seconds."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start that never go back."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class Extent(msgspec.Struct, frozen=True):
    """``nbytes`` bytes at ``offset`` of a file that other processes can map (the arena, or a file being filled)."""

    path: str
    offset: int
    nbytes: int


@runtime_checkable
class Space(Protocol):
    """Bytes reserved in a tier for an entry that is being made. Either the tier admits it, or it is released."""

    @property
    def extent(self) -> Extent: ...

    @property
    def view(self) -> memoryview:
        """The bytes, writable, exactly as many as were asked for."""

    def release(self) -> None:
        """Give the bytes back. Harmless when repeated, and after the entry was admitted."""


class Usage(msgspec.Struct, frozen=True):
    """What a tier (or one namespace of it) holds, in bytes; a namespace's ``reserved`` ones nobody can take from it."""

    used: int
    budget: int
    entries: int
    reserved: int = 0


class Residency(msgspec.Struct, frozen=True):
    """One entry in one tier, for people to look at."""

    key: Key
    tier: str
    nbytes: int
    last_use: float  # Unix seconds
    uses: int
    pins: int


#: Whether an entry, last used then (Unix seconds), must not go to make room for what is being done now.
Spares = Callable[[Key, float], bool]


class Tier(Protocol):
    """A bounded place for entries. Tiers never know each other; only the store knows more than one.

    ``write`` returns False, having changed nothing, when the entry cannot be held now (no room that may be freed).
    ``read_into`` raises KeyError for an absent key and CorruptEntry for bytes that fail their checksum; the entry is
    gone after that.
    """

    name: str

    def lookup(self, key: Key) -> Entry | None:
        """The entry if it is here. No I/O."""

    async def write(self, entry: Entry, payload: memoryview) -> bool:
        """Hold a copy of ``payload``, ``entry.nbytes`` long. Writing a key that is held already changes nothing."""

    async def read_into(self, key: Key, out: memoryview) -> Entry:
        """Copy the verified payload to ``out`` (exactly ``entry.nbytes`` long)."""

    def evict(self, key: Key) -> bool:
        """Drop the entry; False if it is absent or pinned."""

    def residents(self) -> Iterator[Residency]: ...

    def keys(self) -> list[Key]:
        """What is here now."""

    def usage(self, namespace: str | None = None) -> Usage: ...


K = TypeVar("K", bound=Hashable)


class EvictionPolicy(Protocol[K]):
    """Which entry goes first. Pure bookkeeping over (key, size, cost, time): no I/O, no bytes, no clock of its own.

    ``size`` is in bytes, ``cost`` in seconds that making the entry took, ``now`` in Unix seconds.
    """

    def admitted(self, key: K, size: int, cost: float, now: float) -> None:
        """``key``, which was not held, is from now on."""

    def restored(self, entries: Sequence[tuple[K, int, float, float]]) -> None:
        """The (key, size, cost, last use) that a tier starts with, the least recently used first. It held none before.

        As if each had been admitted, but nothing is learned from it, and it may take less.
        """

    def used(self, key: K, now: float) -> None:
        """A request hit ``key``."""

    def evicted(self, key: K) -> None:
        """``key``, one of the victims, has gone to make room."""

    def removed(self, key: K) -> None:
        """``key`` has gone for another reason, which says nothing of its worth."""

    def victims(self) -> Iterator[K]:
        """Every key that is held, once, in the order they should go. Looking changes nothing.

        The caller skips what is pinned and stops when it has room; it must not change anything while it iterates.
        """


class WriteAdmission(Protocol):
    """Which entries that were just made are worth a write to NVMe. Pure bookkeeping, as EvictionPolicy is."""

    def admits(self, key: Key, size: int) -> bool:
        """Whether to write an entry of ``size`` bytes. Asked once each time that it is made."""


class Origin(Protocol):
    """The system of record: a bucket, a directory. It is only ever read.

    Every method raises OriginDenied or OriginDown (after the retries it has been configured for).
    """

    name: str

    async def list(self, prefix: str) -> Sequence[SourceObject]:
        """All objects whose key starts with ``prefix``, sorted by key; none is an empty answer."""

    async def dated(self, prefix: str) -> Sequence[tuple[SourceObject, float]]:
        """As ``list``, each with when it was last written: Unix seconds, by the origin's clock."""

    async def read(self, key: str, limit: int | None = None) -> bytes | None:
        """The first ``limit`` bytes of a small object (all of it by default), or None if there is no such object."""

    async def fetch(self, source: SourceObject, into: memoryview) -> None:
        """Write the object's bytes to ``into`` (exactly ``source.size`` long).

        Raises:
            OriginChanged: the object is gone, or is not the one with this ETag and size any more.
        """

    async def close(self) -> None: ...


#: Where so many bytes of a volume can be written before its series is complete; None: nowhere, for now.
Room = Callable[[int], Extent | None]


class Derivation(Protocol):
    """What becomes of one pack. Its objects may still be arriving: what can be done with those that are there, is."""

    def arrived(self, member: int) -> None:
        """The object with this number is in the pack now, whole."""

    async def plan(self) -> "Plan":
        """Once all objects have arrived: the volume, and the recipe's result. Nothing writes to the room any more.

        Raises: BadSource, BadRequest (an op cannot be applied to the volume), WorkerFailed.
        """

    async def derive(self, pack: Extent, volume: Extent, result: Extent | None) -> dict[str, float]:
        """Write the volume, and with steps the ``result``; the seconds each stage took, queueing included.

        ``pack`` is where its bytes are by now. ``result`` is None if, and only if, the recipe has no steps: ``volume``
        is its result. What was written to the room before is kept where ``volume`` is that room.

        Raises: BadSource, BadRequest (the values do not allow an op), WorkerFailed.
        """


Availability = Literal["there", "archived", "restoring"]


@runtime_checkable
class Archive(Protocol):
    """What an origin does besides, if it keeps objects where they cannot be read at once (``Archived`` is raised)."""

    async def availability(self, source: SourceObject) -> Availability:
        """Whether the object can be read, must be asked back, or was. Raises: as ``Origin.fetch``."""

    async def restore(self, source: SourceObject, days: int, tier: str) -> None:
        """Ask the object back for ``days``; no harm if it was before. Raises: as ``Origin.fetch``."""


class Deriver(Protocol):
    """What makes tensors of packs, outside the daemon's own process. The store gives it the places to write to."""

    @property
    def decoders(self) -> Mapping[str, str]:
        """Transfer syntax UID → decoder and its version: part of what the values depend on."""

    async def describe(self, head: bytes, key: bytes) -> Attributes:
        """The attributes in the first bytes of an object. Raises: NotDicom, TruncatedObject, WorkerFailed."""

    def derivation(
        self,
        pack: Extent,
        layout: "Layout",
        recipe: "Recipe",
        room: Room,
        stored: bool = False,
    ) -> AbstractAsyncContextManager[Derivation]:
        """Begin with a pack that is being filled, or one that is ``stored``: complete, perhaps with its index.

        ``room`` is asked at most once, if where slices will lie can be told before all of them have arrived. However
        the context ends, cancellation included, nothing writes to any extent any more; likewise when ``derive`` ends.
        """


class Encoded(msgspec.Struct, frozen=True):
    """What a model made of a tensor: small, and on its way to an extent of its own."""

    spec: TensorSpec
    data: bytes


class Encoder(Protocol):
    """What runs models on tensors in RAM. Who a model is may change while it is known by the same name."""

    def known(self, infer: "Infer") -> ModelIdentity | None:
        """Who the model is, as was last heard of it; None if nothing was. No I/O: hits are named by it."""

    async def identify(self, infer: "Infer") -> ModelIdentity:
        """Ask who the model is. Raises: TritonError."""

    async def encode(
        self, infer: "Infer", model: ModelIdentity, spec: TensorSpec, tensor: Extent, release: Callable[[], None]
    ) -> Encoded:
        """Run the model on a tensor. ``release`` is called once, however this ends, when nothing reads it any more.

        Raises:
            BadRequest: the model takes no such tensor, or gives what no entry can hold.
            ModelChanged: it is another one than ``model`` by now, which is known from now on.
            TritonError: it did not answer as it should.
        """


class Observer(Protocol):
    """Hears what happens, for metrics. It must return at once and must not raise."""

    def stage(self, name: str, seconds: float) -> None:
        """A stage of a walk ended, or of something that is done for one."""

    def count(self, name: str, labels: Iterable[str] = (), amount: float = 1.0) -> None:
        """Something countable happened ``amount`` times."""

    def observe(self, name: str, seconds: float) -> None:
        """Something else than a stage took so long."""

    def answered(self, tier: str, entry: Entry) -> None:
        """Somebody who waits got an entry, which ``tier`` had; "origin": it was made for that."""


class NullObserver:
    """Hears everything, keeps nothing."""

    def stage(self, name: str, seconds: float) -> None:
        return

    def count(self, name: str, labels: Iterable[str] = (), amount: float = 1.0) -> None:
        return

    def observe(self, name: str, seconds: float) -> None:
        return

    def answered(self, tier: str, entry: Entry) -> None:
        return
