"""Those that keep the objects: the bucket itself, and Orthanc."""

import contextlib
import http.client
import json
import re
from pathlib import Path
from typing import Any

from loadtest import servers
from loadtest.generator import Request
from loadtest.stand import Series, objects, program

from .base import Peer, Tensor, get_all, over_http, volume_of

_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


class Gateway(Peer):
    """No cache at all."""

    name = "S3 gateway, pydicom loop"
    settings = "Ceph RADOS gateway 16 with BlueStore on a file; obstore, 32 GETs at a time"

    def start(self, stack: contextlib.ExitStack) -> None:
        self._store = self.bucket.store()
        self.pid = self.bucket.pid

    def tensor(self, series: Series) -> Tensor:
        return volume_of(get_all(self._store, sorted(series.files), self.at_once))

    def requests(self, series: Series) -> list[Request]:
        return objects(self.bucket, series, "instances")


class Orthanc(Peer):
    """A DICOM server that holds the series itself."""

    name = "Orthanc, files"
    settings = (
        "Debian's Orthanc with its SQLite index, files uncompressed, 50 HTTP threads, no authentication, REST API"
    )

    def start(self, stack: contextlib.ExitStack) -> None:
        command = [program("Orthanc", "orthanc"), str(self.place / "orthanc.json")]
        self.port = servers.free_port()
        self._ids: dict[str, list[str]] = {}
        plugins = [str(_PLUGIN)] if _PLUGIN.exists() else []
        table = {
            "StorageDirectory": str(self.place / "storage"),
            "IndexDirectory": str(self.place / "index"),
            "StorageCompression": False,
            "HttpPort": self.port,
            "HttpThreadsCount": 50,
            "DicomServerEnabled": False,
            "AuthenticationEnabled": False,
            "RemoteAccessAllowed": True,
            "Plugins": plugins,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False},
        }
        (self.place / "orthanc.json").write_text(json.dumps(table))
        running = servers.process(command, self.place / "orthanc.log", servers.answers(self.port, "/system"))
        self.pid = stack.enter_context(running).pid
        self._store = over_http(f"http://127.0.0.1:{self.port}")

    def load(self, series: Series) -> None:
        """Store its instances, as a modality would."""
        for key in sorted(series.files):
            self.ask("POST", "/instances", series.files[key].read_bytes())
        query = {"Level": "Series", "Query": {"SeriesInstanceUID": series.ref.series}, "Expand": True}
        [found] = self.ask("POST", "/tools/find", json.dumps(query).encode())
        self._ids[series.ref.series] = found["Instances"]

    def tensor(self, series: Series) -> Tensor:
        return volume_of(
            get_all(self._store, [f"instances/{each}/file" for each in self._ids[series.ref.series]], self.at_once)
        )

    def requests(self, series: Series) -> list[Request]:
        base = f"http://127.0.0.1:{self.port}/instances"
        return [Request("instances", f"{base}/{each}/file") for each in self._ids[series.ref.series]]

    def disk(self) -> Path | None:
        return self.place / "storage"

    def ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The JSON of an answer."""
        return json.loads(self.get(method, path, body))

    def get(self, method: str, path: str, body: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            told = answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"Orthanc: {method} {path}: {answer.status}")
            return told
        finally:
            connection.close()


class OrthancDicomWeb(Orthanc):
    """The same by the standard's own way: one request for a series (PS3.18 §10.4), an answer of many parts."""

    name = "Orthanc, DICOMweb"
    settings = "the same with the DICOMweb plugin; WADO-RS: a series in one request, instances one by one"

    def start(self, stack: contextlib.ExitStack) -> None:
        if not _PLUGIN.exists():
            raise RuntimeError("Orthanc's DICOMweb plugin is not installed (deploy/setup peers)")
        super().start(stack)

    def tensor(self, series: Series) -> Tensor:
        answer = self.get("GET", f"/dicom-web/studies/{series.ref.study}/series/{series.ref.series}")
        return volume_of(parts(answer))

    def requests(self, series: Series) -> list[Request]:
        base = f"http://127.0.0.1:{self.port}/dicom-web/studies/{series.ref.study}/series/{series.ref.series}"
        return [Request("instances", f"{base}/instances/{Path(key).stem}") for key in sorted(series.files)]


def parts(answer: bytes) -> list[bytes]:
    """The bodies of a multipart/related answer whose parts tell their length (RFC 2387)."""
    found, at = [], 0
    while (head := re.compile(rb"Content-Length: *(\d+)\r\n", re.IGNORECASE).search(answer, at)) is not None:
        start = answer.index(b"\r\n\r\n", head.start()) + 4
        at = start + int(head[1])
        found.append(answer[start:at])
    return found
