"""The client's way over the socket, against a daemon in miniature whose socket does what the test says."""

import contextlib
import json
import socket
import socketserver
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxcache_client import Client, Refused, Unreachable
from voxcache_client.handoff import Link

from .double import OFFSET, SERIES, STUDY, Double

#: From a request to the bytes of its reply; if they are no whole line, the connection is closed. None: silence.
Answer = Callable[[dict[str, Any]], bytes | None]


class Line:
    """A socket that answers lines. ``heard`` has all of them, ``answer`` says what is replied."""

    def __init__(self, path: Path, double: Double) -> None:
        self.path = str(path)
        self.heard: list[dict[str, Any]] = []
        self.connections = 0
        self.answer: Answer = self.grant
        self.released = threading.Semaphore(0)
        self._double = double
        line = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                line.connections += 1
                with contextlib.suppress(OSError):  # the client may leave at any moment
                    for text in self.rfile:
                        request = json.loads(text)
                        line.heard.append(request)
                        if request["op"] == "release":
                            line.released.release()
                            continue
                        reply = line.answer(request)
                        if reply is None:
                            continue
                        self.wfile.write(reply)
                        if not reply.endswith(b"\n"):
                            return

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

        self._server = Server(self.path, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def grant(self, request: dict[str, Any]) -> bytes:
        """A lease on the double's tensor."""
        told = {
            "lease": request.get("lease") or uuid.uuid4().hex,
            "expires": time.time() + request["ttl_s"],
            "tier": "ram",
            "shm": self._double.shm,
            "offset": OFFSET,
            "nbytes": self._double.volume.nbytes,
            **self._double.spec,
            "socket": self.path,
        }
        return json.dumps({"id": request["id"], "lease": told}, separators=(",", ":")).encode() + b"\n"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def daemon() -> Iterator[Double]:
    double = Double()
    double.start()
    yield double
    double.stop()


@pytest.fixture
def line(daemon: Double, tmp_path: Path) -> Iterator[Line]:
    line = Line(tmp_path / "lease.sock", daemon)
    daemon.socket = line.path
    yield line
    line.close()


@pytest.fixture
def client(daemon: Double, line: Line) -> Iterator[Client]:
    """A client that knows the socket."""
    with Client(daemon.url, timeout_s=30.0) as client:
        client.tensor(STUDY, SERIES, "volume").close()
        assert line.released.acquire(timeout=10)
        line.heard.clear()
        yield client


def posts(daemon: Double) -> int:
    return daemon.counts["POST grant"]


def test_leases_over_the_socket_are_like_those_by_http(daemon: Double, line: Line, client: Client) -> None:
    """Same array, same meaning; what is asked is what was said."""
    tensor = client.tensor(STUDY, SERIES, "volume", namespace="staging", ttl_s=7.0)
    assert np.array_equal(tensor.array, daemon.volume)
    assert (tensor.axes, tensor.spacing, tensor.units, tensor.tier) == ("zyx", (2.5, 0.7, 0.7), "HU", "ram")
    assert np.array_equal(tensor.affine, daemon.affine)
    assert tensor.local
    assert tensor.held
    wanted = {"study": STUDY, "series": SERIES, "recipe": "volume", "namespace": "staging", "ttl_s": 7.0}
    assert line.heard == [{"op": "lease", "id": 0, **wanted}]
    tensor.close()
    assert line.released.acquire(timeout=10)
    assert line.heard[1:] == [{"op": "release", "lease": tensor.lease}]
    assert posts(daemon) == 1


def test_replies_in_any_form(daemon: Double, line: Line, client: Client) -> None:
    """Blanks and length do not matter."""

    def spaced(request: dict[str, Any]) -> bytes:
        return json.dumps(json.loads(line.grant(request))).encode() + b"\n"

    def large(request: dict[str, Any]) -> bytes:
        reply = json.loads(line.grant(request))
        reply["lease"]["units"] = "HU" * 50_000
        return json.dumps(reply, separators=(",", ":")).encode() + b"\n"

    for answer in (spaced, large):
        line.answer = answer
        tensor = client.tensor(STUDY, SERIES, "volume")
        assert np.array_equal(tensor.array, daemon.volume)
        assert tensor.units.startswith("HU")
    assert posts(daemon) == 1


def test_renewals_go_over_the_socket(line: Line, client: Client) -> None:
    """And the lease is held on."""
    renewed = threading.Semaphore(0)

    def answer(request: dict[str, Any]) -> bytes:
        if request["op"] == "renew":
            renewed.release()
        return line.grant(request)

    line.answer = answer
    tensor = client.tensor(STUDY, SERIES, "volume", ttl_s=0.8)
    assert renewed.acquire(timeout=10)
    assert renewed.acquire(timeout=10)
    assert tensor.held


def test_a_refusal_is_typed_and_keeps_the_connection(daemon: Double, line: Line, client: Client) -> None:
    """It is the daemon's answer: HTTP is not asked for another one."""
    problem = {"type": "urn:voxcache:error:all-pinned", "title": "", "status": 503, "detail": "it is all in use"}
    line.answer = lambda request: json.dumps({"id": 0, "problem": problem, "retry_after_s": 1.5}).encode() + b"\n"
    for _ in range(5):
        with pytest.raises(Refused) as caught:
            client.tensor(STUDY, SERIES, "volume")
    assert (caught.value.code, caught.value.retry_after) == ("all-pinned", 1.5)
    line.answer = line.grant
    assert client.tensor(STUDY, SERIES, "volume").held
    assert posts(daemon) == 1
    assert line.connections <= 2, "one, and one more while the first lease was given back"


@pytest.mark.parametrize(
    "reply", [b"no JSON\n", b"[]\n", b"{}\n", b'{"lease":{"lease":"x","shm":"y"}}\n', b'{"le', b""]
)
def test_a_socket_of_no_use_is_left_for_http(daemon: Double, line: Line, client: Client, reply: bytes) -> None:
    """Closed, cut off, or answered by something else: the caller gets the tensor all the same."""
    line.answer = lambda request: reply
    tensor = client.tensor(STUDY, SERIES, "volume")
    assert tensor.held
    assert posts(daemon) == 2


def test_a_socket_that_cannot_be_reached(daemon: Double, tmp_path: Path) -> None:
    """HTTP goes on being asked."""
    daemon.socket = str(tmp_path / "of-another-mount-namespace.sock")
    with Client(daemon.url) as client:
        assert all(client.tensor(STUDY, SERIES, "volume").held for _ in range(3))
    assert posts(daemon) == 3


def test_the_socket_of_another_node_is_not_asked(daemon: Double, line: Line) -> None:
    """A path means nothing where the daemon's memory cannot be seen: another daemon may listen there."""
    daemon.shm = "voxcache-on-another-node"
    with Client(daemon.url) as client:
        assert not client.tensor(STUDY, SERIES, "volume").local
    assert line.connections == 0
    assert daemon.released.get(timeout=10)


def test_a_silent_daemon(daemon: Double, line: Line) -> None:
    """The wait is bounded, once: the caller hears of it, and other leases on the connection are not lost by it."""
    silent = threading.Event()
    with Client(daemon.url, timeout_s=0.3) as client:
        client.tensor(STUDY, SERIES, "volume").close()
        held = client.tensor(STUDY, SERIES, "volume", ttl_s=3000)
        line.answer = lambda request: None if silent.is_set() else line.grant(request)
        silent.set()
        with pytest.raises(Unreachable, match=r"0\.3 s"):
            client.tensor(STUDY, SERIES, "volume")
        assert held.held
        silent.clear()
        assert client.tensor(STUDY, SERIES, "volume").held
        assert posts(daemon) == 1


def test_a_lease_ends_with_its_connection(line: Line, client: Client) -> None:
    """When the daemon closes it, nobody vouches for the bytes any more, and nobody renews."""
    tensor = client.tensor(STUDY, SERIES, "volume", ttl_s=3000)
    assert tensor.held
    line.answer = lambda request: b""
    client.tensor(STUDY, SERIES, "volume").close()  # which makes the daemon close, and is answered by HTTP
    assert not tensor.held


def test_concurrent_requests_do_not_wait_for_each_other(daemon: Double, line: Line, client: Client) -> None:
    """A tensor that has to be made holds up nobody else's; its connection is used again afterwards."""
    asked, go_on = threading.Event(), threading.Event()

    def answer(request: dict[str, Any]) -> bytes:
        if request["namespace"] == "slow":
            asked.set()
            assert go_on.wait(30)
        return line.grant(request)

    line.answer = answer
    slow = threading.Thread(target=lambda: client.tensor(STUDY, SERIES, "volume", namespace="slow"))
    slow.start()
    assert asked.wait(30)
    assert client.tensor(STUDY, SERIES, "volume").held
    go_on.set()
    slow.join()
    for _ in range(5):
        client.tensor(STUDY, SERIES, "volume")
    assert line.connections <= 3, "one for each, and one more while the first lease was given back"


def test_a_closed_client_closes_its_connections_with_the_last_lease(line: Line, client: Client) -> None:
    """What is in use stays leased past ``close``; when it goes, so does the connection."""
    tensor = client.tensor(STUDY, SERIES, "volume", ttl_s=3000)
    link = tensor._lease.link if tensor._lease is not None else None
    assert link is not None
    client.close()
    assert tensor.held
    assert link.alive
    tensor.close()
    assert line.released.acquire(timeout=10)


def test_giving_back_never_waits(client: Client, tmp_path: Path) -> None:
    """An array may be collected anywhere: where the daemon does not read, the lease is left to the thread."""
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf.sock"))
        deaf.listen()
        handoff = client._handoff
        handoff._idle = [Link(str(tmp_path / "deaf.sock"), timeout_s=3000)]
        while handoff.release_at_once("0" * 32):
            assert len(handoff._idle) == 1
        assert handoff._idle == [], "part of a line may have been sent: nothing more goes over that connection"
        assert not handoff.release_at_once("0" * 32)
