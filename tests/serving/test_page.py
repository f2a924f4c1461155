"""The status page: what it is served with, and how it shows what a daemon may tell, in a real browser."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from playwright.async_api import Browser, expect

from serving.api.page import Page
from tests.browser import DESKTOP, NARROW, PHONE, Visit, visit
from tests.conftest import ROOT

UID = "1.2.826.0.1.3680043.8.498.1122334455667788990011223344556"
FILES = sorted((ROOT / "serving" / "page").iterdir())

in_one_browser = pytest.mark.asyncio(loop_scope="module")


# ------------------------------------------------------------------ a daemon's words


def windows(ms: float, n: int = 120) -> dict[str, Any]:
    told = {"n": n, "p50_ms": ms / 2, "p95_ms": ms * 0.9, "p99_ms": ms, "max_ms": ms * 2}
    return {"1m": told, "5m": told | {"n": n * 5}, "1h": told | {"n": n * 60}}


FRESH: dict[str, Any] = {
    "time": 1.8e9,
    "uptime_s": 3.0,
    "version": "1.2.3",
    "node": "gpu-07",
    "latency": [],
    "slos": [],
    "tiers": [
        {"tier": tier, "namespace": "serving", "bytes": 0, "budget_bytes": 64 << 30, "reserved_bytes": 0, "entries": 0}
        for tier in ("ram", "nvme")
    ],
    "arena": {"utilisation": 0.0, "fragmentation": 0.0},
    "hits": {"requests": None, "bytes": None, "cost": None},
    "saved_seconds": 0.0,
    "fills": {"running": 0, "queued": 0},
    "leases": 0,
    "arrivals": {"new": 0, "assigned": 0, "done": 0, "dead": 0, "oldest_s": 0.0},
    "warming": [],
    "recent": [],
    "health": [{"what": what, "ok": True, "says": "fine"} for what in ("origin", "triton", "disk", "workers")],
    "slow": [],
}

_SLO = {"name": "quick", "tier": "ram", "threshold_ms": 5.0, "target": 0.99}
_SLOW = {
    "route": "/v1/{study}",
    "tier": "origin",
    "status": 200,
    "study": UID,
    "trace": "4bf92f3577b34da6a3ce929d0e0e4736",
}

BUSY = FRESH | {
    "latency": [
        *({"of": "request", "name": tier, "windows": windows(ms)} for tier, ms in (("ram", 0.4), ("origin", 1900.0))),
        *({"of": "stage", "name": stage, "windows": windows(ms)} for stage, ms in (("queue", 0.05), ("decode", 700.0))),
    ],
    "slos": [_SLO | {"budget_left": 0.8, "burn_5m": 0.3, "burn_1h": 0.2}],
    "tiers": [FRESH["tiers"][0] | {"bytes": 41 << 30, "reserved_bytes": 48 << 30, "entries": 212}, FRESH["tiers"][1]],
    "hits": {"requests": 0.962, "bytes": 0.941, "cost": None},
    "arrivals": {"new": 12, "assigned": 4, "done": 4123, "dead": 0, "oldest_s": 37.0},
    "warming": [
        {"job": "1", "kind": "warm", "study": UID, "done": 3, "of": 7, "failures": 1},
        {"job": "2", "kind": "index", "study": "", "done": 0, "of": 0, "failures": 0},
    ],
    "recent": [{"study": UID, "series": UID + ".2", "tier": "ram", "bytes": 157 << 20, "last_use": 1.8e9 - 12}],
    "slow": [
        _SLOW
        | {"time": 1.8e9 - 60 * i, "ms": 900.0 + 100 * i, "stages": {"queue": 100.0, "fetch": 500.0, "decode": 250.0}}
        for i in range(8)
    ],
}


def unwell(*parts: str, **more: Any) -> dict[str, Any]:
    health = [
        each | ({"ok": False, "says": "does not answer"} if each["what"] in parts else {}) for each in FRESH["health"]
    ]
    return BUSY | {"health": health} | more


class Told:
    """A daemon that serves the page and tells what it is told to, each time at once."""

    def __init__(self) -> None:
        self.stats = FRESH
        self.status = 200
        self.url = ""
        self.still = False  # whether its clock stands still
        self._time = 0.0
        self._news = asyncio.Condition()

    async def tell(self, stats: dict[str, Any]) -> None:
        async with self._news:
            self.stats = stats
            self._news.notify_all()

    def _told(self) -> dict[str, Any]:
        self._time = self._time if self.still else time.time()
        return self.stats | {"time": self._time}

    async def now(self, request: web.Request) -> web.Response:
        return web.json_response(self._told(), status=self.status)

    async def events(self, request: web.Request) -> web.StreamResponse:
        if self.status != 200:
            return web.Response(status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        while True:
            await response.write(b"data: " + json.dumps(self._told()).encode() + b"\n\n")
            async with self._news:
                try:
                    await asyncio.wait_for(self._news.wait(), 0.5)
                except TimeoutError:
                    continue


@asynccontextmanager
async def telling() -> AsyncIterator[Told]:
    told = Told()
    app = web.Application()
    app.add_routes([*Page().routes(), web.get("/v1/stats", told.now), web.get("/v1/stats/events", told.events)])
    server = TestServer(app)
    await server.start_server(shutdown_timeout=0)
    told.url = str(server.make_url("/"))
    try:
        yield told
    finally:
        await server.close()


# ------------------------------------------------------------------ how it is served


async def test_a_browser_may_load_these_files_and_nothing_else() -> None:
    """The policy forbids all but the page's own files, and each says what it is, so that nobody guesses."""
    async with telling() as told, ClientSession(told.url) as session:
        for name in ["", *(f"page/{path.name}" for path in FILES)]:
            async with session.get("/" + name) as answer:
                assert answer.status == 200
                policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
                assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
                assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                kind = {"": "text/html", "html": "text/html", "css": "text/css", "js": "text/javascript"}
                assert answer.content_type == kind.get(name.rpartition(".")[2], "image/svg+xml")
        async with session.get("/page/../app.py") as answer:
            assert answer.status == 404
        async with session.get("/page/page.py") as answer:
            assert answer.status == 404


async def test_each_file_is_asked_for_again_and_sent_once() -> None:
    """After an upgrade no script meets another version's markup; until then 304 is all that travels."""
    async with telling() as told, ClientSession(told.url) as session:
        for path in ("/", "/page/page.js"):
            async with session.get(path) as answer:
                assert answer.headers["Cache-Control"] == "no-cache"
                etag = answer.headers["ETag"]
                body = await answer.read()
            async with session.get(path, headers={"If-None-Match": f'"other", {etag}'}) as answer:
                assert (answer.status, await answer.read(), answer.headers["ETag"]) == (304, b"", etag)
            async with session.get(path, headers={"If-None-Match": '"other"'}) as answer:
                assert (answer.status, await answer.read()) == (200, body)
            async with session.head(path) as answer:
                assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(body)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_name_no_other_host(path: Any) -> None:
    """Not even in a comment: a page that is opened in an emergency needs this daemon alone."""
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "//" not in re.sub(r"(?m)(^|\s)// .*$", "", text)
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text)


def test_runbooks_that_it_names_exist() -> None:
    """Who is sent to a section of the documentation at night finds it."""
    words = (ROOT / "serving" / "page" / "words.js").read_text()
    headings = set(re.findall(r"(?m)^### (\w+)$", (ROOT / "docs" / "operations.md").read_text()))
    named = set(re.findall(r'"(Voxcache\w+)"', words))
    assert named
    assert named <= headings


# ------------------------------------------------------------------ what it says


@pytest.mark.service
@in_one_browser
async def test_the_first_line_says_whether_all_is_well(browser: Browser) -> None:
    """In words, as a heading, and in the tab's title: that all is well, or what is not, the worst first."""
    burnt = [_SLO | {"budget_left": 0.0, "burn_5m": 20.0, "burn_1h": 15.0}]
    late = FRESH["arrivals"] | {"new": 1, "oldest_s": 7300.0, "dead": 2}
    expected = [
        (FRESH, "All is well.", []),
        (BUSY, "All is well.", []),
        (unwell("triton"), "Triton does not answer.", ["inferences fail"]),
        (
            unwell("disk", slos=burnt),
            "Disk does not answer. And one thing more.",
            ["VoxcacheDeviceFailing", "15.0 times"],
        ),
        (BUSY | {"slos": burnt}, "Far too many RAM hits are slow.", ["Objective quick: RAM hits, 99 % below 5.00 ms"]),
        (
            BUSY | {"arrivals": late},
            "An arrival has waited for 2 h 1 min. And one thing more.",
            ["workers", "dead-letters"],
        ),
        (
            unwell("origin", "workers", arrivals=late),
            "Origin does not answer. And 3 things more.",
            ["What is held", "misses fail", "workers", "dead-letters"],
        ),
    ]
    async with telling() as told, visit(browser, told.url) as seen:
        heading = seen.page.get_by_role("heading", level=1)
        for stats, first, meanings in expected:
            await told.tell(stats)
            await expect(heading).to_have_text(first)
            await expect(seen.page).to_have_title(re.compile(re.escape(first)))
            problems = seen.page.locator("#problems li")
            await expect(problems).to_have_count(len(meanings))
            for n, meaning in enumerate(meanings):
                await expect(problems.nth(n)).to_contain_text(meaning)
        assert not seen.complaints


@pytest.mark.service
@in_one_browser
async def test_a_fresh_daemon_is_no_empty_page(browser: Browser) -> None:
    """What there is none of is said to be none of, in each section; nothing is undefined, NaN or an empty table."""
    async with telling() as told, visit(browser, told.url) as seen:
        text = await seen.page.locator("body").inner_text()
        assert not re.search(r"undefined|NaN|null|Infinity|\[object", text)
        assert await seen.page.locator("main table:visible").count() == 1  # the tiers
        assert await seen.page.locator(".empty:visible").count() == 6
        await expect(seen.page.locator("#lede")).to_have_text("No tensor was asked for in the last minute.")
        assert not seen.complaints


@pytest.mark.service
@in_one_browser
@pytest.mark.parametrize(
    ("viewport", "scheme"),
    [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"), (NARROW, "dark")],
    ids=["light", "dark", "phone", "narrow"],
)
async def test_axe_finds_nothing_wrong(browser: Browser, viewport: Any, scheme: str) -> None:
    """Contrast, names, roles and order are right in each look, whatever is shown; nothing is wider than the screen."""
    async with telling() as told, visit(browser, told.url, viewport=viewport, color_scheme=scheme) as seen:
        burnt = [_SLO | {"budget_left": left, "burn_5m": 7.0, "burn_1h": 7.0, "name": f"{left}"} for left in (0.0, 0.1)]
        for stats in (FRESH, BUSY, unwell("disk", "triton", slos=burnt)):
            await told.tell(stats)
            await expect(seen.page.locator("#slos tbody tr")).to_have_count(len(stats["slos"]))
            assert not await seen.violations()
            assert await seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not seen.complaints


@pytest.mark.service
@in_one_browser
async def test_whom_it_does_not_know_is_told_to_sign_in(browser: Browser) -> None:
    """A daemon that begins to ask who is there, or fails, is said to do so; the page finds its way back by itself."""
    async with telling() as told, visit(browser, told.url) as seen:
        heading = seen.page.get_by_role("heading", level=1)
        told.status = 401
        await seen.page.reload()
        await expect(heading).to_have_text("The daemon does not answer.")
        await expect(seen.page.locator("#problems")).to_contain_text("sign in")
        told.status = 503
        await expect(seen.page.locator("#problems")).to_contain_text("It answered 503", timeout=30_000)
        told.status = 200
        await expect(heading).to_have_text("All is well.", timeout=30_000)


async def tab(seen: Visit, back: bool = False) -> str:
    """Press Tab; what has the focus then."""
    await seen.page.keyboard.press("Shift+Tab" if back else "Tab")
    found: str = await seen.page.evaluate(
        "(({ activeElement: a }) => a.id || a.getAttribute('href') || a.value || a.localName)(document)"
    )
    return found


@pytest.mark.service
@in_one_browser
async def test_the_keyboard_reaches_all_that_can_be_pressed_in_order(browser: Browser) -> None:
    """Tab goes from the problems over what can be pressed to the links, arrows choose the window, Enter pauses."""
    async with telling() as told:
        told.stats = unwell("triton")
        async with visit(browser, told.url) as seen:
            await expect(seen.page.locator("#problems a")).to_have_count(1)
            await seen.page.locator("#slow li").first.wait_for()
            reached = [await tab(seen) for _ in range(8)]
            links = ["v1/stats", "metrics", "readyz", "openapi.json"]
            assert reached == ["#health", "pause", "1m", "slow-all", *links]
            for _ in range(5):
                await tab(seen, back=True)
            await seen.page.keyboard.press("ArrowRight")
            await expect(seen.page.locator("input[value='5m']")).to_be_checked()
            await expect(seen.page.locator("#tier-latency [data-key=ram] [data-slot=n]")).to_have_text("600")
            outline = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
            assert await seen.page.evaluate(outline) == "solid"
            assert await tab(seen, back=True) == "pause"
            await seen.page.keyboard.press("Enter")
            await expect(seen.page.locator("#pause")).to_have_attribute("aria-pressed", "true")
            await told.tell(unwell("triton", leases=77))
            await told.tell(unwell("disk", leases=77))  # the first line goes on all the same
            await expect(seen.page.get_by_role("heading", level=1)).to_have_text("Disk does not answer.")
            leases = seen.page.locator("#figures [data-key='Leases held'] data")
            await expect(leases).to_have_text("0")
            await seen.page.keyboard.press("Enter")
            await expect(leases).to_have_text("77")


@pytest.mark.service
@in_one_browser
async def test_what_is_looked_at_stays_while_news_come(browser: Browser) -> None:
    """Rows are filled anew, not made anew: focus, selection and a screen reader's place survive every second."""
    async with telling() as told:
        told.stats = BUSY
        async with visit(browser, told.url) as seen:
            await seen.page.evaluate("window.kept = document.querySelector('#recent tbody tr')")
            later = [BUSY["recent"][0] | {"study": UID + ".9"}, BUSY["recent"][0] | {"bytes": 5 << 30}]
            await told.tell(BUSY | {"recent": later})
            await expect(seen.page.locator("#recent tbody tr")).to_have_count(2)
            kept = "[kept.isConnected, [...kept.parentNode.children].indexOf(kept), kept.innerText.includes('5.4')]"
            assert await seen.page.evaluate(kept) == [True, 1, True]


@pytest.mark.service
@in_one_browser
async def test_what_is_told_twice_is_drawn_once(browser: Browser) -> None:
    """An answer that comes by two ways is no new time, and takes no line out of the charts."""
    line = "() => (document.querySelector('svg.chart .line.c-ram')?.getAttribute('d').split('L').length ?? 0)"
    async with telling() as told:
        told.stats = BUSY
        async with visit(browser, told.url) as seen:
            await seen.page.wait_for_function(f"() => ({line})() > 2")
            told.still = True
            for leases in (5, 6):
                await told.tell(BUSY | {"leases": leases})
                await expect(seen.page.locator("#figures [data-key='Leases held'] data")).to_have_text(str(leases))
            assert await seen.page.evaluate(line) > 2


@pytest.mark.service
@in_one_browser
async def test_who_asks_for_less_motion_gets_charts_that_stand_still(browser: Browser) -> None:
    """Numbers go on, lines are drawn anew a few times a minute only, and no bar slides."""
    drawing = "document.querySelector('svg.chart').innerHTML"
    async with telling() as told:
        told.stats = BUSY
        async with visit(browser, told.url, reduced_motion="reduce") as seen:
            before = await seen.page.evaluate(drawing)
            for leases in (5, 6, 7):
                await told.tell(BUSY | {"leases": leases})
                await expect(seen.page.locator("#figures [data-key='Leases held'] data")).to_have_text(str(leases))
            assert await seen.page.evaluate(drawing) == before
            bar = "getComputedStyle(document.querySelector('.bar .fill')).transitionDuration"
            assert await seen.page.evaluate(bar) == "0s"
        async with visit(browser, told.url) as seen:
            before = await seen.page.evaluate(drawing)
            await seen.page.wait_for_function(f"(before) => {drawing} !== before", arg=before)
