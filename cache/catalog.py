"""The catalogue: what the origin said a series consists of, and when, and what it is of, in SQLite under a hard cap.

It lets a restarted daemon answer without asking the origin, names the objects an old entry was made from, and finds
series by their attributes. All of it can be asked for again. So it never waits for the disk, and what is damaged is
set aside rather than repaired.
"""

import contextlib
import sqlite3
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from .attributes import Attributes, Described
from .errors import ConfigError
from .keys import Manifest, SeriesRef, SourceObject

_FORMAT: Final = 3
_APPLICATION: Final = 0x766F7863  # "voxc"
_PAGE: Final = 4096
_SCHEMA: Final = """
    CREATE TABLE version (
        id INTEGER PRIMARY KEY, study TEXT NOT NULL, series TEXT NOT NULL, source_version TEXT NOT NULL,
        objects BLOB NOT NULL, count INTEGER NOT NULL,
        attributes BLOB, patient TEXT NOT NULL DEFAULT '', modality TEXT NOT NULL DEFAULT '',
        taken_at REAL NOT NULL DEFAULT 0, UNIQUE (study, series, source_version)
    ) STRICT;
    CREATE INDEX version_by_patient ON version (patient);
    CREATE INDEX version_by_time ON version (taken_at);
    CREATE TABLE series (
        study TEXT NOT NULL, series TEXT NOT NULL, version INTEGER NOT NULL, validated_at REAL NOT NULL,
        PRIMARY KEY (study, series)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX series_by_version ON series (version);
    CREATE TABLE identity (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, etag TEXT NOT NULL,
        study TEXT NOT NULL, series TEXT NOT NULL
    ) STRICT;
    CREATE TABLE restore (
        study TEXT NOT NULL, series TEXT NOT NULL, source_version TEXT NOT NULL, requested_at REAL NOT NULL,
        expected_at REAL NOT NULL, look_at REAL NOT NULL, PRIMARY KEY (study, series)
    ) STRICT, WITHOUT ROWID;
"""
#: What a call may raise. A damaged text within a message of SQLite's own cannot even be told.
_BROKEN: Final = (sqlite3.DatabaseError, UnicodeDecodeError)
#: Rows that make room together when the file is full.
_FORGOTTEN_VERSIONS: Final = 16
_FORGOTTEN_IDENTITIES: Final = 512

_Result = TypeVar("_Result")
_Packed = tuple[SeriesRef, tuple[str, ...], tuple[int, ...], tuple[str, ...], tuple[str, ...]]


class CatalogSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The catalogue's bounds.

    reserve: bytes that all of its files together never exceed; the oldest series is forgotten first. A manifest that
        takes more than a sixteenth of it, compressed, is not kept.
    versions: how many versions of a series are kept, the current one included.
    remembered_objects: objects of recently used manifests kept in memory, about 400 bytes each.
    """

    reserve: int = 64 << 20
    versions: int = 8
    remembered_objects: int = 65_536


class Recorded(msgspec.Struct, frozen=True):
    """A manifest and the time (Unix seconds) the origin last confirmed it; 0 when it must be asked again."""

    manifest: Manifest
    validated_at: float


class Current(msgspec.Struct, frozen=True):
    """The version of a series that counts, and when the origin confirmed it (Unix seconds; 0: it will be asked)."""

    source_version: str
    validated_at: float


class Restore(msgspec.Struct, frozen=True):
    """A version of a series that was asked back from an archive; when, and when to look for it. Unix seconds."""

    source_version: str
    requested_at: float
    expected_at: float
    look_at: float


class Catalog:
    """Manifests by series, and identities of objects. For one thread; no call waits for the disk.

    Of ``reserve``, three eighths are the database, as much a database set aside (the last one only), the rest its
    write-ahead log: emptied once it is past an eighth (or 1 MiB), with room for the largest single change.
    """

    def __init__(self, path: Path, settings: CatalogSettings) -> None:
        self._path = path
        self._settings = settings
        self._db_bytes = settings.reserve * 3 // 8
        self._log = Path(f"{path}-wal")
        self._log_bytes = min(settings.reserve // 8, 1 << 20)
        self._blob_bytes = settings.reserve // 16
        self._recent: OrderedDict[SeriesRef, Recorded] = OrderedDict()
        self._recent_objects = 0
        self._db = self._open()

    @classmethod
    def open(cls, path: Path, settings: CatalogSettings) -> "Catalog":
        """The catalogue at ``path``, its log beside it. A database that is damaged or of another format is set aside.

        Raises:
            ConfigError: another process uses it, or the reserve is below 1 MiB.
        """
        if settings.reserve < 1 << 20:
            raise ConfigError("catalog.reserve: 1 MiB is the least that works")
        if settings.versions < 1:
            raise ConfigError("catalog.versions: the current one is kept in any case: 1 is the least")
        return cls(path, settings)

    def close(self) -> None:
        self._db.close()

    # ------------------------------------------------------------------ manifests

    def recorded(self, ref: SeriesRef) -> Recorded | None:
        """The current manifest of a series. One that was used lately costs no I/O."""
        if (recent := self._recent.get(ref)) is not None:
            self._recent.move_to_end(ref)
            return recent
        found = self._do(lambda db: _recorded(db, ref))
        if found is not None:
            self._keep(found)
        return found

    def record(self, manifest: Manifest, now: float) -> None:
        """Take ``manifest`` as the series' current one, as confirmed at ``now`` (Unix seconds)."""
        self._keep(Recorded(manifest, now))
        self._do(lambda db: self._record(db, manifest, now))

    def invalidate(self, ref: SeriesRef) -> None:
        """Have the origin asked before the series' manifest is used again."""
        if (recent := self._recent.get(ref)) is not None:
            self._recent[ref] = Recorded(recent.manifest, 0.0)
        self._do(
            lambda db: db.execute(
                "UPDATE series SET validated_at = 0 WHERE study = ? AND series = ?", (ref.study, ref.series)
            )
        )

    def manifest_of(self, ref: SeriesRef, source_version: str) -> Manifest | None:
        """The objects of one version of a series, current or not, as long as it is remembered."""
        return self._do(lambda db: _version(db, ref, source_version))

    def forget(self, ref: SeriesRef) -> None:
        """The origin has no such series any more. Its versions can still be looked up."""
        if (recent := self._recent.pop(ref, None)) is not None:
            self._recent_objects -= len(recent.manifest.objects)
        self._do(lambda db: db.execute("DELETE FROM series WHERE study = ? AND series = ?", (ref.study, ref.series)))

    # ------------------------------------------------------------------ attributes

    def describe(self, ref: SeriesRef, source_version: str, attributes: Attributes) -> None:
        """Note what this version of a series is of; nothing happens if it is not recorded."""
        told = (msgspec.json.encode(attributes), attributes.patient, attributes.modality, attributes.taken_at)
        self._do(
            lambda db: db.execute(
                "UPDATE version SET attributes = ?, patient = ?, modality = ?, taken_at = ?"
                " WHERE study = ? AND series = ? AND source_version = ?",
                (*told, ref.study, ref.series, source_version),
            )
        )

    def described(self, ref: SeriesRef) -> Described | None:
        """The current version of a series as far as it is known; None if none is recorded."""
        found = self._search("version.study = ? AND version.series = ?", ref.study, ref.series)
        return found[0] if found else None

    def study(self, study: str) -> list[Described]:
        """The series of a study whose manifests are recorded, the latest first, then by their UIDs."""
        return self._search("version.study = ?", study)

    def of_patient(self, patient: str) -> list[Described]:
        """The series of all studies of a patient, the latest study first; of "" none: nobody's are not one's."""
        return self._search("version.patient = ?", patient) if patient else []

    def taken_since(self, moment: float, modality: str = "") -> list[Described]:
        """The series of studies that were made at ``moment`` (Unix seconds) or later, the latest first."""
        if not modality:
            return self._search("version.taken_at >= ?", moment)
        return self._search("version.taken_at >= ? AND version.modality = ?", moment, modality)

    def _search(self, condition: str, *values: object) -> list[Described]:
        query = (
            "SELECT version.study, version.series, count, attributes FROM version"  # noqa: S608 - conditions are ours
            f" JOIN series ON series.version = version.id WHERE {condition}"
            " ORDER BY taken_at DESC, version.study, version.series"
        )
        return self._do(lambda db: [_described(*row) for row in db.execute(query, values).fetchall()])

    def currents(self) -> dict[SeriesRef, Current]:
        """The current version of every series."""
        rows = self._do(
            lambda db: db.execute(
                "SELECT series.study, series.series, source_version, validated_at"
                " FROM series JOIN version ON version.id = series.version"
            ).fetchall()
        )
        return {SeriesRef(study, series): Current(*more) for study, series, *more in rows}

    # ------------------------------------------------------------------ restores

    def restore(self, ref: SeriesRef) -> Restore | None:
        """What is known of the series' way back from an archive, if it is on it."""
        row = self._do(
            lambda db: db.execute(
                "SELECT source_version, requested_at, expected_at, look_at FROM restore WHERE study = ? AND series = ?",
                (ref.study, ref.series),
            ).fetchone()
        )
        return None if row is None else Restore(*row)

    def note_restore(self, ref: SeriesRef, restore: Restore) -> None:
        row = (ref.study, ref.series, *msgspec.structs.astuple(restore))
        self._do(lambda db: db.execute("INSERT OR REPLACE INTO restore VALUES (?, ?, ?, ?, ?, ?)", row))

    def forget_restore(self, ref: SeriesRef) -> None:
        self._do(lambda db: db.execute("DELETE FROM restore WHERE study = ? AND series = ?", (ref.study, ref.series)))

    # ------------------------------------------------------------------ identities

    def identity(self, key: str, etag: str) -> SeriesRef | None:
        """The series that the object ``key`` was found to belong to while it had this ETag."""
        row = self._do(
            lambda db: db.execute(
                "SELECT study, series FROM identity WHERE key = ? AND etag = ?", (key, etag)
            ).fetchone()
        )
        return None if row is None else SeriesRef(*row)

    def remember_identity(self, key: str, etag: str, ref: SeriesRef) -> None:
        self._do(
            lambda db: db.execute(
                "INSERT OR REPLACE INTO identity (key, etag, study, series) VALUES (?, ?, ?, ?)",
                (key, etag, ref.study, ref.series),
            )
        )

    # ------------------------------------------------------------------ the database

    def _record(self, db: sqlite3.Connection, manifest: Manifest, now: float) -> None:
        study, series = manifest.ref.study, manifest.ref.series
        current = db.execute(
            "SELECT version.id, source_version FROM series JOIN version ON version.id = series.version"
            " WHERE series.study = ? AND series.series = ?",
            (study, series),
        ).fetchone()
        if current is not None and current[1] == manifest.source_version:
            db.execute("UPDATE series SET validated_at = ? WHERE study = ? AND series = ?", (now, study, series))
            return
        objects = _packed(manifest)
        if len(objects) > self._blob_bytes:
            # the version before it must not come back in its place
            db.execute("DELETE FROM series WHERE study = ? AND series = ?", (study, series))
            return
        # REPLACE: a version that was current before, and is again, gets a new id as the youngest
        version = db.execute(
            "INSERT OR REPLACE INTO version (study, series, source_version, objects, count) VALUES (?, ?, ?, ?, ?)",
            (study, series, manifest.source_version, objects, len(manifest.objects)),
        ).lastrowid
        db.execute("INSERT OR REPLACE INTO series VALUES (?, ?, ?, ?)", (study, series, version, now))
        db.execute(
            "DELETE FROM version WHERE id IN (SELECT id FROM version WHERE study = ? AND series = ?"
            " ORDER BY id DESC LIMIT -1 OFFSET ?)",
            (study, series, self._settings.versions),
        )

    def _do(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """``work`` in one transaction. A full file forgets its oldest; a failing one makes way for another."""
        remedies = iter((self._start_afresh, self._use_memory))
        while True:
            try:
                with self._db:
                    result = work(self._db)
                self._trim_log()
                return result
            except sqlite3.ProgrammingError:  # closed: ours, not the file's
                raise
            except _BROKEN as error:
                if _code(error) == sqlite3.SQLITE_FULL and self._make_room():
                    continue
                remedy = next(remedies, None)
                if remedy is None:
                    raise
                remedy()

    def _make_room(self) -> bool:
        """Forget the oldest versions and identities. False: there are none, or the disk has no room to note it."""
        try:
            with self._db as db:
                last = db.execute(
                    "SELECT id FROM version ORDER BY id LIMIT 1 OFFSET ?", (_FORGOTTEN_VERSIONS,)
                ).fetchone()
                upto = (last[0] if last is not None else sys.maxsize,)
                db.execute("DELETE FROM series WHERE version < ?", upto)
                gone = db.execute("DELETE FROM version WHERE id < ?", upto).rowcount
                gone += db.execute(
                    "DELETE FROM identity WHERE id IN (SELECT id FROM identity ORDER BY id LIMIT ?)",
                    (_FORGOTTEN_IDENTITIES,),
                ).rowcount
            self._trim_log()
        except _BROKEN:
            return False
        return gone > 0

    def _trim_log(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # there is none before the first write
            if self._log.stat().st_size > self._log_bytes:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _open(self) -> sqlite3.Connection:
        try:
            try:
                if (db := self._connected()) is not None:
                    return db
            except _BROKEN as error:
                if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL):
                    raise
            self._set_aside()
            if (db := self._connected()) is not None:
                return db
        except (OSError, *_BROKEN) as error:
            raise ConfigError(f"cannot open the catalogue {self._path}: {error}") from None
        raise ConfigError(f"the catalogue {self._path} cannot be made anew")

    def _connected(self) -> sqlite3.Connection | None:
        """The file's database, made if there is none; None if it is damaged, of another format or too large."""
        db = sqlite3.connect(self._path, timeout=0)
        try:
            # exclusive: no shared-memory file beside the log, and no second daemon
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA wal_autocheckpoint = 0")
            if _prepared(db, self._db_bytes):
                return db
        except BaseException:
            db.close()
            raise
        db.close()
        return None

    def _start_afresh(self) -> None:
        self._db.close()
        try:
            self._set_aside()
            self._db = self._connected() or _in_memory(self._db_bytes)
        except (OSError, *_BROKEN):
            self._use_memory()

    def _use_memory(self) -> None:
        self._db.close()
        self._db = _in_memory(self._db_bytes)

    def _set_aside(self) -> None:
        self._log.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size > self._db_bytes:
                self._path.unlink()
            else:
                self._path.replace(f"{self._path}.aside")

    def _keep(self, recorded: Recorded) -> None:
        """Have it in memory, in place of what was used least lately."""
        if (before := self._recent.pop(recorded.manifest.ref, None)) is not None:
            self._recent_objects -= len(before.manifest.objects)
        self._recent[recorded.manifest.ref] = recorded
        self._recent_objects += len(recorded.manifest.objects)
        while self._recent_objects > self._settings.remembered_objects:
            _, gone = self._recent.popitem(last=False)
            self._recent_objects -= len(gone.manifest.objects)


def _prepared(db: sqlite3.Connection, nbytes: int) -> bool:
    """Whether ``db`` is a sound catalogue of this format; an empty one becomes one."""
    # an answer the disk has lost in a power cut is asked for again; waiting for it would hold up every hit
    db.execute("PRAGMA synchronous = OFF")
    db.execute("PRAGMA temp_store = MEMORY")
    application, found = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if application == 0 and not db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        db.executescript(f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_FORMAT}; {_SCHEMA}")
        application, found = _APPLICATION, _FORMAT
    if (application, found) != (_APPLICATION, _FORMAT):
        return False
    (pages,) = db.execute(f"PRAGMA max_page_count = {nbytes // _PAGE}").fetchone()
    (sound,) = db.execute("PRAGMA quick_check(1)").fetchone()
    return bool(pages * _PAGE <= nbytes and sound == "ok")


def _in_memory(nbytes: int) -> sqlite3.Connection:
    """Where the disk fails the daemon goes on: what is recorded lasts as long as it does."""
    db = sqlite3.connect(":memory:")
    _prepared(db, nbytes)
    return db


def _recorded(db: sqlite3.Connection, ref: SeriesRef) -> Recorded | None:
    row = db.execute(
        "SELECT source_version, objects, validated_at FROM series JOIN version ON version.id = series.version"
        " WHERE series.study = ? AND series.series = ?",
        (ref.study, ref.series),
    ).fetchone()
    return None if row is None else Recorded(_unpacked(ref, row[0], row[1]), row[2])


def _version(db: sqlite3.Connection, ref: SeriesRef, source_version: str) -> Manifest | None:
    row = db.execute(
        "SELECT objects FROM version WHERE study = ? AND series = ? AND source_version = ?",
        (ref.study, ref.series, source_version),
    ).fetchone()
    return None if row is None else _unpacked(ref, source_version, row[0])


def _described(study: str, series: str, count: int, attributes: bytes | None) -> Described:
    """Raises: sqlite3.DatabaseError, when the bytes are not those that were written."""
    try:
        told = msgspec.json.decode(attributes, type=Attributes) if attributes is not None else None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise sqlite3.DatabaseError(f"recorded attributes: {error}") from None
    return Described(SeriesRef(study, series), count, told)


def _packed(manifest: Manifest) -> bytes:
    # by columns: keys, which share most of their text, then lie side by side and compress well
    fields = ("key", "size", "etag", "version")
    columns = [[getattr(source, field) for source in manifest.objects] for field in fields]
    return zlib.compress(msgspec.msgpack.encode([manifest.ref, *columns]), 1)


def _unpacked(ref: SeriesRef, source_version: str, objects: bytes) -> Manifest:
    """Raises: sqlite3.DatabaseError, when the bytes are not those of this version any more."""
    try:
        owner, *columns = msgspec.msgpack.decode(zlib.decompress(objects), type=_Packed)
        manifest = Manifest.of(owner, map(SourceObject, *columns))
    except (zlib.error, msgspec.MsgspecError) as error:
        raise sqlite3.DatabaseError(f"a recorded manifest: {error}") from None
    if (manifest.ref, manifest.source_version) != (ref, source_version):
        raise sqlite3.DatabaseError("a recorded manifest is not the one it was")
    return manifest


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 for what Python's own module, or ``_unpacked``, finds wrong."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
