"""The top row of every dashboard: in words, whether users suffer, and from what."""

from typing import Final

from .panels import BAD, GOOD, ODD, WORST, Panel, State, words
from .rules import ASKED, DISK_FAILS, FAILED, FAST, FIRING, MANY_REFUSED, OLD_ARRIVAL, ORIGIN_FAILS, SLOW, UP

_REFUSED: Final = (
    f"2 * (count({UP} == 0) > bool 0) or "
    f"(sum(rate(voxcache_requests_total{{{FAILED}}}[5m])) or vector(0)) "
    f"/ (sum(rate(voxcache_requests_total{{{ASKED}}}[5m])) > 0)"
)
_ORIGIN: Final = (
    '(sum(rate(voxcache_origin_requests_total{outcome!="ok"}[5m])) or vector(0)) '
    "/ (sum(rate(voxcache_origin_requests_total[5m])) > 0)"
)

SUMMARY: Final[tuple[Panel, ...]] = (
    words(
        "Do users wait?",
        "How fast the worst objective's error budget burns: 1 uses up exactly all of it in 30 days.",
        f"max({FAST.recorded[0]})",
        State(None, "No: all in time", GOOD),
        State(1, "A little", ODD),
        State(SLOW.rate, "Yes: too slow", BAD),
        State(FAST.rate, "Yes: far too slow", WORST),
        empty="Nobody asks",
        leads_to="latency",
    ),
    words(
        "Do they get answers?",
        "Of all requests in the last five minutes, the share refused or failed (5xx, 429); but first, whether each "
        "daemon is there.",
        _REFUSED,
        State(None, "All do", GOOD),
        State(0.001, "A few are refused", ODD),
        State(MANY_REFUSED, "Many are refused", WORST),
        State(2, "A daemon is down", WORST),
        empty="Nobody asks",
        leads_to="latency",
    ),
    words(
        "Are new studies ready in time?",
        "Age of the oldest arrival that waits still.",
        "max(voxcache_arrival_oldest_seconds)",
        State(None, "Yes", GOOD),
        State(300, "Some wait", ODD),
        State(OLD_ARRIVAL, "They wait for long", BAD),
        leads_to="warmup",
    ),
    words(
        "Is the cache disk well?",
        "The worst state of any node's reads or writes. Without its disk a node asks the origin for all that RAM does "
        "not hold: right, but slower.",
        "max(voxcache_nvme_state)",
        State(None, "Yes", GOOD),
        State(1, "Slow now and then", ODD),
        State(DISK_FAILS, "Failing: not used", WORST),
        State(3, "Out: look at it", WORST),
        leads_to="node",
    ),
    words(
        "Does the origin answer?",
        "Of all requests to it in the last five minutes, the share that failed. Hits do not need it.",
        _ORIGIN,
        State(None, "Yes", GOOD),
        State(0.01, "Mostly", ODD),
        State(ORIGIN_FAILS, "Hardly", WORST),
        empty="Nobody asked it",
        leads_to="node",
    ),
    words(
        "Which alerts fire?",
        "What each of them means, and what to do, is in the last row of the dashboard that it names.",
        f"count({FIRING}) or vector(0)",
        State(None, "None", GOOD),
        State(1, "One", BAD),
        State(2, "Several", WORST),
        leads_to="node",
    ),
)
