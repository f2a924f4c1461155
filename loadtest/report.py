"""The page that a run leaves, which needs nothing but itself; and the summary that the README shows.

    python -m loadtest.report loadtest/results/DATE        writes report.html, summary.svg, and the README's part

A result is ``DATE/report.json`` (`loadtest.outcome`); whatever is shown comes from there.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Final

import msgspec

from . import svg
from .figures import Bar
from .measures import Track
from .outcome import ROOT, Machine, Phase, Profile, Report, Result, Table

BEGIN: Final = "<!-- bench -->"
END: Final = "<!-- end bench -->"
#: The table whose first lines are the README's, and the column that its plot shows.
SUMMARY: Final = "Time to a model-ready tensor"

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #111; --soft: #555; --line: #ddd; --ground: #fff;
  --bad: #b00020; --good: #00703c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eee; --soft: #aaa; --line: #333; --ground: #16181c; --bad: #ff7b8a; --good: #5fd99a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { margin-bottom: .2rem; }
table { border-collapse: collapse; margin: .6rem 0 1rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; }
td.text { text-align: left; white-space: normal; }
.says { color: var(--soft); }
.bad { color: var(--bad); font-weight: 600; }
.good { color: var(--good); }
figure { margin: .5rem 0 1.2rem; }
svg { max-width: 100%; height: auto; }
"""


def page(report: Report) -> str:
    """The report as one HTML document."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>voxcache under load, {escape(report.date)}</title><style>{_STYLE}</style></head><body>",
        "<h1>voxcache under load</h1>",
        f"<p>{escape(report.date)}, commit <code>{escape(report.commit) or 'none'}</code></p>",
        _machine(report.machine),
        "<h2>Bars</h2>",
        _bars(report.bars),
        *(f'<p class="bad">{escape(name)} gave no result: {escape(why)}</p>' for name, why in report.failures.items()),
    ]
    parts += _profiles(report.profiles)
    for result in report.results:
        parts += _result(result)
    return "\n".join([*parts, "</body></html>", ""])


def _machine(machine: Machine) -> str:
    told = {
        "Processor": f"{machine.cpu}, {machine.cores} cores",
        "Memory": f"{machine.memory_gib} GiB",
        "Disk": machine.disk,
        "Kernel": machine.kernel,
        "Python": machine.python,
        "Load average before": machine.load_before,
        "Versions": ", ".join(f"{name} {number}" for name, number in machine.versions.items()),
    }
    rows = "".join(
        f'<tr><td>{name}</td><td class="text">{escape(str(value))}</td></tr>' for name, value in told.items()
    )
    return f"<table>{rows}</table>"


def _bars(bars: Sequence[Bar]) -> str:
    rows = []
    for bar in bars:
        word, look = ("met", "good") if bar.ok else ("missed", "bad")
        rows.append(
            f"<tr><td>{escape(bar.name)}</td><td>{_number(bar.value)}</td><td>{_number(bar.bar)}</td>"
            f'<td class="{look}">{word}</td><td class="text">{escape(bar.says)}</td></tr>'
        )
    return f"<table><tr><th>bar</th><th>value</th><th>wanted</th><th></th><th></th></tr>{''.join(rows)}</table>"


def _profiles(profiles: Sequence[Profile]) -> Iterator[str]:
    if profiles:
        yield "<h2>Where the daemon's time goes</h2>"
        yield '<p class="says">Profiles of what missed a bar: the functions that most samples were in themselves.</p>'
    for profile in profiles:
        rows = [[function, f"{part:.1%}"] for function, part in profile.functions.items()]
        yield _table(Table(profile.name, ["function", "of all samples"], [list(row) for row in rows]))
        yield f'<p><a href="{escape(profile.graph)}">Its flame graph</a></p>'


def _result(result: Result) -> Iterator[str]:
    yield f"<h2>{escape(result.scenario)}{' (short form)' if result.short else ''}</h2>"
    yield f'<p class="says">{escape(result.says)}</p>'
    told = ", ".join(f"{name} {value}" for name, value in result.parameters.items())
    yield f'<p class="says">{escape(told)}; took {result.took_s:.0f} s</p>'
    if result.bars:
        yield _bars(result.bars)
    for name, why in result.missing.items():
        yield f'<p><span class="bad">{escape(name)}</span> did not take part: {escape(why)}</p>'
    for table in result.tables:
        yield _table(table)
    for phase in result.phases:
        yield from _phase(phase)
    if len(result.phases) > 1:
        yield _figure(_curves({f"{p.name}: {name}": track for p in result.phases for name, track in p.tracks.items()}))
    if result.notes:
        yield "<ul>" + "".join(f'<li class="says">{escape(note)}</li>' for note in result.notes) + "</ul>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in table.rows)
    return f'<h3>{escape(table.title)}</h3><p class="says">{escape(table.says)}</p><table><tr>{head}</tr>{rows}</table>'


def _phase(phase: Phase) -> Iterator[str]:
    yield f"<h3>{escape(phase.name)}</h3>"
    if phase.says:
        yield f'<p class="says">{escape(phase.says)}</p>'
    yield _table(tracks_table(phase.tracks))
    over_time = {}
    for name, track in phase.tracks.items():
        for figure in ("p50", "p99"):
            over_time[f"{name} {figure}"] = [(w.start, getattr(w, f"{figure}_ms")) for w in track.windows if w.n]
    yield _figure(svg.lines("Latency over time", over_time, x="s since the start", y="ms"))
    if len(phase.tracks) > 0:
        yield _figure(_curves(phase.tracks))
    ratios = {
        name: [(w.start, 100 * w.hits / w.n) for w in track.windows if w.n]
        for name, track in phase.tracks.items()
        if track.tiers
    }
    yield _figure(svg.lines("Answered from RAM or NVMe", ratios, x="s since the start", y="% of requests", log=False))
    yield _figure(
        svg.stacked(
            "Which tier answered",
            {name: {tier: float(n) for tier, n in sorted(track.tiers.items())} for name, track in phase.tracks.items()},
            unit="requests",
            relative=True,
        )
    )
    yield _figure(
        svg.stacked(
            "Stages of an answer, mean by request that had them",
            {
                name: {stage: told.mean_ms for stage, told in track.stages.items()}
                for name, track in phase.tracks.items()
            },
            unit="ms",
        )
    )


def tracks_table(tracks: dict[str, Track]) -> Table:
    columns = [
        "track",
        "requests",
        "a second",
        "MB/s",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "p99.9 ms",
        "max ms",
        "hits",
        "errors",
    ]
    rows: list[list[str | float | int | None]] = []
    for name, track in tracks.items():
        told = track.latency_ms
        rows.append(
            [
                name,
                track.n,
                track.rate,
                track.nbytes / 1e6 / track.seconds if track.seconds else 0.0,
                *(told.get(figure) for figure in ("p50", "p95", "p99", "p999", "max")),
                None if track.hit_ratio is None else f"{track.hit_ratio:.1%}",
                ", ".join(f"{count} × {error}" for error, count in track.errors.items()) or "none",
            ]
        )
    return Table("", columns, rows)


def _curves(tracks: dict[str, Track]) -> str:
    """Latency by percentile, the x axis by nines."""

    def nines(share: float) -> float:
        return -math.log10(1 - min(share, 99.999) / 100)

    return svg.lines(
        "Latency by percentile",
        {name: [(nines(share), ms) for share, ms in track.curve] for name, track in tracks.items()},
        x="percentile",
        y="ms",
        ticks=[(nines(share), f"{share:g}") for share in (0, 50, 90, 99, 99.9, 99.99, 99.999)],
    )


def _figure(picture: str) -> str:
    return f"<figure>{picture}</figure>" if picture else ""


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "–"
    return escape(value) if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


# ------------------------------------------------------------------ the README's part


def summary(report: Report, where: str) -> str:
    """Markdown: the peers' table, one plot, and what they were measured on. ``where``: the results, from the README."""
    table = next((t for result in report.results for t in result.tables if t.title == SUMMARY), None)
    lines = []
    if table is not None:
        lines += ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
        lines += [
            "| " + " | ".join("" if v is None else v if isinstance(v, str) else _number(v) for v in row) + " |"
            for row in table.rows
        ]
        lines += ["", f"![{SUMMARY}]({where}/summary.svg)"]
    missed = [bar.name for bar in report.bars if not bar.ok]
    verdict = f"{len(report.bars) - len(missed)} of {len(report.bars)} bars met" + (
        f"; missed: {', '.join(missed)}" if missed else ""
    )
    on = f"{report.machine.cores} cores ({report.machine.cpu}), {report.machine.memory_gib:g} GiB"
    lines += [
        "",
        f"{report.date}, commit `{report.commit}`, {on}; {verdict}. "
        f"The whole [report]({where}/report.html); `make bench` makes one on your machine: [load tests](docs/load.md).",
    ]
    return "\n".join(lines) + "\n"


def picture(report: Report) -> str:
    """The summary's plot: how long until a tensor can be given to a model, on a hit."""
    table = next((t for result in report.results for t in result.tables if t.title == SUMMARY), None)
    if table is None:
        return ""
    column = next(number for number, name in enumerate(table.columns) if "hit p50" in name)
    values = {str(row[0]): float(value) for row in table.rows if isinstance(value := row[column], int | float)}
    ordered = dict(sorted(values.items(), key=lambda item: item[1]))
    return svg.bars(f"{SUMMARY}, on a hit (each mark is a power of ten)", ordered, unit="ms", ours="voxcache") + "\n"


def put_into(text: str, part: str) -> str:
    """``text`` with ``part`` between the marks. Raises: ValueError: it has no marks."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"no {BEGIN} … {END}")
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{part}{END}", text, flags=re.DOTALL)


def write(report: Report, folder: Path) -> None:
    """report.json, report.html and summary.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_bytes(msgspec.json.encode(report) + b"\n")
    (folder / "report.html").write_text(page(report))
    if drawn := picture(report):
        (folder / "summary.svg").write_text(drawn)


def main() -> int:
    parser = argparse.ArgumentParser(prog="report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with a report.json")
    parser.add_argument("--no-readme", action="store_true", help="leave README.md as it is")
    options = parser.parse_args()
    report = msgspec.json.decode((options.folder / "report.json").read_bytes(), type=Report)
    write(report, options.folder)
    if not options.no_readme:
        readme = ROOT / "README.md"
        where = str(options.folder.resolve().relative_to(ROOT))
        readme.write_text(put_into(readme.read_text(), summary(report, where)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
