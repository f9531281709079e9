"""The sum of a round's packed vectors, hospital by hospital: plain, or under the masks of the real protocol.

Memory is that of one vector and of one sum a piece, whatever the number of hospitals. Masked: every hospital draws its
seeds from the operating system, its vector is hidden under the stream of every piece, and the piece sums that pods
would release are taken off at the end. Boxes, signatures and the committee's messages are not simulated.
"""

import secrets
from typing import Protocol

from services.common.secagg.committee import Committee
from services.common.secagg.encoding import LaneTable
from services.common.secagg.masking import mask_vector, stream_key, sum_streams
from services.common.secagg.ring import RingSum, chunk_lengths
from services.common.secagg.sealing import SEED_BYTES


class Sum(Protocol):
    """One round's running sum."""

    def add(self, hospital: str, packed: bytes) -> None:
        """Add the packed vector of one hospital."""

    def close(self) -> bytes:
        """The sum of all that were added, packed."""


class PlainSum:
    """Vectors as they are: masks cancel, so the outcome is the same."""

    def __init__(self, table: LaneTable) -> None:
        self._total = RingSum(table.ring, table.total_bytes)

    def add(self, hospital: str, packed: bytes) -> None:
        """Add the packed vector of one hospital."""
        self._total.add(packed)

    def close(self) -> bytes:
        """The sum of all that were added, packed."""
        return self._total.result()


class MaskedSum:
    """Vectors under their masks, and beside them the sum of the streams of every piece."""

    def __init__(self, table: LaneTable, committee: Committee) -> None:
        self._ring, self._bytes = table.ring, table.total_bytes
        self._chunks = len(chunk_lengths(table.total_bytes))
        self._total = RingSum(table.ring, table.total_bytes)
        self._pieces = [RingSum(table.ring, table.total_bytes) for _ in committee.pieces]
        self._attempt = secrets.token_bytes(32)  # stands for M: there is no manifest to be signed

    def add(self, hospital: str, packed: bytes) -> None:
        """Mask the packed vector of one hospital with fresh seeds and add it; the pods' sums take its streams."""
        keys = [
            stream_key(secrets.token_bytes(SEED_BYTES), self._attempt, hospital, j) for j in range(len(self._pieces))
        ]

        def fill(start: int, out: memoryview) -> None:
            out[:] = packed[start : start + len(out)]

        self._total.add(b"".join(mask_vector(fill, self._bytes, self._ring, keys, bytes)))
        for piece, key in zip(self._pieces, keys, strict=True):
            piece.add(b"".join(sum_streams([key], self._ring, self._bytes, 0, self._chunks, bytes)))

    def masked(self) -> bytes:
        """What the aggregator holds before any pod has released anything."""
        return self._total.result()

    def close(self) -> bytes:
        """The sum of all that were added, packed: masked vectors minus the piece sums."""
        for piece in self._pieces:
            self._total.subtract(piece.result())
        return self._total.result()
