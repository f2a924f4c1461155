"""Warm-up: whether new studies are ready before somebody asks."""

from typing import Final

from .panels import Panel, Query, lines, quantiles
from .rules import OLD_ARRIVAL

TITLE: Final = "voxcache / Warm-up"
SAYS: Final = "Whether new studies are ready before somebody asks."


ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    (
        "What arrives",
        (
            lines(
                "Arrivals",
                "Events accepted. Repeats are normal: publishers send again what they are not sure of.",
                Query("sum by (news) (rate(voxcache_arrival_events_total[$__rate_interval]))", "{{news}}"),
                unit="ops",
                width=8,
            ),
            lines(
                "Queue",
                "new: waits to be complete, or for its turn. assigned: being made ready. done: remembered, so that "
                "repeats are no work. dead: given up, and waits for somebody. Of all nodes, where they share it.",
                Query("max by (state) (voxcache_arrivals)", "{{state}}"),
                unit="short",
                width=8,
            ),
            lines(
                "Age of the oldest arrival",
                "Above the line an alert fires.",
                Query("max by (instance) (voxcache_arrival_oldest_seconds)", "{{instance}}"),
                unit="s",
                width=8,
                limit=OLD_ARRIVAL,
            ),
        ),
    ),
    (
        "How long until ready",
        (
            lines(
                "From arrival to ready",
                "From a series' first event until what it calls for is held.",
                *quantiles("arrival_to_ready_seconds"),
                unit="s",
                log=True,
            ),
            lines(
                "Fills under way",
                "running and queued: for requests and warm-ups alike, requests first. waiters: requests that wait for "
                "them. A queue that grows: too few workers, or a slow origin.",
                Query("sum(voxcache_fills_running)", "running"),
                Query("sum(voxcache_fills_queued)", "queued"),
                Query("sum(voxcache_fills_waiters)", "waiters"),
                unit="short",
            ),
        ),
    ),
    (
        "What goes wrong",
        (
            lines(
                "Warm-ups that failed",
                "By error; docs/operations.md says what to do for each.",
                Query("sum by (code) (rate(voxcache_warm_failures_total[$__rate_interval]))", "{{code}}"),
                unit="ops",
            ),
            lines(
                "Looks for arrivals",
                "At origins that are asked for news. Anything but ok is an error. Empty unless [pull] is set.",
                Query("sum by (pull, outcome) (rate(voxcache_pulls_total[$__rate_interval]))", "{{outcome}} {{pull}}"),
                unit="ops",
            ),
        ),
    ),
)
