"""The report: one page that needs nothing but itself, and a summary of the same figures in the README."""

import re
from xml.etree import ElementTree as ET

import msgspec
import pytest

from loadtest import svg
from loadtest.figures import at_least, at_most
from loadtest.measures import Answer, Recorder, Track, together
from loadtest.outcome import Machine, Phase, Profile, Report, Result, Table
from loadtest.report import BEGIN, END, SUMMARY, page, picture, put_into, summary

MACHINE = Machine("A processor <fast>", 2, 8.0, "6.1", "3.11", "ext4", {"nginx": "1.22"}, 0.1)


def track() -> Track:
    recorder = Recorder(3.0)
    for number in range(300):
        tier = "ram" if number % 10 else "origin"
        recorder.note("reads", number / 100, number / 100, number / 100 + 0.002, Answer(512, tier, {"fetch": 1.0}))
    recorder.note("reads", 1.0, 1.0, 1.0, Answer(error="503"))
    recorder.note("reads", 5.0, 5.0, 5.0, Answer(error="503"))  # nothing else is due in this second
    return together([recorder.snapshot()], 3.0)["reads"]


@pytest.fixture
def report() -> Report:
    rows: list[list[str | float | int | None]] = [["voxcache, lease", 0.1, None], ["Redis & client", 440.0, 3]]
    result = Result(
        scenario="peers",
        says="Everybody on the same bytes.",
        short=True,
        parameters={"MiB": 128},
        phases=[Phase("warm", {"reads": track()}), Phase("cold", {"reads": track()})],
        tables=[Table(SUMMARY, ["who", "hit p50 ms", "n"], rows)],
        bars=[at_least("faster", 120.04, 100), at_most("misses", 1.5, 1.3, "the gateway takes the cores")],
        missing={"Orthanc": "no such program"},
    )
    profile = Profile("miss", "profile-miss.svg", {"<module> (cache/a.py:1)": 0.25})
    return Report("2026-11-27", "abc123", MACHINE, [result], {"restart": "RuntimeError: no answer"}, [profile])


def test_the_page_needs_nothing_but_itself(report: Report) -> None:
    """It can be mailed, and opened without a network: no address of anything it would load."""
    made = page(report)
    assert not re.search(r"<(script|link|img)|url\(|@import", made)
    assert set(re.findall(r"https?://[^\"'< ]+", made)) <= {"http://www.w3.org/2000/svg"}


def test_every_plot_is_well_formed_and_says_what_it_shows(report: Report) -> None:
    plots = re.findall(r"<svg.*?</svg>", page(report), re.DOTALL)
    titles = {ET.fromstring(plot).get("aria-label") for plot in plots}  # noqa: S314 - our own
    assert titles >= {
        "Latency over time",
        "Latency by percentile",
        "Answered from RAM or NVMe",
        "Which tier answered",
        "Stages of an answer, mean by request that had them",
    }


def test_what_went_wrong_is_told_by_name(report: Report) -> None:
    """A missed bar with its reason, a peer that could not start, a scenario that broke, requests that failed."""
    made = page(report)
    for text in ("missed", "the gateway takes the cores", "Orthanc", "no such program", "RuntimeError", "2 × 503"):
        assert text in made
    assert "&lt;module&gt; (cache/a.py:1)" in made and "25.0%" in made and 'href="profile-miss.svg"' in made
    assert "A processor &lt;fast&gt;" in made and "Redis &amp; client" in made


def test_the_readme_changes_between_its_marks_only(report: Report) -> None:
    part = summary(report, "loadtest/results/2026-11-27")
    before = f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe rest\n"
    after = put_into(before, part)
    assert after == f"# Title\n\n{BEGIN}\n{part}{END}\n\nThe rest\n"
    assert put_into(after, part) == after
    assert "| Redis & client | 440 | 3 |" in part and "1 of 2 bars met; missed: misses" in part
    assert "`abc123`" in part and "2026-11-27" in part and "2 cores" in part
    with pytest.raises(ValueError, match="bench"):
        put_into("# Title\n", part)


def test_the_summary_plot_sets_ours_apart(report: Report) -> None:
    drawn = picture(report)
    assert drawn.index("voxcache, lease") < drawn.index("Redis &amp; client")
    ET.fromstring(drawn)  # noqa: S314 - our own


def test_a_report_is_read_back_as_it_was_written(report: Report) -> None:
    """The page can be made anew from the JSON beside it."""
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


@pytest.mark.parametrize(
    "plot",
    [
        svg.lines("t", {"a": []}, x="x", y="y"),
        svg.lines("t", {"a": [(0.0, 0.0)]}, x="x", y="y"),
        svg.stacked("t", {"a": {}}, unit="ms"),
        svg.bars("t", {"a": 0.0}, unit="ms"),
    ],
)
def test_nothing_to_show_is_no_plot(plot: str) -> None:
    assert plot == ""


@pytest.mark.parametrize("log", [True, False])
def test_one_point_is_a_plot(log: bool) -> None:
    """A run that was over within a second has one window."""
    ET.fromstring(svg.lines("t", {"a": [(0.0, 3.0)]}, x="x", y="y", log=log))  # noqa: S314 - our own
