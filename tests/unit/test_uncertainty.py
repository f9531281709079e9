"""Intervals cover the truth as often as they say, noise included; what calibration shows of a model without fault."""

import math

import numpy as np
import pytest

from services.cli.uncertainty import deviation, intervals, reliability
from services.common.documents.costs import final_noise, gate_noise
from tests.support.documents import make_study

CLASSES, BINS, TRIALS = 3, 10, 30


def scores(draw: np.random.Generator, patients: int) -> np.ndarray:
    """Histogram (classes, 2, bins) of a model that is fairly sure and right."""
    law = np.exp(-np.arange(BINS) / 3.0)
    law /= law.sum()
    return np.stack(
        [
            np.stack([draw.multinomial(patients * (CLASSES - 1), law), draw.multinomial(patients, law[::-1])])
            for _ in range(CLASSES)
        ]
    ).astype(np.float64)


def true_area() -> float:
    law = np.exp(-np.arange(BINS) / 3.0)
    law /= law.sum()
    return float((law[::-1] * (np.concatenate([[0.0], np.cumsum(law)[:-1]]) + law / 2)).sum())


@pytest.mark.parametrize(("patients", "noise"), [(150, 4.0), pytest.param(60, 0.0, marks=pytest.mark.slow)])
def test_intervals_cover_the_truth(patients: int, noise: float) -> None:
    """Of 30 studies with a known truth 95 % intervals miss one or two; 7 misses have a chance below 1 in 1000."""
    draw, shares = np.random.default_rng(11), np.array([0.85, 0.7, 0.6])
    missed = dict.fromkeys(("gate", "rows", "macro_auc"), 0)
    for _ in range(TRIALS):
        hits = draw.binomial(patients, shares)
        confusion = np.stack(
            [draw.multinomial(patients, [(1 - p) / 2 if c != r else p for c in range(3)]) for r, p in enumerate(shares)]
        )
        gate = np.concatenate([hits, np.full(CLASSES, patients)]) + draw.normal(0, noise, 2 * CLASSES)
        noisy = confusion + draw.normal(0, noise, confusion.shape)
        histogram = scores(draw, patients) + draw.normal(0, noise, (CLASSES, 2, BINS))
        found = intervals({"gate": gate.tolist()}, CLASSES, noise)
        final = intervals(
            {"confusion": noisy.ravel().tolist(), "histogram": histogram.ravel().tolist()}, CLASSES, noise
        )
        truths = (
            ("gate", found["balanced_accuracy"], float(shares.mean())),
            ("rows", final["balanced_accuracy"], float(shares.mean())),
            ("macro_auc", final["macro_auc"], true_area()),
        )
        for name, interval, truth in truths:
            missed[name] += not interval.low <= truth <= interval.high
    assert max(missed.values()) <= 6, missed


def test_noise_widens_an_interval() -> None:
    sums = {"gate": [80.0, 70.0, 60.0, 100.0, 100.0, 100.0]}
    exact, noisy = intervals(sums, 3, 0.0)["accuracy"], intervals(sums, 3, 8.0)["accuracy"]
    assert noisy.high - noisy.low > 1.2 * (exact.high - exact.low)
    assert intervals(sums, 3, 8.0) == intervals(sums, 3, 8.0)


def test_a_class_that_drowns_in_noise_has_no_interval() -> None:
    assert intervals({"gate": [3.0, 70.0, 5.0, 100.0]}, 2, 4.0) == {}
    assert "accuracy" in intervals({"gate": [3.0, 70.0, 0.0, 100.0]}, 2, 0.0)
    assert intervals({}, 2, 4.0) == {}


def test_the_deviation_is_that_of_all_shares_in_patients() -> None:
    study = make_study("local").document
    gate, final = gate_noise(study), final_noise(study)
    assert deviation(study, "train", 4) == pytest.approx(2 * gate.scale / 2**gate.fraction_bits, rel=1e-3)
    assert deviation(study, "final", 9) == pytest.approx(3 * final.scale / 2**final.fraction_bits, rel=1e-3)
    assert deviation(make_study("none").document, "train", 4) == 0.0
    blind = make_study("local", evaluation={"gate_rounds": (), "gate_noise_multiplier": 0.0}).document
    assert deviation(blind, "train", 4) == 0.0  # such a study counts nothing in its training rounds


def calibrated(patients: int) -> np.ndarray:
    """A model whose scores come true: in each bin, mid · seen are positives."""
    seen, mid = np.full(20, float(patients)), (np.arange(20) + 0.5) / 20
    return np.stack([np.stack([seen * (1 - mid), seen * mid])] * CLASSES)


def test_calibration_error_by_hand() -> None:
    found = reliability(calibrated(100), 0.0)
    assert found is not None
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert found.drowned == 0
    assert all(low <= mid <= high for mid, share, low, high in found.points)
    # Everybody is told 0.975 and is right half of the time.
    sure = np.zeros((2, 2, 20))
    sure[:, :, 19] = 50
    wrong = reliability(sure, 0.0)
    assert wrong is not None
    assert wrong.error == pytest.approx(0.475)
    assert wrong.drowned == 19
    assert reliability(np.zeros((2, 2, 20)), 3.0) is None


def test_the_floor_is_what_noise_alone_shows_of_a_calibrated_model() -> None:
    draw, noise, errors = np.random.default_rng(5), 6.0, []
    exact = calibrated(40)
    for _ in range(200):
        found = reliability(exact + draw.normal(0, noise, exact.shape), noise)
        assert found is not None
        errors.append(found.error)
    floor = reliability(exact, noise)
    assert floor is not None
    # The floor also counts the draw of patients, which does not vary here.
    without = math.sqrt(1 - 40 * CLASSES * 0.25 / (noise**2 * CLASSES * 0.5 + 40 * CLASSES * 0.25))
    assert without * floor.floor < np.mean(errors) * 1.15
    assert np.mean(errors) < floor.floor * 1.05
