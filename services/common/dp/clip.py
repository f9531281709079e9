"""How one patient's gradient is bounded before it is summed (privacy.md §3, §5): factors of its norm alone.

Danger: 0 · inf is NaN, so whoever multiplies replaces what is not finite by zero FIRST; the factor here is 0 then.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_DOWN = 1 - 2.0**-40  # the factor is rounded down, so that the clipped norm is never above C


@dataclass(frozen=True)
class Clip:
    """To L2 norm at most `norm` = C. Flat: min(1, C/‖g‖); with a `stability` γ automatic: C/(‖g‖ + γ) (Bu 2022)."""

    norm: float
    stability: float | None = None

    def factors(self, norms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """By what each patient's gradient is multiplied, float64 (patients,): 0 where its norm is not finite."""
        finite = np.isfinite(norms)
        known = np.where(finite, norms, 1.0)
        if self.stability is not None:
            found = self.norm / (known + self.stability) * _DOWN
        else:
            found = np.where(known > self.norm, self.norm / np.maximum(known, self.norm) * _DOWN, 1.0)
        return np.where(finite, found, 0.0)
