"""Which series are near another: a question to the embeddings that are held, answered by looking at every one."""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from cache.entry import Entry, ModelIdentity
from cache.errors import BadRequest
from cache.keys import Key, TensorRef, check_name
from cache.nearest import Metric, Nearest
from cache.store import Store


class QueryRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/embeddings/query``: what to look near, and where.

    ``like`` is a reference (``study/series/recipe``) to an embedding, made if it has to be. In its place, ``vector``
    holds the numbers and ``model`` (``version``, where recipes end in several) says whose embeddings to look at.
    ``metric``: "cosine" and "dot" score high what is near, "l2" low: it is the distance. ``modality`` "" takes all.
    """

    like: str = ""
    vector: Annotated[list[float], msgspec.Meta(max_length=65536)] = []
    model: str = ""
    version: str = ""
    k: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10
    metric: Metric = "cosine"
    namespace: str = "serving"
    modality: str = ""


class Neighbour(msgspec.Struct, frozen=True):
    """One series near what was asked for."""

    study: str
    series: str
    recipe: str
    modality: str
    etag: str
    score: float


class QueryAnswer(msgspec.Struct, frozen=True):
    """The nearest, the nearest first, of as many as were ``searched``; among equals, by study and series."""

    model: ModelIdentity
    searched: int
    neighbours: list[Neighbour]


class _Named(msgspec.Struct, frozen=True, order=True):
    """An embedding among its model's, in the order of equals."""

    study: str
    series: str
    source_version: str
    digest: str
    recipe: str
    modality: str

    @classmethod
    def of(cls, entry: Entry) -> "_Named":
        key, lineage = entry.key, entry.lineage
        return cls(key.study, key.series, key.source_version, key.recipe, lineage.recipe_name, lineage.modality)

    def told(self, namespace: str, score: float) -> Neighbour:
        key = Key(namespace, "embedding", self.study, self.series, self.source_version, self.digest)
        return Neighbour(self.study, self.series, self.recipe, self.modality, key.digest, score)


async def query(store: Store, asked: QueryRequest) -> QueryAnswer:
    """The nearest of one model's embeddings, without the one that was named itself.

    Raises:
        BadRequest: nothing, or two things, to look near; a reference to what is no embedding; a vector that is none.
        UnknownModel, UnknownNamespace, TritonError: as ``Store.model``. And for a reference what the walk raises.
    """
    check_name(asked.namespace, "namespace")
    vector: Sequence[float] | npt.NDArray[Any] = asked.vector
    itself: Key | None = None
    if bool(asked.like) == bool(asked.vector):
        raise BadRequest("say what to look near: either by 'like', a reference, or by 'vector' and 'model'")
    if asked.like:
        itself, model, vector = await _embedding(store, TensorRef.parse(asked.like, namespace=asked.namespace))
    else:
        model = await store.model(asked.model, asked.version)
    nearest: Nearest[_Named] = Nearest(vector, asked.k, asked.metric)
    async for some in store.embeddings(model, asked.namespace):
        kept = [each for each in some if asked.modality in ("", each[0].lineage.modality) and each[0].key != itself]
        _consider(nearest, kept)
    if not nearest.searched and nearest.other_lengths:
        lengths = ", ".join(map(str, sorted(nearest.other_lengths)))
        raise BadRequest(f"the embeddings of {model.name!r} have {lengths} numbers, the vector {np.size(vector)}")
    neighbours = [named.told(asked.namespace, score) for named, score in nearest.found()]
    return QueryAnswer(model, nearest.searched, neighbours)


async def _embedding(store: Store, want: TensorRef) -> tuple[Key, ModelIdentity, npt.NDArray[Any]]:
    outcome = await store.get(want)
    try:
        entry = outcome.entry
        if entry.lineage.model is None or entry.spec is None:
            raise BadRequest(f"recipe {want.recipe!r} makes no embedding: it does not end in a model")
        payload = b"".join([bytes(piece) async for piece in outcome.chunks(0, entry.nbytes)])
        return entry.key, entry.lineage.model, entry.spec.array(memoryview(payload))
    finally:
        outcome.release()


def _consider(nearest: Nearest[_Named], embeddings: list[tuple[Entry, bytes]]) -> None:
    # those of one recipe are alike: only runs of the same type and length can be looked at together
    for (dtype, _), run in itertools.groupby(embeddings, _form):
        entries, payloads = zip(*run, strict=True)
        rows = np.frombuffer(b"".join(payloads), dtype).reshape(len(entries), -1)
        nearest.add(lambda at, entries=entries: _Named.of(entries[at]), rows)  # type: ignore[misc]  # mypy infers no type for a default


def _form(embedding: tuple[Entry, bytes]) -> tuple[str, int]:
    spec = embedding[0].spec
    assert spec is not None  # only packs have none
    return spec.dtype, len(embedding[1])
