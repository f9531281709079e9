"""The real hospital node with training left out: `python -m bench.round_hospital --config FILE.yaml`.

Everything else is what a hospital runs: policy, ledger, model download, encoding, masking, upload, results.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.common.documents.study import LoadedStudy
from services.hospital_node.__main__ import run
from services.hospital_node.config import load_config
from services.hospital_node.ports import Split

_NORM = 0.1  # far below the study's clip: the clip is computed, and changes nothing
_BLOCK = 65_521  # a prime: blocks of random numbers and chunks do not line up


def update(parameters: int) -> npt.NDArray[np.float64]:
    """A fixed pseudo-random update of small norm (d): one random block, repeated."""
    block = np.random.default_rng(7).standard_normal(_BLOCK)
    return np.resize(block * (_NORM / parameters**0.5), parameters)


class NoTraining:
    """The port `Trainer`: the update is there at once, made in the first round, which is not measured."""

    def __init__(self) -> None:
        self._update: npt.NDArray[np.float64] | None = None

    def train(
        self,
        study: LoadedStudy,
        round_number: int,
        model: Path,
        model_digest: bytes,
        should_stop: Callable[[], bool],
        control: npt.NDArray[np.float32] | None,
    ) -> npt.NDArray[np.float64] | None:
        """The same update in every round (d)."""
        if self._update is None:
            self._update = update(study.document.model.parameters)
        return self._update

    def evaluate(self, study: LoadedStudy, model: Path, split: Split) -> Any:
        """Never asked: the study has neither gates nor a final round."""
        raise AssertionError("this study evaluates nothing")

    def forget(self) -> None:
        """There is no checkpoint."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path)
    sys.exit(run(load_config(parser.parse_args().config), lambda config: NoTraining()))
