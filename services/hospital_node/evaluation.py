"""Exact counts of one evaluation: every patient of a split votes once (privacy.md §6). The caller adds the noise."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.common.documents.study import Study
from services.hospital_node.dataset import Dataset, Split
from services.hospital_node.training import Compute


@dataclass(frozen=True)
class Counts:
    """int64: hits (c), totals (c), confusion (c, c) row = truth, histogram (c, 2, bins): 0 negatives, 1 positives."""

    hits: NDArray[np.int64]
    totals: NDArray[np.int64]
    confusion: NDArray[np.int64]
    histogram: NDArray[np.int64]


def evaluate(
    vector: NDArray[np.float32],
    dataset: Dataset,
    split: Split,
    study: Study,
    compute: Compute = Compute(),  # noqa: B008 (frozen)
) -> Counts:
    """Counts of the model `vector` (d) on a split; never sent without noise or mask."""
    raise NotImplementedError
