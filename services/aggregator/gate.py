"""Figures from released sums, and the verdict on a model (privacy.md §6). Pure.

Under DP the sums carry noise: negative or too large counts are clamped, a class without a positive total is left
out. The figures are post-processing and cost no privacy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def accuracy(hits: Sequence[float], totals: Sequence[float]) -> float | None:
    """Share of all patients whose class was found; None without any."""
    total = sum(max(0.0, t) for t in totals)
    return min(1.0, max(0.0, sum(max(0.0, h) for h in hits)) / total) if total > 0 else None


def balanced_accuracy(hits: Sequence[float], totals: Sequence[float]) -> float | None:
    """Mean over the classes of the share found; None where no class has a positive total."""
    shares = [min(1.0, max(0.0, h / t)) for h, t in zip(hits, totals, strict=True) if t > 0]
    return sum(shares) / len(shares) if shares else None


def area_under_curve(negatives: Sequence[float], positives: Sequence[float]) -> float | None:
    """AUC of one class from histograms of its score (bins ascending), a tie inside a bin counts half; None if empty."""
    below = np.clip(np.asarray(negatives, np.float64), 0, None)
    above = np.clip(np.asarray(positives, np.float64), 0, None)
    pairs = float(below.sum() * above.sum())
    if pairs <= 0:
        return None
    smaller = np.concatenate([[0.0], np.cumsum(below)[:-1]])
    return float((above * (smaller + below / 2)).sum() / pairs)


def macro_area_under_curve(histogram: F64) -> float | None:
    """Mean AUC over the classes of `histogram` (classes, 2, bins), [class][0 = negatives, 1 = positives]."""
    found = [area_under_curve(of_class[0], of_class[1]) for of_class in histogram]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def gate_figures(hits: Sequence[float], totals: Sequence[float]) -> dict[str, float]:
    """The figures of one gate by name; one that cannot be computed is missing."""
    figures = {"balanced_accuracy": balanced_accuracy(hits, totals), "accuracy": accuracy(hits, totals)}
    return {name: value for name, value in figures.items() if value is not None}


def final_figures(confusion: F64, histogram: F64) -> dict[str, float]:
    """The figures of the final evaluation from `confusion` (classes, classes; row = truth) and `histogram`."""
    figures = gate_figures(np.diagonal(confusion).tolist(), np.clip(confusion, 0, None).sum(axis=1).tolist())
    auc = macro_area_under_curve(histogram)
    return figures if auc is None else {**figures, "macro_auc": auc}


@dataclass(frozen=True)
class Verdict:
    """`keep` False = roll back to the last model that passed. `reason` is for a person."""

    keep: bool
    reason: str = ""


def judge(figure: float | None, passed: float | None, largest_drop: float, metric: str) -> Verdict:
    """Whether a model with `figure` may stay, after one with the figure `passed`. An unknown figure judges nothing."""
    if figure is None or passed is None or passed - figure <= largest_drop:
        return Verdict(True)
    return Verdict(False, f"{metric} fell from {passed:.4f} to {figure:.4f}, more than {largest_drop:g} is not allowed")
