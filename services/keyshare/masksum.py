"""Streams of one piece, summed over a certified cohort: chunks out, their digest at the end; memory O(block)."""

from collections.abc import Generator, Sequence

from services.common.secagg.digests import chunk_digest, vector_digest
from services.common.secagg.encoding import LaneTable
from services.common.secagg.masking import sum_streams

Chunk = tuple[int, int, bytes]
"""(piece, index of the chunk in the whole vector, packed lanes)."""


def sum_piece(
    piece: int, keys: Sequence[bytes], table: LaneTable, first: int, chunks: int
) -> Generator[Chunk, None, bytes]:
    """The summed streams of `keys`, one a hospital of U; returns the vector digest of the range `first`, `chunks`.

    Raises MALFORMED for a range outside the vector.
    """
    size, digests = 0, []
    for index, data in enumerate(sum_streams(keys, table.ring, table.total_bytes, first, chunks), first):
        size += len(data)
        digests.append(chunk_digest(data))
        yield piece, index, data
    return vector_digest(size, digests)
