"""Alert rules: fresh, each with a runbook heading; each fires when it should and is quiet when it should be."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from deploy.monitoring.build import compiled
from deploy.monitoring.rules import RULES, Rule
from tests.architecture.test_metrics_guide import in_guide

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHARTS = sorted(RULES)
EVERY = [(chart, rule) for chart in CHARTS for rule in RULES[chart]]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)


def read(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text())


def promtool(*arguments: str, folder: Path = HERE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )


def test_the_compiled_files_are_fresh() -> None:
    stale = [str(path) for path, text in compiled().items() if not path.exists() or path.read_text() != text]
    assert not stale, "run `make charts`"


@needs_promtool
@pytest.mark.parametrize("chart", CHARTS)
def test_rules_do_what_they_say(chart: str) -> None:
    done = promtool("test", "rules", f"{chart}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("chart", CHARTS)
def test_every_rule_has_a_case_where_it_fires_and_one_where_it_must_not(chart: str) -> None:
    cases = [case for test in read(HERE / f"{chart}.yaml")["tests"] for case in test["alert_rule_test"]]
    names = {rule.name for rule in RULES[chart]}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.slow
@needs_promtool
@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("fault", ["never", "always", "at once"])
def test_a_wrong_rule_does_not_pass(chart: str, fault: str, tmp_path: Path) -> None:
    """Each rule in turn fires never, always, or without waiting: the cases must notice."""
    cases = (HERE / f"{chart}.yaml").read_text()
    source = f"../../deploy/helm/{chart}/files/rules.yaml"
    assert source in cases
    path = ROOT / "deploy" / "helm" / chart / "files" / "rules.yaml"
    for index, rule in enumerate(RULES[chart]):
        document = read(path)
        changed = document["groups"][0]["rules"][index]
        if fault == "at once" and "for" not in changed:
            continue
        changed |= {"for": "0s"} if fault == "at once" else {"expr": f"vector(1) {'==' if fault == 'never' else '<'} 2"}
        folder = tmp_path / rule.name
        folder.mkdir()
        (folder / "cases.yaml").write_text(cases.replace(source, "rules.yaml"))
        with (folder / "rules.yaml").open("w") as file:
            YAML(typ="safe", pure=True).dump(document, file)
    tried = sorted(f"{folder.name}/cases.yaml" for folder in tmp_path.iterdir())
    done = promtool("test", "rules", *tried, folder=tmp_path)
    assert done.stdout.count("Unit Testing:") == len(tried) > 2
    assert "SUCCESS" not in done.stdout, done.stdout


def test_every_alert_has_a_heading_and_every_heading_an_alert() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    section = text.split("\n## Alerts\n", 1)[1].split("\n## ", 1)[0]
    headings = re.findall(r"^#### (\w+)$", section, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert set(headings) == {rule.name for _, rule in EVERY}


@pytest.mark.parametrize(("chart", "rule"), EVERY, ids=[f"{chart}-{rule.name}" for chart, rule in EVERY])
def test_a_rule_asks_only_for_metrics_that_its_site_has(chart: str, rule: Rule) -> None:
    section = {"aggregator": "Aggregator", "hospital-node": "Hospital node", "keyshare": "Key-share pod"}[chart]
    known = {name for part, name, *_ in in_guide() if part in (section, "Every role")}
    assert set(re.findall(r"wardround_\w+", rule.expr)) <= known
    assert rule.runbook == f"docs/operations.md#{rule.name.lower()}"
