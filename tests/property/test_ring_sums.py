"""Ring sums and masks against plain integers, all three rings."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Reason, ServiceError
from services.common.secagg import masking
from services.common.secagg.digests import VectorDigest, vector_digest
from services.common.secagg.ring import BLOCK_BYTES, CHUNK_BYTES, Ring, RingSum, chunk_lengths
from tests.support import integer_oracle as oracle
from tests.support.packed import masked

RINGS = st.sampled_from([16, 24, 32])
M = hashlib.sha256(b"manifest").digest()


@st.composite
def packed_vectors(draw: st.DrawFn) -> tuple[int, list[bytes], list[int]]:
    bits = draw(RINGS)
    size = draw(st.integers(1, 40)) * (bits // 8)
    count = draw(st.integers(1, 12))
    # All-ones bytes carry through every byte of a lane.
    one = st.one_of(st.binary(min_size=size, max_size=size), st.just(b"\xff" * size))
    vectors = draw(st.lists(one, min_size=count, max_size=count))
    return bits, vectors, draw(st.lists(st.sampled_from([1, -1]), min_size=count, max_size=count))


@given(packed_vectors())
def test_sums_and_differences_equal_the_integer_oracle(case: tuple[int, list[bytes], list[int]]) -> None:
    bits, vectors, signs = case
    total = RingSum(Ring(bits), len(vectors[0]))
    for sign, vector in zip(signs, vectors, strict=True):
        (total.add if sign == 1 else total.subtract)(vector)
    assert total.result() == oracle.add(vectors, bits, len(vectors[0]), signs)


@given(RINGS, st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_pack_unpack_and_lift_equal_the_integer_oracle(bits: int, values: list[int]) -> None:
    ring = Ring(bits)
    packed = ring.pack(np.array(values, np.uint32))
    assert packed == oracle.pack(values, bits)
    unpacked = ring.unpack(packed)
    assert unpacked.tolist() == oracle.unpack(packed, bits)
    assert ring.lift(unpacked).tolist() == [oracle.lift(v, bits) for v in unpacked.tolist()]


@given(packed_vectors())
def test_a_sum_goes_on_after_its_result_and_starts_at_zero_after_it_was_taken(
    case: tuple[int, list[bytes], list[int]],
) -> None:
    bits, vectors, signs = case
    total = RingSum(Ring(bits), len(vectors[0]))
    for done, (sign, vector) in enumerate(zip(signs, vectors, strict=True), 1):
        (total.add if sign == 1 else total.subtract)(vector)
        assert total.result() == oracle.add(vectors[:done], bits, total.size, signs[:done])
    out = np.empty(total.size, np.uint8)
    total.take(out)
    assert out.tobytes() == oracle.add(vectors, bits, total.size, signs)
    assert total.result() == bytes(total.size)
    buffer = bytearray(vectors[0])
    add = total.adding(buffer)
    for vector in vectors:
        buffer[:] = vector
        add()
    assert total.result() == oracle.add(vectors, bits, total.size)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_hundreds_of_addends_of_either_sign_do_not_lose_a_carry(bits: int) -> None:
    drawn = np.random.default_rng(bits)  # test data only
    for sign in (1, -1, 0):
        vectors = [drawn.bytes(9 * (bits // 8)) if i % 3 else b"\xff" * (9 * (bits // 8)) for i in range(400)]
        signs = [sign or int(drawn.choice([1, -1])) for _ in vectors]
        total = RingSum(Ring(bits), len(vectors[0]))
        for one, vector in zip(signs, vectors, strict=True):
            (total.add if one == 1 else total.subtract)(vector)
        assert total.result() == oracle.add(vectors, bits, total.size, signs)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_thousands_of_addends_of_all_ones_do_not_lose_a_carry(bits: int) -> None:
    total = RingSum(Ring(bits), 3 * (bits // 8))
    for _ in range(4096):
        total.add(b"\xff" * total.size)
    assert oracle.unpack(total.result(), bits) == [-4096 % 2**bits] * 3


@settings(max_examples=8, deadline=None)
@given(
    RINGS,
    st.integers(0, 2),
    st.one_of(st.integers(1, 30), st.integers(BLOCK_BYTES // 4 - 1, BLOCK_BYTES // 2 + 1)),
    st.integers(1, 3),
)
def test_masked_vectors_minus_piece_sums_are_the_plain_sum(bits: int, chunks: int, tail: int, workers: int) -> None:
    ring = Ring(bits)
    size = chunks * CHUNK_BYTES + tail * ring.lane_bytes
    hospitals, pieces = ["alice", "bob"], range(2)
    plain = {h: oracle.stream(hashlib.sha256(h.encode()).digest(), size) for h in hospitals}
    keys = {
        (h, j): masking.stream_key(hashlib.sha256(f"{h}{j}".encode()).digest(), M, h, j)
        for h in hospitals
        for j in pieces
    }
    sent = {h: masked(plain[h], ring, [keys[h, j] for j in pieces], workers=workers) for h in hospitals}
    streams = [oracle.stream(keys["alice", j], size) for j in pieces]
    lengths = chunk_lengths(size)
    masks = [
        list(masking.sum_streams([keys[h, j] for h in hospitals], ring, size, 0, len(lengths), bytes, workers=workers))
        for j in pieces
    ]
    for i, length in enumerate(lengths):
        total = RingSum(ring, length)
        for h in hospitals:
            total.add(sent[h][i])
        for mask in masks:
            total.subtract(mask[i])
        start = i * CHUNK_BYTES
        both = [plain[h][start : start + length] for h in hospitals]
        expected = RingSum(ring, length)
        for part in both:
            expected.add(part)
        assert total.result() == expected.result()
        few = 30 * ring.lane_bytes  # the oracle is slow: it judges both sides of every edge of a block
        of_alice = [vector[start : start + length] for vector in (plain["alice"], *streams)]
        for edge in {*range(0, length, BLOCK_BYTES), length}:
            at = slice(max(0, edge - few), min(edge + few, length))
            assert total.result()[at] == oracle.add([b[at] for b in both], bits, at.stop - at.start)
            assert sent["alice"][i][at] == oracle.add([b[at] for b in of_alice], bits, at.stop - at.start)


@settings(max_examples=10, deadline=None)
@given(RINGS, st.integers(0, 2), st.integers(1, 3))
def test_any_chunk_range_of_a_piece_sum_is_that_part_of_one_continuous_stream(bits: int, first: int, many: int) -> None:
    ring = Ring(bits)
    size = 4 * CHUNK_BYTES + 48
    key = masking.stream_key(bytes(32), M, "alice", 0)
    whole = oracle.stream(key, size)
    many = min(many, 5 - first)
    got = b"".join(masking.sum_streams([key], ring, size, first, many, bytes))
    assert got == whole[first * CHUNK_BYTES : (first + many) * CHUNK_BYTES]


@given(st.binary(min_size=32, max_size=32), st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True), st.integers(0, 63))
def test_stream_keys_and_commitments_equal_the_oracle(seed: bytes, hospital: str, piece: int) -> None:
    assert masking.stream_key(seed, M, hospital, piece) == oracle.key(seed, M, hospital, piece)
    assert masking.commitment(M, hospital, piece, seed) == oracle.commitment(M, hospital, piece, seed)


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_vector_digest_equals_the_oracle_however_it_is_built(size: int) -> None:
    whole = bytes(size)
    digest, digests = VectorDigest(size), []
    for i, length in enumerate(chunk_lengths(size)):
        digests.append(digest.add(whole[i * CHUNK_BYTES : i * CHUNK_BYTES + length]))
    assert digest.result() == vector_digest(size, digests) == oracle.vector_digest(whole)


def test_a_taker_that_leaves_early_leaves_no_work_behind() -> None:
    stream = masking.sum_streams([bytes(32)], Ring(32), 40 * CHUNK_BYTES, 0, 40, bytes, workers=2)
    assert len(next(iter(stream))) == CHUNK_BYTES
    stream.close()  # type: ignore[attr-defined]  # it is a generator


@pytest.mark.parametrize(("first", "chunks"), [(-1, 1), (0, 0), (2, 1), (0, 3)])
def test_a_chunk_range_outside_the_vector_is_refused(first: int, chunks: int) -> None:
    with pytest.raises(ServiceError) as refused:
        list(masking.sum_streams([bytes(32)], Ring(32), CHUNK_BYTES + 4, first, chunks, bytes))
    assert refused.value.reason is Reason.MALFORMED


def test_broken_lanes_wrong_sizes_and_unknown_rings_are_refused() -> None:
    total, digest = RingSum(Ring(24), 6), VectorDigest(6)
    digest.add(bytes(6))
    for attempt in (
        lambda: Ring(20),
        lambda: Ring(24).unpack(bytes(4)),
        lambda: RingSum(Ring(32), 6),
        lambda: total.add(bytes(3)),
        lambda: total.subtract(bytes(9)),
        lambda: chunk_lengths(0),
        lambda: digest.add(bytes(6)),
        lambda: VectorDigest(6).add(bytes(5)),
        lambda: VectorDigest(6).result(),
        lambda: vector_digest(0, []),
    ):
        with pytest.raises(ServiceError) as refused:
            attempt()
        assert refused.value.reason is Reason.MALFORMED


def test_a_sum_over_no_lanes_is_empty() -> None:
    total = RingSum(Ring(24), 0)
    total.add(b"")
    assert total.result() == b""
