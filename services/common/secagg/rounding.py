"""Real numbers to integers: clip, scale, round, block by block (protocol.md §6, mechanisms `none` and `local`).

An update of megabytes is never copied: `clip_update` looks at it once, for its norm and for numbers that are not
finite; the clip itself, scale and rounding happen in a block that stays in the cache, while the vector is encoded.
Dangers: clipping passes NaN through, so finiteness is checked FIRST; stochastic rounding needs float64.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from services.common.errors import Reason, ServiceError
from services.common.secagg.parallel import in_order

ROUNDED = 1 << 15  # most values rounded at once: a few arrays of them stay in the cache
_LOOKED_AT = 1 << 17
_TO_LOW_BITS = 1.5 * 2.0**52  # a float64 below 2^51 plus this is rounded to even, its integer in the low bits
_ONE = np.uint64(0x3FF0 << 48)  # the bits of 1.0: with 52 random bits below them, uniform in [1, 2)
_ZEROS = memoryview(bytes(8 * ROUNDED + 16))
F64 = npt.NDArray[np.float64]
Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Reals:
    """Numbers to be encoded: each times `factor`, kept within ±`limit`, then scaled by its lane and rounded.

    With a 32-byte `key` from the operating system the rounding is stochastic and unbiased (codes of at most 16 bits
    without DP noise), else to the nearest even.
    """

    numbers: Floats = field(repr=False)
    factor: float = 1.0
    limit: float = np.inf
    key: bytes | None = field(default=None, repr=False)


def clip_update(delta: Floats, l2: float, linf: float, key: bytes | None = None) -> Reals:
    """`delta` with norm ≤ `l2`, then each coordinate in ±`linf`, to be rounded with `key`.

    Raises NOT_FINITE first, where any number is NaN or infinite: a failed training sends nothing.
    """
    norm, unit = _norm(delta, 1.0), 1.0
    if not np.isfinite(norm):
        largest = float(np.max(np.abs(delta)))
        if not np.isfinite(largest):
            raise ServiceError(
                Reason.NOT_FINITE, "the update holds NaN or infinity: the training failed, nothing is sent"
            )
        norm, unit = _norm(delta, largest), largest  # finite numbers whose squares overflow
    return Reals(delta, l2 / norm / unit if norm > l2 / unit else 1.0, linf, key)


class Rounder:
    """Rounds `reals` for lanes of `fraction_bits` and `bound`, in memory of its own. One thread."""

    def __init__(self, reals: Reals, fraction_bits: int, bound: int) -> None:
        scale = 2.0**fraction_bits  # a power of two: scaling before the clip or after is the same to the last bit
        self._numbers, self._factor, self._limit, self._bound = (
            reals.numbers, reals.factor * scale, reals.limit * scale, bound,
        )  # fmt: skip
        self._values = np.empty(ROUNDED)
        self._cipher = None if reals.key is None else Cipher(AES256(reals.key), CTR(bytes(16))).encryptor()
        self._random = np.empty(0 if reals.key is None else ROUNDED + 2, np.uint64)
        self._below = np.empty(0 if reals.key is None else ROUNDED)

    def codes(self, start: int, count: int) -> F64:
        """Of numbers start … start + count (at most ROUNDED) float64 whose LOW 32 BITS are the codes mod 2^32.

        Valid until the next call. Raises NOT_FINITE; OUT_OF_BOUND for a code beyond the bound.
        """
        values = self._values[:count]
        np.multiply(self._numbers[start : start + count], self._factor, out=values, dtype=np.float64)
        if np.isfinite(self._limit):
            np.clip(values, -self._limit, self._limit, out=values)
        if self._cipher is not None:
            self._draw(self._cipher, start, values)
        lowest, highest = float(values.min()), float(values.max())
        if not np.isfinite(lowest + highest):
            raise ServiceError(Reason.NOT_FINITE, "a value to encode is NaN or infinite: nothing is sent")
        if round(lowest) < -self._bound or round(highest) > self._bound:
            raise ServiceError(Reason.OUT_OF_BOUND, f"a value is beyond its bound {self._bound}: nothing is sent")
        values += _TO_LOW_BITS
        return values

    def _draw(self, cipher: CipherContext, start: int, values: F64) -> None:
        """Each value to the integer below it or the one above: eight bytes a value of ONE keystream."""
        first = start // 2 * 2  # whole AES blocks
        words = self._random[: len(values) + 2]
        cipher.reset_nonce((first // 2).to_bytes(16, "big"))
        cipher.update_into(_ZEROS[: words.nbytes], words.view(np.uint8).data)
        words = words[start - first :][: len(values)]
        np.right_shift(words, np.uint64(12), out=words)
        np.bitwise_or(words, _ONE, out=words)
        uniform, below = words.view(np.float64), self._below[: len(values)]
        uniform -= 1.0
        np.floor(values, out=below)
        values -= below
        # Compared with the exact fraction: floor(scaled + uniform) would round the sum a second time.
        np.add(below, uniform < values, out=values)


def _norm(delta: Floats, unit: float) -> float:
    """The L2 norm in multiples of `unit`: blocks on all cores, added up in order, so that it never varies."""

    def square(number: int) -> float:
        block = np.asarray(delta[number * _LOOKED_AT : (number + 1) * _LOOKED_AT], np.float64)
        if unit != 1.0:
            block = block / unit
        return float(np.einsum("i,i->", block, block))

    return float(np.sqrt(sum(in_order(square, range(-(-len(delta) // _LOOKED_AT))))))
