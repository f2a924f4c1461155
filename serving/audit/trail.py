"""What acts are noted in: appended to in no time, made records of and written by a thread of its own."""

import contextlib
import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from cache.entry import Entry
from cache.errors import VoxcacheError
from cache.interfaces import Clock
from serving.log import logger

from .agents import Agents
from .record import DAEMON, LOST, START, STOP, Act, Agent, Details, Said, What
from .spool import AuditSettings, Batch, Before, Full, Spool, State

#: Acts that become one batch at most: a few megabytes.
_AT_ONCE: Final = 4096
#: What a record takes, about.
_RECORD_BYTES: Final = 1 << 10
#: Seconds that the end of the daemon waits for what is not written yet.
_LAST_S: Final = 10.0

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

_Noted = tuple[float, Act, Agent, What, str, Details]
#: By what acts are alike.
_Mark = tuple[int, Agent, object, str, Details]


class Auditor(Protocol):
    """Whoever is told of acts. ``who`` names agents."""

    who: Agents

    def note(self, act: Act, agent: Agent, what: What, failed: str = "", details: Details = ()) -> None:
        """``agent`` did it to ``what``; ``failed``: the code of the error it ended with. No patient data.

        It returns at once, and never raises.
        """


class Silent:
    """Records nothing."""

    who = Agents()

    def note(self, act: Act, agent: Agent, what: What, failed: str = "", details: Details = ()) -> None:
        return


@contextlib.contextmanager
def failing(audit: Auditor, act: Act, agent: Agent, what: What) -> Iterator[None]:
    """If what is done in here fails, that is noted."""
    try:
        yield
    except VoxcacheError as error:
        audit.note(act, agent, what, error.code)
        raise


#: For whatever is not told to record.
SILENT: Final[Auditor] = Silent()


class Audit:
    """The Auditor over a spool. ``settings.waiting`` acts may wait for it; past that they are counted, and the count
    is recorded once that is possible."""

    def __init__(self, settings: AuditSettings, spool: Spool, clock: Clock) -> None:
        self.who = Agents(settings.user_header)
        self._settings = settings
        self._spool = spool
        self._now: Callable[[], float] = clock.now
        self._waiting: deque[_Noted] = deque()
        self._most = settings.waiting
        self._lost_told = 0  # of those that are lost, how many a record tells of
        self._lost_since = 0.0
        self._batch: Batch | None = None  # made, and not on disk yet
        self._noted_head_at = clock.monotonic()
        self._monotonic = clock.monotonic
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="voxcache-audit", daemon=True)
        self.state = State.RECORDING
        self.lost = 0  # acts that could not even wait, in all

    def start(self, details: Details = ()) -> Before:
        """Begin, with a record that says how the ones before it end. Raises: ConfigError."""
        before = self._spool.open()
        if before.missing or before.torn or before.unclean:
            logger().warning("audit records of before", **dict(before.details))
        self.note(START, DAEMON, None, details=(*details, *before.details))
        self._thread.start()
        return before

    def note(self, act: Act, agent: Agent, what: What, failed: str = "", details: Details = ()) -> None:
        if len(self._waiting) < self._most:
            self._waiting.append((self._now(), act, agent, what, failed, details))
        else:
            self._lost_since = self._lost_since or self._now()
            self.lost += 1
        if not self._news.is_set():
            self._news.set()

    def close(self) -> None:
        """Record the end and write what waits, for some seconds at most. Blocks: not for the event loop."""
        self.note(STOP, DAEMON, None)
        self._ending.set()
        self._thread.join(_LAST_S)
        if self._thread.is_alive():
            logger().error("audit records could not be written before the end", waiting=len(self._waiting))

    @property
    def filled(self) -> float:
        """The part of the budget that is used."""
        return self._spool.filled

    @property
    def backlog(self) -> int:
        """About how many bytes of records wait to be written."""
        batch = self._batch
        return len(self._waiting) * _RECORD_BYTES + (len(batch.data) if batch is not None else 0)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._ending.is_set():
            self._news.wait()
            self._ending.wait(self._settings.flush_s)
            self._news.clear()
            while self._write():
                pass
            if self._batch is not None:  # there is news still: it could not be written
                self._news.set()
        while self._write():  # the end itself may have been noted since
            pass
        self._note_head()
        self._spool.close()

    def _write(self) -> bool:
        """One batch to disk; whether there may be more."""
        if self._batch is None:
            acts = self._gathered()
            if not acts:
                return False
            self._batch = self._spool.batch(acts)
        try:
            self._spool.commit(self._batch)
        except (Full, OSError) as error:
            self._say(State.FAILING if isinstance(error, OSError) and error.errno not in _NO_ROOM else State.FULL)
            return False
        self._batch = None
        self._say(State.RECORDING)
        if self._monotonic() - self._noted_head_at >= self._settings.head_s:
            self._note_head()
        return True

    def _gathered(self) -> list[Said]:
        """What waits, alike acts as one, in the order of their first; what was lost at the end of it."""
        alike: dict[_Mark, list[float]] = {}
        noted: dict[_Mark, _Noted] = {}  # they keep alive what is told apart by its id
        for _ in range(min(len(self._waiting), _AT_ONCE)):
            each = self._waiting.popleft()
            when, act, agent, what, failed, details = each
            # an entry is one object for all who ask for it, and to hash it takes long
            mark = id(act), agent, id(what) if isinstance(what, Entry) else what, failed, details
            if (times := alike.get(mark)) is None:
                alike[mark] = [when, when, 1]
                noted[mark] = each
            else:
                times[1] = when
                times[2] += 1
        acts = [
            Said(act, agent, what, failed, first, last, int(times), details)
            for (_, act, agent, what, failed, details), (first, last, times) in (
                (noted[mark], alike[mark]) for mark in alike
            )
        ]
        if (lost := self.lost - self._lost_told) and len(self._waiting) < self._most:
            self._lost_told += lost
            since, self._lost_since = self._lost_since, 0.0
            acts.append(Said(LOST, DAEMON, None, "", since, self._now(), 1, (("lost", str(lost)),)))
        return acts

    def _say(self, state: State) -> None:
        if state is not self.state:
            log = logger().info if state is State.RECORDING else logger().error
            log("audit", state=state.name.lower(), lost=self.lost - self._lost_told)
        self.state = state

    def _note_head(self) -> None:
        self._noted_head_at = self._monotonic()
        try:
            head = self._spool.note_head()
        except OSError as error:
            logger().warning("the head of the audit records could not be noted", detail=error.strerror)
        else:
            # whoever collects the log has it where a change of the files does not reach
            logger().info("audit head", record=head.record, digest=head.digest)
