"""Figures from released sums against counting by hand, and what noise may do to them (privacy.md §6)."""

import numpy as np
import pytest

from services.aggregator.gate import (
    accuracy,
    area_under_curve,
    balanced_accuracy,
    final_figures,
    gate_figures,
    judge,
    macro_area_under_curve,
)


def test_accuracy_and_balanced_accuracy_by_hand() -> None:
    assert accuracy([8, 1], [10, 10]) == 0.45
    assert balanced_accuracy([8, 1], [10, 5]) == pytest.approx(0.5)
    assert gate_figures([3, 0], [3, 0]) == {"balanced_accuracy": 1.0, "accuracy": 1.0}


def test_a_share_stays_a_share_and_empty_classes_left_out() -> None:
    assert balanced_accuracy([12.5, -3, 4], [10, 5, -0.5]) == 0.5
    assert accuracy([25, -3], [10, 10]) == 1.0
    assert balanced_accuracy([1], [0]) is None
    assert accuracy([1], [-2]) is None
    assert gate_figures([1], [0]) == {}


def test_area_under_curve_is_the_share_of_ordered_pairs() -> None:
    """Against all pairs, one by one; a tie counts half."""
    negatives, positives = [3, 1, 0, 2], [0, 2, 2, 1]
    scores = [
        (a, b) for a, n in enumerate(negatives) for _ in range(n) for b, p in enumerate(positives) for _ in range(p)
    ]
    by_hand = sum(1.0 if b > a else 0.5 if b == a else 0.0 for a, b in scores) / len(scores)
    assert area_under_curve(negatives, positives) == pytest.approx(by_hand)
    assert area_under_curve([0, 0], [1, 2]) is None
    assert area_under_curve([-1, 5], [5, -1]) == 0.0  # noise alone would make it -4/16
    assert area_under_curve([5, -1], [-1, 5]) == 1.0


def test_noise_does_not_pull_the_figures_towards_chance() -> None:
    """The mean over noise is the figure without noise. Clamped bins would show 0.86 for 0.91, 0.71 for 0.76."""
    draw = np.random.default_rng(7)
    negatives = np.round(30 * np.exp(-np.arange(20) / 6))
    positives = negatives[::-1]
    exact = area_under_curve(negatives, positives)
    noisy = [
        area_under_curve(negatives + draw.normal(0, 6, 20), positives + draw.normal(0, 6, 20)) for _ in range(1000)
    ]
    assert exact is not None
    assert np.mean([value for value in noisy if value is not None]) == pytest.approx(exact, abs=0.01)
    confusion, histogram = np.diag([60.0] * 6) + 4, np.zeros((6, 2, 4))
    found = [final_figures(confusion + draw.normal(0, 8, (6, 6)), histogram)["balanced_accuracy"] for _ in range(1000)]
    assert np.mean(found) == pytest.approx(64 / 84, abs=0.02)


def test_the_final_evaluation_reads_the_confusion_matrix_by_rows() -> None:
    confusion = np.array([[8.0, 2.0], [1.0, 4.0]])
    histogram = np.array([[[0, 5.0], [10.0, 0]], [[0, 10.0], [5.0, 0]]])
    figures = final_figures(confusion, histogram)
    assert figures["balanced_accuracy"] == pytest.approx((0.8 + 0.8) / 2)
    assert figures["accuracy"] == pytest.approx(12 / 15)
    assert figures["macro_auc"] == 0.0
    assert "macro_auc" not in final_figures(confusion, np.zeros((2, 2, 4)))
    assert macro_area_under_curve(np.zeros((2, 2, 4))) is None


def test_a_model_is_rolled_back_only_when_it_dropped_more_than_allowed() -> None:
    assert judge(0.5, 0.6, 0.2, "accuracy").keep
    assert judge(None, 0.6, 0.0, "accuracy").keep
    assert judge(0.1, None, 0.0, "accuracy").keep
    verdict = judge(0.3, 0.6, 0.2, "accuracy")
    assert not verdict.keep
    assert "0.6000 to 0.3000" in verdict.reason
