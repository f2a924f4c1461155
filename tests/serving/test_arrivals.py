"""Arrivals: what was accepted is never lost, and what arrived gets warm."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cache.attributes import Attributes
from cache.catalog import Catalog, CatalogSettings
from cache.errors import (
    AllPinned,
    BadRequest,
    EmptySeries,
    OriginDenied,
    OriginDown,
    TooLarge,
    VoxcacheError,
    WorkerDied,
)
from cache.interfaces import SystemClock
from cache.keys import SeriesRef, TensorRef
from cache.store import Store
from cache.urgency import Priority
from serving.arrivals.complete import Override
from serving.arrivals.event import Event
from serving.arrivals.queue import ArrivalQueue, ArrivalSettings, Due
from serving.arrivals.sqlite import SqliteQueue
from serving.filler import Filler, WarmSettings
from serving.plan import PlanSettings, default_rule
from serving.warm import Warmer
from tests.cache.walk import Ears
from tests.conformance.queue import NOW, A, B, counts, event
from tests.daemon import Bucket, Daemon
from tests.services import S3Service

# ------------------------------------------------------------------ the warmer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "arrivals.sqlite"


class FakeStore:
    """Stands for the store: ``faults`` are raised in turn, then all goes well. Keys are ``study/series/…``."""

    def __init__(self) -> None:
        self.faults: list[Exception] = []
        self.nameless: dict[str, list[Exception]] = {}  # by object key
        self.attributes_of: dict[SeriesRef, Attributes] = {}
        self.there: list[int] = []  # how many objects the series has, from one look to the next
        self.trace: list[object] = []
        self.go = asyncio.Event()
        self.go.set()
        self.on_disk = asyncio.Event()
        self.on_disk.set()
        self.got = asyncio.Event()
        self.gets = 0
        self.demands = 0
        self.entry = None

    async def attributes(self, ref: SeriesRef, object_key: str) -> Attributes | None:
        self.trace.append(("read", object_key))
        return self.attributes_of.get(ref)

    async def series_in(self, study: str) -> list[SeriesRef]:
        return [ref for ref in (A, B) if ref.study == study]

    async def series_under(self, prefix: str) -> list[SeriesRef]:
        self.trace.append(("under", prefix))
        return [] if prefix == "empty/" else [A, B]

    async def expected(self, object_key: str) -> int | None:
        return None

    async def objects(self, ref: SeriesRef) -> int:
        self.trace.append(("counted", ref))
        return self.there.pop(0)

    async def series_of(self, object_key: str) -> SeriesRef | None:
        if faults := self.nameless.get(object_key):
            raise faults.pop(0)
        study, _, rest = object_key.partition("/")
        return SeriesRef(study, rest.split("/")[0]) if rest else None

    def held(self, want: TensorRef) -> str:
        return ""

    async def source_bytes(self, ref: SeriesRef, priority: int) -> int:
        return 0

    async def written(self, ref: SeriesRef) -> None:
        await self.on_disk.wait()

    def changed(self, ref: SeriesRef) -> None:
        self.trace.append(("changed", ref))

    async def get(self, want: TensorRef, priority: Priority = Priority.DEMAND) -> "FakeStore":
        self.got.set()
        await self.go.wait()
        assert priority == Priority.WARM
        self.trace.append(want)
        self.gets += 1
        if self.faults:
            raise self.faults.pop(0)
        return self

    def release(self) -> None:
        self.trace.append("released")


class Hurry(SystemClock):
    """Ten seconds go by between any two looks at this clock, so that no pause is waited for."""

    def __init__(self) -> None:
        self._looks = itertools.count(1)

    def now(self) -> float:
        return NOW + 10.0 * next(self._looks)


@asynccontextmanager
async def warming(
    path: Path, store: FakeStore, ears: Ears | None = None, **changes: Any
) -> AsyncIterator[tuple[Warmer, ArrivalQueue]]:
    base: dict[str, Any] = {"warm": ("volume",), "quiet_s": 0.0, "attempts": 3}
    chosen = ArrivalSettings(**(base | changes))
    queue = await SqliteQueue.open(path, chosen)
    clock = Hurry()
    catalog = Catalog.open(path.with_name("catalog.sqlite"), CatalogSettings(reserve=1 << 20))
    filler = Filler(
        settings=WarmSettings(),
        plan=PlanSettings(),
        default=default_rule(chosen.warm, chosen.namespace),
        store=_as_store(store),
        catalog=catalog,
        clock=clock,
        observer=ears or Ears(),
    )
    warmer = Warmer(chosen, queue, _as_store(store), filler, clock=clock, observer=ears or Ears())
    warmer.start()
    try:
        yield warmer, queue
    finally:
        await warmer.close()
        await filler.close()
        catalog.close()
        await queue.close()


def _as_store(store: FakeStore) -> Store:
    return store  # type: ignore[return-value]  # it has all of it that the warmer uses


def of(ref: SeriesRef, number: int) -> Event:
    return event(number, f"{ref.study}/{ref.series}/{number}.dcm")


async def until(queue: ArrivalQueue, **depth: int) -> None:
    async with asyncio.timeout(30):
        while await counts(queue) != depth:
            await asyncio.sleep(0.005)  # the warmer's tasks bring it about, and tell nobody


async def test_what_arrives_gets_warm(path: Path) -> None:
    """An arrival wakes the warmer, which has the series listed anew and every recipe made at low priority."""
    store, ears = FakeStore(), Ears()
    async with warming(path, store, ears, warm=("volume", "small"), namespace="staging") as (warmer, queue):
        assert await warmer.accept([of(A, 1), of(A, 2), event(3, "no-series")]) == 3
        assert await warmer.accept([of(A, 1)]) == 0
        await until(queue, done=3)
    wants = [TensorRef(A, "volume", "staging"), "released", TensorRef(A, "small", "staging"), "released"]
    assert store.trace == [("changed", A), *wants]
    assert ears.counts == {"arrival_events/new": 3, "arrival_events/repeat": 1}
    assert ears.observed == {"arrival_to_ready_seconds": 1}


async def test_an_event_that_names_its_series(path: Path) -> None:
    """A source that names study and series is taken at its word: no object is looked up."""
    store = FakeStore()
    store.nameless = {"": [RuntimeError("looked up")]}
    async with warming(path, store) as (warmer, queue):
        await warmer.accept([Event("id-1", "orthanc", "created", study=A.study, series=A.series)])
        await until(queue, done=1)
    assert store.trace[0] == ("changed", A)


@pytest.mark.parametrize("error", [EmptySeries("gone"), BadRequest("no"), TooLarge("never")])
async def test_what_lasts_is_tried_once(path: Path, error: VoxcacheError) -> None:
    """An error that lies in the series or the settings ends its events; other recipes are made all the same."""
    store, ears = FakeStore(), Ears()
    store.faults = [error]
    async with warming(path, store, ears, warm=("volume", "small")) as (warmer, queue):
        await warmer.accept([of(A, 1)])
        await until(queue, done=1)
    assert [want.recipe for want in store.trace if isinstance(want, TensorRef)] == ["volume", "small"]
    assert ears.counts[f"warm_failures/{error.code}"] == 1


@pytest.mark.parametrize(
    "error", [OriginDown("down"), OriginDenied("denied"), AllPinned("full"), WorkerDied("died"), RuntimeError("a bug")]
)
async def test_what_may_pass_is_tried_again(path: Path, error: Exception) -> None:
    """An error that another try may help against, even a bug of ours, is followed by another try."""
    store = FakeStore()
    store.faults = [error]
    async with warming(path, store) as (warmer, queue):
        await warmer.accept([of(A, 1)])
        await until(queue, done=1)
    assert store.gets == 2


async def test_a_try_without_hope_is_the_last(path: Path) -> None:
    """A series that the workers fail each time is set aside; another one is warmed meanwhile."""
    store = FakeStore()
    store.faults = [WorkerDied("died")]
    async with warming(path, store, attempts=1) as (warmer, queue):
        await warmer.accept([of(A, 1)])
        await until(queue, dead=1)
        await warmer.accept([of(B, 2)])
        await until(queue, dead=1, done=1)


async def test_an_object_that_cannot_be_read_holds_up_nobody(path: Path) -> None:
    """Others are warmed while one object's series is asked for again and again, each object by its own count."""
    store = FakeStore()
    poison, slow = of(A, 1), of(A, 2)
    store.nameless = {poison.key: [WorkerDied("died")] * 9, slow.key: [OriginDown("down"), RuntimeError("a bug")]}
    async with warming(path, store, attempts=2) as (warmer, queue):
        await warmer.accept([poison, slow, of(B, 3)])
        await until(queue, dead=2, done=1)


async def test_what_comes_while_its_series_is_warmed(path: Path) -> None:
    """It is not lost, and not taken for carried out: the series is warmed once more."""
    store = FakeStore()
    store.go.clear()
    async with warming(path, store) as (warmer, queue):
        await warmer.accept([of(A, 1)])
        await store.got.wait()
        await warmer.accept([of(A, 2), of(B, 3)])
        await until(queue, assigned=3)
        while ("changed", B) not in store.trace:
            await asyncio.sleep(0.001)  # the warmer's tasks bring it about, and tell nobody
        assert store.trace.count(("changed", A)) == 1
        store.go.set()
        await until(queue, done=3)
    assert store.trace.count(("changed", A)) == 2


async def test_a_bug_does_not_end_the_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that breaks in a way nobody foresaw is followed by another one."""
    store = FakeStore()
    async with warming(path, store) as (warmer, queue):
        due, broken = queue.due, asyncio.Event()

        async def breaks(now: float, limit: int) -> tuple[list[Due], float | None]:
            if broken.is_set():
                return await due(now, limit)
            broken.set()
            raise RuntimeError("a bug")

        monkeypatch.setattr(queue, "due", breaks)
        await warmer.accept([of(A, 1)])
        await until(queue, done=1)


async def test_done_is_what_outlives_a_crash(path: Path) -> None:
    """A warm series is ready at once, and its events are done when its entries are on disk; others go on meanwhile."""
    store = FakeStore()
    store.on_disk.clear()
    async with warming(path, store) as (warmer, queue):
        refs = [SeriesRef("1.2", f"1.2.{number}") for number in range(4)]
        await warmer.accept([of(ref, number) for number, ref in enumerate(refs)])
        while store.gets < 4 or await warmer.waiting("1.2"):
            await asyncio.sleep(0.001)  # the warmer's tasks bring it about, and tell nobody
        assert await counts(queue) == {"assigned": 4}
        store.on_disk.set()
        await until(queue, done=4)
        assert await warmer.waiting("1.2") == 0


async def test_a_restart_goes_on(path: Path) -> None:
    """Stopped in the middle of a warm-up, the next daemon begins it again."""
    store = FakeStore()
    store.go.clear()
    async with warming(path, store) as (warmer, _):
        await warmer.accept([of(A, 1), of(B, 2)])
        await store.got.wait()
    after = FakeStore()
    async with warming(path, after) as (_, queue):
        await until(queue, done=2)
    assert {want.ref for want in after.trace if isinstance(want, TensorRef)} == {A, B}


async def test_a_few_at_a_time(path: Path) -> None:
    """No more series are warmed at once than the settings say; the others stay where another node can take them."""
    store = FakeStore()
    store.go.clear()
    async with warming(path, store, parallel=2) as (warmer, queue):
        await warmer.accept([of(SeriesRef("1.2", f"1.2.{n}"), n) for n in range(6)])
        await until(queue, assigned=6)
        await store.got.wait()
        dues, _ = await queue.due(NOW + 1e6, 100)
        assert len(dues) == 4
        for due in dues:
            await queue.postpone(due, NOW)
        store.go.set()
        await until(queue, done=6)


async def test_a_study_that_arrived(path: Path) -> None:
    """An event of a whole study has each of its series warmed."""
    store = FakeStore()
    async with warming(path, store) as (warmer, queue):
        await warmer.accept([Event("id-1", "orthanc", "created", study=A.study, complete=True)])
        await until(queue, done=3)
    assert {want.ref for want in store.trace if isinstance(want, TensorRef)} == {A, B}


@pytest.mark.parametrize(("key", "prefix"), [("folder/", "folder/"), ("/", "")])
async def test_a_folder_that_arrived(path: Path, key: str, prefix: str) -> None:
    """A folder is carried out as the series with objects in it; the whole bucket is one."""
    store = FakeStore()
    async with warming(path, store) as (warmer, _):
        await warmer.accept([Event("id-1", "healthimaging", "created", key=key, expected=7)])
        while not {("changed", A), ("changed", B)} <= {each for each in store.trace if isinstance(each, tuple)}:
            await asyncio.sleep(0.005)  # the warmer's tasks bring it about, and tell nobody
    assert store.trace[0] == ("under", prefix)


@pytest.mark.parametrize("told", [{"study": "1.2.99"}, {"key": "empty/"}])
async def test_what_is_announced_before_it_is_there(path: Path, told: dict[str, Any]) -> None:
    """A study or folder with nothing in it is looked for again, not for ever; once it is removed nothing is to do."""
    async with warming(path, FakeStore(), attempts=2) as (warmer, queue):
        await warmer.accept([Event("id-1", "plain", "created", **told)])
        await until(queue, dead=1)
        await warmer.accept([Event("id-2", "plain", "removed", **told)])
        await until(queue, dead=1, done=1)


async def test_a_count_that_is_not_reached(path: Path) -> None:
    """A series waits for the instances it will have, however quiet; the origin says how many there are."""
    store = FakeStore()
    store.there = [1, 2, 3]
    async with warming(path, store, force_s=1e6) as (warmer, queue):
        await warmer.accept([msgspec.structs.replace(of(A, 1), expected=3)])
        await until(queue, done=1)
    assert store.trace == [*[("changed", A), ("counted", A)] * 3, ("changed", A), TensorRef(A, "volume"), "released"]


async def test_what_the_first_object_tells(path: Path) -> None:
    """Where modalities differ, one object of a series is asked for its modality and count; A's wait no longer."""
    store = FakeStore()
    store.attributes_of = {A: Attributes(modality="MR", instances=2)}
    slow: dict[str, Any] = {
        "quiet_s": 1e9,
        "force_s": 1e9,
        "modalities": {"MR": Override(expected=True), "CT": Override(quiet_s=1.0)},
    }
    async with warming(path, store, **slow) as (warmer, queue):
        store.there = [2]
        await warmer.accept([of(A, 1), of(A, 2), of(B, 3)])
        await until(queue, assigned=1, done=2)
    reads = [step for step in store.trace if isinstance(step, tuple) and step[0] == "read"]
    assert len(reads) == len({tuple(str(read[1]).split("/")[:2]) for read in reads if read}) == 2


async def test_a_count_that_is_never_reached(path: Path) -> None:
    """Past the deadline a series is warmed with what there is."""
    store = FakeStore()
    store.there = [1] * 100
    async with warming(path, store, force_s=100.0) as (warmer, queue):
        await warmer.accept([msgspec.structs.replace(of(A, 1), expected=3)])
        await until(queue, done=1)
    assert store.gets == 1


# ------------------------------------------------------------------ from a real bucket


@pytest.mark.service
async def test_from_the_bucket_to_ram(tmp_path: Path, bucket: Bucket, s3: S3Service) -> None:
    """Objects that are stored are announced by the gateway, and soon their tensor is in RAM, without a request."""
    ref = bucket.series(slices=6)
    files = {path.relative_to(bucket.path).as_posix(): path.read_bytes() for path in bucket.files(ref)}
    name = await s3.bucket()
    origin = {"bucket": name, "endpoint_url": s3.endpoint, "access_key": s3.access_key, "secret_key": s3.secret_key}
    table = {"origin": {"s3": origin}, "store": {"revalidate": "events"}, "arrivals": {"warm": ["volume"]}}
    with Daemon(tmp_path, table) as daemon:
        await s3.announce(name, f"{daemon.url}/v1/arrivals/s3")
        await s3.put(name, files)
        async with asyncio.timeout(120):
            while not (await in_ram(daemon, ref) and await ready(daemon, ref)):
                await asyncio.sleep(0.05)  # another process, which tells this only when asked
        assert daemon.metric("voxcache_arrival_events_total", news="new") == 6
        answer = await asyncio.to_thread(daemon.tensor, ref)
        assert (answer.status, answer.headers["Voxcache-Tier"]) == (200, "ram")
        await s3.delete(name, next(iter(files)))
        async with asyncio.timeout(120):
            while (await asyncio.to_thread(daemon.tensor, ref)).headers.get("Voxcache-Tier") == "ram":
                await asyncio.sleep(0.05)  # another process, which tells this only when asked


async def ready(daemon: Daemon, ref: SeriesRef) -> bool:
    return bool((await asyncio.to_thread(daemon.ask, "GET", f"/v1/studies/{ref.study}")).json["ready"])


async def in_ram(daemon: Daemon, ref: SeriesRef) -> bool:
    entries = (await asyncio.to_thread(daemon.ask, "GET", f"/v1/studies/{ref.study}")).json["entries"]
    return any(entry["tier"] == "ram" and entry["kind"] == "tensor" for entry in entries)
