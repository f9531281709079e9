"""SCAFFOLD by real processes, a hospital and a pod killed in a round: every file remade, c the mean of all c_i."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from services.aggregator.tally import class_sums
from services.cli.run import Run, load_run
from services.cli.verify import verify_run
from services.common.documents.shape import round_shape
from services.common.errors import ServiceError
from services.common.secagg.encoding import dequantise
from services.hospital_node.architectures import build
from services.hospital_node.control import own_control
from services.hospital_node.models import layout, read_control
from services.hospital_node.store import Store

ROUNDS = 3


def control_after_the_last_round(run: Run) -> np.ndarray:
    """c of the newest file that holds one, moved by the sum of the last round, whose own c is not published."""
    table = round_shape(run.charter, run.study, ROUNDS).table
    last = next(one for one in run.rounds if one.number == ROUNDS)
    bits = table.lane_class("control").fraction_bits
    moved = dequantise(class_sums(table, "control", last.folder / "sum.bin"), bits)
    shapes = layout(build(run.study.document.model))
    before = read_control(run.model(last.result.version - 1), shapes)
    return before + moved / len(run.charter.roster.hospitals)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scaffold_through_the_whole_system(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "services.cli", "demo", "--output", str(folder), "--mechanism", "none",
               "--strategy", "scaffold", "--rounds", str(ROUNDS), "--kill-one"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SCAFFOLD (learning rate 1)" in (folder / "passport.md").read_text()
    assert verify_run(folder) > 50
    check_controls(folder)
    first = folder / "evidence" / "aggregator" / "models" / "v0001.safetensors"
    content = bytearray(first.read_bytes())
    content[-1] ^= 1  # the last byte of c
    first.write_bytes(content)
    with pytest.raises(ServiceError):
        verify_run(folder)


def check_controls(folder: Path) -> None:
    run = load_run(folder)
    own = []
    for name in sorted(run.charter.roster.hospitals):
        store = Store(folder / "sites" / name / "state")
        try:
            found = own_control(store, run.study)
        finally:
            store.close()
        assert found is not None
        own.append(found)
    assert np.abs(own).max() > 1e-3
    assert np.ptp(own, axis=0).max() > 1e-3  # each hospital has its own
    assert np.allclose(np.mean(own, axis=0), control_after_the_last_round(run), rtol=0, atol=1e-6)
