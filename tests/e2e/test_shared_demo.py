"""A federation under `shared`: real processes, a hospital and a pod killed in a round, every model remade offline."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.run import load_run
from services.cli.verify import verify_run
from services.common.documents.costs import study_epsilon


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shared_noise_through_the_whole_system(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "services.cli", "demo", "--output", str(folder), "--mechanism", "shared",
               "--rounds", "4", "--kill-one"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(folder)
    assert len(run.rounds) == 5
    assert verify_run(folder) > 50
    privacy = json.loads((folder / "passport.json").read_text())["privacy"]
    assert (privacy["claim"]["minimum_cohort"], privacy["claim"]["colluding_hospitals"]) == (3, 1)
    planned = study_epsilon(run.study.document, spare=False)
    solo = study_epsilon(run.study.document, spare=False, solo=True)
    for site, spent in privacy["epsilon_by_site_and_split"].items():
        alone = privacy["epsilon_solo_by_site_and_split"][site]
        assert spent["train"] <= math.ceil(planned["train"] * 1e4) / 1e4 <= privacy["claim"]["epsilon"]
        assert spent["train"] < alone["train"] <= math.ceil(solo["train"] * 1e4) / 1e4
    assert "ε_solo" in (folder / "passport.md").read_text()
    assert "ε_solo" in done.stdout
