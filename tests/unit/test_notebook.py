"""What a notebook imports: a study drafted and run in one process, by every server step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import wardround
from services.common.errors import ServiceError
from tests.support.simulated import features, pictures
from tests.support.sites import CLASSES, SIZE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
def test_a_study_of_each_step_of_updates_is_drafted_and_run(tmp_path: Path, strategy: str) -> None:
    study = wardround.draft(
        tmp_path, CLASSES, 2, mechanism="none", strategy=strategy, image_size=SIZE, rounds=2, steps=2
    )
    told: list[tuple[int, int, int, int]] = []
    found = wardround.simulate(
        study, {"alice": pictures(12), "bob": pictures(12, seed=2)}, output=tmp_path, tell=lambda *at: told.append(at)
    )
    assert found.study.document.server.strategy == strategy
    assert [row["verdict"] for row in found.history] == ["accepted"] * 3
    assert told == [(number, 3, done, 2) for number in (1, 2, 3) for done in (1, 2)]
    assert sum(tensor.size for tensor in found.model.values()) == found.study.document.model.parameters
    assert str(found).splitlines()[1].startswith("1  ")
    assert json.loads((tmp_path / "history.json").read_text())["history"][2]["kind"] == "final"
    with pytest.raises(ServiceError, match="is not overwritten"):
        wardround.simulate(study, {"alice": pictures(12), "bob": pictures(12)}, output=tmp_path)


@pytest.mark.parametrize("strategy", ["sgd", "adam"])
def test_a_study_of_each_step_of_gradients_is_drafted_and_run(tmp_path: Path, strategy: str) -> None:
    study = wardround.draft(
        tmp_path, CLASSES, 3, mechanism="shared", strategy=strategy, rounds=2, patients=20,
        architecture="linear-head", backbone="efficientnet-lite0", weights="ab" * 32,
    )  # fmt: skip
    found = wardround.simulate(study, features(60), partition="dirichlet", hospitals=3, alpha=1.0)
    assert [row["verdict"] for row in found.history] == ["accepted"] * 3
    assert 0 < found.privacy["epsilon"] <= 8.0


def test_what_is_imported_needs_no_torch_before_it_is_used() -> None:
    """Every service imports this package for its messages."""
    program = "import sys, wardround; assert 'torch' not in sys.modules; print(wardround.Arrays.__name__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "Arrays\n"
    with pytest.raises(AttributeError, match="no attribute 'simulated'"):
        wardround.simulated  # noqa: B018  # the access is what is tested
