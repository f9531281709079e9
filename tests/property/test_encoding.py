"""Encoding against plain integers: limbs, bounds, clipping, rounding (protocol.md §6)."""

import math

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
    clip_update,
    decode_class,
    dequantise,
    encode_vector,
    quantise,
)
from services.common.secagg.messages import LaneClass
from tests.support import integer_oracle as oracle


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
    packed = [bytes(encode_vector(lanes, {"metric": np.array(v, np.int64)})) for v in vectors]
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
    packed = encode_vector(table(bits, 5, 1, 1), {"metric": np.array([value], np.int64)}, noised=True)
    assert oracle.unpack(packed, bits)[4] == value % 2**bits


@given(st.integers(1, 100), st.integers(1, 3))
def test_a_value_beyond_its_bound_is_a_local_error_never_clipped(bound: int, limbs: int) -> None:
    lanes = table(32, bound + 1, limbs, 1)
    reach = ((bound + 1) + 1) * 2 ** (((bound + 1).bit_length() - 1) * (limbs - 1))
    for value in (reach, -reach - 2**40):
        with pytest.raises(ServiceError) as refused:
            encode_vector(lanes, {"metric": np.array([value], np.int64)})
        assert refused.value.reason is Reason.OUT_OF_BOUND


@given(
    st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=20),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
)
def test_clipping_holds_both_norms_even_where_squares_overflow(values: list[float], l2: float, linf: float) -> None:
    given_values = np.array(values)
    clipped = clip_update(given_values, l2, linf)
    assert math.sqrt(math.fsum(v * v for v in clipped)) <= l2 * (1 + 1e-12)
    assert np.max(np.abs(clipped)) <= linf
    if np.max(np.abs(given_values)) < 1e100 and np.linalg.norm(given_values) <= min(l2, linf):
        assert np.array_equal(clipped, given_values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_updates_are_refused_before_the_clip(bad: float) -> None:
    for attempt in (lambda: clip_update(np.array([1.0, bad]), 1, 1), lambda: quantise(np.array([bad]), 8)):
        with pytest.raises(ServiceError) as refused:
            attempt()
        assert refused.value.reason is Reason.NOT_FINITE


def test_an_empty_or_zero_update_clips_to_itself() -> None:
    assert clip_update(np.zeros(3), 1, 1).tolist() == [0, 0, 0]
    assert clip_update(np.zeros(0), 1, 1).size == 0


@given(st.lists(st.floats(-1000, 1000), max_size=30), st.integers(0, 20))
def test_plain_rounding_is_to_nearest_even_and_comes_back_within_half_a_step(values: list[float], bits: int) -> None:
    codes = quantise(np.array(values, np.float64), bits)
    assert codes.tolist() == [round(v * 2**bits) for v in values]
    assert np.all(np.abs(dequantise(codes, bits) - np.array(values)) <= 2.0 ** -(bits + 1))


@settings(max_examples=20, deadline=None)
@given(st.floats(-300, 300))
def test_stochastic_rounding_is_unbiased_and_stays_beside_the_value(value: float) -> None:
    draws = 300_000  # more than one block
    codes = quantise(np.full(draws, value), 4, key=bytes(32))
    scaled = value * 16
    assert set(codes.tolist()) <= {math.floor(scaled), math.ceil(scaled)}
    fraction = scaled - math.floor(scaled)
    error = codes.mean() - scaled
    assert abs(error) <= 6 * math.sqrt(fraction * (1 - fraction) / draws) + 1e-9


def test_a_value_beyond_62_bits_is_refused() -> None:
    with pytest.raises(ServiceError) as refused:
        quantise(np.array([1e30]), 8)
    assert refused.value.reason is Reason.OUT_OF_BOUND


def test_values_span_blocks_without_a_seam() -> None:
    lanes = LaneTable((SENTINEL, LaneClass("parameter", 600_001, 0, 600_001, 1)), 24)
    numbers = np.arange(600_001, dtype=np.int64)
    packed = encode_vector(lanes, {"parameter": numbers})
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
    packed = bytes(encode_vector(lanes, good))
    for attempt, reason in (
        (lambda: encode_vector(lanes, {}), Reason.MALFORMED),
        (lambda: encode_vector(lanes, good | {"more": np.zeros(1, np.int64)}), Reason.MALFORMED),
        (lambda: encode_vector(lanes, {"metric": np.zeros(3, np.int64)}), Reason.MALFORMED),
        (lambda: encode_vector(lanes, {"metric": np.zeros(2, np.float64)}), Reason.MALFORMED),  # type: ignore[dict-item]  # on purpose
        (lambda: decode_class(lanes, "metric", bytes(4)), Reason.MALFORMED),
        (lambda: lanes.lane_range("nothing"), Reason.NOT_FOUND),
        (lambda: check_sentinels(lanes, packed[:16], 2), Reason.CONFLICT),
        (lambda: check_sentinels(lanes, packed[:12], 1), Reason.CONFLICT),
        (lambda: check_range(lanes, "metric", (11).to_bytes(4, "little") + bytes(12), 1), Reason.OUT_OF_BOUND),
    ):
        with pytest.raises(ServiceError) as refused:
            attempt()
        assert refused.value.reason is reason
