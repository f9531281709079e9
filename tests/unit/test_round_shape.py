"""P-21: lanes, scales and ε are functions of charter + study; figures worked out by hand or another way."""

import math
from typing import Any

import numpy as np
import pytest

from services.common.documents import costs
from services.common.documents.shape import (
    check_study,
    core_for,
    largest_batch,
    largest_split,
    round_shape,
    total_rounds,
)
from services.common.dp.accounting import Event
from services.common.errors import Reason, ServiceError
from services.common.secagg.blob import decode, encode
from services.common.secagg.messages import ZERO_DIGEST, Core
from tests.support.documents import Documents, make_documents, make_study
from tests.support.packed import encoded


@pytest.fixture(scope="module")
def documents() -> Documents:
    return make_documents()


def table_of(documents: Documents, study: Any, number: int) -> list[tuple[str, int, int, int, int]]:
    shape = round_shape(documents.charter, study, number)
    return [(lane.name, lane.values, lane.fraction_bits, lane.bound, lane.limbs) for lane in shape.table.lanes]


def test_p_21_the_lanes_of_each_kind_of_round(documents: Documents) -> None:
    """n_max 16 in 32 bits: B = ⌊(2^31 − 1)/16⌋ = 134217727, so a bound of 1.0 has 26 fraction bits."""
    study = make_study()
    head = [("sentinel", 4, 0, 1, 1), ("weight", 1, 0, 1, 1)]
    parameters = ("parameter", 500, 26, 2**26, 1)
    # σ = 4 on √2 votes is S = ⌈√(32 · 4^f + 9)⌉: 182 at f = 5, 363 at f = 6; on √3 votes 222 and 444
    assert table_of(documents, study, 1) == [*head, parameters]
    assert table_of(documents, study, 2) == [*head, ("gate", 4, 6, 134217727, 1), parameters]
    assert table_of(documents, study, 5) == [
        *head,
        ("confusion", 4, 6, 134217727, 1),
        ("histogram", 2 * 2 * 20, 6, 134217727, 1),
    ]
    assert [round_shape(documents.charter, study, r).kind for r in range(1, 6)] == ["train"] * 4 + ["final"]
    assert [round_shape(documents.charter, study, r).has_gate for r in range(1, 6)] == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert total_rounds(study) == 5
    assert total_rounds(make_study(evaluation={"final": False})) == 4


@pytest.mark.parametrize("number", [0, -1, 6])
def test_a_round_outside_the_study_has_no_shape(documents: Documents, number: int) -> None:
    with pytest.raises(ServiceError) as caught:
        round_shape(documents.charter, make_study(), number)
    assert caught.value.reason is Reason.WRONG_PHASE


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("bound", [0.001, 0.3, 1.0, 7.0])
def test_the_scale_is_the_finest_that_never_wraps(documents: Documents, bits: int, bound: float) -> None:
    study = make_study("none", encoding={"ring_bits": bits, "update_bound": bound})
    lane = round_shape(documents.charter, study, 1).table.lane_class("parameter")
    most = 2 ** (bits - 1) - 1
    assert 16 * lane.bound <= most
    assert lane.bound >= bound * 2**lane.fraction_bits
    assert 16 * math.ceil(bound * 2 ** (lane.fraction_bits + 1)) > most


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_counts_up_to_a_million_travel_without_noise(documents: Documents, bits: int) -> None:
    study = make_study("none", encoding={"ring_bits": bits})
    table = round_shape(documents.charter, study, 5).table
    values = {lane.name: np.full(lane.values, 2**20 - 1, np.int64) for lane in table.lanes[1:]}
    values["weight"] = np.ones(1, np.int64)
    encoded(table, values)
    room = largest_split(documents.charter, study)
    assert room is not None
    assert room >= 2**20 - 1


def test_the_largest_split_leaves_room_for_twelve_deviations_of_noise(documents: Documents) -> None:
    study = make_study()
    noise = costs.final_noise(study.document)
    assert largest_split(documents.charter, study) == (134217727 - 12 * noise.scale) // 64
    assert largest_split(documents.charter, make_study(evaluation={"gate_rounds": (), "final": False})) is None


def test_p_21_the_core_follows_from_charter_and_study(documents: Documents) -> None:
    study = make_study()
    core = core_for(documents.charter, study, 2, ZERO_DIGEST, b"m" * 32)
    assert (core.charter, core.study, core.round) == (documents.charter.digest, study.digest, 2)
    assert (core.model, core.parameters, core.ring_bits, core.minimum_cohort) == (b"m" * 32, 500, 32, 3)
    assert core.lanes == round_shape(documents.charter, study, 2).table.lanes
    assert decode(Core, encode(core)) == core


def test_noise_is_what_is_really_drawn_and_never_less_than_claimed() -> None:
    study = make_study().document
    noise = costs.training_noise(study)
    sensitivity = 2**18 * (1 + 2**-10) + math.sqrt(500)
    assert noise.sensitivity == pytest.approx(sensitivity, rel=1e-12)
    assert noise.scale == math.ceil(math.sqrt((4 * sensitivity) ** 2 + 9))
    assert noise.multiplier == pytest.approx(math.sqrt(noise.scale**2 - 9) / sensitivity, rel=1e-12)
    for found, votes in ((costs.gate_noise(study), 2), (costs.final_noise(study), 3)):
        assert found.scale >= 256
        assert found.sensitivity == pytest.approx(64 * math.sqrt(votes), rel=1e-12)
        assert found.multiplier >= 4.0


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """ε of one Gaussian by bisection of Balle and Wang's formula: nothing of the product is used."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    mu, low, high = 1 / multiplier, 0.0, 200.0
    for _ in range(200):
        middle = (low + high) / 2
        spent = phi(mu / 2 - middle / mu) - math.exp(middle) * phi(-mu / 2 - middle / mu)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


def test_a_patient_pays_for_its_own_split_only() -> None:
    """privacy.md §6: train, validation and test patients are different people; ε of the study is the largest."""
    study = make_study(
        rounds=10,
        privacy={"sampling_rate": 1.0, "steps_per_round": 3, "noise_multiplier": 8.0},
        evaluation={"gate_rounds": (2, 5, 9), "gate_noise_multiplier": 6.0, "final_noise_multiplier": 3.0},
    ).document
    events = costs.study_events(study)
    z, gate, final = (f(study).multiplier for f in (costs.training_noise, costs.gate_noise, costs.final_noise))
    assert {found.split: found.event for found in events} == {
        "train": Event(1.0, z, 33),  # 10 rounds and one spare, 3 steps each
        "validation": Event(1.0, gate, 3),
        "test": Event(1.0, final, 1),
    }
    assert all(found.solo == found.event for found in events)  # `local`: nobody else's noise is counted on
    found = costs.study_epsilon(study)
    assert found["train"] == pytest.approx(gaussian_epsilon(z / math.sqrt(33), 1e-5), abs=2e-3)
    assert found["validation"] == pytest.approx(gaussian_epsilon(gate / math.sqrt(3), 1e-5), abs=2e-3)
    assert found["test"] == pytest.approx(gaussian_epsilon(final, 1e-5), abs=2e-3)
    assert costs.study_events(study, spare=False)[0].event == Event(1.0, z, 30)


def test_the_rounds_of_a_study_are_its_events(documents: Documents) -> None:
    study = make_study(evaluation={"gate_rounds": (1, 3)})
    steps: dict[str, int] = {}
    for number in range(1, total_rounds(study) + 1):
        for found in round_shape(documents.charter, study, number).events:
            steps[found.split] = steps.get(found.split, 0) + found.event.steps
    planned = costs.study_events(study.document, spare=False)
    assert steps == {found.split: found.event.steps for found in planned}
    assert round_shape(documents.charter, make_study("none"), 2).events == ()
    assert costs.study_epsilon(make_study("none").document) == {}


def test_sensible_studies_pass(documents: Documents) -> None:
    check_study(documents.charter, make_study())
    check_study(documents.charter, make_study("shared"))
    check_study(documents.charter, make_study("shared", server={"strategy": "adam", "averaging": "ema"}))
    for bits in (16, 24, 32):
        check_study(documents.charter, make_study("none", encoding={"ring_bits": bits}))


LOCAL: list[tuple[dict[str, Any], str]] = [
    ({"privacy": {"epsilon": None}}, "add both"),
    ({"privacy": {"delta": None}}, "add both"),
    ({"privacy": {"epsilon": 11.0}}, "the charter allows (10, 1e-05)"),
    ({"privacy": {"delta": 1e-4}}, "the charter allows (10, 1e-05)"),
    ({"privacy": {"noise_multiplier": 0.0}}, "noise_multiplier must be above 0"),
    ({"privacy": {"none_accepted": "We accept that nobody is protected."}}, "remove it"),
    ({"privacy": {"scale_bits": 12}}, "set it to 13 or more"),
    ({"privacy": {"scale_bits": 30, "noise_multiplier": 5000.0}}, "2^40 can be drawn"),
    ({"evaluation": {"gate_noise_multiplier": 0.0}}, "gate_noise_multiplier must be above 0"),
    ({"evaluation": {"final_noise_multiplier": 0.0}}, "final_noise_multiplier must be above 0"),
    ({"evaluation": {"final_noise_multiplier": 1e-300}}, "without noise"),
    ({"evaluation": {"gate_rounds": (0, 2)}}, "gate_rounds holds 0, the training rounds are 1 to 4"),
    ({"evaluation": {"gate_rounds": (2, 5)}}, "gate_rounds holds 5, the training rounds are 1 to 4"),
    ({"encoding": {"ring_bits": 24}}, "noised lanes need 32"),
    ({"encoding": {"update_bound": 1e9}}, "update_bound 1e+09 does not fit"),
    ({"cohort": {"minimum": 2}}, "the charter's is 3 (P-12)"),
    ({"cohort": {"colluding_hospitals": 0}}, "the charter's is 1"),
    ({"cohort": {"colluding_hospitals": 2}}, "colluding_hospitals + 2 = 4 (P-12)"),
    ({"cohort": {"minimum": 5, "colluding_hospitals": 3}}, "4 organisations"),
    ({"rounds": 1000}, "has 1001 rounds with the final one, the charter allows 1000"),
    ({"model": {"parameters": 300_000_000}, "privacy": {"scale_bits": 24}}, "the charter allows 200000000"),
    ({"timing": {"attempt_seconds": 90_000.0}}, "round keys live at most 24 hours"),
    ({"timing": {"attempt_seconds": 10.0}}, "must be more than submit_seconds"),
    ({"timing": {"train_seconds": 0.0}}, "depends on whom it sampled"),
    ({"server": {"strategy": "sgd"}}, "local sends updates: choose fedavg"),
]
SHARED: list[tuple[dict[str, Any], str]] = [
    ({"server": {"strategy": "fedavg"}}, "choose sgd or adam"),
    ({"privacy": {"steps_per_round": 2}}, "one global step"),
    ({"training": {"momentum": 0.9}}, "use server.momentum"),
    ({"training": {"weight_decay": 0.1}}, "no weight decay"),
    ({"privacy": {"patients": {}}}, "privacy.patients must publish"),
    ({"privacy": {"patients": {"alice": 10_001}}}, "above 1/(10·N) = 1e-05 for the N = 10001"),
    ({"privacy": {"noise_multiplier": 0.0}}, "must be above 0 under shared"),
    ({"privacy": {"scale_bits": 27}}, "leaves no room for one patient's gradient beside the noise"),
    ({"encoding": {"ring_bits": 16}}, "noised lanes need 32"),
    ({"server": {"averaging": "tail", "averaging_rounds": 5}}, "the study trains 4 rounds"),
    ({"cohort": {"minimum": 2}}, "the charter's is 3 (P-12)"),
    ({"timing": {"train_seconds": 0.0}}, "depends on whom it sampled"),
]
NONE: list[tuple[dict[str, Any], str]] = [
    ({"privacy": {"none_accepted": None}}, "none_accepted"),
    ({"server": {"strategy": "adam"}}, "none sends updates: choose fedavg"),
    ({"privacy": {"none_accepted": "... ... ... ... yes ... ..."}}, "at least 20 letters"),
    ({"privacy": {"epsilon": 1.0}}, "remove epsilon"),
    ({"privacy": {"noise_multiplier": 1.0}}, "remove epsilon, delta and all noise"),
    ({"evaluation": {"gate_noise_multiplier": 1.0}}, "remove epsilon, delta and all noise"),
]


@pytest.mark.parametrize(
    ("mechanism", "changes", "words"),
    [("local", *case) for case in LOCAL] + [("shared", *case) for case in SHARED] + [("none", *case) for case in NONE],
)
def test_senseless_studies_are_refused(
    documents: Documents, mechanism: str, changes: dict[str, Any], words: str
) -> None:
    study = make_study(mechanism, **changes)
    with pytest.raises(ServiceError) as caught:
        check_study(documents.charter, study)
    assert caught.value.reason is Reason.INVALID_DOCUMENT
    assert words in caught.value.detail
    assert caught.value.detail.startswith("lesions: ")
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({"privacy": {"noise_multiplier": 0.6}}, "train"),
        ({"evaluation": {"gate_noise_multiplier": 0.3}}, "validation"),
        ({"evaluation": {"final_noise_multiplier": 0.3}}, "test"),
    ],
)
def test_a_claim_that_the_parameters_do_not_give_is_refused_with_the_true_figure(
    documents: Documents, changes: dict[str, Any], split: str
) -> None:
    study = make_study(**changes)
    true = math.ceil(costs.study_epsilon(study.document)[split] * 1000) / 1000  # type: ignore[index]
    assert true > 8
    with pytest.raises(ServiceError) as caught:
        check_study(documents.charter, study)
    assert f"claims 8, but its parameters give {true:.3f} for a patient of the {split} split" in caught.value.detail


def test_the_share_of_one_hospital_follows_the_formula_in_integers(documents: Documents) -> None:
    """privacy.md §2: S_h = ⌈√((σ²Δ₂² + 9)/(n_min − k))⌉; z of n_min − k shares is at least σ."""
    study = make_study("shared").document
    noise = costs.training_noise(study)
    sensitivity = 2**18 * (1 + 2**-10) + math.sqrt(500)
    assert noise.scale == math.ceil(math.sqrt(((4 * sensitivity) ** 2 + 9) / 2))
    assert noise.multiplier == pytest.approx(math.sqrt(2 * noise.scale**2 - 9) / sensitivity, rel=1e-12)
    assert noise.multiplier >= 4.0
    assert noise.solo == pytest.approx(math.sqrt(noise.scale**2 - 9) / sensitivity, rel=1e-12)
    for found, votes in ((costs.gate_noise(study), 2), (costs.final_noise(study), 3)):
        assert found.scale >= 256
        assert found.scale / found.sensitivity == pytest.approx(4 / math.sqrt(2), rel=5e-3)
        assert found.sensitivity == pytest.approx(2**found.fraction_bits * math.sqrt(votes), rel=1e-12)
    alone = costs.study_epsilon(study, solo=True)
    assert all(alone[split] > epsilon for split, epsilon in costs.study_epsilon(study).items())
    assert alone["test"] == pytest.approx(gaussian_epsilon(4 / math.sqrt(2), 1e-5), rel=1e-2)


def test_p_21_the_parameter_lanes_under_shared_have_the_studys_scale_and_all_the_room(documents: Documents) -> None:
    """privacy.md §3: B = data bound + 12·S_h, n_max·B fits the ring; figures at σ = 3.358, n_min − k = 2."""
    study = make_study("shared")
    lane = round_shape(documents.charter, study, 1).table.lane_class("parameter")
    assert (lane.fraction_bits, lane.bound, lane.limbs) == (18, (2**31 - 1) // 16, 1)
    noise = costs.training_noise(study.document)
    assert noise.room(lane.bound) == lane.bound - 12 * noise.scale
    assert largest_batch(documents.charter, study) == (lane.bound - 12 * noise.scale) // 2**18
    assert largest_batch(documents.charter, make_study()) is None
    four = make_documents(maximum=4).charter
    for bits, patients in ((16, 8163), (18, 2019), (20, 483)):
        wide = make_study("shared", privacy={"scale_bits": bits, "noise_multiplier": 3.358})
        found = largest_batch(four, wide)
        assert found is not None
        assert abs(found - patients) <= 1


def test_k_0_is_refused_against_fellow_hospitals_with_the_figure_that_holds_against_one() -> None:
    """privacy.md §2: who takes part knows its own share, so at k = 0 the claim is for the aggregator and the public."""
    charter = make_documents(minimum=4, colluding=0, two_hospitals="accepted").charter
    cohort = {"minimum": 4, "colluding_hospitals": 0}
    study = make_study("shared", privacy={"sampling_rate": 1.0}, cohort=cohort)
    with pytest.raises(ServiceError) as caught:
        check_study(charter, study)
    three_of_four = gaussian_epsilon(4 * math.sqrt(3 / 4) / math.sqrt(5), 1e-5)  # 4 rounds and a spare one
    assert f"against one it is {three_of_four:.2f}" in caught.value.detail
    check_study(charter, make_study("shared", cohort=cohort, privacy={"against": "public", "sampling_rate": 1.0}))


def test_no_claim_is_written_that_a_sentence_of_it_lacks() -> None:
    """A claim names (ε, δ, adjacency, unit, n_min, k, ε_solo)."""
    from services.cli.claim import claim, claim_in_words

    study = make_study("shared").document
    solo = max(costs.study_epsilon(study, solo=True).values())
    words = claim_in_words(claim(study), "lesion")
    for part in ("ε = 8 ", "δ = 1e-05", "lesion", "add/remove", "at least 3 hospitals", "k = 1"):
        assert part in words
    assert f"ε_solo = {math.ceil(100 * solo) / 100:.2f}" in words
    assert "ε_solo" not in claim_in_words(claim(make_study().document), "patient")
    assert "no ε is claimed" in claim_in_words(claim(make_study("none").document), "patient")


def test_the_spare_rounds_are_inside_the_claim(documents: Documents) -> None:
    """privacy.md L-1: σ is calibrated for the rounds and a tenth more."""
    planned = max(costs.study_epsilon(make_study().document, spare=False).values())
    covered = costs.study_epsilon(make_study().document)["train"]
    between = round((planned + covered) / 2, 6)
    assert planned < between < covered
    with pytest.raises(ServiceError, match="spare rounds included"):
        check_study(documents.charter, make_study(privacy={"epsilon": between}))
    check_study(documents.charter, make_study(privacy={"epsilon": math.ceil(covered * 1000) / 1000}))


def test_a_narrow_charter_is_obeyed() -> None:
    from services.common.documents.charter import LimitsSection

    limits = LimitsSection(ring_bits=(16,), rounds=5, parameters=400)
    charter = make_documents(limits=limits).charter
    with pytest.raises(ServiceError, match="the charter allows 400"):
        check_study(charter, make_study("none", encoding={"ring_bits": 16}))
    with pytest.raises(ServiceError, match="the charter allows 16"):
        check_study(charter, make_study("none", model={"parameters": 400}))
    with pytest.raises(ServiceError, match="has 6 rounds"):
        check_study(charter, make_study("none", rounds=5, model={"parameters": 400}, encoding={"ring_bits": 16}))


def test_counts_that_would_overflow_are_refused() -> None:
    """4096 hospitals leave 524287 a lane: σ = 0.02 needs 14 fraction bits, and 31 patients fit."""
    charter = make_documents(maximum=4096).charter
    check_study(charter, make_study())
    with pytest.raises(ServiceError, match=r"overflow at 31 patients"):
        check_study(charter, make_study(evaluation={"gate_noise_multiplier": 0.02}))
