"""The quick start, typed line by line in a scratch folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documented import commands

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_start_runs_as_it_is_written(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in commands(ROOT / "docs" / "quickstart.md", "laptop"):
        command = [sys.executable, "-m", "services.cli", *words[1:]]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "build" / "first" / "report.html").exists()
