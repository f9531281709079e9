"""Encoding against plain integers: limbs, bounds, clipping, rounding (protocol.md §6)."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Reason, ServiceError
from services.common.secagg.encoding import (
    SENTINEL,
    LaneTable,
    check_range,
    check_sentinels,
    decode_class,
    dequantise,
)
from services.common.secagg.messages import LaneClass
from services.common.secagg.ring import CHUNK_BYTES
from services.common.secagg.rounding import Reals, Rounder, clip_update
from tests.support import integer_oracle as oracle
from tests.support.packed import encoded


def table(bits: int, bound: int, limbs: int, values: int) -> LaneTable:
    return LaneTable((SENTINEL, LaneClass("metric", values, 0, bound, limbs)), bits)


@st.composite
def cases(draw: st.DrawFn) -> tuple[LaneTable, list[list[int]]]:
    bits = draw(st.sampled_from([16, 24, 32]))
    hospitals = draw(st.integers(1, 5))
    bound = draw(st.integers(2, (2 ** (bits - 1) - 1) // hospitals))
    width = bound.bit_length() - 1
    limbs = draw(st.integers(1, min(8, (63 - bits) // width + 1)))
    values = draw(st.integers(1, 12))
    reach = bound * 2 ** (width * (limbs - 1))
    numbers = st.lists(st.integers(-reach, reach), min_size=values, max_size=values)
    return table(bits, bound, limbs, values), draw(st.lists(numbers, min_size=hospitals, max_size=hospitals))


@given(cases())
def test_the_decoded_sum_of_limbs_is_the_sum_of_the_integers(case: tuple[LaneTable, list[list[int]]]) -> None:
    lanes, vectors = case
    lanes.check(len(vectors))
    bits, metric = lanes.ring_bits, lanes.lanes[1]
    packed = [encoded(lanes, {"metric": np.array(v, np.int64)}) for v in vectors]
    assert packed[0] == oracle.pack(
        [1] * 4 + [limb for v in vectors[0] for limb in oracle.encode(v, metric.bound, metric.limbs)], bits
    )
    total = oracle.add(packed, bits, lanes.total_bytes)
    head = 4 * lanes.ring.lane_bytes
    check_sentinels(lanes, total[:head], len(vectors))
    check_range(lanes, "metric", total[head:], len(vectors))
    assert decode_class(lanes, "metric", total[head:]).tolist() == [sum(c) for c in zip(*vectors, strict=True)]


@given(st.sampled_from([16, 24, 32]), st.integers(-(2**40), 2**40))
def test_noised_values_wrap_in_the_ring_and_nothing_is_clipped(bits: int, value: int) -> None:
    packed = encoded(table(bits, 5, 1, 1), {"metric": np.array([value], np.int64)}, noised=True)
    assert oracle.unpack(packed, bits)[4] == value % 2**bits


@given(st.integers(1, 100), st.integers(1, 3))
def test_a_value_beyond_its_bound_is_a_local_error_never_clipped(bound: int, limbs: int) -> None:
    lanes = table(32, bound + 1, limbs, 1)
    reach = ((bound + 1) + 1) * 2 ** (((bound + 1).bit_length() - 1) * (limbs - 1))
    for value in (reach, -reach - 2**40):
        with pytest.raises(ServiceError) as refused:
            encoded(lanes, {"metric": np.array([value], np.int64)})
        assert refused.value.reason is Reason.OUT_OF_BOUND


def reals(numbers: list[float] | np.ndarray, factor: float = 1.0, limit: float = math.inf) -> Reals:
    return Reals(np.array(numbers), factor, limit)


def codes_of(given_reals: Reals, fraction_bits: int, bits: int = 32, workers: int = 1) -> list[int]:
    """The codes that an encoded vector of these reals holds, behind an odd number of lanes."""
    count = len(given_reals.numbers)
    bound = 2 ** (bits - 1) - 1
    lanes = LaneTable(
        (SENTINEL, LaneClass("weight", 1, 0, 1, 1), LaneClass("parameter", count, fraction_bits, bound, 1)), bits
    )
    packed = encoded(lanes, {"weight": np.ones(1, np.int64), "parameter": given_reals}, workers=workers)
    return decode_class(lanes, "parameter", memoryview(packed)[5 * bits // 8 :]).tolist()


@given(
    st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=20),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
)
def test_clipping_holds_both_norms_even_where_squares_overflow(values: list[float], l2: float, linf: float) -> None:
    found = clip_update(np.array(values), l2, linf)
    assert (found.limit, found.key) == (linf, None)
    assert math.hypot(*(v * found.factor for v in values)) <= l2 * (1 + 1e-12)
    if np.max(np.abs(values)) < 1e100 and math.hypot(*values) <= l2:
        assert found.factor == 1.0
    elif np.max(np.abs(values)) < 1e100 and math.hypot(*values) > l2 * (1 + 1e-12):
        assert found.factor == pytest.approx(l2 / math.hypot(*values), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2**17 - 1, 2**17, 2**17 + 1, 400_000])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_norm_counts_every_block_once_and_never_varies(count: int, kind: type) -> None:
    numbers = np.sin(np.arange(count)).astype(kind)
    found = {clip_update(numbers, 0.5, 1.0).factor for _ in range(3)}
    assert len(found) == 1
    norm = math.sqrt(math.fsum(float(v) ** 2 for v in numbers.tolist()))
    assert found.pop() == pytest.approx(0.5 / norm if norm > 0.5 else 1.0, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_updates_are_refused_before_the_clip(bad: float) -> None:
    for attempt in (lambda: clip_update(np.array([1.0, bad]), 1, 1), lambda: codes_of(reals([bad]), 8)):
        with pytest.raises(ServiceError) as refused:
            attempt()
        assert refused.value.reason is Reason.NOT_FINITE


def test_an_empty_or_zero_update_clips_to_itself() -> None:
    assert clip_update(np.zeros(3), 1, 1).factor == 1.0
    assert clip_update(np.zeros(0), 1, 1).factor == 1.0


@given(
    st.sampled_from([16, 24, 32]),
    st.lists(st.floats(-1000, 1000), min_size=1, max_size=30),
    st.floats(1e-3, 1.0),
    st.floats(1e-3, 1.0),
    st.integers(0, 14),
)
def test_reals_are_scaled_clamped_and_rounded_to_nearest_even(
    bits: int, values: list[float], factor: float, limit: float, fraction_bits: int
) -> None:
    found = codes_of(reals(values, factor, limit), fraction_bits, bits)
    clipped = [min(max(v * factor, -limit), limit) for v in values]
    assert found == [round(v * 2**fraction_bits) for v in clipped]
    back = dequantise(np.array(found), fraction_bits)
    assert np.all(np.abs(back - np.array(clipped)) <= 2.0 ** -(fraction_bits + 1))


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_rounding_spans_blocks_and_chunks_without_a_seam(bits: int, workers: int, kind: type) -> None:
    numbers = (np.sin(np.arange(2 * CHUNK_BYTES // (bits // 8) + 7)) * 100).astype(kind)
    found = codes_of(Reals(numbers, 0.7, 60.0), 8, bits, workers)
    assert np.array_equal(found, np.rint(np.clip(numbers.astype(np.float64) * 0.7, -60, 60) * 256))


@settings(max_examples=20, deadline=None)
@given(st.floats(-100, 100))
def test_stochastic_rounding_is_unbiased_and_stays_beside_the_value(value: float) -> None:
    draws = 300_000  # many blocks
    codes = np.array(codes_of(Reals(np.full(draws, value), key=bytes(32)), 4))
    scaled = value * 16
    assert set(codes.tolist()) <= {math.floor(scaled), math.ceil(scaled)}
    fraction = scaled - math.floor(scaled)
    error = codes.mean() - scaled
    assert abs(error) <= 6 * math.sqrt(fraction * (1 - fraction) / draws) + 1e-9


@given(st.binary(min_size=32, max_size=32), st.integers(0, 9), st.lists(st.floats(-99, 99), min_size=1, max_size=9))
def test_stochastic_rounding_compares_the_exact_fraction_with_its_own_words_of_one_stream(
    key: bytes, start: int, values: list[float]
) -> None:
    numbers = np.array([0.0] * start + values)
    found = Rounder(Reals(numbers, key=key), 3, 2**15).codes(start, len(values))
    stream = oracle.stream(key, 8 * len(numbers))
    expected = []
    for number in range(start, len(numbers)):
        scaled = Fraction(float(numbers[number])) * 8
        word = int.from_bytes(stream[8 * number : 8 * number + 8], "little")
        expected.append(math.floor(scaled) + (Fraction(word >> 12, 2**52) < scaled - math.floor(scaled)))
    assert found.view(np.int32)[::2].tolist() == expected


def test_a_code_beyond_its_bound_is_refused() -> None:
    lanes = LaneTable((SENTINEL, LaneClass("parameter", 2, 8, 256, 1)), 32)
    assert encoded(lanes, {"parameter": reals([1.0, -1.001])})[16:20] == (256).to_bytes(4, "little")
    for numbers in ([1.01, 0.0], [0.0, -1.01], [1e300, 0.0]):
        with pytest.raises(ServiceError) as refused:
            encoded(lanes, {"parameter": reals(numbers)})
        assert refused.value.reason is Reason.OUT_OF_BOUND


@pytest.mark.parametrize("workers", [1, 2])
def test_limbs_are_split_where_a_chunk_ends_between_them(workers: int) -> None:
    count = CHUNK_BYTES // 4 // 3 + 100  # 4 + 3 * count lanes of 4 bytes: the first chunk ends inside a value
    lanes = table(32, 2**10, 3, count)
    numbers = np.arange(count, dtype=np.int64) * 7919 - 2**30
    packed = encoded(lanes, {"metric": numbers}, workers=workers)
    assert np.array_equal(decode_class(lanes, "metric", memoryview(packed)[16:]), numbers)
    for at in (0, CHUNK_BYTES // 12 - 2, CHUNK_BYTES // 12 - 1, count - 1):
        limbs = oracle.encode(int(numbers[at]), 2**10, 3)
        assert packed[16 + 12 * at :][:12] == oracle.pack(limbs, 32)


def test_values_span_blocks_without_a_seam() -> None:
    lanes = LaneTable((SENTINEL, LaneClass("parameter", 600_001, 0, 600_001, 1)), 24)
    numbers = np.arange(600_001, dtype=np.int64)
    packed = encoded(lanes, {"parameter": numbers})
    start, stop = lanes.lane_range("parameter")
    assert (start, stop) == (4, 600_005)
    assert np.array_equal(decode_class(lanes, "parameter", memoryview(packed)[3 * start : 3 * stop]), numbers)


@pytest.mark.parametrize(
    ("lanes", "bits"),
    [
        ((), 32),
        ((LaneClass("weight", 1, 0, 1, 1),), 32),
        ((LaneClass("sentinel", 3, 0, 1, 1),), 32),
        ((SENTINEL, SENTINEL), 32),
        ((SENTINEL, LaneClass("", 1, 0, 1, 1)), 32),
        ((SENTINEL, LaneClass("a", 0, 0, 1, 1)), 32),
        ((SENTINEL, LaneClass("a", 1, 0, 0, 1)), 32),
        ((SENTINEL, LaneClass("a", 1, 0, 1, 0)), 32),
        ((SENTINEL, LaneClass("a", 1, 0, 8192, 1)), 16),
        ((SENTINEL, LaneClass("a", 1, 0, 1, 2)), 32),
        ((SENTINEL, LaneClass("a", 1, 0, 2**20, 3)), 32),
        ((SENTINEL, LaneClass("a", 2**31, 0, 1, 1)), 32),
        ((SENTINEL,), 20),
    ],
)
def test_lane_tables_that_could_wrap_or_do_not_fit_are_refused(lanes: tuple[LaneClass, ...], bits: int) -> None:
    with pytest.raises(ServiceError) as refused:
        LaneTable(lanes, bits).check(4)
    assert refused.value.reason is Reason.MALFORMED


def test_the_widest_bound_that_cannot_wrap_is_accepted() -> None:
    LaneTable((SENTINEL, LaneClass("a", 1, 0, (2**15 - 1) // 4, 1)), 16).check(4)


def test_wrong_classes_shapes_sentinels_and_ranges_are_refused() -> None:
    lanes = table(32, 10, 2, 2)
    good = {"metric": np.zeros(2, np.int64)}
    packed = encoded(lanes, good)
    for attempt, reason in (
        (lambda: encoded(lanes, {}), Reason.MALFORMED),
        (lambda: encoded(lanes, good | {"more": np.zeros(1, np.int64)}), Reason.MALFORMED),
        (lambda: encoded(lanes, {"metric": np.zeros(3, np.int64)}), Reason.MALFORMED),
        (lambda: encoded(lanes, {"metric": reals([0.0, 0.0])}), Reason.MALFORMED),  # of two limbs
        (lambda: encoded(lanes, {"metric": np.zeros(2, np.float64)}), Reason.MALFORMED),  # type: ignore[dict-item]  # on purpose
        (lambda: decode_class(lanes, "metric", bytes(4)), Reason.MALFORMED),
        (lambda: lanes.lane_range("nothing"), Reason.NOT_FOUND),
        (lambda: check_sentinels(lanes, packed[:16], 2), Reason.CONFLICT),
        (lambda: check_sentinels(lanes, packed[:12], 1), Reason.CONFLICT),
        (lambda: check_range(lanes, "metric", (11).to_bytes(4, "little") + bytes(12), 1), Reason.OUT_OF_BOUND),
    ):
        with pytest.raises(ServiceError) as refused:
            attempt()
        assert refused.value.reason is reason
