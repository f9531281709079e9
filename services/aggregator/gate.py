"""Figures from released sums, and the verdict on a model (privacy.md §6). Pure.

Under DP the sums carry noise of mean 0: single counts are used as they came, negative ones too, because clamping
each of many near-empty bins would add up to a bias (an AUC that leans to 0.5). Only a share or a figure is brought
back into [0, 1], and a class without a positive total is left out. Post-processing: it costs no privacy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def accuracy(hits: Sequence[float], totals: Sequence[float]) -> float | None:
    """Share of all patients whose class was found; None without any."""
    total = sum(totals)
    return min(1.0, max(0.0, sum(hits) / total)) if total > 0 else None


def balanced_accuracy(hits: Sequence[float], totals: Sequence[float]) -> float | None:
    """Mean over the classes of the share found; None where no class has a positive total."""
    shares = [min(1.0, max(0.0, h / t)) for h, t in zip(hits, totals, strict=True) if t > 0]
    return sum(shares) / len(shares) if shares else None


def area_under_curve(negatives: Sequence[float], positives: Sequence[float]) -> float | None:
    """AUC of one class from histograms of its score (bins ascending), a tie inside a bin counts half; None if empty."""
    below, above = np.asarray(negatives, np.float64), np.asarray(positives, np.float64)
    if below.sum() <= 0 or above.sum() <= 0:
        return None
    smaller = np.concatenate([[0.0], np.cumsum(below)[:-1]])
    share = float((above * (smaller + below / 2)).sum() / (below.sum() * above.sum()))
    return min(1.0, max(0.0, share))


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
    figures = gate_figures(np.diagonal(confusion).tolist(), confusion.sum(axis=1).tolist())
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
