"""The discrete Gaussian in integers, its shares and the sensitivity of a rounded sum (privacy.md §2 and §4).

Nothing here draws: the caller passes a fresh 32-byte key of the operating system for every vector.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from services.common.dp.exact import exact
from services.common.dp.keystream import keystream, words
from services.common.errors import Reason, ServiceError

SMALLEST_SCALE = 256
LARGEST_SCALE = 2**40  # the tables grow with the cube root of the scale: 28 MB here
TAIL = 14  # table half-width in standard deviations: 2·Φ(-14) < 2e-44
HIGH_BITS = 64
LOW_BITS = 128
TABLE_BITS = HIGH_BITS + LOW_BITS
ROUNDING_VARIANCE = 9  # D(Z, S) = N(0, S² - 9) and randomised rounding, but for 1e-76
_GUARD_BITS = 128
_SLOT_BITS = 16  # of a high word, which say where in a table the search begins
_LOW_FIRST_BLOCK = 2**127  # low parts lie in the upper half of the counter space
_BLOCK_DRAWS = 1 << 15


class CumulativeTable:
    """Inversion table of the discrete Gaussian on the integers with variance `variance`, cut at `TAIL` deviations.

    `bounds[i]` = round(2**192 · P(X ≤ i - radius)), i < 2·radius. A uniform 192-bit U maps to the number of bounds
    ≤ U, minus `radius`. 192 bits rather than 128, because 128 leave a total variation of 1e-36 in a wide table;
    the low 128 bits are drawn on a tie only, so they cost nothing.
    """

    def __init__(self, variance: Fraction) -> None:
        self.radius = math.isqrt(math.ceil(TAIL * TAIL * variance)) + 1
        self.bounds = _bounds(variance, self.radius)
        self._high = np.array([bound >> LOW_BITS for bound in self.bounds], dtype=np.uint64)
        starts = np.arange(1 << _SLOT_BITS, dtype=np.uint64) << np.uint64(HIGH_BITS - _SLOT_BITS)
        self._below = self._high.searchsorted(starts)
        self._crowded = np.diff(self._below, append=len(self.bounds)) > 1

    def invert(self, high: npt.NDArray[np.uint64], low: Callable[[int], int]) -> npt.NDArray[np.int64]:
        """The variates (count,) of uniform high words (count,); `low(i)` gives the low 128 bits of number i."""
        index = self._search(high)
        ties = np.flatnonzero(self._high[index - 1] == high)  # index 0 looks at the last bound: harmless
        for i in ties.tolist():
            index[i] = bisect_right(self.bounds, (int(high[i]) << LOW_BITS) | low(i))
        return (index - self.radius).astype(np.int64, copy=False)

    def _search(self, high: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """How many high words of bounds are ≤ each of `high`: most slots of 2**48 words hold at most one bound.

        To halve the table for every word took ten times as long. The last slot holds the last bound, so that one
        lies at or after the start of every slot.
        """
        slot = (high >> np.uint64(HIGH_BITS - _SLOT_BITS)).astype(np.intp)
        index: npt.NDArray[np.intp] = self._below.take(slot)
        index += self._high.take(index) <= high
        crowded = np.flatnonzero(self._crowded.take(slot))
        index[crowded] = self._high.searchsorted(high[crowded], side="right")
        return index


def _bounds(variance: Fraction, radius: int) -> list[int]:
    """Cumulative bounds in fixed point, by the recurrence exp(-(x+1)²/2v) = exp(-x²/2v) · r^(2x+1), r = exp(-1/2v).

    Every step loses less than 2 units of 2**-320, so a bound is off by far less than one unit of 2**-192.
    """
    bits = TABLE_BITS + _GUARD_BITS
    with exact(bits + 32) as mpmath:
        ratio = int(
            mpmath.floor(mpmath.ldexp(mpmath.exp(-mpmath.mpf(variance.denominator) / (2 * variance.numerator)), bits))
        )
    weights = [1 << bits]
    factor, square = ratio, (ratio * ratio) >> bits
    for _ in range(radius):
        weights.append((weights[-1] * factor) >> bits)
        factor = (factor * square) >> bits
    total = 2 * sum(weights) - weights[0]
    bounds, running = [], 0
    for x in range(-radius, radius):
        running += weights[abs(x)]
        bounds.append(((running << (TABLE_BITS + 1)) + total) // (2 * total))
    return bounds


class DiscreteGaussian:
    """D(Z, S): the discrete Gaussian of parameter S = `scale`, by the three-fold composition of privacy.md §4.

    Z = X₀ + wX₁ + w²X₂ with X_i of variance S²/(1 + w² + w⁴); total variation below 1e-37 a draw. The table is
    built once. Raises ServiceError(OUT_OF_BOUND) for a scale below 256 or above 2**40.
    """

    def __init__(self, scale: int) -> None:
        if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
            raise ServiceError(
                Reason.OUT_OF_BOUND,
                f"noise scale {scale} is not in [{SMALLEST_SCALE}, {LARGEST_SCALE}]: "
                "choose other scale_bits for this lane class",
            )
        self.scale = scale
        self.width = _cube_root(scale // 3)
        self.table = CumulativeTable(Fraction(scale * scale, 1 + self.width**2 + self.width**4))

    def draw(self, key: bytes, count: int, start: int = 0) -> npt.NDArray[np.int64]:
        """Draws `start` … `start + count - 1` of the sequence that `key` (32 bytes) defines, int64 (count,).

        Splitting a range changes nothing. A key MUST be fresh from the operating system and serve one vector.
        """
        drawn = np.empty(count, dtype=np.int64)
        for first in range(0, count, _BLOCK_DRAWS):
            block = drawn[first : first + _BLOCK_DRAWS]
            block[:] = self._block(key, start + first, len(block))
        return drawn

    def _block(self, key: bytes, start: int, count: int) -> npt.NDArray[np.int64]:
        first = 3 * start

        def low(i: int) -> int:
            return int.from_bytes(keystream(key, _LOW_FIRST_BLOCK + first + i, LOW_BITS // 8), "big")

        x = self.table.invert(words(key, first, 3 * count), low).reshape(count, 3)
        return x[:, 0] + self.width * (x[:, 1] + self.width * x[:, 2])


@lru_cache(maxsize=8)
def discrete_gaussian(scale: int) -> DiscreteGaussian:
    """D(Z, S) with its table kept: every round of a study draws at the same scales."""
    return DiscreteGaussian(scale)


def _cube_root(value: int) -> int:
    """⌊∛value⌋ for value < 2**48."""
    root = round(math.cbrt(value))
    return root - int(root * root * root > value)


@lru_cache(maxsize=64)
def share_scale(noise_multiplier: float, sensitivity: float, minimum_cohort: int, colluding: int) -> int:
    """S_h = ⌈√((σ²Δ₂² + 9)/(n_min − k))⌉, exactly: what one hospital adds, in integer units of its lane class.

    `local` is minimum_cohort − colluding = 1. Raises ServiceError(OUT_OF_BOUND) unless that difference is ≥ 1.
    """
    honest = minimum_cohort - colluding
    if honest < 1:
        raise ServiceError(
            Reason.OUT_OF_BOUND,
            f"a cohort of {minimum_cohort} with {colluding} colluding leaves nobody to add noise: raise the cohort",
        )
    variance = (Fraction(noise_multiplier) * Fraction(sensitivity)) ** 2 + ROUNDING_VARIANCE
    return _root_up(variance / honest)


def _root_up(value: Fraction) -> int:
    """⌈√value⌉."""
    root = math.isqrt(value.numerator // value.denominator)
    return root if root * root >= value else root + 1


def effective_multiplier(scales: Sequence[int], sensitivity: float) -> float:
    """z = √(ΣS_h² − 9)/Δ₂ over the honest shares, rounded down: what the accountants are asked about.

    Zero (no ε can be claimed) when the shares do not even cover the rounding term.
    """
    variance = sum(scale * scale for scale in scales) - ROUNDING_VARIANCE
    return math.nextafter(math.sqrt(variance) / sensitivity, 0.0) if variance > 0 else 0.0


def sensitivity_rint(scale_bits: int, clip: float, parameters: int) -> float:
    """Δ₂ = sC(1 + 2⁻¹⁰) + √d in integer units, rounded up: rint of a hospital's whole sum, s = 2**scale_bits.

    2⁻¹⁰ covers float32 gradients; √d is twice the half unit that rint may move each of the d coordinates.
    """
    return math.nextafter(math.ldexp(clip, scale_bits) * (1 + 2**-10) + math.sqrt(parameters), math.inf)


def integer_sum(total: npt.NDArray[np.float64], scale_bits: int, bound: float | None = None) -> npt.NDArray[np.int64]:
    """rint(2**scale_bits · total), int64 (d,); projected coordinate-wise onto ±`bound` (integer units) before rint.

    A projection onto a box is 1-Lipschitz, so Δ₂ stays. Raises NOT_FINITE: after a clip that is a bug.
    """
    scaled = np.ldexp(total, scale_bits)
    if not np.isfinite(scaled).all():
        raise ServiceError(
            Reason.NOT_FINITE, "a clipped sum is not finite: this is a fault of the node, stop the study"
        )
    if bound is not None:
        scaled = np.clip(scaled, -bound, bound)
    return np.rint(scaled).astype(np.int64)


def vote_scale_bits(noise_multiplier: float, votes: int, minimum_cohort: int, colluding: int) -> int:
    """The smallest power of two for a lane class of counts that makes the share's scale ≥ 256 (privacy.md §4).

    `votes` = lanes that one patient adds 1 to; Δ₂ of the scaled counts is 2**bits · √votes. Raises
    ServiceError(OUT_OF_BOUND) for a σ that is not positive.
    """
    if not noise_multiplier > 0:
        raise ServiceError(
            Reason.OUT_OF_BOUND, f"noise multiplier {noise_multiplier} gives counts no noise at any scale"
        )
    bits = 0
    while share_scale(noise_multiplier, vote_sensitivity(votes, bits), minimum_cohort, colluding) < SMALLEST_SCALE:
        bits += 1
    return bits


def vote_sensitivity(votes: int, scale_bits: int) -> float:
    """Δ₂ = 2**scale_bits · √votes, rounded up: counts are exact integers, so nothing is added for rounding."""
    return math.nextafter(math.ldexp(math.sqrt(votes), scale_bits), math.inf)
