"""Dashboards and rules are those the code makes, ask for what the daemon has, and lead to what there is to do."""

import json
import math
import re
import subprocess
import typing
from collections.abc import Iterator
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # it publishes no types
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.generate import FOLDER, files
from dashboards.panels import scoped
from dashboards.rules import ALERTS, LABELS, RECORDED
from serving.metrics import METRICS
from serving.metrics.table import Metric
from tests.conftest import ROOT

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
RULES = FOLDER / "rules" / "voxcache.yml"
CASES = ROOT / "tests" / "rules" / "alerts.yml"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "grafana").glob("*.json"))}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """All of a dashboard's panels but rows and text, folded ones included."""
    every = [inner for panel in board["panels"] for inner in (panel, *panel.get("panels", ()))]
    return [panel for panel in every if panel["type"] not in ("row", "text")]


QUERIES = [
    pytest.param(target["expr"], target["legendFormat"], id=f"{name}: {panel['title']} {target['refId']}")
    for name, board in BOARDS.items()
    for panel in panels(board)
    for target in panel["targets"]
]
EXPRESSIONS = [
    *(str(query.values[0]) for query in QUERIES),
    *(rule.expr for rule in RECORDED),
    *(alert.expr for alert in ALERTS),
]


def test_what_is_committed_is_what_the_code_makes() -> None:
    """`make dashboards` puts it right, and leaves no file behind that nothing makes."""
    made = files()
    assert {path: path.read_text() for path in made} == made
    there = {*(FOLDER / "grafana").iterdir(), *(FOLDER / "rules").iterdir()}
    assert there == made.keys()


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_one_by_grafanas_schema(name: str) -> None:
    """Read into the types made from Grafana's schema, it has each value of its type, and none that they do not know."""
    register_default_plugins()
    board = Dashboard.from_json(BOARDS[name])
    assert json.loads(json.dumps(board, cls=JSONEncoder)) == BOARDS[name]
    assert list(misfits(board, Dashboard, name)) == []


def misfits(value: Any, kind: Any, place: str) -> Iterator[str]:
    """Where a value is not of its declared type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    fits = True
    if isinstance(value, dict) and hasattr(kind, "from_json"):  # the types leave some of their parts as they were
        value = kind.from_json(value)
    if origin is typing.Union:  # told is what is wrong with it as the kind that it comes nearest to
        found = [[*misfits(value, part, place)] for part in parts]
        yield from max(found, key=lambda wrong: wrong[0].partition(": ")[0].count(".")) if all(found) else ()
    elif origin is typing.Literal:
        fits = value in parts
    elif origin in (list, dict):
        fits = isinstance(value, origin)
        for each in (value.values() if origin is dict else value) if fits else ():
            yield from misfits(each, parts[-1], place)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        fits = value in [each.value for each in kind]
    else:
        fits = kind is Any or isinstance(value, (int, float) if kind is float else kind)
    if not fits:
        yield f"{place}: {value!r} is no {kind}"
    elif hasattr(value, "to_json") and origin is not typing.Union:
        for field, declared in typing.get_type_hints(type(value)).items():
            yield from misfits(getattr(value, field), declared, f"{place}.{field}")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda board: board["panels"][1].update(title=7), "title: 7"),
        (lambda board: board.update(graphTooltip=9), "graph_tooltip: 9"),
        (lambda board: board["panels"][1]["options"].update(colorMode="loud"), "color_mode: 'loud'"),
        (lambda board: board["templating"]["list"][1].update(multi="yes"), "multi: 'yes'"),
    ],
)
def test_a_value_that_grafana_would_not_take_is_noticed(change: Any, found: str) -> None:
    """The check of the schema can fail."""
    register_default_plugins()
    board = json.loads(json.dumps(BOARDS["latency"]))
    change(board)
    wrong = [*misfits(Dashboard.from_json(board), Dashboard, "")]
    assert len(wrong) == 1
    assert found in wrong[0]


@pytest.mark.parametrize(("query", "legend"), QUERIES)
def test_a_query_names_metrics_and_labels_there_are(query: str, legend: str) -> None:
    """No panel stays empty because of a name that changed."""
    named = set(re.findall(r"\bvoxcache[_:][\w:]+|\bALERTS\b|\bup\b", query))
    assert named
    assert named <= LABELS.keys()
    known = set.union(*(set(LABELS[name]) for name in named))
    grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
    assert grouped | set(re.findall(r"[{,](\w+)(?:=|!)", query)) <= known
    assert set(re.findall(r"{{(\w+)}}", legend)) <= grouped


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_where_its_table_says(metric: Metric) -> None:
    """The panel it names shows it, and the alerts it names are all that come of it: what is counted is looked at."""
    board, _, title = metric.panel.partition(": ")
    [shown] = [board_of for board_of in BOARDS.values() if board_of["title"] == f"voxcache / {board}"]
    [panel] = [panel for panel in panels(shown) if panel["title"] == title]
    assert any(named(target["expr"], metric) for target in panel["targets"])
    assert metric.alerts == tuple(alert.name for alert in ALERTS if named(alert.expr, metric))


def named(expr: str, metric: Metric) -> bool:
    """Whether the query asks for a metric, by itself or by what is recorded of it."""
    if re.search(rf"\b{metric.full_name}(_bucket|_sum|_count)?\b", expr):
        return True
    return any(named(rule.expr, metric) for rule in RECORDED if re.search(rf"{rule.name}\b", expr))


def test_every_recorded_series_is_used() -> None:
    """Nothing is worked out for nobody."""
    used = " ".join(EXPRESSIONS)
    assert [rule.name for rule in RECORDED if not re.search(rf"{rule.name}\b", used)] == []


def test_a_metric_that_there_is_not_cannot_be_asked_for() -> None:
    """The generator fails rather than make a panel that stays empty."""
    with pytest.raises(KeyError, match="voxcache_requets_total"):
        scoped("sum(rate(voxcache_requets_total[5m]))")


def test_a_query_is_limited_to_what_is_chosen() -> None:
    """Each metric in it by node, by namespace where it has one, and beside what it is limited by already."""
    assert scoped("voxcache_leases / 2") == 'voxcache_leases{instance=~"$node"} / 2'
    limited = 'rate(voxcache_tier_bytes{tier="ram",instance=~"$node",namespace=~"$namespace"}[5m])'
    assert scoped('rate(voxcache_tier_bytes{tier="ram"}[5m])') == limited


@pytest.mark.parametrize("name", BOARDS)
def test_a_panel_can_be_read(name: str) -> None:
    """Each says what it shows, in which unit, and overlaps no other; no two have one title."""
    shown = panels(BOARDS[name])
    titles = [panel["title"] for panel in shown]
    assert len({*titles}) == len(titles)
    for panel in shown:
        assert len(panel["description"]) > 5, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    spots = [(p["gridPos"], x, y) for p in BOARDS[name]["panels"] for x, y in squares(p["gridPos"])]
    assert len({(x, y) for _, x, y in spots}) == len(spots)
    assert max(x for _, x, _ in spots) < 24
    numbers = [panel["id"] for panel in shown]
    assert all(one < other for one, other in pairwise(numbers))


def squares(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    """The squares of the grid that a panel covers."""
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


@pytest.mark.parametrize("name", BOARDS)
@pytest.mark.parametrize(
    ("title", "value", "sentence"),
    [
        ("Do users wait?", 0.0, "No: all in time"),
        ("Do users wait?", 0.99, "No: all in time"),
        ("Do users wait?", 1.0, "A little"),
        ("Do users wait?", 7.0, "Yes: too slow"),
        ("Do users wait?", 100.0, "Yes: far too slow"),
        ("Do users wait?", None, "Nobody asks"),
        ("Do they get answers?", 0.0, "All do"),
        ("Do they get answers?", 1.0, "Many are refused"),
        ("Do they get answers?", 2.0, "A daemon is down"),
        ("Are new studies ready in time?", -0.1, "Yes"),  # clocks differ
        ("Are new studies ready in time?", 86400.0, "They wait for long"),
        ("Is the cache disk well?", 0.0, "Yes"),
        ("Is the cache disk well?", 2.0, "Failing: not used"),
        ("Is the cache disk well?", None, "No data"),
        ("Does the origin answer?", math.nan, "Nobody asked it"),
        ("Which alerts fire?", 3.0, "Several"),
    ],
)
def test_the_first_row_says_it_in_words(name: str, title: str, value: float | None, sentence: str) -> None:
    """Each dashboard begins with them, and each leads to the dashboard that says more."""
    [panel] = [panel for panel in BOARDS[name]["panels"][:7] if panel["title"] == title]
    assert read(panel["fieldConfig"]["defaults"]["mappings"], value) == sentence
    [link] = panel["links"]
    assert link["url"].partition("?")[0].removeprefix("/d/voxcache-") in BOARDS


def read(mappings: list[dict[str, Any]], value: float | None) -> str:
    """What Grafana shows for a value: getValueMappingResult in packages/grafana-data/src/utils/valueMappings.ts, where
    a bound of null is no bound but 0."""
    for mapping in mappings:
        options = mapping["options"]
        if mapping["type"] == "special" and (value is None or math.isnan(value)):
            return str(options["result"]["text"])
        if mapping["type"] == "range" and value is not None and (options["from"] or 0) <= value <= (options["to"] or 0):
            return str(options["result"]["text"])
    return ""


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_leads_to_what_there_is_to_do(alert: Any) -> None:
    """Its runbook is in docs/operations.md and on the dashboard that it names."""
    rules = {rule.get("alert"): rule for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]}
    page, _, anchor = rules[alert.name]["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    [row] = [panel for panel in BOARDS[alert.dashboard]["panels"] if panel.get("collapsed")]
    [text] = [panel["options"]["content"] for panel in row["panels"] if panel["title"] == alert.name]
    assert text in OPERATIONS
    assert text.startswith(f"*{alert.severity}.*")


def test_runbooks_name_panels_there_are() -> None:
    """Where a runbook says to look at a panel, its dashboard has it."""
    runbooks = re.sub(r"\s+", " ", OPERATIONS.partition("\n## Alerts\n")[2].partition("\n## ")[0])
    named = re.findall(r'\*([A-Z][\w-]+)\*, "([^"]+)"(?: and "([^"]+)")?', runbooks)
    assert len(named) > 5
    titles = {board["title"].removeprefix("voxcache / "): board for board in BOARDS.values()}
    for board, *wanted in named:
        known = [panel["title"] for panel in panels(titles[board])]
        assert set(filter(None, wanted)) <= {*known}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_has_a_case_that_fires_and_one_that_does_not(alert: Any) -> None:
    """tests/rules/alerts.yml is about every one of them."""
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert.name}
    assert fires == {True, False}


@pytest.mark.service
@pytest.mark.slow
@pytest.mark.parametrize("command", [("check", "rules", RULES), ("test", "rules", CASES)], ids=["check", "test"])
def test_rules_by_promtool(command: tuple[str | Path, ...]) -> None:
    """They are rules, and each alert fires when it should and not when it should not."""
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_files_for_a_host_fit_together() -> None:
    """What Prometheus is told to read is there, Grafana reads where README has its dashboards copied, and the job is
    called as the alert expects that looks for daemons which do not answer."""
    scrape = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert [(FOLDER / path).resolve() for path in scrape["rule_files"]] == [RULES]
    [job] = scrape["scrape_configs"]
    assert f'job="{job["job_name"]}"' in next(alert.expr for alert in ALERTS if alert.name == "VoxcacheDown")
    readme = (FOLDER / "README.md").read_text()
    [provider] = yaml.safe_load((FOLDER / "provisioning" / "dashboards" / "voxcache.yml").read_text())["providers"]
    assert f"cp dashboards/grafana/*.json {provider['options']['path']}/" in readme
    [source] = yaml.safe_load((FOLDER / "provisioning" / "datasources" / "voxcache.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
