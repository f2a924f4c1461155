"""The pool of workers: jobs go to the most urgent first, and one that ends badly takes nothing with it but itself.

A call owns its jobs: however it ends (result, error, cancellation), by then each of them has been answered, dropped
from the queue, or killed. So nobody writes to its extents any more, and their bytes can be given to someone else.
"""

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Annotated, Any, Final

import msgspec

from cache.attributes import Attributes
from cache.dicom.ahead import ENOUGH
from cache.dicom.assemble import SlicePlan, VolumePlan
from cache.dicom.header import InstanceHeader
from cache.errors import VoxcacheError, WorkerDied, WorkerFailed, WorkerOutOfMemory, WorkerTimeout
from cache.interfaces import Extent, NullObserver, Observer, Room
from cache.pack import Layout
from cache.recipe.chain import Recipe
from cache.urgency import Lines, current

from .wire import (
    LONGEST,
    PREFIX,
    Ahead,
    Arrange,
    Decode,
    Describe,
    Foresee,
    Headers,
    Identify,
    Job,
    Plan,
    ReadHeaders,
    RunSteps,
    Setup,
    frame,
    read_reply,
)

# A job of this many decoded bytes takes half a second even of JPEG 2000: urgent jobs wait no longer for a worker.
_MOST_PER_JOB: Final = 8 << 20
# A job of so few costs little more to hand out than to do; it is what the last ones have, so that workers end together.
_LEAST_PER_JOB: Final = 2 << 20
# At about half a millisecond each.
_HEADERS_PER_JOB: Final = 64
_START_TIMEOUT_S: Final = 60.0
# All a worker gets of the daemon's environment: credentials stay away from a process that reads hostile bytes.
_ENVIRONMENT: Final = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "TMPDIR")
# Workers are as many as there are CPUs: threads of their own would only get in each other's way.
_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_CLOSED: Final = "the worker pool is closed"


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many workers there are, and what a job may take.

    count: worker processes; 0 means one for each CPU that the daemon may use.
    job_timeout_s: seconds a job may take (some megabytes decoded, or the steps of a recipe) before it is killed.
    job_memory: bytes a job may allocate; the extents it reads and writes do not count.
    cancel_grace_s: seconds a job that nobody waits for any more may take to end by itself before it is killed.
    nice: how much the system prefers the daemon to its workers (nice(2)), so that hits are answered while they work.
    plugins: op classes of your own that are not packaged, as "module:class".
    """

    count: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    job_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    job_memory: Annotated[int, msgspec.Meta(ge=64 << 20)] = 2 << 30
    cancel_grace_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 5
    plugins: tuple[str, ...] = ()


class Workers:
    """Worker processes and the queue of jobs before them. ``start`` it first, ``close`` it last.

    Every call raises WorkerDied, WorkerTimeout, WorkerOutOfMemory or WorkerFailed if that befell one of its jobs, and
    beside these what it says itself. The most urgent work goes first (`cache.urgency`).
    """

    #: Transfer syntax UID → decoder and its version. Known once started.
    decoders: dict[str, str]

    def __init__(self, settings: WorkerSettings, observer: Observer | None = None) -> None:
        self._settings = settings
        self._observer = observer or NullObserver()
        self._queue: Lines[_Ticket] = Lines()
        self._queued = asyncio.Semaphore(0)  # how many wait in it
        self._workers: set[_Worker] = set()
        self._seats: list[asyncio.Task[None]] = []
        self._open = False
        self._busy = 0
        self.decoders = {}

    async def start(self) -> None:
        """Start all workers.

        Raises:
            ConfigError: a plugin cannot be loaded.
            WorkerFailed: a worker could not be started.
        """
        count = self._settings.count or len(os.sched_getaffinity(0))
        try:
            hired = await asyncio.gather(*(self._hire() for _ in range(count)), return_exceptions=True)
            workers = []
            for outcome in hired:
                if isinstance(outcome, BaseException):
                    raise outcome
                workers.append(outcome)
        except BaseException:
            await self.close()
            raise
        self._open = True
        self._seats = [asyncio.create_task(self._seat(worker)) for worker in workers]

    @property
    def busy(self) -> int:
        """Workers that have a job."""
        return self._busy

    @property
    def alive(self) -> bool:
        """Jobs are carried out."""
        return self._open

    async def close(self) -> None:
        """Kill all workers; calls that still wait raise WorkerFailed. Harmless when repeated."""
        self._open = False
        seats, self._seats = self._seats, []
        for seat in seats:
            seat.cancel()
        await _all_done(seats)
        while self._queue:
            self._queue.take().settle(WorkerFailed(_CLOSED))
        await asyncio.gather(*(self._dismiss(worker) for worker in tuple(self._workers)))

    async def identify(self, head: bytes) -> tuple[str, str, str]:
        """The study, series and SOP instance UIDs in the first bytes of a DICOM file.

        Raises: NotDicom, TruncatedObject.
        """
        [uids] = await self.do([Identify(head)])
        study, series, instance = uids
        return study, series, instance

    async def describe(self, head: bytes, key: bytes) -> Attributes:
        """What a series can be searched by, from the first bytes of a DICOM file; the patient hashed with ``key``.

        Raises: NotDicom, TruncatedObject.
        """
        attributes: Attributes
        [attributes] = await self.do([Describe(head, key)])
        return attributes

    @contextlib.asynccontextmanager
    async def derivation(
        self, pack: Extent, layout: Layout, recipe: Recipe, room: Room, stored: bool = False
    ) -> AsyncIterator["_Derivation"]:
        """See `Deriver`."""
        work = _Derivation(self, pack, layout, recipe, room, stored)
        try:
            yield work
        finally:
            await work.end()

    @property
    def seats(self) -> int:
        """Jobs that can be done at a time."""
        return max(1, len(self._seats))

    async def do(self, jobs: Sequence[Job]) -> list[Any]:
        """Have all ``jobs`` done; if one fails, drop the others. Not one of them runs any more when this ends."""
        if not self._open:
            raise WorkerFailed(_CLOSED)
        tickets = [_Ticket(job) for job in jobs]
        for ticket in tickets:
            self._queue.put(ticket, current())
            self._queued.release()
        answers = [ticket.answer for ticket in tickets]
        try:
            if answers:
                await asyncio.wait(answers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for ticket in tickets:
                ticket.give_up(self._settings.cancel_grace_s)
            await _all_done(answers)
        errors = [error for answer in answers if not answer.cancelled() and (error := answer.exception())]
        if errors:
            raise errors[0]
        return [answer.result() for answer in answers]

    async def _seat(self, worker: "_Worker | None") -> None:
        """One place in the pool: does job after job, and finds another worker when one is lost."""
        while True:
            await self._queued.acquire()
            ticket = self._queue.take()
            self._busy += 1
            try:
                if worker is None or not worker.alive:
                    gone, worker = worker, None
                    worker = await self._replace(gone, "lost")
                if ticket.claim(worker):
                    ticket.settle(await worker.do(ticket.job, self._settings.job_timeout_s))
            except Exception as error:  # whatever it is, the caller hears of it and the seat goes on
                ticket.settle(error)
                # After a failed allocation no one knows what state native code is in.
                if worker is not None and (not worker.alive or isinstance(error, WorkerOutOfMemory)):
                    gone, worker = worker, None
                    reason = error.code if isinstance(error, VoxcacheError) else WorkerFailed.code
                    with contextlib.suppress(VoxcacheError):  # the next job tries again, and hears why it fails
                        worker = await self._replace(gone, reason)
            except asyncio.CancelledError:
                ticket.settle(WorkerFailed(_CLOSED))
                raise
            finally:
                self._busy -= 1

    async def _replace(self, worker: "_Worker | None", reason: str) -> "_Worker":
        if worker is not None:
            self._observer.count("worker_restarts", (reason,))
            await self._dismiss(worker)
        return await self._hire()

    async def _hire(self) -> "_Worker":
        worker = await _Worker.start()
        self._workers.add(worker)
        try:
            setup = Setup(self._settings.job_memory, self._settings.plugins, self._settings.nice)
            self.decoders = await worker.do(setup, _START_TIMEOUT_S)
        except BaseException:
            await self._dismiss(worker)
            raise
        return worker

    async def _dismiss(self, worker: "_Worker") -> None:
        await worker.end()
        self._workers.discard(worker)


class _Derivation:
    """One pack on its way to a tensor: headers are read, and slices decoded, as objects arrive. See `Derivation`."""

    def __init__(  # noqa: PLR0917 - as the protocol has it
        self, pool: Workers, pack: Extent, layout: Layout, recipe: Recipe, room: Room, stored: bool
    ) -> None:
        self._pool = pool
        self._pack = pack
        self._layout = layout
        self._recipe = recipe
        self._room = room
        self._here: asyncio.Queue[int] = asyncio.Queue()  # objects that have arrived, but are not read yet
        self._unread = len(layout.members)  # objects that nothing here waits for yet
        self._headers: dict[int, InstanceHeader] = {}
        self._ahead: Ahead | None = None
        self._decoded: list[SlicePlan] = []
        self._inspecting = asyncio.create_task(self._inspect(stored))

    def arrived(self, member: int) -> None:
        self._here.put_nowait(member)

    async def plan(self) -> Plan:
        return await self._inspecting

    async def derive(self, pack: Extent, volume: Extent, result: Extent | None) -> dict[str, float]:
        if (result is None) != (not self._recipe.steps):
            raise ValueError("a recipe needs a place for its result exactly when it has steps")
        began = time.perf_counter()
        plan = await self.plan()
        jobs = []
        left = self._left(plan.volume, volume)
        slice_nbytes = plan.volume.spec.nbytes // max(1, len(plan.volume.slices))
        for first, last in _portions(len(left), slice_nbytes, self._pool.seats):
            part = plan.volume.part(left[first:last])
            members = tuple(self._layout.members[header.member] for header in part.objects)
            jobs.append(Decode(pack, members, part, volume))
        await self._pool.do(jobs)
        decoded = time.perf_counter()
        if result is None:
            return {"decode": decoded - began}
        steps = RunSteps(self._recipe.canonical(), plan.volume.spec, volume, result)
        await self._pool.do([steps])
        return {"decode": decoded - began, "recipe": time.perf_counter() - decoded}

    async def end(self) -> None:
        """Return when no job of it runs any more. Harmless when repeated."""
        self._inspecting.cancel()
        await _all_done([self._inspecting])
        if not self._inspecting.cancelled():
            self._inspecting.exception()  # whoever wanted the plan has heard of it

    async def _inspect(self, stored: bool) -> Plan:
        index = Extent(self._pack.path, self._pack.offset + self._layout.index.offset, self._layout.index.nbytes)
        if stored:
            [kept] = await self._pool.do([Arrange(None, self._recipe.canonical(), index)])
            if kept is not None:
                return kept  # type: ignore[no-any-return]  # of the type that Arrange names
            for member in range(self._unread):
                self.arrived(member)
        if self._here.qsize() < self._unread:
            await self._foresee()
        await _together([self._read_on() for _ in range(self._pool.seats)])
        headers = tuple(self._headers[member] for member in sorted(self._headers))
        plan: Plan
        [plan] = await self._pool.do([Arrange(headers, self._recipe.canonical(), index)])
        return plan

    async def _foresee(self) -> None:
        """From the first objects that arrive tell, if that can be, where the slices of all will lie."""
        while self._unread and len(self._headers) < ENOUGH:
            await self._read(await self._take(1))
        if self._unread:
            job = Foresee(tuple(self._headers.values()), len(self._layout.members), self._recipe.canonical())
            [guess] = await self._pool.do([job])
            if guess is not None and (volume := self._room(guess.spec.nbytes)) is not None:
                self._ahead = Ahead(guess, volume)

    async def _read_on(self) -> None:
        """Read, and decode, what arrives until nothing more will. One of these keeps one worker busy."""
        most = _HEADERS_PER_JOB
        if self._ahead is not None:
            spec = self._ahead.guess.spec
            most = max(1, _MOST_PER_JOB * spec.shape[0] // spec.nbytes)
        while self._unread:
            await self._read(await self._take(most))

    async def _take(self, most: int) -> list[int]:
        """The next object to arrive, and of those that are there already up to ``most`` in all."""
        self._unread -= 1
        taken = [await self._here.get()]
        while self._unread and len(taken) < most and not self._here.empty():
            self._unread -= 1
            taken.append(self._here.get_nowait())
        return taken

    async def _read(self, members: Sequence[int]) -> None:
        job = ReadHeaders(self._pack, tuple((n, self._layout.members[n]) for n in members), self._ahead)
        found: Headers
        [found] = await self._pool.do([job])
        self._headers |= zip(members, found.headers, strict=True)
        self._decoded += found.decoded

    def _left(self, plan: VolumePlan, volume: Extent) -> tuple[SlicePlan, ...]:
        """The slices that are not in ``volume`` yet."""
        ahead = self._ahead
        if ahead is None or ahead.volume != volume:
            return plan.slices
        foreseen = ahead.guess.spec
        if (foreseen.dtype, foreseen.shape) != (plan.spec.dtype, plan.spec.shape):
            return plan.slices
        times = Counter(piece.at for piece in self._decoded)  # two objects may have claimed one place
        done = {piece for piece in self._decoded if times[piece.at] == 1}
        members = [header.member for header in plan.objects]
        return tuple(
            piece for piece in plan.slices if msgspec.structs.replace(piece, object=members[piece.object]) not in done
        )


class _Ticket:
    """A job that waits or runs. ``answer`` is done only when no process works on the job, or ever will."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())  # it has been heard
        self._worker: _Worker | None = None
        self._grace: asyncio.TimerHandle | None = None

    def claim(self, worker: "_Worker") -> bool:
        """Take the job for ``worker``; False if it was given up while it waited."""
        if self.answer.done():
            return False
        self._worker = worker
        return True

    def give_up(self, grace_s: float) -> None:
        """Drop the job if it waits; if it runs, let it end by itself within ``grace_s`` seconds or be killed."""
        if self._worker is None:
            self.answer.cancel()
        elif not self.answer.done() and self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(grace_s, self._worker.kill)

    def settle(self, outcome: object) -> None:
        """Answer with a value or an error. The job has ended: its worker has replied, or is gone."""
        if self._grace is not None:
            self._grace.cancel()
        if self.answer.done():
            return
        if isinstance(outcome, BaseException):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


class _Worker:
    """One process and the socket to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        # Signals go by file descriptor: asyncio's own would race with its waiting for the exit status.
        self._handle = os.pidfd_open(process.pid)
        self._reader = reader
        self._writer = writer
        self._killed = False
        self._late = False

    @classmethod
    async def start(cls) -> "_Worker":
        """Raises: WorkerFailed: the system has no room for another process."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "cache.workers.child", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
            )
            return cls(process, *await asyncio.open_connection(sock=ours))
        except BaseException as exc:
            ours.close()  # a child that has been started reads its end, and leaves
            if isinstance(exc, OSError):
                raise WorkerFailed(f"a worker cannot be started: {exc.strerror}") from exc
            raise
        finally:
            theirs.close()

    @property
    def alive(self) -> bool:
        return not self._killed and self._process.returncode is None

    async def do(self, job: Job, limit_s: float) -> Any:
        """The job's answer. When this ends, the process has either replied or is gone.

        Raises: what the job failed with; and if the process is gone, WorkerDied, WorkerTimeout or WorkerFailed.
        """
        timer = asyncio.get_running_loop().call_later(limit_s, self._expire)
        try:
            self._writer.write(frame(job))
            await self._writer.drain()
            size = int.from_bytes(await self._reader.readexactly(PREFIX), "big")
            if size > LONGEST:
                raise msgspec.ValidationError(f"{size} bytes")
            answer = read_reply(await self._reader.readexactly(size), job)
        except (OSError, EOFError, msgspec.MsgspecError) as exc:
            await self.end()
            raise self._why(exc, type(job).__name__, limit_s) from None
        except BaseException:
            await self.end()
            raise
        finally:
            timer.cancel()
        if isinstance(answer, VoxcacheError):
            raise answer
        return answer

    def kill(self) -> None:
        if self._killed:
            return
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        os.close(self._handle)

    async def end(self) -> None:
        """Kill the process and wait until it is gone. Harmless when repeated."""
        self.kill()
        self._writer.transport.abort()
        await _all_done([asyncio.ensure_future(self._process.wait())])

    def _expire(self) -> None:
        self._late = True
        self.kill()

    def _why(self, exc: Exception, job: str, limit_s: float) -> WorkerFailed:
        if self._late:
            return WorkerTimeout(f"a {job} job was killed after {limit_s:g} s (workers.job_timeout_s)")
        if isinstance(exc, msgspec.MsgspecError):
            return WorkerFailed(f"a worker was killed for an answer to a {job} job that is none")
        return WorkerDied(f"a worker ended in the middle of a {job} job ({_exit(self._process.returncode)})")


def _portions(slices: int, nbytes: int, workers: int) -> Iterator[tuple[int, int]]:
    """First and last of the slices, of ``nbytes`` each, that go into a job: many at first, few in the end."""
    first = 0
    while first < slices:
        fair = math.ceil((slices - first) / (2 * workers))
        most = min(max(fair, _LEAST_PER_JOB // nbytes), _MOST_PER_JOB // nbytes)
        last = min(slices, first + max(1, most))
        yield first, last
        first = last


async def _together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all of ``work``; if one raises, cancel the others, and raise what it did once they have ended."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await _all_done(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def _all_done(futures: Sequence[asyncio.Future[Any]]) -> None:
    """Wait for all ``futures``, whatever they end with; a cancellation meanwhile takes effect only after that."""
    cancelled: asyncio.CancelledError | None = None
    while pending := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled


def _environment() -> dict[str, str]:
    kept = {name: value for name in _ENVIRONMENT if (value := os.environ.get(name)) is not None}
    # Workers import what the daemon can import, from wherever either was started.
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100 - keeps symbolic links
    return kept | dict.fromkeys(_THREADS, "1") | {"PYTHONPATH": path}


def _exit(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return signal.Signals(-returncode).name
    return f"exit status {returncode}"
