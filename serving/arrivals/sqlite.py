"""The arrival queue of one node: SQLite in WAL mode with a full sync at each commit.

When ``put`` returns, the events survive a crash and a power cut. Events that arrive while a commit is under way share
the next one.
"""

import asyncio
import functools
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from cache.errors import ConfigError, Overloaded, QueueDown
from cache.keys import SeriesRef

from .batches import Batches, Put
from .complete import due_at, gathered
from .event import Event
from .queue import ArrivalSettings, DeadLetter, Depth, Due, New, first_look, hurries, pause, pieces_of

T = TypeVar("T")

_FORMAT: Final = 1
_SCHEMA: Final = """
CREATE TABLE events (
    n INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    event BLOB NOT NULL,
    received REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'new',      -- new, assigned, done, dead
    study TEXT NOT NULL DEFAULT '',
    series TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 0,    -- to find the series
    not_before REAL NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    ended REAL                              -- since when it is done or dead
);
CREATE INDEX by_state ON events (state);
CREATE INDEX unassigned ON events (n) WHERE state = 'new';
CREATE INDEX later ON events (not_before) WHERE state = 'new';
CREATE INDEX assigned ON events (study, series) WHERE state = 'assigned';
CREATE INDEX waiting ON events (received) WHERE ended IS NULL;
CREATE INDEX ended ON events (ended) WHERE ended IS NOT NULL;
CREATE TABLE series (                       -- those that have assigned events
    study TEXT NOT NULL,
    series TEXT NOT NULL,
    look_at REAL NOT NULL,                  -- when it has to be looked at; it may turn out to be due later
    attempts INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (study, series)
) WITHOUT ROWID;
CREATE INDEX looks ON series (look_at);
"""


class SqliteQueue:
    """The queue's file, behind one thread of its own: an ArrivalQueue."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, settings: ArrivalSettings) -> None:
        self._connection = connection
        self._thread = thread
        self._settings = settings
        self._batches = Batches(lambda batch: self._transaction(functools.partial(self._accept, batch)))
        self._taken: set[SeriesRef] = set()
        self._waiting_at_most = settings.max_pending  # counted when it matters

    @classmethod
    async def open(cls, path: Path, settings: ArrivalSettings) -> "SqliteQueue":
        """Open or make the queue; what was accepted before is still in it. Raises: ConfigError."""
        thread = ThreadPoolExecutor(1, "arrivals")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, _connected, path)
        except sqlite3.Error as error:
            thread.shutdown()
            raise ConfigError(f"cannot open the arrival queue {path}: {error}") from error
        return cls(connection, thread, settings)

    async def put(self, events: Sequence[Event], now: float) -> int:
        return await self._batches.put(events, now)

    async def unassigned(self, now: float, limit: int = 1000) -> list[New]:
        rows = await self._run(
            lambda db: db.execute(
                "SELECT event, received, attempts FROM events WHERE state = 'new' AND not_before <= ?"
                " ORDER BY n LIMIT ?",
                (now, limit),
            ).fetchall()
        )
        return [New(_decoded(event), received, attempts) for event, received, attempts in rows]

    async def assign(self, found: Sequence[tuple[New, Sequence[Event]]], now: float) -> None:
        def note(db: sqlite3.Connection) -> None:
            for new, events in found:
                self._assign(db, new, events, now)
            self._forget(db, now)

        await self._transaction(note)

    async def unknown(self, new: New, reason: str, now: float, *, limited: bool = True) -> None:
        dead = limited and new.attempts + 1 >= self._settings.attempts
        await self._transaction(
            lambda db: db.execute(
                "UPDATE events SET state = ?, attempts = ?, not_before = ?, reason = ?, ended = ?"
                " WHERE id = ? AND state = 'new'",
                (
                    "dead" if dead else "new",
                    new.attempts + 1,
                    now + pause(new.attempts),
                    reason,
                    now if dead else None,
                    new.event.id,
                ),
            )
        )

    async def due(self, now: float, limit: int) -> tuple[list[Due], float | None]:
        dues, at = await self._transaction(lambda db: self._due(db, now, limit))
        self._taken.update(due.ref for due in dues)
        return dues, at

    async def done(self, due: Due, now: float, reason: str = "") -> None:
        await self._end(due, "done", reason, now)

    async def failed(self, due: Due, reason: str, now: float, *, limited: bool = True) -> bool:
        if limited and due.attempts + 1 >= self._settings.attempts:
            await self._end(due, "dead", reason, now)
            return False
        await self._put_back(due, due.attempts + 1, now + pause(due.attempts))
        return True

    async def postpone(self, due: Due, until: float) -> None:
        await self._put_back(due, due.attempts, until)

    async def waiting(self, study: str) -> int:
        query = "SELECT count(*) FROM events WHERE state = 'assigned' AND study = ?"
        [(count,)] = await self._run(lambda db: db.execute(query, (study,)).fetchall())
        return int(count)

    async def depth(self) -> Depth:
        def count(db: sqlite3.Connection) -> Depth:
            counts = dict(db.execute("SELECT state, count(*) FROM events GROUP BY state").fetchall())
            (oldest,) = db.execute("SELECT min(received) FROM events WHERE ended IS NULL").fetchone()
            return Depth(**counts, oldest=oldest)

        return await self._run(count)

    async def dead(self, limit: int = 1000) -> list[DeadLetter]:
        rows = await self._run(
            lambda db: db.execute(
                "SELECT event, reason, ended FROM events WHERE state = 'dead' ORDER BY ended DESC, n DESC LIMIT ?",
                (limit,),
            ).fetchall()
        )
        return [DeadLetter(_decoded(event), reason, at) for event, reason, at in rows]

    async def requeue(self, ids: Sequence[str] | None, now: float) -> int:
        change = (
            "UPDATE events SET state = 'new', received = ?, attempts = 0, not_before = 0, reason = '', ended = NULL"
            " WHERE state = 'dead'"
        )

        def revive(db: sqlite3.Connection) -> int:
            before = db.total_changes
            if ids is None:
                db.execute(change, (now,))
            else:
                db.executemany(f"{change} AND id = ?", [(now, each) for each in ids])
            self._waiting_at_most += db.total_changes - before
            return db.total_changes - before

        return await self._transaction(revive)

    def on_news(self, wake: Callable[[], None]) -> None:
        """Nobody else has this file."""

    async def ready(self) -> bool:
        return True

    async def close(self) -> None:
        await self._batches.close()
        await self._run(lambda db: db.close())
        self._thread.shutdown()

    # ------------------------------------------------------------------ in a transaction

    def _accept(self, batch: Sequence[Put], db: sqlite3.Connection) -> list[int | Overloaded]:
        most = self._settings.max_pending
        if self._waiting_at_most + sum(len(put.events) for put in batch) > most:
            (self._waiting_at_most,) = db.execute("SELECT count(*) FROM events WHERE ended IS NULL").fetchone()
        results: list[int | Overloaded] = []
        for put in batch:
            if self._waiting_at_most + len(put.events) > most:
                results.append(Overloaded(f"{self._waiting_at_most} events wait already; retry later"))
                continue
            new = _insert(db, put.events, put.received)
            self._waiting_at_most += new
            results.append(new)
        return results

    def _assign(self, db: sqlite3.Connection, new: New, events: Sequence[Event], now: float) -> None:
        pieces = pieces_of(new, events)
        if len(pieces) != 1:
            db.execute(
                "UPDATE events SET state = 'done', ended = ? WHERE id = ? AND state = 'new'", (now, new.event.id)
            )
            _insert(db, pieces, new.received)
        for event in pieces:
            # tries so far were to find the series; warming it has tries of its own
            db.execute(
                "UPDATE events SET state = 'assigned', event = ?, study = ?, series = ?, attempts = 0, not_before = 0"
                " WHERE id = ? AND state = 'new'",
                (_encoded(event), event.study, event.series, event.id),
            )
            db.execute(
                "INSERT INTO series (study, series, look_at) VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET look_at = min(look_at, excluded.look_at),"
                " not_before = iif(attempts = 0 AND ?, 0, not_before)",
                (event.study, event.series, first_look(event, new.received, self._settings), hurries(event)),
            )

    def _due(self, db: sqlite3.Connection, now: float, limit: int) -> tuple[list[Due], float | None]:
        dues: list[Due] = []
        looked = set(self._taken)
        while len(dues) < limit:
            rows = db.execute(
                "SELECT study, series, attempts, not_before FROM series WHERE look_at <= ? ORDER BY look_at LIMIT ?",
                (now, len(looked) + limit),
            ).fetchall()
            fresh = [(SeriesRef(study, series), *more) for study, series, *more in rows]
            fresh = [row for row in fresh if row[0] not in looked][: limit - len(dues)]
            if not fresh:
                break
            for ref, attempts, not_before in fresh:
                looked.add(ref)
                due, at = self._look(db, ref, attempts, not_before)
                if at <= now:
                    dues.append(due)
                else:
                    db.execute("UPDATE series SET look_at = ? WHERE study = ? AND series = ?", (at, *_key(ref)))
        (look,) = db.execute("SELECT min(look_at) FROM series WHERE look_at > ?", (now,)).fetchone()
        (later,) = db.execute(
            "SELECT min(not_before) FROM events WHERE state = 'new' AND not_before > ?", (now,)
        ).fetchone()
        return dues, min((at for at in (look, later) if at is not None), default=None)

    def _look(self, db: sqlite3.Connection, ref: SeriesRef, attempts: int, not_before: float) -> tuple[Due, float]:
        """What the series' events come to, and from when on it is due."""
        rows = db.execute(
            "SELECT event, received FROM events WHERE state = 'assigned' AND study = ? AND series = ?", _key(ref)
        ).fetchall()
        arrived = [(_decoded(event), received) for event, received in rows]
        series = gathered(arrived)
        at = max(due_at(series, self._settings.rule(series.modality)), not_before)
        return Due(ref, tuple(event for event, _ in arrived), series, attempts), at

    async def _end(self, due: Due, state: str, reason: str, now: float) -> None:
        """Settle the events of ``due``; the series is looked at anew if others have come meanwhile."""

        def end(db: sqlite3.Connection) -> None:
            db.executemany(
                "UPDATE events SET state = ?, reason = ?, ended = ? WHERE state = 'assigned' AND id = ?",
                [(state, reason, now, each) for each in due.ids],
            )
            left = db.execute(
                "SELECT 1 FROM events WHERE state = 'assigned' AND study = ? AND series = ?", _key(due.ref)
            ).fetchone()
            if left is None:
                db.execute("DELETE FROM series WHERE study = ? AND series = ?", _key(due.ref))
            else:
                _set_back(db, due.ref, 0, 0.0)
            self._forget(db, now)

        try:
            await self._transaction(end)
        finally:
            self._taken.discard(due.ref)

    async def _put_back(self, due: Due, attempts: int, at: float) -> None:
        try:
            await self._transaction(lambda db: _set_back(db, due.ref, attempts, at))
        finally:
            self._taken.discard(due.ref)

    def _forget(self, db: sqlite3.Connection, now: float) -> None:
        """Let go of the oldest events for which nothing is to be done any more."""
        db.execute("DELETE FROM events WHERE ended IS NOT NULL AND ended < ?", (now - self._settings.keep_s,))
        db.execute(
            "DELETE FROM events NOT INDEXED WHERE ended IS NOT NULL AND n <= (SELECT max(n) FROM events) - ?",
            (self._settings.keep_done,),
        )

    async def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def run(db: sqlite3.Connection) -> T:
            db.execute("BEGIN IMMEDIATE")
            try:
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise
            return result

        return await self._run(run)

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._connection)
        except sqlite3.Error as error:
            raise QueueDown(f"the arrival queue cannot be used now: {error}") from error


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _FORMAT):
            raise sqlite3.DatabaseError(f"it is of format {version}, which a later voxcache made")
        if version == 0:
            _make(db)
    except BaseException:
        db.close()
        raise
    return db


def _make(db: sqlite3.Connection) -> None:
    """The tables; what the file of an earlier voxcache holds is taken over."""
    script = f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_FORMAT};"
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone():
        # what was assigned is new again: the series it belongs to is found anew
        script = f"""
            BEGIN IMMEDIATE; DROP INDEX by_state; ALTER TABLE events RENAME TO before; {_SCHEMA}
            INSERT INTO events (n, id, event, received, state, ended)
                SELECT n, id, event, received, iif(state IN ('done', 'dead'), state, 'new'),
                    iif(state IN ('done', 'dead'), received, NULL) FROM before;
            DROP TABLE before; PRAGMA user_version = {_FORMAT};
        """  # noqa: S608  # all of it is ours
    db.executescript(f"{script} COMMIT;")


def _insert(db: sqlite3.Connection, events: Iterable[Event], now: float) -> int:
    before = db.total_changes
    db.executemany(
        "INSERT OR IGNORE INTO events (id, event, received) VALUES (?, ?, ?)",
        [(event.id, _encoded(event), now) for event in events],
    )
    return db.total_changes - before


def _set_back(db: sqlite3.Connection, ref: SeriesRef, attempts: int, at: float) -> None:
    db.execute(
        "UPDATE series SET look_at = ?, attempts = ?, not_before = ? WHERE study = ? AND series = ?",
        (at, attempts, at, *_key(ref)),
    )


def _key(ref: SeriesRef) -> tuple[str, str]:
    return ref.study, ref.series


def _encoded(event: Event) -> bytes:
    return msgspec.json.encode(event)


def _decoded(event: bytes) -> Event:
    return msgspec.json.decode(event, type=Event)
