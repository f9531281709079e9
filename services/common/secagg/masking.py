"""Masks: seeds to keystreams to sums (protocol.md §10: key, com, stream).

A stream is ONE AES-256-CTR keystream over the packed lanes, from counter block 0; chunk i starts at
counter i * 65535, so chunks are independent and chunking never changes a stream. Work goes chunk by chunk
on all cores (OpenSSL and numpy release the interpreter lock): memory is O(chunk * workers).
Dangers: a stream key masks ONE vector; two vectors under one key open each other. The keys are bound to
(M, hospital, piece), and M to one attempt.
Not here: drawing seeds.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from services.common.errors import Reason, ServiceError
from services.common.ids import check_id
from services.common.secagg.parallel import WORKERS, in_order
from services.common.secagg.ring import BLOCK_BYTES, CHUNK_BYTES, U8, Ring, RingSum, chunk_lengths
from services.common.secagg.signing import label

COUNTERS_PER_CHUNK = CHUNK_BYTES // 16
_ZEROS = bytes(BLOCK_BYTES)
T = TypeVar("T")
Fill = Callable[[int, memoryview], None]
"""Writes the part of a packed vector that starts at this byte into this buffer, the whole of it."""


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


def mask_vector(
    fill: Fill,
    total_bytes: int,
    ring: Ring,
    keys: Sequence[bytes],
    take: Callable[[memoryview], T],
    *,
    first_chunk: int = 0,
    workers: int = WORKERS,
) -> Iterator[T]:
    """`take` of each chunk of y = x + the streams of `keys`, from chunk `first_chunk` on, in order.

    `fill` reads x, which has `total_bytes`, chunk by chunk in any order. Both are called by the worker, with memory
    that is used again when they return: `bytes` takes a chunk as it is.
    """
    lengths = chunk_lengths(total_bytes)
    return _chunks(fill, ring, keys, take, lengths, range(first_chunk, len(lengths)), workers)


def sum_streams(
    keys: Sequence[bytes],
    ring: Ring,
    total_bytes: int,
    first_chunk: int,
    chunks: int,
    take: Callable[[memoryview], T],
    *,
    workers: int = WORKERS,
) -> Iterator[T]:
    """`take` of each chunk, first_chunk … in order, of the ring sum of the streams of `keys` (one piece, one key a
    hospital); `take` as in `mask_vector`.

    Raises MALFORMED for a range outside a vector of `total_bytes`.
    """
    lengths = chunk_lengths(total_bytes)
    if first_chunk < 0 or chunks < 1 or first_chunk + chunks > len(lengths):
        raise ServiceError(
            Reason.MALFORMED, f"chunks {first_chunk}..{first_chunk + chunks - 1} of a vector that has {len(lengths)}"
        )
    return _chunks(None, ring, keys, take, lengths, range(first_chunk, first_chunk + chunks), workers)


class _Adder:
    """What one worker uses again for every chunk: a cipher state for each key, a block of stream, sum and chunk.

    Making a cipher costs as much as a quarter of a block of its stream, fresh megabytes cost page faults.
    """

    def __init__(self, ring: Ring, keys: Sequence[bytes]) -> None:
        self._ciphers = [Cipher(AES256(key), CTR(bytes(16))).encryptor() for key in keys]
        self._stream = memoryview(bytearray(BLOCK_BYTES))
        self._sum = RingSum(ring, BLOCK_BYTES)
        self._chunk = np.empty(CHUNK_BYTES, np.uint8)

    def add(self, chunk: int, length: int, fill: Fill | None) -> memoryview:
        """Chunk number `chunk` of the filled vector (zeros without one) plus all streams; valid until the next call."""
        out = self._chunk[:length]
        if fill is not None:
            fill(chunk * CHUNK_BYTES, out.data)
        counter = (chunk * COUNTERS_PER_CHUNK).to_bytes(16, "big")
        for cipher in self._ciphers:
            cipher.reset_nonce(counter)
        for start in range(0, length, BLOCK_BYTES):
            self._add_block(out[start : start + BLOCK_BYTES], fill is not None)
        return out.data

    def _add_block(self, out: U8, filled: bool) -> None:
        total, zeros, stream = self._sum, _ZEROS, self._stream
        if len(out) != total.size:  # only the end of the last chunk is shorter
            total, zeros, stream = RingSum(total.ring, len(out)), _ZEROS[: len(out)], stream[: len(out)]
        if filled:
            total.add(out)
        add = total.adding(stream)
        for cipher in self._ciphers:
            cipher.update_into(zeros, stream)
            add()
        total.take(out)


def _chunks(
    fill: Fill | None,
    ring: Ring,
    keys: Sequence[bytes],
    take: Callable[[memoryview], T],
    lengths: Sequence[int],
    numbers: range,
    workers: int,
) -> Iterator[T]:
    spare: list[_Adder] = []  # append and pop are atomic between threads

    def one(chunk: int) -> T:
        adder = spare.pop() if spare else _Adder(ring, keys)
        taken = take(adder.add(chunk, lengths[chunk], fill))
        spare.append(adder)
        return taken

    return in_order(one, numbers, workers)
