"""``python -m dashboards.generate [--runbooks URL]``: writes the dashboards and rules that are committed beside it.

Grafana and Prometheus read them as they are: ``grafana/`` is a folder of dashboards, ``rules/`` one of rule files.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from . import cache, latency, node, value, warmup
from .panels import Panel, built, prose
from .rules import ALERTS, RUNBOOKS, rule_groups
from .summary import SUMMARY

FOLDER: Final = Path(__file__).resolve().parent
OPERATIONS: Final = FOLDER.parent / "docs" / "operations.md"
_HEAD: Final = "# Written by `make dashboards` from dashboards/rules.py.\n"
ROOMS: Final = (latency, cache, warmup, node, value)


def runbook(alert: str) -> str:
    """What docs/operations.md says of an alert, as Markdown. Raises: KeyError when it says nothing."""
    found = re.search(rf"^### {alert}\n+(.*?)(?=^##|\Z)", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    if found is None:
        raise KeyError(alert)
    return found[1].strip()


def files(runbooks: str = RUNBOOKS) -> dict[Path, str]:
    """Every generated file, by its path."""
    result = {FOLDER / "rules" / "voxcache.yml": _HEAD + _yaml(rule_groups(runbooks))}
    for room in ROOMS:
        name = room.__name__.rpartition(".")[2]
        folded: list[Panel] = [
            prose(alert.name, runbook(alert.name), width=12) for alert in ALERTS if alert.dashboard == name
        ]
        rows = [("In a sentence", SUMMARY), *room.ROWS]
        dashboard = built(f"voxcache-{name}", room.TITLE, room.SAYS, rows, folded)
        result[FOLDER / "grafana" / f"{name}.json"] = json.dumps(dashboard, cls=JSONEncoder, indent=2) + "\n"
    return result


def _yaml(value: Any, indent: str = "") -> str:
    """Lists, tables and text as YAML."""
    if isinstance(value, list):
        return "".join(f"{indent}- {_yaml(each, indent + '  ').lstrip()}" for each in value)
    lines = ""
    for name, held in value.items():
        if isinstance(held, str):
            quoted = held.replace("'", "''")
            lines += f"{indent}{name}: '{quoted}'\n"
        else:
            lines += f"{indent}{name}:\n{_yaml(held, indent + '  ')}"
    return lines


def main() -> None:
    """Write what differs, and name it."""
    parser = argparse.ArgumentParser(description="write dashboards and rules anew")
    parser.add_argument(
        "--runbooks", default=RUNBOOKS, help="where docs/operations.md can be read (default: %(default)s)"
    )
    for path, content in files(parser.parse_args().runbooks).items():
        if not path.exists() or path.read_text() != content:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
            print(f"wrote {path.relative_to(FOLDER)}")


if __name__ == "__main__":
    main()
