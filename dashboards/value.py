"""Value: what the cache is worth, and what it costs."""

from typing import Final

from .panels import GOOD, Panel, Query, State, lines, number

TITLE: Final = "voxcache / Value"
SAYS: Final = "What the cache is worth, and what it costs."

_WORTH: Final = (State(None, "", GOOD),)

ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    (
        "In the time range shown",
        (
            number(
                "Time saved",
                "What hits would have taken to fetch and make.",
                "sum(increase(voxcache_saved_seconds_total[$__range]))",
                *_WORTH,
                unit="s",
            ),
            number(
                "GPU-hours saved",
                "For how long GPUs would have waited for that.",
                "sum(increase(voxcache_saved_gpu_seconds_total[$__range])) / 3600",
                *_WORTH,
                unit="h",
            ),
            number(
                "Money saved",
                "These hours at price.gpu_hour, in its currency.",
                "sum(increase(voxcache_saved_cost_total[$__range]))",
                *_WORTH,
                unit="short",
                decimals=2,
            ),
            number(
                "Active studies",
                "Held, and used within price.active_s.",
                "sum(voxcache_active_studies)",
                unit="short",
            ),
            number(
                "Cost of an active study",
                "What the tiers' budgets cost in a day for each active study, in the currency of the prices "
                "(price.ram_gib_month, price.nvme_gib_month). It climbs when tiers are larger than what is used.",
                "avg(voxcache_study_storage_cost)",
                unit="short",
                decimals=4,
            ),
            number(
                "Requests a fill",
                "How often what is made is used.",
                "sum(increase(voxcache_answers_total[$__range])) / (sum(increase(voxcache_fills_total[$__range])) > 0)",
                unit="short",
                decimals=1,
            ),
        ),
    ),
    (
        "Over time",
        (
            lines(
                "Seconds saved, every second",
                "1: without the cache somebody would wait all the time.",
                Query("sum by (namespace) (rate(voxcache_saved_seconds_total[$__rate_interval]))", "{{namespace}}"),
                unit="s",
                stacked=True,
            ),
            lines(
                "Active studies by node",
                "Held, and used lately: what the tiers' budgets are for.",
                Query("sum by (instance) (voxcache_active_studies)", "{{instance}}"),
                unit="short",
            ),
        ),
    ),
)
