"""What Helm makes of the compiled files: the same rules and dashboards, byte for byte where it matters."""

import json
from pathlib import Path

import pytest

from deploy.monitoring.build import DASHBOARDS, HELM
from deploy.monitoring.rules import RULES
from tests.support.charts import ALL_KINDS, Files, helms, make_files, needs_helm, render

pytestmark = needs_helm
CHARTS = sorted(RULES)
RUNBOOKS = "https://runbooks.example/main/"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("consortium"))


@pytest.mark.parametrize("chart", CHARTS)
def test_the_rules_of_a_chart_are_the_compiled_ones_with_links_that_lead_somewhere(
    chart: str, files: Files, tmp_path: Path
) -> None:
    metrics = {"rules": {"enabled": True, "runbooks": RUNBOOKS}, "dashboards": {"enabled": True}}
    given = tmp_path / "values.json"
    given.write_text(json.dumps({"metrics": metrics}))
    minimal = f"--values={HELM / chart / 'ci' / 'minimal.yaml'}"
    found = render(helms()[0], chart, minimal, f"--values={given}", *files.options(chart), *ALL_KINDS)
    (rules,) = [one["spec"]["groups"] for one in found if one["kind"] == "PrometheusRule"]
    shown = {rule["alert"]: rule for rule in rules[0]["rules"]}
    assert list(shown) == [rule.name for rule in RULES[chart]]
    for rule in RULES[chart]:
        made = shown[rule.name]
        assert (made["expr"], made["annotations"]["summary"]) == (rule.expr, rule.summary)
        assert made["annotations"]["runbook_url"] == f"{RUNBOOKS}docs/operations.md#{rule.name.lower()}"
    name, dashboard = DASHBOARDS[chart]
    (carried,) = [one for one in found if one["kind"] == "ConfigMap" and f"{name}.json" in one.get("data", {})]
    assert carried["data"][f"{name}.json"] == dashboard.compiled()
    assert carried["metadata"]["labels"]["grafana_dashboard"] == "1"
