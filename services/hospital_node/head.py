"""Per-patient clipped gradient sums of a linear and of a centred head, in closed form, float64 (privacy.md §4, §5, §9).

The gradient of cross-entropy in the scores is e = softmax − truth, so a patient's gradient is the mean over its rows of
e ⊗ (x, 1), and its squared norm follows from two small Gram matrices: Σ_rs (e_r·e_s)(x_r·x_s + 1). No gradient of one
patient is ever built; the sum is one product of matrices. Order: mean → finite → clip → sum, as in clipping.py, which
does the same for any module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from services.common.dp.clip import Clip

CENTRE_PART = 0.15
"""β: how much of the clip C a patient's pull on the centre may take; √(1 − β²)·C is left for the classifier."""
_DOWN = 1 - 2.0**-40  # as in a clip: rounded down, so that both parts together never pass C

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Patients with equally many rows: `features` (p, r, f), `labels` (p, r), `gram` (p, r, r) = x_r·x_s + 1.

    A patient of whom a feature is not finite has zeros and `whole` (p,) False: its gradient counts as zero.
    """

    features: F64
    labels: I64
    gram: F64
    whole: npt.NDArray[np.bool_]


def gather(features: npt.NDArray[np.float32], labels: I64, patients: Sequence[I64]) -> tuple[Rows, ...]:
    """The rows of `patients` (row indices into `features` (n, f) and `labels` (n) for each), grouped by their count."""
    found = []
    for count in sorted({rows.size for rows in patients}):
        index = np.stack([rows for rows in patients if rows.size == count])
        values = features[index].astype(np.float64)
        whole = np.asarray(np.isfinite(values).all(axis=(1, 2)))
        values[~whole] = 0.0
        found.append(Rows(values, labels[index], values @ values.transpose(0, 2, 1) + 1.0, whole))
    return tuple(found)


def clipped_centred_sum(
    vector: F64,
    groups: Sequence[Rows],
    clip: Clip,
    shift: F64,
    weights: F64,
    step: float,
    length: float,
    count_non_finite: Callable[[int], None] | None = None,
) -> F64:
    """The same for a centred head (d,): bias (c), centre (f), weight (c, f); `step`·centre is the point m.

    The classifier sees `length`·(x − m)/|x − m| and its gradient is clipped to √(1 − β²)·C. The centre descends along
    −βC · mean over rows of (x − m), each patient's cut to length 1: the gradient of βC/2 · |x − m|². Together at most
    C, so noise and accounting are those of any other step (CENTRE_PART is β).
    """
    classes = shift.size
    width = (vector.size - classes) // (classes + 1)
    bias, centre, weight = np.split(vector, [classes, classes + width])
    point, pull, own = step * centre, np.zeros(width), []
    if not np.isfinite(point).all():
        return np.zeros_like(vector)
    for rows in groups:
        away = rows.features - point
        away[~rows.whole] = 0.0
        with np.errstate(over="ignore"):
            norms = np.linalg.norm(away, axis=2, keepdims=True)
            away /= np.where(np.isfinite(norms) & (norms > 0), norms, np.inf)  # a direction, or nothing
            mean = (away * np.minimum(norms, 2.0)).mean(axis=1)
        pull += (mean / np.maximum(1.0, np.linalg.norm(mean, axis=1, keepdims=True))).sum(axis=0)
        own.append(Rows(length * away, rows.labels, length**2 * (away @ away.transpose(0, 2, 1)) + 1.0, rows.whole))
    left = replace(clip, norm=clip.norm * float(np.sqrt(1 - CENTRE_PART**2)))
    found = clipped_head_sum(np.concatenate([bias, weight]), own, left, shift, weights, count_non_finite)
    return np.concatenate([found[:classes], -CENTRE_PART * _DOWN * clip.norm * pull, found[classes:]])


def clipped_head_sum(
    vector: F64,
    groups: Sequence[Rows],
    clip: Clip,
    shift: F64,
    weights: F64,
    count_non_finite: Callable[[int], None] | None = None,
) -> F64:
    """Σ over patients of clip(mean over rows of ∇ weighted cross-entropy), (d,): bias (c), then weight (c, f).

    `vector` (d,) in that order; `shift` (c,) is added to the scores (logit adjustment); `weights` (c,) multiply the
    loss of a row by its class, before the clip. A patient whose gradient is not finite counts as zero;
    `count_non_finite` is told how many there were, for the site's own eyes only. No patients: zeros.
    """
    classes = shift.size
    bias, weight = vector[:classes], vector[classes:].reshape(classes, -1)
    total, refused = np.zeros((classes, weight.shape[1] + 1)), 0
    for rows in groups:
        patients, each = rows.labels.shape
        with np.errstate(over="ignore", invalid="ignore"):
            flat = rows.features.reshape(patients * each, -1)
            scores = (weight @ flat.T).T.reshape(patients, each, classes) + (bias + shift)  # one product of matrices
            scores -= scores.max(axis=2, keepdims=True)
            errors = np.exp(scores)
            errors /= errors.sum(axis=2, keepdims=True)
            np.put_along_axis(
                errors,
                rows.labels[:, :, None],
                np.take_along_axis(errors, rows.labels[:, :, None], axis=2) - 1.0,
                axis=2,
            )
            errors *= weights[rows.labels][:, :, None] / each
            square = ((errors @ errors.transpose(0, 2, 1)) * rows.gram).sum(axis=(1, 2))
            norms = np.sqrt(np.maximum(square, 0.0))
        norms[~rows.whole] = np.nan
        factors = clip.factors(norms)
        errors[~np.isfinite(norms)] = 0.0
        refused += int((~np.isfinite(norms)).sum())
        scaled = (errors * factors[:, None, None]).reshape(-1, classes)
        total[:, 0] += scaled.sum(axis=0)
        total[:, 1:] += scaled.T @ flat
    if count_non_finite is not None:
        count_non_finite(refused)
    return np.concatenate([total[:, 0], total[:, 1:].ravel()])
