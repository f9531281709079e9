"""A vector that lies in memory, masked."""

from collections.abc import Sequence
from typing import Any

from services.common.secagg.masking import mask_vector
from services.common.secagg.ring import Ring


def masked(x: Any, ring: Ring, keys: Sequence[bytes], workers: int = 1) -> list[bytes]:
    """The chunks of y = x + the streams of `keys`; `x` is any contiguous buffer."""
    packed = memoryview(x).cast("B")

    def fill(start: int, out: memoryview) -> None:
        out[:] = packed[start : start + len(out)]

    return list(mask_vector(fill, packed.nbytes, ring, keys, bytes, workers=workers))
