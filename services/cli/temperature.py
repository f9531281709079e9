"""The temperature that makes released scores come true (Guo et al. 2017), from the score histograms alone. Pure.

Scores are known by bin and class, so each class is scaled for itself: p → sigmoid(logit(p) / T), with the middle of a
bin as its score. One T for all classes; the least log loss over a fixed grid. The loss is linear in the counts, so
unbiased noise leaves it unbiased: counts are not clipped. Post-processing of released counts: it costs no privacy.
"""

import math
from collections.abc import Sequence

import numpy as np

GRID = tuple(float(f"{value:.3g}") for value in np.geomspace(0.25, 4.0, 65))
_SURE = 2.0  # deviations of the noise by which a temperature must be better than 1


def temperature(histogram: Sequence[float], classes: int, noise: float) -> float:
    """The T of `GRID` with the least log loss; 1 where its gain may be the noise's.

    `histogram` is [class][0 negatives, 1 positives][bin] as released; `noise`: deviation of one count.
    """
    counts = np.asarray(histogram, np.float64).reshape(classes, 2, -1).sum(axis=0)
    middle = (np.arange(counts.shape[1]) + 0.5) / counts.shape[1]
    logit = np.log(middle / (1 - middle))

    def losses(value: float) -> np.ndarray:
        """Of one negative and of one positive in each bin, (2, bins)."""
        return np.stack([np.logaddexp(0, logit / value), np.logaddexp(0, -logit / value)])

    best = min(GRID, key=lambda value: (float((counts * losses(value)).sum()), abs(math.log(value))))
    gained = losses(1.0) - losses(best)
    deviation = noise * math.sqrt(classes) * float(np.linalg.norm(gained))
    return best if float((counts * gained).sum()) > _SURE * deviation else 1.0
