"""What a round releases: lanes, their noise, and debits that cover every one of them."""

import secrets

import numpy as np
import pytest

from services.common.documents.costs import final_noise, gate_noise, study_epsilon, training_noise
from services.common.documents.policy import load_policy
from services.common.documents.shape import RoundShape, round_shape, total_rounds
from services.common.dp.accounting import epsilon
from services.common.dp.noise import sensitivity_rint, share_scale
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


def lanes(shape: RoundShape, packed: bytes, name: str) -> np.ndarray:
    first, end = shape.table.lane_range(name)
    size = shape.table.ring.lane_bytes
    return decode_class(shape.table, name, bytes(packed[first * size : end * size]))


def encode(world: World, number: int, update: np.ndarray | None, keys: object = None) -> tuple[RoundShape, bytes]:
    shape = shape_of(world, number)
    draw = keys or (lambda: secrets.token_bytes(32))
    chunks = encode_round(world.study.document, shape, update, COUNTS, draw)  # type: ignore[arg-type]  # a test's lambda
    return shape, b"".join(chunk for chunk, _ in chunks)


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
        list(encode_round(world.study.document, shape, None, huge, lambda: secrets.token_bytes(32)))
    assert refused.value.reason is Reason.OUT_OF_BOUND


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(
        tmp_path_factory.mktemp("shared"), D,
        privacy={"mechanism": "shared", "patients": {"alice": 100}, "expected_batch": 300.0, "scale_bits": 17},
        training={"learning_rate": None}, server={"strategy": "sgd", "learning_rate": 0.1},
    )  # fmt: skip


def test_shared_sends_the_scaled_sum_and_its_share_of_the_noise(shared: World) -> None:
    """privacy.md §3: scale → rint → + discrete Gaussian of S_h; the integers are the sum's, whatever the noise."""
    noise = training_noise(shared.study.document)
    total = np.zeros(D)
    total[:4] = [3.25, -1.5, 2.0**-18, 100.0]
    drawn = []
    for _ in range(20):
        shape, packed = encode(shared, 1, total)
        drawn.append(lanes(shape, packed, "parameter") - np.rint(np.ldexp(total, 17)).astype(np.int64))
    values = np.array(drawn, np.float64)
    assert abs(values.var() / noise.scale**2 - 1) < 5 * (2 / values.size) ** 0.5
    assert abs(values.mean()) < 5 * noise.scale / values.size**0.5
    assert len({tuple(row) for row in values.tolist()}) == 20
    assert noise.scale == share_scale(4.0, sensitivity_rint(17, 1.0, D), 3, 1)


def test_shared_projects_before_the_noise_and_checks_nothing_after(shared: World) -> None:
    """privacy.md §3: what is beyond the data bound is projected coordinate by coordinate; nothing is refused."""
    shape, noise = shape_of(shared, 1), training_noise(shared.study.document)
    lane = shape.table.lane_class("parameter")
    room = lane.bound - 12 * noise.scale
    total = np.zeros(D)
    total[0], total[1], total[2] = 1e9, -1e9, room / 2**17 / 2
    _, packed = encode(shared, 1, total)
    found = lanes(shape, packed, "parameter")[:3]
    assert np.abs(found - [room, -room, round(room / 2)]).max() < 12 * noise.scale
    assert 8 * lane.bound <= 2**31 - 1  # so no sum over the charter's 8 hospitals wraps, noise included
    many = FixedCounts(COUNTS.hits, COUNTS.totals, np.full((2, 2), 2**40), COUNTS.histogram)
    final = shape_of(shared, 4)
    chunks = encode_round(shared.study.document, final, None, many, lambda: secrets.token_bytes(32))
    packed = b"".join(chunk for chunk, _ in chunks)
    bound, of_votes = final.table.lane_class("confusion").bound, final_noise(shared.study.document).scale
    assert np.abs(lanes(final, packed, "confusion") - (bound - 12 * of_votes)).max() < 12 * of_votes


def test_an_extreme_noise_wraps_and_is_never_clipped_under_shared(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """privacy.md §3: order noise → reduce mod 2^b; a clip after the noise would break the law that ε rests on."""
    from services.hospital_node import release

    class Extreme:
        def __init__(self, scale: int) -> None:
            pass

        def draw(self, key: bytes, count: int) -> np.ndarray:
            return np.full(count, 2**31 + 5)

    monkeypatch.setattr(release, "discrete_gaussian", Extreme)
    shape, packed = encode(shared, 1, np.zeros(D))
    assert set(lanes(shape, packed, "parameter").tolist()) == {2**31 + 5 - 2**32}


def test_debits_under_shared_are_at_n_min_and_k_with_the_solo_event_beside(shared: World) -> None:
    """L-3: one step at (q, z of n_min − k shares); the same events alone give ε_solo."""
    study = shared.study.document
    debits = [
        debit
        for number in range(1, total_rounds(shared.study) + 1)
        for debit in round_debits(shared.study, shape_of(shared, number), shared.initial, f"v{number}")
    ]
    assert {(debit.steps, debit.minimum_cohort, debit.colluding_hospitals) for debit in debits} == {(1, 3, 1)}
    spent = Account(debits)
    for solo in (False, True):
        expected = study_epsilon(study, spare=False, solo=solo)
        assert spent.splits(shared.study.digest.hex(), solo=solo) == pytest.approx(expected)


def test_update_of_another_length_is_refused(world: World) -> None:
    with pytest.raises(ServiceError) as refused:
        encode(world, 1, np.zeros(D + 1))
    assert refused.value.reason is Reason.INVALID_DATA
