"""Masks: seeds to keystreams to sums (protocol.md §10: key, com, stream).

A stream is ONE AES-256-CTR keystream over the packed lanes, from counter block 0; chunk i starts at
counter i * 65535, so chunks are independent and chunking never changes a stream. Work goes chunk by chunk
on all cores (OpenSSL and numpy release the interpreter lock): memory is O(chunk * workers).
Dangers: a stream key masks ONE vector; two vectors under one key open each other. The keys are bound to
(M, hospital, piece), and M to one attempt.
Not here: drawing seeds.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import cpu_count
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.common.errors import Reason, ServiceError
from services.common.ids import check_id
from services.common.secagg.ring import CHUNK_BYTES, Ring, RingSum, chunk_lengths
from services.common.secagg.signing import label

COUNTERS_PER_CHUNK = CHUNK_BYTES // 16
WORKERS = min(cpu_count(), 8)  # each holds about 3 MiB
_ZEROS = bytes(CHUNK_BYTES)


def hospital_bytes(hospital: str) -> bytes:
    """lp(id): u32 length and the id, as in every hashed string."""
    name = check_id(hospital, "hospital").encode()
    return len(name).to_bytes(4, "big") + name


def stream_key(seed: bytes, manifest: bytes, hospital: str, piece: int) -> bytes:
    """The AES-256 key (32 bytes) of one hospital's stream for one piece under M = `manifest`."""
    info = label("mask") + hospital_bytes(hospital) + piece.to_bytes(2, "big")
    return HKDF(SHA256(), 32, salt=manifest, info=info).derive(seed)


def commitment(manifest: bytes, hospital: str, piece: int, seed: bytes) -> bytes:
    """com of §10, 32 bytes: what every holder of the piece checks its seed against."""
    return hashlib.sha256(label("com") + manifest + hospital_bytes(hospital) + piece.to_bytes(2, "big") + seed).digest()


def mask_vector(x: Any, ring: Ring, keys: Sequence[bytes], *, workers: int = WORKERS) -> Iterator[bytes]:
    """The chunks of y = x + the streams of `keys`, in order. `x` is the packed vector, a contiguous buffer."""
    packed = memoryview(x).cast("B")
    lengths = chunk_lengths(packed.nbytes)

    buffers = _Buffers(ring)

    def one(chunk: int) -> bytes:
        start = chunk * CHUNK_BYTES
        with buffers.borrow(lengths[chunk]) as (total, stream):
            total.add(packed[start : start + lengths[chunk]])
            return _add_streams(total, keys, chunk, stream)

    return _in_order(one, range(len(lengths)), workers)


def sum_streams(
    keys: Sequence[bytes], ring: Ring, total_bytes: int, first_chunk: int, chunks: int, *, workers: int = WORKERS
) -> Iterator[bytes]:
    """The ring sum of the streams of `keys` (one piece, one key a hospital), chunks first_chunk … in order.

    Raises MALFORMED for a range outside a vector of `total_bytes`.
    """
    lengths = chunk_lengths(total_bytes)
    if first_chunk < 0 or chunks < 1 or first_chunk + chunks > len(lengths):
        raise ServiceError(
            Reason.MALFORMED, f"chunks {first_chunk}..{first_chunk + chunks - 1} of a vector that has {len(lengths)}"
        )

    buffers = _Buffers(ring)

    def one(chunk: int) -> bytes:
        with buffers.borrow(lengths[chunk]) as (total, stream):
            return _add_streams(total, keys, chunk, stream)

    return _in_order(one, range(first_chunk, first_chunk + chunks), workers)


class _Buffers:
    """The sums and stream buffers of finished chunks, used again: fresh ones cost page faults on every chunk."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._spare: list[tuple[RingSum, memoryview]] = []  # append and pop are atomic between threads

    @contextmanager
    def borrow(self, size: int) -> Iterator[tuple[RingSum, memoryview]]:
        """A sum at zero and a stream buffer, both of `size` bytes."""
        total, stream = self._spare.pop() if self._spare else (RingSum(self._ring, size), memoryview(bytearray(size)))
        if total.size != size:  # only the last chunk is shorter
            total, stream = RingSum(self._ring, size), stream[:size]
        total.clear()
        yield total, stream
        self._spare.append((total, stream))


def _add_streams(total: RingSum, keys: Sequence[bytes], chunk: int, stream: memoryview) -> bytes:
    counter = (chunk * COUNTERS_PER_CHUNK).to_bytes(16, "big")
    zeros = memoryview(_ZEROS)[: total.size]
    for key in keys:
        Cipher(AES256(key), CTR(counter)).encryptor().update_into(zeros, stream)
        total.add(stream)
    return total.result()


def _in_order(work: Callable[[int], bytes], chunks: range, workers: int) -> Iterator[bytes]:
    """`work` of each chunk, in order, at most 2 * workers of them under way or waiting to be taken."""
    if workers == 1 or len(chunks) == 1:
        yield from map(work, chunks)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[bytes]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(work, chunk))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # the taker left early
                future.cancel()
