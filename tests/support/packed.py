"""Packed vectors that lie whole in memory, encoded and masked."""

from collections.abc import Mapping, Sequence
from typing import Any

from services.common.secagg.encoding import LaneTable, encode_vector
from services.common.secagg.masking import mask_vector
from services.common.secagg.ring import I64, Ring
from services.common.secagg.rounding import Reals


def encoded(table: LaneTable, values: Mapping[str, I64 | Reals], noised: bool = False, workers: int = 1) -> bytes:
    """x of these values."""
    return b"".join(encode_vector(table, values, bytes, noised, workers=workers))


def masked(x: Any, ring: Ring, keys: Sequence[bytes], workers: int = 1) -> list[bytes]:
    """The chunks of y = x + the streams of `keys`; `x` is any contiguous buffer."""
    packed = memoryview(x).cast("B")

    def fill(start: int, out: memoryview) -> None:
        out[:] = packed[start : start + len(out)]

    return list(mask_vector(fill, packed.nbytes, ring, keys, bytes, workers=workers))
