"""Masking at a hospital: y is made again from x and its seeds, and nothing else is ever handed on (P-10, ADR 0010)."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg.digests import with_digest
from services.common.secagg.encoding import SENTINEL, encode_vector
from services.common.secagg.messages import LaneClass
from services.common.secagg.ring import CHUNK_BYTES
from services.common.store.blobs import BlobStore
from services.hospital_node.submission import mask, masked_chunks
from services.hospital_node.vectorfile import checking_vector, reading_vector, write_vector
from tests.support import integer_oracle as oracle
from tests.support.consortium import make_consortium

LANES = 2 * CHUNK_BYTES // 3 + 11  # three chunks of 24-bit lanes
C = make_consortium()
CHECKED = C.manifest(
    C.core(lanes=(SENTINEL, LaneClass("parameter", LANES, 0, 1000, 1)), parameters=LANES, ring_bits=24)
)
TOTAL = CHECKED.table.total_bytes


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@pytest.fixture
def x(blobs: BlobStore) -> bytes:
    values = {"parameter": np.arange(LANES, dtype=np.int64) % 1000}
    return write_vector(blobs, TOTAL, encode_vector(CHECKED.table, values, with_digest))


def test_x_lies_under_its_vector_digest(blobs: BlobStore, x: bytes) -> None:
    whole = blobs.path(x).read_bytes()
    assert x == oracle.vector_digest(whole)
    assert whole == oracle.pack([1] * 4 + [i % 1000 for i in range(LANES)], 24)


def test_p10_y_is_the_same_bytes_every_time_and_from_every_chunk_on(blobs: BlobStore, x: bytes) -> None:
    with checking_vector(blobs, x, TOTAL) as fill:
        masked = mask(fill, CHECKED, "alice")
    plain = blobs.path(x).read_bytes()
    streams = [oracle.stream(oracle.key(seed, CHECKED.M, "alice", j), 30_000) for j, seed in enumerate(masked.seeds)]
    with reading_vector(blobs, x) as fill:
        y = list(masked_chunks(fill, CHECKED, "alice", masked.seeds, masked.chunk_digests, 0))
        for first in (1, 2, 3):
            assert list(masked_chunks(fill, CHECKED, "alice", masked.seeds, masked.chunk_digests, first)) == y[first:]
    assert b"".join(y)[:30_000] == oracle.add([plain[:30_000], *streams], 24, 30_000)
    assert tuple(hashlib.sha256(chunk).digest() for chunk in y) == masked.chunk_digests
    assert oracle.vector_digest(b"".join(y)) == masked.vector
    with checking_vector(blobs, x, TOTAL) as fill:
        again = mask(fill, CHECKED, "alice")
    assert not set(again.seeds) & set(masked.seeds)  # of every attempt its own
    assert again.vector != masked.vector


@pytest.mark.parametrize("place", [0, CHUNK_BYTES + 5, TOTAL - 1])
def test_p10_under_seeds_that_were_used_no_other_vector_is_handed_on(blobs: BlobStore, x: bytes, place: int) -> None:
    with checking_vector(blobs, x, TOTAL) as fill:
        masked = mask(fill, CHECKED, "alice")
    whole = bytearray(blobs.path(x).read_bytes())
    whole[place] ^= 1
    blobs.path(x).write_bytes(whole)
    with reading_vector(blobs, x) as fill:
        chunks = masked_chunks(fill, CHECKED, "alice", masked.seeds, masked.chunk_digests, 0)
        for expected in masked.chunk_digests[: place // CHUNK_BYTES]:
            assert hashlib.sha256(next(chunks)).digest() == expected
        with pytest.raises(ServiceError) as refused:
            next(chunks)
    assert refused.value.reason is Reason.STORAGE


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_x_is_not_masked_and_is_dropped_so_that_a_new_one_is_drawn(
    blobs: BlobStore, x: bytes, damage: str
) -> None:
    whole = bytearray(blobs.path(x).read_bytes())
    whole[-1] ^= 1
    blobs.path(x).write_bytes(whole if damage == "flipped" else whole[:-1])
    with pytest.raises(ServiceError) as refused, checking_vector(blobs, x, TOTAL) as fill:
        mask(fill, CHECKED, "alice")
    assert refused.value.reason is Reason.STORAGE
    assert not blobs.has(x)


def test_seeds_do_not_print(blobs: BlobStore, x: bytes) -> None:
    with checking_vector(blobs, x, TOTAL) as fill:
        masked = mask(fill, CHECKED, "alice")
    assert not any(repr(seed) in repr(masked) for seed in masked.seeds)
