"""The streams of one piece, summed over a certified cohort, chunk by chunk; memory O(block)."""

from collections.abc import Iterator, Sequence

from services.common.secagg.digests import chunk_digest, vector_digest
from services.common.secagg.encoding import LaneTable
from services.common.secagg.masking import sum_streams

Chunk = tuple[int, int, bytes]
"""(piece, index of the chunk in the whole vector, packed lanes)."""


def sum_chunks(keys: Sequence[bytes], table: LaneTable, first: int, chunks: int) -> Iterator[tuple[int, bytes]]:
    """(index, packed lanes) of the sum of the streams of `keys`, one a hospital of U. MALFORMED outside the vector."""
    return enumerate(sum_streams(keys, table.ring, table.total_bytes, first, chunks), first)


class RangeDigest:
    """The vector digest (protocol.md §10) of a range of chunks that arrive in order."""

    def __init__(self) -> None:
        self._bytes = 0
        self._digests: list[bytes] = []

    def add(self, data: bytes) -> None:
        """The next chunk."""
        self._bytes += len(data)
        self._digests.append(chunk_digest(data))

    def result(self) -> bytes:
        """The digest."""
        return vector_digest(self._bytes, self._digests)
