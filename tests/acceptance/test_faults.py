"""A daemon whose disk or origin fails on purpose: it says so, its answers stay right, and a sick disk is told of."""

import json
from pathlib import Path

import pytest

from tests.daemon import Bucket, Daemon

pytestmark = [pytest.mark.service, pytest.mark.slow]


def logged(daemon: Daemon, event: str) -> list[dict[str, object]]:
    lines = (daemon.folder / "voxcache.log").read_text().splitlines()
    return [line for line in map(json.loads, (text for text in lines if text[:1] == "{")) if line["event"] == event]


def test_a_disk_that_takes_two_seconds_a_read(tmp_path: Path, bucket: Bucket) -> None:
    """Requests are answered by the origin, with the bytes they had before; a hit in RAM is one; the metric and the log
    tell of a failing disk. A daemon whose disk is well again answers from it."""
    refs = [bucket.series(slices=6, seed=seed) for seed in range(6)]
    with Daemon(tmp_path, {"origin": bucket.origin}) as daemon:
        right = {ref: daemon.tensor(ref).body for ref in refs}
        for ref in refs:
            daemon.until_written(ref)
        assert daemon.metric("voxcache_nvme_state") == 0
    sick = {
        "origin": bucket.origin,
        "nvme": {"health": {"deadline_s": 0.2, "strikes": 2}},
        "faults": {"disk": {"delay_s": 2.0, "methods": ["read"]}},
    }
    with Daemon(tmp_path, sick) as daemon:
        for ref in refs:
            answer = daemon.tensor(ref)
            assert (answer.headers["Voxcache-Tier"], answer.body) == ("origin", right[ref])
            assert daemon.tensor(ref).headers["Voxcache-Tier"] == "ram"
        assert daemon.metric("voxcache_nvme_state", side="read") >= 2
        assert logged(daemon, "the disk fails on purpose")[0]["level"] == "warning"
        states = [line["state"] for line in logged(daemon, "disk") if line["side"] == "read"]
        assert states[:2] == ["slow", "failing"]
    with Daemon(tmp_path, {"origin": bucket.origin}) as daemon:
        for ref in refs:
            answer = daemon.tensor(ref)
            assert (answer.headers["Voxcache-Tier"], answer.body) == ("nvme", right[ref])


def test_an_origin_that_fails_on_purpose(tmp_path: Path, bucket: Bucket) -> None:
    """The log names the plan; requests fail as it says."""
    ref = bucket.series(slices=3)
    with Daemon(tmp_path, {"origin": bucket.origin, "faults": {"origin": {"down": 1.0}}}) as daemon:
        answer = daemon.tensor(ref)
        assert (answer.status, answer.code) == (503, "origin-down")
        assert logged(daemon, "the origin fails on purpose")[0]["plan"]["down"] == 1.0  # type: ignore[index] # a plan
