"""The catalogue: what it remembers, what it costs on disk, and what becomes of it when it is damaged."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.attributes import Attributes, Described
from cache.catalog import Catalog, CatalogSettings
from cache.errors import ConfigError
from cache.keys import Manifest, SeriesRef, SourceObject
from tests.conftest import ROOT

REF = SeriesRef("1.2", "1.2.3")
OTHER = SeriesRef("1.2", "1.2.4")
MIB = 1 << 20

#: Nothing is kept in memory: what is asked for comes from the file.
ON_DISK = CatalogSettings(reserve=MIB, remembered_objects=0)


def manifest(ref: SeriesRef = REF, objects: int = 3, salt: str = "") -> Manifest:
    tags = (md5(f"{ref}{salt}{number}".encode(), usedforsecurity=False).hexdigest() for number in range(objects))
    return Manifest.of(
        ref, [SourceObject(f"{ref.study}/{ref.series}/{n}.dcm", 1000 + n, tag) for n, tag in enumerate(tags)]
    )


def series(number: int) -> SeriesRef:
    return SeriesRef("1.2.840.99", f"1.2.840.99.{number}")


def allocated(folder: Path) -> int:
    """Bytes of blocks that everything in the folder takes, as ``du`` sees it."""
    return sum(path.lstat().st_blocks * 512 for path in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "catalog.sqlite"


@pytest.fixture(params=[0, 1000], ids=["on disk", "in memory"])
def catalog(path: Path, request: pytest.FixtureRequest) -> Iterator[Catalog]:
    catalog = Catalog.open(path, CatalogSettings(reserve=MIB, versions=3, remembered_objects=request.param))
    yield catalog
    catalog.close()


def test_what_is_recorded_is_remembered(catalog: Catalog) -> None:
    """A manifest comes back as it was recorded, with the time it was confirmed."""
    assert catalog.recorded(REF) is None
    catalog.record(manifest(), 10.5)
    for _ in range(2):
        found = catalog.recorded(REF)
        assert found is not None
        assert (found.manifest, found.validated_at) == (manifest(), 10.5)
    catalog.record(manifest(), 20.5)
    found = catalog.recorded(REF)
    assert found is not None
    assert found.validated_at == 20.5
    assert catalog.recorded(OTHER) is None


def test_an_invalidated_manifest_is_kept(catalog: Catalog) -> None:
    """It must be confirmed before it is used again, but it still says what an entry was made from."""
    catalog.invalidate(REF)
    catalog.record(manifest(), 10)
    catalog.invalidate(REF)
    found = catalog.recorded(REF)
    assert found is not None
    assert (found.manifest, found.validated_at) == (manifest(), 0)
    assert catalog.manifest_of(REF, manifest().source_version) == manifest()


def test_earlier_versions_are_kept_and_bounded(catalog: Catalog) -> None:
    """The last versions of a series are known by their digest; one that returns counts as the youngest."""
    versions = [manifest(salt=salt) for salt in "abcd"]
    for version in [*versions[:3], versions[0], versions[3]]:
        catalog.record(version, 1)
    kept = [catalog.manifest_of(REF, version.source_version) for version in versions]
    assert kept == [versions[0], None, versions[2], versions[3]]
    found = catalog.recorded(REF)
    assert found is not None
    assert found.manifest == versions[3]
    assert catalog.manifest_of(OTHER, versions[3].source_version) is None


def test_the_series_of_a_study(catalog: Catalog) -> None:
    """The recorded series of a study are listed, sorted."""
    for ref in (OTHER, REF, SeriesRef("1.20", "1.2.3")):
        catalog.record(manifest(ref), 1)
    assert [found.ref for found in catalog.study("1.2")] == [REF, OTHER]
    assert catalog.study("1") == []


def test_identities(catalog: Catalog) -> None:
    """An object is known for as long as it has the same ETag."""
    assert catalog.identity("a", "e1") is None
    catalog.remember_identity("a", "e1", REF)
    assert catalog.identity("a", "e1") == REF
    assert catalog.identity("a", "e2") is None
    catalog.remember_identity("a", "e2", OTHER)
    assert catalog.identity("a", "e1") is None
    assert catalog.identity("a", "e2") == OTHER


def test_it_outlives_the_daemon(path: Path) -> None:
    """What was recorded is there after a restart."""
    first = Catalog.open(path, ON_DISK)
    first.record(manifest(), 10)
    first.remember_identity("a", "e", OTHER)
    first.close()
    again = Catalog.open(path, ON_DISK)
    found = again.recorded(REF)
    assert found is not None
    assert found.manifest == manifest()
    assert again.identity("a", "e") == OTHER
    again.close()


@pytest.mark.slow
def test_it_outlives_kill_9(path: Path) -> None:
    """What was recorded is there after the daemon was killed, and the next one can use it at once."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from cache.catalog import Catalog, CatalogSettings; from tests.cache.test_catalog import manifest, series\n"
        "catalog = Catalog.open(Path(sys.argv[1]), CatalogSettings(reserve=1 << 20))\n"
        "for number in range(5): catalog.record(manifest(series(number)), 1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    catalog = Catalog.open(path, ON_DISK)
    assert len(catalog.study("1.2.840.99")) == 5
    assert catalog.manifest_of(series(4), manifest(series(4)).source_version) == manifest(series(4))
    catalog.close()


@pytest.mark.slow
def test_its_files_never_exceed_the_reserve(path: Path) -> None:
    """Thousands of series go in; the files stay within the reserve at every moment, and the latest series are known."""
    catalog = Catalog.open(path, ON_DISK)
    most = 0
    for number in range(1500):
        catalog.record(manifest(series(number), objects=number % 97 + 1), float(number))
        catalog.remember_identity(f"in/{number}", "e", series(number))
        most = max(most, allocated(path.parent))
    assert most <= MIB
    assert most > MIB // 4
    found = catalog.recorded(series(1499))
    assert found is not None
    assert found.manifest == manifest(series(1499), objects=1499 % 97 + 1)
    assert catalog.recorded(series(0)) is None
    assert len(catalog.study("1.2.840.99")) > 10
    catalog.close()


@pytest.mark.slow
def test_identities_alone_never_exceed_the_reserve(path: Path) -> None:
    """A bucket of more objects than can be remembered forgets the oldest."""
    catalog = Catalog.open(path, ON_DISK)
    for number in range(20_000):
        catalog.remember_identity(f"some/rather/long/key/of/an/object/{number}", "0" * 32, series(number))
        if number % 50 == 0:
            assert allocated(path.parent) <= MIB
    assert catalog.identity("some/rather/long/key/of/an/object/19999", "0" * 32) == series(19999)
    assert catalog.identity("some/rather/long/key/of/an/object/0", "0" * 32) is None
    catalog.close()


def test_a_manifest_too_large_to_keep(path: Path) -> None:
    """One that would take more than its part is not kept, and the version before it does not come back in its place."""
    catalog = Catalog.open(path, ON_DISK)
    catalog.record(manifest(), 1)
    catalog.record(manifest(objects=5000), 2)
    assert catalog.recorded(REF) is None
    assert catalog.manifest_of(REF, manifest().source_version) == manifest()
    catalog.close()


def test_memory_is_bounded(path: Path) -> None:
    """Of the manifests in memory those used least lately make room."""
    catalog = Catalog.open(path, CatalogSettings(reserve=MIB, remembered_objects=10))
    first = manifest(series(1), objects=6)
    catalog.record(first, 1)
    catalog.record(manifest(series(2), objects=4), 1)
    kept = catalog.recorded(series(1))
    catalog.record(manifest(series(3), objects=4), 1)
    assert catalog.recorded(series(1)) is kept
    again = catalog.recorded(series(2))
    assert again is not None
    assert again.manifest == manifest(series(2), objects=4)
    catalog.close()


@pytest.mark.parametrize("damage", ["not a database", "empty", "later format", "foreign", "flipped", "cut"])
def test_a_database_that_cannot_be_used_is_set_aside(path: Path, damage: str) -> None:
    """Whatever lies there, the catalogue starts; a database not its own is kept beside it, within the reserve."""
    catalog = Catalog.open(path, ON_DISK)
    for number in range(40):
        catalog.record(manifest(series(number), objects=50), 1)
    catalog.close()
    match damage:
        case "not a database":
            path.write_bytes(b"hello, I am a text file\n" * 500)
        case "empty":
            path.write_bytes(b"")
        case "later format":
            change(path, "PRAGMA user_version = 99")
        case "foreign":
            change(path, "PRAGMA application_id = 12")
        case "flipped":
            data = bytearray(path.read_bytes())
            data[4096 : 4096 * 20] = bytes(4096 * 19)
            path.write_bytes(data)
        case "cut":
            os.truncate(path, path.stat().st_size // 3)
    before = path.read_bytes()
    catalog = Catalog.open(path, ON_DISK)
    assert catalog.recorded(series(1)) is None
    catalog.record(manifest(), 1)
    assert [found.ref for found in catalog.study("1.2")] == [REF]
    assert allocated(path.parent) <= MIB
    catalog.close()
    aside = path.with_name("catalog.sqlite.aside")
    if damage == "empty":
        assert not aside.exists()
    else:
        assert aside.read_bytes() == before


def change(path: Path, statement: str) -> None:
    db = sqlite3.connect(path)
    with db:
        db.execute(statement)
    db.close()


def test_a_database_larger_than_the_reserve_goes(path: Path) -> None:
    """After the reserve was lowered the files are within it from the start."""
    catalog = Catalog.open(path, CatalogSettings(reserve=8 * MIB))
    for number in range(200):
        catalog.record(manifest(series(number), objects=300), 1)
    catalog.close()
    assert path.stat().st_size > MIB
    catalog = Catalog.open(path, ON_DISK)
    catalog.record(manifest(), 1)
    assert allocated(path.parent) <= MIB
    catalog.close()


def test_a_row_that_points_to_another_series_is_not_believed(path: Path) -> None:
    """A manifest says itself whose it is: a pointer that decayed into another series' makes the series unknown."""
    catalog = Catalog.open(path, ON_DISK)
    catalog.record(manifest(REF), 1)
    catalog.record(manifest(OTHER), 1)
    catalog.close()
    change(path, "UPDATE series SET version = (SELECT max(version) FROM series)")
    catalog = Catalog.open(path, ON_DISK)
    assert catalog.recorded(REF) is None
    catalog.close()


@settings(max_examples=25)
@given(
    at=st.integers(0, 1), flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=20)
)
def test_decay_is_never_believed(
    tmp_path_factory: pytest.TempPathFactory, at: int, flips: list[tuple[float, int]]
) -> None:
    """Whatever bytes of the file decay, before it is opened or while it is in use, no wrong manifest comes out."""
    path = tmp_path_factory.mktemp("decay") / "catalog.sqlite"
    catalog = Catalog.open(path, ON_DISK)
    for number in range(6):
        catalog.record(manifest(series(number), objects=20), 1)
    catalog.close()
    if at:
        catalog = Catalog.open(path, ON_DISK)
    with path.open("r+b") as file:
        for place, flip in flips:
            offset = int(place * path.stat().st_size)
            file.seek(offset)
            (was,) = file.read(1)
            file.seek(offset)
            file.write(bytes([was ^ flip]))
    if not at:
        catalog = Catalog.open(path, ON_DISK)
    for number in range(6):
        found = catalog.recorded(series(number))
        assert found is None or found.manifest == manifest(series(number), objects=20)
    catalog.record(manifest(), 1)
    assert catalog.manifest_of(REF, manifest().source_version) == manifest()
    catalog.close()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["stays", "goes"])
def test_a_file_that_is_lost_while_in_use(path: Path, folder: str) -> None:
    """A new file takes its place, or memory where there is no place for one: nothing wrong comes out, nothing fails."""
    catalog = Catalog.open(path, CatalogSettings(reserve=16 * MIB, remembered_objects=0))
    for number in range(80):
        catalog.record(manifest(series(number), objects=2000), 1)
    assert path.stat().st_size > 3 * MIB  # more than SQLite has in memory
    os.truncate(path, 0)
    if folder == "goes":
        shutil.rmtree(path.parent)
    known = [number for number in range(80) if catalog.recorded(series(number)) is not None]
    assert len(known) < 80
    catalog.record(manifest(OTHER), 2)
    found = catalog.recorded(OTHER)
    assert found is not None
    assert found.manifest == manifest(OTHER)
    assert path.exists() == (folder == "stays")
    catalog.close()


def test_once_closed_it_is_closed(path: Path) -> None:
    """A call that comes too late fails; it does not take the closed file for a broken one."""
    catalog = Catalog.open(path, ON_DISK)
    catalog.record(manifest(), 1)
    catalog.close()
    with pytest.raises(sqlite3.ProgrammingError):
        catalog.recorded(REF)
    catalog = Catalog.open(path, ON_DISK)
    assert catalog.recorded(REF) is not None
    catalog.close()


def test_two_daemons(path: Path) -> None:
    """A catalogue that another uses is left alone."""
    catalog = Catalog.open(path, ON_DISK)
    catalog.record(manifest(), 1)
    with pytest.raises(ConfigError, match="locked"):
        Catalog.open(path, ON_DISK)
    assert catalog.recorded(REF) is not None
    catalog.close()


def test_settings_that_cannot_work(path: Path) -> None:
    """What cannot work is said at the start."""
    for wrong in (CatalogSettings(reserve=MIB - 1), CatalogSettings(versions=0)):
        with pytest.raises(ConfigError):
            Catalog.open(path, wrong)
    with pytest.raises(ConfigError, match="cannot open the catalogue"):
        Catalog.open(path / "no folder" / "catalog.sqlite", ON_DISK)


# ------------------------------------------------------------------ attributes


def of(ref: SeriesRef, catalog: Catalog, salt: str = "", **attributes: object) -> Manifest:
    """A recorded and described series."""
    made = manifest(ref, salt=salt)
    catalog.record(made, 1)
    catalog.describe(ref, made.source_version, Attributes(**attributes))  # type: ignore[arg-type]  # as the test has it
    return made


def test_what_a_series_is_of(catalog: Catalog) -> None:
    """Attributes belong to a version of a series: another one is undescribed until it is read."""
    assert catalog.described(REF) is None
    catalog.record(manifest(), 1)
    assert catalog.described(REF) == Described(REF, 3, None)
    of(REF, catalog, modality="MR", frames=40)
    found = catalog.described(REF)
    assert found is not None
    assert (found.attributes, found.slices) == (Attributes(modality="MR", frames=40), 120)
    catalog.record(manifest(salt="grown", objects=4), 2)
    assert catalog.described(REF) == Described(REF, 4, None)
    catalog.describe(OTHER, "none", Attributes())
    assert catalog.described(OTHER) is None


def test_series_are_found_by_their_attributes(catalog: Catalog) -> None:
    """By patient, time and modality, the latest first; nobody's series are not found as somebody's."""
    refs = [series(number) for number in range(5)]
    of(refs[0], catalog, patient="a", modality="CT", taken_at=10.0)
    of(refs[1], catalog, patient="a", modality="MR", taken_at=20.0)
    of(refs[2], catalog, patient="b", modality="CT", taken_at=30.0)
    of(refs[3], catalog)
    assert [found.ref for found in catalog.of_patient("a")] == [refs[1], refs[0]]
    assert catalog.of_patient("") == []
    assert [found.ref for found in catalog.taken_since(20.0)] == [refs[2], refs[1]]
    assert [found.ref for found in catalog.taken_since(0.5, "CT")] == [refs[2], refs[0]]
    assert [found.ref for found in catalog.study(refs[0].study)] == [refs[2], refs[1], refs[0], refs[3]]


def test_what_is_forgotten(catalog: Catalog) -> None:
    """A series that is gone at the origin is found no more; what was made of it can still be explained."""
    made = of(REF, catalog, patient="a", taken_at=1.0)
    catalog.forget(REF)
    assert catalog.recorded(REF) is None
    assert (catalog.of_patient("a"), catalog.study("1.2"), catalog.taken_since(0.5)) == ([], [], [])
    assert catalog.manifest_of(REF, made.source_version) == made


def test_damaged_attributes(path: Path) -> None:
    """Attributes that are none any more make way for a new catalogue, as any damage does."""
    catalog = Catalog.open(path, ON_DISK)
    made = of(REF, catalog, modality="CT")
    catalog._db.execute("UPDATE version SET attributes = ?", (b'{"modality": 5}',))
    assert catalog.described(REF) is None
    catalog.record(made, 1)
    assert catalog.described(REF) == Described(REF, 3, None)
    catalog.close()
