"""The status page of real daemons, at work and in trouble, in a real browser."""

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, expect

from tests.browser import Visit, visit
from tests.daemon import MIB, Bucket, Daemon, asking
from tests.services import free_port

pytestmark = [pytest.mark.service, pytest.mark.asyncio(loop_scope="module")]

#: What the page shows for machines: each number by its section, its row's key and its slot, and as of when.
_SHOWN = """() => {
    const shown = {};
    for (const data of document.querySelectorAll("main data[value]")) {
        const row = data.closest("[data-key]").dataset.key;
        const section = data.closest("section").id;
        shown[`${section}/${row}/${data.dataset.slot}`] = Number(data.getAttribute("value"));
    }
    return { of: Date.parse(document.querySelector("#of").dateTime), shown };
}"""


@pytest.fixture
def port() -> int:
    """A port that a daemon finds again after a restart."""
    return free_port()


def said(stats: dict[str, Any]) -> dict[str, float]:
    """The numbers that the page has to show for ``stats``, by section, row and slot, but for what is null."""
    found: dict[str, float | None] = {}
    for row in stats["latency"]:
        window = row["windows"]["1m"]
        if any(each["n"] for each in row["windows"].values()):
            section = {"request": "latency", "stage": "stages"}[row["of"]]
            slots = window if window["n"] else ("n",)
            found |= {f"{section}/{row['name']}/{slot}": window[slot] for slot in slots}
    for slo in stats["slos"]:
        found |= {f"slos/{slo['name']}/{slot}": slo[slot] for slot in ("budget_left", "burn_5m", "burn_1h")}
    for row in stats["tiers"]:
        slots = ("bytes", "budget_bytes", "reserved_bytes", "entries")
        found |= {f"tiers/{row['tier']}/{row['namespace']}/{slot}": row[slot] for slot in slots}
    hits, fills, arrivals = stats["hits"], stats["fills"], stats["arrivals"]
    found |= {f"figures/Hits by {kind}/value": hits[kind] for kind in hits}
    found |= {
        "figures/Waiting saved/value": stats["saved_seconds"],
        "figures/Fills under way/value": fills["running"],
        "figures/Fills that wait/value": fills["queued"],
        "figures/Leases held/value": stats["leases"],
        "warmup/Arrivals that wait/value": arrivals["new"],
        "warmup/In work/value": arrivals["assigned"],
        "warmup/Done/value": arrivals["done"],
        "warmup/Given up/value": arrivals["dead"],
        "warmup/Oldest waits/value": arrivals["oldest_s"],
    }
    return {name: float(value) for name, value in found.items() if value is not None}


class Follower:
    """What the daemon has told a page, message by message."""

    def __init__(self) -> None:
        self._told: dict[int, dict[str, Any]] = {}

    @classmethod
    async def of(cls, seen: Visit) -> "Follower":
        follower = cls()
        session = await seen.page.context.new_cdp_session(seen.page)

        def note(event: dict[str, Any]) -> None:
            stats = json.loads(event["data"])
            follower._told[int(stats["time"] * 1e3)] = stats

        session.on("Network.eventSourceMessageReceived", note)
        await session.send("Network.enable")
        return follower

    async def compared(self, seen: Visit) -> dict[str, float]:
        """What the page shows, once it shows something that was noted, after it was found to be what was told."""
        while True:
            found = await seen.page.evaluate(_SHOWN)
            if found["of"] in self._told:
                break
            await seen.page.wait_for_function(
                "(of) => Date.parse(document.querySelector('#of').dateTime) !== of", arg=found["of"]
            )
        shown: dict[str, float] = found["shown"]
        ours = {name: value for name, value in shown.items() if name.split("/")[0] not in ("slow", "recent")}
        assert ours == said(self._told[found["of"]])
        return shown


async def until(seen: Visit, value: str, passes: str) -> None:
    """Wait until the number at the path ``value`` ("section/row/slot") fulfils ``passes``, such as "> 3"."""
    await seen.page.wait_for_function(f"(name) => (({_SHOWN})().shown[name] ?? NaN) {passes}", arg=value)


async def test_it_follows_a_daemon_under_load(browser: Browser, tmp_path: Path, bucket: Bucket) -> None:
    """Its numbers change as requests are answered, and at each moment are those the daemon told; no error comes up, and
    nobody but the daemon is asked for anything."""
    refs = [bucket.series(slices=4, seed=seed) for seed in range(5)]
    slos = [{"name": "RAM hits", "tier": "ram", "threshold_s": 60.0, "target": 0.9}]
    with Daemon(tmp_path, {"origin": bucket.origin, "observe": {"slos": slos}}) as daemon:
        async with visit(browser, daemon.url) as seen:
            follower = await Follower.of(seen)
            await follower.compared(seen)
            async with asking(daemon, refs):
                counts: list[float] = []
                for _ in range(3):
                    await until(seen, "latency/ram/n", f"> {counts[-1] if counts else 0}")
                    shown = await follower.compared(seen)
                    counts.append(shown["latency/ram/n"])
                assert counts == sorted(set(counts))
                assert {name.split("/")[1] for name in shown if name.startswith("latency/")} == {"ram", "origin"}
                await until(seen, "tiers/nvme/serving/entries", f"=== {2 * len(refs)}")
                for tier in ("ram", "origin"):
                    line = f"document.querySelector('svg.chart .line.c-{tier}')?.getAttribute('d')"
                    await seen.page.wait_for_function(f"() => ({line} ?? '').split('L').length > 2")
                await expect(seen.page.get_by_role("heading", level=1)).to_have_text("All is well.")
                await expect(seen.page.locator("#recent tbody tr")).not_to_have_count(0)
                await expect(seen.page.locator("#slow ol > li")).not_to_have_count(0)
                assert not await seen.violations()
            now = daemon.ask("GET", "/v1/stats").json  # that no request is under way means: nothing moves any more
            total = sum(row["windows"]["1h"]["n"] for row in now["latency"] if row["of"] == "request")
            await seen.page.locator("input[value='1h']").check(force=True)
            await until(seen, "latency/ram/n", f"+ (({_SHOWN})().shown['latency/origin/n']) === {total}")
            assert not seen.complaints
            assert {url.startswith(daemon.url + "/") for url in seen.requests} == {True}
            studies = {ref.study for ref in refs} | {ref.series for ref in refs}
            text = await seen.page.locator("#recent").inner_text()
            assert any(uid in text for uid in studies)


async def test_it_finds_a_daemon_again_that_was_killed(
    browser: Browser, tmp_path: Path, bucket: Bucket, port: int
) -> None:
    """It says since when there is no news, marks what it shows as old, and goes on when the daemon is back."""
    with Daemon(tmp_path, {"origin": bucket.origin, "server": {"port": port}}) as daemon:
        async with visit(browser, daemon.url) as seen:
            heading = seen.page.get_by_role("heading", level=1)
            await expect(heading).to_have_text("All is well.")
            daemon.kill()
            await expect(heading).to_contain_text("No news since", timeout=30_000)
            await expect(seen.page.locator("body.stale")).to_have_count(1)
            assert not await seen.violations()
            daemon.start()
            await expect(heading).to_have_text("All is well.", timeout=60_000)
            await expect(seen.page.locator("body.stale")).to_have_count(0)
            assert all("ERR_" in complaint for complaint in seen.complaints), seen.complaints


async def test_it_says_what_is_broken(browser: Browser, tmp_path: Path, bucket: Bucket) -> None:
    """A disk that fails and a Triton that is not there are named in the first line, and below with what still works."""
    refs = [bucket.series(seed=seed) for seed in range(3)]
    table = {
        "origin": bucket.origin,
        "triton": {"url": f"http://127.0.0.1:{free_port()}"},
        "nvme": {"health": {"deadline_s": 5.0, "strikes": 1}},
        "faults": {"disk": {"error": 1.0, "methods": ["write"]}},
        "ram": {"budget": 16 * MIB},
    }
    with Daemon(tmp_path, table) as daemon:
        async with visit(browser, daemon.url) as seen:
            heading = seen.page.get_by_role("heading", level=1)
            await expect(heading).to_have_text("Triton does not answer.")
            for ref in refs:
                assert daemon.tensor(ref).status == 200
            problems = seen.page.locator("#problems")
            await expect(problems).to_contain_text("Disk is failing at writes.", timeout=30_000)
            await expect(problems).to_contain_text("RAM and the origin answer instead")
            await expect(problems).to_contain_text("inferences fail")
            await expect(seen.page.locator("#health li.bad")).to_have_count(2)
            assert not await seen.violations()
            assert not seen.complaints
