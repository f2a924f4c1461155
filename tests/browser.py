"""A real headless Chromium for the status page: what it is started with, and what it notices."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, ViewportSize, async_playwright

_FLAGS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    # it speaks to nobody of its own accord: what it asks for is what the page asks for
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-domain-reliability",
    "--disable-sync",
    "--no-first-run",
    "--no-pings",
)

DESKTOP: Final = ViewportSize(width=1280, height=900)
PHONE: Final = ViewportSize(width=390, height=844)
#: What WCAG 2.2 wants to be enough (1.4.10), and a desktop at 400 %.
NARROW: Final = ViewportSize(width=320, height=640)

#: Every rule that axe has for WCAG 2.2 A and AA, and its best practices.
_RULES: Final = {"resultTypes": ["violations"]}


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """The machine's own Chromium, without a window, until the block ends."""
    path = shutil.which("chromium")
    assert path is not None, "no Chromium: deploy/setup browser"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield browser
        finally:
            await browser.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """One for all tests of a module, which run on its loop."""
    async with chromium() as opened:
        yield opened


class Visit:
    """One look at a page in a browser of its own, and all that went on meanwhile.

    complaints: what came up in the console, and errors of scripts. requests: URLs that were asked for.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    async def violations(self) -> str:
        """What axe finds wrong with the page as it is, in its words; "" for nothing."""
        found = await Axe().run(self.page, options=dict(_RULES))
        return found.generate_report() if found.violations_count else ""


@asynccontextmanager
async def visit(browser: Browser, url: str, *, viewport: ViewportSize = DESKTOP, **more: Any) -> AsyncIterator[Visit]:
    """The page at ``url``, loaded and with news from the daemon."""
    context = await browser.new_context(viewport=viewport, **more)
    context.set_default_timeout(60_000)
    try:
        seen = Visit(await context.new_page())
        await seen.page.goto(url)
        await seen.page.locator("main").wait_for(state="visible")
        yield seen
    finally:
        await context.close()
