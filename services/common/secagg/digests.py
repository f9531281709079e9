"""Digests of long vectors, chunk by chunk (protocol.md §10, "vector digest").

H(label(vector) ‖ u64(bytes) ‖ H(chunk 0) ‖ H(chunk 1) ‖ …): chunks may be hashed in parallel, each can be
refused at once, and a transfer resumes at any chunk.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from services.common.errors import Reason, ServiceError
from services.common.secagg.ring import CHUNK_BYTES, chunk_lengths
from services.common.secagg.signing import label


def chunk_digest(chunk: Any) -> bytes:
    """SHA-256 of one chunk (any contiguous buffer), 32 bytes."""
    return hashlib.sha256(chunk).digest()


def with_digest(chunk: memoryview) -> tuple[bytes, bytes]:
    """A copy of a chunk that lies in memory which is used again, and its digest: what a worker hands on."""
    return bytes(chunk), chunk_digest(chunk)


def digest_alone(chunk: memoryview) -> tuple[bytes, bytes]:
    """As `with_digest`, where nobody needs the chunk itself."""
    return b"", chunk_digest(chunk)


def vector_digest(total_bytes: int, chunk_digests: Iterable[bytes]) -> bytes:
    """The digest of a vector of `total_bytes` whose chunks have `chunk_digests`, in order.

    Raises MALFORMED where their number does not fit the length.
    """
    digests = tuple(chunk_digests)
    chunks = -(-total_bytes // CHUNK_BYTES)
    if len(digests) != chunks or total_bytes < 1:
        raise ServiceError(
            Reason.MALFORMED, f"{len(digests)} chunk digests for {total_bytes} bytes, which have {chunks} chunks"
        )
    return hashlib.sha256(label("vector") + total_bytes.to_bytes(8, "big") + b"".join(digests)).digest()


class VectorDigest:
    """The digest of a vector whose chunks arrive in order, one `add` each."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._lengths = chunk_lengths(total_bytes)
        self._digests: list[bytes] = []

    def add(self, chunk: Any) -> bytes:
        """Take the next chunk (a contiguous buffer) and return its digest. Raises MALFORMED for a wrong length."""
        number = len(self._digests)
        size = memoryview(chunk).nbytes
        if number >= len(self._lengths) or size != self._lengths[number]:
            raise ServiceError(
                Reason.MALFORMED, f"chunk {number} has {size} bytes, not what a vector of {self.total_bytes} has there"
            )
        self._digests.append(chunk_digest(chunk))
        return self._digests[-1]

    def result(self) -> bytes:
        """The vector's digest. Raises MALFORMED while chunks are missing."""
        return vector_digest(self.total_bytes, self._digests)
