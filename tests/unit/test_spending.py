"""What a ledger's events cost: within a study, across studies, solo (privacy.md §7, L-2, L-3)."""

import dataclasses
import math

import pytest

from services.common.dp.accounting import Event
from services.common.dp.noise import share_scale
from services.common.dp.renyi import RenyiFilter
from services.hospital_node.events import Debit, Exposed, Joined, Planned
from services.hospital_node.spending import Account, Caps
from tests.support.ledgers import DEBIT, DELTA, debit, gaussian_epsilon, joined, planned

WIDE = Caps(100.0, 4 * DELTA)
OTHER = "dd" * 32


def rounds(count: int, **changes: object) -> tuple[Debit, ...]:
    return tuple(debit(number, **changes) for number in range(1, count + 1))


def test_epsilon_equals_the_closed_form() -> None:
    """ε of four full-batch rounds is that of one Gaussian at σ/√4."""
    account = Account(rounds(4))
    assert account.study(DEBIT.study) == pytest.approx(gaussian_epsilon(6.0, 4), rel=1e-3)
    assert Account(()).study(DEBIT.study) == 0.0


def test_a_patient_pays_for_its_own_split_only() -> None:
    """privacy.md §6: the study's ε is the largest of its splits', never less and not the sum; the data set's too."""
    account = Account((debit(1), debit(1, split="validation", noise_multiplier=3.0)))
    assert account.splits(DEBIT.study)["validation"] == pytest.approx(gaussian_epsilon(3.0, 1), rel=1e-3)
    assert account.study(DEBIT.study) == max(account.splits(DEBIT.study).values())
    assert account.dataset(WIDE).epsilon == account.study(DEBIT.study)


def test_l2_projection_counts_what_is_left_and_how_many_rounds_it_buys() -> None:
    """L-2: with a cap between the ε of 3 and of 4 rounds, two more fit after the first, then one, then none."""
    cap = (gaussian_epsilon(6.0, 3) + gaussian_epsilon(6.0, 4)) / 2
    for done, left in ((1, 2), (2, 1), (3, 0)):
        projection = Account(rounds(done)).project(
            [debit(done + 1)], [debit(done + 1)], remaining=10, study_cap=cap, caps=WIDE
        )
        assert projection.rounds_left == left
        assert (projection.study_after <= cap) is (left > 0)
        assert projection.study_spent == pytest.approx(gaussian_epsilon(6.0, done), rel=1e-3)


def test_rounds_left_is_bounded_by_the_study() -> None:
    projection = Account(()).project([debit(1)], [debit(1)], remaining=3, study_cap=100.0, caps=WIDE)
    assert projection.rounds_left == 3


def test_l1_a_paid_vector_costs_nothing_again() -> None:
    """L-1: the same x under attempt a+1 is no second debit; another vector of the same round is one."""
    account = Account([debit(1)])
    again = account.project([debit(1)], [], remaining=1, study_cap=100.0, caps=WIDE, paid=True)
    assert again.study_after == again.study_spent
    assert again.dataset_after == again.dataset_spent
    other = account.project([debit(1, vector="x")], [], remaining=1, study_cap=100.0, caps=WIDE)
    assert other.study_after > other.study_spent


def test_l2_in_the_sum_every_other_study_stands_with_its_whole_plan() -> None:
    """L-2: two rounds of ten were sent, but when to stop was chosen with what they released: all ten count."""
    events = (joined(planned(10), study=OTHER), *rounds(2, study=OTHER))
    projection = Account(events).project([debit(1)], [], remaining=0, study_cap=100.0, caps=Caps(100.0, 1e-4))
    whole = gaussian_epsilon(6.0, 10)
    filtered = RenyiFilter(100.0, 5e-5).spent([Event(1.0, 6.0, 3)])
    assert projection.study_spent == 0.0
    assert projection.dataset_after == pytest.approx(min(whole + gaussian_epsilon(6.0, 1), filtered), rel=1e-3)
    assert projection.dataset_sum_delta == pytest.approx(2 * DELTA)


def test_l2_the_smaller_of_sum_and_filter_counts() -> None:
    """Many small studies: the filter composes, the sum adds. One study that ran its plan: the sum, which is PLD."""
    many = [
        event
        for number in range(20)
        for event in (
            joined(planned(1), study=f"{number:064x}", delta=1e-7),
            debit(1, study=f"{number:064x}", delta=1e-7),
        )
    ]
    caps = Caps(6.0, 1e-5)
    total = Account(many).dataset(caps)
    summed = 20 * gaussian_epsilon(6.0, 1, 1e-7)
    assert total.rule == "filter"
    assert total.epsilon < summed / 2
    assert total.epsilon == pytest.approx(RenyiFilter(6.0, 5e-6).spent([Event(1.0, 6.0, 20)]))
    one = Account((joined(planned(5)), *rounds(5))).dataset(Caps(10.0, 1e-4))
    assert one.rule == "sum"
    assert one.epsilon == pytest.approx(gaussian_epsilon(6.0, 5), rel=1e-3)


def test_l2_sum_needs_half_of_delta_and_a_plan_that_was_kept() -> None:
    """Each bound has half of δ_total; a study beyond its plan, or joined by nobody, has no place in the sum."""
    kept = (joined(planned(2), study=OTHER), *rounds(2, study=OTHER), debit(1))
    assert Account(kept).dataset(Caps(100.0, 4 * DELTA)).rule == "sum"
    assert Account(kept).dataset(Caps(100.0, 3.9 * DELTA)).rule == "filter"
    beyond = (joined(planned(2), study=OTHER), *rounds(3, study=OTHER), debit(1))
    assert Account(beyond).dataset(Caps(100.0, 4 * DELTA)).rule == "filter"
    assert Account(kept[1:]).dataset(Caps(100.0, 4 * DELTA)).rule == "filter"
    assert Account(kept).dataset(Caps(100.0, 0.0)).epsilon == math.inf


def test_l2_data_set_cap_refuses_what_a_second_study_has_no_room_for() -> None:
    """One ledger for the data set: with the first study's plan, no round of the second fits; without it, some do."""
    caps = Caps(gaussian_epsilon(6.0, 10) + 0.1, 4 * DELTA)
    first: tuple[Joined | Debit, ...] = (joined(planned(10), study=OTHER), *rounds(10, study=OTHER))
    second = [debit(1)]
    assert Account(first).project(second, second, remaining=9, study_cap=100.0, caps=caps).rounds_left == 0
    assert Account(()).project(second, second, remaining=9, study_cap=100.0, caps=caps).rounds_left == 9


def shared_debit(number: int, minimum: int = 5, colluding: int = 1, multiplier: float = 6.0) -> Debit:
    scale = share_scale(multiplier, DEBIT.sensitivity, minimum, colluding)
    return debit(
        number,
        mechanism="shared",
        noise_multiplier=multiplier,
        scale=scale,
        minimum_cohort=minimum,
        colluding_hospitals=colluding,
    )


def test_l3_solo_stands_beside_the_shared_event() -> None:
    """ε_solo = ε(q, σ/√(n_min − k), T), privacy.md §2: σ = 6 over 4 honest shares is 3 for the one alone."""
    account = Account([shared_debit(1)])
    assert account.study(DEBIT.study) == pytest.approx(gaussian_epsilon(6.0, 1), rel=1e-3)
    assert account.study(DEBIT.study, solo=True) == pytest.approx(gaussian_epsilon(3.0, 1), rel=1e-3)
    assert account.dataset(WIDE, solo=True).epsilon == pytest.approx(account.study(DEBIT.study, solo=True))
    local = Account([debit(1, noise_multiplier=math.sqrt(6001**2 - 9) / DEBIT.sensitivity)])
    assert local.study(DEBIT.study, solo=True) == pytest.approx(local.study(DEBIT.study), rel=1e-9)


def test_l3_worked_example_of_the_design() -> None:
    """privacy.md §2: (n_min, k) = (6, 1), share 1.502 C: ε = 3 together, 8.72 if all others collude."""
    clip, sigma = 2**20, 3.358
    share = share_scale(sigma, float(clip), 6, 1)
    assert share / clip == pytest.approx(1.502, abs=5e-4)
    together = debit(
        1, mechanism="shared", sampling_rate=0.256, steps=79, noise_multiplier=sigma, sensitivity=float(clip),
        scale=share, minimum_cohort=6, colluding_hospitals=1,
    )  # fmt: skip
    account = Account([together])
    assert account.study(DEBIT.study) == pytest.approx(3.0, abs=5e-3)
    assert account.splits(DEBIT.study, solo=True) == {"train": pytest.approx(8.72, abs=5.1e-3)}


def test_l3_exposed_round_counts_with_the_own_noise_alone() -> None:
    """L-3: the true event takes the place of the shared one in every figure; other rounds stay as they were."""
    honest = Account([shared_debit(1), shared_debit(2)])
    exposed = Account([shared_debit(1), shared_debit(2), Exposed(DEBIT.study, 2, "a cohort of 2")])
    mu = math.sqrt(1 / 6.0**2 + 1 / 3.0**2)
    assert exposed.study(DEBIT.study) == pytest.approx(gaussian_epsilon(1 / mu, 1), rel=1e-3)
    assert exposed.study(DEBIT.study) > honest.study(DEBIT.study)
    assert exposed.study(DEBIT.study, solo=True) == honest.study(DEBIT.study, solo=True)
    projection = exposed.project([shared_debit(3)], [], remaining=0, study_cap=100.0, caps=WIDE)
    assert projection.study_spent == exposed.study(DEBIT.study)


def test_l3_exposed_study_is_beyond_its_plan() -> None:
    plan = Planned("train", 1.0, 6.0, shared_debit(1).solo_event().noise_multiplier, 1)
    events = (joined(plan, study=OTHER), dataclasses.replace(shared_debit(1), study=OTHER), debit(1))
    assert Account(events).dataset(Caps(100.0, 1e-4)).rule == "sum"
    assert Account((*events, Exposed(OTHER, 1, "x"))).dataset(Caps(100.0, 1e-4)).rule == "filter"


def test_none_is_recorded_and_claims_no_epsilon() -> None:
    """`none` has no ε; it is not held against caps; P-10's second vector is seen by the model."""
    plain = debit(1, mechanism="none", noise_multiplier=0.0, delta=0.0)
    account = Account([plain])
    assert account.study(DEBIT.study, solo=True) == math.inf
    assert account.study(DEBIT.study) == math.inf  # 0 would be a claim that nothing was revealed
    assert account.dataset(WIDE).epsilon == math.inf
    nothing = Caps(0.0, 0.0)
    second = dataclasses.replace(plain, round=2, vector="other")
    projection = account.project([second], [], remaining=1, study_cap=0.0, caps=nothing)
    assert projection.repeated
    assert projection.dataset_after == 0.0
    moved_on = dataclasses.replace(second, model="ee" * 32)
    assert not account.project([moved_on], [], remaining=1, study_cap=0.0, caps=nothing).repeated
