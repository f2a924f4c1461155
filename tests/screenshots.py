"""Pictures of the status page for the documentation: ``python -m tests.screenshots`` (``make screenshots``).

A real daemon is put to work, with a Redis and a Triton beside it and an origin as slow as a bucket, and looked at in
light, in dark and at a phone's width; then another one, whose disk fails and whose Triton has gone, as somebody sees it
who is woken by that.
"""

import asyncio
import contextlib
import io
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from PIL import Image
from playwright.async_api import Browser, Page, ViewportSize, expect

from cache.keys import SeriesRef
from serving.demo.tritonserver import TritonServer
from tests.browser import DESKTOP, chromium, visit
from tests.conftest import ROOT
from tests.daemon import MIB, Bucket, Daemon, asking
from tests.services import free_port, redis_server

PICTURES: Final = ROOT / "docs" / "status"
PHONE: Final = ViewportSize(width=390, height=1700)
LOOKS: Final[dict[str, dict[str, Any]]] = {
    "light": {"viewport": DESKTOP, "color_scheme": "light"},
    "dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "phone": {"viewport": PHONE, "color_scheme": "light", "device_scale_factor": 2},
}


def settings(bucket: Bucket, **more: Any) -> dict[str, Any]:
    table = {
        "origin": bucket.origin,
        "ram": {"budget": 24 * MIB},
        "nvme": {"budget": 512 * MIB},
        "workers": {"count": 4},
        "store": {"revalidate": "interval"},
        "recipes": {
            "ct_volume": {"version": 1, "ops": [{"op": "volume"}]},
            "ct_small": {"version": 1, "ops": [{"op": "volume"}, {"op": "cast", "dtype": "float32"}]},
        },
        "arrivals": {"warm": ["ct_volume"]},
        # a machine that also draws the pictures is no quick one
        "observe": {
            "slos": [
                {"name": "hits", "tier": "ram", "threshold_s": 0.1},
                {"name": "misses", "tier": "origin", "threshold_s": 4.0},
            ]
        },
        "faults": {"origin": {"delay_s": 0.05}},
    }
    return table | more


@contextlib.asynccontextmanager
async def looked_at(browser: Browser, daemon: Daemon, how: Mapping[str, Any]) -> AsyncIterator[Page]:
    """The page, on a node that is called gpu-07: what this machine is called is nobody's business."""
    rename = """() => {
        const renamed = () => identity.textContent.replace(/ on (?!gpu-07,)[^,]+/, " on gpu-07");
        const rename = () => { if (renamed() !== identity.textContent) identity.textContent = renamed(); };
        new MutationObserver(rename).observe(identity, { childList: true });
    }"""
    async with visit(browser, daemon.url, **how) as seen:
        await seen.page.evaluate(rename)
        yield seen.page


async def take(page: Page, name: str, *, whole: bool) -> None:
    """One picture. It keeps the 256 colours it has most of as they are, which makes it a third as large."""
    with Image.open(io.BytesIO(await page.screenshot(full_page=whole))) as shot:
        picture = shot.convert("RGB")
    counted = cast(list[tuple[int, tuple[int, int, int]]], picture.getcolors(1 << 24))
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for _, colour in sorted(counted, reverse=True)[:256] for value in colour])
    PICTURES.mkdir(exist_ok=True)
    file = PICTURES / f"{name}.png"
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}: {picture.width} × {picture.height}, {file.stat().st_size >> 10} KiB")


async def at_work(folder: Path, triton: TritonServer, redis_url: str, seconds: float) -> None:
    """A daemon that has much to do, after so many seconds of it."""
    bucket = Bucket(folder / "bucket")
    refs = [bucket.series(slices=24, rows=256, columns=256, seed=seed) for seed in range(24)]
    table = settings(bucket, triton={"url": triton.url}, redis={"url": redis_url})
    (folder / "daemon").mkdir()
    with Daemon(folder / "daemon", table) as daemon:
        async with chromium() as browser, contextlib.AsyncExitStack() as stack:
            pages = {
                name: await stack.enter_async_context(looked_at(browser, daemon, how)) for name, how in LOOKS.items()
            }
            await stack.enter_async_context(asking(daemon, refs[:14], recipe="ct_volume", clients=2))
            for ref in refs[14:20]:
                daemon.call("POST", "/v1/arrivals/plain", {"study": ref.study, "series": ref.series})
            await asyncio.sleep(seconds)  # no test: pictures show what comes together in that time
            wanted = [f"{ref.study}/{ref.series}/{recipe}" for ref in refs for recipe in ("ct_volume", "ct_small")]
            daemon.call("POST", "/v1/warm", {"tensors": wanted})
            await asyncio.gather(*(page.locator(".warming li").first.wait_for() for page in pages.values()))
            await asyncio.gather(*(take(page, name, whole=name != "phone") for name, page in pages.items()))


async def in_trouble(folder: Path) -> None:
    """A daemon whose Triton is not there, and whose disk takes no writes."""
    bucket = Bucket(folder / "bucket")
    refs: Sequence[SeriesRef] = [bucket.series(seed=seed) for seed in range(6)]
    failing = {"origin": {"delay_s": 0.05}, "disk": {"error": 1.0, "methods": ["write"]}}
    more = {"triton": {"url": f"http://127.0.0.1:{free_port()}"}, "faults": failing}
    nvme = {"budget": 256 * MIB, "health": {"strikes": 1}}
    (folder / "daemon").mkdir()
    with Daemon(folder / "daemon", settings(bucket, nvme=nvme, **more)) as daemon:
        how = LOOKS["phone"] | {"color_scheme": "dark"}
        async with (
            chromium() as browser,
            looked_at(browser, daemon, how) as page,
            asking(daemon, refs, recipe="ct_volume", clients=2),
        ):
            await expect(page.locator("#health li.bad")).to_have_count(2, timeout=60_000)
            await asyncio.sleep(20)  # no test: the picture shows what comes together in that time
            await take(page, "trouble", whole=False)


async def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("busy", "trouble", "triton"):
            (folder / part).mkdir()
        with TritonServer(folder / "triton" / "log") as triton, redis_server(folder / "redis") as redis:
            await at_work(folder / "busy", triton, redis.url, seconds)
        await in_trouble(folder / "trouble")


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 120.0))
