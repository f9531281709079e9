"""Per-patient clipped gradient sums (privacy.md §1, §3, §4, §9)."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


def clipped_sum(
    module: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    clip: float,
    micro_batch: int = 32,
    count_non_finite: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Σ over patients of clip_C(mean over K of ∇ cross-entropy), float64 (d,), trainable parameters in sorted name order.

    images [patients, K, C, H, W] (or [patients, K, features] for a head), labels int64 [patients], both on the
    module's device. A patient whose gradient is not finite counts as zero; `count_non_finite` is told how many,
    for the site's own eyes only. No patients: zeros. The module's mode, gradients and hooks are left as found.
    """
    raise NotImplementedError


def integer_sum(total: npt.NDArray[np.float64], scale_bits: int, bound: float | None = None) -> npt.NDArray[np.int64]:
    """rint(2**scale_bits · total), int64 (d,); projected coordinate-wise onto ±`bound` (integer units) before rint."""
    raise NotImplementedError
