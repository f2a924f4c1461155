"""The client and a real daemon: the same tensor by lease and by copy, pins that come and go, errors by name."""

import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import voxcache_client.client
from tests.conftest import ROOT
from tests.daemon import Bucket, Daemon
from voxcache_client import Client, NotFound

pytestmark = pytest.mark.service


def pins(daemon: Daemon, study: str) -> int:
    """Pins on the study's tensors, as the daemon counts them."""
    entries = json.loads(daemon.ask("GET", f"/v1/studies/{study}").body)["entries"]
    return sum(entry["pins"] for entry in entries if entry["kind"] == "tensor")


def eventually(holds: Callable[[], bool]) -> None:
    """Ask the daemon again until ``holds``, for half a minute at most."""
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)  # another process, which tells this only when asked
    raise AssertionError("it did not come true")


def test_a_lease_and_a_copy_hold_the_same_tensor(
    daemon: Daemon, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes, affine, spacing and units do not depend on the way they came."""
    ref = bucket.series(slices=5)
    with Client(daemon.url) as near, Client(daemon.url) as far:
        leased = near.tensor(ref.study, ref.series, "volume")
        monkeypatch.setattr(voxcache_client.client, "open_arena", lambda name: None)  # as on another node
        copied = far.tensor(ref.study, ref.series, "volume")
        assert (leased.local, copied.local) == (True, False)
        assert leased.array.dtype == copied.array.dtype
        assert np.array_equal(leased.array, copied.array)
        assert np.array_equal(leased.affine, copied.affine)
        assert (leased.spacing, leased.axes, leased.units) == (copied.spacing, copied.axes, copied.units)


def test_the_pin_ends_with_the_last_view(daemon: Daemon, bucket: Bucket) -> None:
    """The daemon counts one pin for as long as a view lives, renewals included, and none after that."""
    ref = bucket.series()
    with Client(daemon.url) as client:
        view = client.tensor(ref.study, ref.series, "volume", ttl_s=0.5).array[2:]
        eventually(lambda: daemon.metric("voxcache_requests_total", route="handoff", status="200") >= 2)
        assert pins(daemon, ref.study) == 1
        del view
        gc.collect()
        eventually(lambda: pins(daemon, ref.study) == 0)


def test_the_daemons_errors_come_through(daemon: Daemon, bucket: Bucket) -> None:
    """A study that is not there is NotFound, with the daemon's own code and words."""
    bucket.series()
    with Client(daemon.url) as client, pytest.raises(NotFound) as caught:
        client.tensor("1.2.3", "1.2.3.4", "volume")
    assert (caught.value.code, caught.value.status) == ("unknown-study", 404)
    assert "1.2.3" in caught.value.detail


def leases_by(daemon: Daemon, way: str) -> float:
    """How many leases were granted by HTTP or over the socket."""
    return daemon.metric("voxcache_requests_total", route={"http": "/v1/leases"}.get(way, way), status="201")


def test_the_second_lease_comes_over_the_socket(daemon: Daemon, bucket: Bucket) -> None:
    """HTTP tells where the socket is; from then on it is used, for the same tensor and the same errors."""
    ref = bucket.series()
    with Client(daemon.url) as client:
        tensors = [client.tensor(ref.study, ref.series, "volume") for _ in range(3)]
        assert all(tensor.local and tensor.held for tensor in tensors)
        assert all(np.array_equal(tensor.array, tensors[0].array) for tensor in tensors)
        assert all(np.array_equal(tensor.affine, tensors[0].affine) for tensor in tensors)
        with pytest.raises(NotFound) as caught:
            client.tensor("1.2.3", "1.2.3.4", "volume")
        assert (caught.value.code, caught.value.status) == ("unknown-study", 404)
        assert (leases_by(daemon, "http"), leases_by(daemon, "handoff")) == (1, 2)
        daemon.until_written(ref)  # until then the write holds a pin, too
        assert pins(daemon, ref.study) == 3
        for tensor in tensors:
            tensor.close()
        eventually(lambda: pins(daemon, ref.study) == 0)
    with Client(daemon.url, socket=False) as client:
        for _ in range(2):
            client.tensor(ref.study, ref.series, "volume").close()
        assert (leases_by(daemon, "http"), leases_by(daemon, "handoff")) == (3, 2)


def test_a_restarted_daemon_is_found_again(tmp_path: Path, bucket: Bucket) -> None:
    """Its end shows at once in what it had leased; the client asks by HTTP, and then over the new socket."""
    ref = bucket.series()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Daemon(tmp_path, {"origin": bucket.origin, "server": {"port": port}}) as daemon, Client(daemon.url) as client:
        ask = partial(client.tensor, ref.study, ref.series, "volume", ttl_s=3000)
        ask()
        before = ask()
        values = before.array.copy()
        daemon.kill()
        assert not before.held
        daemon.start()
        assert not before.held
        after = [ask(), ask()]
        assert all(tensor.held and np.array_equal(tensor.array, values) for tensor in after)
        assert (leases_by(daemon, "http"), leases_by(daemon, "handoff")) == (1, 1)
        assert np.array_equal(before.array, values), "the old arena is still mapped"


def test_a_forked_child_has_connections_of_its_own(daemon: Daemon, bucket: Bucket) -> None:
    """Parent and child ask at the same time, and the child's end takes nothing from its parent."""
    ref = bucket.series()
    with Client(daemon.url) as client:
        client.tensor(ref.study, ref.series, "volume").close()
        kept = client.tensor(ref.study, ref.series, "volume", ttl_s=3000)
        child = os.fork()
        if child == 0:
            tensors = [client.tensor(ref.study, ref.series, "volume") for _ in range(20)]
            os._exit(not all(tensor.held and np.array_equal(tensor.array, kept.array) for tensor in tensors))
        for _ in range(20):
            client.tensor(ref.study, ref.series, "volume").close()
        assert os.waitpid(child, 0)[1] == 0
        eventually(lambda: pins(daemon, ref.study) == 1)
        assert kept.held


def test_a_program_that_ends_leaves_nothing(daemon: Daemon, bucket: Bucket) -> None:
    """Neither at its exit, which waits for nobody, nor when it is killed."""
    ref = bucket.series()
    script = """
import os, signal, sys
from voxcache_client import Client
client = Client(sys.argv[1])
kept = [client.tensor(sys.argv[2], sys.argv[3], "volume", ttl_s=3000) for _ in range(3)]
kept.pop(0).close()
print(len(kept), flush=True)
if sys.argv[4] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for end in ("exit", "killed"):
        command = [sys.executable, "-c", script, daemon.url, ref.study, ref.series, end]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "client")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
        assert (done.stdout, done.stderr) == ("2\n", "")
        if end == "exit":
            eventually(lambda: pins(daemon, ref.study) == 0)
        else:  # the one by HTTP was given back before the kill, or ends by itself at its time
            eventually(lambda: pins(daemon, ref.study) <= 1)
