"""A real Orthanc for tests, from the system's packages, on loopback ports of its own."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec

from tests.conftest import ROOT
from tests.services import free_port

#: What a user of Orthanc is told to paste.
SCRIPTS = ROOT / "deploy" / "orthanc"
_PLUGIN = "/usr/share/orthanc/plugins/libOrthancPython.so"


class Orthanc(msgspec.Struct, frozen=True):
    """A running Orthanc; its files lie in ``storage``, one for each instance, named by nothing that DICOM knows."""

    port: int
    storage: Path
    log: Path

    def ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The answer to one request of its REST API, from JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            return json.loads(answer.read())
        finally:
            connection.close()

    def store(self, file: Path) -> None:
        """Have it take an instance."""
        self.ask("POST", "/instances", file.read_bytes())

    def series(self, uid: str) -> str:
        """Its own id of a series."""
        query = {"Level": "Series", "Query": {"SeriesInstanceUID": uid}}
        (found,) = self.ask("POST", "/tools/find", json.dumps(query).encode())
        return str(found)


@contextlib.contextmanager
def orthanc(folder: Path, environment: Mapping[str, str], **settings: Any) -> Iterator[Orthanc]:
    """Orthanc with a store in ``folder``, until the block ends. A series is stable after a second of quiet."""
    port = free_port()
    storage, log = folder / "storage", folder / "orthanc.log"
    storage.mkdir(parents=True, exist_ok=True)
    file = folder / "orthanc.json"
    base = {
        "StorageDirectory": str(storage),
        "IndexDirectory": str(folder / "index"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": False,
        "StableAge": 1,
        "Plugins": [],
        "LuaScripts": [],
    }
    file.write_text(json.dumps(base | settings))
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["/usr/sbin/Orthanc", str(file)], env={**os.environ, **environment}, stdout=output, stderr=output
        )
        try:
            running = Orthanc(port, storage, log)
            while True:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(OSError):
                    running.ask("GET", "/system")
                    break
                time.sleep(0.05)  # another process, which tells this only when asked
            yield running
        finally:
            process.terminate()
            process.wait(60)


def scripts() -> list[Callable[[], dict[str, Any]]]:
    """Settings with each script that can run here: not every system has packaged the plugin for Python."""
    return [lua, *([python] if Path(_PLUGIN).exists() else [])]


def lua() -> dict[str, Any]:
    """Settings with the script in Lua."""
    return {"LuaScripts": [str(SCRIPTS / "voxcache.lua")]}


def python() -> dict[str, Any]:
    """Settings with the script in Python."""
    return {"Plugins": [_PLUGIN], "PythonScript": str(SCRIPTS / "voxcache.py")}
