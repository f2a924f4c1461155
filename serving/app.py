"""Composition: every room is built from its settings, started in order, and drained in the reverse of it."""

import asyncio
import contextlib
import fcntl
import gc
import secrets
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Final

import msgspec
from aiohttp import web

from cache import __version__
from cache.arena import ALIGN, Arena
from cache.catalog import Catalog
from cache.errors import ConfigError
from cache.interfaces import Clock, Origin, SystemClock
from cache.lease import Leases
from cache.nvme import Disk, NvmeTier, State
from cache.nvme.faults import DiskFaultPlan, FaultyDisk
from cache.origin.directory import DirectoryOrigin
from cache.origin.faults import FaultPlan, FaultyOrigin
from cache.origin.find import Finder
from cache.origin.s3 import S3Origin
from cache.policy.shares import check_kept
from cache.ram import RamTier
from cache.restore import Restores
from cache.store import Store
from cache.workers.pool import Workers, WorkerSettings

from . import durable
from .admission import Admission
from .api import kserve, openapi
from .api.answering import answering
from .api.arrivals import Webhooks
from .api.embeddings import Embeddings
from .api.health import Health
from .api.keeping import Keeping
from .api.letters import DeadLetters
from .api.native import Native
from .api.page import Page
from .api.stats import StatsRoutes
from .api.timing import tell_timing
from .api.verifying import Verifying
from .api.warming import Warming
from .arrivals.changes import OrthancChanges
from .arrivals.cursors import Cursors
from .arrivals.listing import NewObjects, Reconciler
from .arrivals.pull import Pull, Puller
from .arrivals.queue import ArrivalQueue
from .arrivals.redis import RedisQueue
from .arrivals.sqlite import SqliteQueue
from .audit import DAEMON, SILENT, Audit, Auditor, Spool
from .audit.record import DIVIDE
from .config import PullSettings, Settings
from .filler import Filler
from .front import Front
from .grpc.door import GrpcDoor
from .handoff import Handoff
from .leasing import Lessor
from .log import logger, show_uids
from .metrics import Metrics
from .models import Models, TritonEncoder
from .plan import default_rule
from .readings import count_active, read_arrivals, read_tiers, read_work
from .recorder import Recorder
from .resolver import StoreResolver
from .results import Results
from .retention import Retention
from .stats import Held, Stats
from .triton import Triton, TritonSettings
from .uids import Uids
from .warm import Warmer
from .watched import Watched

_KEY_BYTES: Final = 32


@contextlib.asynccontextmanager
async def running(
    settings: Settings, reread: Callable[[], Settings] | None = None
) -> AsyncIterator[tuple[web.Application, Health]]:
    """The daemon with all its rooms started; everything is closed again on the way out, in reverse.

    At SIGHUP the settings are ``reread``, and the tiers divided as they then say.
    """
    clock = SystemClock()
    metrics = Metrics(clock)
    state = Path(settings.state.path)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_locked(state))
        patient_key = _patient_key(state)
        watched = stack.enter_context(_watched(settings, patient_key, metrics, clock))
        audit = await stack.enter_async_context(_recording(settings, patient_key, clock, metrics))
        arena = Arena.create(
            settings.ram.budget // ALIGN * ALIGN,
            group=settings.ram.group,
            huge_pages=settings.ram.huge_pages,
            lock=settings.ram.lock,
        )
        stack.callback(arena.close)
        ram = RamTier(arena, settings.ram, clock, on_evict=_counting(metrics, "ram"))
        leases = Leases(settings.leases, clock)
        stack.callback(leases.close)  # after all that fills: no byte that somebody reads is written again
        nvme = await NvmeTier.open(
            settings.nvme,
            clock,
            on_evict=_counting(metrics, "nvme"),
            reserved_bytes=settings.catalog.reserve,
            disk=_disk(settings),
            on_health=_tell_health,
        )
        stack.push_async_callback(nvme.close)
        catalog = Catalog.open(Path(settings.nvme.path) / "catalog.sqlite", settings.catalog)
        stack.callback(catalog.close)
        origin = await _origin(settings, metrics)
        stack.push_async_callback(origin.close)
        workers = await stack.enter_async_context(_at_work(settings.workers, metrics))
        triton, models = await stack.enter_async_context(_inference(settings.triton, arena, metrics))
        restores = Restores(settings.restore, origin, catalog, clock, metrics)
        store = Store(
            settings=settings.store,
            flights=settings.fills,
            ram=ram,
            nvme=nvme,
            catalog=catalog,
            origin=origin,
            finder=Finder(origin, settings.find, workers.identify, catalog),
            workers=workers,
            encoder=TritonEncoder(triton, models),
            recipes=settings.parsed_recipes(),
            clock=clock,
            observer=watched.observer,
            patient_key=patient_key,
            restores=restores,
            host=socket.gethostname(),
        )
        stack.push_async_callback(store.close)
        lessor = Lessor(store, leases, shm=arena.name, socket=str(settings.socket or ""), audit=audit)
        results = Results(store, models, settings.triton, clock, metrics)
        stack.push_async_callback(results.close)
        front = Front(triton, StoreResolver(store, arena, settings), Admission(settings.admission), results, audit)
        _know_models(models, store, settings)
        queue, filler, warmer = await stack.enter_async_context(
            _warming(settings, store, restores, catalog=catalog, clock=clock, metrics=metrics, audit=audit)
        )
        read_tiers(metrics, ram, nvme)
        read_work(metrics, store, leases, workers, front)
        counting = count_active(metrics, ram, nvme, settings.price, clock)
        stack.enter_context(
            _meanwhile(_expire(leases), store.drop_outdated(), nvme.scrub(), watched.heartbeat(), counting)
        )
        stack.enter_context(_divided_at_sighup(reread, ram, nvme, audit))

        async def checks() -> dict[str, bool]:
            return {"workers": workers.alive, "arrivals": await queue.ready(), **await triton.checks()}

        health = Health(checks, metrics, read_arrivals(metrics, queue, clock))
        held = Held(store, ram, nvme, leases)
        stats = StatsRoutes(
            Stats(
                watched,
                held,
                filler,
                queue,
                workers,
                triton=triton.checks,
                shared_queue=bool(settings.redis.url),
                clock=clock,
            )
        )
        native = Native(
            store=store,
            lessor=lessor,
            warmer=warmer,
            filler=filler,
            max_body=settings.server.max_body,
            audit=audit,
        )
        retention = _retention(settings, store, nvme, catalog, clock=clock, metrics=metrics, audit=audit)
        stack.enter_context(_meanwhile(retention.run()))
        warming = Warming(
            filler=filler,
            store=store,
            catalog=catalog,
            clock=clock,
            bucket=settings.origin.bucket,
            max_body=settings.server.max_body,
        )
        app = _application(settings, watched.recorder)
        await stack.enter_async_context(_other_doors(settings, lessor, front, watched.recorder, app))
        app.on_shutdown.extend((filler.hush, stats.hush))
        rooms = (
            native,
            Embeddings(store, settings.server.max_body, audit),
            Verifying(store, audit),
            Webhooks(
                settings.webhooks,
                warmer,
                clock,
                bucket=settings.origin.bucket,
                max_body=settings.server.max_body,
                audit=audit,
            ),
            DeadLetters(warmer, settings.server.max_body, audit),
            warming,
            Keeping(retention, clock, settings.server.max_body, audit),
            health,
            stats,
        )
        _add_routes(app, [route for room in rooms for route in room.routes()], front)
        yield app, health


def _application(settings: Settings, recorder: Recorder) -> web.Application:
    app = web.Application(middlewares=[answering(recorder)], client_max_size=settings.server.max_body)
    app.on_response_prepare.append(tell_timing)
    return app


def _add_routes(app: web.Application, described: list[web.RouteDef], front: Front) -> None:
    """Our own routes, which the description tells of, and those of Triton's API."""
    description = openapi.document(described)

    async def spec(request: web.Request) -> web.Response:
        return web.json_response(description)

    app.add_routes([*described, web.get("/openapi.json", spec), *Page().routes(), *kserve.routes(front)])


@contextlib.asynccontextmanager
async def _other_doors(
    settings: Settings, lessor: Lessor, front: Front, recorder: Recorder, app: web.Application
) -> AsyncIterator[None]:
    """The hand-off socket and gRPC, which drain with ``app``."""
    async with contextlib.AsyncExitStack() as stack:
        if settings.socket is not None:
            handoff = Handoff(lessor, recorder, drain_s=settings.server.drain_s)
            await handoff.listen(settings.socket, settings.ram.group, app)
            stack.push_async_callback(handoff.close)
        if settings.grpc.port >= 0:
            door = GrpcDoor(front, recorder, drain_s=settings.server.drain_s)
            stack.push_async_callback(door.close)
            await door.listen(settings.grpc, app)
        yield


@contextlib.asynccontextmanager
async def _warming(
    settings: Settings,
    store: Store,
    restores: Restores,
    *,
    catalog: Catalog,
    clock: Clock,
    metrics: Metrics,
    audit: Auditor,
) -> AsyncIterator[tuple[ArrivalQueue, Filler, Warmer]]:
    """What makes entries ready before they are asked for, at work on the arrivals that wait."""
    async with contextlib.AsyncExitStack() as stack:
        queue = await _queue(settings)
        stack.push_async_callback(queue.close)
        default = default_rule(settings.arrivals.warm, settings.arrivals.namespace)
        filler = Filler(
            settings=settings.warm,
            plan=settings.plan,
            default=default,
            store=store,
            catalog=catalog,
            clock=clock,
            observer=metrics,
            audit=audit,
        )
        stack.push_async_callback(filler.close)
        warmer = Warmer(settings.arrivals, queue, store, filler, clock=clock, observer=metrics)
        restores.asked = warmer.look_for
        warmer.start()
        stack.push_async_callback(warmer.close)
        cursors = Cursors(Path(settings.state.path) / "cursors.json")
        puller = Puller(_pulls(settings.pull, store, catalog, clock), warmer, cursors, metrics)
        puller.start()
        stack.push_async_callback(puller.close)
        yield queue, filler, warmer


def _pulls(settings: PullSettings, store: Store, catalog: Catalog, clock: Clock) -> list[Pull]:
    """The ways that are set in which origins are asked what is new."""
    pulls: list[Pull] = []
    if settings.orthanc.url:
        pulls.append(OrthancChanges(settings.orthanc))
    if settings.listing.interval_s > 0:
        pulls.append(NewObjects(settings.listing, store.dated, clock))
    if settings.reconcile.interval_s > 0:
        pulls.append(Reconciler(settings.reconcile, store.survey, catalog.currents, clock))
    return pulls


async def serve(settings: Settings, ready: Callable[[str], None], reread: Callable[[], Settings]) -> None:
    """Run the daemon until SIGTERM or SIGINT, then let requests under way end; a second signal forces the end.

    ``ready`` is called with the API's URL once requests are answered. SIGHUP has the namespaces' shares ``reread``.

    Raises: ConfigError.
    """
    stop = asyncio.Event()
    force = asyncio.Event()

    def told_to_stop() -> None:
        (force if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told_to_stop)
    async with running(settings, reread) as (app, health):
        # what was made at start stays: to look through it again and again would hold up hits; and what requests leave
        # behind is freed without a look, but for rare cycles
        gc.freeze()
        gc.set_threshold(10_000, 25, 25)
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=settings.server.drain_s,
            handler_cancellation=True,
        )
        await runner.setup()
        site = web.TCPSite(runner, settings.server.host, settings.server.port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.server.host}:{settings.server.port}: {error.strerror}"
            ) from error
        host, port = runner.addresses[0][:2]
        url = f"http://{host}:{port}"
        logger().info("ready", url=url)
        ready(url)
        await stop.wait()
        health.draining = True
        logger().info("draining", seconds=settings.server.drain_s)
        draining = asyncio.create_task(runner.cleanup())
        forced = asyncio.create_task(force.wait())
        await asyncio.wait((draining, forced), return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, forced):
            task.cancel()
        await asyncio.gather(draining, forced, return_exceptions=True)
    logger().info("stopped")


@contextlib.contextmanager
def _watched(settings: Settings, patient_key: bytes, metrics: Metrics, clock: Clock) -> Iterator[Watched]:
    uids = Uids(settings.log.uids, patient_key)
    show_uids(uids)
    watched = Watched(
        metrics,
        uids,
        observe=settings.observe,
        price=settings.price,
        log=settings.log,
        tracing=settings.tracing,
        clock=clock,
    )
    try:
        yield watched
    finally:
        watched.tracing.close()


def _counting(metrics: Metrics, tier: str) -> Callable[[object, str], None]:
    return lambda entry, reason: metrics.count("evictions", (tier, reason))


@contextlib.contextmanager
def _divided_at_sighup(
    reread: Callable[[], Settings] | None, ram: RamTier, nvme: NvmeTier, audit: Auditor
) -> Iterator[None]:
    if reread is None:
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, _divide, reread, ram, nvme, audit)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def _divide(reread: Callable[[], Settings], ram: RamTier, nvme: NvmeTier, audit: Auditor) -> None:
    """Divide the tiers as the settings say now; if these are not right, leave all as it is, and say so."""
    try:
        settings = reread()
        for tier, shares in ((ram, settings.ram.namespaces), (nvme, settings.nvme.namespaces)):
            check_kept(tier.namespaces, shares)
    except ConfigError as error:
        logger().error("namespaces not divided anew", detail=str(error))
        audit.note(DIVIDE, DAEMON, None, error.code)
        return
    ram.divide(settings.ram.namespaces)
    nvme.divide(settings.nvme.namespaces)
    audit.note(DIVIDE, DAEMON, None)
    logger().info("namespaces divided anew", ram=_told(ram), nvme=_told(nvme))


def _told(tier: RamTier | NvmeTier) -> dict[str, list[int]]:
    """Bytes reserved, and at most, by namespace."""
    usages = {namespace: tier.usage(namespace) for namespace in tier.namespaces}
    return {namespace: [usage.reserved, usage.budget] for namespace, usage in usages.items()}


@contextlib.contextmanager
def _meanwhile(*works: Coroutine[object, object, None]) -> Iterator[None]:
    """What goes on for as long as the context lasts. One that fails before is missed from then on, so the log tells."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(_tell_broken)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


def _tell_broken(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger().error("background work broke", exc_info=error)


async def _expire(leases: Leases) -> None:
    # a pin may end a second late, never early: that is what the grace is for
    while True:
        leases.expire()
        await asyncio.sleep(1.0)


async def _origin(settings: Settings, metrics: Metrics) -> Origin:
    origin: Origin
    if settings.origin.directory is not None:
        origin = DirectoryOrigin(settings.origin.directory, metrics)
    else:
        assert settings.origin.s3 is not None  # checked when the settings were read
        origin = await S3Origin.open(settings.origin.s3, metrics)
    plan = settings.faults.origin
    if plan != FaultPlan():
        logger().warning("the origin fails on purpose", plan=msgspec.to_builtins(plan), seed=settings.faults.seed)
        origin = FaultyOrigin(origin, plan, settings.faults.seed)
    return origin


def _disk(settings: Settings) -> Disk | None:
    plan = settings.faults.disk
    if plan == DiskFaultPlan():
        return None
    logger().warning("the disk fails on purpose", plan=msgspec.to_builtins(plan), seed=settings.faults.seed)
    return FaultyDisk(plan, settings.faults.seed, direct=settings.nvme.direct)


def _tell_health(side: str, state: State) -> None:
    say = logger().info if state is State.HEALTHY else logger().warning
    say("disk", side=side, state=state.name.lower())


@contextlib.asynccontextmanager
async def _at_work(settings: WorkerSettings, metrics: Metrics) -> AsyncIterator[Workers]:
    workers = Workers(settings, metrics)
    await workers.start()
    try:
        yield workers
    finally:
        await workers.close()


@contextlib.asynccontextmanager
async def _inference(settings: TritonSettings, arena: Arena, metrics: Metrics) -> AsyncIterator[tuple[Triton, Models]]:
    async with contextlib.AsyncExitStack() as stack:
        triton = await Triton.open(settings, f"/{arena.name}", arena.nbytes, metrics)
        stack.push_async_callback(triton.close)
        triton.keep_registered()
        models = Models(triton)
        stack.push_async_callback(models.close)
        yield triton, models


def _know_models(models: Models, store: Store, settings: Settings) -> None:
    """Find out who the models are that entries are named after, and drop what is of none of them any more."""
    models.assume({(infer.model, infer.version): last for infer, last in store.last_models().items()})
    models.watch(settings.models_to_know(), settings.triton.identify_s, store.drop_made_by)


async def _queue(settings: Settings) -> ArrivalQueue:
    state = Path(settings.state.path)
    if not settings.redis.url:
        return await SqliteQueue.open(state / "arrivals.sqlite", settings.arrivals)
    node = state / "node"  # the same after a restart: what this node had taken is its own still
    if not node.exists():
        node.write_text(uuid.uuid4().hex)
    return await RedisQueue.open(settings.redis, settings.arrivals, node.read_text())


@contextlib.contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Hold the state directory: two daemons in one would carry out each other's arrivals. Raises: ConfigError."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("a")
    except OSError as error:
        raise ConfigError(f"state.path {state} cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another daemon uses state.path {state}") from None
        yield


def _retention(
    settings: Settings,
    store: Store,
    nvme: NvmeTier,
    catalog: Catalog,
    *,
    clock: Clock,
    metrics: Metrics,
    audit: Auditor,
) -> Retention:
    """What is kept, with the pins of before. Raises: ConfigError."""
    retention = Retention(
        settings=settings.retention,
        path=Path(settings.state.path) / "pins.json",
        store=store,
        catalog=catalog,
        budgets=lambda: {name: nvme.usage(name).budget for name in settings.nvme.namespaces},
        clock=clock,
        observer=metrics,
        audit=audit,
    )
    metrics.read("pinned_bytes", lambda: [((name,), float(n)) for name, n in retention.pinned_bytes().items()])
    return retention


@contextlib.asynccontextmanager
async def _recording(settings: Settings, key: bytes, clock: Clock, metrics: Metrics) -> AsyncIterator[Auditor]:
    """Who does what is recorded from here on. Raises: ConfigError."""
    if not settings.audit.enabled:
        yield SILENT
        return
    state = Path(settings.state.path)
    spool = Spool(settings.audit, settings.audit.folder(state), state / "audit.head", key, socket.gethostname())
    audit = Audit(settings.audit, spool, clock)
    audit.start((("software", f"voxcache {__version__}"),))
    metrics.read("audit_backlog_bytes", lambda: [((), float(audit.backlog))])
    metrics.read("audit_state", lambda: [((), float(audit.state))])
    metrics.read("audit_filled", lambda: [((), audit.filled)])
    metrics.read("audit_lost", lambda: [((), float(audit.lost))])
    try:
        yield audit
    finally:
        await asyncio.to_thread(audit.close)


def _patient_key(state: Path) -> bytes:
    """The key that hashes what identifies patients, made at the first start. Raises: ConfigError."""
    path = state / "patient.key"
    try:
        if not path.exists():
            durable.write(path, secrets.token_bytes(_KEY_BYTES), 0o600)
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be used: {error.strerror}") from error
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"{path} does not hold {_KEY_BYTES} bytes: restore it, or remove it and the catalogue")
    return key


async def fsck(settings: Settings, *, repair: bool) -> int:
    """Check the NVMe tier while no daemon runs, and say what was found; 1 if something wrong was not repaired."""
    with _locked(Path(settings.state.path)):
        nvme = await NvmeTier.open(settings.nvme, SystemClock(), reserved_bytes=settings.catalog.reserve)
        try:
            report = await nvme.check(repair=repair)
        finally:
            await nvme.close()
    print(report)
    return 0 if report.well else 1
