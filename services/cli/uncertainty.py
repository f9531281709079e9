"""How sure released figures are: the noise that was added on purpose, and the draw of patients. Pure.

The released sums are x = count + noise, with independent noise of a known deviation on every lane. An interval is the
figure ± 1.96 deviations of the same figure over simulated releases: counts drawn again from the released shares
(binomial and multinomial: these patients are a sample), noise added again. Post-processing: it costs no privacy.
Its coverage is tested. The simulation is seeded: the same evidence gives the same page. It decides nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.aggregator.gate import final_figures, gate_figures
from services.common.documents.costs import final_noise, gate_noise
from services.common.documents.study import Study
from services.common.dp.noise import ROUNDING_VARIANCE

F64 = npt.NDArray[np.float64]
_DRAWS = 400
_95 = 1.96
_FEWEST_DEVIATIONS = 3.0  # of the noise on a class's total: below, a ratio of the two has no usable law
_SEED = 20_260_101


@dataclass(frozen=True)
class Interval:
    """95 %, inside [0, 1]."""

    low: float
    high: float


@dataclass(frozen=True)
class Reliability:
    """How often a score came true. Bins ascending; those whose count drowns in noise are not among the points.

    `points`: (mid score, share that came true, low, high). `error`: expected calibration error over all bins.
    `floor`: the error that noise and the draw of patients alone would show of a perfectly calibrated model.
    """

    points: tuple[tuple[float, float, float, float], ...]
    drowned: int
    error: float
    floor: float


def deviation(study: Study, kind: str, hospitals: int) -> float:
    """Of the noise on one released count of `kind` (train: a gate; final) over a cohort of `hospitals`, in patients."""
    counted = study.evaluation.gate_rounds if kind == "train" else study.evaluation.final
    if study.privacy.mechanism == "none" or not counted:
        return 0.0
    noise = gate_noise(study) if kind == "train" else final_noise(study)
    return math.sqrt(hospitals * (noise.scale**2 - ROUNDING_VARIANCE)) / 2.0**noise.fraction_bits


def intervals(sums: Mapping[str, Sequence[float]], classes: int, noise: float) -> dict[str, Interval]:
    """By figure, from the `sums` of one result. A figure is missing where a class is too small for its noise.

    `noise`: deviation of one count. Empty without sums (they may not fit a result).
    """
    draw = np.random.default_rng(_SEED)  # shown, never sent: neither mask nor noise comes from here
    found: dict[str, Interval] = {}
    if "gate" in sums:
        values = np.asarray(sums["gate"], np.float64)
        found |= _gate(values[:classes], values[classes:], noise, draw)
    if "confusion" in sums:
        confusion = np.asarray(sums["confusion"], np.float64).reshape(classes, classes)
        histogram = np.asarray(sums["histogram"], np.float64).reshape(classes, 2, -1)
        found |= _final(confusion, histogram, noise, draw)
    return found


def reliability(histogram: F64, noise: float) -> Reliability | None:
    """Over all classes together, each patient once a class, from `histogram` (classes, 2, bins), [0] the negatives.

    A bin's score is taken as its middle: that alone is off by up to half a bin. None without patients.
    """
    classes, _, bins = histogram.shape
    mid = (np.arange(bins) + 0.5) / bins
    misses, hits = histogram[:, 0].sum(axis=0), histogram[:, 1].sum(axis=0)
    seen, spread = misses + hits, noise * math.sqrt(classes)
    total = float(seen.sum())
    if total <= 0:
        return None
    # hits·(1 − mid) − misses·mid is 0 on average where a score comes true as often as it says
    gap = np.abs(hits * (1 - mid) - misses * mid)
    variance = spread**2 * (mid**2 + (1 - mid) ** 2) + np.clip(seen, 0, None) * mid * (1 - mid)
    points = []
    for i in np.flatnonzero(seen > max(1.0, 2 * spread * math.sqrt(2))):
        share = float(np.clip(hits[i] / seen[i], 0, 1))
        around = spread**2 * (share**2 + (1 - share) ** 2) + seen[i] * share * (1 - share)
        half = _95 * math.sqrt(float(around)) / float(seen[i])
        points.append((float(mid[i]), share, max(0.0, share - half), min(1.0, share + half)))
    floor = float(np.sqrt(2 / math.pi * variance).sum()) / total
    return Reliability(tuple(points), bins - len(points), float(gap.sum()) / total, floor)


def _gate(hits: F64, totals: F64, noise: float, draw: np.random.Generator) -> dict[str, Interval]:
    if not _enough(totals, noise):
        return {}
    patients = np.rint(np.clip(totals, 0, None)).astype(np.int64)
    share = np.clip(np.divide(hits, totals, out=np.zeros_like(hits), where=totals > 0), 0, 1)
    simulated = []
    for _ in range(_DRAWS):
        found = draw.binomial(patients, share) + draw.normal(0, noise, hits.size)
        simulated.append(gate_figures(found.tolist(), (patients + draw.normal(0, noise, hits.size)).tolist()))
    return _around(gate_figures(hits.tolist(), totals.tolist()), simulated)


def _final(confusion: F64, histogram: F64, noise: float, draw: np.random.Generator) -> dict[str, Interval]:
    cells, bins = confusion.shape[1], histogram.shape[2]
    rows_hold = _enough(confusion.sum(axis=1), noise * math.sqrt(cells))
    bins_hold = _enough(histogram.sum(axis=2).ravel(), noise * math.sqrt(bins))
    simulated = [
        final_figures(
            _again(confusion, draw) + draw.normal(0, noise, confusion.shape),
            _again(histogram, draw) + draw.normal(0, noise, histogram.shape),
        )
        for _ in range(_DRAWS)
    ]
    found = _around(final_figures(confusion, histogram), simulated)
    return {name: value for name, value in found.items() if (bins_hold if name == "macro_auc" else rows_hold)}


def _again(counts: F64, draw: np.random.Generator) -> F64:
    """The counts of another sample of as many patients, over the last axis."""
    kept = np.clip(counts, 0, None)
    total = kept.sum(axis=-1, keepdims=True)
    shares = np.divide(kept, total, out=np.full_like(kept, 1 / kept.shape[-1]), where=total > 0)
    patients = np.rint(np.clip(counts.sum(axis=-1), 0, None)).astype(np.int64)
    return draw.multinomial(patients, shares).astype(np.float64)


def _enough(totals: F64, noise: float) -> bool:
    """Whether every total stands clear of the noise on it; without noise an empty class is known to be empty."""
    return noise == 0 or bool((totals > _FEWEST_DEVIATIONS * noise).all())


def _around(figures: Mapping[str, float], simulated: Sequence[Mapping[str, float]]) -> dict[str, Interval]:
    found = {}
    for name, value in figures.items():
        half = _95 * float(np.std([one[name] for one in simulated if name in one]))
        found[name] = Interval(max(0.0, value - half), min(1.0, value + half))
    return found
