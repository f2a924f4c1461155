"""Identities: what a series, a source version and an entry are called.

A key holds everything its value depends on, so an entry can neither be stale nor mixed: a changed source has another
version, a changed recipe another digest, and both make another key.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from .errors import MalformedReference, MalformedUid

Kind = Literal["pack", "tensor", "embedding", "result"]

#: In a pack's key for a recipe's digest: how it is laid out. Another layout is another key.
PACK_FORM: Final = "tar 2"

# PS3.5 §9.1 also forbids leading zeros in a component. Real archives hold such UIDs, they harm nobody, and refusing
# them would make their studies unreachable.
_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_uid(uid: str) -> str:
    """Return ``uid`` if it is a DICOM UID (PS3.5 §9.1: digits and dots, at most 64 characters).

    Raises:
        MalformedUid: it is not.
    """
    if len(uid) > 64 or not _UID.fullmatch(uid):
        shown = uid if len(uid) <= 80 else uid[:80] + "…"
        raise MalformedUid(f"{shown!r} is not a DICOM UID: digits in groups joined by dots, 64 characters at most")
    return uid


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can name a recipe or a namespace: a letter or digit, then letters, digits, ``_ . -``.

    Raises:
        MalformedReference: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise MalformedReference(f"{name[:80]!r} cannot name a {what}: use letters, digits, '_', '.' and '-'")
    return name


def digest(*parts: str) -> str:
    """32 hex digits (BLAKE2b, 128 bits) over ``parts``, each framed by its length so that no two lists collide."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


class SeriesRef(msgspec.Struct, frozen=True, order=True):
    """One series of one study, by their UIDs."""

    study: str
    series: str

    @classmethod
    def parse(cls, study: str, series: str) -> "SeriesRef":
        """Raises: MalformedUid."""
        return cls(check_uid(study), check_uid(series))


class SourceObject(msgspec.Struct, frozen=True, order=True):
    """One object of the origin: its key, size in bytes, ETag (without quotes) and, in a versioned bucket, version."""

    key: str
    size: int
    etag: str
    version: str = ""


class Manifest(msgspec.Struct, frozen=True):
    """The objects of one series as the origin has them, sorted by key: the source of truth once it is read."""

    ref: SeriesRef
    objects: tuple[SourceObject, ...]
    source_version: str

    @classmethod
    def of(cls, ref: SeriesRef, objects: Iterable[SourceObject]) -> "Manifest":
        ordered = tuple(sorted(objects))
        parts = (part for o in ordered for part in (o.key, o.version or o.etag, str(o.size)))
        return cls(ref, ordered, digest(*parts))


class Key(msgspec.Struct, frozen=True, gc=False, cache_hash=True):
    """What an entry is called in every tier. ``recipe`` is the recipe's digest, not its name."""

    namespace: str
    kind: Kind
    study: str
    series: str
    source_version: str
    recipe: str

    @classmethod
    def pack(cls, namespace: str, manifest: Manifest) -> "Key":
        return cls(namespace, "pack", manifest.ref.study, manifest.ref.series, manifest.source_version, PACK_FORM)

    @classmethod
    def tensor(cls, namespace: str, manifest: Manifest, recipe_digest: str) -> "Key":
        ref = manifest.ref
        return cls(namespace, "tensor", ref.study, ref.series, manifest.source_version, recipe_digest)

    @classmethod
    def embedding(cls, namespace: str, manifest: Manifest, recipe_digest: str) -> "Key":
        """``recipe_digest`` covers the model, too."""
        return msgspec.structs.replace(cls.tensor(namespace, manifest, recipe_digest), kind="embedding")

    @classmethod
    def result(cls, source: "Key", question: str) -> "Key":
        """What a model answered to a question about ``source`` and, perhaps, others; ``question`` is its digest."""
        return msgspec.structs.replace(source, kind="result", recipe=question)

    @property
    def ref(self) -> SeriesRef:
        return SeriesRef(self.study, self.series)

    @property
    def digest(self) -> str:
        """32 hex digits: the entry's file name, and its ETag."""
        return digest(self.namespace, self.kind, self.study, self.series, self.source_version, self.recipe)


class TensorRef(msgspec.Struct, frozen=True):
    """What a caller asks for: a series, prepared by a recipe (by name), within a namespace.

    ``version`` is the source version it must be made from; "" for what the series consists of now.
    """

    ref: SeriesRef
    recipe: str
    namespace: str = "serving"
    version: str = ""

    def __str__(self) -> str:
        """``study/series/recipe``, as ``parse`` reads it."""
        return f"{self.ref.study}/{self.ref.series}/{self.recipe}"

    @classmethod
    def parse(cls, text: str, *, default_recipe: str | None = None, namespace: str = "serving") -> "TensorRef":
        """Read ``[voxcache:]study/series[/recipe]``.

        Raises:
            MalformedReference: it has another form, or names no recipe where none is the default.
            MalformedUid: study or series is no UID.
        """
        parts = text.removeprefix("voxcache:").strip("/").split("/")
        if len(parts) == 2 and default_recipe is not None:
            parts.append(default_recipe)
        if len(parts) != 3:
            raise MalformedReference(f"{text[:200]!r} is no reference: write 'study/series/recipe'")
        return cls(SeriesRef.parse(parts[0], parts[1]), check_name(parts[2], "recipe"), namespace)
