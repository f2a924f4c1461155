"""How the objects of a series are found: by a manifest beside them, by where they lie, or by their headers."""

import asyncio
import re
import string
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Literal, Protocol, TypeVar

import msgspec

from cache.errors import BadManifest, ConfigError, EmptySeries, MalformedUid, NotDicom, TruncatedObject, UnknownStudy
from cache.interfaces import Origin
from cache.keys import Manifest, SeriesRef, SourceObject

from .together import each

_Told = TypeVar("_Told")

#: More than 100 000 objects fit; a larger manifest is refused before it is parsed.
MANIFEST_BYTES: Final = 32 << 20
#: Bytes of an object in which its UIDs are looked for; the second only where the first end too early.
HEADER_BYTES: Final = (64 << 10, 1 << 20)
#: Objects that are looked at in one go.
_TURN: Final = 256
#: Remembered for an object that is no DICOM file, so that it is read once only.
NO_SERIES: Final = SeriesRef("", "")

#: Reads study, series and SOP instance UID from the first bytes of a DICOM file; raises NotDicom, TruncatedObject.
Identify = Callable[[bytes], Awaitable[tuple[str, str, str]]]


class Identities(Protocol):
    """Remembers which series an object belongs to, for as long as it has this ETag."""

    def identity(self, key: str, etag: str) -> SeriesRef | None:
        """What was remembered (NO_SERIES for an object of none), or None if nothing was."""

    def remember_identity(self, key: str, etag: str, ref: SeriesRef) -> None: ...


class FindSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where series are looked for; each way that is set is tried in this order.

    manifest: key of a series' manifest object, of {study} and {series}; "" for none (docs/manifest.md).
    template: keys of a series' objects, of {study}, {series} and {instance}; "" for none.
    headers: read the header of every object under ``prefix`` once; for buckets that are in no order.
    prefix: where ``headers`` looks.
    header_reads: headers read at the same time.
    """

    manifest: str = "{study}/{series}/manifest.json"
    template: str = "{study}/{series}/{instance}.dcm"
    headers: bool = False
    prefix: str = ""
    header_reads: int = 16


_UID: Final = r"[0-9]+(?:\.[0-9]+)*"
_FIELDS: Final = {"study": _UID, "series": _UID, "instance": r"[^/]+"}


class Template:
    """A pattern of object keys, such as ``{study}/{series}/{instance}.dcm``. Pure.

    Two fields are kept apart by text that no UID can hold, so a key matches in one way only.

    Raises:
        ConfigError: the text is no such pattern, or lacks {study} or {series}.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"template {text!r}: {error}") from None
        names = [name for _, name, _, _ in parts if name is not None]
        if any(format_spec or conversion for _, _, format_spec, conversion in parts) or not set(names) <= set(_FIELDS):
            raise ConfigError(f"template {text!r}: the fields are {{study}}, {{series}} and {{instance}}")
        if not {"study", "series"} <= set(names) or len(set(names)) < len(names):
            raise ConfigError(f"template {text!r}: {{study}} and {{series}} are needed, and each field once only")
        for literal, name, _, _ in parts[1:]:
            if name is not None and not literal.strip("0123456789."):
                raise ConfigError(f"template {text!r}: what stands before {{{name}}} could be part of a UID")
        self._parts = [(literal, name or "") for literal, name, _, _ in parts]
        self._pattern = re.compile(
            "".join(
                re.escape(literal) + (f"(?P<{name}>{_FIELDS[name]})" if name else "") for literal, name in self._parts
            )
        )

    def match(self, key: str) -> SeriesRef | None:
        """The series that an object of this key belongs to, or None if the key has another form."""
        found = self._pattern.fullmatch(key)
        if found is None:
            return None
        try:
            return SeriesRef.parse(found["study"], found["series"])
        except MalformedUid:
            return None

    def key(self, ref: SeriesRef, instance: str = "") -> str:
        """The key of an object of the series."""
        return self._filled({"study": ref.study, "series": ref.series, "instance": instance})

    @property
    def names_instances(self) -> bool:
        return any(name == "instance" for _, name in self._parts)

    def prefix(self, study: str | None, series: str | None = None) -> str:
        """The longest start that all keys of the study, or of the series, have in common; or all keys at all."""
        values = {"study": study, "series": series}
        return self._filled({name: value for name, value in values.items() if value is not None})

    def _filled(self, values: dict[str, str]) -> str:
        """The text up to the first field that has no value."""
        text = ""
        for literal, name in self._parts:
            text += literal
            if name and name not in values:
                break
            text += values.get(name, "")
        return text


class _Listed(msgspec.Struct, frozen=True):
    key: str
    size: int | None = None
    etag: str | None = None
    version: str = ""


class _ManifestObject(msgspec.Struct, frozen=True):
    voxcache_manifest: Literal[1]
    study: str
    series: str
    objects: tuple[_Listed, ...]


def parse_manifest(data: bytes, ref: SeriesRef) -> tuple[_Listed, ...]:
    """The objects that a manifest object lists (docs/manifest.md).

    Raises:
        BadManifest: it does not follow its schema, or is another series'.
    """
    if len(data) > MANIFEST_BYTES:
        raise BadManifest(f"the manifest of series {ref.series} is larger than {MANIFEST_BYTES} bytes")
    try:
        read = msgspec.json.decode(data, type=_ManifestObject)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadManifest(f"the manifest of series {ref.series}: {error}") from None
    if (read.study, read.series) != (ref.study, ref.series):
        raise BadManifest(f"the manifest of series {ref.series} of study {ref.study} names another series")
    if len({listed.key for listed in read.objects}) < len(read.objects):
        raise BadManifest(f"the manifest of series {ref.series} lists an object twice")
    if any(not listed.key or (listed.size or 0) < 0 or listed.etag == "" for listed in read.objects):
        raise BadManifest(f"the manifest of series {ref.series} has an empty key or ETag, or a size below 0")
    return read.objects


async def read_head(origin: Origin, key: str, understand: Callable[[bytes], Awaitable[_Told]]) -> _Told | None:
    """What ``understand`` makes of an object's first bytes, as few as it can do with; None if there is no such object.

    Raises: OriginDenied, OriginDown, and what ``understand`` does: TruncatedObject, if more bytes do not help.
    """
    for limit in HEADER_BYTES:
        head = await origin.read(key, limit)
        if head is None:
            return None
        try:
            return await understand(head)
        except TruncatedObject:
            if len(head) < limit or limit == HEADER_BYTES[-1]:
                raise
    raise AssertionError("the last limit returns or raises")


class Survey(msgspec.Struct, frozen=True):
    """All that an origin has, as far as its keys and what is remembered tell.

    ``series``: objects by series, and ``newest``: when the last of them was written (Unix seconds). ``described``:
    series with a manifest object, whose objects it lists. ``others``: those manifest objects, and objects whose series
    only their header could tell, with when they were written.
    """

    series: dict[SeriesRef, list[SourceObject]]
    newest: dict[SeriesRef, float]
    described: set[SeriesRef]
    others: list[tuple[SourceObject, float]]


class Finder:
    """Finds the objects of series in an origin. It keeps nothing but what ``remembered`` does."""

    def __init__(self, origin: Origin, settings: FindSettings, identify: Identify, remembered: Identities) -> None:
        """Raises: ConfigError."""
        if not (settings.manifest or settings.template or settings.headers):
            raise ConfigError("find: set manifest, template or headers; with none of them no series can be found")
        if "{instance}" in settings.manifest:
            raise ConfigError("find: a series has one manifest, whose key cannot depend on {instance}")
        if settings.header_reads < 1:
            raise ConfigError("find: header_reads starts at 1")
        self._origin = origin
        self._settings = settings
        self._manifest = Template(settings.manifest) if settings.manifest else None
        self._template = Template(settings.template) if settings.template else None
        self._identify = identify
        self._remembered = remembered

    async def manifest(self, ref: SeriesRef) -> Manifest:
        """The objects of a series as the origin has them now.

        Raises:
            UnknownStudy: the origin holds nothing of the study.
            EmptySeries: it holds something of the study, but no object of this series.
            BadManifest: the series' manifest object is wrong.
            OriginDenied, OriginDown.
        """
        objects = await self._from_manifest(ref)
        if objects is None:
            objects = await self._from_template(ref) or await self._from_headers(ref)
            if not objects and not await self.series_in(ref.study):
                raise UnknownStudy(f"the origin holds nothing of study {ref.study}")
        if not objects:
            raise EmptySeries(f"the origin holds no objects of series {ref.series} of study {ref.study}")
        return Manifest.of(ref, objects)

    async def series_of(self, object_key: str) -> SeriesRef | None:
        """Which series an announced object belongs to: by its key, else by its header; None if to none.

        Raises: OriginDenied, OriginDown, WorkerFailed.
        """
        for template in (self._manifest, self._template):
            if template is not None and (placed := template.match(object_key)) is not None:
                return placed
        if not (self._settings.headers or self._manifest):
            return None
        ref = await self._read_header(object_key)
        return None if ref in (None, NO_SERIES) else ref

    def instance_key(self, ref: SeriesRef, instance: str) -> str | None:
        """The key of an object of the series, where ``instance`` stands in its keys; None if they name none."""
        if self._template is None or not self._template.names_instances:
            return None
        return self._template.key(ref, instance)

    async def expected(self, object_key: str) -> int | None:
        """How many objects a series' manifest object lists; None if this is none. Raises: OriginDenied, OriginDown."""
        ref = self._manifest.match(object_key) if self._manifest is not None else None
        try:
            listed = await self._listed(ref) if ref is not None else None
        except BadManifest:  # it is as good as none, until somebody asks for the series
            return None
        return None if listed is None else len(listed)

    async def present(self, ref: SeriesRef) -> int:
        """How many of the series' objects are there, which a manifest object may list before they are.

        Raises: as ``manifest``.
        """
        listed = await self._listed(ref)
        if listed is not None:
            return len(await self._look_up(item.key for item in listed))
        return len((await self.manifest(ref)).objects)

    async def series_in(self, study: str) -> list[SeriesRef]:
        """All series of a study, sorted; none is an empty answer. Raises: OriginDenied, OriginDown, WorkerFailed."""
        templates = [template for template in (self._manifest, self._template) if template is not None]
        found: set[SeriesRef | None] = set()
        for prefix in {template.prefix(study) for template in templates}:
            for listed in await self._origin.list(prefix):
                found.update(template.match(listed.key) for template in templates)
        if self._settings.headers:
            found.update(ref for _, ref in await self._headers())
        return sorted(ref for ref in found if ref is not None and ref.study == study)

    async def series_under(self, prefix: str) -> list[SeriesRef]:
        """All series with an object, or a manifest, under ``prefix``, sorted. Raises: as ``series_of``."""
        found: set[SeriesRef | None] = set()
        unplaced = []
        templates = [template for template in (self._manifest, self._template) if template is not None]
        for listed in await self._origin.list(prefix):
            placed = {template.match(listed.key) for template in templates} - {None}
            found |= placed
            if not placed and (self._settings.headers or self._manifest is not None):
                unplaced.append(listed)
        found.update(ref for _, ref in await self._told_by_headers(unplaced))
        return sorted(ref for ref in found if ref is not None)

    async def survey(self) -> Survey:
        """Everything that series could be found in, listed; no object is read. Raises: OriginDenied, OriginDown."""
        settings = self._settings
        templates = [template for template in (self._manifest, self._template) if template is not None]
        prefixes = {template.prefix(None) for template in templates} | (
            {settings.prefix} if settings.headers else set()
        )
        # a prefix within another is listed with it
        apart = [one for one in prefixes if not any(one != other and one.startswith(other) for other in prefixes)]
        survey = Survey({}, {}, set(), [])
        number = 0
        for prefix in apart:
            for source, at in await self._origin.dated(prefix):
                self._survey(survey, source, at)
                number += 1
                if number % _TURN == 0:
                    await asyncio.sleep(0)  # the loop serves hits meanwhile
        for ref in survey.described:
            survey.series.pop(ref, None)
            survey.newest.pop(ref, None)
        return survey

    def _survey(self, survey: Survey, source: SourceObject, at: float) -> None:
        if self._manifest is not None and (ref := self._manifest.match(source.key)) is not None:
            survey.described.add(ref)
            survey.others.append((source, at))
            return
        ref = self._template.match(source.key) if self._template is not None else None
        if ref is None:
            if not self._settings.headers or not source.key.startswith(self._settings.prefix):
                return
            ref = self._remembered.identity(source.key, source.etag)
        if ref is None:
            survey.others.append((source, at))
        elif ref != NO_SERIES:
            survey.series.setdefault(ref, []).append(source)
            survey.newest[ref] = max(survey.newest.get(ref, 0.0), at)

    async def _from_template(self, ref: SeriesRef) -> list[SourceObject]:
        """The objects that lie where those of the series belong. Its manifest object is none of them."""
        if self._template is None:
            return []
        listed = await self._origin.list(self._template.prefix(ref.study, ref.series))
        manifest = self._manifest.key(ref) if self._manifest is not None else ""
        return [found for found in listed if found.key != manifest and self._template.match(found.key) == ref]

    async def _from_headers(self, ref: SeriesRef) -> list[SourceObject]:
        """The objects under the prefix whose header names the series."""
        return [found for found, its in await self._headers() if its == ref] if self._settings.headers else []

    # ------------------------------------------------------------------ manifest objects

    async def _listed(self, ref: SeriesRef) -> tuple[_Listed, ...] | None:
        """What the series' manifest object lists, as it says it; None if there is no such object."""
        if self._manifest is None:
            return None
        data = await self._origin.read(self._manifest.key(ref), MANIFEST_BYTES + 1)
        return None if data is None else parse_manifest(data, ref)

    async def _from_manifest(self, ref: SeriesRef) -> list[SourceObject] | None:
        """The objects that the series' manifest object lists; None if there is no such object."""
        listed = await self._listed(ref)
        if listed is None:
            return None
        vague = [item.key for item in listed if item.size is None or item.etag is None]
        there = await self._look_up(vague)
        missing = tuple(key for key in vague if key not in there)
        if missing:
            raise BadManifest(f"the manifest of series {ref.series} lists objects that are not there", missing)
        objects = []
        for item in listed:
            size, etag = item.size, item.etag
            if size is None or etag is None:
                size = there[item.key].size if size is None else size
                etag = there[item.key].etag if etag is None else etag
            objects.append(SourceObject(item.key, size, etag.strip('"'), item.version))
        return objects

    async def _look_up(self, keys: Iterable[str]) -> dict[str, SourceObject]:
        """These objects, found by listing the folders they are in."""
        wanted = set(keys)
        folders = sorted({key[: key.rfind("/") + 1] for key in wanted})
        listings = await each(self._origin.list, folders, self._settings.header_reads)
        return {found.key: found for listing in listings for found in listing if found.key in wanted}

    # ------------------------------------------------------------------ headers

    async def _headers(self) -> Sequence[tuple[SourceObject, SeriesRef]]:
        """Every object under the prefix and its series."""
        return await self._told_by_headers(await self._origin.list(self._settings.prefix))

    async def _told_by_headers(self, listed: Sequence[SourceObject]) -> Sequence[tuple[SourceObject, SeriesRef]]:
        """Those of the objects that are of a series, and which; reads the headers of those that are new."""
        known: dict[str, SeriesRef] = {}
        for number, found in enumerate(listed):
            if (ref := self._remembered.identity(found.key, found.etag)) is not None:
                known[found.key] = ref
            if number % 256 == 255:
                await asyncio.sleep(0)  # the loop serves hits meanwhile

        async def look(found: SourceObject) -> None:
            ref = await self._read_header(found.key)
            if ref is not None:
                self._remembered.remember_identity(found.key, found.etag, ref)
                known[found.key] = ref

        await each(look, [found for found in listed if found.key not in known], self._settings.header_reads)
        return [(found, known[found.key]) for found in listed if known.get(found.key, NO_SERIES) != NO_SERIES]

    async def _read_header(self, key: str) -> SeriesRef | None:
        """The series that an object's header names, NO_SERIES if it is no DICOM file; None if it is not there."""
        try:
            uids = await read_head(self._origin, key, self._identify)
            return None if uids is None else SeriesRef.parse(*uids[:2])
        except (NotDicom, TruncatedObject, MalformedUid):
            return NO_SERIES
