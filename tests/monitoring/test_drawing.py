"""Figures and tables as a person reads them in the pictures of dashboards."""

import math
from typing import Any

import pytest

from deploy.monitoring.draw import table_rows
from deploy.monitoring.evaluate import Answer, Shown
from deploy.monitoring.figures import mapped, threshold_colour, ticks, written
from deploy.monitoring.prometheus import Series


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "text"),
    [
        (0.6951, "percentunit", 1, "69.5 %"),
        (0.0275, "s", 2, "27.5 ms"),
        (7_776_000, "s", None, "90 days"),
        (90, "s", None, "1.5 min"),
        (0, "s", 2, "0 s"),
        (196_000, "bytes", None, "191.4 KiB"),
        (0, "bytes", None, "0 B"),
        (2048, "Bps", None, "2 KiB/s"),
        (7, "none", None, "7"),
        (4.8412, "none", 2, "4.84"),
        (math.inf, "none", 2, "∞"),
        (math.nan, "none", 2, "–"),
    ],
)
def test_values_are_written_with_their_unit(value: float, unit: str, decimals: int | None, text: str) -> None:
    assert written(value, unit, decimals) == text


def test_a_threshold_is_reached_at_its_value() -> None:
    steps = [{"value": None, "color": "#00f"}, {"value": 0, "color": "#f80"}, {"value": 1, "color": "#0f0"}]
    found = [threshold_colour(value, {"thresholds": {"steps": steps}}) for value in (-1, 0, 0.99, 1, math.nan)]
    assert found == ["#00f", "#f80", "#f80", "#0f0", "#00f"]


def test_words_stand_for_exact_values_only() -> None:
    defaults = {"mappings": [{"type": "value", "options": {"1": {"text": "up", "color": "#0f0"}}}]}
    assert mapped(1.0, defaults) == ("up", "#0f0")
    assert mapped(1.5, defaults) is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 8), (0, 5.76), (0, 97_000), (0.2, 0.9)])
def test_ticks_are_few_ascending_and_cover_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 8
    assert found[0] <= low < high <= found[-1]
    assert found == sorted(set(found))


def test_a_table_joins_its_queries_by_their_labels_in_the_order_of_its_columns() -> None:
    panel: dict[str, Any] = {
        "fieldConfig": {"defaults": {"unit": "none"}},
        "transformations": [
            {
                "id": "organize",
                "options": {
                    "indexByName": {"member": 0, "Value #A": 1, "Value #B": 2},
                    "renameByName": {"Value #A": "round", "Value #B": "up", "member": "who"},
                },
            }
        ],
    }

    def answer(ref: str, **values: float) -> Answer:
        return Answer(ref, "", [("", Series({"member": name, "job": "x"}, [(0, v)])) for name, v in values.items()])

    headings, rows = table_rows(Shown(panel, [answer("A", bob=3, alice=7), answer("B", alice=1)]))
    assert headings == ["who", "round", "up"]
    assert rows == [[("alice", None), ("7", 7), ("1", 1)], [("bob", None), ("3", 3), ("", None)]]
