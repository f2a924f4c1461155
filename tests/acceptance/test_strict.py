"""Budgets, seen from outside: whatever is asked of tiers far too small for it, neither ever takes more than it may."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest

from cache.keys import SeriesRef
from tests.daemon import MIB, Bucket, Daemon

pytestmark = [pytest.mark.service, pytest.mark.slow]

RAM = 8 * MIB
NVME = 12 * MIB


def allocated(folder: Path) -> int:
    """Blocks of everything under ``folder``, itself included, in bytes: what ``du`` says."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:  # it went while we looked
            continue
    return total


class Watcher(threading.Thread):
    """Looks as often as it can, from a process that is not the daemon's."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__()
        self._daemon = daemon
        self._nvme = daemon.folder / "nvme"
        self._done = threading.Event()
        self.looks = 0
        self.most_nvme = 0
        self.most_ram = 0

    def run(self) -> None:
        before = 0
        while not self._done.is_set():
            # a look takes a while: it may meet a file under two names, or a victim and what came in its place, so
            # only what two looks in turn agree on was there at one time
            seen = allocated(self._nvme)
            if seen == before:
                self.most_nvme = max(self.most_nvme, seen)
            before = seen
            self.most_ram = max(self.most_ram, sum(allocated(path) for path in self._daemon.arenas()))
            self.looks += 1

    def stop(self) -> None:
        self._done.set()
        self.join()


def test_two_thousand_operations_stay_within_the_budgets(tmp_path: Path, bucket: Bucket) -> None:
    """GETs, ranges, leases kept and given back, evictions and warm-ups at random, on studies several times the size of
    the tiers: neither budget is ever exceeded, and no byte that is sent or leased is ever another."""
    chance = random.Random(20)
    refs = [
        bucket.series(slices=chance.randint(3, 24), rows=side, columns=side, seed=seed)
        for seed, side in enumerate([64] * 20 + [128] * 20 + [192] * 12)
    ]
    shares = {"serving": 0.75, "staging": 0.25}
    table = {
        "origin": bucket.origin,
        "ram": {"budget": RAM, "namespaces": shares},
        "nvme": {"budget": NVME, "namespaces": shares},
        "catalog": {"reserve": MIB},
        "store": {"revalidate": "events"},
    }
    daemon = Daemon(tmp_path, table)
    (tmp_path / "nvme").mkdir()
    watcher = Watcher(daemon)
    statuses: dict[int, int] = {}
    caller = Caller(daemon, refs, chance)
    watcher.start()
    try:
        with daemon:
            for _ in range(2000):
                status = caller.operate()
                statuses[status] = statuses.get(status, 0) + 1
            used = {tier: daemon.metric("voxcache_tier_bytes", tier=tier) for tier in ("ram", "nvme")}
    finally:
        watcher.stop()
    print(f"{watcher.looks} looks; most: RAM {watcher.most_ram}, NVMe {watcher.most_nvme}; answers: {statuses}")
    assert watcher.looks > 100
    assert RAM / 2 < used["ram"] <= RAM
    assert 0 < watcher.most_ram <= RAM
    assert NVME / 2 < watcher.most_nvme <= NVME
    assert set(statuses) <= {200, 201, 202, 204, 206, 503, 507}
    assert statuses[200] > 500


class Caller:
    """Asks a daemon for things at random, and checks every byte it is given."""

    def __init__(self, daemon: Daemon, refs: list[SeriesRef], chance: random.Random) -> None:
        self._daemon = daemon
        self._refs = refs
        self._chance = chance
        self._leases: list[tuple[SeriesRef, dict[str, Any]]] = []
        self._right: dict[SeriesRef, bytes] = {}

    def operate(self) -> int:
        """One operation; the status of its answer."""
        ref = self._chance.choice(self._refs)
        space = self._chance.choice(["serving", "serving", "staging"])
        path = f"/v1/studies/{ref.study}/series/{ref.series}/tensors/volume?namespace={space}"
        what = self._chance.random()
        if what < 0.55:
            answer = self._daemon.ask("GET", path)
            if answer.status == 200:
                assert answer.body == self._right.setdefault(ref, answer.body)
            return answer.status
        if what < 0.65:
            answer = self._daemon.ask("GET", path, headers={"Range": "bytes=100-5000"})
            assert answer.status != 206 or ref not in self._right or answer.body == self._right[ref][100:5001]
            return answer.status
        if what < 0.80:
            wanted = {"study": ref.study, "series": ref.series, "recipe": "volume", "namespace": space, "ttl_s": 60}
            answer = self._daemon.ask("POST", "/v1/leases", wanted)
            if answer.status == 201:
                self._leases.append((ref, answer.json))
            return answer.status
        if what < 0.92 and self._leases:
            return self._give_back(*self._leases.pop(0))
        if what < 0.96:
            return self._daemon.ask("DELETE", f"/v1/studies/{ref.study}").status
        return self._daemon.ask("POST", "/v1/warm", {"tensors": [f"{ref.study}/{ref.series}/volume"]}).status

    def _give_back(self, ref: SeriesRef, lease: dict[str, Any]) -> int:
        with Path("/dev/shm", lease["shm"]).open("rb") as arena:
            arena.seek(lease["offset"])
            leased = arena.read(lease["nbytes"])
        assert leased == self._right.setdefault(ref, leased)
        return self._daemon.ask("DELETE", f"/v1/leases/{lease['lease']}").status


def test_what_is_too_large_is_bypassed_and_pinned_means_503(tmp_path: Path, bucket: Bucket) -> None:
    """A tensor larger than the RAM tier is served from NVMe with the right bytes, again after it is evicted, and
    cannot be leased; with RAM leased out, another tensor is 503 with Retry-After, and served once that is over."""
    large, small, other = (bucket.series(slices=n, rows=256, columns=256, seed=n) for n in (64, 20, 21))
    table = {"origin": bucket.origin, "ram": {"budget": 4 * MIB, "namespaces": {"serving": 1.0}}}
    with Daemon(tmp_path, table | {"nvme": {"budget": 128 * MIB}}) as daemon:
        made, found = daemon.tensor(large), daemon.tensor(large)
        assert (made.status, made.headers["Voxcache-Tier"]) == (200, "bypass")
        assert found.headers["Voxcache-Tier"] == "bypass"
        assert len(made.body) == 64 * 256 * 256 * 2
        assert made.body == found.body
        assert daemon.tensor(large, Range="bytes=5000000-6000000").body == made.body[5000000:6000001]
        wanted = {"study": large.study, "series": large.series, "recipe": "volume"}
        refused = daemon.ask("POST", "/v1/leases", wanted)
        assert (refused.status, refused.code) == (507, "too-large")

        held = daemon.ask("POST", "/v1/leases", wanted | {"study": small.study, "series": small.series}).json["lease"]
        pinned = daemon.tensor(other)
        assert (pinned.status, pinned.code) == (503, "all-pinned")
        assert int(pinned.headers["Retry-After"]) >= 1
        assert daemon.ask("DELETE", f"/v1/leases/{held}").status == 204
        assert daemon.tensor(other).status == 200
