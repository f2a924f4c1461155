"""The metrics as data: one table from which they are exposed, documented, and checked against dashboards and alerts.

Labels never hold UIDs, keys or anything of a patient; every label has a bounded set of values.
"""

import functools
from typing import Final, Literal

import msgspec

PREFIX: Final = "voxcache_"

#: From a RAM hit to a stalled fill, in seconds.
_FASTEST: Final = 20e-6
_SLOWEST: Final = 100.0


class Metric(msgspec.Struct, frozen=True):
    """One metric: its name without the prefix, its type, its unit ("": it is a number of things), labels and meaning.

    ``panel``: where it is shown, as "dashboard: panel". ``alerts``: all that come of it.
    ``a_decade``: of a histogram, how many buckets lie between a value and ten times it: 48 tell a quantile to 5 %, 3
    its order of magnitude. ``most``: the last of them but infinity.
    """

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    unit: Literal["", "seconds", "bytes", "ratio", "currency"]
    labels: tuple[str, ...]
    help: str
    panel: str
    alerts: tuple[str, ...] = ()
    a_decade: int = 3
    most: float = _SLOWEST

    @property
    def full_name(self) -> str:
        """As Prometheus calls it; a histogram's series have ``_bucket``, ``_sum`` or ``_count`` behind it."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


METRICS: Final = (
    # requests, and what answered them
    Metric(
        "requests",
        "counter",
        "",
        ("route", "tier", "status"),
        "Requests answered, by route, tier and status.",
        "Latency: Refused and failed",
        ("VoxcacheAnswersFail",),
    ),
    Metric(
        "request_seconds",
        "histogram",
        "seconds",
        ("route", "tier"),
        "Seconds from a request's arrival to its answer's end.",
        "Latency: Requests by how long they took",
    ),
    Metric(
        "tier_seconds",
        "histogram",
        "seconds",
        ("tier",),
        "Seconds from a request's arrival until its tensor was at hand, before it was sent or a model ran on it.",
        "Latency: p99 by tier",
        ("VoxcacheFewerHitsAndSlower",),
        a_decade=48,
    ),
    Metric(
        "stage_seconds",
        "histogram",
        "seconds",
        ("stage",),
        "Seconds each stage of requests took.",
        "Latency: Seconds spent in each stage, every second",
        a_decade=12,
    ),
    Metric(
        "answers",
        "counter",
        "",
        ("tier", "namespace"),
        "Entries that requests got, by the tier that had them.",
        "Cache: Answers by tier",
        ("VoxcacheFewerHitsAndSlower",),
    ),
    Metric("answered_bytes", "counter", "bytes", ("tier", "namespace"), "Bytes of these entries.", "Cache: Hit ratio"),
    Metric(
        "answered_cost_seconds",
        "counter",
        "seconds",
        ("tier", "namespace"),
        "Seconds that it takes, or took, to make these entries.",
        "Cache: Hit ratio",
    ),
    Metric(
        "slo_requests",
        "counter",
        "",
        ("slo",),
        "Requests that a service level objective is about.",
        "Latency: Error budget left",
        ("VoxcacheSloBurnFast", "VoxcacheSloBurnSlow"),
    ),
    Metric(
        "slo_slow_requests",
        "counter",
        "",
        ("slo",),
        "Those of them that took longer than it allows.",
        "Latency: Error budget left",
        ("VoxcacheSloBurnFast", "VoxcacheSloBurnSlow"),
    ),
    Metric(
        "slo_target",
        "gauge",
        "ratio",
        ("slo",),
        "The part of requests that an objective wants to be fast enough.",
        "Latency: Error budget left",
        ("VoxcacheSloBurnFast", "VoxcacheSloBurnSlow"),
    ),
    # what they were worth
    Metric(
        "saved_seconds",
        "counter",
        "seconds",
        ("namespace",),
        "Seconds that hits would have taken to make.",
        "Value: Time saved",
    ),
    Metric(
        "saved_gpu_seconds",
        "counter",
        "seconds",
        (),
        "Seconds that GPUs would have waited for that.",
        "Value: GPU-hours saved",
    ),
    Metric(
        "saved_cost",
        "counter",
        "currency",
        (),
        "What these seconds would have cost (price.gpu_hour).",
        "Value: Money saved",
    ),
    Metric(
        "active_studies",
        "gauge",
        "",
        (),
        "Studies that are held and were used within price.active_s.",
        "Value: Active studies",
    ),
    Metric(
        "study_storage_cost",
        "gauge",
        "currency",
        (),
        "What the tiers' budgets cost in a day for each active study (price.ram_gib_month, price.nvme_gib_month).",
        "Value: Cost of an active study",
    ),
    # tiers
    Metric(
        "tier_bytes",
        "gauge",
        "bytes",
        ("tier", "namespace"),
        "Bytes a tier holds.",
        "Cache: Bytes held",
    ),
    Metric(
        "tier_budget_bytes",
        "gauge",
        "bytes",
        ("tier", "namespace"),
        "Bytes a tier may hold, what it borrows included.",
        "Cache: Use of each budget",
    ),
    Metric(
        "tier_taken_bytes",
        "gauge",
        "bytes",
        ("tier",),
        "Bytes a tier takes in all: what is being made, and what it keeps beside entries, included.",
        "Cache: Use of each budget",
        ("VoxcacheStrictnessViolated",),
    ),
    Metric(
        "tier_limit_bytes",
        "gauge",
        "bytes",
        ("tier",),
        "Bytes a tier may take in all: its budget.",
        "Cache: Use of each budget",
        ("VoxcacheStrictnessViolated",),
    ),
    Metric(
        "tier_reserved_bytes",
        "gauge",
        "bytes",
        ("tier", "namespace"),
        "Bytes of a tier that others cannot take.",
        "Cache: Bytes reserved",
    ),
    Metric("tier_entries", "gauge", "", ("tier", "namespace"), "Entries a tier holds.", "Cache: Entries"),
    Metric("arena_utilisation", "gauge", "ratio", (), "The part of the arena that is taken.", "Cache: Arena"),
    Metric(
        "arena_fragmentation",
        "gauge",
        "ratio",
        (),
        "The part of the arena's free bytes not in its largest hole.",
        "Cache: Arena",
    ),
    Metric("pinned_bytes", "gauge", "bytes", ("namespace",), "Bytes on NVMe that pins hold.", "Cache: Bytes held"),
    Metric(
        "evictions",
        "counter",
        "",
        ("tier", "reason"),
        "Entries dropped, by tier and reason.",
        "Cache: Evictions by reason",
    ),
    Metric(
        "admissions_refused",
        "counter",
        "",
        ("tier", "code"),
        "Times a tier had no room for an entry.",
        "Cache: No room",
    ),
    Metric(
        "retention_drops",
        "counter",
        "",
        ("rule",),
        "Entries dropped because a rule said so, by the rule.",
        "Cache: Evictions by reason",
    ),
    Metric(
        "write_behind_failures",
        "counter",
        "",
        ("code",),
        "Entries that could not be written to NVMe.",
        "Cache: Entries that were not written to disk",
    ),
    Metric(
        "write_behind_skipped",
        "counter",
        "",
        (),
        "Entries kept in RAM only as too many waited to be written.",
        "Cache: Entries that were not written to disk",
    ),
    Metric(
        "write_behind_declined",
        "counter",
        "",
        (),
        "Entries kept in RAM only as they were not worth a write.",
        "Cache: Entries that were not written to disk",
    ),
    Metric(
        "nvme_state",
        "gauge",
        "",
        ("side",),
        "The disk's reads and writes: 0 healthy, 1 slow, 2 failing, 3 out.",
        "Node: State of the cache disk",
        ("VoxcacheDeviceFailing",),
    ),
    # fills and what they need
    Metric(
        "leases", "gauge", "", ("age",), "Leases that are held, by how long they have been.", "Cache: Leases by age"
    ),
    Metric("fills_running", "gauge", "", (), "Fills under way.", "Warm-up: Fills under way"),
    Metric("fills_queued", "gauge", "", (), "Fills that wait for a slot.", "Warm-up: Fills under way"),
    Metric("fills_waiters", "gauge", "", (), "Requests that wait for a fill.", "Warm-up: Fills under way"),
    Metric("fills", "counter", "", (), "Fills that were begun.", "Cache: Fills"),
    Metric("fill_joins", "counter", "", (), "Requests that waited for a fill which another had begun.", "Cache: Fills"),
    Metric("workers", "gauge", "", ("state",), "Worker processes, busy and idle.", "Node: Workers"),
    Metric(
        "worker_restarts",
        "counter",
        "",
        ("reason",),
        "Workers replaced, by the error they ended with.",
        "Node: Workers replaced",
    ),
    Metric(
        "origin_requests",
        "counter",
        "",
        ("kind", "outcome"),
        "Requests to the origin.",
        "Node: Requests to the origin",
        ("VoxcacheOriginFailing",),
    ),
    Metric(
        "origin_retries",
        "counter",
        "",
        ("kind",),
        "Requests to the origin that were tried again.",
        "Node: Requests to the origin",
    ),
    Metric(
        "hedges",
        "counter",
        "",
        ("kind", "outcome"),
        "Late requests to the origin, made once more or not.",
        "Node: Late requests to the origin made once more",
    ),
    Metric(
        "origin_bytes",
        "counter",
        "bytes",
        (),
        "Bytes read from the origin, those in vain included.",
        "Node: Bytes from the origin",
    ),
    Metric(
        "revalidation_failures",
        "counter",
        "",
        ("code",),
        "Background checks of a series that failed.",
        "Node: Checks for newer versions that failed",
    ),
    Metric(
        "restores",
        "counter",
        "",
        ("what",),
        "Series asked back from an archive, and those that ended.",
        "Cache: Restores from an archive",
        ("VoxcacheColdReads",),
    ),
    # arrivals
    Metric(
        "arrival_events",
        "counter",
        "",
        ("news",),
        "Events accepted, by whether they were new or repeats.",
        "Warm-up: Arrivals",
    ),
    Metric(
        "arrivals",
        "gauge",
        "",
        ("state",),
        "Events in the queue, by state; of all nodes, where they share it.",
        "Warm-up: Queue",
        ("VoxcacheArrivalsDead",),
    ),
    Metric(
        "arrival_oldest_seconds",
        "gauge",
        "seconds",
        (),
        "Seconds that the oldest event waits which still does.",
        "Warm-up: Age of the oldest arrival",
        ("VoxcacheArrivalsAgeing",),
    ),
    Metric(
        "arrival_to_ready_seconds",
        "histogram",
        "seconds",
        (),
        "Seconds from a series' first event until what it calls for was ready.",
        "Warm-up: From arrival to ready",
        a_decade=6,
        most=10_000.0,
    ),
    Metric(
        "warm_failures",
        "counter",
        "",
        ("code",),
        "Warm-ups that ended in an error, by its code.",
        "Warm-up: Warm-ups that failed",
    ),
    Metric(
        "pulls",
        "counter",
        "",
        ("pull", "outcome"),
        "Looks for arrivals at an origin, by way and outcome.",
        "Warm-up: Looks for arrivals",
    ),
    # Triton
    Metric(
        "results",
        "counter",
        "",
        ("outcome",),
        "Answers of models that were looked for: held or not.",
        "Cache: Models' answers that were looked for",
    ),
    Metric("triton_calls", "gauge", "", (), "Calls under way that read the arena.", "Node: Calls"),
    Metric(
        "triton_quarantined",
        "gauge",
        "",
        (),
        "Calls that broke off, and keep their tensors until it has ended.",
        "Node: Calls",
    ),
    Metric(
        "triton_quarantines",
        "counter",
        "",
        (),
        "Calls to Triton that broke off, and may have gone on reading.",
        "Node: Calls that broke off",
    ),
    Metric("inferences_waiting", "gauge", "", (), "Inferences that wait for their turn at Triton.", "Node: Calls"),
    Metric(
        "client_regions",
        "gauge",
        "",
        (),
        "Shared-memory regions that clients have registered.",
        "Node: Clients' shared-memory regions",
    ),
    # the daemon itself
    Metric(
        "event_loop_lag_seconds",
        "histogram",
        "seconds",
        (),
        "Seconds by which the event loop was late for a timer: what every request may have to wait besides.",
        "Node: Event loop lag",
        a_decade=6,
    ),
    Metric(
        "audit_backlog_bytes",
        "gauge",
        "bytes",
        (),
        "About how many bytes of audit records wait to be written.",
        "Node: Audit records not written yet",
        ("VoxcacheAuditBacklog",),
    ),
    Metric(
        "audit_state",
        "gauge",
        "",
        (),
        "Whether acts are recorded: 0 they are, 1 there is no room, 2 the disk does not write.",
        "Node: Audit records",
        ("VoxcacheAuditStopped",),
    ),
    Metric(
        "audit_filled",
        "gauge",
        "ratio",
        (),
        "The part of audit.budget that records take which nobody has taken away yet.",
        "Node: Audit records",
        ("VoxcacheAuditFilling",),
    ),
    Metric(
        "audit_lost",
        "counter",
        "",
        (),
        "Acts that could not be recorded one by one: a record tells how many, and when.",
        "Node: Acts not recorded",
    ),
)


@functools.cache
def buckets(metric: Metric) -> tuple[float, ...]:
    """The upper bounds of a histogram's buckets in seconds, with three digits, infinity left out."""
    bounds = []
    step = 0
    while (bound := float(f"{_FASTEST * 10 ** (step / metric.a_decade):.3g}")) <= metric.most:
        bounds.append(bound)
        step += 1
    return tuple(bounds)


def metrics_table() -> str:
    """Every metric as a Markdown table."""
    lines = ["| metric | type | unit | labels | panel | alerts | says |", "|---|---|---|---|---|---|---|"]
    for m in METRICS:
        labels = ", ".join(f"`{label}`" for label in m.labels)
        alerts = ", ".join(f"[{alert}](operations.md#{alert.lower()})" for alert in m.alerts)
        lines.append(f"| `{m.full_name}` | {m.kind} | {m.unit} | {labels} | {m.panel} | {alerts} | {m.help} |")
    return "\n".join(lines) + "\n"
