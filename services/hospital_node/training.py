"""Local training of one round: DP-SGD by patient (`local`) or plain SGD (`none`), resumable at any step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.common.documents.study import Study
from services.hospital_node.dataset import Dataset


@dataclass(frozen=True)
class Compute:
    """Where the site computes. `backbones`: folder with the weights files of frozen backbones, by any name."""

    device: str = "auto"
    threads: int = 0
    backbones: Path | None = None


@dataclass(frozen=True)
class Task:
    """What a checkpoint belongs to: it is used for exactly this and nothing else."""

    study_digest: bytes
    round: int
    model_digest: bytes


@dataclass(frozen=True)
class TrainResult:
    """`delta` = trained minus start weights, float64 (d). The rest stays at the site (P-6)."""

    delta: NDArray[np.float64]
    steps: int
    seconds: float
    images_per_second: float


def train_round(
    vector: NDArray[np.float32],
    dataset: Dataset,
    study: Study,
    task: Task,
    progress: Path,
    keys: Callable[[], bytes],
    should_stop: Callable[[], bool],
    compute: Compute = Compute(),  # noqa: B008 (frozen)
) -> TrainResult | None:
    """Train from `vector` (d). `keys()` gives fresh 32-byte OS keys. Resumes from `progress`; None when stopped."""
    raise NotImplementedError


def discard_progress(progress: Path) -> None:
    """Forget the checkpoint once the round's vector is stored or the round is given up."""
    raise NotImplementedError
