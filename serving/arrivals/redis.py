"""The arrival queue that several nodes share: Redis Streams with a consumer group.

Two streams, both with the group ``nodes``, in which each message has one consumer that is to acknowledge it:

    events  ─ accepted, and not assigned yet ─ assign ─→ series:… (a hash: its events) and looks (when to look at it)
    looks   ─ a look finds the series due ────────────→ work
    work    ─ a node carries the series out ─ done ───→ ended

A node says by a heartbeat that what it was given is still its own. What a node holds that has not been heard of for
``redis.dead_s`` is given to the others. Each step is one script, so it is done as a whole or not at all; a step on what
is not the node's own any more changes nothing. Keys hold digests only; values hold what is needed to carry events out:
UIDs and object keys.

https://redis.io/docs/latest/develop/data-types/streams/. Redis 6 has no XAUTOCLAIM: XPENDING and XCLAIM do the same.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import msgspec
from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from cache.errors import ConfigError, Overloaded, QueueDown
from cache.keys import SeriesRef, digest
from serving.log import logger

from .batches import Batches, Put
from .complete import due_at, gathered
from .event import Event
from .queue import (
    ArrivalSettings,
    DeadLetter,
    Depth,
    Due,
    New,
    first_look,
    hurries,
    pause,
    pieces_of,
    reconnect_pause,
)


class RedisSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where nodes share their arrivals. Nodes that do so have one origin and like settings of arrivals.

    url: redis://, rediss:// (TLS) or unix://, with user and password where needed; "": each node has a queue of its
        own, in state.path.
    prefix: what the keys begin with.
    dead_s: a node that was not heard of for this many seconds counts as dead: others do what it had taken.
    replicas: replicas that must have an event before it counts as accepted (WAIT).
    timeout_s: seconds that one command may take.
    """

    url: str = ""
    prefix: str = "voxcache"
    dead_s: float = 30.0
    replicas: int = 0
    timeout_s: float = 2.0


_GROUP: Final = "nodes"
#: Seconds after which a Redis that does not answer is not ready: a probe must not wait longer.
_READY_S: Final = 0.5

#: What scripts have in common. ARGV[1] is what keys begin with, ARGV[2] the node.
_COMMON: Final = """
local p, me = ARGV[1], ARGV[2]

local function mine(stream, token)
    local found = redis.call('XPENDING', p .. stream, 'nodes', token, token, 1)
    return #found == 1 and found[1][2] == me
end

local function drop(stream, token)
    redis.call('XACK', p .. stream, 'nodes', token)
    redis.call('XDEL', p .. stream, token)
end

local function given(stream, from, count)
    if count < 1 then return {} end
    local read = redis.call('XREADGROUP', 'GROUP', 'nodes', me, 'COUNT', count, 'STREAMS', p .. stream, from)
    return read and read[1][2] or {}
end

local function news() redis.call('PUBLISH', p .. 'news', '') end

local function known(id)
    for _, place in ipairs({'waiting', 'ended', 'dead'}) do
        if redis.call('ZSCORE', p .. place, id) then return true end
    end
    return false
end

local function look(series, at)
    local before = redis.call('ZSCORE', p .. 'looks', series)
    if not before or tonumber(before) > tonumber(at) then redis.call('ZADD', p .. 'looks', at, series) end
end

local function over(id, now)
    redis.call('ZREM', p .. 'waiting', id)
    redis.call('ZADD', p .. 'ended', now, id)
end

local function set_aside(id, letter, now)
    redis.call('ZREM', p .. 'waiting', id)
    redis.call('ZADD', p .. 'dead', now, id)
    redis.call('HSET', p .. 'letters', id, letter)
end

local function bury(ids)
    for _, id in ipairs(ids) do
        redis.call('ZREM', p .. 'dead', id)
        redis.call('HDEL', p .. 'letters', id)
    end
end

local function forget(before, keep)
    redis.call('ZREMRANGEBYSCORE', p .. 'ended', '-inf', '(' .. before)
    bury(redis.call('ZRANGEBYSCORE', p .. 'dead', '-inf', '(' .. before))
    local ended, dead = redis.call('ZCARD', p .. 'ended'), redis.call('ZCARD', p .. 'dead')
    local excess = ended + dead - tonumber(keep)
    if excess > 0 then redis.call('ZREMRANGEBYRANK', p .. 'ended', 0, excess - 1) end
    if excess > ended then bury(redis.call('ZRANGE', p .. 'dead', 0, excess - ended - 1)) end
end
"""

#: most, then for each put: received, count, and an id and a New for each event. How many were new, or -1: refused.
_PUT: Final = """
local most, i, results, any = tonumber(ARGV[3]), 4, {}, false
while i <= #ARGV do
    local received, count, new = ARGV[i], tonumber(ARGV[i + 1]), 0
    if redis.call('ZCARD', p .. 'waiting') + count > most then
        new = -1
    else
        for k = i + 2, i + 1 + 2 * count, 2 do
            if not known(ARGV[k]) then
                redis.call('ZADD', p .. 'waiting', received, ARGV[k])
                redis.call('XADD', p .. 'events', '*', 'new', ARGV[k + 1])
                new, any = new + 1, true
            end
        end
    end
    results[#results + 1] = new
    i = i + 2 + 2 * count
end
if any then news() end
return results
"""

#: now, limit. Tokens and News: those this node has been given before, then others.
_UNASSIGNED: Final = """
local limit = tonumber(ARGV[4])
for _, new in ipairs(redis.call('ZRANGEBYSCORE', p .. 'later', '-inf', ARGV[3], 'LIMIT', 0, limit)) do
    redis.call('ZREM', p .. 'later', new)
    redis.call('XADD', p .. 'events', '*', 'new', new)
end
local found = {}
for _, from in ipairs({'0', '>'}) do
    for _, message in ipairs(given('events', from, limit - #found / 2)) do
        found[#found + 1] = message[1]
        found[#found + 1] = message[2][2]
    end
end
return found
"""

#: now, forget before, keep, then for each event: token, id, received, count, and for each series it belongs to:
#: series, study, id, what is kept of it, look at, hurries (1 or 0).
_ASSIGN: Final = """
local now, i = ARGV[3], 6
while i <= #ARGV do
    local token, id, received, count = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
    if mine('events', token) then
        drop('events', token)
        if count ~= 1 then over(id, now) end
        for k = i + 4, i + 3 + 6 * count, 6 do
            local series, study, piece = ARGV[k], ARGV[k + 1], ARGV[k + 2]
            if count == 1 or not known(piece) then
                local kept = p .. 'series:' .. series
                redis.call('ZADD', p .. 'waiting', received, piece)
                redis.call('HINCRBY', p .. 'studies', study, redis.call('HSET', kept, piece, ARGV[k + 3]))
                if ARGV[k + 5] == '1' and not redis.call('HGET', kept, '#attempts') then
                    redis.call('HDEL', kept, '#not_before')
                end
                if redis.call('HEXISTS', kept, '#work') == 0 then look(series, ARGV[k + 4]) end
            end
        end
    end
    i = i + 4 + 6 * count
end
forget(ARGV[4], ARGV[5])
"""

#: now, token, id, then not before and the New, or '' and the DeadLetter.
_UNKNOWN: Final = """
if mine('events', ARGV[4]) then
    drop('events', ARGV[4])
    if ARGV[6] == '' then
        set_aside(ARGV[5], ARGV[7], ARGV[3])
    else
        redis.call('ZADD', p .. 'later', ARGV[6], ARGV[7])
    end
end
"""

#: limit, then tokens that are being worked on. For each that this node is given: token, series, what the hash holds.
_TAKE: Final = """
local limit, held, found = tonumber(ARGV[3]), {}, {}

local function take(messages)
    for _, message in ipairs(messages) do
        if not held[message[1]] and #found < limit then
            local series = message[2][2]
            found[#found + 1] = {message[1], series, redis.call('HGETALL', p .. 'series:' .. series)}
        end
    end
end

for i = 4, #ARGV do held[ARGV[i]] = true end
take(given('work', '0', limit + #ARGV))
take(given('work', '>', limit - #found))
return found
"""

#: now, limit. The series that have to be looked at now, each with what its hash holds; and when the next thing comes.
_LOOK: Final = """
local found = {}
for _, series in ipairs(redis.call('ZRANGEBYSCORE', p .. 'looks', '-inf', ARGV[3], 'LIMIT', 0, ARGV[4])) do
    found[#found + 1] = {series, redis.call('HGETALL', p .. 'series:' .. series)}
end
local next = {}
for _, place in ipairs({'looks', 'later'}) do
    local first = redis.call('ZRANGEBYSCORE', p .. place, '(' .. ARGV[3], '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    next[#next + 1] = first[2]
end
return {found, next}
"""

#: For each series that was looked at: series, length of its hash then, and when to look again or '' if it is due.
#: One that changed meanwhile is looked at again.
_LOOKED: Final = """
for i = 3, #ARGV, 3 do
    local series = ARGV[i]
    local kept = p .. 'series:' .. series
    if redis.call('ZSCORE', p .. 'looks', series) and redis.call('HLEN', kept) == tonumber(ARGV[i + 1]) then
        if ARGV[i + 2] == '' then
            redis.call('ZREM', p .. 'looks', series)
            redis.call('HSET', kept, '#work', redis.call('XADD', p .. 'work', '*', 'series', series))
        else
            redis.call('ZADD', p .. 'looks', ARGV[i + 2], series)
        end
    end
end
"""

#: now, forget before, keep, token, series, study, then for each event its id and a DeadLetter, or '' if it is done.
_END: Final = """
local now, token, series, study = ARGV[3], ARGV[6], ARGV[7], ARGV[8]
local kept = p .. 'series:' .. series
if not mine('work', token) then return end
drop('work', token)
for i = 9, #ARGV, 2 do
    if redis.call('HDEL', kept, ARGV[i]) == 1 then
        local left = redis.call('HINCRBY', p .. 'studies', study, -1)
        if left == 0 then redis.call('HDEL', p .. 'studies', study) end
        if ARGV[i + 1] == '' then over(ARGV[i], now) else set_aside(ARGV[i], ARGV[i + 1], now) end
    end
end
redis.call('HDEL', kept, '#work', '#attempts', '#deaths', '#not_before')
if redis.call('EXISTS', kept) == 1 then
    look(series, now)
    news()
end
forget(ARGV[4], ARGV[5])
"""

#: token, series, attempts, not before.
_PUT_BACK: Final = """
local kept = p .. 'series:' .. ARGV[4]
if not mine('work', ARGV[3]) then return end
drop('work', ARGV[3])
redis.call('HDEL', kept, '#work')
if ARGV[5] ~= '0' then redis.call('HSET', kept, '#attempts', ARGV[5]) end
redis.call('HSET', kept, '#not_before', ARGV[6])
look(ARGV[4], ARGV[6])
"""

#: now, then ids of dead letters, each with the New it becomes. How many there were.
_REQUEUE: Final = """
local count = 0
for i = 4, #ARGV, 2 do
    if redis.call('ZSCORE', p .. 'dead', ARGV[i]) then
        bury({ARGV[i]})
        redis.call('ZADD', p .. 'waiting', ARGV[3], ARGV[i])
        redis.call('XADD', p .. 'events', '*', 'new', ARGV[i + 1])
        count = count + 1
    end
end
if count > 0 then news() end
return count
"""

#: Milliseconds after which a node is dead. What dead ones held is to be had again; how many messages that were.
BEAT: Final = """
local count = 0

local function pending(stream, act)
    local start = '-'
    repeat
        local found = redis.call('XPENDING', p .. stream, 'nodes', start, '+', 1000)
        for i, message in ipairs(found) do
            if i > 1 or message[1] ~= start then act(message[1], message[2], message[3]) end
        end
        start = #found > 0 and found[#found][1]
    until #found < 1000
end

local function beat(stream, free)
    pending(stream, function(token, node, idle)
        if node == me then
            redis.call('XCLAIM', p .. stream, 'nodes', me, 0, token, 'JUSTID')
        elseif idle >= tonumber(ARGV[3]) then
            local message = redis.call('XRANGE', p .. stream, token, token)
            drop(stream, token)
            if message[1] then free(message[1][2][2]) end
            count = count + 1
        end
    end)
end

beat('events', function(new) redis.call('XADD', p .. 'events', '*', 'new', new) end)
beat('work', function(series)
    local kept = p .. 'series:' .. series
    redis.call('HDEL', kept, '#work')
    redis.call('HINCRBY', kept, '#deaths', 1)
    look(series, 0)
end)
if count > 0 then news() end
return count
"""


class RedisQueue:
    """What all nodes know of the queue in one Redis: an ArrivalQueue. ``node`` tells this one from the others."""

    def __init__(self, client: "aioredis.Redis", settings: RedisSettings, arrivals: ArrivalSettings, node: str) -> None:
        self._client = client
        self._settings = settings
        self._arrivals = arrivals
        self._node = node
        self._prefix = f"{{{settings.prefix}}}:"  # braces: one slot, should this be a cluster
        self._batches = Batches(self._accept)
        self._scripts: dict[str, Any] = {}
        self._held: set[str] = set()  # messages of work in this process' hands
        self._wake: Callable[[], None] = _nobody
        self._checked = False
        self._tasks = [asyncio.create_task(self._beat()), asyncio.create_task(self._listen())]

    @classmethod
    async def open(cls, settings: RedisSettings, arrivals: ArrivalSettings, node: str) -> "RedisQueue":
        """The queue in this Redis, which need not be there yet. Raises: ConfigError."""
        if settings.dead_s <= 0 or settings.timeout_s <= 0:
            raise ConfigError("redis: dead_s and timeout_s are more than 0")
        try:
            client = aioredis.Redis.from_url(
                settings.url,
                socket_timeout=settings.timeout_s,
                socket_connect_timeout=settings.timeout_s,
                # a connection from before a restart is dead: one more try, on a new one. Any script may run twice.
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise ConfigError(f"redis.url: {error}") from None
        return cls(client, settings, arrivals, node)

    async def put(self, events: Sequence[Event], now: float) -> int:
        return await self._batches.put(events, now)

    async def unassigned(self, now: float, limit: int = 1000) -> list[New]:
        found = await self._run(_UNASSIGNED, now, limit)
        return [
            msgspec.structs.replace(msgspec.json.decode(new, type=New), token=token.decode())
            for token, new in zip(found[::2], found[1::2], strict=True)
        ]

    async def assign(self, found: Sequence[tuple[New, Sequence[Event]]], now: float) -> None:
        told: list[str | bytes | float] = []
        for new, events in found:
            pieces = pieces_of(new, events)
            told += [new.token, _id(new.event), new.received, len(pieces)]
            for event in pieces:
                at = first_look(event, new.received, self._arrivals)
                kept = msgspec.json.encode((event, new.received))
                told += [_series(event), digest(event.study), _id(event), kept, at, int(hurries(event))]
        await self._run(_ASSIGN, now, *self._bounds(now), *told)

    async def unknown(self, new: New, reason: str, now: float, *, limited: bool = True) -> None:
        if limited and new.attempts + 1 >= self._arrivals.attempts:
            told = ("", msgspec.json.encode(DeadLetter(new.event, reason, now)))
        else:
            later = New(new.event, new.received, new.attempts + 1)
            told = (repr(now + pause(new.attempts)), msgspec.json.encode(later))
        await self._run(_UNKNOWN, now, new.token, _id(new.event), *told)

    async def due(self, now: float, limit: int) -> tuple[list[Due], float | None]:
        dues = await self._take(now, limit)
        while True:
            looks, times = await self._run(_LOOK, now, limit - len(dues))
            looked: list[str | bytes | float] = []
            for series, pairs in looks:
                _, at = self._looked_at(pairs)
                looked += [series, len(pairs) // 2, at if at > now else ""]
            if looked:
                await self._run(_LOOKED, *looked)
                dues += await self._take(now, limit - len(dues))
            if not looked or len(dues) >= limit:
                return dues, min(map(float, times), default=None)

    async def done(self, due: Due, now: float, reason: str = "") -> None:
        await self._end(due, now, [""] * len(due.events))

    async def failed(self, due: Due, reason: str, now: float, *, limited: bool = True) -> bool:
        if limited and due.attempts + 1 >= self._arrivals.attempts:
            await self._set_aside(due, reason, now)
            return False
        await self._put_back(due, due.attempts + 1, now + pause(due.attempts))
        return True

    async def waiting(self, study: str) -> int:
        async with self._mapped():
            return int(await self._client.hget(self._prefix + "studies", digest(study)) or 0)

    async def postpone(self, due: Due, until: float) -> None:
        await self._put_back(due, due.attempts, until)

    async def depth(self) -> Depth:
        async with self._mapped(), self._client.pipeline(transaction=True) as pipe:
            pipe.xlen(self._prefix + "events")
            for place in ("later", "waiting", "ended", "dead"):
                pipe.zcard(self._prefix + place)
            pipe.zrange(self._prefix + "waiting", 0, 0, withscores=True)
            events, later, waiting, ended, dead, oldest = await pipe.execute()
        new = events + later
        return Depth(new, waiting - new, ended, dead, oldest[0][1] if oldest else None)

    async def dead(self, limit: int = 1000) -> list[DeadLetter]:
        async with self._mapped():
            ids: list[Any] = list(await self._client.zrevrange(self._prefix + "dead", 0, limit - 1))
            letters = await self._client.hmget(self._prefix + "letters", ids) if ids else []
        return [msgspec.json.decode(letter, type=DeadLetter) for letter in letters if letter is not None]

    async def requeue(self, ids: Sequence[str] | None, now: float) -> int:
        letters = await self.dead(self._arrivals.keep_done)
        told: list[str | bytes | float] = []
        for letter in letters:
            if ids is None or letter.event.id in ids:
                told += [_id(letter.event), msgspec.json.encode(New(letter.event, now))]
        return int(await self._run(_REQUEUE, now, *told))

    def on_news(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    async def ready(self) -> bool:
        try:
            async with self._mapped(), asyncio.timeout(_READY_S):
                await self._client.ping()
        except QueueDown:
            return False
        return True

    async def close(self) -> None:
        await self._batches.close()
        left = set(self._tasks)
        while left:  # the client may lose a cancellation that comes with an answer, and its task would sleep on
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=1.0)
        await self._client.aclose()

    # ------------------------------------------------------------------ steps

    async def _accept(self, batch: Sequence[Put]) -> list[int | Overloaded]:
        told: list[str | bytes | float] = []
        for put in batch:
            told += [put.received, len(put.events)]
            for event in put.events:
                told += [_id(event), msgspec.json.encode(New(event, put.received))]
        results = await self._run(_PUT, self._arrivals.max_pending, *told, replicas=self._settings.replicas)
        full = Overloaded("too many events wait already; retry later")
        return [full if new < 0 else new for new in results]

    async def _take(self, now: float, limit: int) -> list[Due]:
        dues = []
        for token, series, pairs in await self._run(_TAKE, limit, *self._held):
            due, _ = self._looked_at(pairs, token.decode())
            deaths = int(_kept(pairs).get(b"#deaths", 0))
            if deaths < self._arrivals.attempts:
                self._held.add(due.token)
                dues.append(due)
            else:
                logger().error("nodes that had taken a series died again and again", series=series.decode())
                await self._set_aside(due, "node-died", now)
        return dues

    def _looked_at(self, pairs: Sequence[bytes], token: str = "") -> tuple[Due, float]:
        """What a series' hash comes to, and from when on it is due."""
        kept = _kept(pairs)
        attempts, not_before = int(kept.get(b"#attempts", 0)), float(kept.get(b"#not_before", 0))
        arrived = [
            msgspec.json.decode(value, type=tuple[Event, float])
            for name, value in kept.items()
            if not name.startswith(b"#")
        ]
        series = gathered(arrived)
        ref = SeriesRef(arrived[0][0].study, arrived[0][0].series)
        at = max(due_at(series, self._arrivals.rule(series.modality)), not_before)
        return Due(ref, tuple(event for event, _ in arrived), series, attempts, token), at

    async def _set_aside(self, due: Due, reason: str, now: float) -> None:
        letters = [msgspec.json.encode(DeadLetter(event, reason, now)) for event in due.events]
        await self._end(due, now, letters)

    async def _end(self, due: Due, now: float, letters: Sequence[bytes | str]) -> None:
        told = [each for event, letter in zip(due.events, letters, strict=True) for each in (_id(event), letter)]
        try:
            await self._run(_END, now, *self._bounds(now), due.token, _series(due.ref), digest(due.ref.study), *told)
        finally:
            self._held.discard(due.token)

    async def _put_back(self, due: Due, attempts: int, at: float) -> None:
        try:
            await self._run(_PUT_BACK, due.token, _series(due.ref), attempts, at)
        finally:
            self._held.discard(due.token)

    def _bounds(self, now: float) -> tuple[float, int]:
        """Until when, and how many of, what is over is remembered."""
        return now - self._arrivals.keep_s, self._arrivals.keep_done

    # ------------------------------------------------------------------ the connection

    async def _run(self, script: str, *told: str | bytes | float, replicas: int = 0) -> Any:
        arguments = [self._prefix, self._node, *told]
        async with self._mapped():
            try:
                return await self._called(script, arguments, replicas)
            except ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
            for stream in ("events", "work"):
                with contextlib.suppress(ResponseError):  # another node was first
                    await self._client.xgroup_create(self._prefix + stream, _GROUP, id="0", mkstream=True)
            return await self._called(script, arguments, replicas)

    async def _called(self, script: str, arguments: Sequence[str | bytes | float], replicas: int) -> Any:
        registered = self._scripts.get(script)
        if registered is None:
            registered = self._scripts[script] = self._client.register_script(_COMMON + script)
        if not replicas:
            return await registered(args=arguments)
        async with self._client.pipeline(transaction=False) as pipe:  # WAIT is about its own connection's writes
            await registered(args=arguments, client=pipe)
            pipe.execute_command("WAIT", replicas, int(self._settings.timeout_s * 500))
            result, acknowledged = await pipe.execute()
        if acknowledged < replicas:
            raise QueueDown(
                f"{acknowledged} of {replicas} replicas of the arrival queue have the events; send them again"
            )
        return result

    @contextlib.asynccontextmanager
    async def _mapped(self) -> AsyncIterator[None]:
        failure: Exception | None = None
        try:
            yield
        except (RedisError, OSError) as error:
            failure = error
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # the client may lose a cancellation that comes with an answer
            raise asyncio.CancelledError
        if failure is not None:
            raise QueueDown(f"the arrival queue in Redis cannot be used now: {failure}") from failure

    async def _beat(self) -> None:
        """Say that this node lives, and have what dead ones had taken given to others."""
        while True:
            try:
                freed = await self._run(BEAT, int(self._settings.dead_s * 1000))
                if freed:
                    logger().warning("what a dead node had taken is given to others", messages=freed)
                if not self._checked:
                    await self._check()
            except QueueDown:
                pass  # whoever needs the queue will say so
            self._wake()  # what a node that died would have done later is nobody's plan now
            await asyncio.sleep(self._settings.dead_s / 3)

    async def _check(self) -> None:
        """Warn, once, of a Redis that does not keep what it has acknowledged."""
        async with self._mapped():
            persistence, memory = await self._client.info("persistence"), await self._client.info("memory")
        self._checked = True
        if not persistence.get("aof_enabled"):
            logger().warning("Redis has no append-only file: accepted events do not survive its restart")
        if memory.get("maxmemory_policy", "noeviction") != "noeviction":
            logger().warning("Redis may evict accepted events: set maxmemory-policy noeviction")

    async def _listen(self) -> None:
        """Wake whoever waits for work when another node has made some."""
        failures = 0
        while True:
            try:
                async with self._mapped(), self._client.pubsub() as channel:
                    await channel.subscribe(self._prefix + "news")
                    while True:
                        await channel.get_message(timeout=self._settings.dead_s)
                        failures = 0
                        self._wake()
            except QueueDown:
                await asyncio.sleep(reconnect_pause(failures))
                failures += 1


def _id(event: Event) -> str:
    return digest(event.id)


def _series(named: Event | SeriesRef) -> str:
    return digest(named.study, named.series)


def _kept(pairs: Sequence[bytes]) -> dict[bytes, bytes]:
    """A hash as Redis tells it: events by id, and what is known of the series itself under names with a ``#``."""
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def _nobody() -> None:
    return
