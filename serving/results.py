"""Answers of models, kept as entries: asked the same of the same studies, a model need not run again.

An answer's key is a digest over all that it depends on: the tensors that the question names, by their keys, so that
none of them is read or even there; whatever else the request holds; and who the model is.
"""

import asyncio
import hashlib
import socket
from collections.abc import Mapping
from typing import Any, Final, Protocol

import msgspec

from cache import __version__
from cache.entry import Entry, Lineage, ModelIdentity, TensorSpec
from cache.errors import TritonError
from cache.interfaces import Clock, Observer
from cache.keys import Key, TensorRef, digest

from .models import Models
from .triton import TritonSettings

#: Request parameters that make no difference to what a model answers.
INDIFFERENT: Final = frozenset({"priority", "timeout"})
#: Request parameters by which requests belong together (Triton's sequence extension).
_SEQUENCE: Final = ("sequence_id", "sequence_start", "sequence_end")


#: Answers that may wait to be kept; past that one is not kept.
_BEHIND: Final = 64


class Question(msgspec.Struct, frozen=True):
    """What is asked of a model.

    ``named``: by input, the tensors that are named and which part of each, "" for all of it. ``form``: how its answer
    is written, since the doors write it differently. ``rest``: everything else that an answer depends on, as the door
    has it: other inputs, outputs, parameters.
    """

    model: str
    version: str
    named: Mapping[str, tuple[tuple[TensorRef, str], ...]]
    form: str
    rest: bytes


class Place(msgspec.Struct, frozen=True):
    """Where the answer to a question is, or will be."""

    key: Key
    model: ModelIdentity
    asked: str  # the version that was asked for
    text: str  # all that the answer depends on


class Found(Protocol):
    """An entry that was held."""

    @property
    def tier(self) -> str: ...

    def copy(self) -> bytes: ...

    def release(self) -> None: ...


class Shelf(Protocol):
    """What is known of the store here."""

    async def key(self, want: TensorRef) -> Key:
        """Which entry a reference means now. Raises: what the walk raises until it knows."""

    async def find(self, key: Key) -> Found | None:
        """The entry, if it is held."""

    async def keep(self, entry: Entry, payload: bytes) -> bool:
        """Hold an entry; False if there is no room for it now."""


class Kept(msgspec.Struct, frozen=True):
    """An answer that was held, and in which tier."""

    answer: bytes
    tier: str


class Results:
    """Finds and keeps answers. Only models that are set to (``triton.models.<model>.results``) have any."""

    def __init__(
        self, store: Shelf, models: Models, settings: TritonSettings, clock: Clock, observer: Observer
    ) -> None:
        self._store = store
        self._models = models
        self._settings = settings
        self._clock = clock
        self._observer = observer
        self._behind: set[asyncio.Task[None]] = set()

    def keeps(self, model: str, parameters: Mapping[str, Any]) -> bool:
        """Whether answers to such requests are kept at all."""
        return self._settings.virtual(model).results and not any(parameters.get(name) for name in _SEQUENCE)

    async def place(self, question: Question) -> Place | None:
        """Where the question's answer belongs; None: nowhere, the model may answer differently next time.

        Raises: what ``Store.key`` raises, TritonDown, TritonRefused.
        """
        served = self._models.known(question.model, question.version)
        if served is None or not served.repeats:
            served = await self._models.identify(question.model, question.version)
        if not served.repeats or not question.named:
            return None
        named = {
            name: [(await self._store.key(want), part) for want, part in wants]
            for name, wants in sorted(question.named.items())
        }
        told = {
            "model": served.identity,
            "named": {name: [(key.digest, part) for key, part in keys] for name, keys in named.items()},
            "form": question.form,
            "rest": hashlib.blake2b(question.rest, digest_size=16).hexdigest(),
        }
        text = msgspec.json.encode(told, order="sorted").decode()
        first = next(iter(named.values()))[0][0]
        return Place(Key.result(first, digest(text)), served.identity, question.version, text)

    async def find(self, place: Place) -> Kept | None:
        """The answer, if it is held."""
        hit = await self._store.find(place.key)
        self._observer.count("results", ("hit" if hit is not None else "miss",))
        if hit is None:
            return None
        try:
            return Kept(hit.copy(), hit.tier)
        finally:
            hit.release()

    def keep(self, place: Place, answer: bytes, seconds: float) -> None:
        """Hold the answer, which took ``seconds``, once it is certain who gave it: the client need not wait for that.

        One that is too long, or whose model was replaced meanwhile, is not kept.
        """
        if 0 < len(answer) <= self._settings.max_result and len(self._behind) < _BEHIND:
            task = asyncio.create_task(self._keep(place, answer, seconds))
            self._behind.add(task)
            task.add_done_callback(self._behind.discard)

    @property
    def longest(self) -> int:
        """The longest answer that is kept, in bytes."""
        return self._settings.max_result

    def loaded(self, model: str) -> None:
        """The model was loaded anew: what it answered before may not be what it would answer now."""
        self._models.loaded(model)

    async def close(self) -> None:
        """Keep nothing more."""
        for task in self._behind:
            task.cancel()
        await asyncio.gather(*self._behind, return_exceptions=True)

    async def _keep(self, place: Place, answer: bytes, seconds: float) -> None:
        try:
            await self._models.confirm(place.model, place.asked)
        except TritonError:
            return  # it was replaced, or nobody knows who answered
        lineage = Lineage(
            source_version=place.key.source_version,
            objects=0,
            source_bytes=0,
            recipe_name=place.model.name,
            recipe=place.text,
            software=f"voxcache {__version__}",
            made_at=self._clock.now(),
            model=place.model,
            host=socket.gethostname(),
        )
        spec = TensorSpec("uint8", (len(answer),), "", None, None)
        await self._store.keep(Entry(place.key, len(answer), spec, lineage, seconds), answer)
