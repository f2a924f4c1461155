"""A real daemon for a test: its settings, its process, and raw answers to raw requests."""

import asyncio
import http.client
import json
import os
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import pytest

from cache.dicom.phantom import write_series
from cache.keys import SeriesRef
from serving.config import merged
from serving.demo.daemon import DaemonProcess
from tests.conftest import ROOT

MIB = 1 << 20


class Answer(msgspec.Struct, frozen=True):
    """One HTTP answer, whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of the error it tells of."""
        return str(self.json["type"].rsplit(":", 1)[1])


class Daemon(DaemonProcess):
    """A daemon on settings of the test's own; what a test does not say is small and local."""

    def __init__(self, folder: Path, table: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        settings = folder / "voxcache.toml"
        defaults = {
            "server": {"port": 0, "drain_s": 5.0},
            "grpc": {"port": -1},
            "ram": {"budget": 64 * MIB},
            "nvme": {"path": str(folder / "nvme"), "budget": 256 * MIB, "health": {"deadline_s": 30.0}},
            "catalog": {"reserve": 4 * MIB},
            "state": {"path": str(folder / "state")},
            "workers": {"count": 2},
            "triton": {"url": ""},
            "store": {"revalidate": "request"},
            "arrivals": {"quiet_s": 0.2},
            "recipes": {"volume": {"version": 1, "ops": [{"op": "volume"}]}},
        }
        settings.write_text(_toml(_over(defaults, table)))
        found = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        super().__init__(settings, folder / "voxcache.log", found)

    def ask(
        self, method: str, path: str, body: bytes | object = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request, on a connection of its own."""
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def tensor(self, ref: SeriesRef, recipe: str = "volume", **headers: str) -> Answer:
        """GET one tensor; keyword ``If_None_Match`` is header ``If-None-Match``."""
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("GET", f"/v1/studies/{ref.study}/series/{ref.series}/tensors/{recipe}", headers=told)

    def arenas(self) -> list[Path]:
        """The shared memory with a name that the process maps."""
        try:
            lines = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it does not run, or ended while we read
            return []
        mapped = {int(line.split()[4]) for line in lines if "/dev/shm/" in line}
        return [Path(found.path) for found in os.scandir("/dev/shm") if found.inode() in mapped]

    def until_written(self, ref: SeriesRef) -> None:
        """Return once what is held of the series is on NVMe with its pack and the writer has let go of it."""
        while True:
            assert self.pid, "the daemon ended"
            entries = self.ask("GET", f"/v1/studies/{ref.study}").json["entries"]
            held, written = ({(e["kind"], e["etag"]) for e in entries if e["tier"] == t} for t in ("ram", "nvme"))
            done = held <= written and {"pack", "tensor"} <= {kind for kind, _ in written}
            if done and all(e["pins"] <= self.metric("voxcache_leases") for e in entries):
                return

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry ``labels``."""
        total = 0.0
        for line in self.ask("GET", "/metrics").body.decode().splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.split("{")[0] == name and all(f'{k}="{v}"' in sample for k, v in labels.items()):
                total += float(value)
        return total


def _over(defaults: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    result = merged(defaults, {})
    for name, value in table.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = _over(result[name], value) if both else value
    return result


def _toml(table: Mapping[str, Any], prefix: str = "") -> str:
    own = [f"{name} = {_value(v)}" for name, v in table.items() if not isinstance(v, Mapping)]
    lines = [f"[{prefix}]", *own] if prefix else own
    for name, value in table.items():
        if isinstance(value, Mapping):
            lines.append(_toml(value, f"{prefix}.{_key(name)}" if prefix else _key(name)))
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return json.dumps(value)


class Bucket:
    """A directory of phantoms that a daemon takes for its origin."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir()

    @property
    def origin(self) -> dict[str, Any]:
        return {"directory": {"path": str(self.path)}}

    def series(self, slices: int = 8, rows: int = 64, columns: int = 64, **more: Any) -> SeriesRef:
        """Write one more phantom."""
        study, series, _ = write_series(self.path, slices=slices, rows=rows, columns=columns, **more)
        return SeriesRef(study, series)

    def files(self, ref: SeriesRef) -> list[Path]:
        """The series' objects, by name."""
        return sorted((self.path / ref.study / ref.series).iterdir())


@asynccontextmanager
async def asking(
    daemon: Daemon, refs: Sequence[SeriesRef], recipe: str = "volume", clients: int = 4
) -> AsyncIterator[None]:
    """Clients that ask for tensors of ``refs`` until the block ends, one after the other, the first ones more often."""

    async def client(seed: int) -> None:
        choose = random.Random(seed)
        async with aiohttp.ClientSession(daemon.url) as session:
            while True:
                ref = refs[min(int(choose.expovariate(0.7)), len(refs) - 1)]
                async with session.get(f"/v1/studies/{ref.study}/series/{ref.series}/tensors/{recipe}") as answer:
                    await answer.read()

    tasks = [asyncio.create_task(client(seed)) for seed in range(clients)]
    try:
        yield
        assert not any(task.done() for task in tasks), "a client gave up"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    """An empty bucket: a directory."""
    return Bucket(tmp_path / "bucket")


@pytest.fixture
def daemon(tmp_path: Path, bucket: Bucket) -> Iterator[Daemon]:
    """A daemon on ``bucket``, with the recipe ``volume``."""
    with Daemon(tmp_path, {"origin": bucket.origin}) as process:
        yield process
