"""Graphs over time as SVG: curves and lanes, with the look that a panel's JSON asks for."""

import html
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from deploy.monitoring.evaluate import Shown, Window
from deploy.monitoring.figures import SERIES, colour, mapped, styles, ticks, written
from deploy.monitoring.prometheus import SCRAPE_SECONDS, Series

_INK, _GRID = "#5b6470", "#e6e9ed"
_GAP = 5 * SCRAPE_SECONDS  # a longer silence is a hole in the line


def text(x: float, y: float, content: str, anchor: str = "start", size: int = 11, fill: str = _INK) -> str:
    """A line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">'
        f"{html.escape(content)}</text>"
    )


def _time_axis(window: Window, left: float, right: float, top: float, bottom: float) -> list[str]:
    span = window.end - window.start
    step = next(s for s in (5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 10**9) if span / s * 62 <= right - left)
    parts = []
    moment = math.ceil(window.start / step) * step
    while moment <= window.end:
        x = left + (moment - window.start) / span * (right - left)
        label = datetime.fromtimestamp(moment, UTC).strftime("%H:%M:%S" if step < 60 else "%H:%M")
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{_GRID}"/>')
        if left + 18 < x < right - 14:
            parts.append(text(x, bottom + 14, label, "middle", 10))
        moment += step
    return parts


def _named(shown: Shown) -> list[tuple[str, Series]]:
    return [one for answer in shown.answers for one in answer.series]


def curves(shown: Shown, width: float, height: float, window: Window) -> str:
    """Lines with axes and a legend that says the last value."""
    panel, defaults = shown.panel, shown.panel["fieldConfig"]["defaults"]
    custom, unit, special = defaults["custom"], defaults.get("unit", "none"), styles(panel)
    series = _named(shown)
    values = [v for _, one in series for _, v in one.points if math.isfinite(v)]
    low = defaults.get("min", min(values, default=0.0))
    high = defaults.get("max", max(values, default=1.0))
    marks = ticks(low, high) if high > low else [low, low + 1]
    low, high = marks[0], marks[-1]
    legend, rows = _legend(series, special, width, unit, defaults.get("decimals"))
    labels = [written(mark, unit, None if unit != "percentunit" else 0) for mark in marks]
    left, right, top, bottom = 14 + 6.2 * max(map(len, labels)), width - 8, 6.0, height - 22 - 17 * rows
    parts = _time_axis(window, left, right, top, bottom)

    def place(moment: float, value: float) -> tuple[float, float]:
        x = left + (moment - window.start) / (window.end - window.start) * (right - left)
        return x, bottom - (min(value, high) - low) / (high - low) * (bottom - top)

    for mark, label in zip(marks, labels, strict=True):
        y = place(window.start, mark)[1]
        parts.append(f'<line x1="{left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts.append(text(left - 5, y + 4, label, "end", 10))
    for index, (name, one) in enumerate(series):
        style = special.get(name, {})
        stroke = _series_colour(index, style)
        steps = custom.get("lineInterpolation") == "stepAfter"
        fill = style.get("custom.fillOpacity", custom.get("fillOpacity", 0)) / 100
        dash = ' stroke-dasharray="6 5"' if "custom.lineStyle" in style else ""
        for run in _runs(one, window):
            path = _path([place(*point) for point in run], steps)
            if fill:
                x0, x1 = place(*run[0])[0], place(*run[-1])[0]
                area = f"{path} L{x1:.1f},{bottom:.1f} L{x0:.1f},{bottom:.1f} Z"
                parts.append(f'<path d="{area}" fill="{stroke}" fill-opacity="{fill:.2f}" stroke="none"/>')
            parts.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="2"{dash}/>')
    return _svg(width, height, [*parts, _at(0, height - 17 * rows - 2, legend)])


def lanes(shown: Shown, width: float, height: float, window: Window) -> str:
    """One lane a series; equal neighbours are one bar."""
    defaults, series = shown.panel["fieldConfig"]["defaults"], _named(shown)
    words = [result for mapping in defaults.get("mappings") or () for result in mapping["options"].values()]
    words.sort(key=lambda word: word["index"])
    special = styles(shown.panel)
    left = 14.0 + max((7 * len(name) for name, _ in series), default=0) * 0.92
    right, top, bottom = width - 8, 4.0, height - 37
    parts = _time_axis(window, left, right, top, bottom)
    pitch = (bottom - top) / max(1, len(series))
    for index, (name, one) in enumerate(series):
        y = top + index * pitch
        parts.append(text(left - 7, y + pitch / 2 + 4, name, "end"))
        parts.append(f'<line x1="{left}" x2="{right:.1f}" y1="{y + pitch:.1f}" y2="{y + pitch:.1f}" stroke="{_GRID}"/>')
        for begin, end, value in _spans(one, window):
            found = mapped(value, defaults | special.get(name, {})) or (f"{value:g}", "#c3c9d1")
            x0 = left + (begin - window.start) / (window.end - window.start) * (right - left)
            x1 = left + (end - window.start) / (window.end - window.start) * (right - left)
            parts.append(
                f'<rect x="{x0:.1f}" y="{y + 0.1 * pitch:.1f}" width="{max(1.5, x1 - x0):.1f}" '
                f'height="{0.8 * pitch:.1f}" rx="2" fill="{found[1]}" fill-opacity="0.88"/>'
            )
            if x1 - x0 > 6.6 * len(found[0]) + 6:
                ink = _INK if name in special else "#ffffff"
                parts.append(text((x0 + x1) / 2, y + pitch / 2 + 4, found[0], "middle", 11, ink))
    x, legend = left, ""
    for word in words:
        legend += f'<rect x="{x:.1f}" y="-9" width="11" height="11" rx="2" fill="{colour(word["color"])}"/>'
        legend += text(x + 16, 1, word["text"])
        x += 34 + 6.3 * len(word["text"])
    return _svg(width, height, [*parts, _at(0, height - 5, legend)])


def _legend(
    series: Sequence[tuple[str, Series]], special: Mapping[str, Any], width: float, unit: str, decimals: float | None
) -> tuple[str, int]:
    """The legend's SVG and how many lines it takes."""
    x, row, parts = 12.0, 0, []
    for index, (name, one) in enumerate(series):
        label = f"{name or 'value'}  {written(one.last, unit, decimals)}"
        if x + 30 + 6.3 * len(label) > width and x > 12:
            x, row = 12.0, row + 1
        stroke = _series_colour(index, special.get(name, {}))
        parts.append(
            f'<rect x="{x:.1f}" y="{17 * row + 5}" width="14" height="4" rx="2" fill="{stroke}"/>'
            + text(x + 19, 17 * row + 11, label)
        )
        x += 36 + 6.3 * len(label)
    return "".join(parts), row + 1


def _series_colour(index: int, style: Mapping[str, Any]) -> str:
    fixed = style.get("color", {}).get("fixedColor")
    return colour(fixed) if fixed else SERIES[index % len(SERIES)]


def _runs(series: Series, window: Window) -> list[list[tuple[float, float]]]:
    """Stretches without a hole."""
    runs: list[list[tuple[float, float]]] = []
    for point in series.points:
        if math.isnan(point[1]):
            continue
        if runs and point[0] - runs[-1][-1][0] <= max(_GAP, 2.5 * window.step):
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def _spans(series: Series, window: Window) -> list[tuple[float, float, float]]:
    """(begin, end, value) of equal neighbours."""
    spans: list[tuple[float, float, float]] = []
    for moment, value in series.points:
        if spans and spans[-1][2] == value and moment - spans[-1][1] <= 2.5 * window.step:
            spans[-1] = (spans[-1][0], moment, value)
        else:
            if spans and moment - spans[-1][1] <= 2.5 * window.step:
                spans[-1] = (spans[-1][0], moment, spans[-1][2])
            spans.append((moment, moment, value))
    return spans


def _path(points: Sequence[tuple[float, float]], steps: bool) -> str:
    parts = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for before, (x, y) in pairwise(points):
        if steps and y != before[1]:
            parts.append(f"L{x:.1f},{before[1]:.1f}")
        parts.append(f"L{x:.1f},{y:.1f}")
    return " ".join(parts)


def _at(x: float, y: float, content: str) -> str:
    return f'<g transform="translate({x:.1f},{y:.1f})">{content}</g>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg width="{width:.0f}" height="{height:.0f}">{"".join(parts)}</svg>'
