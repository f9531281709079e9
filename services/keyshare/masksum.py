"""The streams of one piece, summed over a certified cohort, chunk by chunk; memory O(block)."""

from collections.abc import Iterator, Sequence

from services.common.secagg.digests import chunk_digest, with_digest
from services.common.secagg.encoding import LaneTable
from services.common.secagg.masking import sum_streams
from services.common.secagg.ring import chunk_lengths

Chunk = tuple[int, int, bytes]
"""(piece, index of the chunk in the whole vector, packed lanes)."""


def sum_chunks(
    keys: Sequence[bytes], table: LaneTable, first: int, chunks: int, keep: bool
) -> Iterator[tuple[int, bytes, bytes]]:
    """(index, packed lanes, their SHA-256) of the sum of the streams of `keys`, one a hospital of U.

    Without `keep` the lanes are empty: a digest needs none. Raises MALFORMED outside the vector.
    """

    take = with_digest if keep else _digest_alone
    for index, (data, digest) in enumerate(
        sum_streams(keys, table.ring, table.total_bytes, first, chunks, take), first
    ):
        yield index, data, digest


def _digest_alone(chunk: memoryview) -> tuple[bytes, bytes]:
    return b"", chunk_digest(chunk)


def range_bytes(table: LaneTable, first: int, chunks: int) -> int:
    """Packed bytes of a range of chunks."""
    return sum(chunk_lengths(table.total_bytes)[first : first + chunks])
