"""Studies and data for simulations that take a second."""

from pathlib import Path
from typing import Any

import numpy as np

from services.cli.drafts import write_initial
from services.common.documents.emit import emit
from services.common.documents.study import Study
from services.simulation.pool import Arrays
from tests.support.sites import CLASSES, SIZE, small_study

FULL_BATCHES: dict[str, Any] = {"learning_rate": 0.1, "local_steps": 2, "batch_size": 64, "micro_batch": 16}
WIDTH = 1280


def plain_study(folder: Path, **changes: Any) -> Path:
    """study.yaml under `none` with v0.safetensors beside it: full batches, a gate in round 2, a final evaluation."""
    study = small_study(
        "none",
        privacy={"none_accepted": "We accept that no noise protects anybody here.", "noise_multiplier": 0.0},
        evaluation={"gate_rounds": (2,), "histogram_bins": 10},
        **{"training": FULL_BATCHES, "cohort": {"minimum": 2, "colluding_hospitals": 0}, **changes},
    )
    return write_study(folder, study)


def write_study(folder: Path, study: Study) -> Path:
    """The study and the model that it starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    model = write_initial(study.model, folder / "v0.safetensors", 1)
    path = folder / "study.yaml"
    path.write_bytes(emit(study.model_copy(update={"model": model})))
    return path


def head_study(folder: Path, mechanism: str, **changes: Any) -> Path:
    """A linear head on features, one gate and a final evaluation, with noise that no test takes for a model."""
    shared = mechanism == "shared"
    study = small_study(
        mechanism,
        model={
            "architecture": "linear-head",
            "parameters": (WIDTH + 1) * len(CLASSES),
            "backbone": {"name": "efficientnet-lite0", "sha256": "ab" * 32},
        },
        privacy={
            "epsilon": 9.0, "delta": 1e-5, "noise_multiplier": 3.0, "sampling_rate": 1.0, "expected_batch": 20.0,
            "steps_per_round": 1 if shared else 2, "patients": {"alice": 20, "bob": 20, "carol": 20} if shared else {},
        },
        training={"learning_rate": None if shared else 1.0},
        evaluation={"gate_rounds": (2,), "gate_noise_multiplier": 3.0, "final_noise_multiplier": 3.0},
        cohort={"minimum": 3, "colluding_hospitals": 1},
        **({"server": {"strategy": "sgd", "learning_rate": 1.0, "momentum": 0.9}} if shared else {}),
        **changes,
    )  # fmt: skip
    return write_study(folder, study)


def features(patients: int, seed: int = 1) -> Arrays:
    """Two images a patient, their classes told apart by one number of 1280."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(patients) % len(CLASSES), 2)
    values = random.normal(0, 0.1, (2 * patients, WIDTH)).astype(np.float32)
    values[:, 0] += np.where(labels == 1, 3.0, -3.0)
    return Arrays(labels=labels, features=values, patients=np.repeat(np.arange(patients), 2))


def pictures(patients: int, seed: int = 1) -> Arrays:
    """One grey picture a patient, dark or light in the middle."""
    random = np.random.default_rng(seed)
    labels = np.arange(patients) % len(CLASSES)
    images = random.integers(90, 110, (patients, SIZE, SIZE, 3), dtype=np.uint8)
    images[:, 3:-3, 3:-3] = np.where(labels == 1, 200, 20)[:, None, None, None]
    return Arrays(labels=[CLASSES[label] for label in labels], images=images)
