"""How every panel looks: what its numbers are limited to, units, colours, and the words that say what it shows.

A query is PromQL as it would be typed, without the dashboard's own variables: :func:`scoped` limits each metric in it
to the chosen nodes, and to the chosen namespaces where the metric has that label. It asks the metric table, so a query
that names a metric which there is not cannot be generated.
"""

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    text,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from .rules import FIRING, LABELS

Panel = Builder[model.Panel]

SOURCE: Final = model.DataSourceRef("prometheus", "${datasource}")

GOOD, ODD, BAD, WORST, QUIET = "green", "yellow", "orange", "red", "#8e8e8e"

#: Further than any value.
_FAR: Final = 1e12

#: What is shown of a distribution.
QUANTILES: Final = (0.5, 0.95, 0.99)

_LAST: Final = common.ReduceDataOptions().calcs(["lastNotNull"])

#: What means the same has the same colour everywhere: by legend, names of series and their colours.
_COLOURS: Final = {
    "{{tier}}": (("ram", "green"), ("nvme", "blue"), ("origin", "orange"), ("bypass", "purple")),
    "{{outcome}}": (("hit", "green"), ("miss", "orange")),
    "p99": (("p50", "green"), ("p95", "yellow"), ("p99", "red")),
}


class Query(NamedTuple):
    """PromQL, what its series are called, and whether single requests are shown that were traced."""

    expr: str
    legend: str
    exemplars: bool = False


def quantile(q: float, name: str, *by: str, span: str = "$__rate_interval") -> str:
    """A quantile of a histogram, for each value of the labels ``by``."""
    return f"histogram_quantile({q}, sum by ({', '.join(('le', *by))}) (rate(voxcache_{name}_bucket[{span}])))"


def quantiles(name: str) -> list[Query]:
    """The usual ones of a histogram."""
    return [Query(quantile(q, name), percentile(q)) for q in QUANTILES]


def percentile(q: float) -> str:
    """What a quantile is called."""
    return f"p{round(q * 100)}"


class State(NamedTuple):
    """From ``least`` on (``None``: below all others), a value reads as ``says``."""

    least: float | None
    says: str
    colour: str


def scoped(expr: str) -> str:
    """``expr`` limited to the chosen nodes and namespaces. Raises: KeyError for a metric that there is not."""

    def limited(found: re.Match[str]) -> str:
        name, matchers = found[1], found[2]
        scope = [f'{label}=~"${variable}"' for label, variable in _SCOPE if label in LABELS[name]]
        return f"{name}{{{','.join([*filter(None, [matchers]), *scope])}}}"

    return re.sub(r"\b(voxcache[_:][\w:]+|ALERTS|up)\b(?:\{([^}]*)\})?", limited, expr)


_SCOPE: Final = (("instance", "node"), ("namespace", "namespace"))


def lines(
    title: str, says: str, *queries: Query, unit: str, width: int = 12, log: bool = False, most: float | None = None,
    stacked: bool = False, limit: float | None = None,
) -> Panel:  # fmt: skip
    """Values over time. ``limit`` is drawn as a dashed line that they should stay below."""
    panel = timeseries.Panel()
    _common(panel, title, says, unit=unit, width=width, height=9)
    for place, query in enumerate(queries):
        panel.with_target(_target(query, place))
    many = len(queries) > 1 or "{{" in queries[0].legend
    shown = common.VizLegendOptions().display_mode(look.LegendDisplayMode.TABLE).placement(look.LegendPlacement.BOTTOM)
    panel.legend(shown.show_legend(many).calcs(["lastNotNull", "max"]).sort_by("Max").sort_desc(True))
    panel.tooltip(common.VizTooltipOptions().mode(look.TooltipDisplayMode.MULTI).sort(look.SortOrder.DESCENDING))
    panel.show_points(look.VisibilityMode.NEVER).line_width(1).fill_opacity(40 if stacked else 5)
    if stacked:
        panel.stacking(common.StackingConfig().mode(look.StackingMode.NORMAL).group("A"))
    if log:
        panel.scale_distribution(common.ScaleDistributionConfig().type(look.ScaleDistribution.LOG).log(10))
    else:
        panel.min(0)
    if most is not None:
        panel.max(most)
    if limit is not None:
        panel.thresholds(_thresholds([State(None, "", "transparent"), State(limit, "", WORST)]))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(look.GraphTresholdsStyleMode.DASHED))
    legends = {query.legend for query in queries}
    for legend, colours in _COLOURS.items():
        for name, colour in colours if legend in legends else ():
            panel.override_by_name(name, [model.DynamicConfigValue("color", _fixed(colour))])
    return panel


def words(title: str, says: str, expr: str, *states: State, leads_to: str, empty: str = "No data") -> Panel:
    """One value as a sentence on a colour. ``empty`` is what it says when there is nothing to judge by; ``leads_to``
    is the dashboard that says more."""
    panel = stat.Panel()
    _common(panel, title, says, unit="short", width=4, height=4)
    panel.with_target(_target(Query(expr, ""), 0, instant=True))
    panel.mappings(_mappings(states, empty)).thresholds(_thresholds([State(None, "", QUIET)])).no_value(empty)
    url = f"/d/voxcache-{leads_to}?${{__url_time_range}}&${{__all_variables}}"
    panel.links([dashboard.DashboardLink("More").type(model.DashboardLinkType.LINK).url(url)])
    panel.graph_mode(look.BigValueGraphMode.NONE).color_mode(look.BigValueColorMode.BACKGROUND_SOLID)
    panel.text_mode(look.BigValueTextMode.VALUE).justify_mode(look.BigValueJustifyMode.CENTER)
    return panel.reduce_options(_LAST).text(common.VizTextDisplayOptions().value_size(22))


def number(
    title: str, says: str, expr: str, *states: State, unit: str, width: int = 4, decimals: float | None = None
) -> Panel:
    """One value, its colour by ``states``, with its course behind it."""
    panel = stat.Panel()
    _common(panel, title, says, unit=unit, width=width, height=4)
    panel.with_target(_target(Query(expr, ""), 0))
    panel.thresholds(_thresholds(states or [State(None, "", "text")]))
    panel.graph_mode(look.BigValueGraphMode.AREA).color_mode(look.BigValueColorMode.VALUE).no_value("none yet")
    if decimals is not None:
        panel.decimals(decimals)
    return panel.reduce_options(_LAST)


def bars(title: str, says: str, *queries: Query, states: Sequence[State], width: int = 12) -> Panel:
    """Parts of a whole, now: one bar each, from 0 to 100 %."""
    panel = bargauge.Panel()
    _common(panel, title, says, unit="percentunit", width=width, height=9)
    for place, query in enumerate(queries):
        panel.with_target(_target(query, place, instant=True))
    panel.min(0).max(1).thresholds(_thresholds(states)).orientation(look.VizOrientation.HORIZONTAL)
    return panel.display_mode(look.BarGaugeDisplayMode.BASIC).reduce_options(_LAST)


def heat(title: str, says: str, expr: str, width: int = 24) -> Panel:
    """A classic histogram of seconds over time: the darker, the more."""
    panel = heatmap.Panel()
    _common(panel, title, says, unit="s", width=width, height=9)
    panel.with_target(_target(Query(expr, "{{le}}"), 0, shape=PromQueryFormat.HEATMAP))
    panel.calculate(False).cell_gap(1).filter_values(heatmap.FilterValueRange().le(1e-9))
    panel.y_axis(heatmap.YAxisConfig().unit("s")).show_legend()
    panel.scale_distribution(common.ScaleDistributionConfig().type(look.ScaleDistribution.LINEAR))
    return panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))


class Column(NamedTuple):
    """One column of a :func:`grid`: PromQL, its heading, and its unit."""

    expr: str
    heading: str
    unit: str


def grid(title: str, says: str, by: Sequence[str], *columns: Column, width: int = 12, empty: str = "") -> Panel:
    """The values of now as a table: a row for each combination of the labels ``by``, ordered by the last column."""
    panel = table.Panel()
    _common(panel, title, says, unit="short", width=width, height=9)
    panel.no_value(empty)
    hidden = {"Time": True}
    for place, column in enumerate(columns):
        panel.with_target(_target(Query(column.expr, ""), place, instant=True, shape=PromQueryFormat.TABLE))
        panel.override_by_name(column.heading, [model.DynamicConfigValue("unit", column.unit)])
    values = [f"Value #{chr(65 + place)}" for place in range(len(columns))] if len(columns) > 1 else ["Value"]
    renamed = dict(zip(values, (column.heading for column in columns), strict=True))
    order = {name: place for place, name in enumerate([*by, *values])}
    panel.with_transformation(model.DataTransformerConfig("merge", options={}))
    panel.with_transformation(
        model.DataTransformerConfig(
            "organize", options={"excludeByName": hidden, "indexByName": order, "renameByName": renamed}
        )
    )
    return panel.sort_by([common.TableSortByFieldState().display_name(columns[-1].heading).desc(True)])


def prose(title: str, markdown: str, width: int = 24, height: int = 9) -> Panel:
    """Text to read."""
    return text.Panel().title(title).content(markdown).span(width).height(height)


def built(uid: str, title: str, says: str, rows: Sequence[tuple[str, Sequence[Panel]]], folded: Sequence[Panel]) -> Any:
    """A dashboard of ``rows``; ``folded`` are shown when somebody opens the last row."""
    result = dashboard.Dashboard(title).uid(uid).description(says).tags(["voxcache"]).readonly()
    result.time("now-3h", "now").refresh("30s").tooltip(model.DashboardCursorSync.CROSSHAIR).timezone("browser")
    result.link(
        dashboard.DashboardLink("voxcache")
        .type(model.DashboardLinkType.DASHBOARDS)
        .tags(["voxcache"])
        .include_vars(True)
        .keep_time(True)
    )
    for variable in _variables():
        result.with_variable(variable)
    result.annotation(
        dashboard.AnnotationQuery()
        .name("Alerts")
        .datasource(SOURCE)
        .enable(True)
        .icon_color(WORST)
        .expr(scoped(FIRING))
    )
    number_of = iter(range(1, 1000))
    for heading, panels in rows:
        result.with_row(dashboard.Row(heading).id(next(number_of)))
        for panel in panels:
            result.with_panel(_Numbered(panel, next(number_of)))
    if folded:
        row = dashboard.Row("What to do when an alert fires").collapsed(True).id(next(number_of))
        for panel in folded:
            row.with_panel(_Numbered(panel, next(number_of)))
        result.with_row(row)
    return result.build()


class _Numbered(Builder[model.Panel]):
    """A panel under its number, which no other on the dashboard has."""

    def __init__(self, panel: Panel, number: int) -> None:
        self._panel = panel
        self._number = number

    def build(self) -> model.Panel:
        result = self._panel.build()
        result.id_val = self._number
        return result


def _variables() -> list[Builder[Any]]:
    everything = model.VariableOption(True, "All", "$__all")

    def chosen(name: str, label: str, of: str, says: str) -> dashboard.QueryVariable:
        asked = f"label_values({of})"
        return (
            dashboard.QueryVariable(name)
            .label(label)
            .description(says)
            .datasource(SOURCE)
            .query({"query": asked, "refId": "StandardVariableQuery"})
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(everything)
            .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(model.VariableSort.ALPHABETICAL_ASC)
        )

    return [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        chosen("node", "Node", "voxcache_tier_bytes, instance", "The daemons, by the address they are scraped at."),
        chosen(
            "namespace", "Namespace", 'voxcache_tier_bytes{instance=~"$node"}, namespace', "Whose share of the tiers."
        ),
    ]


def _common(panel: Any, title: str, says: str, *, unit: str, width: int, height: int) -> None:
    panel.title(title).description(says).datasource(SOURCE).unit(unit).span(width).height(height)


def _target(
    query: Query, place: int, *, instant: bool = False, shape: PromQueryFormat = PromQueryFormat.TIME_SERIES
) -> prometheus.Dataquery:
    result = prometheus.Dataquery().expr(scoped(query.expr)).ref_id(chr(65 + place)).legend_format(query.legend)
    if query.exemplars:
        result.exemplar(True)
    return (result.instant() if instant else result.range()).format(shape)


def _fixed(colour: str) -> dict[str, str]:
    return {"mode": "fixed", "fixedColor": colour}


def _thresholds(states: Sequence[State]) -> dashboard.ThresholdsConfig:
    steps = [model.Threshold(state.least, state.colour) for state in states]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _mappings(states: Sequence[State], empty: str) -> list[Any]:
    """Grafana takes the first that fits, so the highest comes first; it takes a bound of null for 0, so none is."""
    result: list[Any] = []
    for place, state in enumerate(reversed(states)):
        shown = model.ValueMappingResult(text=state.says, color=state.colour, index=place)
        least = -_FAR if state.least is None else state.least
        result.append(model.RangeMap(model.DashboardRangeMapOptions(least, _FAR, shown)))
    nothing = model.ValueMappingResult(text=empty, color=QUIET, index=len(states))
    match = model.SpecialValueMatch.NULL_AND_NAN
    result.append(model.SpecialValueMap(model.DashboardSpecialValueMapOptions(match, nothing)))
    return result
