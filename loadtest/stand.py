"""The test stand: a real S3 gateway with synthetic series, the daemon before it, and what can be asked of both.

Everything listens on loopback ports of its own and ends with its block. `loadtest.servers` starts the processes.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import botocore.session
import msgspec
import obstore
import xxhash
from botocore.config import Config
from obstore.store import S3Store

from cache.dicom.phantom import write_series
from cache.keys import SeriesRef
from serving.demo.daemon import DaemonProcess

from . import servers
from .figures import metric, say
from .generator import Request
from .outcome import ROOT

MIB: Final = 1 << 20
#: Of a slice of 512 × 512 × 16 bits, its header left out.
SLICE: Final = 512 * 512 * 2
_KEYS: Final = ("VOXCACHELOADTEST0001", "secretOfLoadTestsOnly000000000000000000001")
_REGION: Final = "us-east-1"
_UNTIL_S: Final = 120.0


class Series(NamedTuple):
    """A synthetic series: where it is, and its files by key."""

    ref: SeriesRef
    files: dict[str, Path]

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def make_series(folder: Path, mib: float, *, seed: int, **more: Any) -> Series:
    """A CT whose volume has ``mib`` MiB, or what ``more`` says (`cache.dicom.phantom.write_series`)."""
    slices = more.pop("slices", max(2, round(mib * MIB / SLICE)))
    study, series, paths = write_series(folder, slices=slices, seed=seed, **more)
    return Series(SeriesRef(study, series), {str(path.relative_to(folder)): path for path in paths})


@contextlib.contextmanager
def folder(name: str) -> Iterator[Path]:
    """A folder on disk that goes with the block, whoever wrote to it."""
    with tempfile.TemporaryDirectory(prefix=f"voxcache-{name}-", ignore_cleanup_errors=True) as path:
        Path(path).chmod(0o755)  # some servers give their root rights up before they read
        yield Path(path)


# ------------------------------------------------------------------ the bucket


class Bucket(NamedTuple):
    """A bucket of a real gateway, which anybody may read; ``endpoint`` may be that of a proxy before it."""

    endpoint: str
    name: str
    pid: int = 0

    def url(self, key: str) -> str:
        return f"{self.endpoint}/{self.name}/{quote(key)}"

    def store(self) -> S3Store:
        """obstore's client for it."""
        return S3Store(
            self.name,
            endpoint=self.endpoint,
            region=_REGION,
            access_key_id=_KEYS[0],
            secret_access_key=_KEYS[1],
            virtual_hosted_style_request=False,
            client_options={"allow_http": True, "timeout": "120s"},
            retry_config={"max_retries": 0},
        )

    def client(self) -> Any:
        """botocore's client for it."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=_REGION,
            aws_access_key_id=_KEYS[0],
            aws_secret_access_key=_KEYS[1],
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )

    def put(self, files: dict[str, Path]) -> None:
        store = self.store()
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda item: obstore.put(store, item[0], item[1].read_bytes(), use_multipart=False), files.items()
                )
            )

    def toml(self, more: str = "") -> str:
        """The daemon's settings for it."""
        return f"""
        [origin.s3]
        bucket = "{self.name}"
        endpoint_url = "{self.endpoint}"
        region = "{_REGION}"
        access_key = "{_KEYS[0]}"
        secret_key = "{_KEYS[1]}"
        {more}
        [find]
        manifest = ""
        """


@contextlib.contextmanager
def gateway(place: Path) -> Iterator[Bucket]:
    """Ceph's RADOS gateway with one bucket; what it stores is under ``place``. Raises: RuntimeError."""
    port = servers.free_port()
    state = place / "ceph"
    environment = os.environ | {
        "CEPH_RGW_DIR": str(ROOT / ".services" / "ceph"),
        "CEPH_RGW_STATE": str(state),
        "CEPH_RGW_PORT": str(port),
        "CEPH_RGW_ACCESS_KEY": _KEYS[0],
        "CEPH_RGW_SECRET_KEY": _KEYS[1],
    }

    def run(command: str) -> str:
        program = [str(ROOT / "deploy" / "services" / "ceph-rgw"), command]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=180, check=False)
        if done.returncode:
            raise RuntimeError(f"the S3 gateway: {done.stderr[-500:]}")
        return done.stdout

    say("starting the S3 gateway")
    run("install")
    try:
        run("start")
        pids = [
            int(line.split("pid ")[1].split(",")[0]) for line in run("status").splitlines() if line.startswith("rgw")
        ]
        bucket = Bucket(f"http://127.0.0.1:{port}", "images", pids[0])
        client = bucket.client()
        client.create_bucket(Bucket=bucket.name)
        everybody = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"]}
        resources = [f"arn:aws:s3:::{bucket.name}", f"arn:aws:s3:::{bucket.name}/*"]
        policy = {"Version": "2012-10-17", "Statement": [everybody | {"Resource": resources}]}
        client.put_bucket_policy(Bucket=bucket.name, Policy=json.dumps(policy))
        yield bucket
    finally:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            run("stop")


# ------------------------------------------------------------------ the daemon


class Daemon(DaemonProcess):
    """A running daemon. ``stop`` and ``start``, or ``kill`` and ``start``, keep its port and its folders."""

    def __init__(self, place: Path, config: Path, port: int) -> None:
        super().__init__(config, place / "voxcache.log")
        self.place = place
        self.port = port

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry ``labels``. Raises: KeyError: there is no such metric."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=120) as answer:  # noqa: S310 - our own
            return metric(answer.read().decode(), name, **labels)

    def lease(self, ref: SeriesRef, **more: Any) -> Any:
        """What is granted for a series' ``volume``; it is given back by nobody."""
        return self.call("POST", "/v1/leases", {"study": ref.study, "series": ref.series, "recipe": "volume", **more})

    def held(self, ref: SeriesRef) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.call("GET", f"/v1/studies/{ref.study}")["entries"]
        return entries

    def forget(self, refs: Iterable[SeriesRef]) -> None:
        """Have nothing of these held, once what is being written has been. Raises: RuntimeError, after two minutes."""
        for ref in refs:
            end = time.monotonic() + _UNTIL_S
            while self.held(ref):
                self.call("DELETE", f"/v1/studies/{ref.study}")
                if time.monotonic() > end:
                    raise RuntimeError(f"study {ref.study} does not go")
                time.sleep(0.02)  # another process, which tells this only when asked

    def until_written(self, ref: SeriesRef, kinds: Sequence[str] = ("pack", "tensor")) -> None:
        """Return once NVMe has the series' entries of these kinds. Raises: RuntimeError, after two minutes."""
        end = time.monotonic() + _UNTIL_S
        while not set(kinds) <= {entry["kind"] for entry in self.held(ref) if entry["tier"] == "nvme"}:
            if time.monotonic() > end:
                raise RuntimeError(f"study {ref.study} does not get to NVMe")
            time.sleep(0.02)  # another process, which tells this only when asked

    def rss_outside_arena(self) -> int:
        """Bytes of resident memory that are no shared memory: of the daemon itself, its workers left out."""
        rollup = Path(f"/proc/{self.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in rollup.splitlines() if ":" in line)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


@contextlib.contextmanager
def daemon(
    place: Path,
    origin: Path | Bucket,
    *,
    ram: int,
    nvme: int,
    extra: str = "",
    triton: str = 'url = ""',
    origin_more: str = "",
    namespaces: str = "serving = 1.0",
) -> Iterator[Daemon]:
    """voxcache over a bucket or a folder, with the recipe ``volume``."""
    port = servers.free_port()
    place.mkdir(parents=True, exist_ok=True)
    where = origin.toml(origin_more) if isinstance(origin, Bucket) else origin
    config = servers.settings(
        place, where, ram=ram, nvme=nvme, extra=extra, triton=triton, port=port, namespaces=namespaces
    )
    running = Daemon(place, config, port)
    try:
        running.start()  # whoever interrupts this must not leave it behind
        yield running
    finally:
        running.stop()


def instances(url: str, series: Series, track: str) -> list[Request]:
    """GETs of each object of a series from the daemon, in the order of their keys."""
    base = f"{url}/v1/studies/{series.ref.study}/series/{series.ref.series}/instances"
    return [
        Request(track, f"{base}/{number}", nbytes=series.files[key].stat().st_size)
        for number, key in enumerate(sorted(series.files))
    ]


def exact(url: str, series: Series, track: str, timeout_s: float = 120.0) -> list[Request]:
    """The same, each of whose answers must be the object's very bytes."""
    digests = [xxhash.xxh3_64(series.files[key].read_bytes()).hexdigest() for key in sorted(series.files)]
    return [
        msgspec.structs.replace(request, digest=digest, timeout_s=timeout_s)
        for request, digest in zip(instances(url, series, track), digests, strict=True)
    ]


def objects(bucket: Bucket, series: Series, track: str) -> list[Request]:
    """GETs of the same objects from the bucket."""
    return [Request(track, bucket.url(key), nbytes=series.files[key].stat().st_size) for key in sorted(series.files)]


def lease(url: str, ref: SeriesRef, track: str, recipe: str = "volume", **more: Any) -> Request:
    """A lease, which is given back."""
    wanted = {"study": ref.study, "series": ref.series, "recipe": recipe, "ttl_s": 60, **more}
    headers = {"Content-Type": "application/json"}
    return Request(track, f"{url}/v1/leases", "POST", json.dumps(wanted).encode(), headers, then="release")


# ------------------------------------------------------------------ what processes use


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process and its descendants have had."""
    return sum(_ticks(each) for each in [pid, *descendants(pid)]) / os.sysconf("SC_CLK_TCK")


def rss(pid: int) -> int:
    """Resident bytes of a process and its descendants, what they share counted once a process."""
    total = 0
    for each in [pid, *descendants(pid)]:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024
    return total


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those they have."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def _ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def disk_usage(path: Path) -> int:
    """Allocated bytes of everything under ``path``."""
    total = 0
    for each in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += each.lstat().st_blocks * 512
    return total


def program(name: str, package: str) -> str:
    """Where a program is. Raises: RuntimeError: it is not installed."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise RuntimeError(f"{name} is not installed (deploy/setup {package})")
    return found
