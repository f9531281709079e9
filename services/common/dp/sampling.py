"""Which patients are in a step, and which of their images (privacy.md §1, §4): AES-256-CTR words alone (P-8)."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from services.common.dp.keystream import keystream, words
from services.common.errors import Reason, ServiceError


def poisson_sample(key: bytes, population: int, rate: float) -> npt.NDArray[np.int64]:
    """Ascending indices of the patients of 0 … population − 1 that are in this step, each alone with chance `rate`.

    u64 < ⌊q·2⁶⁴⌋, so the true rate is never above q. `key`: 32 fresh bytes of the operating system, for this one
    sample. Raises ServiceError(OUT_OF_BOUND) unless 0 < rate ≤ 1.
    """
    if not 0 < rate <= 1:
        raise ServiceError(Reason.OUT_OF_BOUND, f"sampling rate {rate} is not in (0, 1]: correct the study")
    if rate == 1:
        return np.arange(population, dtype=np.int64)
    threshold = np.uint64(int(Fraction(rate) * 2**64))
    return np.flatnonzero(words(key, 0, population) < threshold).astype(np.int64, copy=False)


def choose_one(key: bytes, counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """For each i a uniform index in [0, counts[i]), int64: which image of each sampled patient.

    ⌊U·n/2¹²⁸⌋ of a uniform 128-bit U: every index has its chance to within 2⁻¹²⁸. `key`: 32 fresh bytes of the
    operating system, for this one choice. Raises ServiceError(OUT_OF_BOUND) for a count not in [1, 2**32).
    """
    sizes = np.asarray(counts, dtype=np.int64)
    if sizes.size and not (sizes.min() >= 1 and sizes.max() < 2**32):
        raise ServiceError(Reason.OUT_OF_BOUND, "a patient without an image cannot be chosen from: check the data set")
    limbs = np.frombuffer(keystream(key, 0, 16 * sizes.size), dtype="<u4").reshape(sizes.size, 4).astype(np.uint64)
    factor, carry = sizes.astype(np.uint64), np.zeros(sizes.size, dtype=np.uint64)
    for limb in limbs.T:  # low limb first; limb · n + carry stays below 2**64
        carry = (limb * factor + carry) >> np.uint64(32)
    return carry.astype(np.int64)
