"""`wardround audit`: the report's three files, and an exit code that a machine can use."""

import json
from pathlib import Path

import numpy as np
import pytest

from services.cli.__main__ import main
from services.cli.audit_finding import FAULTS, Finding, Reading
from services.cli.audit_inversion import VIEWS, Recovered
from services.cli.audit_report import markdown, write_report


def findings() -> list[Finding]:
    noise = Finding("1. Noise meter", "the law", "the theorem", [Reading("variance", 1.25, 5.0, "standard errors")])
    noise.judge("a share missing", [Reading("variance", 22.5, 5.0, "standard errors")])
    runs = Finding("3. Many runs, one canary", "a bound", "more", [Reading("colluders", 3.2, 3.0, "ε", sure=2.5)])
    runs.caught = dict.fromkeys(FAULTS, False)
    members = Finding("5. Membership inference", "a", "b")
    attack = {"auc": 0.9, "rate_at_one_percent": 0.2, "advantage": 0.5}
    members.notes = {"without noise": {"loss threshold": attack, "LiRA": attack, "accuracy on others": 0.7}}
    return [noise, runs, members]


def test_report_is_written_for_people_and_machines(tmp_path: Path) -> None:
    pictures = {"linear model": [Recovered(np.full((len(VIEWS), 3, 8, 8), 0.5), (1.0,) * len(VIEWS))]}
    write_report(tmp_path, findings(), pictures, {"seed": 7})
    text = (tmp_path / "audit.md").read_text()
    assert "Every meter is within its limits" in text
    assert "| colluders | 3.20 (2.50 at 99.99 %) ε | 3.00 | holds |" in text
    assert "Does not show: the theorem" in text
    assert "| without noise | 0.90 | 0.90 | 20.0% | 0.70 |" in text
    assert "| a share missing | caught | variance 22.50 standard errors, limit 5.00 |" in text
    assert "| sensitivity doubled | not seen |  |" in text
    found = json.loads((tmp_path / "audit.json").read_text())
    assert (found["holds"], found["about"]["seed"]) == (True, 7)
    assert [one["holds"] for one in found["findings"]] == [True, True, True]
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_meter_beyond_its_limit_is_said_first(tmp_path: Path) -> None:
    broken = findings()
    broken[0].readings.append(Reading("kurtosis", 5.01, 5.0, "standard errors"))
    text = markdown(broken, {})
    assert "**A meter is beyond its limit" in text.split("## ")[0]
    assert "| kurtosis | 5.01 standard errors | 5.00 | **fails** |" in text
    write_report(tmp_path, broken, {}, {})  # no pictures, no harm
    assert json.loads((tmp_path / "audit.json").read_text())["holds"] is False


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_audit_of_what_is_built_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--quick", "--runs", "200", "--out", str(tmp_path / "audit")]) == 0
    out = capsys.readouterr().out
    assert out.count(": holds") == 6
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["about"]["quick"] is True
    assert [one["title"][:2] for one in found["findings"]] == ["1.", "2.", "3.", "4.", "5.", "6."]
