"""Node: what the cache stands on: disk, origin, workers, the daemon itself, Triton."""

from typing import Final

from .panels import Column, Panel, Query, grid, lines, quantiles
from .rules import AUDIT_BACKLOG, DISK_FAILS, FIRING, UP

TITLE: Final = "voxcache / Node"
SAYS: Final = "What the cache stands on: disk, origin, workers, the daemon itself, Triton."

ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    (
        "What is wrong now",
        (
            grid(
                "Alerts that fire",
                "What to do about each is in the last row of one of these dashboards, and in docs/operations.md.",
                ["alertname", "severity", "instance"],
                Column(f"sum by (alertname, severity, instance) ({FIRING})", "series", "short"),
                empty="None",
            ),
            lines(
                "Scrapes that worked",
                "1: the daemon answers Prometheus. 0: it does not.",
                Query(f"min by (instance) ({UP})", "{{instance}}"),
                unit="short",
                most=1,
            ),
        ),
    ),
    (
        "Disk and origin",
        (
            lines(
                "State of the cache disk",
                "0 healthy, 1 slow, 2 failing, 3 out. From the line on its requests go to the origin.",
                Query("max by (instance, side) (voxcache_nvme_state)", "{{side}}, {{instance}}"),
                unit="short",
                most=3,
                limit=DISK_FAILS,
            ),
            lines(
                "Requests to the origin",
                "By kind and outcome; anything but ok is an error. tried again: a few are normal, many are a bucket "
                "that throttles, or a network that drops.",
                Query(
                    "sum by (kind, outcome) (rate(voxcache_origin_requests_total[$__rate_interval]))",
                    "{{outcome}} {{kind}}",
                ),
                Query("sum by (kind) (rate(voxcache_origin_retries_total[$__rate_interval]))", "tried again: {{kind}}"),
                unit="reqps",
            ),
            lines(
                "Bytes from the origin",
                "Those in vain included.",
                Query("sum by (instance) (rate(voxcache_origin_bytes_total[$__rate_interval]))", "{{instance}}"),
                unit="Bps",
                width=8,
            ),
            lines(
                "Late requests to the origin made once more",
                "won: the second answer came first. lost: it did not. failed: both did. denied: the budget for it was "
                "spent; mostly denied is a bucket that is slow altogether.",
                Query("sum by (kind, outcome) (rate(voxcache_hedges_total[$__rate_interval]))", "{{outcome}} {{kind}}"),
                unit="reqps",
                width=8,
            ),
            lines(
                "Checks for newer versions that failed",
                "The version that is known goes on being answered.",
                Query("sum by (code) (rate(voxcache_revalidation_failures_total[$__rate_interval]))", "{{code}}"),
                unit="ops",
                width=8,
            ),
        ),
    ),
    (
        "The daemon and its workers",
        (
            lines(
                "Event loop lag",
                "What every request may have to wait besides. Hits are slow and no stage is: here is why. Something "
                "takes the CPU from the daemon.",
                *quantiles("event_loop_lag_seconds"),
                unit="s",
                log=True,
            ),
            lines(
                "Workers",
                "All busy for long: fills wait for CPU.",
                Query("sum by (state) (voxcache_workers)", "{{state}}"),
                unit="short",
                stacked=True,
            ),
            lines(
                "Workers replaced",
                "By the error they ended with. One series again and again: its objects. Many: memory.",
                Query("sum by (reason) (rate(voxcache_worker_restarts_total[$__rate_interval]))", "{{reason}}"),
                unit="ops",
            ),
            lines(
                "Audit records not written yet",
                "A few are normal: they are written twice a second. Above the line for long, or never less: an alert.",
                Query("sum by (instance) (voxcache_audit_backlog_bytes)", "{{instance}}"),
                unit="bytes",
                limit=AUDIT_BACKLOG,
            ),
            lines(
                "Audit records",
                "filled: the part of audit.budget that they take; have closed files shipped and removed. state: 0 they "
                "are written, 1 there is no room, 2 the disk does not write.",
                Query("max by (instance) (voxcache_audit_filled)", "filled {{instance}}"),
                Query("max by (instance) (voxcache_audit_state)", "state {{instance}}"),
                unit="short",
            ),
            lines(
                "Acts not recorded",
                "They could not even wait: a record tells how many, and when.",
                Query("sum by (instance) (rate(voxcache_audit_lost_total[$__rate_interval]))", "{{instance}}"),
                unit="ops",
            ),
        ),
    ),
    (
        "Triton",
        (
            lines(
                "Calls",
                "under way: they read the arena. waiting: for their turn. broken off: keep their tensors pinned until "
                "that Triton has ended.",
                Query("sum(voxcache_triton_calls)", "under way"),
                Query("sum(voxcache_inferences_waiting)", "waiting"),
                Query("sum(voxcache_triton_quarantined)", "broken off"),
                unit="short",
                width=8,
            ),
            lines(
                "Calls that broke off",
                "Triton crashed, or was restarted.",
                Query("sum by (instance) (rate(voxcache_triton_quarantines_total[$__rate_interval]))", "{{instance}}"),
                unit="ops",
                width=8,
            ),
            lines(
                "Clients' shared-memory regions",
                "A count that only climbs is a client that does not unregister.",
                Query("sum by (instance) (voxcache_client_regions)", "{{instance}}"),
                unit="short",
                width=8,
            ),
        ),
    ),
)
