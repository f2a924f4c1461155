"""What Prometheus works out ahead, and when it wakes somebody: recording rules and alerts as data.

Burn rates are those of the SRE workbook (chapter 5, "Alerting on SLOs"): a rate of 1 spends the whole error budget in
exactly 30 days; 14.4 over an hour spends 2 % of it, 6 over six hours 5 %. The short window of each pair ends the alert
soon after the trouble does.
"""

from typing import Any, Final, Literal, NamedTuple

from serving.metrics import METRICS

#: What a scrape adds to every series.
_SCRAPED: Final = frozenset({"instance", "job"})

#: Requests of users, not of those who watch. An answer of 5xx or 429 is one they did not get.
ASKED: Final = 'route!~"/|/metrics|/livez|/readyz|/openapi.json|/v1/stats.*"'
FAILED: Final = f'{ASKED},status=~"5..|429"'

#: Whether a daemon answers a scrape, and the alerts that fire.
UP: Final = 'up{job="voxcache"}'
FIRING: Final = 'ALERTS{alertname=~"Voxcache.*",alertstate="firing"}'

#: Bounds of alerts, which the dashboards draw, too. Shares of requests that are refused, and of the origin's that fail.
MANY_REFUSED: Final = 0.05
ORIGIN_FAILS: Final = 0.2
#: Seconds of the oldest arrival.
OLD_ARRIVAL: Final = 900
#: Series that are asked back from an archive in an hour.
MANY_RESTORES: Final = 20
#: Bytes of audit records that wait.
AUDIT_BACKLOG: Final = 8 << 20
#: A state of the disk: its requests go to the origin.
DISK_FAILS: Final = 2

#: Where the text of an alert's runbook is; ``python -m dashboards.generate --runbooks URL`` names another place.
RUNBOOKS: Final = "docs/operations.md"


class Recorded(NamedTuple):
    """A recording rule: its name (level:metric:operations), the labels it keeps beside the scrape's, and its PromQL."""

    name: str
    labels: tuple[str, ...]
    expr: str


class Condition(NamedTuple):
    """``value`` is PromQL that returns data while all is well too; the alert is about it going past ``bound``."""

    value: str
    bound: str


class Alert(NamedTuple):
    """Fires when all conditions held for ``held``. ``page`` wakes somebody, ``ticket`` waits for the morning."""

    name: str
    conditions: tuple[Condition, ...]
    held: str
    severity: Literal["page", "ticket"]
    dashboard: str
    summary: str
    says: str

    @property
    def expr(self) -> str:
        return " and ".join(f"{value} {bound}" for value, bound in self.conditions)


_ASKED_RATE: Final = f"sum by (instance, job) (rate(voxcache_requests_total{{{ASKED}}}[5m]))"


def _burn_name(window: str) -> str:
    return f"voxcache:slo_burn:rate{window}"


class Burn(NamedTuple):
    """An error budget burns too fast if it does so at ``rate`` over both windows."""

    windows: tuple[str, str]
    rate: float

    @property
    def recorded(self) -> tuple[str, ...]:
        """What the rate over each window is recorded as."""
        return tuple(map(_burn_name, self.windows))


FAST: Final = Burn(("5m", "1h"), 14.4)
SLOW: Final = Burn(("30m", "6h"), 6)


def _share(part: str, whole: str) -> str:
    """A ratio that is 0 while there is nothing of ``part``, and absent while there is nothing at all.

    What is no number would make none of every average that it is in, for as long as that looks back.
    """
    return f"({part} or 0 * {whole}) / ({whole} > 0)"


def _burn(window: str) -> Recorded:
    """How many times as fast as it may an objective's error budget was used up."""
    slow, all_of_them = (
        f"sum by (instance, job, slo) (rate(voxcache_{name}_total[{window}]))"
        for name in ("slo_slow_requests", "slo_requests")
    )
    allowed = "(1 - max by (instance, job, slo) (voxcache_slo_target))"
    return Recorded(_burn_name(window), ("slo",), f"{_share(slow, all_of_them)} / {allowed}")


RECORDED: Final = (
    Recorded(
        "voxcache:requests_failed:ratio_rate5m",
        (),
        _share(f"sum by (instance, job) (rate(voxcache_requests_total{{{FAILED}}}[5m]))", _ASKED_RATE),
    ),
    Recorded(
        "voxcache:answers_hit:ratio_rate5m",
        (),
        _share(
            'sum by (instance, job) (rate(voxcache_answers_total{tier=~"ram|nvme"}[5m]))',
            "sum by (instance, job) (rate(voxcache_answers_total[5m]))",
        ),
    ),
    Recorded(
        "voxcache:tier_seconds:p99_rate5m",
        (),
        "histogram_quantile(0.99, sum by (instance, job, le) (rate(voxcache_tier_seconds_bucket[5m]))) >= 0",
    ),
    Recorded(
        "voxcache:origin_requests_failed:ratio_rate5m",
        (),
        _share(
            'sum by (instance, job) (rate(voxcache_origin_requests_total{outcome!="ok"}[5m]))',
            "sum by (instance, job) (rate(voxcache_origin_requests_total[5m]))",
        ),
    ),
    *map(_burn, (*FAST.windows, *SLOW.windows)),
)


def _burning(burn: Burn) -> tuple[Condition, ...]:
    return tuple(Condition(name, f"> {burn.rate}") for name in burn.recorded)


ALERTS: Final = (
    Alert(
        "VoxcacheDown",
        (Condition(UP, "== 0"),),
        "2m",
        "page",
        "node",
        "{{ $labels.instance }} does not answer Prometheus",
        "The daemon ended, hangs, or cannot be reached. Its clients are refused.",
    ),
    Alert(
        "VoxcacheAnswersFail",
        (Condition("voxcache:requests_failed:ratio_rate5m", f"> {MANY_REFUSED}"),),
        "5m",
        "page",
        "latency",
        "{{ $labels.instance }} refuses or fails {{ $value | humanizePercentage }} of all requests",
        "Answers of 5xx or 429 over the last five minutes: users get nothing, or get it later.",
    ),
    Alert(
        "VoxcacheSloBurnFast",
        _burning(FAST),
        "2m",
        "page",
        "latency",
        "{{ $labels.slo }} on {{ $labels.instance }} uses up its error budget {{ $value | humanize }} times too fast",
        "At this rate a month's budget is gone in two days. Requests take longer than the objective allows.",
    ),
    Alert(
        "VoxcacheSloBurnSlow",
        _burning(SLOW),
        "15m",
        "ticket",
        "latency",
        "{{ $labels.slo }} on {{ $labels.instance }} uses up its error budget {{ $value | humanize }} times too fast",
        "At this rate a month's budget is gone in five days. Requests take longer than the objective allows.",
    ),
    Alert(
        "VoxcacheFewerHitsAndSlower",
        (
            Condition(
                "voxcache:answers_hit:ratio_rate5m / avg_over_time(voxcache:answers_hit:ratio_rate5m[1d])", "< 0.7"
            ),
            Condition("voxcache:tier_seconds:p99_rate5m / avg_over_time(voxcache:tier_seconds:p99_rate5m[1d])", "> 2"),
        ),
        "10m",
        "page",
        "cache",
        "{{ $labels.instance }} hits less than it did, and users wait longer for it",
        "The hit ratio is {{ $value | humanizePercentage }} of the last day's, and p99 more than twice the last day's.",
    ),
    Alert(
        "VoxcacheStrictnessViolated",
        (
            Condition(
                "max by (instance, job, tier) (voxcache_tier_taken_bytes) "
                "/ max by (instance, job, tier) (voxcache_tier_limit_bytes)",
                "> 1",
            ),
        ),
        "0m",
        "page",
        "cache",
        "{{ $labels.tier }} takes more than its budget on {{ $labels.instance }}",
        "It takes {{ $value | humanizePercentage }} of it. That must never happen.",
    ),
    Alert(
        "VoxcacheColdReads",
        (
            Condition(
                'sum by (instance, job) (increase(voxcache_restores_total{what="requested"}[1h]))', f"> {MANY_RESTORES}"
            ),
        ),
        "0m",
        "ticket",
        "cache",
        "{{ $value | humanize }} series were asked back from the archive in an hour on {{ $labels.instance }}",
        "Somebody reads old studies by the dozen. Each costs money and hours to bring back.",
    ),
    Alert(
        "VoxcacheArrivalsAgeing",
        (Condition("max by (instance, job) (voxcache_arrival_oldest_seconds)", f"> {OLD_ARRIVAL}"),),
        "5m",
        "ticket",
        "warmup",
        "An arrival has waited for {{ $value | humanizeDuration }} on {{ $labels.instance }}",
        "New studies are not made ready before they are asked for, so their first readers wait for the origin.",
    ),
    Alert(
        "VoxcacheArrivalsDead",
        (Condition('sum by (instance, job) (voxcache_arrivals{state="dead"})', "> 0"),),
        "0m",
        "ticket",
        "warmup",
        "{{ $value }} arrivals were given up on {{ $labels.instance }}",
        "They were tried too often, and wait for somebody to look: voxcache dead-letters.",
    ),
    Alert(
        "VoxcacheDeviceFailing",
        (Condition("max by (instance, job, side) (voxcache_nvme_state)", f">= {DISK_FAILS}"),),
        "1m",
        "page",
        "node",
        "The cache disk of {{ $labels.instance }} fails: {{ $labels.side }}",
        "Requests are answered by the origin instead: right, but slower, and the origin bears all of it.",
    ),
    Alert(
        "VoxcacheOriginFailing",
        (Condition("voxcache:origin_requests_failed:ratio_rate5m", f"> {ORIGIN_FAILS}"),),
        "5m",
        "page",
        "node",
        "The origin fails {{ $value | humanizePercentage }} of what {{ $labels.instance }} asks of it",
        "Hits go on. What is not held cannot be had, or is late.",
    ),
    Alert(
        "VoxcacheAuditBacklog",
        (Condition("min_over_time(voxcache_audit_backlog_bytes[5m])", f"> {AUDIT_BACKLOG}"),),
        "0m",
        "page",
        "node",
        "{{ $value | humanize1024 }}B of audit records wait to be written on {{ $labels.instance }}",
        "The disk of audit.path is too slow. What is beyond audit.waiting acts is lost, and only counted.",
    ),
    Alert(
        "VoxcacheAuditStopped",
        (Condition("max by (instance, job) (voxcache_audit_state)", ">= 1"),),
        "1m",
        "page",
        "node",
        "Nobody's acts are recorded on {{ $labels.instance }}",
        "audit.budget is used up, or the disk is full or fails. Requests go on.",
    ),
    Alert(
        "VoxcacheAuditFilling",
        (Condition("max by (instance, job) (voxcache_audit_filled)", "> 0.8"),),
        "5m",
        "ticket",
        "node",
        "Audit records take {{ $value | humanizePercentage }} of their budget on {{ $labels.instance }}",
        "Nobody takes closed files away. At 100 % nothing is recorded any more.",
    ),
)


def _labels() -> dict[str, frozenset[str]]:
    """Of each series there is, by name, its labels."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    result = {"up": _SCRAPED, "ALERTS": _SCRAPED | {"alertname", "alertstate", "severity"}}
    for metric in METRICS:
        for suffix in suffixes[metric.kind]:
            more = {"le"} if suffix == "_bucket" else set()
            result[f"voxcache_{metric.name}{suffix}"] = _SCRAPED | more | {*metric.labels}
    return result | {rule.name: _SCRAPED | {*rule.labels} for rule in RECORDED}


#: The labels of every series that may be asked for, by its name.
LABELS: Final = _labels()


def rule_groups(runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The file of rules, as Prometheus reads it."""
    recorded = [{"record": rule.name, "expr": rule.expr} for rule in RECORDED]
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.held,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "description": alert.says,
                "runbook_url": f"{runbooks}#{alert.name.lower()}",
                "dashboard": f"/d/voxcache-{alert.dashboard}",
            },
        }
        for alert in ALERTS
    ]
    # one group, in this order: its alerts see what was worked out for the same moment
    return {"groups": [{"name": "voxcache", "rules": recorded + alerts}]}
