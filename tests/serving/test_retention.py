"""What is pinned stays, however full it gets, within a quota; what rules say goes, goes, and every decision is told."""

import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.attributes import Attributes
from cache.errors import ConfigError, NotFound, OverQuota
from cache.keys import Key, SeriesRef
from cache.store import StoreSettings
from serving import cli
from serving.retention import Held, Pin, Retention, RetentionRule, RetentionSettings, Verdict, beyond_quota, decide
from tests.cache.walk import KIB, MIB, Walk, walking
from tests.daemon import Bucket, Daemon

DAY = 86400.0
NOW = 20_000 * DAY
SIZE = 100 * KIB
SERIES = [SeriesRef(f"1.{study}", f"1.{study}.{series}") for study in range(1, 6) for series in (1, 2)]


def key(study: str = "1.2", series: str = "1.2.1", namespace: str = "serving") -> Key:
    return Key(namespace, "tensor", study, series, "v", "r")


def held(made: float = 0.0, used: float = 0.0, modality: str = "CT", **of: str) -> Held:
    """An entry that was made and last used so many days ago."""
    return Held(key(**of), NOW - made * DAY, NOW - used * DAY, modality)


def rule(name: str = "r", **changes: Any) -> RetentionRule:
    return RetentionRule(name, **changes)


# ------------------------------------------------------------------ the decisions


@pytest.mark.parametrize(
    ("entry", "rules", "keep", "why"),
    [
        (held(31), [rule(max_age_days=30)], False, "made 31.0 days ago"),
        (held(29), [rule(max_age_days=30)], True, "its time has not come"),
        (held(90, 15), [rule(max_idle_days=14)], False, "last used 15.0 days ago"),
        (held(90, 13), [rule(max_idle_days=14)], True, "its time has not come"),
        (held(90), [rule(max_age_days=30, modality=("MR",))], True, "no rule meets it"),
        (held(90), [rule("mr", modality=("MR",), keep=True), rule(max_age_days=30)], False, "made 90.0 days ago"),
        (held(90), [rule("ct", modality=("CT",), keep=True), rule(max_age_days=30)], True, "kept by its rule"),
        (held(90), [rule(namespace=("staging",), max_age_days=1)], True, "no rule meets it"),
        (held(90, namespace="staging"), [rule(namespace=("staging",), max_age_days=1)], False, "made 90.0 days ago"),
        (held(9999), [], True, "no rule meets it"),
    ],
)
def test_the_first_rule_that_is_met_decides(entry: Held, rules: Sequence[RetentionRule], keep: bool, why: str) -> None:
    """By age, last use, modality and namespace; what no rule meets stays."""
    verdict = decide(entry, [], rules, NOW)
    assert (verdict.keep, verdict.why) == (keep, why)


def test_what_is_pinned_is_not_for_ordinary_rules() -> None:
    """Only a rule that names a pin's tag may decide on what is pinned: a legal hold stays, a research pin may end."""
    rules = [rule("research", tag=("research",), max_age_days=365), rule("all", max_age_days=30)]
    legal, research = Pin("1.2", tag="legal-hold"), Pin("1.2", tag="research")
    assert decide(held(9999), [legal], rules, NOW) == Verdict(key(), True, "", "pinned")
    assert decide(held(300), [research], rules, NOW).keep
    assert decide(held(366), [research], rules, NOW) == Verdict(key(), False, "research", "made 366.0 days ago")
    both = [rule("hold", tag=("legal-hold",), keep=True), *rules]
    assert decide(held(366), [research, legal], both, NOW).rule == "hold"


def test_the_quota_goes_to_the_oldest_pins() -> None:
    """Pins protect entries in their own order, each entry once, up to the quota of its namespace."""
    entries = [(key("1.1", "1.1.1"), 60), (key("1.2", "1.2.1"), 60), (key("1.2", "1.2.2"), 40)]
    entries.append((key("1.3", "1.3.1", "staging"), 50))
    pins = [Pin("1.2", since=2), Pin("1.1", since=1), Pin("1.1", tag="again", since=3), Pin("1.3", since=0)]
    assert beyond_quota(pins, entries, {"serving": 100, "staging": 50}) == {key("1.2", "1.2.1")}
    assert beyond_quota([Pin("1.2", "1.2.2")], entries, {"serving": 40}) == set()
    assert beyond_quota([Pin("1.3")], entries, {"serving": 100}) == {key("1.3", "1.3.1", "staging")}


sizes = st.integers(0, 50)


@given(st.lists(st.tuples(st.sampled_from("1234"), st.integers(0, 9))), st.lists(sizes, max_size=8), sizes)
def test_pins_never_hold_more_than_their_quota(pins: list[tuple[str, int]], nbytes: list[int], quota: int) -> None:
    """Whatever is pinned in whatever order, what is protected fits."""
    entries = [(key(f"1.{number % 4 + 1}", f"1.9.{number}"), size) for number, size in enumerate(nbytes)]
    made = [Pin(f"1.{study}", since=float(since)) for study, since in pins]
    beyond = beyond_quota(made, entries, {"serving": quota})
    protected = [size for each, size in entries if any(pin.holds(each) for pin in made) and each not in beyond]
    assert sum(protected) <= quota


# ------------------------------------------------------------------ over a store


@asynccontextmanager
async def keeping(path: Path, nvme: int = 3 * MIB, **changes: Any) -> AsyncIterator[tuple[Walk, Retention]]:
    """A store whose NVMe has room for some ten series, with their packs, and its retention."""
    settings = StoreSettings(revalidate="events")
    async with walking(path, ram=MIB, nvme=nvme, settings=settings) as walk:
        for ref in SERIES:
            walk.archive.write(ref, [bytes(SIZE)])
        yield walk, opened(walk, path, **changes)


def opened(walk: Walk, path: Path, **changes: Any) -> Retention:
    return Retention(
        settings=RetentionSettings(**changes),
        path=path / "pins.json",
        store=walk.store,
        catalog=walk.catalog,
        budgets=lambda: {name: walk.nvme.usage(name).budget for name in ("serving", "staging")},
        clock=walk.clock,
        observer=walk.ears,
    )


async def fill(walk: Walk, refs: Sequence[SeriesRef]) -> None:
    for ref in refs:
        await walk.get(ref)
        await walk.settled()
        walk.clock.advance(1)


def on_nvme(walk: Walk) -> set[str]:
    return {each.key.study for each in walk.nvme.residents()}


async def test_a_pin_outlives_a_full_disk_and_a_restart(tmp_path: Path) -> None:
    """What is pinned is never evicted to make room, nor with its study, also after the daemon has been restarted."""
    async with keeping(tmp_path, quota=0.6) as (walk, retention):
        await fill(walk, SERIES[:2])
        await retention.pin(Pin("1.1", tag="legal-hold", reason="a court says so", since=walk.clock.now()))
        assert retention.pinned_bytes()["serving"] > 4 * SIZE
        again = opened(walk, tmp_path, quota=0.6)
        assert again.pins() == retention.pins()
        await fill(walk, SERIES[2:])
        assert "1.1" in on_nvme(walk)
        assert "1.2" not in on_nvme(walk)
        walk.store.evict("1.1")
        assert "1.1" in on_nvme(walk)
        await again.unpin("1.1", "", "legal-hold")
        walk.store.evict("1.1")
        assert "1.1" not in on_nvme(walk)
        with pytest.raises(NotFound):
            await again.unpin("1.1", "", "legal-hold")


async def test_what_comes_under_a_pin_later(tmp_path: Path) -> None:
    """A series that is made after its study was pinned is kept as well."""
    async with keeping(tmp_path) as (walk, retention):
        await retention.pin(Pin("1.1"))
        await fill(walk, SERIES[:1])
        await fill(walk, SERIES[2:])
        assert "1.1" in on_nvme(walk)


async def test_a_quota_bounds_pins(tmp_path: Path) -> None:
    """A pin that would hold too much is refused, and changes nothing; one that ended makes room for another."""
    async with keeping(tmp_path, quota=0.3) as (walk, retention):
        await fill(walk, SERIES[:4])
        await retention.pin(Pin("1.1", since=walk.clock.now(), expires=walk.clock.now() + 60))
        with pytest.raises(OverQuota):
            await retention.pin(Pin("1.2", since=walk.clock.now()))
        assert [pin.study for pin in retention.pins()] == ["1.1"]
        walk.clock.advance(61)
        assert retention.pins() == []
        await retention.sweep()
        await retention.pin(Pin("1.2", since=walk.clock.now()))
        assert [pin.study for pin in opened(walk, tmp_path).pins()] == ["1.2"]


async def test_a_sweep_drops_what_has_to_go(tmp_path: Path) -> None:
    """From both tiers, as the rules say; what a lease holds stays for now; what was used lately by RAM is not idle."""
    rules = (RetentionRule("mr", modality=("MR",), keep=True), RetentionRule("idle", max_idle_days=14))
    async with keeping(tmp_path, nvme=4 * MIB, rules=rules) as (walk, retention):
        walk.echo.attributes = Attributes(modality="MR")
        await fill(walk, SERIES[2:3])
        walk.echo.attributes = Attributes(modality="CT")
        await fill(walk, [SERIES[0], SERIES[4], SERIES[6]])
        await retention.pin(Pin("1.3"))
        walk.clock.advance(15 * DAY)
        await walk.get(SERIES[6])
        verdicts = await retention.sweep()
        assert {(verdict.key.study, verdict.why) for verdict in verdicts if not verdict.keep} == {
            ("1.1", "last used 15.0 days ago"),
            ("1.4", "last used 15.0 days ago"),  # its pack, which nobody used since
        }
        assert {verdict.key.study for verdict in verdicts if verdict.keep} == {"1.2", "1.3", "1.4"}
        assert {each.key.study for each in walk.store.residents()} == {"1.2", "1.3", "1.4"}
        assert walk.ears.counts["retention_drops/idle"] == 3


async def test_what_is_leased_stays_for_now(tmp_path: Path) -> None:
    """A sweep leaves alone what somebody reads; the next one takes it."""
    async with keeping(tmp_path, rules=(RetentionRule("old", max_age_days=1),)) as (walk, retention):
        await fill(walk, SERIES[:1])
        walk.clock.advance(2 * DAY)
        (tensor,) = (each.key for each in walk.ram.residents())
        pin = walk.ram.pin(tensor)
        assert pin is not None
        await retention.sweep()
        assert [each.key for each in walk.store.residents()] == [tensor]
        pin.release()
        await retention.sweep()
        assert walk.store.residents() == []


async def test_pins_that_cannot_be_read(tmp_path: Path) -> None:
    """A damaged file stops the daemon: without it, what has to be kept would go."""
    async with keeping(tmp_path) as (walk, _):
        (tmp_path / "pins.json").write_text('{"voxcache_pins": 1, "pins": [{}]}')
        with pytest.raises(ConfigError, match="pins"):
            opened(walk, tmp_path)


# ------------------------------------------------------------------ with a daemon


@pytest.mark.service
def test_pins_by_hand(tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    """Pinned, listed, kept through an eviction and a restart, told in the metrics, and let go."""
    ref = bucket.series(slices=4)
    table = {"origin": bucket.origin, "retention": {"rules": [{"name": "old", "max_age_days": 30}]}}

    def command(name: str, *arguments: str) -> str:
        assert cli.main([name, "--url", daemon.url, *arguments]) == 0
        return capsys.readouterr().out

    with Daemon(tmp_path, table) as daemon:
        assert daemon.tensor(ref).status == 200
        daemon.until_written(ref)
        told = command("pin", ref.study, "--tag", "research", "--reason", "cohort 7", "--for", "90d")
        assert told.startswith(f"{ref.study}/*  research  ")
        assert "cohort 7" in told
        assert daemon.metric("voxcache_pinned_bytes", namespace="serving") > 0
    with Daemon(tmp_path, table) as daemon:
        assert "cohort 7" in command("pins")
        command("evict", ref.study)
        assert daemon.tensor(ref).headers["Voxcache-Tier"] == "nvme"
        assert "cohort 7" not in command("unpin", ref.study, "--tag", "research")
        assert daemon.ask("DELETE", f"/v1/studies/{ref.study}/pin").status == 404
        assert daemon.ask("PUT", f"/v1/studies/{ref.study}/pin", {"ttl_s": 0}).status == 400
        assert "cohort" not in daemon.log()
    assert stat.S_ISREG((tmp_path / "state" / "pins.json").stat().st_mode)
