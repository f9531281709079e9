"""The quick start, typed line by line in a scratch folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli import synthetic
from tests.support.documented import commands, programs

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "docs" / "quickstart.md"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_start_runs_as_it_is_written(tmp_path: Path) -> None:
    for words in commands(QUICKSTART, "laptop"):
        run(["-m", "services.cli", *words[1:]], tmp_path)
    assert (tmp_path / "build" / "first" / "report.html").exists()
    for program in programs(QUICKSTART, "laptop"):
        run(["-c", program], tmp_path)


def test_alice_and_bob_are_simulated_as_it_is_written(tmp_path: Path) -> None:
    """The same Python on the pictures that the quick start's demo draws, without the demo."""
    synthetic.write_sites(tmp_path / "build" / "first" / "data", ("alice", "bob"))
    (program,) = programs(QUICKSTART, "laptop")
    told = run(["-c", program], tmp_path)
    assert told.count("accepted") == 4
    assert sorted(path.name for path in (tmp_path / "build" / "tried").iterdir()) == [
        "curve.png", "history.json", "model.safetensors", "study.yaml", "v0.safetensors",
    ]  # fmt: skip
