"""What a round releases: lanes, their noise, and debits that cover every one of them."""

import secrets

import numpy as np
import pytest

from services.common.documents.costs import final_noise, gate_noise, study_epsilon
from services.common.documents.policy import load_policy
from services.common.documents.shape import RoundShape, round_shape, total_rounds
from services.common.dp.accounting import epsilon
from services.common.errors import Reason, ServiceError
from services.common.secagg.encoding import decode_class
from services.hospital_node.release import encode_round, round_debits, study_plan
from services.hospital_node.spending import Account
from tests.support.hospital_world import FixedCounts, World, make_world

D = 4096
COUNTS = FixedCounts(np.array([5, 3]), np.array([8, 4]), np.array([[5, 3], [1, 3]]), np.full((2, 2, 4), 2, np.int64))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), D)


def shape_of(world: World, number: int) -> RoundShape:
    return round_shape(world.charter, world.study, number)


def lanes(shape: RoundShape, packed: bytearray, name: str) -> np.ndarray:
    first, end = shape.table.lane_range(name)
    size = shape.table.ring.lane_bytes
    return decode_class(shape.table, name, bytes(packed[first * size : end * size]))


def encode(world: World, number: int, update: np.ndarray | None, keys: object = None) -> tuple[RoundShape, bytearray]:
    shape = shape_of(world, number)
    draw = keys or (lambda: secrets.token_bytes(32))
    return shape, encode_round(world.study.document, shape, update, COUNTS, draw)  # type: ignore[arg-type]  # a test's lambda


def test_update_is_clipped_by_norm_then_by_coordinate_then_rounded(world: World) -> None:
    """protocol.md §6, worked out by hand: 4096 equal numbers of norm 640 are clipped to L2 norm 10, i.e. 10/64 each."""
    shape, packed = encode(world, 1, np.full(D, 10.0))
    bits = shape.table.lane_class("parameter").fraction_bits
    assert set(lanes(shape, packed, "parameter").tolist()) == {round(10.0 / 64 * 2**bits)}
    spike = np.zeros(D)
    spike[7] = -9.0  # within the L2 clip of 10, beyond the coordinate bound of 1
    shape, packed = encode(world, 1, spike)
    assert lanes(shape, packed, "parameter")[7] == -(2**bits)


@pytest.mark.parametrize(("number", "name", "exact"), [(2, "gate", [5, 3, 8, 4]), (4, "confusion", [5, 3, 1, 3])])
def test_counts_carry_the_hospitals_own_noise_under_local(
    world: World, number: int, name: str, exact: list[int]
) -> None:
    """privacy.md §6: noise of the stated scale over 200 draws, fresh each time; never a bare count."""
    noise = gate_noise(world.study.document) if name == "gate" else final_noise(world.study.document)
    update = np.zeros(D) if number == 2 else None
    shape = shape_of(world, number)
    scaled = np.array(exact) * 2 ** shape.table.lane_class(name).fraction_bits
    drawn = np.array([lanes(*encode(world, number, update), name) - scaled for _ in range(200)], np.float64)
    values = drawn.ravel()
    # Variance of a Gaussian sample: relative standard error √(2/n); five of them.
    assert abs(values.var() / noise.scale**2 - 1) < 5 * (2 / values.size) ** 0.5
    assert len({tuple(row) for row in drawn.tolist()}) == 200


def test_every_vector_of_counts_takes_its_own_key(world: World) -> None:
    """P-8: one operating system key a class of lanes, never the same twice."""
    taken: list[bytes] = []

    def keys() -> bytes:
        taken.append(secrets.token_bytes(32))
        return taken[-1]

    encode(world, 4, None, keys)
    assert len(taken) == len(set(taken)) == 2  # confusion and histogram


def test_debits_of_a_whole_study_cost_what_the_study_claims(world: World) -> None:
    """L-2: the ledger's ε after all rounds is the study's own figure without spare rounds, split by split."""
    debits = [
        debit
        for number in range(1, total_rounds(world.study) + 1)
        for debit in round_debits(world.study, shape_of(world, number), world.initial, f"v{number}")
    ]
    expected = study_epsilon(world.study.document, spare=False)
    assert Account(debits).splits(world.study.digest.hex()) == pytest.approx(expected)
    assert set(expected) == {"train", "validation", "test"}


def test_plan_at_joining_is_the_study_with_its_spare_rounds(world: World) -> None:
    """L-2: q, σ and T are fixed at joining, and every debit of the study lies within that plan."""
    policy = load_policy(world.policy_blob())
    plan = study_plan(world.charter, world.study, policy).plan
    expected = study_epsilon(world.study.document, spare=True)
    found = {planned.split: epsilon([planned.event()], world.study.document.privacy.delta or 0.0) for planned in plan}
    assert found == pytest.approx(expected)
    for number in range(1, total_rounds(world.study) + 1):
        for debit in round_debits(world.study, shape_of(world, number), world.initial, "v"):
            (planned,) = [one for one in plan if one.split == debit.split]
            assert (planned.sampling_rate, planned.noise_multiplier) == (debit.sampling_rate, debit.noise_multiplier)
            assert planned.steps % debit.steps == 0


def test_every_data_lane_is_covered_by_a_debit(world: World) -> None:
    """No lane that is drawn from the data leaves without a debit of its split."""
    for number, splits in ((1, {"train"}), (2, {"train", "validation"}), (4, {"test"})):
        debits = round_debits(world.study, shape_of(world, number), world.initial, "v")
        assert {debit.split for debit in debits} == splits
        assert all(debit.scale >= 256 and debit.noise_multiplier > 0 for debit in debits)


def test_count_beyond_its_lane_is_a_local_error_and_not_wrapped(world: World) -> None:
    shape = shape_of(world, 4)
    huge = FixedCounts(COUNTS.hits, COUNTS.totals, np.full((2, 2), 2**40), COUNTS.histogram)
    with pytest.raises(ServiceError) as refused:
        encode_round(world.study.document, shape, None, huge, lambda: secrets.token_bytes(32))
    assert refused.value.reason is Reason.OUT_OF_BOUND


def test_update_of_another_length_is_refused(world: World) -> None:
    with pytest.raises(ServiceError) as refused:
        encode(world, 1, np.zeros(D + 1))
    assert refused.value.reason is Reason.INVALID_DATA
