"""Pictures of the report as inline SVG: data in, markup out. Pure; colours and fonts are the style sheet's.

A picture is 360 units wide, about the width of a phone, so its text keeps its size there. Every picture has a title
and a description for those who do not see it, and names its classes; nothing in it depends on colour alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 10, 12, 34
_HUES = 8  # the style sheet has h0 … h7
_MARKS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")
_DODGE = 4.0  # beside each other, so that intervals at one x are told apart
_DASHES = ("", "6 3", "2 3")
CELLS = {
    "cohort": "in the sum",
    "left out": "submitted, left out by a pod",
    "submitted": "submitted, no sum was opened",
    "declined": "declined",
    "absent": "did not submit",
}
"""What a cell of `grid` may say, and the words for it."""


@dataclass(frozen=True)
class Point:
    """`low` and `high` bound the 95 % interval where one is known; `faint` where nobody can say how wide it is."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    faint: bool = False


@dataclass(frozen=True)
class Series:
    """One named line; those of one `hue` belong together. `step` holds the value until the next point.

    `joined` False draws marks only; `listed` False leaves it out of the legend; `dodge` moves it aside.
    """

    name: str
    points: tuple[Point, ...]
    hue: int
    dash: int = 0
    step: bool = False
    joined: bool = True
    listed: bool = True
    dodge: float = 0.0


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a little picture and its words."""

    swatch: Markup
    name: str


@dataclass(frozen=True)
class Picture:
    """Ready markup and its legend."""

    svg: Markup
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Axes:
    """The frame of a line picture; x and y are (least, most). `rule` = (y, words) draws a level."""

    x_label: str
    y_label: str
    x: tuple[float, float]
    y: tuple[float, float]
    rule: tuple[float, str] | None = None
    diagonal: bool = False
    height: int = 236
    whole_x: bool = True

    @property
    def top(self) -> int:
        """Where the plane begins: below the words for y."""
        return _TOP + (12 if self.y_label else 0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies in the picture."""
        wide, high = WIDTH - _LEFT - _RIGHT, self.height - self.top - _BOTTOM
        return (
            _LEFT + wide * (x - self.x[0]) / (self.x[1] - self.x[0]),
            self.top + high * (1 - (y - self.y[0]) / (self.y[1] - self.y[0])),
        )


def lines(title: str, description: str, axes: Axes, series: Sequence[Series]) -> Picture:
    """A picture of lines with their intervals."""
    body = [_frame(axes)]
    if axes.diagonal:
        body.append(_line((axes.place(axes.x[0], axes.y[0]), axes.place(axes.x[1], axes.y[1])), "rule"))
    if axes.rule is not None:
        y = axes.place(0, axes.rule[0])[1]
        body.append(_line(((_LEFT, y), (WIDTH - _RIGHT, y)), "rule"))
        body.append(_text(WIDTH - _RIGHT - 2, y - 4, axes.rule[1], "end", "note"))
    body += [_series(axes, one) for one in series]
    keys = tuple(Key(_swatch(one), one.name) for one in series if one.listed)
    return Picture(_svg(title, description, axes.height, body), keys)


def grid(
    title: str, description: str, rows: Sequence[str], columns: Sequence[int], cells: Sequence[Sequence[str]]
) -> Picture:
    """Rows of named things over numbered columns; `cells` are keys of `CELLS`."""
    left = 14 + 6.2 * max((len(name) for name in rows), default=0)
    left = min(left, 130)
    side = min(22.0, (WIDTH - left - _RIGHT) / max(1, len(columns)))
    height = int(_TOP + 22 * len(rows) + _BOTTOM)
    body = []
    for r, name in enumerate(rows):
        y = _TOP + 22 * r + 11
        body.append(_text(left - 6, y + 4, name if len(name) <= 18 else name[:17] + "…", "end"))
        body += [_cell(left + side * (c + 0.5), y, min(7.0, side * 0.4), word) for c, word in enumerate(cells[r])]
    for number in _few(columns, side):
        x = left + side * (columns.index(number) + 0.5)
        body.append(_text(x, height - _BOTTOM + 14, str(number), "middle"))
    body.append(_text(left + side * len(columns) / 2, height - 4, "round", "middle", "label"))
    used = [word for word in CELLS if any(word in row for row in cells)]
    keys = tuple(Key(_little(_cell(7, 7, 5.5, word)), CELLS[word]) for word in used)
    return Picture(_svg(title, description, height, body), keys)


def bars(title: str, description: str, rows: Sequence[tuple[int, dict[str, float]]], parts: Sequence[str]) -> Picture:
    """One bar a round, stacked by part, in seconds from the left."""
    thick = max(4.0, min(18.0, 420 / max(1, len(rows))))
    height = int(_TOP + thick * len(rows) + _BOTTOM)
    most = max((sum(row.values()) for _, row in rows), default=0.0) or 1.0
    ticks = nice_ticks(0, most)
    scale = (WIDTH - _LEFT - _RIGHT) / max(most, ticks[-1])
    body = []
    for tick in ticks:
        x = _LEFT + scale * tick
        body.append(_line(((x, _TOP), (x, height - _BOTTOM)), "grid"))
        body.append(_text(x, height - _BOTTOM + 14, _figure(tick), "middle"))
    for r, (number, row) in enumerate(rows):
        x, y = float(_LEFT), _TOP + thick * r
        if number in _few([one for one, _ in rows], thick):
            body.append(_text(_LEFT - 6, y + thick / 2 + 4, str(number), "end"))
        for part, name in enumerate(parts):
            wide = scale * row.get(name, 0.0)
            if wide > 0:
                body.append(_rectangle(x, y + thick * 0.12, wide, thick * 0.76, f"h{part % _HUES}"))
            x += wide
    body.append(
        _text((_LEFT + WIDTH - _RIGHT) / 2, height - 4, "seconds from the opening of the round", "middle", "label")
    )
    keys = tuple(Key(_little(_rectangle(1, 2, 12, 10, f"h{part % _HUES}")), name) for part, name in enumerate(parts))
    return Picture(_svg(title, description, height, body), keys)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` up to at most `high`; the first is ≥ low."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _cell(x: float, y: float, r: float, word: str) -> Markup:
    if word == "cohort":
        return Markup('<circle class="h0 full" cx="{}" cy="{}" r="{}"/>').format(_n(x), _n(y), _n(r))
    if word in ("left out", "submitted"):
        ring = Markup('<circle class="h{} ring" cx="{}" cy="{}" r="{}"/>').format(
            1 if word == "left out" else 4, _n(x), _n(y), _n(r * 0.85)
        )
        dot = Markup('<circle class="h1 full" cx="{}" cy="{}" r="{}"/>').format(_n(x), _n(y), _n(r * 0.35))
        return ring + dot if word == "left out" else ring
    if word == "declined":
        return _line(((x - r, y), (x + r, y)), "h3 stroke")
    d = r * 0.7
    return _line(((x - d, y - d), (x + d, y + d)), "h3 stroke") + _line(((x - d, y + d), (x + d, y - d)), "h3 stroke")


def _frame(axes: Axes) -> Markup:
    parts = []
    bottom = axes.height - _BOTTOM
    for tick in nice_ticks(*axes.y):
        y = axes.place(axes.x[0], tick)[1]
        parts.append(_line(((_LEFT, y), (WIDTH - _RIGHT, y)), "grid"))
        parts.append(_text(_LEFT - 6, y + 4, _figure(tick), "end"))
    for tick in nice_ticks(*axes.x, about=6):
        if axes.whole_x and tick != round(tick):
            continue
        parts.append(_text(axes.place(tick, axes.y[0])[0], bottom + 14, _figure(tick), "middle"))
    parts.append(_line(((_LEFT, bottom), (WIDTH - _RIGHT, bottom)), "axis"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, axes.height - 4, axes.x_label, "middle", "label"))
    if axes.y_label:
        parts.append(_text(2, _TOP, axes.y_label, "start", "label"))
    return Markup("").join(parts)


def _series(axes: Axes, one: Series) -> Markup:
    parts, hue = [], one.hue % _HUES
    at = [(x + _DODGE * one.dodge, y) for x, y in (axes.place(point.x, point.y) for point in one.points)]
    for point, (x, _) in zip(one.points, at, strict=True):
        if point.low is not None and point.high is not None:
            low, high = axes.place(point.x, point.low)[1], axes.place(point.x, point.high)[1]
            parts.append(_line(((x, low), (x, high)), f"h{hue} stroke whisker"))
            parts += [_line(((x - 2.5, y), (x + 2.5, y)), f"h{hue} stroke whisker") for y in (low, high)]
    if one.joined and len(at) > 1:
        path = list(at)
        if one.step:
            path = [at[0], *(corner for a, b in pairwise(at) for corner in ((b[0], a[1]), b))]
        parts.append(_line(path, f"h{hue} stroke", _DASHES[one.dash % len(_DASHES)]))
    parts += [_mark(x, y, hue, " faint" if point.faint else "") for point, (x, y) in zip(one.points, at, strict=True)]
    return Markup("").join(parts)


def _mark(x: float, y: float, hue: int, more: str = "") -> Markup:
    return _text(x, y + 4, _MARKS[hue], "middle", f"h{hue} mark{more}")


def _swatch(one: Series) -> Markup:
    hue = one.hue % _HUES
    line = _line(((0, 7), (24, 7)), f"h{hue} stroke", _DASHES[one.dash % len(_DASHES)]) if one.joined else Markup("")
    return _little(line + _mark(12, 7, hue), 24)


def _little(content: Markup, width: int = 14) -> Markup:
    return Markup('<svg class="swatch" width="{}" height="14" viewBox="0 0 {} 14" aria-hidden="true">{}</svg>').format(
        width, width, content
    )


def _svg(title: str, description: str, height: int, body: Iterable[Markup]) -> Markup:
    return Markup(
        '<svg class="picture" viewBox="0 0 {} {}" role="img"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(WIDTH, height, title, description, Markup("").join(body))


def _line(points: Iterable[tuple[float, float]], kind: str, dash: str = "") -> Markup:
    path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
    dashed = Markup(' stroke-dasharray="{}"').format(dash) if dash else ""
    return Markup('<polyline class="{}" points="{}"{}/>').format(kind, path, dashed)


def _rectangle(x: float, y: float, wide: float, high: float, kind: str) -> Markup:
    return Markup('<rect class="{} full" x="{}" y="{}" width="{}" height="{}"/>').format(
        kind, _n(x), _n(y), _n(wide), _n(high)
    )


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, _n(x), _n(y), anchor, escape(words)
    )


def _few(numbers: Sequence[int], step: float) -> list[int]:
    """As many of the numbers as find room at `step` units each."""
    every = max(1, math.ceil(18 / step))
    return list(numbers[::every])


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _figure(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e4 else f"{value:,.0f}"
