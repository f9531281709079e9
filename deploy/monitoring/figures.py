"""Numbers as a person reads them, and the colours that thresholds and mappings give them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {
    "green": "#3d9a50",
    "semi-dark-green": "#37872d",
    "orange": "#f2830a",
    "red": "#d9303e",
    "blue": "#3b78d8",
    "semi-dark-blue": "#1f57b5",
    "purple": "#8f4fc4",
    "yellow": "#d8a800",
    "transparent": "transparent",
}
SERIES = ("#3b78d8", "#f2830a", "#3d9a50", "#8f4fc4", "#12939a", "#c2527a", "#7a6a4f", "#d8a800", "#607d8b")
"""In the order of series."""

_TIMES = ((86_400 * 365, "years"), (86_400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def colour(name: str) -> str:
    """A colour as CSS knows it."""
    return COLOURS.get(name, name)


def written(value: float, unit: str, decimals: float | None = None) -> str:
    """The value with its unit."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if unit == "percentunit":
        return f"{100 * value:.{int(decimals or 0)}f} %"
    if unit == "s":
        return _scaled(value, "s", _TIMES, decimals)
    if unit in ("bytes", "Bps"):
        return _scaled(value, "B", _BYTES, decimals) + ("/s" if unit == "Bps" else "")
    if decimals is not None:
        return f"{value:,.{int(decimals)}f}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"


def _scaled(value: float, base: str, scale: Sequence[tuple[float, str]], decimals: float | None) -> str:
    factor, name = next(((f, n) for f, n in scale if abs(value) >= f), (1.0, base))
    amount = value / factor
    digits = 0 if name == "B" else int(decimals) if decimals is not None and abs(amount) < 10 else 1
    text = f"{amount:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {name}"


def mapped(value: float, defaults: Mapping[str, Any]) -> tuple[str, str] | None:
    """(text, colour) of an exact value that the panel has words for."""
    for mapping in defaults.get("mappings") or ():
        found = mapping["options"].get(f"{value:g}")
        if found is not None:
            return found.get("text", ""), colour(found.get("color", "blue"))
    return None


def styles(panel: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a panel overrides for single series or columns, by name."""
    return {
        override["matcher"]["options"]: {prop["id"]: prop["value"] for prop in override["properties"]}
        for override in panel["fieldConfig"].get("overrides", ())
    }


def threshold_colour(value: float, defaults: Mapping[str, Any]) -> str:
    """The colour of the highest step that the value has reached."""
    steps = defaults["thresholds"]["steps"]
    chosen: str = steps[0]["color"]
    for step in steps[1:]:
        if not math.isnan(value) and value >= step["value"]:
            chosen = step["color"]
    return colour(chosen)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover low..high."""
    span = (high - low) or 1.0
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = magnitude * next(factor for factor in (1, 2, 2.5, 5, 10) if raw <= factor * magnitude * 1.0001)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, last + 1)]
