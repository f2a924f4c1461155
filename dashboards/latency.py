"""Latency: how long users wait, by tier, and where the time goes."""

from typing import Final

from .panels import (
    GOOD,
    ODD,
    QUANTILES,
    WORST,
    Column,
    Panel,
    Query,
    State,
    bars,
    grid,
    heat,
    lines,
    percentile,
    quantile,
)
from .rules import ASKED, FAST, SLOW, Burn

TITLE: Final = "voxcache / Latency"
SAYS: Final = "How long users wait, and for what."

_BAD: Final = f'{ASKED},status=~"[45].."'


def _by_tier(q: float) -> Panel:
    rest = round((1 - q) * 100)
    return lines(
        f"{percentile(q)} by tier",
        f"{rest} % of the requests of a tier waited longer for their tensor, before it was sent or a model ran on it. "
        "ram and nvme are hits, origin was fetched and made, bypass did not fit RAM.",
        Query(quantile(q, "tier_seconds", "tier"), "{{tier}}", exemplars=True),
        unit="s",
        width=8,
        log=True,
    )


def _burn_panel(title: str, says: str, burn: Burn) -> Panel:
    queries = (
        Query(f"max by (slo) ({name})", f"{{{{slo}}}}, {window[:-1]} {window[-1]}")
        for name, window in zip(burn.recorded, burn.windows, strict=True)
    )
    return lines(title, says, *queries, unit="short", width=8, limit=burn.rate)


_LEFT: Final = (
    "1 - (sum by (slo) (increase(voxcache_slo_slow_requests_total[30d])) "
    "or 0 * sum by (slo) (increase(voxcache_slo_requests_total[30d]))) "
    "/ (sum by (slo) (increase(voxcache_slo_requests_total[30d])) * (1 - min by (slo) (voxcache_slo_target)))"
)

ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    ("How long users wait", tuple(map(_by_tier, QUANTILES))),
    (
        "What was promised",
        (
            bars(
                "Error budget left",
                "Of each objective, over the last 30 days: how much of what may be slow is still to come. At 0 the "
                "promise is broken.",
                Query(_LEFT, "{{slo}}"),
                states=(State(None, "", WORST), State(0.1, "", ODD), State(0.5, "", GOOD)),
                width=8,
            ),
            _burn_panel(
                "How fast the error budget burns",
                "1 uses up exactly all of it in 30 days. Above the line for two windows at once somebody is woken.",
                FAST,
            ),
            _burn_panel(
                "How fast it burns, slowly",
                "The same over longer windows. Above the line for both a ticket is opened.",
                SLOW,
            ),
        ),
    ),
    (
        "Each of them",
        (
            heat(
                "Requests by how long they took",
                "From a request's arrival to its answer's end. Each column is a moment, each cell how many took so "
                "long. Two bands are hits and fills; a band that climbs is something that slows down.",
                f"sum by (le) (increase(voxcache_request_seconds_bucket{{{ASKED}}}[$__rate_interval]))",
                width=12,
            ),
            lines(
                "Refused and failed",
                "Answers of 4xx and 5xx, by status and route. 429 and 503 ask to come again: the node has too much to "
                "do, or what it needs is away. Other 4xx are the callers' doing.",
                Query(
                    f"sum by (status, route) (rate(voxcache_requests_total{{{_BAD}}}[$__rate_interval]))",
                    "{{status}} {{route}}",
                ),
                unit="reqps",
            ),
        ),
    ),
    (
        "Where the time goes",
        (
            lines(
                "Seconds spent in each stage, every second",
                "All requests and fills together: the thickest band is what to make faster.",
                Query("sum by (stage) (rate(voxcache_stage_seconds_sum[$__rate_interval]))", "{{stage}}"),
                unit="s",
                stacked=True,
            ),
            grid(
                "Stages",
                "Over the time range shown, the slowest first.",
                ["stage"],
                Column("sum by (stage) (increase(voxcache_stage_seconds_count[$__range]))", "times", "short"),
                *(
                    Column(quantile(q, "stage_seconds", "stage", span="$__range"), percentile(q), "s")
                    for q in QUANTILES
                ),
            ),
            lines(
                "p99 by stage",
                "Which stage became slower, and when.",
                Query(quantile(0.99, "stage_seconds", "stage"), "{{stage}}"),
                unit="s",
                width=24,
                log=True,
            ),
        ),
    ),
)
