"""Cache: what is hit, what is held, and what has to go."""

from typing import Final

from .panels import GOOD, WORST, Panel, Query, State, bars, lines
from .rules import MANY_RESTORES

TITLE: Final = "voxcache / Cache"
SAYS: Final = "What is hit, what is held, and what has to go."


def _hits(name: str, of: str) -> Query:
    hit, every = (f"sum(rate(voxcache_{name}_total{tier}[$__rate_interval]))" for tier in ('{tier=~"ram|nvme"}', ""))
    return Query(f"({hit} or 0 * {every}) / {every}", of)


ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    (
        "What is hit",
        (
            lines(
                "Hit ratio",
                "What RAM and NVMe had of all that was asked for: counted, in bytes, and in the seconds that making it "
                "takes. Requests high and cost low: the dear ones miss.",
                _hits("answers", "requests"),
                _hits("answered_bytes", "bytes"),
                _hits("answered_cost_seconds", "cost"),
                unit="percentunit",
                most=1,
            ),
            lines(
                "Answers by tier",
                "ram and nvme are hits, origin was fetched and made, bypass did not fit RAM.",
                Query("sum by (tier) (rate(voxcache_answers_total[$__rate_interval]))", "{{tier}}"),
                unit="reqps",
                stacked=True,
            ),
            lines(
                "Fills",
                "begun: sets of GETs and decodes. joined: requests that waited for one which another had begun, and so "
                "cost nothing.",
                Query("sum(rate(voxcache_fills_total[$__rate_interval]))", "begun"),
                Query("sum(rate(voxcache_fill_joins_total[$__rate_interval]))", "joined"),
                unit="ops",
            ),
            lines(
                "Models' answers that were looked for",
                "hit: held, so Triton did not run. miss: asked of it. Empty unless a model's results are kept.",
                Query("sum by (outcome) (rate(voxcache_results_total[$__rate_interval]))", "{{outcome}}"),
                unit="reqps",
            ),
        ),
    ),
    (
        "What is held",
        (
            bars(
                "Use of each budget",
                "Of a tier's budget, all that it takes; of the most that a namespace may have, its entries. Full is "
                "normal; a tier that takes more than its budget is an alert.",
                Query("max by (tier) (voxcache_tier_taken_bytes / voxcache_tier_limit_bytes)", "{{tier}}"),
                Query(
                    "sum by (tier, namespace) (voxcache_tier_bytes) "
                    "/ sum by (tier, namespace) (voxcache_tier_budget_bytes)",
                    "{{tier}} {{namespace}}",
                ),
                states=(State(None, "", GOOD), State(1.000001, "", WORST)),
            ),
            lines(
                "Bytes held",
                "Residency by tier and namespace; pinned is what rules and evictions leave alone.",
                Query("sum by (tier, namespace) (voxcache_tier_bytes)", "{{tier}} {{namespace}}"),
                Query("sum by (namespace) (voxcache_pinned_bytes)", "pinned {{namespace}}"),
                unit="bytes",
            ),
            lines(
                "Bytes reserved",
                "What a namespace can rely on: nobody else can take it.",
                Query("sum by (tier, namespace) (voxcache_tier_reserved_bytes)", "{{tier}} {{namespace}}"),
                unit="bytes",
            ),
            lines(
                "Entries",
                "Packs, tensors and embeddings.",
                Query("sum by (tier, namespace) (voxcache_tier_entries)", "{{tier}} {{namespace}}"),
                unit="short",
            ),
        ),
    ),
    (
        "What has to go",
        (
            lines(
                "Evictions by reason",
                "room: something else needed the place. outdated: the source has a newer version. corrupt: a file "
                "failed its checksum. rule: a retention rule said so.",
                Query(
                    "sum by (tier, reason) (rate(voxcache_evictions_total[$__rate_interval]))", "{{tier}} {{reason}}"
                ),
                Query("sum by (rule) (rate(voxcache_retention_drops_total[$__rate_interval]))", "rule {{rule}}"),
                unit="ops",
            ),
            lines(
                "No room",
                "Entries that a tier could not take, by why. all-pinned: whatever could go is leased or being made.",
                Query(
                    "sum by (tier, code) (rate(voxcache_admissions_refused_total[$__rate_interval]))",
                    "{{tier}} {{code}}",
                ),
                unit="ops",
            ),
            lines(
                "Arena",
                "taken: of its bytes. in pieces: of its free bytes, those outside the largest hole. A tensor needs one "
                "hole, so both high at once mean that entries go to make one.",
                Query("max by (instance) (voxcache_arena_utilisation)", "taken, {{instance}}"),
                Query("max by (instance) (voxcache_arena_fragmentation)", "in pieces, {{instance}}"),
                unit="percentunit",
                most=1,
            ),
            lines(
                "Leases by age",
                "What is leased cannot go. Old ones that only become more are a client that does not release.",
                Query("sum by (age) (voxcache_leases)", "{{age}}"),
                unit="short",
                stacked=True,
            ),
            lines(
                "Entries that were not written to disk",
                "In RAM only, so a restart loses them. skipped: too many waited. declined: not worth a write "
                "(store.write_admission). Others are errors.",
                Query("sum(rate(voxcache_write_behind_skipped_total[$__rate_interval]))", "skipped"),
                Query("sum(rate(voxcache_write_behind_declined_total[$__rate_interval]))", "declined"),
                Query("sum by (code) (rate(voxcache_write_behind_failures_total[$__rate_interval]))", "{{code}}"),
                unit="ops",
            ),
            lines(
                "Restores from an archive",
                "Series asked back, and those that ended. Each one may cost money.",
                Query("sum by (what) (increase(voxcache_restores_total[1h]))", "{{what}}, in an hour"),
                unit="short",
                limit=MANY_RESTORES,
            ),
        ),
    ),
)
