"""The documentation's promises: its tables are the code's, its examples work, its links lead somewhere."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.dicom.phantom import write_series
from cache.entry import TensorSpec
from cache.errors import every_error
from cache.recipe.chain import parse_recipe
from serving import app, cli
from serving.config import Settings, from_table, merged
from serving.demo.tritonserver import TritonServer
from serving.metrics import METRICS
from serving.tables import TABLES, rewritten
from tests.conftest import ROOT
from tests.daemon import Daemon

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("client/*.md"), *ROOT.glob("dashboards/*.md")])
LEAST: dict[str, Any] = {
    "ram": {"budget": "16 MiB"},
    "nvme": {"path": "nvme", "budget": "64 MiB"},
    "origin": {"directory": {"path": "bucket"}},
}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """The fenced examples of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def rows(table: str) -> list[list[str]]:
    """The cells of a table's rows, its heading left out."""
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[2:]]


EXAMPLES = [(path, text) for path in PAGES for text in blocks(path, "toml")]
PYTHON = [(path, text) for path in PAGES for text in blocks(path, "python")]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=named)
def test_tables_are_those_of_the_code(page: Path) -> None:
    """A page whose table is out of date is noticed; `make docs` puts it right."""
    assert page.read_text() == rewritten(page.read_text())


def test_every_table_is_on_a_page_and_full() -> None:
    """No setting, metric, error or op goes undocumented, and none without a word on what it is for."""
    text = "".join(page.read_text() for page in DOCS.glob("*.md"))
    for name, make in TABLES.items():
        assert f"<!-- table: {name} -->" in text
        silent = [row for row in rows(make()) if not row[0].strip() or not row[-1].strip()]
        assert not silent, name


def test_defaults_are_written_as_a_settings_file_has_them() -> None:
    """What the table says is a default can be copied into the file, and changes nothing there."""
    table: dict[str, Any] = merged(LEAST, {})
    table["origin"] = {"s3": {"bucket": "b"}}
    plain = from_table(table)
    for name, default, _ in rows(TABLES["settings"]()):
        *sections, last = name.strip(" `").split(".")
        if default.strip().startswith("`") and not re.search(r"<|\[", name) and sections[:2] != ["origin", "directory"]:
            place = table
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = tomllib.loads(f"value = {default.strip(' `')}")["value"]
    assert table["server"]["port"] == 8600
    assert from_table(table) == plain


def test_every_metric_that_is_counted_is_in_the_table() -> None:
    """Counting something that is not there would raise in the middle of a fill."""
    counters = {metric.name: metric for metric in METRICS}
    counted = [
        found
        for path in (*ROOT.glob("cache/**/*.py"), *ROOT.glob("serving/**/*.py"))
        for found in re.findall(r"""(?:observer|metrics)\.count\(\s*"(\w+)"(?:, \((.*?)\))?""", path.read_text())
    ]
    assert len(counted) > 5
    for name, labels in counted:
        assert name in counters
        assert len(re.findall(r"[^, ][^,]*", labels)) == len(counters[name].labels), name


def test_every_kserve_call_is_shown_by_a_test() -> None:
    """docs/kserve.md names the tests of each call at either door, and they are there."""
    table = (DOCS / "kserve.md").read_text().split("| call | over HTTP | over gRPC |\n|---|---|---|\n")[1]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*/test_*.py"))
    calls = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert len(calls) >= 10
    for call, *doors in calls:
        shown = re.findall(r"`(test_\w+)`", "".join(doors))
        assert shown, call
        assert [name for name in shown if f"def {name}(" not in tests] == []


async def test_every_route_is_documented(tmp_path: Path) -> None:
    """docs/http.md names the routes of the running application, no fewer and no others."""
    table = LEAST | {
        "nvme": {"path": str(tmp_path / "nvme"), "budget": "64 MiB"},
        "origin": {"directory": {"path": str(tmp_path)}},
        "catalog": {"reserve": "4 MiB"},
        "state": {"path": str(tmp_path / "state")},
        "workers": {"count": 1},
        "triton": {"url": ""},
        "grpc": {"port": 0},
    }
    async with app.running(from_table(table)) as (application, _):
        served = {
            (route.method, route.resource.canonical.replace("/versions/{version}", ""))
            for route in application.router.routes()
            if route.resource is not None and route.method not in ("HEAD", "*")
        }
    assert set(re.findall(r"`([A-Z]+) (/[^`? ]*)`", (DOCS / "http.md").read_text())) == served


def test_every_command_is_documented() -> None:
    """docs/operations.md shows each command of `voxcache`, with the arguments it cannot do without."""
    [commands] = [action for action in cli._parser()._actions if isinstance(action.choices, dict)]
    assert commands.choices is not None
    shown = re.findall(r"`voxcache ([a-z-]+)(?: [^`]*)?`", (DOCS / "operations.md").read_text())
    assert set(shown) == set(commands.choices)


def test_every_error_has_an_entry_for_the_night() -> None:
    """Whoever is woken by a code finds a line on it."""
    night = (DOCS / "operations.md").read_text().split("## What to do at 3 a.m.")[1]
    told = {code for line in night.splitlines() if line.startswith("| `") for code in re.findall(r"`([a-z-]+)`", line)}
    assert {error.code for error in every_error()} <= told


@pytest.mark.parametrize(("page", "text"), EXAMPLES, ids=[named(path) for path, _ in EXAMPLES])
def test_examples_of_settings_are_right(page: Path, text: str) -> None:
    """Every piece of TOML in the documentation is accepted; what it leaves out is filled in."""
    table = merged(LEAST, {})
    told = tomllib.loads(text)
    assert told
    table |= told
    assert isinstance(from_table(table), Settings)


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[named(path) for path, _ in PYTHON])
def test_examples_in_python_can_be_read(page: Path, text: str) -> None:
    """None of them is cut off or misspelt so that Python would not take it."""
    assert compile(text, named(page), "exec")


def test_the_example_of_an_op_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op shown in docs/recipes.md can be named in a recipe, plans what it makes, and makes it."""
    [code] = blocks(DOCS / "recipes.md", "python")
    (tmp_path / "my_ops.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    table = {"version": 1, "ops": [{"op": "volume"}, {"op": "gamma", "exponent": 0.5}]}
    recipe = parse_recipe("gamma", table, ("my_ops:Gamma",))
    affine = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    spec = TensorSpec("float64", (2, 3, 4), "zyx", (1.0, 1.0, 1.0), affine)
    made = recipe.run(np.full(spec.shape, 0.25), spec)
    assert recipe.plan(spec).dtype == made.dtype == "float32"
    assert np.all(made == 0.5)


def test_the_shipped_settings_are_right(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """deploy/voxcache.toml passes the check that operators are told to run."""
    for name in [name for name in os.environ if name.startswith("VOXCACHE_")]:
        monkeypatch.delenv(name)
    assert cli.main(["check-config", "--config", str(ROOT / "deploy" / "voxcache.toml")]) == 0
    assert "right" in capsys.readouterr().out


def test_the_unit_lets_the_daemon_drain() -> None:
    """systemd waits longer than a drain takes, and does not start again what cannot start."""
    unit = (ROOT / "deploy" / "voxcache.service").read_text()
    patience = int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0])
    assert patience > from_table(LEAST).server.drain_s + 10
    assert "\nRestartPreventExitStatus=2\n" in unit


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be reached by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that is there, and a heading of it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _, fragment = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


def test_every_page_can_be_reached() -> None:
    """The README leads to all of them."""
    linked = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text()))
    assert {named(page) for page in DOCS.glob("*.md")} <= linked


@pytest.mark.service
def test_the_readme_works(tmp_path: Path, triton: TritonServer) -> None:
    """Its two examples in Python, run as they stand, get a study's embedding and a view of its memory."""
    settings = tomllib.loads(blocks(ROOT / "README.md", "toml")[0])
    study, series, _ = write_series(tmp_path / "bucket", slices=8, rows=64, columns=64)
    table = {
        "origin": {"directory": {"path": str(tmp_path / "bucket")}},
        "triton": {"url": triton.url},
        "recipes": settings["recipes"],
    }
    with Daemon(tmp_path, table) as daemon:
        through_triton, plain = (
            text.replace("http://127.0.0.1:8600", daemon.url).replace(
                "127.0.0.1:8600", daemon.url.removeprefix("http://")
            )
            for text in blocks(ROOT / "README.md", "python")
        )
        seen: dict[str, Any] = {"study": study, "series": series}
        exec(through_triton, seen)  # noqa: S102  # the README's own text
        assert np.linalg.norm(seen["embedding"]) == pytest.approx(1)
        exec(plain + "    assert tensor.local\nclient.close()\n", seen)  # noqa: S102
        assert seen["spacing"] == (2.5, 2.5, 2.5)
        assert daemon.metric("voxcache_requests_total", tier="ram", status="201") == 1
