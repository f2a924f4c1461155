"""Those that hold what somebody has decoded before: the tensor's bytes under a key."""

import contextlib
import http.client
import tempfile
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import diskcache
import numpy as np
import redis

from loadtest import servers
from loadtest.stand import Series, program

from .base import Peer, Tensor, get_all, get_one, volume_of


class _Ready(Peer):
    """Look, and else do it oneself: what every service that uses such a cache has to be written to do."""

    ready = True

    def start(self, stack: contextlib.ExitStack) -> None:
        self._origin = self.bucket.store()

    def tensor(self, series: Series) -> Tensor:
        held = self._get(series.ref.series)
        if held is None:
            volume = volume_of(get_all(self._origin, sorted(series.files), self.at_once))
            self._put(series.ref.series, volume)
            return volume
        return np.frombuffer(held, np.int16).reshape(-1, 512, 512)

    @abstractmethod
    def _get(self, key: str) -> Any:
        """The tensor's bytes, or None."""

    @abstractmethod
    def _put(self, key: str, volume: Tensor) -> None:
        """Keep it."""


class RedisTensors(_Ready):
    """https://redis.io/docs/latest/develop/reference/eviction/"""

    name = "Redis, ready tensors"
    settings = "maxmemory of the limit, allkeys-lru, no persistence, proto-max-bulk-len 1gb; redis-py's get"

    def start(self, stack: contextlib.ExitStack) -> None:
        super().start(stack)
        program("redis-server", "redis")
        bounds = ("--maxmemory", str(self.limit), "--maxmemory-policy", "allkeys-lru")
        port, self.pid = stack.enter_context(servers.redis(self.place, *bounds))
        self._client = redis.Redis(port=port)
        stack.callback(self._client.close)

    def _get(self, key: str) -> Any:
        return cast("bytes | None", self._client.get(key))

    def _put(self, key: str, volume: Tensor) -> None:
        # what clients have yet to read counts as used memory, too: past it, sets are refused until it is less
        with contextlib.suppress(redis.exceptions.OutOfMemoryError):
            self._client.set(key, volume.data.cast("B"))


class DiskCache(_Ready):
    """https://grantjenks.com/docs/diskcache/"""

    name = "diskcache, ready tensors"
    settings = "size_limit of the limit, least-recently-stored eviction (the default), files beside its SQLite index"

    def start(self, stack: contextlib.ExitStack) -> None:
        super().start(stack)
        self._cache = stack.enter_context(diskcache.Cache(str(self.place / "cache"), size_limit=self.limit))

    def _get(self, key: str) -> Any:
        return self._cache.get(key)

    def _put(self, key: str, volume: Tensor) -> None:
        self._cache.set(key, volume.tobytes())

    def disk(self) -> Path | None:
        return self.place / "cache"


class NginxFiles(_Ready):
    """A file server, and a folder that somebody else fills and bounds."""

    name = "nginx, ready files"
    settings = "files in memory (/dev/shm), sendfile, open_file_cache; nobody bounds them"

    def start(self, stack: contextlib.ExitStack) -> None:
        super().start(stack)
        self._shared = stack.enter_context(_shared())
        port, self.pid = stack.enter_context(servers.nginx(self.place, self._shared))
        self._files = http.client.HTTPConnection("127.0.0.1", port)
        stack.callback(self._files.close)

    def _get(self, key: str) -> Any:
        if not (self._shared / key).exists():
            return None
        return get_one(self._files, f"/{key}")

    def _put(self, key: str, volume: Tensor) -> None:
        (self._shared / key).write_bytes(volume.data)


@contextlib.contextmanager
def _shared() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="voxcache-peers-", dir="/dev/shm") as folder:
        yield Path(folder)
