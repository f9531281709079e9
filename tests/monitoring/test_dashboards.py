"""The three dashboards: complete panels, queries that parse, and only metrics that the site has and the guide names."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from deploy.monitoring.build import DASHBOARDS, HELM
from deploy.monitoring.evaluate import Window, fill_in, load
from tests.architecture.test_metrics_guide import in_guide
from tests.monitoring.test_rules import needs_promtool, promtool

SECTIONS = {"rounds": "Aggregator", "site": "Hospital node", "committee": "Key-share pod"}
BOARDS = {name: load(HELM / chart / "files" / "dashboards" / f"{name}.json") for chart, (name, _) in DASHBOARDS.items()}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"]]
IDS = [f"{name}-{panel['title']}" for name, panel in PANELS]


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=IDS)
def test_a_panel_says_what_it_shows_in_which_unit_and_what_is_bad(name: str, panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    refs = [target["refId"] for target in panel["targets"]]
    assert refs == list("ABCDEFGHIJ"[: len(refs)]), "every query has a name of its own"
    for target in panel["targets"]:
        assert bool(target.get("instant")) != bool(target.get("range"))


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=IDS)
def test_a_panel_asks_only_for_metrics_that_its_site_has(name: str, panel: dict[str, Any]) -> None:
    kinds = {metric: kind for part, metric, kind, *_ in in_guide() if part in (SECTIONS[name], "Every role")}
    for target in panel["targets"]:
        assert "$job" in target["expr"], "of the chosen process alone"
        for used in re.findall(r"\bwardround_\w+", target["expr"]):
            base = re.sub(r"_(bucket|sum|count)$", "", used) if used not in kinds else used
            assert base in kinds, used
            assert (base != used) == (kinds[base] == "histogram"), used
            if kinds[base] == "counter" and "or on ()" not in target["expr"]:
                assert re.search(rf"(increase|rate)\({used}", target["expr"]), f"{used} only grows: show its increase"


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_laid_out_without_holes_on_top(name: str) -> None:
    panels = BOARDS[name]["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    top = [panel for panel in panels if panel["gridPos"]["y"] == 0]
    assert {panel["type"] for panel in top} <= {"stat", "gauge"}
    assert sum(panel["gridPos"]["w"] for panel in top) == 24
    assert len({panel["id"] for panel in panels}) == len(panels)


@needs_promtool
def test_every_query_is_promql_of_the_oldest_prometheus(tmp_path: Path) -> None:
    queries = [target["expr"] for _, panel in PANELS for target in panel["targets"]]
    rules = [
        {"record": f"query:{number}", "expr": fill_in(query, "wardround/x", Window(0, 3600))}
        for number, query in enumerate(queries)
    ]
    with (tmp_path / "queries.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump({"groups": [{"name": "queries", "rules": rules}]}, file)
    done = promtool("check", "rules", str(tmp_path / "queries.yaml"))
    assert f"{len(rules)} rules found" in done.stdout, done.stdout + done.stderr


@needs_promtool
def test_a_query_that_does_not_parse_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "queries.yaml").write_text("groups: [{name: q, rules: [{record: 'x:y', expr: 'sum by job (up)'}]}]")
    assert promtool("check", "rules", str(tmp_path / "queries.yaml")).returncode != 0


def test_promtool_is_where_it_should_be_on_debian() -> None:
    """`.ci/run` installs it: without it the rules would go unproved there."""
    text = (HELM.parents[1] / ".ci" / "run").read_text()
    assert "apt-get install -qy --no-install-recommends prometheus" in text
