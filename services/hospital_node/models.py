"""The registry of architectures, and the model file. No code travels: a study names an entry.

Never BatchNorm in training mode nor any statistic over a batch (a patient would reach the others' gradients).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from services.common.documents.study import ModelSection


def build(model: ModelSection) -> nn.Module:
    """The trainable module of the study's architecture, weights zeroed until `load_vector`. Raises INVALID_DOCUMENT."""
    raise NotImplementedError


def initial_vector(model: ModelSection, seed: int) -> NDArray[np.float32]:
    """Public, reproducible v0 weights for `study draft`; torch's generator is used here and nowhere else."""
    raise NotImplementedError


def layout(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of the trainable tensors, names ascending."""
    raise NotImplementedError


def trainable_vector(module: nn.Module) -> NDArray[np.float32]:
    """All trainable numbers (d), tensors in ascending name order."""
    raise NotImplementedError


def load_vector(module: nn.Module, vector: NDArray[np.floating]) -> None:
    """Put the flat vector (d) into the module. Raises INVALID_DATA when the length differs."""
    raise NotImplementedError


def write_model_file(path: Path, shapes: Sequence[tuple[str, tuple[int, ...]]], vector: NDArray[np.float32]) -> bytes:
    """Write the safetensors file (F32, names ascending, contiguous) atomically; its SHA-256."""
    raise NotImplementedError


def read_model_file(
    path: Path, shapes: Sequence[tuple[str, tuple[int, ...]]]
) -> NDArray[np.float32]:
    """The flat vector (d) of a model file that has exactly these tensors. Raises INVALID_DATA naming the difference."""
    raise NotImplementedError
