"""A real Prometheus for tests: it scrapes daemons every few seconds, works out our rules, and is asked over its API."""

import http.client
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

from tests.services import free_port

Found = TypeVar("Found")

#: Seconds that whatever is waited for may take.
DEADLINE_S = 90.0


def settled(wrong: Callable[[], Found]) -> Found:
    """What is still wrong after a while, if anything: a scrape that failed on a busy machine is followed by others."""
    end = time.monotonic() + DEADLINE_S
    while (found := wrong()) and time.monotonic() < end:
        time.sleep(0.2)  # another process, which scrapes every now and then and is only asked
    return found


class Prometheus:
    """One that runs until the block ends. ``targets`` are URLs, each under the name of the node that it stands for."""

    def __init__(self, folder: Path, targets: Mapping[str, str], rules: Path) -> None:
        self._folder = folder
        self._port = free_port()
        scraped = [
            {"targets": [url.removeprefix("http://")], "labels": {"instance": node}} for node, url in targets.items()
        ]
        folder.mkdir()
        (folder / "prometheus.yml").write_text(  # JSON is YAML
            json.dumps(
                {
                    "global": {"scrape_interval": "3s", "scrape_timeout": "3s", "evaluation_interval": "1s"},
                    "rule_files": [str(rules)],
                    "scrape_configs": [{"job_name": "voxcache", "static_configs": scraped}],
                }
            )
        )

    def __enter__(self) -> Self:
        command = ["prometheus", f"--config.file={self._folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={self._folder}/data", f"--web.listen-address=127.0.0.1:{self._port}"]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + DEADLINE_S
        while not self._ready():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < end, "it does not get ready"
            time.sleep(0.05)  # another process, which tells this only when asked
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(DEADLINE_S)

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """The series of an instant query: ``metric`` is their labels, ``value`` time and value."""
        result: list[dict[str, Any]] = self._get(f"query?query={quote(expr)}")["result"]
        return result

    def rules(self) -> list[dict[str, Any]]:
        """All rules with what became of them: ``health``, ``lastError``, and ``alerts`` of those that alert."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def until(self, expr: str) -> None:
        """Return once ``expr`` has a series that is not 0. Raises: AssertionError: it has none in the end."""
        assert not settled(lambda: not any(float(series["value"][1]) for series in self.ask(expr))), expr

    def _get(self, path: str) -> Any:
        status, body = self._answer(f"/api/v1/{path}")
        assert status == 200, body
        return json.loads(body)["data"]

    def _ready(self) -> bool:
        try:
            return self._answer("/-/ready")[0] == 200
        except ConnectionError:
            return False

    def _answer(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()
