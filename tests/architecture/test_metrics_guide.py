"""docs/metrics.md and the code name the same metrics: type, labels, and a unit that the name bears out."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "metrics.md"
SECTIONS = {
    "services/common": "Every role",
    "services/aggregator": "Aggregator",
    "services/hospital_node": "Hospital node",
    "services/keyshare": "Key-share pod",
}
ELSEWHERE = {"wardround_memory_locked": "Key-share pod"}  # in common for whoever holds keys: that is the pod alone
TYPES = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram"}
MODULES = (
    "services.aggregator.metrics",
    "services.hospital_node.metrics",
    "services.keyshare.metrics",
)


def in_code() -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """(section, name, type, labels) of every metric that a service makes."""
    for path in sorted((ROOT / "services").rglob("*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            target.id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
            for target in node.targets
            if isinstance(target, ast.Name) and all(isinstance(item, ast.Constant) for item in node.value.elts)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in TYPES):
                continue
            if not (node.args and isinstance(node.args[0], ast.Constant)):
                continue  # collections.Counter
            name = ast.literal_eval(node.args[0])
            labels: list[str] = []
            if len(node.args) > 2:
                given = node.args[2]
                labels = constants[given.id] if isinstance(given, ast.Name) else ast.literal_eval(given)
            folder = "/".join(path.relative_to(ROOT).parts[:2])
            yield ELSEWHERE.get(name, SECTIONS[folder]), name, TYPES[node.func.id], tuple(labels)


def in_guide() -> Iterator[tuple[str, str, str, tuple[str, ...], str]]:
    section = ""
    for line in GUIDE.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `wardround_") and len(cells) == 5:
            labels = tuple(label.strip() for label in cells[2].split(",") if label.strip())
            yield section, cells[0].strip("`"), cells[1], labels, cells[3]


def test_guide_and_code_agree() -> None:
    assert sorted(row[:4] for row in in_guide()) == sorted(in_code())


def test_units_are_what_the_names_say() -> None:
    for _, name, kind, _, unit in in_guide():
        base = name.removesuffix("_total")
        assert (kind == "counter") == name.endswith("_total"), name
        if base.endswith("_timestamp_seconds"):
            assert unit == "Unix seconds", name
        else:
            assert (unit == "seconds") == base.endswith("_seconds"), name
            assert (unit == "images per second") == base.endswith("_images_per_second"), name
            assert (unit == "bytes") == base.endswith("_bytes"), name


def values() -> list[tuple[str, str, set[str]]]:
    rows = re.findall(r"^\| (\w+) \| `(\w+)` \| (.+) \|$", GUIDE.read_text(), re.MULTILINE)
    return [(label, metric, set(text.split(", "))) for label, metric, text in rows]


@pytest.mark.parametrize(("label", "metric", "listed"), values())
def test_closed_sets_are_those_that_exist_from_the_start(label: str, metric: str, listed: set[str]) -> None:
    """A fresh process shows every value at once, so that a rate never misses the first event."""
    for module in MODULES:
        importlib.import_module(module)
    found = {
        sample.labels[label]
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == metric and label in sample.labels
    }
    assert found == listed
