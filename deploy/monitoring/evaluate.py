"""Reads compiled dashboards as Grafana would: variables filled in, each panel's queries asked of a Prometheus."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.monitoring.prometheus import SCRAPE_SECONDS, Prometheus, Series

_POINTS = 400  # in a graph


@dataclass(frozen=True)
class Window:
    """The time shown, Unix seconds."""

    start: float
    end: float

    @property
    def step(self) -> float:
        """Between two points of a graph."""
        return max(float(SCRAPE_SECONDS), (self.end - self.start) / _POINTS)


@dataclass(frozen=True)
class Answer:
    """What one query of a panel gave: series with the names that the legend shows."""

    ref: str
    expr: str
    series: Sequence[tuple[str, Series]]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to see: no series, or none with a number."""
        return all(math.isnan(series.last) for _, series in self.series)


@dataclass(frozen=True)
class Shown:
    """One panel with its answers; `panel` is its JSON."""

    panel: Mapping[str, Any]
    answers: Sequence[Answer]


def load(path: Path) -> dict[str, Any]:
    """A compiled dashboard."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def fill_in(expr: str, job: str, window: Window) -> str:
    """The query with Grafana's variables replaced."""
    values = {
        "$job": job,
        "$__range": f"{math.ceil(window.end - window.start)}s",
        "$__rate_interval": f"{15 * SCRAPE_SECONDS}s",
    }
    for name, value in values.items():
        expr = expr.replace(name, value)
    return expr


def evaluate(dashboard: Mapping[str, Any], prometheus: Prometheus, job: str, window: Window) -> list[Shown]:
    """Every panel's answers. `job`: the chosen value of the variable, a regular expression where several may be."""
    return [
        Shown(panel, [_ask(target, prometheus, job, window) for target in panel["targets"]])
        for panel in dashboard["panels"]
    ]


def _ask(target: Mapping[str, Any], prometheus: Prometheus, job: str, window: Window) -> Answer:
    expr = fill_in(target["expr"], job, window)
    if target.get("instant"):
        found = prometheus.query(expr, window.end)
    else:
        found = prometheus.query_range(expr, window.start, window.end, window.step)
    legend = target.get("legendFormat") or ""
    return Answer(target["refId"], expr, [(_named(legend, series.labels), series) for series in found])


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), legend).strip()
