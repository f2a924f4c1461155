"""The hand-off socket: leases in lines of JSON, on a store in this process and on real daemons."""

import asyncio
import contextlib
import json
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cache.errors import ConfigError
from cache.keys import SeriesRef
from cache.lease import Leases, LeaseSettings
from cache.origin.faults import FaultPlan
from cache.store import StoreSettings
from serving.demo.daemon import DaemonError
from serving.handoff import LONGEST_LINE, MOST_WAITING, Handoff
from serving.leasing import LeaseAnswer, Lessor
from serving.metrics import Metrics
from tests.cache.walk import Walk, until, walking
from tests.daemon import Bucket, Daemon
from tests.serving.recording import recorder

REF = SeriesRef("1.2.1", "1.2.1.1")
OTHER = SeriesRef("1.2.2", "1.2.2.1")


class Rig:
    """A hand-off socket over a store of this process."""

    def __init__(self, walk: Walk, path: Path) -> None:
        self.walk = walk
        self.path = path
        self.app = web.Application()
        self.leases = Leases(LeaseSettings(), walk.clock)
        self.metrics = Metrics()
        lessor = Lessor(walk.store, self.leases, shm="arena", socket=str(path))
        self.handoff = Handoff(lessor, recorder(self.metrics), drain_s=30.0)

    async def connect(self) -> "Asker":
        return Asker(*await asyncio.open_unix_connection(str(self.path)))

    async def ended(self) -> None:
        """Return once the daemon has seen that every connection is closed."""
        await until(lambda: not self.handoff.connections)


class Asker:
    """A program with a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def send(self, op: str, **request: object) -> None:
        self.writer.write(json.dumps({"op": op, **request}).encode() + b"\n")

    async def reply(self) -> Any:
        """The next reply; None once the daemon has closed the connection."""
        line = await self._reader.readline()
        return json.loads(line) if line else None

    async def ask(self, op: str, **request: object) -> Any:
        self.send(op, id=7, **request)
        return await self.reply()

    async def lease(self, ref: SeriesRef = REF, **more: object) -> Any:
        return await self.ask("lease", study=ref.study, series=ref.series, recipe="plain", **more)


def code(reply: Any) -> str:
    return str(reply["problem"]["type"].rsplit(":", 1)[1])


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with walking(tmp_path, settings=StoreSettings(revalidate="interval")) as walk:
        for ref in (REF, OTHER):
            walk.archive.write(ref, [ref.series.encode() * 100, b"b" * 500])
        rig = Rig(walk, tmp_path / "lease.sock")
        await rig.handoff.listen(rig.path, None, rig.app)
        rig.app.freeze()
        yield rig
        await rig.handoff.close()
        rig.leases.close()


class TestRequests:
    async def test_a_lease_says_where_the_tensor_lies(self, rig: Rig) -> None:
        """The first one waits for the fill, the next is answered from RAM; both name one place, and hold one pin."""
        asker = await rig.connect()
        made, hit = await asker.lease(), await asker.lease(ttl_s=5)
        assert (made["id"], made["lease"]["tier"], hit["lease"]["tier"]) == (7, "origin", "ram")
        assert made["lease"]["offset"] == hit["lease"]["offset"]
        assert (hit["lease"]["shm"], hit["lease"]["socket"]) == ("arena", str(rig.path))
        assert hit["lease"]["nbytes"] == sum(len(data) for data in (REF.series.encode() * 100, b"b" * 500))
        assert hit["lease"]["expires"] == rig.walk.clock.now() + 5
        assert len(rig.leases) == 2

    async def test_renewal_and_release(self, rig: Rig) -> None:
        """A renewed lease ends later; a released one is unknown, and to release it again is no event."""
        asker = await rig.connect()
        lease = (await asker.lease(ttl_s=5))["lease"]["lease"]
        renewed = await asker.ask("renew", lease=lease, ttl_s=50)
        assert renewed["lease"]["expires"] == rig.walk.clock.now() + 50
        asker.send("release", lease=lease)
        asker.send("release", lease=lease)
        assert code(await asker.ask("renew", lease=lease)) == "unknown-lease"
        assert len(rig.leases) == 0
        assert b'voxcache_requests_total{route="handoff",status="204",tier="none"} 1.0' in rig.metrics.exposition()

    async def test_a_lease_can_be_given_back_from_elsewhere(self, rig: Rig) -> None:
        """The ledger is one: another connection may renew and release, and nothing of it stays behind."""
        one, other = await rig.connect(), await rig.connect()
        lease = (await one.lease())["lease"]["lease"]
        assert (await other.ask("renew", lease=lease))["lease"]["lease"] == lease
        other.send("release", lease=lease)
        assert code(await other.ask("renew", lease=lease)) == "unknown-lease"
        assert [connection._held for connection in rig.handoff.connections] == [set(), set()]

    async def test_replies_name_their_requests(self, rig: Rig) -> None:
        """Requests may be sent without waiting; what is in RAM overtakes what has to be made."""
        asker = await rig.connect()
        await asker.lease(REF)
        rig.walk.origin.plan = FaultPlan(stall=1, methods=("fetch",))
        for number, ref in ((1, OTHER), (2, REF), (3, OTHER)):
            asker.send("lease", id=number, study=ref.study, series=ref.series, recipe="plain")
        assert (await asker.reply())["id"] == 2
        await rig.walk.origin.until_stalled(2)
        rig.walk.heal()
        rig.walk.origin.resume()
        assert {(await asker.reply())["id"], (await asker.reply())["id"]} == {1, 3}
        assert rig.walk.fetched() == 4, "two objects of each series, once"

    async def test_a_line_may_come_in_pieces(self, rig: Rig) -> None:
        """Where one read ends and the next begins means nothing."""
        asker = await rig.connect()
        await asker.lease()
        line = json.dumps({"op": "lease", "id": 1, "study": REF.study, "series": REF.series, "recipe": "plain"})
        for byte in line.encode():
            asker.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        asker.writer.write(b"\n" + line.encode() + b"\n")
        assert [(await asker.reply())["lease"]["tier"] for _ in range(2)] == ["ram", "ram"]

    async def test_every_request_is_counted(self, rig: Rig) -> None:
        """Metrics tell the socket's requests by tier and status, as they do those of HTTP."""
        asker = await rig.connect()
        await asker.lease()
        await asker.lease()
        await asker.ask("renew", lease="none")
        told = rig.metrics.exposition().decode()
        for tier, status in (("origin", 201), ("ram", 201), ("none", 404)):
            assert f'voxcache_requests_total{{route="handoff",status="{status}",tier="{tier}"}} 1.0' in told


class TestRefusals:
    @pytest.mark.parametrize(
        ("request_", "expected"),
        [
            ({"series": "1.2.9.1", "study": "1.2.9"}, "unknown-study"),
            ({"study": "not a uid"}, "malformed-uid"),
            ({"recipe": "unheard-of"}, "unknown-recipe"),
            ({"recipe": "../.."}, "malformed-reference"),
            ({"namespace": "nobody"}, "unknown-namespace"),
            ({"ttl_s": -1}, "bad-request"),
            ({"surprise": 1}, "bad-request"),
            ({"op": "steal"}, "bad-request"),
        ],
    )
    async def test_errors_are_the_same_problems_as_over_http(
        self, rig: Rig, request_: dict[str, object], expected: str
    ) -> None:
        """Each is a problem document with the request's number, and the connection goes on."""
        asker = await rig.connect()
        plain = {"op": "lease", "study": REF.study, "series": REF.series, "recipe": "plain"}
        reply = await asker.ask(**{**plain, **request_})  # type: ignore[arg-type]  # op is among them
        assert (reply["id"], code(reply)) == (7, expected)
        assert reply["problem"]["detail"]
        assert "lease" in await asker.lease()

    async def test_waiting_helps_where_it_is_said(self, rig: Rig) -> None:
        """A problem that passes says after how many seconds to ask again."""
        asker = await rig.connect()
        rig.walk.origin.plan = FaultPlan(down=1)
        reply = await asker.lease()
        assert (code(reply), reply["retry_after_s"]) == ("origin-down", 5.0)

    @pytest.mark.parametrize("line", [b"", b"{", b"[]", b"nonsense", b"\xff\xfe", b'{"op":"lease"}', b'{"id":"x"}'])
    async def test_a_line_that_is_no_request(self, rig: Rig, line: bytes) -> None:
        """It is refused; the next line is a request like any other."""
        asker = await rig.connect()
        asker.writer.write(line + b"\n")
        refused = await asker.reply()
        assert (refused["id"], code(refused)) == (0, "bad-request")
        assert "lease" in await asker.lease()

    async def test_a_line_without_an_end(self, rig: Rig) -> None:
        """Past its bound nobody knows where a request begins: the connection is closed, and its leases end."""
        asker = await rig.connect()
        await asker.lease()
        asker.writer.write(b"x" * (LONGEST_LINE + 1))
        assert code(await asker.reply()) == "bad-request"
        assert await asker.reply() is None
        await rig.ended()
        assert len(rig.leases) == 0

    async def test_too_many_waiting_requests(self, rig: Rig) -> None:
        """One connection cannot pile up waiting requests; hits are answered all the same."""
        asker = await rig.connect()
        await asker.lease(REF)
        rig.walk.origin.plan = FaultPlan(stall=1, methods=("fetch",))
        for number in range(MOST_WAITING + 1):
            asker.send("lease", id=number, study=OTHER.study, series=OTHER.series, recipe="plain")
        refused = await asker.reply()
        assert (refused["id"], code(refused)) == (MOST_WAITING, "overloaded")
        assert (await asker.lease(REF))["lease"]["tier"] == "ram"
        await rig.walk.origin.until_stalled(2)
        rig.walk.heal()
        rig.walk.origin.resume()
        assert {(await asker.reply())["id"] for _ in range(MOST_WAITING)} == set(range(MOST_WAITING))

    async def test_who_does_not_read_is_not_listened_to(self, rig: Rig) -> None:
        """Replies that nobody takes do not pile up here: reading stops until they are taken, and none is lost."""
        asker = await rig.connect()
        lease = (await asker.lease())["lease"]["lease"]
        [connection] = rig.handoff.connections
        asked = 0
        while connection._transport.is_reading():
            asker.send("renew", id=asked, lease=lease)
            asked += 1
            await asyncio.sleep(0)
        assert [(await asker.reply())["id"] for _ in range(asked)] == list(range(asked))
        assert connection._transport.is_reading()


class TestEnds:
    async def test_a_closed_connection_ends_its_leases(self, rig: Rig) -> None:
        """Pins go at once, those of other connections stay."""
        one, other = await rig.connect(), await rig.connect()
        for asker in (one, one, other):
            await asker.lease()
        await rig.walk.settled()
        assert rig.walk.pins() == 3
        one.writer.close()
        await until(lambda: len(rig.handoff.connections) <= 1)
        assert rig.walk.pins() == 1

    async def test_an_expired_lease_is_not_the_connections_any_more(self, rig: Rig) -> None:
        """A connection that lives for long keeps no list of all it ever leased."""
        asker = await rig.connect()
        await asker.lease(ttl_s=5)
        rig.walk.clock.advance(1000)
        assert rig.leases.expire() == 1
        assert [connection._held for connection in rig.handoff.connections] == [set()]

    async def test_who_leaves_while_waiting_gets_no_lease(self, rig: Rig) -> None:
        """The fill goes on for others, but nothing is pinned for who has gone."""
        rig.walk.origin.plan = FaultPlan(stall=1, methods=("fetch",))
        asker = await rig.connect()
        asker.send("lease", id=1, study=REF.study, series=REF.series, recipe="plain")
        await rig.walk.origin.until_stalled(2)
        asker.writer.close()
        await rig.ended()
        rig.walk.heal()
        rig.walk.origin.resume()
        await rig.walk.settled()
        assert (len(rig.leases), rig.walk.pins()) == (0, 0)

    async def test_drain(self, rig: Rig) -> None:
        """Told to stop: no new connections and leases; what is under way is answered, what is held can be renewed."""
        asker = await rig.connect()
        held = (await asker.lease(REF))["lease"]["lease"]
        rig.walk.origin.plan = FaultPlan(stall=1, methods=("fetch",))
        asker.send("lease", id=1, study=OTHER.study, series=OTHER.series, recipe="plain")
        await rig.walk.origin.until_stalled(2)
        await rig.app.shutdown()
        assert not rig.path.exists()
        with pytest.raises(OSError):
            await rig.connect()
        assert code(await asker.lease(REF)) == "overloaded"
        assert (await asker.ask("renew", lease=held))["lease"]["lease"] == held
        draining = asyncio.create_task(rig.app.cleanup())
        rig.walk.heal()
        rig.walk.origin.resume()
        await draining
        assert (await asker.reply())["lease"]["tier"] == "origin"
        await rig.handoff.close()
        assert await asker.reply() is None
        assert len(rig.leases) == 2, "they end with the ledger, once nothing writes to the arena any more"


class TestSocketFile:
    async def test_a_socket_that_nobody_listens_at_is_replaced(self, rig: Rig, tmp_path: Path) -> None:
        """What a crash left behind is no obstacle."""
        path = tmp_path / "left.sock"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        fresh = Rig(rig.walk, path)
        await fresh.handoff.listen(path, None, fresh.app)
        assert "lease" in await (await fresh.connect()).lease()
        await fresh.handoff.close()
        fresh.leases.close()

    @pytest.mark.parametrize("found", ["a live socket", "a file", "no folder", "a long path", "a group"])
    async def test_what_cannot_work_is_said(self, rig: Rig, tmp_path: Path, found: str) -> None:
        """The error names the setting or the socket's path; what is there is left as it is, and nothing is left."""
        path, group = tmp_path / "other.sock", None
        if found == "a live socket":
            path = rig.path
        elif found == "a file":
            path.write_text("precious")
        elif found == "no folder":
            path = tmp_path / "nowhere" / "lease.sock"
        elif found == "a long path":
            path = tmp_path / ("x" * 100)
        else:
            group = "no-such-group"
        with pytest.raises(ConfigError, match="other.sock" if group else "server.socket"):
            await Rig(rig.walk, path).handoff.listen(path, group, rig.app)
        assert "lease" in await (await rig.connect()).lease()
        assert path.is_file() == (found == "a file")
        assert path.exists() == (found in {"a live socket", "a file"})


def test_what_differs_from_lease_to_lease_comes_first() -> None:
    """Clients rely on it to read the rest once only."""
    assert LeaseAnswer.__struct_fields__[:4] == ("lease", "expires", "tier", "shm")


# ------------------------------------------------------------------ a real daemon


def eventually(holds: Callable[[], bool]) -> None:
    """Ask the daemon again until ``holds``, for half a minute at most."""
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)  # another process, which tells this only when asked
    raise AssertionError("it did not come true")


def pins(daemon: Daemon, ref: SeriesRef) -> int:
    """Pins on the study's tensors, as HTTP tells them."""
    entries = daemon.ask("GET", f"/v1/studies/{ref.study}").json["entries"]
    return sum(entry["pins"] for entry in entries if entry["kind"] == "tensor")


@contextlib.contextmanager
def connected(daemon: Daemon) -> Iterator[Any]:
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(60)
        made.connect(str(daemon.folder / "state" / "lease.sock"))
        with made.makefile("rwb", buffering=0) as file:
            yield file


def asked(file: Any, ref: SeriesRef) -> Any:
    request = {"op": "lease", "id": 1, "study": ref.study, "series": ref.series, "recipe": "volume"}
    file.write(json.dumps(request).encode() + b"\n")
    return json.loads(file.readline())["lease"]


@pytest.mark.service
class TestDaemon:
    def test_a_lease_shows_the_very_bytes(self, daemon: Daemon, bucket: Bucket) -> None:
        """The leased extent holds what GET sends, and HTTP tells of the same lease, socket and pin."""
        ref = bucket.series()
        with connected(daemon) as file:
            lease = asked(file, ref)
            with Path("/dev/shm", lease["shm"]).open("rb") as arena:
                mapped = mmap.mmap(arena.fileno(), 0, prot=mmap.PROT_READ)
            assert mapped[lease["offset"] : lease["offset"] + lease["nbytes"]] == daemon.tensor(ref).body
            mapped.close()
            eventually(lambda: pins(daemon, ref) == 1)
            renewed = daemon.ask("POST", f"/v1/leases/{lease['lease']}/renew", {"ttl_s": 120}).json
            assert renewed["socket"] == str(daemon.folder / "state" / "lease.sock")
        eventually(lambda: pins(daemon, ref) == 0)

    def test_who_may_connect(self, daemon: Daemon) -> None:
        """The daemon's user and its group, nobody else; the socket goes with the daemon."""
        path = daemon.folder / "state" / "lease.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert daemon.stop() == 0
        assert not path.exists()

    def test_a_killed_program_leaves_no_pin(self, daemon: Daemon, bucket: Bucket) -> None:
        """Its leases end with it, long before their time."""
        ref = bucket.series()
        script = (
            "import json, socket, sys; made = socket.socket(socket.AF_UNIX); made.connect(sys.argv[1]);"
            "made.sendall(sys.argv[2].encode()); made.recv(65536); print('leased', flush=True); made.recv(1)"
        )
        request = {"op": "lease", "id": 1, "study": ref.study, "series": ref.series, "recipe": "volume", "ttl_s": 3000}
        path = str(daemon.folder / "state" / "lease.sock")
        command = [sys.executable, "-c", script, path, json.dumps(request) + "\n"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == b"leased\n"
            eventually(lambda: pins(daemon, ref) == 1)
            os.kill(program.pid, signal.SIGKILL)
        eventually(lambda: pins(daemon, ref) == 0)
        assert daemon.metric("voxcache_leases") == 0

    def test_a_crashed_daemon_leaves_no_obstacle(self, daemon: Daemon, bucket: Bucket) -> None:
        """After kill -9 the next one listens at the same place."""
        ref = bucket.series()
        daemon.kill()
        assert (daemon.folder / "state" / "lease.sock").exists()
        daemon.start()
        with connected(daemon) as file:
            assert asked(file, ref)["nbytes"] > 0

    def test_it_can_be_moved_and_left_out(self, tmp_path: Path, bucket: Bucket) -> None:
        """`server.socket` says where it is; "" is for none, and leases say so."""
        ref = bucket.series()
        wanted = {"study": ref.study, "series": ref.series, "recipe": "volume"}
        for setting in (str(tmp_path / "here.sock"), ""):
            with Daemon(tmp_path, {"origin": bucket.origin, "server": {"port": 0, "socket": setting}}) as daemon:
                assert daemon.ask("POST", "/v1/leases", wanted).json["socket"] == setting
                assert not (tmp_path / "state" / "lease.sock").exists()
                assert (tmp_path / "here.sock").exists() == bool(setting)
        with pytest.raises(DaemonError, match=r"server\.socket"):
            Daemon(
                tmp_path, {"origin": bucket.origin, "server": {"port": 0, "socket": str(tmp_path / ("x" * 200))}}
            ).start()
