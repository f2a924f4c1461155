"""The arrival queues: each does what every queue does, and what only its own kind of storage can meet."""

import asyncio
import itertools
import re
import sqlite3
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis.stateful import run_state_machine_as_test

from cache.errors import ConfigError, QueueDown
from serving.arrivals.complete import Gathered, Override, Rule, due_at, gathered, look_again_at
from serving.arrivals.queue import ArrivalQueue, ArrivalSettings
from serving.arrivals.redis import BEAT, RedisQueue, RedisSettings
from serving.arrivals.sqlite import SqliteQueue
from tests.cache.walk import until
from tests.conformance.queue import (
    NOW,
    A,
    B,
    QueueConformance,
    QueueMachine,
    arrive,
    assign,
    closing,
    counts,
    event,
    settings,
    take,
    within,
)
from tests.services import RedisServer

# ------------------------------------------------------------------ when a series is complete

RULE = Rule(expected=True, quiet_s=5.0, force_s=60.0)


def test_what_events_come_to() -> None:
    """Objects that came less those that went; the largest count anybody expects; the times of the first and last."""
    events = [
        (event(1, modality="CT"), NOW + 2),
        (event(2, expected=3), NOW),
        (event(3, expected=2, complete=True), NOW + 1),
    ]
    assert gathered(events) == Gathered(NOW, NOW + 2, 3, 3, True, "CT")
    assert gathered([(event(1, action="removed"), NOW)]).objects == -1


def test_expected_beats_quiet_beats_forced() -> None:
    """A reached count and a word that it is all make a series due at once, quiet in its time, the deadline any."""
    series = Gathered(first=NOW, last=NOW + 10, objects=2)
    assert due_at(series, RULE) == NOW + 15
    assert due_at(Gathered(NOW, NOW + 58, 2), RULE) == NOW + 60
    assert due_at(Gathered(NOW, NOW + 10, 2, expected=2), RULE) == NOW + 10
    assert due_at(Gathered(NOW, NOW + 10, 2, expected=3), RULE) == NOW + 15
    assert due_at(Gathered(NOW, NOW + 10, 2, complete=True), RULE) == NOW + 10
    assert due_at(Gathered(NOW, NOW + 10, 2, expected=2), Rule(False, 5.0, 60.0)) == NOW + 15


def test_a_count_that_is_missed_is_waited_for() -> None:
    """Until the deadline a series that has less than is expected is looked at again; others are warmed as they are."""
    short = Gathered(first=NOW, last=NOW + 10, objects=2, expected=3)
    assert look_again_at(short, RULE, 2, NOW + 15) == NOW + 20
    assert look_again_at(short, RULE, 3, NOW + 15) is None
    assert look_again_at(short, RULE, 2, NOW + 58) == NOW + 60
    assert look_again_at(short, RULE, 2, NOW + 60) is None
    assert look_again_at(short, Rule(True, 0.0, 60.0), 2, NOW + 15) == NOW + 16
    assert look_again_at(short, Rule(False, 5.0, 60.0), 2, NOW + 15) is None
    assert look_again_at(Gathered(NOW, NOW, 2), RULE, 0, NOW + 15) is None
    assert look_again_at(Gathered(NOW, NOW, 2, expected=3, complete=True), RULE, 0, NOW + 15) is None


def test_rules_by_modality() -> None:
    """What a modality does not say for itself is as for all."""
    chosen = settings(modalities={"MR": Override(quiet_s=20.0), "CT": Override(expected=False, force_s=9.0)})
    assert chosen.rule("") == chosen.rule("US") == RULE
    assert chosen.rule("MR") == Rule(True, 20.0, 60.0)
    assert chosen.rule("CT") == Rule(False, 5.0, 9.0)


# ------------------------------------------------------------------ SQLite


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "arrivals.sqlite"


class TestSqlite(QueueConformance):
    """The queue of one node."""

    @pytest.fixture(autouse=True)
    def _at(self, path: Path) -> None:
        self.path = path

    @asynccontextmanager
    async def opened(self, settings: ArrivalSettings) -> AsyncIterator[ArrivalQueue]:
        async with closing(await SqliteQueue.open(self.path, settings)) as queue:
            yield queue


class SqliteMachine(QueueMachine):
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        super().__init__()

    async def open(self) -> ArrivalQueue:
        return await SqliteQueue.open(Path(self.folder.name) / "arrivals.sqlite", self.settings)

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


SqliteMachine.TestCase.settings = hypothesis.settings(max_examples=20, stateful_step_count=25)
TestSqliteMachine = pytest.mark.slow(SqliteMachine.TestCase)


async def test_a_file_that_is_none(path: Path) -> None:
    """A queue that cannot be opened is a reason not to start, and names the file."""
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(ConfigError, match=str(path)):
        await SqliteQueue.open(path, ArrivalSettings())


async def test_a_file_of_a_later_version(path: Path) -> None:
    """It is left alone: what it holds must not be lost."""
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(ConfigError, match="later"):
        await SqliteQueue.open(path, ArrivalSettings())


async def test_a_file_of_the_first_version(path: Path) -> None:
    """What it holds is taken over: new and assigned events wait, what was over is still known as such."""
    db = sqlite3.connect(path)
    db.executescript(
        """
        CREATE TABLE events (
            n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, event BLOB NOT NULL, received REAL NOT NULL,
            not_before REAL NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, state TEXT NOT NULL DEFAULT 'new',
            study TEXT NOT NULL DEFAULT '', series TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT ''
        );
        CREATE INDEX by_state ON events (state, study, series);
        """
    )
    for number, state in enumerate(("new", "assigned", "done", "dead")):
        told = f'{{"id":"id-{number}","source":"s3","action":"created","key":"k{number}","etag":"","size":0}}'
        db.execute(
            "INSERT INTO events (id, event, received, state) VALUES (?, ?, ?, ?)",
            (f"id-{number}", told.encode(), NOW, state),
        )
    db.commit()
    db.close()
    async with closing(await SqliteQueue.open(path, ArrivalSettings())) as queue:
        assert await counts(queue) == {"new": 2, "done": 1, "dead": 1}
        assert [new.event.key for new in await queue.unassigned(NOW)] == ["k0", "k1"]


async def test_a_disk_that_refuses(path: Path) -> None:
    """When the file cannot be written arrivals are refused for now; what was accepted is not touched."""
    async with closing(await SqliteQueue.open(path, ArrivalSettings())) as queue:
        await queue.put([event(1)], NOW)
        with sqlite3.connect(path) as other:
            other.execute("CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
        with pytest.raises(QueueDown, match="disk is full"):
            await queue.put([event(2)], NOW)
        with sqlite3.connect(path) as other:
            other.execute("DROP TRIGGER full")
        assert await queue.put([event(2)], NOW) == 1
    other.close()


async def test_what_cannot_be_noted_is_handed_out_again(path: Path) -> None:
    """A series whose end could not be written down is due still."""
    async with closing(await SqliteQueue.open(path, settings(quiet_s=0.0))) as queue:
        await queue.put([event(1)], NOW)
        await assign(queue, A, NOW)
        (one,) = await take(queue, NOW)
        with sqlite3.connect(path) as other:
            other.execute("CREATE TRIGGER full BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
        with pytest.raises(QueueDown):
            await queue.done(one, NOW)
        with sqlite3.connect(path) as other:
            other.execute("DROP TRIGGER full")
        other.close()
        assert await take(queue, NOW) == [one]


# ------------------------------------------------------------------ Redis


async def opened(
    server: RedisServer, arrivals: ArrivalSettings, *, prefix: str, node: str = "one", **changes: Any
) -> RedisQueue:
    told: dict[str, Any] = {"url": server.url, "prefix": prefix, "dead_s": 1000.0}
    return await RedisQueue.open(RedisSettings(**(told | changes)), arrivals, node)


@pytest.fixture
def prefix() -> str:
    return uuid.uuid4().hex


@pytest.mark.service
class TestRedis(QueueConformance):
    """The queue of several nodes, as one of them sees it."""

    @pytest.fixture(autouse=True)
    def _at(self, redis: RedisServer, prefix: str) -> None:
        self.server, self.prefix = redis, prefix

    @asynccontextmanager
    async def opened(self, settings: ArrivalSettings) -> AsyncIterator[ArrivalQueue]:
        async with closing(await opened(self.server, settings, prefix=self.prefix)) as queue:
            yield queue


@pytest.mark.service
def test_all_orders_in_redis(redis: RedisServer) -> None:
    """Whatever happens in whatever order, also when another node goes on: nothing is lost, nothing is made up."""

    class RedisMachine(QueueMachine):
        def __init__(self) -> None:
            self.prefix = uuid.uuid4().hex
            self.node = 0
            super().__init__()

        async def open(self) -> ArrivalQueue:
            return await opened(redis, self.settings, prefix=self.prefix, node=f"node-{self.node}")

        async def reopened(self) -> ArrivalQueue:
            """As another node, which finds out that this one is dead."""
            await self.queue.close()
            self.node += 1
            after = await opened(redis, self.settings, prefix=self.prefix, node=f"node-{self.node}")
            await after._run(BEAT, 0)
            return after

    run_state_machine_as_test(
        RedisMachine, settings=hypothesis.settings(max_examples=20, stateful_step_count=25, deadline=None)
    )


@pytest.fixture
async def nodes(redis: RedisServer, prefix: str) -> AsyncIterator[tuple[RedisQueue, RedisQueue]]:
    """Two nodes on one Redis."""
    chosen = settings(quiet_s=0.0, attempts=2)
    one, other = [await opened(redis, chosen, prefix=prefix, node=name) for name in ("one", "other")]
    async with closing(one), closing(other):
        await until(lambda: one._checked and other._checked)  # their own first heartbeats are over
        yield one, other


async def unheard_of(queue: RedisQueue, stream: str) -> None:
    """Have it look as if the node had not been heard of for an hour."""
    name = queue._prefix + stream
    for pending in await queue._client.xpending_range(name, "nodes", "-", "+", 100):
        told: dict[str, Any] = dict(pending)
        ids = [told["message_id"]]
        await queue._client.xclaim(name, "nodes", told["consumer"], 0, ids, idle=3_600_000, justid=True)


async def beat(queue: RedisQueue) -> int:
    """Have a heartbeat made; how many messages of dead nodes it freed."""
    return int(await queue._run(BEAT, 1_000_000))


@pytest.mark.service
async def test_what_a_dead_node_had_taken(nodes: tuple[RedisQueue, RedisQueue]) -> None:
    """Events it was to find the series of, and series it was to warm, go to another node, which has the last word."""
    one, other = nodes
    await arrive(one, A, [1], NOW)
    await one.put([event(2)], NOW)
    (due,) = await take(one, NOW)
    (new,) = await one.unassigned(NOW)
    assert (await take(other, NOW), await other.unassigned(NOW)) == ([], [])
    await unheard_of(one, "events")
    await unheard_of(one, "work")
    assert await beat(other) == 2
    (found,) = await other.unassigned(NOW)
    assert (found.event, found.received) == (new.event, new.received)
    (taken,) = await take(other, NOW)
    assert (taken.ref, taken.ids, taken.attempts) == (A, due.ids, 0)
    await one.done(due, NOW)  # it lives after all, and is late
    await one.assign([(new, [])], NOW)
    assert await counts(other) == {"new": 1, "assigned": 1}
    await other.done(taken, NOW)
    await other.assign([(found, [within(found.event, B)])], NOW)
    assert await counts(one) == {"assigned": 1, "done": 1}


@pytest.mark.service
async def test_a_long_fill_is_not_taken_from_a_living_node(nodes: tuple[RedisQueue, RedisQueue]) -> None:
    """Its heartbeat says that what it holds is its own still."""
    one, other = nodes
    await arrive(one, A, [1], NOW)
    (due,) = await take(one, NOW)
    await unheard_of(one, "work")
    await beat(one)
    assert await beat(other) == 0
    assert await take(other, NOW) == []
    await one.done(due, NOW)
    assert await counts(one) == {"done": 1}


@pytest.mark.service
async def test_a_series_that_kills_its_nodes(nodes: tuple[RedisQueue, RedisQueue]) -> None:
    """It is set aside after as many deaths as tries are allowed, and does no more harm."""
    one, other = nodes
    await arrive(one, A, [1], NOW)
    for victim, heir in ((one, other), (other, one)):
        assert len(await take(victim, NOW)) == 1
        await unheard_of(victim, "work")
        assert await beat(heir) == 1
    assert await take(one, NOW) == []
    (letter,) = await one.dead()
    assert (letter.reason, letter.event.series) == ("node-died", A.series)


@pytest.mark.service
async def test_a_node_takes_up_its_own_work(redis: RedisServer, prefix: str) -> None:
    """After a restart a node is handed what it held when it ended, without waiting for anything."""
    async with closing(await opened(redis, settings(quiet_s=0.0), prefix=prefix)) as queue:
        await arrive(queue, A, [1], NOW)
        (due,) = await take(queue, NOW)
    async with closing(await opened(redis, settings(quiet_s=0.0), prefix=prefix)) as queue:
        assert await take(queue, NOW) == [due]
        assert await take(queue, NOW) == []


@pytest.mark.service
async def test_another_node_hears_of_news(nodes: tuple[RedisQueue, RedisQueue]) -> None:
    """A node that waits is woken when another one accepts events."""
    one, other = nodes
    woken = asyncio.Event()
    one.on_news(woken.set)
    number = itertools.count()
    async with asyncio.timeout(60):
        while not woken.is_set():  # until it listens nobody hears it
            await other.put([event(next(number))], NOW)


@pytest.mark.service
async def test_redis_goes_and_comes_back(own_redis: RedisServer, prefix: str) -> None:
    """While it is away nothing is accepted; afterwards all that was accepted is there, and work goes on."""
    async with closing(await opened(own_redis, settings(quiet_s=0.0), prefix=prefix)) as queue:
        await arrive(queue, A, [1], NOW)
        (due,) = await take(queue, NOW)
        await queue.put([event(2)], NOW)
        assert await queue.ready()
        own_redis.kill()
        with pytest.raises(QueueDown):
            await queue.put([event(3)], NOW)
        with pytest.raises(QueueDown):
            await queue.done(due, NOW)
        assert not await queue.ready()
        own_redis.start()
        assert await queue.put([event(3)], NOW) == 1
        assert [new.event.id for new in await queue.unassigned(NOW)] == ["id-2", "id-3"]
        assert await take(queue, NOW) == [due]
        await queue.done(due, NOW)
        assert await counts(queue) == {"new": 2, "done": 1}


@pytest.mark.service
async def test_a_redis_that_has_lost_everything(own_redis: RedisServer, prefix: str) -> None:
    """The queue is empty then, and goes on."""
    async with closing(await opened(own_redis, settings(), prefix=prefix)) as queue:
        await queue.put([event(1)], NOW)
        own_redis.flush()
        assert await queue.unassigned(NOW) == []
        assert await queue.put([event(1)], NOW) == 1


@pytest.mark.service
async def test_too_few_replicas(redis: RedisServer, prefix: str) -> None:
    """An event that not as many replicas have as were asked for is not said to be accepted."""
    queue = await opened(redis, settings(), prefix=prefix, replicas=1, timeout_s=0.5)
    async with closing(queue):
        with pytest.raises(QueueDown, match="0 of 1"):
            await queue.put([event(1)], NOW)


@pytest.mark.service
async def test_keys_tell_nothing(nodes: tuple[RedisQueue, RedisQueue]) -> None:
    """What is in the name of a key is ours, or a digest."""
    queue, _ = nodes
    await arrive(queue, A, [1], NOW)
    await arrive(queue, B, [2], NOW)
    (due, _) = await take(queue, NOW)
    await queue.failed(due, "worker-died", NOW)
    ours = {b"events", b"work", b"waiting", b"ended", b"dead", b"letters", b"looks", b"later", b"studies"}
    names = [key.removeprefix(queue._prefix.encode()) async for key in queue._client.scan_iter(queue._prefix + "*")]
    assert len(names) > 3
    for name in names:
        assert name in ours or re.fullmatch(rb"series:[0-9a-f]{32}", name)


async def test_a_url_that_is_none() -> None:
    """It is a reason not to start."""
    with pytest.raises(ConfigError, match=r"redis\.url"):
        await RedisQueue.open(RedisSettings(url="http://127.0.0.1"), settings(), "one")
