"""x on the disk: one file under its vector digest (protocol.md §10), read chunk by chunk by any thread."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from services.common.errors import Reason, ServiceError
from services.common.secagg.digests import chunk_digest, vector_digest
from services.common.secagg.masking import Fill
from services.common.secagg.ring import CHUNK_BYTES, chunk_lengths
from services.common.store.blobs import BlobStore


def write_vector(blobs: BlobStore, total_bytes: int, chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Store the chunks of a vector, each with its digest; on the disk when this returns its vector digest."""
    digests: list[bytes] = []

    def data() -> Iterator[bytes]:
        for chunk, digest in chunks:
            digests.append(digest)
            yield chunk

    return blobs.write(data(), name=lambda: vector_digest(total_bytes, digests))


@contextmanager
def reading_vector(blobs: BlobStore, x: bytes) -> Iterator[Fill]:
    """Fills a buffer from byte `start` of x on. Raises NOT_FOUND; STORAGE where the file ends too early."""
    handle = os.open(blobs.path(x), os.O_RDONLY | os.O_CLOEXEC)

    def fill(start: int, out: memoryview) -> None:
        try:
            count = os.preadv(handle, [out], start)
        except OSError as error:
            raise damaged() from error
        if count != len(out):
            raise damaged()

    try:
        yield fill
    finally:
        os.close(handle)


@contextmanager
def checking_vector(blobs: BlobStore, x: bytes, total_bytes: int) -> Iterator[Fill]:
    """As `reading_vector`; once every chunk was read, the end raises STORAGE unless they were x, and drops the file.

    So the next attempt draws a new vector with a new debit.
    """
    digests = [b""] * len(chunk_lengths(total_bytes))
    if whole := blobs.path(x).stat().st_size == total_bytes:
        with reading_vector(blobs, x) as fill:

            def check(start: int, out: memoryview) -> None:
                fill(start, out)
                digests[start // CHUNK_BYTES] = chunk_digest(out)

            yield check
    if not whole or vector_digest(total_bytes, digests) != x:
        blobs.delete(x)
        raise damaged()


def damaged() -> ServiceError:
    """x is not what it was."""
    return ServiceError(Reason.STORAGE, "the vector of this round is damaged on the disk: check the volume")
