"""How a panel of Wardround looks: every one has a title, a description, a unit, thresholds and a place.

A dashboard is a list of panels with explicit places on Grafana's grid of 24 columns, so that what belongs together
stays together. Queries are PromQL of Prometheus 2.42; `$job` is the process (or processes) that a person chose, and
`$__range`, `$__rate_interval` are Grafana's.
"""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, gauge, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, ORANGE, RED, BLUE, GRAY, PURPLE = "green", "orange", "red", "blue", "#8e8e8e", "purple"

Place = tuple[int, int, int, int]
"""x, y, width, height on the grid."""
Words = Mapping[int, tuple[str, str]]
"""Exact values to (text, colour)."""
Steps = Sequence[tuple[float | None, str]]
"""Thresholds: from which value on (None = from below) which colour."""
CALM: Steps = ((None, BLUE),)
NONE_IS_GOOD: Steps = ((None, GREEN), (1, RED))
YES_IS_GOOD: Steps = ((None, RED), (1, GREEN))


@dataclass(frozen=True)
class Query:
    """PromQL and what its series are called (`{{label}}`)."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Look:
    """What all panels share. `words` map exact values to (text, colour)."""

    place: Place
    title: str
    about: str
    unit: str
    steps: Steps = CALM
    decimals: int | None = None
    words: Words | None = None


def _dressed(panel: Any, look: Look, queries: Sequence[Query], *, instant: bool, as_table: bool = False) -> Any:
    x, y, width, height = look.place
    panel.title(look.title).description(look.about).unit(look.unit).datasource(SOURCE)
    panel.grid_pos(models.GridPos(x=x, y=y, w=width, h=height))
    steps = [models.Threshold(value=value, color=colour) for value, colour in look.steps]
    panel.thresholds(board.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    if look.decimals is not None:
        panel.decimals(look.decimals)
    if look.words:
        panel.mappings([_mapping(look.words)])
    for name, query in zip(string.ascii_uppercase, queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(name).datasource(SOURCE)
        if as_table:
            target.format(PromQueryFormat.TABLE)
        panel.with_target(target.instant() if instant else target.range())
    return panel


def _mapping(words: Words) -> models.ValueMap:
    return models.ValueMap(
        options={
            str(value): models.ValueMappingResult(text=text, color=colour, index=index)
            for index, (value, (text, colour)) in enumerate(words.items())
        }
    )


def _coloured(panel: Any, by_threshold: bool) -> Any:
    mode = models.FieldColorModeId.THRESHOLDS if by_threshold else models.FieldColorModeId.PALETTE_CLASSIC
    return panel.color_scheme(board.FieldColor().mode(mode))


def _last() -> Any:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def number(look: Look, *queries: Query, name: bool = False, only_name: bool = False) -> Any:
    """One figure, or a few with their names; `only_name` shows a label instead of the value."""
    mode = common_models.BigValueTextMode
    text = mode.NAME if only_name else mode.VALUE_AND_NAME if name else mode.VALUE
    panel = stat.Panel().graph_mode(common_models.BigValueGraphMode.NONE).reduce_options(_last()).text_mode(text)
    panel.color_mode(common_models.BigValueColorMode.VALUE).justify_mode(common_models.BigValueJustifyMode.CENTER)
    return _dressed(_coloured(panel, True), look, queries, instant=True)


def dial(look: Look, query: Query, most: float = 1.0) -> Any:
    """A gauge from 0 to `most`."""
    panel = gauge.Panel().reduce_options(_last()).min(0).max(most)
    panel.show_threshold_markers(True).show_threshold_labels(False)
    return _dressed(_coloured(panel, True), look, (query,), instant=True)


def bars(look: Look, *queries: Query, by_threshold: bool = True) -> Any:
    """Horizontal bars, one a series."""
    panel = bargauge.Panel().reduce_options(_last()).orientation(common_models.VizOrientation.HORIZONTAL).min(0)
    panel.display_mode(common_models.BarGaugeDisplayMode.BASIC).show_unfilled(True)
    return _dressed(_coloured(panel, by_threshold), look, queries, instant=True)


def curves(
    look: Look,
    *queries: Query,
    steps: bool = False,
    least: float | None = 0,
    most: float | None = None,
    limit: str = "",
) -> Any:
    """Lines over time. `limit` names the series that is drawn as a dashed red line."""
    step, line = common_models.LineInterpolation.STEP_AFTER, common_models.LineInterpolation.LINEAR
    panel = timeseries.Panel().line_interpolation(step if steps else line).line_width(2)
    panel.fill_opacity(0).show_points(common_models.VisibilityMode.NEVER).span_nulls(False)
    legend = common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.LIST).show_legend(True)
    panel.legend(legend.placement(common_models.LegendPlacement.BOTTOM).calcs(["lastNotNull"]))
    panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    if limit:
        panel.override_by_name(
            limit,
            [
                models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": RED}),
                models.DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 8]}),
                models.DynamicConfigValue(id_val="custom.fillOpacity", value=0),
            ],
        )
    return _dressed(_coloured(panel, False), look, queries, instant=False)


def lanes(look: Look, *queries: Query, counting: Sequence[str] = ()) -> Any:
    """One lane a series over time, coloured by `look.words`; `counting` names lanes whose figure itself is shown."""
    panel = statetimeline.Panel().merge_values(True).line_width(0).fill_opacity(85).row_height(0.85)
    panel.show_value(common_models.VisibilityMode.AUTO)
    for name in counting:
        plain = {"mappings": [], "color": {"mode": "fixed", "fixedColor": GRAY}}
        panel.override_by_name(name, [models.DynamicConfigValue(key, value) for key, value in plain.items()])
    legend = common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.LIST).show_legend(True)
    panel.legend(legend.placement(common_models.LegendPlacement.BOTTOM))
    return _dressed(_coloured(panel, True), look, queries, instant=False)


def listing(look: Look, *queries: Query, columns: Mapping[str, str], words: Mapping[str, Words] | None = None) -> Any:
    """A table. `columns`: label, or `Value #A` of a query, to the heading; in this order, everything else hidden.

    `words` give the values of a column, by its heading, texts and colours.
    """
    panel = table.Panel().show_header(True)
    _dressed(_coloured(panel, True), look, queries, instant=True, as_table=True)
    for heading, results in (words or {}).items():
        panel.override_by_name(heading, [models.DynamicConfigValue(id_val="mappings", value=[_mapping(results)])])
    keep = {"include": {"names": list(columns)}}
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(models.DataTransformerConfig(id_val="filterFieldsByName", options=keep))
    order = {name: index for index, name in enumerate(columns)}
    renamed = {"indexByName": order, "renameByName": dict(columns), "excludeByName": {}}
    return panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=renamed))


def or_none(expr: str, label: str) -> str:
    """`expr`, or one series called `none` with 0 where it is empty: an empty panel would look like a broken one."""
    return f'{expr} or on () label_replace(vector(0), "{label}", "none", "", "")'


def dashboard(uid: str, title: str, about: str, role: str, panels: Sequence[Any], *, many: bool = False) -> str:
    """The JSON of a dashboard about processes of `role`; `many`: several may be looked at together."""
    built = board.Dashboard(title).uid(uid).description(about).tags(["wardround"]).timezone("browser").editable()
    built.time("now-6h", "now").refresh("30s").tooltip(models.DashboardCursorSync.CROSSHAIR)
    built.with_variable(board.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    job = (
        board.QueryVariable("job").label(role).datasource(SOURCE).refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    )
    job.query(f'label_values(wardround_build_info{{role="{role}"}}, job)').sort(models.VariableSort.ALPHABETICAL_ASC)
    built.with_variable(job.multi(True).include_all(True) if many else job)
    for number_of, panel in enumerate(panels, 1):
        built.with_panel(panel.id(number_of))
    text = json.dumps(built.build(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False)
    return text + "\n"
