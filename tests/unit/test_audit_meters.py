"""The audit's meters: within their limits on what is built, beyond them on planted faults (privacy.md §8).

Noise and coins are the operating system's, so these tests are not repeatable: limits are set so far out that an honest
run is beyond one of them, or a planted fault within, less than once in some thousand runs.
"""

import math
from fractions import Fraction

import numpy as np
import pytest

from services.cli.audit_canaries import CANARIES, Cohort, many_runs, one_run
from services.cli.audit_finding import FAULTS, catches
from services.cli.audit_noise import (
    LIMIT,
    after_restart,
    measure_noise,
    one_hot_patients,
    presence,
    sampling_readings,
    shared_readings,
)
from services.cli.audit_scratch import Consortium, Hospital, make_consortium, open_sum, random_patients
from services.cli.audit_sensitivity import exact_ratio, head_readings, hostile, measure_sensitivity
from services.common.documents.shape import check_study
from services.common.dp.noise import share_scale


def quiet(what: str) -> None:
    pass


@pytest.fixture(scope="module")
def shared() -> Consortium:
    return make_consortium(classes=2)


@pytest.fixture(scope="module")
def local() -> Consortium:
    return make_consortium(mechanism="local", classes=2)


def test_scratch_study_is_one_that_every_role_accepts(shared: Consortium) -> None:
    """What is audited is what runs: the documents' own checks, and S_h, Δ₂ and ε from the same functions."""
    check_study(shared.charter, shared.study)
    cohort, privacy = shared.document.cohort, shared.document.privacy
    assert shared.claim(cohort.minimum - cohort.colluding_hospitals) == pytest.approx(3.0, abs=1e-3)
    assert shared.claim(1) > 3.0 > shared.claim(cohort.minimum)
    assert shared.noise.scale == share_scale(privacy.noise_multiplier, shared.noise.sensitivity, 3, 1)


def test_masks_leave_the_sum_as_it_is(shared: Consortium) -> None:
    wards = [Hospital(shared, random_patients(np.random.default_rng(n), 5, 2)) for n in range(3)]
    vectors = [ward.vector(ward.clipped_sum()) for ward in wards]
    plain, masked = (open_sum(shared.train, vectors, masked=flag) for flag in (False, True))
    assert all(np.array_equal(plain[name], masked[name]) for name in plain)
    assert plain["sentinel"].tolist() == [3, 3, 3, 3]


def test_noise_meter_holds_and_catches_what_it_can() -> None:
    """Privacy.md §8, 1: a missing share is beyond nine standard errors in ONE round at d = 9k."""
    finding = measure_noise(1, 2, quiet)
    assert finding.holds, [reading for reading in finding.readings if not reading.holds]
    assert finding.caught == dict.fromkeys(
        ("a share missing", "noise halved", "noise repeated", "a sample re-noised"), True
    )
    names = {reading.what for reading in finding.readings}
    for cohort in (3, 4):
        assert {f"cohort of {cohort}: {law}" for law in ("mean", "variance", "kurtosis")} <= names
    assert {f"{what}: correlation" for what in ("lanes", "rounds", "hospitals", "restarts", "samples")} <= names


def test_missing_share_is_reported_within_one_round() -> None:
    """The noise meter at work: one share left out on purpose, one round, no other reading needed."""
    consortium = make_consortium()
    wards = [Hospital(consortium, random_patients(np.random.default_rng(n), 5, 7)) for n in range(4)]
    found = {r.what: r for r in shared_readings(wards, 1, last=lambda ward, total: ward.bare_vector(total))}
    for cohort in (3, 4):
        reading = found[f"cohort of {cohort}: variance"]
        assert reading.value > 9
        assert not reading.holds


def test_noise_from_a_generator_in_memory_is_caught_at_the_restart(shared: Consortium) -> None:
    """Seeded noise would pass every law; a process that has the same memory would draw it again."""
    generator = np.random.default_rng(7)

    def drawn(ward: Hospital, total: np.ndarray) -> bytes:
        vector = bytearray(ward.bare_vector(total))
        first, end = shared.train.table.lane_range("parameter")
        lanes = np.frombuffer(vector, "<i4")
        lanes[first:end] += np.rint(generator.normal(0, shared.noise.scale, end - first)).astype(np.int32)
        return bytes(vector)

    wards = [Hospital(shared, random_patients(np.random.default_rng(n), 5, 2)) for n in range(4)]
    found = {reading.what: reading for reading in shared_readings(wards, 2, every=drawn)}
    assert found["cohort of 4: variance"].value < LIMIT
    assert found["restarts: correlation"].value > LIMIT
    assert np.array_equal(after_restart(lambda: np.arange(5)), np.arange(5))


def test_presence_reads_one_and_zero_where_there_is_no_noise(shared: Consortium) -> None:
    patients = one_hot_patients(50, 2)
    ward = Hospital(shared, patients)
    scores = presence(shared, ward.integers(ward.clipped_sum()), one_hot_patients(60, 2).labels)
    assert scores[:50] == pytest.approx(np.ones(50), abs=2e-3)
    assert scores[50:] == pytest.approx(np.zeros(10), abs=1e-3)


def test_re_noised_sample_is_seen_and_a_new_one_is_not() -> None:
    ward = Hospital(make_consortium(noise_multiplier=0.5, sampling_rate=0.5, classes=2), one_hot_patients(1000, 2))
    assert not catches(sampling_readings(ward))
    assert catches(sampling_readings(ward, renoised=True))


def test_sensitivity_meter_holds_and_catches_a_doubled_clip() -> None:
    """Privacy.md §8, 2, in whole numbers; what is not finite moves nothing at all."""
    finding = measure_sensitivity(1, quiet)
    assert finding.holds, [reading for reading in finding.readings if not reading.holds]
    assert finding.caught == {"sensitivity doubled": True}
    values = {reading.what: reading.value for reading in finding.readings}
    for model in ("head", "network"):
        assert values[f"{model}: NaN"] == values[f"{model}: infinity"] == 0.0
        assert 0.9 < values[f"{model}: ordinary"] <= 1.0  # the meter looks at the edge, not far below it
    assert "network: 1e30" in values


def test_sensitivity_is_compared_exactly() -> None:
    """3² + 4² = 5²: at the limit it holds, one unit in the last place below it does not."""
    moved = np.array([3, 0, -4])
    assert exact_ratio(moved, 5.0) == 1.0
    assert exact_ratio(moved, math.nextafter(5.0, 0)) > 1.0
    large = np.array([2**40 + 1, 2**20])
    squares = (2**40 + 1) ** 2 + 2**40
    limit = math.sqrt(squares)
    assert (exact_ratio(large, limit) > 1.0) is (squares > Fraction(limit) ** 2)
    assert hostile("many images", (3,), np.random.default_rng(0)).shape == (9, 3)


def test_doubled_clip_is_seen_by_more_than_one_patient(shared: Consortium) -> None:
    from services.cli.audit_scratch import without_claim

    readings = head_readings(without_claim(make_consortium(), clip=2.0), np.random.default_rng(2), make_consortium())
    assert sum(not reading.holds for reading in readings) >= 3


def test_views_go_from_the_public_to_all_others(shared: Consortium, local: Consortium) -> None:
    """Under `shared` also from the colluders' view: n_min = 3 shares, 2 without k = 1, the own one alone."""
    generator = np.random.default_rng(1)
    views = Cohort(shared, generator).views
    assert [(view.name, view.unknown) for view in views] == [("public", 3), ("colluders", 2), ("all others", 1)]
    assert [view.claim for view in views] == [shared.claim(3), shared.claim(2), shared.claim(1)]
    assert [view.name for view in Cohort(local, generator).views] == ["everybody"]


def test_many_runs_hold_and_halved_noise_is_caught(shared: Consortium, local: Consortium) -> None:
    """Privacy.md §8, 3, with few runs: a bound above nothing, below the claim; halved noise is far beyond it."""
    readings = many_runs(shared, 300, 1)
    assert not catches(readings)
    assert readings[-1].value > 0.3  # the view that knows most sees something
    assert all(r.sure is not None and r.sure <= r.value for r in readings)
    assert not catches(many_runs(local, 300, 1))
    assert catches(many_runs(local, 1200, 1, "noise halved"))
    assert catches(many_runs(local, 300, 1, "noise repeated"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", FAULTS)
def test_many_runs_catch_every_planted_fault(shared: Consortium, fault: str) -> None:
    assert catches(many_runs(shared, 4000, 2, fault))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_runs_see_most_of_a_true_three(local: Consortium) -> None:
    """Privacy.md §8, 3: about 2.6 of a true 3 with 5,000 runs; ± .35 for their own chance."""
    (reading,) = many_runs(local, 5000, 3)
    assert 2.1 < reading.value < 3.0
    assert reading.holds


def test_one_run_holds_sees_little_and_catches_repeated_noise(shared: Consortium) -> None:
    """Privacy.md §8, 4: 100 guesses fixed before; with the noise gone every guess is right, which refutes 3."""
    bounds = [reading for seed in range(3) for reading in one_run(shared, seed)]
    assert not catches(bounds)
    assert any(reading.value > 0.2 for reading in bounds)
    repeated = one_run(shared, 1, "noise repeated")
    assert catches(repeated)
    assert min(reading.value for reading in repeated) == pytest.approx(3.465, abs=0.01)
    assert CANARIES == 1000
