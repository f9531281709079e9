"""Exact figures of a model from patients' probabilities: macro AUC and balanced accuracy. For measurements only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def auc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks, ties counted half; NaN without both kinds."""
    pairs = int(positive.sum()) * int((~positive).sum())
    if not pairs:
        return float("nan")
    _, place, many = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(many) - (many - 1) / 2)[place]
    wins = rank[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return float(wins / pairs)


def figures(probabilities: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, balanced accuracy and macro AUC over the classes that occur."""
    present = np.unique(labels)
    hit = probabilities.argmax(1) == labels
    return {
        "patients": len(labels),
        "accuracy": round(float(hit.mean()), 4),
        "balanced_accuracy": round(float(np.mean([hit[labels == c].mean() for c in present])), 4),
        "macro_auc": round(float(np.nanmean([auc(probabilities[:, c], labels == c) for c in present])), 4),
    }
