"""A dashboard as one self-contained page: each panel where its grid place is, drawn from its own JSON and answers.

This is not Grafana: it draws what Grafana would be given, so that a person can look at the content of a dashboard
where no Grafana is. Nothing is loaded from outside, and no script runs.
"""

import html
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from deploy.monitoring import graphs
from deploy.monitoring.evaluate import Shown, Window
from deploy.monitoring.figures import colour, mapped, styles, threshold_colour, written

_COLUMN, _ROW, _SPACE = 58, 36, 8
WIDTH = 24 * _COLUMN + _SPACE

_STYLE = """
body{margin:0;background:#f2f4f7;font-family:"DejaVu Sans","Segoe UI",Helvetica,Arial,sans-serif;color:#1f2733}
header{padding:14px 18px 4px}h1{font-size:19px;margin:0 0 3px}header p{margin:0;font-size:12px;color:#5b6470}
main{position:relative;margin:0 0 10px}
section{position:absolute;background:#fff;border:1px solid #dfe3e8;border-radius:6px}
section{box-sizing:border-box;overflow:hidden}
h2{font-size:12.5px;margin:7px 10px 0;font-weight:600;color:#2b3440;white-space:nowrap}
.big{display:flex;justify-content:space-around;align-items:center;text-align:center}
.big b{display:block;font-weight:600;line-height:1.1}.big span{font-size:11px;color:#5b6470}
table{border-collapse:collapse;width:100%;font-size:11.5px}th{text-align:left;color:#5b6470;font-weight:600}
th,td{padding:4px 10px;border-bottom:1px solid #eceff2;white-space:nowrap}
.bars{font-size:11.5px;padding:2px 10px}.bars div{display:flex;align-items:center}
.bars i{flex:1;background:#edf0f3;border-radius:3px;margin:0 8px;height:60%}
.bars i u{display:block;height:100%;border-radius:3px}
.bars span{width:44%;text-align:right;white-space:nowrap;overflow:hidden}
.bars em{font-style:normal;font-weight:600;white-space:nowrap}
.none{color:#8a929c;text-align:center;padding-top:20px;font-size:12px}
"""


def page(dashboard: Mapping[str, Any], shown: Sequence[Shown], window: Window, note: str) -> str:
    """The page; `note` says where the figures come from."""
    boxes = []
    bottom = 0
    for one in shown:
        place = one.panel["gridPos"]
        width, height = place["w"] * _COLUMN - _SPACE, place["h"] * _ROW - _SPACE
        bottom = max(bottom, (place["y"] + place["h"]) * _ROW)
        where = f"left:{place['x'] * _COLUMN + _SPACE}px;top:{place['y'] * _ROW}px;width:{width}px;height:{height}px"
        title, about = html.escape(one.panel["title"]), html.escape(one.panel.get("description", ""), quote=True)
        inner = _body(one, width - 2, height - 28, window)
        boxes.append(f'<section style="{where}" title="{about}"><h2>{title}</h2>{inner}</section>')
    times = [datetime.fromtimestamp(edge, UTC).strftime("%H:%M:%S") for edge in (window.start, window.end)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(dashboard["title"])}</title>'
        f"<style>{_STYLE}</style><body><header><h1>{html.escape(dashboard['title'])}</h1>"
        f"<p>{html.escape(dashboard['description'])} {times[0]} to {times[1]} UTC. {html.escape(note)}</p></header>"
        f'<main style="height:{bottom}px;width:{WIDTH}px">{"".join(boxes)}</main></body></html>\n'
    )


def height_of(dashboard: Mapping[str, Any]) -> int:
    """Pixels of the whole page."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    return int(rows) * _ROW + 66


def _body(shown: Shown, width: float, height: float, window: Window) -> str:
    match shown.panel["type"]:
        case _ if all(answer.empty for answer in shown.answers):
            return '<div class="none">No data</div>'
        case "timeseries":
            return graphs.curves(shown, width, height, window)
        case "state-timeline":
            return graphs.lanes(shown, width, height, window)
        case "gauge":
            return _gauge(shown, width, height)
        case "bargauge":
            return _bars(shown, height)
        case "table":
            return _table(shown)
        case _:
            return _numbers(shown, width, height)


def _values(shown: Shown) -> list[tuple[str, float]]:
    return [
        (name, series.last) for answer in shown.answers for name, series in answer.series if not math.isnan(series.last)
    ]


def _numbers(shown: Shown, width: float, height: float) -> str:
    defaults, options = shown.panel["fieldConfig"]["defaults"], shown.panel["options"]
    unit, decimals, mode = defaults.get("unit", "none"), defaults.get("decimals"), options["textMode"]
    parts, values = [], _values(shown)
    for name, value in values:
        words = mapped(value, defaults)
        figure, ink = words or (written(value, unit, decimals), threshold_colour(value, defaults))
        figure = name if mode == "name" else figure
        size = min(0.42 * height, 44, 1.55 * (width / max(1, len(values)) - 16) / max(2, len(figure)))
        below = f"<span>{html.escape(name)}</span>" if mode == "value_and_name" else ""
        parts.append(f'<div><b style="font-size:{size:.0f}px;color:{ink}">{html.escape(figure)}</b>{below}</div>')
    return f'<div class="big" style="height:{height - 4:.0f}px">{"".join(parts)}</div>'


def _gauge(shown: Shown, width: float, height: float) -> str:
    defaults = shown.panel["fieldConfig"]["defaults"]
    most, steps = defaults.get("max", 1.0), defaults["thresholds"]["steps"]
    values = _values(shown)
    share = width / max(1, len(values))
    parts = []
    for index, (name, value) in enumerate(values):
        x, y, radius = share * (index + 0.5), height * 0.74, min(share * 0.36, height * 0.58)
        parts.append(_arc(x, y, radius, 0, 1, "#edf0f3", 0.24 * radius))
        part = min(1.0, max(0.0, value / most))
        ink = threshold_colour(value, defaults)
        if part > 0:
            parts.append(_arc(x, y, radius, 0, part, ink, 0.24 * radius))
        edges = [0.0, *(step["value"] / most for step in steps[1:]), 1.0]
        for step, begin, end in zip(steps, edges, edges[1:], strict=False):
            parts.append(_arc(x, y, radius * 1.19, begin, end, colour(step["color"]), 0.05 * radius))
        figure = written(value, defaults.get("unit", "none"), defaults.get("decimals"))
        parts.append(graphs.text(x, y - 2, figure, "middle", int(0.38 * radius), ink))
        parts.append(graphs.text(x, y + 0.28 * radius + 6, name, "middle", 12))
    return f'<svg width="{width:.0f}" height="{height:.0f}">{"".join(parts)}</svg>'


def _arc(x: float, y: float, radius: float, begin: float, end: float, ink: str, thick: float) -> str:
    """Part begin..end of the half circle over (x, y), left to right."""
    points = [(x - radius * math.cos(math.pi * part), y - radius * math.sin(math.pi * part)) for part in (begin, end)]
    (x0, y0), (x1, y1) = points
    return (
        f'<path d="M{x0:.1f},{y0:.1f} A{radius:.1f},{radius:.1f} 0 0 1 {x1:.1f},{y1:.1f}" fill="none" '
        f'stroke="{ink}" stroke-width="{thick:.1f}"/>'
    )


def _bars(shown: Shown, height: float) -> str:
    defaults, values = shown.panel["fieldConfig"]["defaults"], _values(shown)
    most = max((value for _, value in values), default=0.0) or 1.0
    pitch = min(34.0, (height - 8) / max(1, len(values)))
    by_threshold = defaults.get("color", {}).get("mode") == "thresholds"
    figures = [written(value, defaults.get("unit", "none"), defaults.get("decimals")) for _, value in values]
    room = 8 * max(map(len, figures), default=0) + 2
    rows = []
    for (name, value), figure in zip(values, figures, strict=True):
        ink = threshold_colour(value, defaults) if by_threshold else "#3b78d8"
        bar = f'<i><u style="width:{100 * value / most:.1f}%;background:{ink}"></u></i>'
        rows.append(
            f'<div style="height:{pitch:.0f}px"><span>{html.escape(name)}</span>{bar}'
            f'<em style="color:{ink};width:{room}px">{html.escape(figure)}</em></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def table_rows(shown: Shown) -> tuple[list[str], list[list[tuple[str, float | None]]]]:
    """(headings, rows) after the panel's transformations: answers merged by their labels, columns chosen and named.

    A cell is (text, value): the value where it is a figure.
    """
    options = next(change["options"] for change in shown.panel["transformations"] if change["id"] == "organize")
    order: dict[str, int] = options["indexByName"]
    renamed = {name: str(options["renameByName"][name]) for name in sorted(order, key=order.__getitem__)}
    merged: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for answer in shown.answers:
        column = "Value" if len(shown.answers) == 1 else f"Value #{answer.ref}"
        for _, series in answer.series:
            labels = tuple(sorted((key, value) for key, value in series.labels.items() if key in renamed))
            merged.setdefault(labels, {})[column] = series.last
    defaults = shown.panel["fieldConfig"]["defaults"]
    rows = []
    for labels, values in sorted(merged.items(), key=lambda item: [dict(item[0]).get(name, "") for name in renamed]):
        row: list[tuple[str, float | None]] = []
        for column in renamed:
            value = values.get(column)
            words = "" if value is None else written(value, defaults.get("unit", "none"), defaults.get("decimals"))
            row.append((dict(labels).get(column, words), value))
        rows.append(row)
    return list(renamed.values()), rows


def _table(shown: Shown) -> str:
    headings, rows = table_rows(shown)
    special = styles(shown.panel)
    defaults = shown.panel["fieldConfig"]["defaults"]
    lines = ["<tr>" + "".join(f"<th>{html.escape(heading)}</th>" for heading in headings) + "</tr>"]
    for row in rows:
        cells = []
        for heading, (words, value) in zip(headings, row, strict=True):
            known = None if value is None else mapped(value, special.get(heading, {}))
            if known is None and value is not None and len(defaults["thresholds"]["steps"]) > 1:
                known = words, threshold_colour(value, defaults)
            shown_words, ink = known or (words, "inherit")
            weight = ";font-weight:600" if known else ""
            cells.append(f'<td style="color:{ink}{weight}">{html.escape(shown_words)}</td>')
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"
