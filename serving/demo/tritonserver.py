"""One real tritonserver process on loopback, for the demo and the tests: started, watched until ready, ended.

The program itself comes from ``deploy/services/triton install``.
"""

import asyncio
import http.client
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

MODELS: Final = Path(__file__).resolve().parent / "models"
REPOSITORY: Final = Path(__file__).resolve().parents[2]


class TritonServerError(Exception):
    """The server is not installed, or did not start; the end of its log says why."""


def default_home() -> Path:
    """Where ``deploy/services/triton install`` puts the server: ``$VOXCACHE_SERVICES/triton``."""
    return Path(os.environ.get("VOXCACHE_SERVICES") or REPOSITORY / ".services").resolve() / "triton"


class TritonServer:
    """A server on two free loopback ports, which it keeps over stop and start. Its output goes to the file ``log``.

    ``more``: further arguments of the program's.

    Both ``with`` and ``async with`` start and stop it; the methods block, and belong in a thread.
    """

    def __init__(
        self, log: Path, models: Sequence[Path] = (MODELS,), home: Path | None = None, more: Sequence[str] = ()
    ) -> None:
        self._log = log
        self._more = more
        self._models = models
        self._home = home or default_home()
        self._http_port, self._grpc_port = free_ports(2)
        self._scratch = f"voxcache-triton-{secrets.token_hex(4)}-"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http_port}"

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self._grpc_port}"

    @property
    def pid(self) -> int:
        """Its process id; 0 when it does not run."""
        return self._process.pid if self._process is not None else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, deadline_s: float = 60.0) -> None:
        """Start, and return when every model is ready.

        Raises:
            TritonServerError: the server is not installed, ended by itself, or was not ready in time.
        """
        if not (self._home / "installed").is_file():
            raise TritonServerError(f"no Triton in {self._home}: run deploy/services/triton install")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + deadline_s
        while not self._ready():
            if not self.running or time.monotonic() > end:
                self.stop()
                raise TritonServerError(f"Triton did not start:\n{self._log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.05)

    def stop(self, deadline_s: float = 10.0) -> None:
        """End the server, by force when it has not ended after ``deadline_s``. Harmless when it does not run."""
        if self._process is None:
            return
        if self.running:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        # a server that was killed leaves the Python backend's own shared memory behind
        for leftover in Path("/dev/shm").glob(f"{self._scratch}*"):
            leftover.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    def _command(self) -> list[str]:
        return [
            str(self._home / "bin" / "tritonserver"),
            *(f"--model-repository={folder}" for folder in self._models),
            f"--backend-directory={self._home / 'backends'}",
            f"--cache-directory={self._home / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={self._scratch}",
            "--http-address=127.0.0.1",
            f"--http-port={self._http_port}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self._grpc_port}",
            "--allow-metrics=false",
            "--log-verbose=0",
            "--log-info=false",
            "--exit-timeout-secs=1",
            *self._more,
        ]

    def _environment(self) -> dict[str, str]:
        # The backend's embedded Python reads no PYTHONPATH: it is the one whose python3 comes first on the PATH.
        inherited = os.environ.get("LD_LIBRARY_PATH")
        libraries = [str(self._home / "lib"), *([inherited] if inherited else [])]
        return os.environ | {
            "PATH": f"{self._home / 'venv' / 'bin'}:{os.environ.get('PATH', os.defpath)}",
            "LD_LIBRARY_PATH": ":".join(libraries),
        }

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
