"""Dashboards and rules on a real Prometheus, which scrapes daemons that are used, and fail, in every way they count.

One stands on an S3 bucket with an archive, and on a Triton; of the other the disk fails. What a query needs to be more
than empty happens here, so what stays empty is a query that is wrong.
"""

import asyncio
import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cache.keys import SeriesRef
from dashboards.generate import FOLDER
from dashboards.rules import ALERTS, RECORDED
from serving.demo.tritonserver import TritonServer
from tests.daemon import MIB, Bucket, Daemon
from tests.glacier import Glacier, glacier, origin
from tests.prometheus import Prometheus, settled
from tests.services import S3Proxy, before

pytestmark = [pytest.mark.service, pytest.mark.slow]

SIZE = {"rows": 256, "columns": 256}  # 128 KiB a slice

TABLE: dict[str, Any] = {
    "ram": {"budget": 4 * MIB, "eviction": {"policy": "lru"}},
    "store": {"revalidate": "interval", "revalidate_s": 0.1},
    "workers": {"count": 1, "job_memory": 256 * MIB, "plugins": ["tests.cache.faulty_ops:Hog"]},
    "restore": {"enabled": True, "poll_s": 0.5},
    "arrivals": {"warm": ["volume"], "attempts": 1},
    "pull": {"listing": {"interval_s": 0.5, "prefix": "none/"}},
    "plan": {"rules": [{"name": "two slices", "max_slices": 2, "recipes": ["hog"]}]},
    "retention": {
        "sweep_s": 1.0,
        "rules": [{"name": "staging", "namespace": ["staging"], "max_age_days": 1e-9}],
    },
    "recipes": {
        "volume": {"version": 1, "ops": [{"op": "volume"}]},
        "hog": {"version": 1, "ops": [{"op": "volume"}, {"op": "hog"}]},
        "real": {"version": 1, "ops": [{"op": "volume"}, {"op": "cast", "dtype": "float32"}]},
    },
}


class Bench:
    """Two daemons, what they stand on, and a way to have everything happen once more."""

    def __init__(
        self,
        daemon: Daemon,
        failing: Daemon,
        *,
        s3: Glacier,
        proxy: S3Proxy,
        name: str,
        bucket: Bucket,
        runner: asyncio.Runner,
    ) -> None:
        self.daemon = daemon
        self.failing = failing
        self.prometheus: Prometheus
        self._s3 = s3
        self._proxy = proxy
        self._name = name
        self._bucket = bucket
        self._runner = runner
        self._seeds = itertools.count()

    def series(self, *, archived: bool = False, slices: int = 4) -> SeriesRef:
        """One more in the bucket, or in its archive."""
        ref = self._bucket.series(**SIZE, slices=slices, seed=next(self._seeds))
        files = {path.relative_to(self._bucket.path).as_posix(): path.read_bytes() for path in self._bucket.files(ref)}
        store = self._s3.archive if archived else self._s3.put
        self._runner.run(store(self._name, files))
        return ref

    def everything(self) -> None:
        """Whatever is counted happens."""
        daemon = self.daemon
        ref = self.series()
        with ThreadPoolExecutor(4) as pool:
            assert {answer.status for answer in pool.map(daemon.tensor, [ref] * 4)} == {200}  # one fill, joined
        self.infer(ref)
        daemon.until_written(ref)
        for _ in range(8):  # the first leaves RAM, but not NVMe
            assert daemon.tensor(self.series()).status == 200
        assert daemon.tensor(ref).headers["Voxcache-Tier"] == "nvme"
        large = daemon.tensor(self.series(slices=32))
        assert (large.status, large.headers.get("Voxcache-Tier")) == (200, "bypass"), large.body[:400]
        assert daemon.ask("GET", f"/v1/studies/{ref.study}/series/{ref.series}/tensors/nothing").status == 404
        asked = {"study": ref.study, "series": ref.series, "recipe": "volume"}
        assert daemon.ask("POST", "/v1/leases", asked).status == 201
        assert daemon.ask("PUT", f"/v1/studies/{ref.study}/pin", {"tag": "teaching"}).status == 200
        small = self.series(slices=2)
        staged = f"/v1/studies/{small.study}/series/{small.series}/tensors/volume?namespace=staging"
        assert daemon.ask("GET", staged).status == 200

        self._proxy.fail("stall", times=1)  # asked once more, which is answered
        assert daemon.tensor(self.series()).status == 200
        self._proxy.fail("503", times=1)
        assert daemon.tensor(self.series()).status == 200
        self._proxy.fail("503")
        daemon.tensor(ref)
        assert daemon.tensor(self.series()).status == 503
        self._proxy.heal()

        assert daemon.tensor(self.series(archived=True)).status == 202
        self._s3.thaw()
        arrived = [self.series(), self.series(slices=2)]
        events = [{"study": ref.study, "series": ref.series, "complete": True} for ref in arrived]
        assert daemon.ask("POST", "/v1/arrivals/plain", events).status == 202

        sick = self.failing.ask("GET", "/v1/studies/1/series/1/tensors/volume")
        assert sick.status == 404
        for ref in (self._bucket.series(seed=next(self._seeds)) for _ in range(2)):
            assert self.failing.tensor(ref).status == 200
            assert self.failing.tensor(ref).status == 200

    def infer(self, ref: SeriesRef) -> None:
        """Twice, so that the second answer is one that was kept."""
        data = [f"{ref.study}/{ref.series}"]
        body = {"inputs": [{"name": "REFERENCE", "shape": [1], "datatype": "BYTES", "data": data}]}
        for _ in range(2):
            assert self.daemon.ask("POST", "/v2/models/embed.ref/infer", body).status == 200


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, triton: TritonServer) -> Iterator[Bench]:
    """Both, used twice over, with a Prometheus that has seen the second time begin and end."""
    folder = tmp_path_factory.mktemp("bench")
    bucket = Bucket(folder / "bucket")
    with asyncio.Runner() as runner, ExitStack() as stack:
        (folder / "s3").mkdir()
        serving = glacier(folder / "s3")
        s3 = runner.run(serving.__aenter__())
        stack.callback(lambda: runner.run(serving.__aexit__(None, None, None)))
        proxy = stack.enter_context(before(s3))
        name = runner.run(s3.bucket())
        kept = {"recipe": "real", "results": True}
        table = TABLE | {
            "origin": origin(proxy.service, name),
            "triton": {"url": triton.url, "grpc": triton.grpc_url, "models": {"embed": kept}},
        }
        sick = {
            "origin": bucket.origin,
            "workers": {"count": 1},
            "nvme": {"health": {"strikes": 1000}},
            "faults": {"disk": {"error": 1.0, "methods": ["write", "allocate", "sync"]}},
        }
        for each in ("well", "sick"):
            (folder / each).mkdir()
        daemon = stack.enter_context(Daemon(folder / "well", table))
        failing = stack.enter_context(Daemon(folder / "sick", sick))
        bench = Bench(daemon, failing, s3=s3, proxy=proxy, name=name, bucket=bucket, runner=runner)
        rules = FOLDER / "rules" / "voxcache.yml"
        targets = {"well": daemon.url, "sick": failing.url}
        bench.everything()
        bench.prometheus = stack.enter_context(Prometheus(folder / "prometheus", targets, rules))
        bench.prometheus.until("min(count_over_time(up[1m])) >= bool 2")
        bench.everything()
        bench.prometheus.until('voxcache_arrivals{state="dead"} >= 2')
        yield bench


def filled(expr: str) -> str:
    """A panel's query as Grafana would send it, with everything chosen."""
    for variable, value in {"$__rate_interval": "1m", "$__range": "1m", "$node": ".*", "$namespace": ".*"}.items():
        expr = expr.replace(variable, value)
    assert "$" not in expr
    return expr


def numbers(prometheus: Prometheus, expr: str) -> int:
    """How many series with a number the query has."""
    return sum(series["value"][1] != "NaN" for series in prometheus.ask(expr))


def queries(panels: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Title and query of each target."""
    for panel in panels:
        yield from queries(panel.get("panels", []))
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


@pytest.mark.parametrize("path", sorted((FOLDER / "grafana").glob("*.json")), ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_returns_data(bench: Bench, path: Path) -> None:
    """No panel is empty because its query is wrong."""
    board = json.loads(path.read_text())
    asked = [*queries(board["panels"])]
    assert asked
    assert settled(lambda: [pair for pair in asked if not numbers(bench.prometheus, filled(pair[1]))]) == []


def test_variables_have_values(bench: Bench) -> None:
    """Both nodes and both namespaces can be chosen."""
    for path in (FOLDER / "grafana").glob("*.json"):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
                assert found
                bench.prometheus.until(f"count(count by ({found[2]}) ({filled(found[1])})) == bool 2")


def test_every_rule_works_on_real_data(bench: Bench) -> None:
    """What is recorded has values; so has what each alert looks at, while most of them do not fire."""
    prometheus = bench.prometheus
    rules = {rule["name"]: rule for rule in prometheus.rules()}
    assert rules.keys() == {rule.name for rule in RECORDED} | {alert.name for alert in ALERTS}
    assert [(rule["name"], rule["lastError"]) for rule in rules.values() if rule["health"] != "ok"] == []
    looked_at = [rule.name for rule in RECORDED]
    looked_at += [condition.value for alert in ALERTS for condition in alert.conditions]
    assert settled(lambda: [expr for expr in looked_at if not numbers(prometheus, expr)]) == []
    prometheus.until('ALERTS{alertname="VoxcacheArrivalsDead",alertstate="firing"}')
    assert prometheus.ask('ALERTS{alertname=~"VoxcacheStrictnessViolated|VoxcacheAudit.*"}') == []


def test_metrics_follow_the_rules_of_names(bench: Bench) -> None:
    """promtool finds nothing odd in what a daemon exposes that has counted everything."""
    exposed = bench.daemon.ask("GET", "/metrics").body
    checked = subprocess.run(["promtool", "check", "metrics"], input=exposed, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_a_daemon_that_is_gone_is_what_is_said_first(bench: Bench) -> None:
    """Then there are no numbers of it, which must not read as if nothing were wrong."""
    board = json.loads((FOLDER / "grafana" / "latency.json").read_text())
    [expr] = [expr for title, expr in queries(board["panels"]) if title == "Do they get answers?"]
    bench.prometheus.until(f"({filled(expr)}) < bool 1")
    bench.failing.kill()
    bench.prometheus.until(f"({filled(expr)}) == bool 2")
