"""Pictures are well-formed, stay inside their frame and say in words what they show."""

import xml.etree.ElementTree as ET

import pytest
from markupsafe import Markup

from services.cli.drawing import WIDTH, Axes, Point, Series, bars, grid, lines, nice_ticks


def parse(svg: Markup) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314  # our own text


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(-0.3, 40.3)[0] == 0
    assert nice_ticks(3, 3) == [3]


def test_lines_stay_in_the_frame_and_are_described() -> None:
    points = tuple(Point(x, x / 10, max(0.0, x / 10 - 0.2), min(1.0, x / 10 + 0.2)) for x in range(11))
    axes = Axes("round", "ε", (0, 10), (0, 1), rule=(0.5, "half"))
    picture = lines(
        "Title <b>", "Words & more", axes, [Series("one", points, 0), Series("two", points, 1, listed=False)]
    )
    root = parse(picture.svg)
    assert [root.findtext("title"), root.findtext("desc")] == ["Title <b>", "Words & more"]
    for line in root.iter("polyline"):
        for pair in line.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= axes.height
    assert [key.name for key in picture.keys] == ["one"]


def test_the_grid_shows_only_the_words_it_uses() -> None:
    picture = grid("t", "d", ["alice", "bob"], [1, 2, 3], [["cohort"] * 3, ["absent", "left out", "cohort"]])
    assert [key.name for key in picture.keys] == ["in the sum", "submitted, left out by a pod", "did not submit"]
    parse(picture.svg)


def test_bars_are_as_long_as_their_seconds() -> None:
    rows = [(number, {"a": 2.0, "b": 1.0 * number}) for number in range(1, 101)]
    root = parse(bars("t", "d", rows, ["a", "b"]).svg)
    wide = [float(found.get("width", "")) for found in root.iter("rect")]
    assert len(wide) == 200
    assert wide[-1] == pytest.approx(50 * wide[-2], rel=0.05)
    assert max(float(found.get("x", "")) + float(found.get("width", "")) for found in root.iter("rect")) <= WIDTH


def test_names_from_the_evidence_are_escaped() -> None:
    picture = grid("t", "d", ["<script>x"], [1], [["cohort"]])
    assert "<script" not in picture.svg
    assert "&lt;script" in picture.svg
