"""voxcache itself: a lease on its own node, and the bytes over HTTP."""

import contextlib
import http.client
import threading
from pathlib import Path

import numpy as np

from loadtest.generator import Request
from loadtest.stand import Daemon, Series, daemon, instances
from voxcache_client import Client

from .base import Peer, Tensor, get_one


class OverLease(Peer):
    """What a program on the daemon's node does."""

    name = "voxcache, lease"
    settings = "arena and NVMe of the limit each, revalidation by events; voxcache_client over the hand-off socket"
    ready = True

    daemon: Daemon

    def start(self, stack: contextlib.ExitStack) -> None:
        extra = '[store]\nrevalidate = "events"'
        running = daemon(self.place, self.bucket, ram=self.limit, nvme=self.limit, extra=extra)
        self.daemon = stack.enter_context(running)
        self.pid = self.daemon.pid
        self._client = stack.enter_context(Client(self.daemon.url))

    def tensor(self, series: Series) -> Tensor:
        return self._client.tensor(series.ref.study, series.ref.series, "volume").array

    def requests(self, series: Series) -> list[Request]:
        return instances(self.daemon.url, series, "instances")

    def disk(self) -> Path | None:
        return self.place / "nvme"


class OverHttp(OverLease):
    """What a program elsewhere does."""

    name = "voxcache, HTTP"
    settings = "the same; GET of the tensor's bytes by http.client, as the client package does from elsewhere"

    def start(self, stack: contextlib.ExitStack) -> None:
        super().start(stack)
        self._local = threading.local()  # a connection is one thread's

    def tensor(self, series: Series) -> Tensor:
        path = f"/v1/studies/{series.ref.study}/series/{series.ref.series}/tensors/volume"
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection("127.0.0.1", self.daemon.port)
        held = get_one(self._local.connection, path)
        return np.frombuffer(held, np.int16).reshape(-1, 512, 512)

    def requests(self, series: Series) -> list[Request]:
        return []
