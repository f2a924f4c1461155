"""Arrivals under kills: what was accepted is carried out, once in effect, whoever dies meanwhile.

``python -m tests.acceptance.arrivals`` does it with 10 000 events, once for each kind of queue, and with 500 arrivals
that two nodes share; it prints one line of JSON last. The tests do less of the same.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec

from cache.keys import SeriesRef
from tests.conftest import ROOT
from tests.daemon import MIB, Bucket, Daemon
from tests.services import RedisServer, S3Proxy, before, free_port, redis_server, s3_gateway

_RESULTS: Final = ROOT / "loadtest" / "results" / "arrivals.json"
_SENDERS: Final = 8
_RECORDS: Final = 20
_PARALLEL: Final = 4
#: Entries that are not on NVMe yet when a daemon is killed: those in its hands, and those that wait to be written.
_IN_FLIGHT: Final = 2 * _PARALLEL + 8
#: Seconds after which what should happen will not.
_PATIENCE_S: Final = 900.0


def record(key: str, sequencer: int, bucket: str = "b") -> dict[str, object]:
    """One record of a notification as Ceph's gateway writes it."""
    return {
        "eventSource": "ceph:s3",
        "eventName": "ObjectCreated:Put",
        "eventTime": "2026-01-01T00:00:00Z",
        "s3": {"bucket": {"name": bucket}, "object": {"key": key, "size": 1, "eTag": key, "sequencer": str(sequencer)}},
    }


class Outcome(msgspec.Struct, frozen=True):
    """What became of the events: counts, and what was not as it should be."""

    counts: dict[str, float]
    wrong: list[str]


class _Sender:
    """Posts notifications from several threads; each is sent until it is accepted."""

    def __init__(self, send: Callable[[dict[str, object]], int]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._posts: Any = iter(())
        self.accepted = 0
        self.refused = Counter[str]()

    def post(self, posts: Sequence[dict[str, object]], meanwhile: Callable[[], None]) -> None:
        """Have all of them accepted; ``meanwhile`` runs in this thread."""
        self._posts = iter(posts)
        with ThreadPoolExecutor(_SENDERS) as threads:
            sending = [threads.submit(self._work) for _ in range(_SENDERS)]
            meanwhile()
            for each in sending:
                each.result()

    def _work(self) -> None:
        while True:
            with self._lock:
                post = next(self._posts, None)
            if post is None:
                return
            while (answer := self._once(post)) != "202":
                with self._lock:
                    self.refused[answer] += 1
                time.sleep(0.02)  # as a publisher does that was refused
            with self._lock:
                self.accepted += 1

    def _once(self, post: dict[str, object]) -> str:
        try:
            return str(self._send(post))
        except (OSError, ValueError) as error:  # it is being killed, or starts again
            return type(error).__name__


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it does not come to an end"
        time.sleep(0.05)  # another process, which tells this only when asked


def _posts(keys: Sequence[str], count: int, first: int, order: random.Random) -> list[dict[str, object]]:
    """``count`` events about these objects, each another one, shuffled, some to a post."""
    rounds = ((key, number) for number in itertools.count(first) for key in keys)
    records = [record(key, number) for key, number in itertools.islice(rounds, count)]
    order.shuffle(records)
    return [{"Records": records[at : at + _RECORDS]} for at in range(0, count, _RECORDS)]


def killed(
    folder: Path, *, events: int, series: int, kills: int, redis: RedisServer | None, redis_kills: int = 0
) -> Outcome:
    """Post ``events`` about ``series`` at full speed while the daemon, and Redis, are killed and started again.

    Each series is of four slices, of which the last comes when half of the events were posted.
    """
    bucket = Bucket(folder / "bucket")
    refs = [bucket.series(slices=4, rows=16, columns=16, seed=number) for number in range(series)]
    files = {ref: bucket.files(ref) for ref in refs}
    late = {ref: paths[-1].read_bytes() for ref, paths in files.items()}
    for paths in files.values():
        paths[-1].unlink()
    keys = [[path.relative_to(bucket.path).as_posix() for path in paths] for paths in files.values()]
    order = random.Random(events)
    half = events // 2
    early_posts = _posts([key for of in keys for key in of[:-1]], half, 0, order)
    # the late ones first, so that each is told of at least once
    late_posts = _posts([of[at] for at in (-1, 0, 1, 2) for of in keys], events - half, 1_000_000, order)

    table: dict[str, Any] = {
        "server": {"port": free_port()},
        "origin": bucket.origin,
        "ram": {"budget": 64 * MIB},
        "nvme": {"budget": 1024 * MIB},
        "store": {"revalidate": "events", "write_behind": 1000},  # what stays in RAM only does not outlive a kill
        "arrivals": {"warm": ["volume"], "quiet_s": 0.2, "parallel": _PARALLEL},
        "warm": {"parallel": _PARALLEL},
    }
    if redis is not None:
        table["redis"] = {"url": redis.url, "timeout_s": 2.0}
    daemon = Daemon(folder, table)
    decodes = Counter[str]()

    def die() -> None:
        decodes["seen"] += int(daemon.metric("voxcache_stage_seconds_count", stage="decode"))
        daemon.kill()
        daemon.start()

    sender = _Sender(lambda post: daemon.ask("POST", "/v1/arrivals/s3", post).status)
    whole = len(early_posts) + len(late_posts)
    plan = [(whole * (number + 1) // (kills + 1), die) for number in range(kills)]
    if redis is not None:
        plan += [
            (whole * (2 * number + 1) // (2 * redis_kills), lambda: _restart(redis)) for number in range(redis_kills)
        ]
    plan.sort(key=lambda step: step[0])

    def act(upto: int) -> Callable[[], None]:
        def meanwhile() -> None:
            while plan and plan[0][0] <= upto:
                at, step = plan.pop(0)
                _until(lambda at=at: sender.accepted >= at)  # type: ignore[misc]  # mypy infers no type for a default
                step()

        return meanwhile

    start = time.monotonic()
    daemon.start()
    try:
        sender.post(early_posts, act(len(early_posts)))
        for ref, data in late.items():
            files[ref][-1].write_bytes(data)
        sender.post(late_posts, act(whole))
        posted_s = time.monotonic() - start
        _until(lambda: _over(daemon) >= events)
        carried_s = time.monotonic() - start
        decodes["seen"] += int(daemon.metric("voxcache_stage_seconds_count", stage="decode"))
        done, dead = (int(daemon.metric("voxcache_arrivals", state=state)) for state in ("done", "dead"))
        _until(lambda: all(_alone(daemon, ref) for ref in refs))
        wrong = [problem for ref in refs for problem in _problems(daemon, ref, 4)]
    finally:
        daemon.stop()
    return Outcome(
        {
            "events": events,
            "series": series,
            "daemon_kills": kills,
            "redis_kills": redis_kills,
            "done": done,
            "dead": dead,
            "decodes": decodes["seen"],
            "decodes_allowed": 2 * series + kills * _IN_FLIGHT,
            "refused": sum(sender.refused.values()),
            "posted_s": round(posted_s, 1),
            "carried_out_s": round(carried_s, 1),
        },
        wrong,
    )


def _restart(redis: RedisServer) -> None:
    redis.kill()
    redis.start()


def _over(daemon: Daemon) -> int:
    return int(sum(daemon.metric("voxcache_arrivals", state=state) for state in ("done", "dead")))


def _alone(daemon: Daemon, ref: SeriesRef) -> bool:
    """Whether versions of the series that are not the last have gone."""
    lineage = daemon.ask("GET", f"/v1/studies/{ref.study}/lineage").json["entries"]
    return len({told["entry"]["key"]["source_version"] for told in lineage}) == 1


def _problems(daemon: Daemon, ref: SeriesRef, slices: int) -> list[str]:
    told = daemon.ask("GET", f"/v1/studies/{ref.study}").json
    problems = [] if told["ready"] else [f"{ref.study} is not ready: {told['missing']}"]
    made = {
        entry["entry"]["lineage"]["objects"]
        for entry in daemon.ask("GET", f"/v1/studies/{ref.study}/lineage").json["entries"]
    }
    return problems + ([] if made == {slices} else [f"{ref.study} was made of {made} slices"])


def shared(folder: Path, *, arrivals: int, redis: RedisServer, proxy: S3Proxy) -> Outcome:
    """Have two nodes on one Redis warm ``arrivals`` series from a bucket; one is killed when half of them are done."""
    bucket = Bucket(folder / "bucket")
    refs = [bucket.series(slices=2, rows=16, columns=16, seed=number) for number in range(arrivals)]
    files = {path.relative_to(bucket.path).as_posix(): path.read_bytes() for ref in refs for path in bucket.files(ref)}
    name = asyncio.run(proxy.service.bucket(files))
    proxy.counts.clear()
    origin = {
        "bucket": name,
        "endpoint_url": proxy.service.endpoint,
        "access_key": proxy.service.access_key,
        "secret_key": proxy.service.secret_key,
    }
    table = {
        "origin": {"s3": origin},
        "find": {"manifest": ""},
        "store": {"revalidate": "events"},
        "arrivals": {"warm": ["volume"], "quiet_s": 0.2, "parallel": _PARALLEL},
        "warm": {"parallel": _PARALLEL},
        "redis": {"url": redis.url, "prefix": name, "dead_s": 10.0},
    }
    nodes = []
    for which in ("one", "other"):
        (folder / which).mkdir()
        nodes.append(Daemon(folder / which, table))
    one, other = nodes
    turn = itertools.cycle(nodes)

    def send(post: dict[str, object]) -> int:
        return next(turn).ask("POST", "/v1/arrivals/s3", post).status

    posts: list[dict[str, object]] = [
        {"Records": [record(path.relative_to(bucket.path).as_posix(), 1, name) for path in bucket.files(ref)]}
        for ref in refs
    ]
    start = time.monotonic()
    with one, other:
        _Sender(send).post(posts, lambda: None)
        _until(lambda: other.metric("voxcache_arrivals", state="done") >= len(files) / 2)
        by_one = int(one.metric("voxcache_stage_seconds_count", stage="decode"))
        done_before = int(other.metric("voxcache_arrivals", state="done")) // 2
        one.kill()
        begun = len(_fetches(proxy))
        _until(lambda: _over(other) >= len(files))
        carried_s = time.monotonic() - start
        done, dead = (int(other.metric("voxcache_arrivals", state=state)) for state in ("done", "dead"))
        by_other = int(other.metric("voxcache_stage_seconds_count", stage="decode"))
    fetched = _fetches(proxy)
    again = [study for study, count in fetched.items() if count > 1]
    wrong = [f"{ref.study} was never fetched" for ref in refs if ref.study not in fetched]
    wrong += [f"{study} was fetched {fetched[study]} times" for study in again if fetched[study] > 2]
    return Outcome(
        {
            "arrivals": arrivals,
            "events": len(files),
            "done": done,
            "dead": dead,
            "fills_by_the_one_killed": by_one,
            "fills_by_the_other": by_other,
            "series_fetched_twice": len(again),
            "series_in_hand": begun - done_before,
            "carried_out_s": round(carried_s, 1),
        },
        wrong,
    )


def _fetches(proxy: S3Proxy) -> Counter[str]:
    """How often each study was fetched."""
    fetched = Counter[str]()
    for (method, path), count in list(proxy.counts.items()):
        if method == "GET" and path.endswith(".dcm"):
            study = path.split("/")[-3]
            fetched[study] = max(fetched[study], count)
    return fetched


def bars(outcomes: dict[str, Outcome]) -> list[dict[str, object]]:
    """What must hold of each run, and whether it does."""
    found: list[dict[str, object]] = []

    def bar(name: str, value: float, most: float) -> None:
        found.append({"name": name, "value": value, "bar": most, "ok": value <= most})

    for run, outcome in outcomes.items():
        counts = outcome.counts
        bar(f"{run}_events_not_carried_out", counts["events"] - counts["done"], 0)
        bar(f"{run}_dead_letters", counts["dead"], 0)
        bar(f"{run}_series_that_are_wrong", len(outcome.wrong), 0)
        if run == "shared":
            bar("shared_series_fetched_twice", counts["series_fetched_twice"], counts["series_in_hand"])
        else:
            bar(f"{run}_decodes", counts["decodes"], counts["decodes_allowed"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="arrivals", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000, help="posted while the daemon is killed")
    parser.add_argument("--series", type=int, default=500, help="that they are about")
    parser.add_argument("--kills", type=int, default=5, help="of the daemon")
    parser.add_argument("--redis-kills", type=int, default=2)
    parser.add_argument("--arrivals", type=int, default=500, help="series that two nodes share")
    options = parser.parse_args()
    story = {"events": options.events, "series": options.series, "kills": options.kills}
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="voxcache-arrivals-") as name:
        folder = Path(name)
        for run in ("sqlite", "redis", "shared", "ceph"):
            (folder / run).mkdir()
        outcomes["sqlite"] = killed(folder / "sqlite", redis=None, **story)
        _say("sqlite", outcomes["sqlite"])
        with redis_server(folder / "redis" / "server") as redis:
            outcomes["redis"] = killed(folder / "redis", redis=redis, redis_kills=options.redis_kills, **story)
            _say("redis", outcomes["redis"])
            with s3_gateway(folder / "ceph") as s3, before(s3) as proxy:
                outcomes["shared"] = shared(folder / "shared", arrivals=options.arrivals, redis=redis, proxy=proxy)
                _say("shared", outcomes["shared"])
    held = bars(outcomes)
    result = {
        "benchmark": "arrivals",
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()},
        **{run: outcome.counts for run, outcome in outcomes.items()},
        "bars": held,
    }
    _RESULTS.write_text(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)
    return 0 if all(bar["ok"] for bar in held) else 1


def _say(run: str, outcome: Outcome) -> None:
    print(f"{run}: {outcome.counts}", *outcome.wrong[:20], sep="\n  ", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
