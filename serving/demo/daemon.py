"""One real daemon process, for the demo, the tests and the benchmarks: started, watched until ready, ended."""

import http.client
import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit


class DaemonError(Exception):
    """The daemon did not start, or answered with an error; the end of its log says why."""


class DaemonProcess:
    """``voxcache serve`` on the settings file ``settings``. Its log is kept in the file ``log``."""

    def __init__(self, settings: Path, log: Path, environment: dict[str, str] | None = None) -> None:
        self._settings = settings
        self._log = log
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Its process id; 0 when it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start, and return once requests are answered. Raises: DaemonError."""
        command = [sys.executable, "-m", "serving.cli", "serve", "--config", str(self._settings)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=self._environment
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if "ready at " not in line:
            self._ended()
            raise DaemonError(f"the daemon did not start:\n{self.log()}")
        self.url = line.rsplit(" ", 1)[1].strip()

    def stop(self, deadline_s: float = 60.0) -> int:
        """Ask it to end, and wait; its exit status. Harmless when it does not run."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._ended()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._ended()

    def log(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of one answer. Raises: DaemonError for an error status."""
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise DaemonError(f"{method} {path}: {answer.status} {text.decode(errors='replace')}")
        return json.loads(text) if text else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def _ended(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        status = self._process.wait()
        self._process.stdout.close()
        self._process = None
        return status
