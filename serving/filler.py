"""Makes planned entries ready, paced below demand, and tells how far it is: jobs."""

import asyncio
import contextlib
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Final, Literal

import msgspec

from cache.attributes import Described
from cache.catalog import Catalog
from cache.errors import NotFound, UnknownStudy
from cache.interfaces import Clock, Observer
from cache.keys import SeriesRef
from cache.origin.together import each
from cache.store import Store
from cache.urgency import Priority, Slots, Urgency, working

from .audit import DAEMON, SILENT, Agent, Auditor
from .audit.record import WARM
from .log import code_of, log_failure
from .plan import Decision, Fill, PlanSettings, Rule
from .plan import plan as planned

_JOBS_KEPT: Final = 1000
#: Failures that a job names; past that it only counts them.
_FAILURES_TOLD: Final = 1000
#: Series that are looked at together while a job finds out what it is about.
_LOOKS: Final = 16
#: Seconds between two messages on one job, unless nothing changes; then a sign of life comes so often.
_EVERY_S: Final = 0.25
_ALIVE_S: Final = 15.0
#: Seconds that a lane rests at most after an entry, where requests were answered while it was made.
_REST_S: Final = 0.5


class WarmSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How entries are made ready before anybody asks for them.

    parallel: entries that are made at once; requests do not count. Where some were answered while an entry was made,
        or failed, its place then rests for as long as that took, up to half a second.
    origin_bytes: bytes of series that are fetched for them at once; a series that is larger goes alone.
    """

    parallel: Annotated[int, msgspec.Meta(ge=1)] = 2
    origin_bytes: Annotated[int, msgspec.Meta(ge=1)] = 1 << 30


class Job(msgspec.Struct):
    """Work somebody asked for, as it goes on: entries that are made ready, or series that are indexed.

    ``ready`` of those ``done`` needed nothing. ``bytes`` of the origin's were worked through. ``failed`` has the code
    of the error of each of ``failures``, as long as they are few. ``error``: why it could not even begin.
    ``study``: the one that it is about; "" for several.
    """

    id: str
    kind: Literal["warm", "index"]
    total: int = 0
    done: int = 0
    ready: int = 0
    failures: int = 0
    bytes: int = 0
    ended: bool = False
    error: str = ""
    failed: dict[str, str] = {}  # reference → code
    study: str = ""

    def fail(self, what: str, error: Exception) -> None:
        self.failures += 1
        if len(self.failed) < _FAILURES_TOLD:
            self.failed[what] = code_of(error)


#: Hears what could not be done, and why.
Failed = Callable[[str, Exception], None]


class _Followed:
    """A job, and the event of its next change."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.changed = asyncio.Event()

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Filler:
    """Plans what series call for and makes it ready, a few entries at a time, the most urgent first."""

    def __init__(
        self,
        *,
        settings: WarmSettings,
        plan: PlanSettings,
        default: Rule,
        store: Store,
        catalog: Catalog,
        clock: Clock,
        observer: Observer,
        audit: Auditor = SILENT,
    ) -> None:
        self.audit = audit
        self._rules = plan.rules
        self._default = default
        self._store = store
        self._catalog = catalog
        self._clock = clock
        self._observer = observer
        self._slots = Slots(settings.parallel)
        self._lanes = settings.parallel
        self._fetching = _Bytes(settings.origin_bytes)
        self._jobs: OrderedDict[str, _Followed] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    async def hush(self, _: object = None) -> None:
        """Tell followers of jobs nothing any more: the daemon is about to stop."""
        self._closing.set()
        for followed in self._jobs.values():
            followed.tell()

    async def close(self) -> None:
        """Stop; a job that is asked for again goes on where it was, as what is ready is left alone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------ planning

    async def decide(self, ref: SeriesRef) -> Decision:
        """What the series calls for, its objects asked if a rule may depend on them. Raises: as Store.describe."""
        known = self._catalog.described(ref)
        if known is None or (known.attributes is None and self._rules):
            known = await self._store.describe(ref) if self._rules else Described(ref, 0, None)
        (decision,) = self._plan([known])
        return decision

    def decisions(self, study: str) -> list[Decision]:
        """What the study calls for, by what is known of it."""
        return self._plan(self._catalog.study(study))

    async def explain(self, study: str) -> list[Decision]:
        """What the study calls for, the origin asked for what is not known. Raises: UnknownStudy, as Store.describe."""
        refs = [known.ref for known in self._catalog.study(study)] or await self._store.series_in(study)
        if not refs:
            raise UnknownStudy(f"the origin holds nothing of study {study}")
        return self._plan(await each(self._store.describe, refs, _LOOKS))

    def _plan(self, series: Sequence[Described]) -> list[Decision]:
        patients = {known.attributes.patient for known in series if known.attributes is not None}
        earlier = [other for patient in sorted(patients) for other in self._catalog.of_patient(patient)]
        return planned(series, earlier, self._rules, self._default, self._clock.now())

    # ------------------------------------------------------------------ filling

    async def make(
        self, fills: Sequence[Fill], done: Callable[[Fill, int | Exception | None], None], who: Agent
    ) -> None:
        """Make entries of one series ready for ``who``, one after another, each when its turn comes.

        ``done`` hears of each: the bytes of its series, None if a tier held it already, or what Store.get raised.
        """
        for fill in fills:
            with working(Urgency(fill.priority)):
                async with self._slots.slot():
                    began, demands = time.perf_counter(), self._store.demands
                    done(fill, await self._made(fill, who))
                    if fill.priority > Priority.DEMAND and self._store.demands > demands:
                        # as long as it took: requests share the event loop, and the cores, with half as many warm-ups
                        await asyncio.sleep(min(time.perf_counter() - began, _REST_S))

    async def _made(self, fill: Fill, who: Agent) -> int | Exception | None:
        """What came of it, as ``done`` hears it."""
        try:
            if self._store.held(fill.want):
                return None
            nbytes = await self._store.source_bytes(fill.want.ref, fill.priority)
            async with self._fetching.of(nbytes):
                outcome = await self._store.get(fill.want, fill.priority)
                self.audit.note(WARM, who, outcome.entry)
                outcome.release()
        except Exception as error:
            self.audit.note(WARM, who, fill.want, code_of(error))
            return error
        return nbytes

    # ------------------------------------------------------------------ jobs

    def under_way(self) -> list[Job]:
        """The jobs that have not ended, latest first."""
        return [followed.job for followed in reversed(self._jobs.values()) if not followed.job.ended]

    def job(self, job_id: str) -> Job:
        """The job, as long as it is remembered. Raises: NotFound."""
        return self._followed(job_id).job

    async def follow(self, job_id: str) -> AsyncIterator[Job | None]:
        """The job now and after each change, the last time when it has ended; None as a sign of life between.

        Raises: NotFound.
        """
        followed = self._followed(job_id)
        while True:
            changed = followed.changed
            yield followed.job
            if followed.job.ended or self._closing.is_set():
                return
            while not changed.is_set() and not self._closing.is_set():
                try:
                    async with asyncio.timeout(_ALIVE_S):
                        await changed.wait()
                except TimeoutError:
                    yield None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EVERY_S):
                    await self._closing.wait()

    def warm_all(self, fills: Sequence[Fill], who: Agent = DAEMON) -> Job:
        """Start to make ``fills`` ready; the job tells how far it is."""

        async def found(_: Failed) -> Sequence[Fill]:
            return fills

        return self.warm(found, who)

    def warm(self, find: Callable[[Failed], Awaitable[Sequence[Fill]]], who: Agent = DAEMON) -> Job:
        """Start to make ready what ``find`` finds, which tells what it fails to; the job tells how far it is."""
        return self._start("warm", lambda followed: self._warm(followed, find, who))

    def index(self, prefix: str) -> Job:
        """Start to note every series under a prefix of the origin's, with its attributes."""
        return self._start("index", lambda followed: self._index(followed, prefix))

    async def wanted(
        self, named: Sequence[Fill], studies: Sequence[str], series: Sequence[SeriesRef], failed: Failed
    ) -> list[Fill]:
        """What is ``named``, and what the plan calls for of whole ``studies`` and single ``series``; each once.

        ``failed`` hears of each study or series of which that cannot be told, and of the error.
        """

        async def of_study(study: str) -> list[Decision]:
            try:
                return await self.explain(study)
            except Exception as error:
                failed(study, error)
                return []

        async def of_series(ref: SeriesRef) -> list[Decision]:
            try:
                return [await self.decide(ref)]
            except Exception as error:
                failed(f"{ref.study}/{ref.series}", error)
                return []

        decided = [*await each(of_study, studies, _LOOKS), *await each(of_series, series, _LOOKS)]
        planned = [fill for found in decided for one in found for fill in (*one.fills, *one.priors)]
        return list({fill.want: fill for fill in reversed([*named, *planned])}.values())[::-1]

    def _start(self, kind: Literal["warm", "index"], work: Callable[[_Followed], Awaitable[None]]) -> Job:
        followed = _Followed(Job(secrets.token_hex(8), kind))
        self._jobs[followed.job.id] = followed
        while len(self._jobs) > _JOBS_KEPT:
            self._jobs.popitem(last=False)
        task = asyncio.create_task(self._run(followed, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return followed.job

    async def _run(self, followed: _Followed, work: Callable[[_Followed], Awaitable[None]]) -> None:
        try:
            await work(followed)
        except Exception as error:
            followed.job.error = code_of(error)
            log_failure("a job ended", error, job=followed.job.id)
        followed.job.ended = True
        followed.tell()

    async def _warm(self, followed: _Followed, find: Callable[[Failed], Awaitable[Sequence[Fill]]], who: Agent) -> None:
        job = followed.job
        fills = sorted(await find(job.fail), key=lambda fill: fill.priority)
        job.total = job.failures + len(fills)
        studies = {fill.want.ref.study for fill in fills}
        job.study = studies.pop() if len(studies) == 1 else ""
        followed.tell()

        def done(fill: Fill, outcome: int | Exception | None) -> None:
            ref = fill.want.ref
            if isinstance(outcome, Exception):
                job.fail(str(fill.want), outcome)
                self._observer.count("warm_failures", (code_of(outcome),))
                log_failure("warm-up failed", outcome, study=ref.study, series=ref.series)
            else:
                job.done += 1
                job.ready += outcome is None
                job.bytes += outcome or 0
            followed.tell()

        # entries of one series are made of the same objects, which are fetched for the first of them
        by_series: dict[SeriesRef, list[Fill]] = {}
        for fill in fills:
            by_series.setdefault(fill.want.ref, []).append(fill)
        await each(lambda of_one: self.make(of_one, done, who), by_series.values(), self._lanes)

    async def _index(self, followed: _Followed, prefix: str) -> None:
        job = followed.job
        refs = await self._store.series_under(prefix)
        job.total = len(refs)
        followed.tell()

        async def one(ref: SeriesRef) -> None:
            try:
                self._store.changed(ref)
                await self._store.describe(ref)
                job.bytes += await self._store.source_bytes(ref, Priority.WARM)
                job.done += 1
            except Exception as error:
                job.fail(f"{ref.study}/{ref.series}", error)
                log_failure("indexing failed", error, study=ref.study, series=ref.series)
            followed.tell()

        await each(one, refs, _LOOKS)

    def _followed(self, job_id: str) -> _Followed:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound("no such job is remembered") from None


class _Bytes:
    """Bytes that are out at once: at most ``limit``, but one that asks for more goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._out = 0
        self._returned = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def of(self, nbytes: int) -> AsyncIterator[None]:
        nbytes = min(nbytes, self._limit)
        async with self._returned:
            await self._returned.wait_for(lambda: self._out + nbytes <= self._limit)
            self._out += nbytes
        try:
            yield
        finally:
            self._out -= nbytes
            async with self._returned:
                self._returned.notify_all()
