"""The client against a daemon in miniature: leases, views, renewals, fall-backs and errors."""

import asyncio
import copy
import gc
import json
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from voxcache_client import (
    AsyncClient,
    BadRequest,
    BadSource,
    Client,
    Denied,
    NotFound,
    Refused,
    ServerFailed,
    Unreachable,
    VoxcacheError,
)
from voxcache_client import errors as client_errors

from .double import SERIES, STUDY, Double

PACKAGE = Path(__file__).resolve().parents[2] / "client"


@pytest.fixture
def daemon() -> Iterator[Double]:
    double = Double()
    double.start()
    yield double
    double.stop()


@pytest.fixture
def client(daemon: Double) -> Iterator[Client]:
    with Client(daemon.url) as client:
        yield client


def problem(status: int, code: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    body = {"type": f"urn:voxcache:error:{code}", "title": code, "status": status, "detail": f"it is {code}"}
    return status, headers, json.dumps(body).encode()


def wait_for(event: threading.Event) -> None:
    event.wait(60)


def in_a_process(daemon: Double, script: str) -> str:
    """What ``script`` prints. It finds ``client`` and ``ask()``."""
    head = f"""
        import gc, os, sys
        sys.path.insert(0, {str(PACKAGE)!r})
        from voxcache_client import Client
        client = Client({daemon.url!r}, timeout_s=30)
        ask = lambda: client.tensor({STUDY!r}, {SERIES!r}, "volume")
    """
    code = textwrap.dedent(head) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


class TestLeased:
    def test_the_array_is_the_daemons_own_memory(self, daemon: Double, client: Client) -> None:
        """What the daemon writes to the shared memory shows in the array: nothing was copied."""
        tensor = client.tensor(STUDY, SERIES, "volume")
        assert np.array_equal(tensor.array, daemon.volume)
        daemon.overwrite(7)
        assert (tensor.array == 7).all()

    def test_the_tensor_tells_what_its_values_mean(self, daemon: Double, client: Client) -> None:
        """Spec and lease reach the caller unchanged."""
        tensor = client.tensor(STUDY, SERIES, "volume")
        assert (tensor.axes, tensor.spacing, tensor.units, tensor.tier) == ("zyx", (2.5, 0.7, 0.7), "HU", "ram")
        assert np.array_equal(tensor.affine, daemon.affine)
        assert tensor.local
        assert tensor.held
        assert tensor.lease in daemon.leases
        assert repr(tensor) == "<Tensor int16 [24, 16, 16] zyx from ram, local>"

    def test_nobody_can_write_through_it(self, client: Client) -> None:
        """Array, views and affine are read-only, and cannot be made writable."""
        tensor = client.tensor(STUDY, SERIES, "volume")
        with pytest.raises(ValueError, match="read-only"):
            tensor.array[0, 0, 0] = 1
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            tensor.array[1:].flags.writeable = True
        with pytest.raises(ValueError, match="read-only"):
            tensor.affine[0, 0] = 1

    def test_one_mapping_serves_all_tensors(self, daemon: Double, client: Client) -> None:
        """The arena is mapped once, however many tensors lie in it."""
        tensors = [client.tensor(STUDY, SERIES, "volume") for _ in range(3)]
        with Client(daemon.url) as other:
            tensors.append(other.tensor(STUDY, SERIES, "volume"))
        addresses = {tensor.array.__array_interface__["data"][0] for tensor in tensors}
        assert len(addresses) == 1
        assert Path("/proc/self/maps").read_text().count(daemon.path.name) == 1

    def test_close_gives_the_lease_back(self, daemon: Double, client: Client) -> None:
        """Closing releases at once, once, and the array can no longer be reached."""
        tensor = client.tensor(STUDY, SERIES, "volume")
        tensor.close()
        tensor.close()
        assert daemon.released.get(timeout=10) == tensor.lease
        assert not tensor.held
        with pytest.raises(ValueError, match="closed"):
            _ = tensor.array
        del tensor
        gc.collect()
        client.tensor(STUDY, SERIES, "volume").close()
        daemon.released.get(timeout=10)
        assert daemon.counts["DELETE release"] == 2

    def test_leaving_the_with_block_gives_the_lease_back(self, daemon: Double, client: Client) -> None:
        """Also when a view is kept: the caller has said so."""
        with client.tensor(STUDY, SERIES, "volume") as tensor:
            view = tensor.array[3:]
        assert daemon.released.get(timeout=10) == tensor.lease
        assert view.shape == (21, 16, 16)

    @pytest.mark.parametrize(
        "derive",
        [
            lambda array: array,
            lambda array: array[3:],
            lambda array: array[3:][::2].T,
            lambda array: array.reshape(-1)[5:6],
            lambda array: array.view(np.uint8),
            lambda array: array.view(np.recarray)[1:],
            lambda array: np.asarray(array)[..., None],
            lambda array: np.frombuffer(memoryview(array), np.int16),
            lambda array: memoryview(array)[2:4],
            lambda array: np.lib.stride_tricks.sliding_window_view(array, 2, axis=0),
            lambda array: np.from_dlpack(array) if np.lib.NumpyVersion(np.__version__) >= "2.1.0" else array,
            lambda array: iter(array[4]),
        ],
    )
    def test_the_last_view_holds_the_lease(self, daemon: Double, client: Client, derive) -> None:  # type: ignore[no-untyped-def]  # any kind of view
        """Whatever is derived without a copy keeps the lease; when it goes, the lease goes."""
        tensor = client.tensor(STUDY, SERIES, "volume")
        lease = tensor.lease
        view = derive(tensor.array)
        del tensor
        gc.collect()
        client.tensor(STUDY, SERIES, "volume").close()
        assert daemon.released.get(timeout=10) != lease, "the second lease was given back, the first one is held"
        assert lease in daemon.leases
        del view
        gc.collect()
        assert daemon.released.get(timeout=10) == lease

    def test_copies_hold_nothing(self, daemon: Double, client: Client) -> None:
        """A copy, deep or cast, is the caller's own."""
        tensor = client.tensor(STUDY, SERIES, "volume")
        copies = [tensor.array.copy(), copy.deepcopy(tensor.array), tensor.array.astype(np.float32)]
        lease = tensor.lease
        del tensor
        gc.collect()
        assert daemon.released.get(timeout=10) == lease
        assert all(np.array_equal(each, daemon.volume) for each in copies)

    def test_an_array_outlives_its_client(self, daemon: Double) -> None:
        """A closed or forgotten client keeps renewing what is still in use, then its thread ends."""
        for close in (Client.close, lambda client: None):
            client = Client(daemon.url)
            array = client.tensor(STUDY, SERIES, "volume", ttl_s=0.4).array
            close(client)
            del client
            gc.collect()
            keeper = next(thread for thread in threading.enumerate() if thread.name == "voxcache-leases")
            daemon.renewed.get(timeout=10)
            assert np.array_equal(array, daemon.volume)
            del array
            daemon.released.get(timeout=10)
            keeper.join(timeout=10)
            assert not keeper.is_alive()

    def test_a_closed_client_answers_no_more(self, client: Client) -> None:
        """It says so, rather than opening new connections."""
        client.close()
        with pytest.raises(ValueError, match="closed"):
            client.tensor(STUDY, SERIES, "volume")


class TestRenewal:
    def test_every_lease_is_renewed_until_it_is_dropped(self, daemon: Double, client: Client) -> None:
        """One thread renews them all, again and again."""
        tensors = [client.tensor(STUDY, SERIES, "volume", ttl_s=0.4) for _ in range(3)]
        waiting = {tensor.lease: 2 for tensor in tensors}
        while any(count > 0 for count in waiting.values()):
            waiting[daemon.renewed.get(timeout=10)] -= 1
        assert sum(thread.name == "voxcache-leases" for thread in threading.enumerate()) == 1

    def test_a_shorter_grant_is_renewed_sooner(self, daemon: Double, client: Client) -> None:
        """What the daemon grants counts, not what was asked for."""
        daemon.granted_s = 0.4
        tensor = client.tensor(STUDY, SERIES, "volume", ttl_s=3600)
        assert daemon.renewed.get(timeout=10) == tensor.lease

    def test_a_lost_lease_is_told(self, daemon: Double, client: Client) -> None:
        """When the daemon no longer knows the lease, ``held`` turns False and it is not renewed again."""
        tensor = client.tensor(STUDY, SERIES, "volume", ttl_s=0.4)
        daemon.leases.clear()
        daemon.renewed.get(timeout=10)
        client.tensor(STUDY, SERIES, "volume").close()
        daemon.released.get(timeout=10)
        assert not tensor.held
        assert daemon.renewed.empty()

    @pytest.mark.slow
    def test_a_failing_renewal_is_tried_again(self, daemon: Double, client: Client) -> None:
        """One error does not lose a lease that has time left."""
        daemon.refused_renewal = 503
        tensor = client.tensor(STUDY, SERIES, "volume", ttl_s=1.6)
        daemon.renewed.get(timeout=10)
        daemon.refused_renewal = None
        daemon.renewed.get(timeout=10)
        daemon.renewed.get(timeout=10)
        assert tensor.held

    def test_a_dead_daemon_loses_the_lease_but_not_the_bytes(self, daemon: Double, client: Client) -> None:
        """The mapping outlives the daemon: reading is safe, and ``held`` says that nobody vouches for it."""
        tensor = client.tensor(STUDY, SERIES, "volume", ttl_s=0.4)
        daemon.stop()
        client.close()
        next(thread for thread in threading.enumerate() if thread.name == "voxcache-leases").join(timeout=10)
        assert not tensor.held
        assert np.array_equal(tensor.array, daemon.volume)


class TestCopied:
    def test_elsewhere_the_bytes_come_over_http(self, daemon: Double, client: Client) -> None:
        """A lease on memory that cannot be seen is given back first; then the bytes are read."""
        daemon.shm = "voxcache-on-another-node"
        tensor = client.tensor(STUDY, SERIES, "volume")
        assert np.array_equal(tensor.array, daemon.volume)
        assert (tensor.local, tensor.lease, tensor.held, tensor.tier) == (False, None, True, "nvme")
        assert (tensor.axes, tensor.spacing, tensor.units) == ("zyx", (2.5, 0.7, 0.7), "HU")
        assert np.array_equal(tensor.affine, daemon.affine)
        assert daemon.order == ["POST", "DELETE", "GET"]
        assert not daemon.leases
        with pytest.raises(ValueError, match="read-only"):
            tensor.array[0] = 0

    def test_elsewhere_stays_elsewhere(self, daemon: Double, client: Client) -> None:
        """Having found that it runs on another node, the client asks for no more leases."""
        daemon.shm = "voxcache-on-another-node"
        for _ in range(3):
            client.tensor(STUDY, SERIES, "volume")
        assert daemon.order == ["POST", "DELETE", "GET", "GET", "GET"]

    @pytest.mark.parametrize("name", ["../../etc/hostname", "..", "", "/"])
    def test_a_name_that_is_no_name_is_not_opened(self, daemon: Double, client: Client, name: str) -> None:
        """Only objects right in the shared-memory folder are ever mapped."""
        daemon.shm = name
        assert not client.tensor(STUDY, SERIES, "volume").local

    def test_an_extent_past_the_end_is_not_mapped(self, daemon: Double, client: Client) -> None:
        """An arena smaller than the lease says is not the daemon's arena: reading it would kill the process."""
        with daemon.path.open("r+b") as file:
            file.truncate(12288)
        assert not client.tensor(STUDY, SERIES, "volume").local

    @pytest.mark.parametrize("status", [507, 409])
    def test_a_bypass_is_read_over_http_this_time_only(self, daemon: Double, client: Client, status: int) -> None:
        """A tensor the arena has no room for comes as bytes; the next one may be leased again."""
        daemon.refusal = problem(status, "too-large")
        assert not client.tensor(STUDY, SERIES, "volume").local
        daemon.refusal = None
        assert client.tensor(STUDY, SERIES, "volume").local

    @pytest.mark.parametrize("body", ["chunked", "until the connection closes"])
    def test_proxies_may_frame_the_body_otherwise(self, daemon: Double, client: Client, body: str) -> None:
        """However the end of the body is told, all of it arrives, and the next request works."""
        daemon.shm = "voxcache-on-another-node"
        daemon.body = body
        for _ in range(3):
            assert np.array_equal(client.tensor(STUDY, SERIES, "volume").array, daemon.volume)

    def test_a_body_that_breaks_off_is_an_error(self, daemon: Double, client: Client) -> None:
        """Half a volume is never handed out, and the broken connection is not used again."""
        daemon.shm = "voxcache-on-another-node"
        daemon.body = "too short"
        with pytest.raises(Unreachable, match="no complete answer"):
            client.tensor(STUDY, SERIES, "volume")
        daemon.body = "whole"
        assert np.array_equal(client.tensor(STUDY, SERIES, "volume").array, daemon.volume)

    def test_a_body_of_another_size_than_its_spec_is_an_error(self, daemon: Double, client: Client) -> None:
        """Bytes that are not the tensor's are never taken for it."""
        daemon.shm = "voxcache-on-another-node"
        right = daemon.volume
        client.tensor(STUDY, SERIES, "volume")
        daemon.spec_shape = [*right.shape[:2], right.shape[2] - 1]
        with pytest.raises(Unreachable, match="more than"):
            client.tensor(STUDY, SERIES, "volume")


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "code", "kind"),
        [
            (400, "malformed-uid", BadRequest),
            (403, "forbidden", Denied),
            (404, "unknown-study", NotFound),
            (410, "lease-expired", NotFound),
            (422, "missing-slice", BadSource),
            (503, "all-pinned", Refused),
            (502, "origin-denied", ServerFailed),
        ],
    )
    def test_problems_become_typed_errors(
        self, daemon: Double, client: Client, status: int, code: str, kind: type[VoxcacheError]
    ) -> None:
        """Code, status, detail and the time to wait come through."""
        daemon.refusal = problem(status, code, **{"Retry-After": "3"})
        with pytest.raises(kind) as caught:
            client.tensor(STUDY, SERIES, "volume")
        error = caught.value
        assert (error.code, error.status, error.detail, error.retry_after) == (code, status, f"it is {code}", 3.0)

    def test_the_code_ends_urls_and_urns_alike(self) -> None:
        """The problem type may be either; the code is its last part."""
        for kind in ("https://voxcache.dev/problems/all-pinned", "urn:voxcache:error:all-pinned"):
            error = client_errors.from_answer(503, None, json.dumps({"type": kind}).encode())
            assert (error.code, error.retry_after) == ("all-pinned", None)

    def test_an_answer_that_is_no_problem_document_is_still_typed(self, daemon: Double, client: Client) -> None:
        """A proxy's own error page, a list, a date as Retry-After: none of them confuses the client."""
        for body in (b"<html>busy</html>", b"[]"):
            daemon.refusal = (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, body)
            with pytest.raises(Refused, match="answered 503") as caught:
                client.tensor(STUDY, SERIES, "volume")
            assert (caught.value.code, caught.value.retry_after) == ("http-503", None)

    def test_nobody_there(self, daemon: Double, client: Client) -> None:
        """A daemon that is down is Unreachable, not an OSError."""
        daemon.stop()
        with pytest.raises(Unreachable) as caught:
            client.tensor(STUDY, SERIES, "volume")
        assert (caught.value.code, caught.value.status) == ("unreachable", 0)

    def test_a_silent_daemon_times_out(self, daemon: Double) -> None:
        """The wait for an answer is bounded."""
        answer = threading.Event()
        daemon.before_answer = lambda: wait_for(answer)
        with Client(daemon.url, timeout_s=0.2) as client, pytest.raises(Unreachable, match="timed out"):
            client.tensor(STUDY, SERIES, "volume")
        answer.set()

    def test_the_token_is_sent(self, daemon: Double) -> None:
        """With it the daemon answers, without it the refusal is Denied."""
        daemon.token = "for-this-test"
        with Client(daemon.url, token=daemon.token) as client:
            client.tensor(STUDY, SERIES, "volume").close()
            daemon.released.get(timeout=10)
        with Client(daemon.url) as stranger, pytest.raises(Denied, match="unauthenticated"):
            stranger.tensor(STUDY, SERIES, "volume")

    @pytest.mark.parametrize("url", ["localhost:8600", "ftp://localhost", "http://", "http://host/a b"])
    def test_an_address_that_is_none(self, url: str) -> None:
        """A wrong URL fails where it is written."""
        with pytest.raises(ValueError, match="address"):
            Client(url)


class TestConnections:
    def test_one_connection_a_thread(self, daemon: Double) -> None:
        """Requests of a thread share one connection; threads do not share theirs."""
        daemon.shm = "voxcache-on-another-node"
        with Client(daemon.url) as client:
            for _ in range(5):
                client.tensor(STUDY, SERIES, "volume")
            assert len(daemon.connections) == 1
            thread = threading.Thread(target=client.tensor, args=(STUDY, SERIES, "volume"))
            thread.start()
            thread.join()
            assert len(daemon.connections) == 2

    def test_a_connection_dropped_while_idle_is_made_again(self, daemon: Double, client: Client) -> None:
        """The caller does not notice the daemon's keep-alive limit."""
        daemon.shm = "voxcache-on-another-node"
        client.tensor(STUDY, SERIES, "volume")
        daemon.drop_connections()
        client.tensor(STUDY, SERIES, "volume")
        assert len(daemon.connections) == 2

    @pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"])
    def test_a_server_that_is_no_daemon(self, said: bytes) -> None:
        """Whatever else listens there, the error is a typed one."""
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(said)

            thread = threading.Thread(target=answer)
            thread.start()
            with Client(f"http://127.0.0.1:{server.getsockname()[1]}") as client, pytest.raises(Unreachable):
                client.tensor(STUDY, SERIES, "volume")
            thread.join()

    def test_ipv6_and_a_path_before_the_routes(self) -> None:
        """URLs are read as such."""
        transport = Client("https://[::1]:8443/behind/a/proxy/")._transport
        assert (transport._host, transport._port, transport._base) == ("::1", 8443, "/behind/a/proxy")
        assert "Host: [::1]:8443\r\n" in transport._fixed


@pytest.mark.slow
class TestProcesses:
    def test_leases_are_given_back_at_exit(self, daemon: Double) -> None:
        """A program that forgets its tensors leaves nothing behind."""
        assert in_a_process(daemon, "kept = [ask(), ask().array[2:]]; print(len(kept))") == "2\n"
        assert {daemon.released.get(timeout=10), daemon.released.get(timeout=10)}
        assert not daemon.leases

    def test_exit_does_not_wait_for_a_silent_daemon(self, daemon: Double) -> None:
        """Giving back at exit is bounded by its own limit, not by the request's."""
        answer, granted = threading.Event(), iter([True])
        daemon.before_answer = lambda: None if next(granted, False) else wait_for(answer)
        assert in_a_process(daemon, "kept = ask(); print(kept.local)") == "True\n"
        answer.set()

    def test_a_forked_child_leaves_its_parents_leases_alone(self, daemon: Double) -> None:
        """It may read the array and use the client; dropping its copy of the tensor gives nothing back."""
        script = """
            tensor = ask()
            child = os.fork()
            if child == 0:
                own = ask()
                same = bool((own.array == tensor.array).all())
                tensor.close()
                own.close()
                del tensor
                gc.collect()
                sys.exit(not same)
            assert os.waitpid(child, 0)[1] == 0
            print(tensor.lease, flush=True)
            os._exit(0)
        """
        kept = in_a_process(daemon, script).strip()
        assert daemon.released.get(timeout=10) != kept
        assert list(daemon.leases) == [kept]


class TestAsync:
    async def test_the_same_without_blocking_the_loop(self, daemon: Double) -> None:
        """Requests run in threads; tensors are the same."""
        async with AsyncClient(daemon.url) as client:
            tensors = await asyncio.gather(*(client.tensor(STUDY, SERIES, "volume") for _ in range(4)))
            assert all(np.array_equal(tensor.array, daemon.volume) for tensor in tensors)
            for tensor in tensors:
                tensor.close()
                daemon.released.get(timeout=10)

    async def test_a_cancelled_caller_leaves_no_lease(self, daemon: Double) -> None:
        """The thread ends its request; nobody takes the tensor, so its lease is given back."""
        asked, answer = threading.Event(), threading.Event()

        def hold_back() -> None:
            asked.set()
            answer.wait(30)

        daemon.before_answer = hold_back
        async with AsyncClient(daemon.url) as client:
            asking = asyncio.create_task(client.tensor(STUDY, SERIES, "volume"))
            await asyncio.to_thread(asked.wait, 30)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            answer.set()
            assert await asyncio.to_thread(daemon.released.get, timeout=10)
