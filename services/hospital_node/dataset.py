"""What a hospital has: a folder of images and `metadata.csv`, indexed by patient.

The columns are image_id, path, patient_id or lesion_id, label or dx, and fold where the hospital fixes it.
Rules: one patient is in exactly one split, for the data set's life; every mistake is one INVALID_DATA naming the
file and the next step, found before anything is sent. Not here: augmentation, normalisation, features.
"""

import csv
import hashlib
import hmac
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Reason, ServiceError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Fold:
    """The patients of one split. Patient i has the images `images[i]` (indices into the data set)."""

    images: tuple[NDArray[np.int64], ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)


class Dataset:
    """Images by index, patients by split. `unit` is the word that really exists: patient, lesion or image."""

    folder: Path
    classes: tuple[str, ...]
    image_size: int
    unit: str
    labels: NDArray[np.int64]

    def fold(self, split: Split) -> Fold:
        """The patients of `split`."""
        raise NotImplementedError

    def pixels(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, image_size, image_size, 3) RGB. Raises INVALID_DATA naming a file that cannot be decoded."""
        raise NotImplementedError

    def check_images(self, memory_limit: int = 2**30) -> None:
        """Decode every image once, keep them up to `memory_limit` bytes. Raises INVALID_DATA naming the bad file."""
        raise NotImplementedError


def load_dataset(folder: Path, classes: Sequence[str], image_size: int, state: Path) -> Dataset:
    """Read `metadata.csv`; `state` holds the secret key of the split. Raises INVALID_DATA; decodes no image yet."""
    raise NotImplementedError
