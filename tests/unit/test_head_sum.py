"""The linear head's closed form against per-sample gradients, and its own sensitivity meter (privacy.md §3, §4, §8)."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from services.common.dp.clip import Clip
from services.common.dp.noise import integer_sum, sensitivity_rint
from services.hospital_node.clipping import clipped_sum
from services.hospital_node.head import CENTRE_PART, clipped_centred_sum, clipped_head_sum, gather

FEATURES, CLASSES, BITS = 12, 5, 20
NO_SHIFT, NO_WEIGHTS = np.zeros(CLASSES), np.ones(CLASSES)


def site(seed: int = 3) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]:
    """Features of 96 images, labels, 24 patients of 1 to 4 images each (labels may differ inside one), weights (d)."""
    drawn = np.random.default_rng(seed)  # test data only
    features = drawn.normal(size=(96, FEATURES)).astype(np.float32)
    labels = drawn.integers(0, CLASSES, 96)
    counts = drawn.integers(1, 5, 24)
    ends = np.cumsum(counts)
    patients = [np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
    return features, labels, patients, drawn.normal(size=CLASSES * (FEATURES + 1))


def of_patients(
    vector: np.ndarray, features: np.ndarray, labels: np.ndarray, patients: list[np.ndarray], shift: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Mean gradients (patients, d) by torch's autograd in float64, one row at a time."""
    found = []
    for rows in patients:
        mean = np.zeros(vector.size)
        for row in rows:
            bias = torch.tensor(vector[:CLASSES], requires_grad=True)
            weight = torch.tensor(vector[CLASSES:].reshape(CLASSES, FEATURES), requires_grad=True)
            scores = weight @ torch.from_numpy(features[row]).double() + bias + torch.from_numpy(shift)
            loss = nn.functional.cross_entropy(scores[None], torch.tensor([labels[row]])) * weights[labels[row]]
            loss.backward()
            assert bias.grad is not None
            assert weight.grad is not None
            mean += np.concatenate([bias.grad.numpy(), weight.grad.numpy().ravel()]) / rows.size
        found.append(mean)
    return np.array(found)


@pytest.mark.parametrize("clip", [Clip(0.3), Clip(2.0), Clip(1e6), Clip(1.0, stability=0.01)])
def test_equals_the_clipped_sum_of_autograd(clip: Clip) -> None:
    features, labels, patients, vector = site()
    shift, weights = np.log(np.arange(1, CLASSES + 1) / 15), np.array([1.0, 0.2, 5.0, 1.0, 3.0])
    exact = of_patients(vector, features, labels, patients, shift, weights)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    factors = clip.norm / (norms + clip.stability) if clip.stability else np.minimum(1, clip.norm / norms)
    found = clipped_head_sum(vector, gather(features, labels, patients), clip, shift, weights)
    assert np.linalg.norm(found - (exact * factors).sum(axis=0)) < 1e-9


def test_equals_the_general_engine() -> None:
    features, labels, patients, vector = site()
    module = nn.Linear(FEATURES, CLASSES)
    with torch.no_grad():
        module.bias.copy_(torch.from_numpy(vector[:CLASSES]))
        module.weight.copy_(torch.from_numpy(vector[CLASSES:].reshape(CLASSES, FEATURES)))
    weights = np.array([1.0, 0.2, 5.0, 1.0, 3.0])
    found = clipped_head_sum(vector, gather(features, labels, patients), Clip(0.7), NO_SHIFT, weights)
    total = np.zeros(vector.size)
    for rows in patients:
        images, truth = torch.from_numpy(features[rows])[None], torch.from_numpy(labels[rows])[None]
        total += clipped_sum(module, images, truth, Clip(0.7), 1, weights=torch.from_numpy(weights).float())
    assert np.linalg.norm(found - total) < 1e-5


def test_nobody_is_zeros_and_one_patient_never_exceeds_the_clip() -> None:
    features, labels, patients, vector = site()
    assert not clipped_head_sum(vector, (), Clip(1.0), NO_SHIFT, NO_WEIGHTS).any()
    for clip in (Clip(1e-3), Clip(1e-3, stability=1e-9), Clip(1.0, stability=1e-9)):
        for rows in patients:
            one = clipped_head_sum(vector, gather(features, labels, [rows]), clip, NO_SHIFT, NO_WEIGHTS * 1e6)
            assert np.linalg.norm(one) <= clip.norm


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38], ids=str)
def test_a_patient_that_is_not_finite_counts_as_zero_and_spoils_nobody(bad: float) -> None:
    """3e38 is a float32: its scores overflow nothing in float64, so it is clipped like anybody else."""
    features, labels, patients, vector = site()
    counted: list[int] = []
    spoiled = features.copy()
    spoiled[patients[7][0], 3] = bad
    found = clipped_head_sum(vector, gather(spoiled, labels, patients), Clip(0.5), NO_SHIFT, NO_WEIGHTS, counted.append)
    others = patients[:7] + patients[8:]
    without = clipped_head_sum(vector, gather(features, labels, others), Clip(0.5), NO_SHIFT, NO_WEIGHTS)
    if np.isfinite(bad):
        assert counted == [0]
        assert np.linalg.norm(found - without) <= 0.5
    else:
        assert counted == [1]
        assert np.abs(found - without).max() < 1e-12
    broken = np.full(vector.size, np.nan)
    assert not clipped_head_sum(broken, gather(features, labels, patients), Clip(0.5), NO_SHIFT, NO_WEIGHTS).any()


ADVERSARIES = {
    "nan": np.full((2, FEATURES), np.nan),
    "huge": np.full((2, FEATURES), 1e30),
    "one-hot": np.eye(2, FEATURES) * 1e4,
    "empty": np.zeros((2, FEATURES)),
    "opposite": np.array([np.ones(FEATURES), -np.ones(FEATURES)]) * 50,
}


@pytest.mark.parametrize("kind", ADVERSARIES)
@pytest.mark.parametrize("clip", [Clip(0.5), Clip(0.5, stability=0.01)], ids=["flat", "automatic"])
@pytest.mark.parametrize("weight", [1.0, 1e5])
def test_sensitivity_meter(kind: str, clip: Clip, weight: float) -> None:
    """One patient more, whatever it is and however heavy its class, moves the rounded sum by at most Δ₂: exactly."""
    features, labels, patients, vector = site()
    weights = np.full(CLASSES, weight)
    more = np.concatenate([features, ADVERSARIES[kind].astype(np.float32)])
    truth = np.concatenate([labels, [0, 1]])
    sums = [
        integer_sum(clipped_head_sum(vector, gather(more, truth, who), clip, NO_SHIFT, weights), BITS)
        for who in (patients, [*patients[:5], np.array([96, 97]), *patients[5:]])
    ]
    square = sum(int(x) ** 2 for x in (sums[1] - sums[0]).tolist())
    assert square <= Fraction(sensitivity_rint(BITS, clip.norm, vector.size)) ** 2
    if kind == "one-hot":  # the meter itself: half of it would be found out
        assert square > Fraction(sensitivity_rint(BITS, clip.norm, vector.size) / 2) ** 2


STEP, LENGTH = 1 / 16, 3.0


def centred(vector: np.ndarray, features: np.ndarray, labels: np.ndarray, patients: list[np.ndarray], clip: Clip,
            weights: np.ndarray = NO_WEIGHTS) -> np.ndarray:  # fmt: skip
    return clipped_centred_sum(vector, gather(features, labels, patients), clip, NO_SHIFT, weights, STEP, LENGTH)


def with_centre(vector: np.ndarray, seed: int = 5) -> np.ndarray:
    """(d,): bias, a centre, weight."""
    centre = np.random.default_rng(seed).normal(size=FEATURES) / STEP / 3
    return np.concatenate([vector[:CLASSES], centre, vector[CLASSES:]])


@pytest.mark.parametrize("clip", [Clip(0.3), Clip(2.0), Clip(0.6, stability=0.01)])
def test_a_centred_head_is_a_head_on_directions_and_a_pull_on_the_centre(clip: Clip) -> None:
    """The classifier's part by autograd on the directions; the centre's is the clipped gradient of βC/2·|x − m|²."""
    features, labels, patients, vector = site()
    whole, weights = with_centre(vector), np.array([1.0, 0.2, 5.0, 1.0, 3.0])
    point = STEP * whole[CLASSES : CLASSES + FEATURES]
    away = features - point
    directions = LENGTH * away / np.linalg.norm(away, axis=1, keepdims=True)
    exact = of_patients(vector, directions, labels, patients, NO_SHIFT, weights)
    norms, head = np.linalg.norm(exact, axis=1, keepdims=True), np.sqrt(1 - CENTRE_PART**2) * clip.norm
    factors = head / (norms + clip.stability) if clip.stability else np.minimum(1, head / norms)
    pull = np.zeros(FEATURES)
    for rows in patients:
        lengths = np.linalg.norm(away[rows], axis=1, keepdims=True)
        mean = (away[rows] * np.minimum(1, 2 / lengths)).mean(axis=0)
        pull += mean / max(1.0, np.linalg.norm(mean))
    found = centred(whole, features, labels, patients, clip, weights)
    parts = np.split(found, [CLASSES, CLASSES + FEATURES])
    assert np.linalg.norm(np.concatenate([parts[0], parts[2]]) - (exact * factors).sum(axis=0)) < 1e-8
    assert np.linalg.norm(parts[1] + CENTRE_PART * clip.norm * pull) < 1e-8


def test_descending_the_pull_brings_the_centre_to_the_mean() -> None:
    """At length 1, where nobody is cut, the fixed point is the mean over patients of their mean features."""
    features, labels, patients, vector = site()
    features /= 2 * np.linalg.norm(features, axis=1, keepdims=True)
    whole = with_centre(vector) * 0
    for _ in range(200):
        whole -= 0.5 / STEP * centred(whole, features, labels, patients, Clip(1.0)) / len(patients)
        whole[:CLASSES] = whole[CLASSES + FEATURES :] = 0
    mean = np.mean([features[rows].mean(axis=0) for rows in patients], axis=0)
    assert np.linalg.norm(STEP * whole[CLASSES : CLASSES + FEATURES] - mean) < 1e-4


@pytest.mark.parametrize("kind", ADVERSARIES)
@pytest.mark.parametrize("clip", [Clip(0.5), Clip(0.5, stability=1e-9)], ids=["flat", "automatic"])
def test_nobody_moves_both_parts_of_a_centred_head_beyond_the_clip(kind: str, clip: Clip) -> None:
    _, _, _, vector = site()
    rows, labels = ADVERSARIES[kind].astype(np.float32), np.array([0, 1])
    for whole in (with_centre(vector), with_centre(vector) * 1e3, np.zeros(CLASSES + FEATURES + CLASSES * FEATURES)):
        for patient in ([np.arange(2)], [np.array([0])]):
            one = centred(whole, rows, labels, patient, clip, NO_WEIGHTS * 1e6)
            assert np.isfinite(one).all()
            assert np.linalg.norm(one) <= clip.norm
            if kind == "nan":
                assert not one.any()


ALONE = """
import os
import services.hospital_node.__main__
import numpy as np
large = np.ones((7, 1000)) @ np.ones((1000, 1280))
print(len(os.listdir("/proc/self/task")))
"""


def test_the_node_multiplies_in_one_thread() -> None:
    """Threads of OpenBLAS spin between two products: they once took most of a round's processor time."""
    own = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    found = subprocess.run(
        [sys.executable, "-c", ALONE], env=own, cwd=Path(__file__).parents[2], check=True, capture_output=True
    )  # fmt: skip
    assert found.stdout.split() == [b"1"]
