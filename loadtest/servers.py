"""The daemon and its peers as real processes on loopback, ended by their own handle when the benchmark is over."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from serving.demo.daemon import DaemonProcess

START_S = 60.0


class Server(NamedTuple):
    """A running peer."""

    port: int
    pid: int


def forked(work: Callable[[], None]) -> int:
    """The process id of a child that does ``work``, and ends with it: what its parent would do at its end, it must not.

    Whoever calls waits for it (``os.waitpid``).
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def process(
    arguments: list[str], log: Path, ready: Callable[[], bool], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers, until the block ends. ``environment``: its own, instead of ours.

    Raises:
        RuntimeError: it ended, or did not answer in time; the end of its log says why.
    """
    with log.open("wb") as output:
        started = subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
    try:
        deadline = time.monotonic() + START_S
        while not ready():
            if started.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{arguments[0]} does not answer (exit status {started.returncode}):\n{said}")
            time.sleep(0.05)  # a program of somebody else, which tells nobody that it is ready
        yield started
    finally:
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def answers(port: int, path: str) -> Callable[[], bool]:
    """Whether a GET of ``path`` is answered with 200."""

    def ask() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    return ask


def listens(port: int) -> Callable[[], bool]:
    """Whether anybody takes connections there."""

    def ask() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return ask


def settings(
    folder: Path,
    origin: Path | str,
    *,
    ram: int,
    nvme: int,
    extra: str = "",
    triton: str = 'url = ""',
    port: int = 0,
    grpc_port: int = -1,
    namespaces: str = "serving = 1.0",
) -> Path:
    """The settings file of a daemon with the recipe ``volume``, over a directory of DICOM files or another origin.

    ``origin``: the directory, or tables of settings; ``triton``: what it says of Triton; ``grpc_port``: where gRPC is
    answered (-1: nowhere).
    """
    config = folder / "voxcache.toml"
    config.write_text(
        f"""
        [server]
        port = {port}
        [grpc]
        port = {grpc_port}
        [state]
        path = "{folder / "state"}"
        [ram]
        budget = {ram}
        namespaces = {{ {namespaces} }}
        [nvme]
        namespaces = {{ {namespaces} }}
        path = "{folder / "nvme"}"
        budget = {nvme}
        scrub = 0
        {f'[origin.directory]{chr(10)}path = "{origin}"' if isinstance(origin, Path) else origin}
        [triton]
        {triton}
        [recipes.volume]
        version = 1
        ops = [{{ op = "volume" }}]
        {extra}
        """
    )
    return config


@contextlib.contextmanager
def daemon(
    folder: Path,
    origin: Path,
    *,
    ram: int,
    nvme: int,
    extra: str = "",
    triton: str = 'url = ""',
    grpc_port: int = -1,
) -> Iterator[str]:
    """voxcache on such ``settings``. Yields its URL."""
    config = settings(folder, origin, ram=ram, nvme=nvme, extra=extra, triton=triton, grpc_port=grpc_port)
    running = DaemonProcess(config, folder / "voxcache.log")
    try:
        running.start()  # whoever interrupts this must not leave it behind
        yield running.url
    finally:
        running.stop()


@contextlib.contextmanager
def redis(folder: Path, *more: str, port: int = 0) -> Iterator[Server]:
    """redis-server without persistence, unless ``more`` of its options say otherwise."""
    port = port or free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    command += ["--proto-max-bulk-len", "1gb", "--dir", str(folder), *more]
    with process(command, folder / "redis.log", listens(port)) as running:
        yield Server(port, running.pid)


@contextlib.contextmanager
def nginx(folder: Path, root: Path) -> Iterator[Server]:
    """nginx with sendfile over the files of ``root``."""
    port = free_port()
    temporaries = "\n".join(
        f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    config = folder / "nginx.conf"
    config.write_text(
        f"""
        daemon off; {user} worker_processes auto; pid {folder / "nginx.pid"}; error_log stderr;
        events {{ worker_connections 256; }}
        http {{
            access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 1000000;
            sendfile_max_chunk 0; open_file_cache max=100;
            {temporaries}
            server {{ listen 127.0.0.1:{port}; root {root}; }}
        }}
        """
    )
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    command = [program, "-c", str(config), "-p", str(folder), "-e", "stderr"]
    with process(command, folder / "nginx.log", listens(port)) as running:
        yield Server(port, running.pid)
