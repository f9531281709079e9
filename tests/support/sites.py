"""Folders of images as a hospital has them, and studies that train on them in a second."""

import csv
import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from services.common.documents.study import Study
from services.hospital_node.dataset import SPLIT_KEY, Dataset, load_dataset

CLASSES = ("dark", "light")
SIZE = 12
COLUMNS = ("image_id", "path", "patient_id", "label")


def write_table(folder: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> None:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(columns)
        table.writerows(rows)


def write_image(path: Path, value: int, size: int = SIZE, seed: int = 0) -> None:
    """A grey square of that brightness with a little texture, its middle brighter or darker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(90, 110, (size, size, 3), dtype=np.uint8)
    pixels[size // 4 : -size // 4, size // 4 : -size // 4] = value
    Image.fromarray(pixels).save(path)


def fixed_split(state: Path) -> Path:
    """`state` with a key of the split that is always the same: a drawn one may leave a tiny site nobody to train on."""
    state.mkdir()
    (state / SPLIT_KEY).write_bytes(bytes(32))
    return state


def small_site(folder: Path, state: Path, patients: int = 24, extra_image_every: int = 5) -> Dataset:
    """Two classes that a small model tells apart; every few patients have a second image; all folds given."""
    rows = []
    for patient in range(patients):
        label = patient % 2
        for view in range(2 if patient % extra_image_every == 0 else 1):
            name = f"i{patient}-{view}"
            write_image(folder / "images" / f"{name}.png", 200 if label else 20, seed=10 * patient + view)
            fold = "test" if patient % 6 == 5 else "validation" if patient % 6 == 4 else "train"
            rows.append((name, f"images/{name}.png", f"p{patient}", CLASSES[label], fold))
    write_table(folder, rows, (*COLUMNS, "fold"))
    return load_dataset(folder, CLASSES, SIZE, state)


def small_study(mechanism: str = "local", **changes: dict[str, Any]) -> Study:
    """A study over `small_site`; `changes` are merged into its sections."""
    base: dict[str, Any] = {
        "wardround": "study/v1",
        "name": "small",
        "purpose": "a test of the training code",
        "expires": datetime.date(2100, 1, 1),
        "rounds": 2,
        "model": {
            "architecture": "small-cnn",
            "image_size": SIZE,
            "classes": CLASSES,
            "parameters": 14482,
            "initial": "0" * 64,
        },
        "privacy": {
            "mechanism": mechanism,
            "clip": 1.0,
            "noise_multiplier": 0.5,
            "sampling_rate": 0.5,
            "expected_batch": 8,
            "steps_per_round": 4,
            "scale_bits": 18,
        },
        "training": {"learning_rate": 0.5, "local_steps": 4, "batch_size": 4, "micro_batch": 4},
        "evaluation": {"histogram_bins": 10},
        "cohort": {"minimum": 3},
        "timing": {"train_seconds": 1, "submit_seconds": 1, "attempt_seconds": 2},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return Study.model_validate(base)
