"""The demo's main job on a small study: every way gives one answer, and the report has all that is promised."""

import json
import subprocess
import sys

import pytest

from serving.demo.tritonserver import TritonServer
from tests.conftest import ROOT

pytestmark = pytest.mark.service


def test_all_ways_give_the_same_answer(triton: TritonServer) -> None:
    """The last line is JSON with five ways, their percentiles, the speed-up and the proof of one answer."""
    command = [sys.executable, "-m", "serving.cli", "demo", "--json", "--slices", "24"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    for way in ("direct", "miss", "ram_hit", "nvme_hit", "warmed_hit"):
        assert report[way].keys() == {"p50_ms", "p99_ms", "n"}
        assert 0 < report[way]["p50_ms"] <= report[way]["p99_ms"]
    assert report["same_answer"] is True
    assert [near["study"] for near in report["nearest"]] == ["2.25.1"]
    assert report["speedup_ram_vs_direct"] > 0
    assert {bar["name"] for bar in report["bars"]} == {"speedup_ram_vs_direct", "same_answer"}
