"""How series are found."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.catalog import Catalog, CatalogSettings
from cache.dicom.header import identify as dicom_identify
from cache.dicom.phantom import write_series
from cache.errors import (
    BadManifest,
    ConfigError,
    EmptySeries,
    NotDicom,
    OriginDown,
    TruncatedObject,
    UnknownStudy,
    WorkerDied,
)
from cache.keys import Manifest, SeriesRef
from cache.origin.directory import DirectoryOrigin, DirectorySettings
from cache.origin.faults import FaultPlan, FaultyOrigin
from cache.origin.find import HEADER_BYTES, Finder, FindSettings, Template

REF = SeriesRef("1.2.3", "1.2.3.4")
OTHER = SeriesRef("1.2.3", "1.2.3.40")
ELSEWHERE = SeriesRef("1.2.30", "1.2.3.4")

ONLY_MANIFEST = FindSettings(template="")
ONLY_TEMPLATE = FindSettings(manifest="")
ONLY_HEADERS = FindSettings(manifest="", template="", headers=True)


async def identify(head: bytes) -> tuple[str, str, str]:
    """A header of the tests' own: three words."""
    if head.startswith(b"poison"):
        raise WorkerDied("a worker died of it")
    if not head.startswith(b"DICM"):
        raise NotDicom("no header")
    if b"\n" not in head:
        raise TruncatedObject("the header goes on")
    study, series, instance = head[4:].split(b"\n")[0].split()
    return study.decode(), series.decode(), instance.decode()


def header(ref: SeriesRef, instance: str = "9") -> bytes:
    return f"DICM {ref.study} {ref.series} {instance}\n".encode()


class Archive:
    """Files in a folder, an origin over it that counts calls, and finders over that."""

    def __init__(self, root: Path, catalog: Catalog) -> None:
        self.root = root
        self.catalog = catalog
        self.origin = FaultyOrigin(DirectoryOrigin(DirectorySettings(str(root))))

    def put(self, files: Mapping[str, bytes]) -> None:
        for key, data in files.items():
            path = self.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def finder(self, settings: FindSettings) -> Finder:
        return Finder(self.origin, settings, identify, self.catalog)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(tmp_path / "catalog.sqlite", CatalogSettings())
    yield catalog
    catalog.close()


@pytest.fixture
async def archive(tmp_path: Path, catalog: Catalog) -> AsyncIterator[Archive]:
    (tmp_path / "archive").mkdir()
    archive = Archive(tmp_path / "archive", catalog)
    yield archive
    await archive.origin.close()


def keys(manifest: Manifest) -> list[str]:
    return [found.key for found in manifest.objects]


# ---------------------------------------------------------------------- templates

_uids = st.lists(st.integers(0, 999_999).map(str), min_size=1, max_size=9).map(".".join)
_instances = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40)
_patterns = st.sampled_from(
    [
        "{study}/{series}/{instance}.dcm",
        "{study}/{series}/{instance}",
        "archive/{study}/{series}/DICOM/{instance}.dcm",
        "{series}/{study}/{instance}",
        "{study}_{series}_{instance}.dcm",
        "{instance}/{study}-{series}",
        "all.(dicom)/{study}/{series}.tar",
        "{{x}}/{study}.s{series}",
    ]
)


@given(pattern=_patterns, study=_uids, series=_uids, instance=_instances)
def test_a_key_made_by_a_template_matches_it(pattern: str, study: str, series: str, instance: str) -> None:
    """What a template makes it takes apart again, and both prefixes are starts of it."""
    template, ref = Template(pattern), SeriesRef(study, series)
    key = template.key(ref, instance)
    assert template.match(key) == ref
    assert key.startswith(template.prefix(study, series))
    assert template.prefix(study, series).startswith(template.prefix(study))


@given(pattern=_patterns, study=_uids, series=_uids, instance=_instances)
def test_longer_keys_do_not_match(pattern: str, study: str, series: str, instance: str) -> None:
    """A key in a deeper folder, or with a folder's worth of text after it, is no key of the template."""
    template = Template(pattern)
    key = template.key(SeriesRef(study, series), instance)
    assert template.match(f"x/{key}") is None
    assert template.match(f"{key}/x") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{study}",
        "{series}/{instance}",
        "{study}/{series}/{patient}",
        "{study}/{series}/{study}",
        "{study}{series}/{instance}",
        "{study}.{series}",
        "{study}.1.{series}",
        "{study}/{series",
        "{study!r}/{series}",
        "{study:9}/{series}",
        "{}/{study}/{series}",
    ],
)
def test_templates_that_cannot_work(text: str) -> None:
    """A template that could be taken apart in two ways, or not at all, is refused at the start."""
    with pytest.raises(ConfigError):
        Template(text)


@pytest.mark.parametrize(
    "settings",
    [
        FindSettings(manifest="", template=""),
        FindSettings(manifest="{study}/{series}/{instance}.json"),
        FindSettings(template="{nonsense}"),
        FindSettings(header_reads=0),
    ],
)
def test_settings_that_cannot_work(archive: Archive, settings: FindSettings) -> None:
    """What cannot find anything is said at the start."""
    with pytest.raises(ConfigError):
        archive.finder(settings)


# ---------------------------------------------------------------------- by place


async def test_by_template(archive: Archive) -> None:
    """The objects of a series are those whose keys follow the template; whatever else lies there is ignored."""
    archive.put(
        {
            "1.2.3/1.2.3.4/b.dcm": b"22",
            "1.2.3/1.2.3.4/a.dcm": b"1",
            "1.2.3/1.2.3.4/notes.txt": b"",
            "1.2.3/1.2.3.4/deeper/a.dcm": b"",
            "1.2.3/1.2.3.40/a.dcm": b"",
            "1.2.30/1.2.3.4/a.dcm": b"",
        }
    )
    found = await archive.finder(ONLY_TEMPLATE).manifest(REF)
    assert [(o.key, o.size) for o in found.objects] == [("1.2.3/1.2.3.4/a.dcm", 1), ("1.2.3/1.2.3.4/b.dcm", 2)]
    assert await archive.finder(ONLY_TEMPLATE).series_in("1.2.3") == [REF, OTHER]


async def test_the_version_follows_the_objects(archive: Archive) -> None:
    """A slice that arrives, or one that changes, makes another source version; asking again makes none."""
    archive.put({"1.2.3/1.2.3.4/a.dcm": b"1"})
    finder = archive.finder(FindSettings())
    versions = [(await finder.manifest(REF)).source_version, (await finder.manifest(REF)).source_version]
    archive.put({"1.2.3/1.2.3.4/b.dcm": b"1"})
    versions.append((await finder.manifest(REF)).source_version)
    archive.put({"1.2.3/1.2.3.4/a.dcm": b"22"})
    versions.append((await finder.manifest(REF)).source_version)
    assert versions[0] == versions[1]
    assert len(set(versions)) == 3


async def test_what_is_not_there(archive: Archive) -> None:
    """A study of which there is nothing, and a series missing from a study, are told apart."""
    archive.put({"1.2.3/1.2.3.40/a.dcm": b"1"})
    for settings in (FindSettings(), ONLY_TEMPLATE, FindSettings(headers=True)):
        with pytest.raises(EmptySeries, match=r"series 1\.2\.3\.4 of study 1\.2\.3"):
            await archive.finder(settings).manifest(REF)
        with pytest.raises(UnknownStudy, match=r"study 1\.2\.30"):
            await archive.finder(settings).manifest(ELSEWHERE)


# ---------------------------------------------------------------------- by manifest


def manifest_of(ref: SeriesRef, objects: object, **changes: Any) -> bytes:
    whole = {"voxcache_manifest": 1, "study": ref.study, "series": ref.series, "objects": objects}
    return json.dumps(whole | changes).encode()


async def test_a_manifest_is_believed(archive: Archive) -> None:
    """Objects with size and ETag are taken as they are, without a listing, wherever they lie."""
    listed = [
        {"key": "z/1", "size": 5, "etag": '"e1"'},
        {"key": "a/2", "size": 6, "etag": "e2", "version": "v", "x": 1},
    ]
    archive.put({"1.2.3/1.2.3.4/manifest.json": manifest_of(REF, listed), "1.2.3/1.2.3.4/stray.dcm": b"1"})
    found = await archive.finder(FindSettings()).manifest(REF)
    assert [(o.key, o.size, o.etag, o.version) for o in found.objects] == [("a/2", 6, "e2", "v"), ("z/1", 5, "e1", "")]
    assert archive.origin.count("list") == 0


async def test_a_manifest_of_keys_alone(archive: Archive) -> None:
    """What a manifest leaves out is looked up, one listing a folder."""
    archive.put({"x/1": b"1", "x/2": b"22", "y/3": b"333", "top": b"4444", "x/other": b""})
    listed = [{"key": "x/1"}, {"key": "x/2", "size": 2}, {"key": "y/3", "etag": "e3"}, {"key": "top"}]
    archive.put({"1.2.3/1.2.3.4/manifest.json": manifest_of(REF, listed)})
    found = await archive.finder(ONLY_MANIFEST).manifest(REF)
    there = {o.key: o for o in await archive.origin.list("")}
    assert [(o.key, o.size) for o in found.objects] == [("top", 4), ("x/1", 1), ("x/2", 2), ("y/3", 3)]
    assert [o.etag for o in found.objects] == [there["top"].etag, there["x/1"].etag, there["x/2"].etag, "e3"]
    assert archive.origin.count("list") == 3 + 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        manifest_of(REF, [], voxcache_manifest=2),
        manifest_of(OTHER, []),
        manifest_of(ELSEWHERE, []),
        manifest_of(REF, "objects"),
        manifest_of(REF, [{"size": 1}]),
        manifest_of(REF, [{"key": ""}]),
        manifest_of(REF, [{"key": "a", "size": -1, "etag": "e"}]),
        manifest_of(REF, [{"key": "a", "size": 1.5, "etag": "e"}]),
        manifest_of(REF, [{"key": "a", "size": 1, "etag": ""}]),
        manifest_of(REF, [{"key": "a", "size": 1, "etag": "e"}, {"key": "a", "size": 2, "etag": "e"}]),
        manifest_of(REF, [{"key": "not there"}]),
    ],
)
async def test_manifests_that_are_wrong(archive: Archive, data: bytes) -> None:
    """A manifest that does not follow its schema is refused; the objects beside it are not guessed at instead."""
    archive.put({"1.2.3/1.2.3.4/manifest.json": data, "1.2.3/1.2.3.4/a.dcm": b"1"})
    with pytest.raises(BadManifest, match=r"1\.2\.3\.4"):
        await archive.finder(FindSettings()).manifest(REF)


async def test_a_manifest_that_lists_nothing(archive: Archive) -> None:
    """A manifest without objects is a series without objects, whatever lies beside it."""
    archive.put({"1.2.3/1.2.3.4/manifest.json": manifest_of(REF, []), "1.2.3/1.2.3.4/a.dcm": b"1"})
    with pytest.raises(EmptySeries):
        await archive.finder(FindSettings()).manifest(REF)


async def test_how_many_a_series_will_have(archive: Archive) -> None:
    """A manifest object tells it, before they are all there; how many are, the origin says."""
    listed = [{"key": f"data/{number}"} for number in range(3)]
    at = f"{REF.study}/{REF.series}/manifest.json"
    archive.put({at: manifest_of(REF, listed), "data/0": b"a", "data/2": b"c"})
    finder = archive.finder(FindSettings())
    assert await finder.expected(at) == 3
    assert await finder.present(REF) == 2
    assert await finder.expected("data/0") is None
    archive.put({at: b"no manifest"})
    assert await finder.expected(at) is None
    plain = archive.finder(ONLY_TEMPLATE)
    archive.put({f"{OTHER.study}/{OTHER.series}/{number}.dcm": b"a" for number in range(4)})
    assert await plain.expected(at) is None
    assert await plain.present(OTHER) == 4
    with pytest.raises(EmptySeries):
        await plain.present(SeriesRef(REF.study, "1.2.3.5"))


async def test_without_a_manifest(archive: Archive) -> None:
    """Where manifests are the only way, a study is known by those of its other series."""
    archive.put({"1.2.3/1.2.3.40/manifest.json": manifest_of(OTHER, [])})
    with pytest.raises(EmptySeries):
        await archive.finder(ONLY_MANIFEST).manifest(REF)
    with pytest.raises(UnknownStudy):
        await archive.finder(ONLY_MANIFEST).manifest(ELSEWHERE)


async def test_a_manifest_is_no_instance(archive: Archive) -> None:
    """A manifest object whose key follows the objects' template too is none of them."""
    archive.put({"1.2.3/1.2.3.4/a": b"1", "1.2.3/1.2.3.4/index": manifest_of(REF, [{"key": "1.2.3/1.2.3.4/a"}])})
    settings = FindSettings(manifest="{study}/{series}/index", template="{study}/{series}/{instance}")
    assert keys(await archive.finder(settings).manifest(REF)) == ["1.2.3/1.2.3.4/a"]


# ---------------------------------------------------------------------- by header


async def test_by_header(archive: Archive) -> None:
    """Objects in no order are found by what their headers say; what is no DICOM file belongs to no series."""
    archive.put({"in/1": header(REF), "in/x/2": header(REF), "in/3": header(OTHER), "in/4": header(ELSEWHERE)})
    archive.put({"in/readme": b"hello", "in/odd": header(SeriesRef("not.a.uid", "1")), "out/5": header(REF)})
    finder = archive.finder(FindSettings(manifest="", template="", headers=True, prefix="in/"))
    assert keys(await finder.manifest(REF)) == ["in/1", "in/x/2"]
    assert await finder.series_in("1.2.3") == [REF, OTHER]
    with pytest.raises(EmptySeries):
        await finder.manifest(SeriesRef("1.2.3", "9"))
    with pytest.raises(UnknownStudy):
        await finder.manifest(SeriesRef("9", "1.2.3.4"))


async def test_a_header_is_read_once(archive: Archive) -> None:
    """A header is read again only when its object has changed, also by another finder on the same catalogue."""
    archive.put({"1": header(REF), "2": header(REF), "3": b"no DICOM"})
    await archive.finder(ONLY_HEADERS).manifest(REF)
    assert archive.origin.count("read") == 3
    archive.put({"2": header(OTHER) + b"longer", "4": header(REF)})
    assert keys(await archive.finder(ONLY_HEADERS).manifest(REF)) == ["1", "4"]
    assert archive.origin.count("read") == 5


async def test_a_long_header_is_read_further(archive: Archive) -> None:
    """A header that does not fit the first read is read again, longer; then it is given up."""
    fits, does_not = HEADER_BYTES[1], HEADER_BYTES[1] + 1
    start = header(REF)[:-1]
    archive.put({"1": start + b" " * (fits - len(start) - 1) + b"\n", "2": start + b" " * does_not + b"\n"})
    assert keys(await archive.finder(ONLY_HEADERS).manifest(REF)) == ["1"]
    assert archive.origin.count("read") == 4


async def test_a_header_that_kills_its_worker_hides_nothing(archive: Archive) -> None:
    """As the object may be of the series, the answer is the error, not a series without it."""
    archive.put({"1": header(REF), "2": b"poison"})
    with pytest.raises(WorkerDied):
        await archive.finder(ONLY_HEADERS).manifest(REF)


async def test_an_origin_that_fails_while_headers_are_read(archive: Archive) -> None:
    """A header that could not be read is asked for next time: nothing is taken for known."""
    archive.put({str(number): header(REF) for number in range(40)})
    archive.origin.plan = FaultPlan(down=0.2, methods=("read",))
    with pytest.raises(OriginDown):
        await archive.finder(ONLY_HEADERS).manifest(REF)
    archive.origin.plan = FaultPlan()
    assert len((await archive.finder(ONLY_HEADERS).manifest(REF)).objects) == 40


async def test_real_headers(archive: Archive, tmp_path: Path) -> None:
    """Real DICOM files in no order are found by their own UIDs."""
    study, series, paths = write_series(tmp_path / "phantom", slices=3, rows=8, columns=8)
    archive.put({f"in/{number}": path.read_bytes() for number, path in enumerate(paths)})

    async def real(head: bytes) -> tuple[str, str, str]:
        return dicom_identify(head)

    finder = Finder(archive.origin, ONLY_HEADERS, real, archive.catalog)
    assert keys(await finder.manifest(SeriesRef(study, series))) == ["in/0", "in/1", "in/2"]


# ---------------------------------------------------------------------- announced objects


async def test_which_series_an_announced_object_belongs_to(archive: Archive) -> None:
    """An object's key tells its series, or its header does; a manifest announces its own series."""
    archive.put({"x/1": header(REF), "x/2": b"hello"})
    finder = archive.finder(FindSettings())
    assert await finder.series_of("1.2.3/1.2.3.4/a.dcm") == REF
    assert await finder.series_of("1.2.3/1.2.3.40/manifest.json") == OTHER
    assert archive.origin.count("read") == 0
    assert await finder.series_of("x/1") == REF
    for none in ("x/2", "x/gone"):
        assert await finder.series_of(none) is None


async def test_what_no_template_places_is_not_read_in_vain(archive: Archive) -> None:
    """Where only the template counts, an object elsewhere can be part of no series."""
    archive.put({"x/1": header(REF)})
    assert await archive.finder(ONLY_TEMPLATE).series_of("x/1") is None
    assert archive.origin.count("read") == 0


async def test_series_under_a_prefix(archive: Archive) -> None:
    """The series of a folder's objects: by their keys, else by their headers, each once; other files are none."""
    archive.put({f"in/{n}.dcm": header(REF) for n in range(3)} | {"in/other.dcm": header(OTHER), "in/readme": b"text"})
    archive.put({"out/1.dcm": header(ELSEWHERE), "1.2.30/1.2.3.4/1.dcm": b""})
    finder = archive.finder(ONLY_HEADERS)
    assert await finder.series_under("in/") == [REF, OTHER]
    assert await finder.series_under("nowhere/") == []
    assert await archive.finder(ONLY_TEMPLATE).series_under("1.2.30/") == [ELSEWHERE]


async def test_survey(archive: Archive) -> None:
    """Everything that keys, or what is remembered of headers, place; the rest stands apart. No object is read."""
    placed = {f"1.2.3/1.2.3.4/{n}.dcm": b"" for n in range(3)}
    loose = {"in/a": header(OTHER), "in/b": header(OTHER), "in/readme": b"text"}
    manifest = {"1.2.30/1.2.3.4/manifest.json": b"{}", "1.2.30/1.2.3.4/1.dcm": b""}
    archive.put(placed | loose | manifest)
    before = await archive.finder(FindSettings()).survey()
    assert {ref: keys(Manifest.of(ref, found)) for ref, found in before.series.items()} == {REF: sorted(placed)}
    assert before.newest.keys() == {REF}
    assert before.described == {ELSEWHERE}
    assert [source.key for source, _ in before.others] == ["1.2.30/1.2.3.4/manifest.json"]
    finder = archive.finder(ONLY_HEADERS)
    unknown = await finder.survey()
    assert unknown.series == {}
    assert len(unknown.others) == len(placed | loose | manifest)
    assert archive.origin.count("read") == 0
    await finder.manifest(OTHER)
    known = await finder.survey()
    assert {ref: keys(Manifest.of(ref, found)) for ref, found in known.series.items()} == {OTHER: ["in/a", "in/b"]}
    assert known.others == []  # files that are no DICOM are known as such by now
