"""Membership inference with and without noise: by loss threshold (Yeom 2018) and LiRA (Carlini 2022), on drawn images.

A head on a random frozen backbone is trained on a random half of a small pool of drawn lesions, many times over. LiRA
knows from shadow models how each patient's score looks when it was in and when it was not; the targets are further
models. Training is one hospital's global steps: real clip, rounding and noise, and none of them for comparison.
"""

import math
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.cli.audit_finding import Finding, Reading, Say
from services.cli.audit_scratch import DELTA
from services.cli.synthetic import CAMERAS, draw_patient
from services.common.dp.accounting import calibrate
from services.common.dp.clip import Clip
from services.common.dp.noise import discrete_gaussian, integer_sum, sensitivity_rint, share_scale
from services.hospital_node.head import clipped_head_sum, gather

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_PIXELS, _FEATURES, _CLASSES = 28, 512, 4
_BITS = 18
_STEPS = 40
_LONG = 300  # steps without noise: until every patient is learned by heart
_RATE = 20.0
_FREQUENCY = 5.0
_UNBOUNDED = Clip(1e9)


@dataclass(frozen=True)
class Pool:
    """Patients of which each model is trained on half."""

    features: npt.NDArray[np.float32]
    labels: I64


@dataclass(frozen=True)
class Attacked:
    """What an attack achieved against one way to train: over all targets, members against the others."""

    auc: float
    rate_at_one_percent: float
    advantage: float


def measure_membership(seed: int, patients: int, shadows: int, targets: int, say: Say) -> Finding:
    """Both attacks against training without noise and at three ε."""
    generator = np.random.default_rng(seed)
    pool = draw_pool(generator, patients)
    finding = Finding(
        title="5. Membership inference",
        shows="How well two known attacks tell members from others by a finished model: well without noise, hardly at "
        "all with it. No advantage passes what (ε, δ) allows.",
        shows_not="What a cleverer attack can do: only ε bounds that.",
    )
    for target in (None, 8.0, 3.0, 1.0):
        name = "without noise" if target is None else f"ε = {target:g}"
        say(f"{shadows + targets} models, {name}")
        members = generator.integers(0, 2, (shadows + targets, patients)).astype(bool)
        outputs = [logits(train(pool, chosen, target), pool) for chosen in members]
        scores = np.array([confidence(output, pool.labels) for output in outputs])
        hits = np.array([output.argmax(axis=1) == pool.labels for output in outputs])
        loss = attacked(scores[shadows:], members[shadows:])
        lira = attacked(likelihood_ratios(scores, members, shadows), members[shadows:])
        finding.notes[name] = {
            "loss threshold": vars(loss),
            "LiRA": vars(lira),
            "accuracy on members": float(hits[members].mean()),
            "accuracy on others": float(hits[~members].mean()),
        }
        if target is not None:
            # Two independent rates over targets · patients / 2 trials each: five standard errors of slack.
            limit = min(1.0, largest_advantage(target, DELTA) + 5 * math.sqrt(1 / (targets * patients)))
            finding.readings.append(Reading(f"advantage of LiRA, {name}", lira.advantage, limit, "of 1"))
            finding.readings.append(Reading(f"advantage of loss, {name}", loss.advantage, limit, "of 1"))
    return finding


def draw_pool(generator: np.random.Generator, patients: int) -> Pool:
    """Drawn lesions, seen through a random frozen backbone: waves in random directions, features of length 1."""
    labels = generator.integers(0, _CLASSES, patients)
    pictures = np.array(
        [draw_patient(int(label), CAMERAS[0], _PIXELS, 1, generator)[0] for label in labels], np.float64
    ).reshape(patients, -1)
    weights = generator.normal(0, _FREQUENCY / 255 / math.sqrt(pictures.shape[1]), (pictures.shape[1], _FEATURES))
    features = np.cos(pictures @ weights + generator.uniform(0, 2 * np.pi, _FEATURES))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return Pool(features.astype(np.float32), labels)


def train(pool: Pool, members: Mask, epsilon: float | None) -> F64:
    """The head (d) after full-batch steps on `members` at this ε in all; None: neither clip nor noise."""
    rows = [np.array([row]) for row in np.flatnonzero(members)]
    groups, count = gather(pool.features, pool.labels, rows), max(1, len(rows))
    vector, ones = np.zeros(_CLASSES * (_FEATURES + 1)), np.ones(_CLASSES)
    clip = _UNBOUNDED if epsilon is None else Clip(1.0)
    noise = None
    if epsilon is not None:
        sigma = calibrate(epsilon, DELTA, 1.0, _STEPS)
        noise = discrete_gaussian(share_scale(sigma, sensitivity_rint(_BITS, 1.0, vector.size), 1, 0))
    for _ in range(_LONG if noise is None else _STEPS):
        total = clipped_head_sum(vector, groups, clip, np.zeros(_CLASSES), ones)
        if noise is not None:
            total = (integer_sum(total, _BITS) + noise.draw(secrets.token_bytes(32), total.size)) / 2.0**_BITS
        vector -= _RATE / count * total
    return vector


def logits(vector: F64, pool: Pool) -> F64:
    """Scores of the head `vector` (d) for every patient, (patients, classes)."""
    bias, weight = vector[:_CLASSES], vector[_CLASSES:].reshape(_CLASSES, _FEATURES)
    return np.asarray(pool.features @ weight.T + bias)


def confidence(scores: F64, labels: I64) -> F64:
    """For each patient log p/(1 − p) of the true class, (patients): what LiRA fits normal laws to."""
    others = scores.copy()
    np.put_along_axis(others, labels[:, None], -np.inf, axis=1)
    largest = others.max(axis=1, keepdims=True)
    rest = largest[:, 0] + np.log(np.exp(others - largest).sum(axis=1))
    return np.asarray(np.take_along_axis(scores, labels[:, None], axis=1)[:, 0] - rest)


def likelihood_ratios(scores: F64, members: Mask, shadows: int) -> F64:
    """LiRA of the targets (targets, patients): log of normal densities with a mean each and one spread for all."""
    known, inside = scores[:shadows], members[:shadows]
    means = [np.nanmean(np.where(mask, known, np.nan), axis=0) for mask in (inside, ~inside)]
    spreads = [
        float(np.nanstd(np.where(mask, known - mean, np.nan)))
        for mask, mean in zip((inside, ~inside), means, strict=True)
    ]
    logs = [
        -(((scores[shadows:] - mean) / spread) ** 2) / 2 - math.log(spread)
        for mean, spread in zip(means, spreads, strict=True)
    ]
    return np.asarray(logs[0] - logs[1])


def attacked(scores: F64, members: Mask) -> Attacked:
    """Area under the curve, true positives at 1 % false ones, and the largest gap of the two rates."""
    order = np.argsort(-scores.ravel(), kind="stable")
    hits = members.ravel()[order]
    true = np.concatenate(([0.0], np.cumsum(hits) / max(1, hits.sum())))
    false = np.concatenate(([0.0], np.cumsum(~hits) / max(1, (~hits).sum())))
    return Attacked(
        auc=float(np.trapezoid(true, false)),
        rate_at_one_percent=float(true[np.searchsorted(false, 0.01, side="right") - 1]),
        # At the middle, fixed before: the largest gap over all thresholds would be chosen with the truth.
        advantage=float(np.interp(0.5, np.linspace(0, 1, true.size), true - false)),
    )


def largest_advantage(epsilon: float, delta: float) -> float:
    """The largest difference of true and false positive rate that any test of an (ε, δ)-DP output can have."""
    return (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1)
