"""The ledger: debits, projections and the chain (privacy.md §7)."""

import dataclasses
import math
from pathlib import Path
from statistics import NormalDist

import pytest

from services.common.errors import Reason, ServiceError
from services.common.store.database import Database, open_database
from services.hospital_node.ledger import SCHEMA, Debit, Ledger, split_epsilon, verify_export

DELTA = 1e-5
DEBIT = Debit(
    mechanism="local",
    split="train",
    sampling_rate=1.0,
    noise_multiplier=6.0,
    steps=1,
    sensitivity=1000.0,
    scale=6001,
    minimum_cohort=3,
    colluding_hospitals=1,
    delta=DELTA,
    study="aa" * 32,
    round=1,
    attempt=1,
    manifest="bb" * 32,
    model="cc" * 32,
    vector="v1",
)


def debit(number: int, **changes: object) -> Debit:
    return dataclasses.replace(DEBIT, **{"round": number, "vector": f"v{number}", **changes})  # type: ignore[arg-type]


def gaussian_epsilon(multiplier: float, steps: int, delta: float = DELTA) -> float:
    """ε of `steps` full-batch Gaussians by Balle and Wang 2018, solved by bisection in plain Python."""
    mu = math.sqrt(steps) / multiplier
    cdf = NormalDist().cdf

    def delta_at(epsilon: float) -> float:
        return cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)

    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(tmp_path / "ledger.sqlite", (SCHEMA,))


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return Ledger(database)


def add(ledger: Ledger, database: Database, *debits: Debit) -> None:
    with database.transaction() as connection:
        ledger.append(connection, debits)


def test_epsilon_is_derived_and_equals_the_closed_form(ledger: Ledger, database: Database) -> None:
    """Events only are stored; ε of four full-batch rounds is that of one Gaussian at σ/√4."""
    for number in range(1, 5):
        add(ledger, database, debit(number))
    assert ledger.spent(DEBIT.study) == pytest.approx(gaussian_epsilon(6.0, 4), rel=1e-3)
    assert "epsilon" not in {field.name for field in dataclasses.fields(Debit)}


def test_the_solo_epsilon_is_that_of_this_hospitals_share_alone(ledger: Ledger, database: Database) -> None:
    """privacy.md §2, worked example: (n_min, k) = (6, 1), share 1.502 C: ε = 3 together, 8.72 if all others collude."""
    clip, sigma = 2**20, 3.358
    share = math.isqrt(math.ceil((sigma * clip) ** 2 / 5)) + 1
    together = debit(
        1, mechanism="shared", sampling_rate=0.256, steps=79, noise_multiplier=sigma, sensitivity=float(clip),
        scale=share, minimum_cohort=6, colluding_hospitals=1,
    )  # fmt: skip
    assert share / clip == pytest.approx(1.502, abs=5e-4)
    add(ledger, database, together)
    assert ledger.spent(DEBIT.study) == pytest.approx(3.0, abs=5e-3)
    assert ledger.spent_solo(DEBIT.study) == pytest.approx(8.72, abs=5.1e-3)
    assert split_epsilon(ledger.debits(), solo=True) == {"train": ledger.spent_solo(DEBIT.study)}
    alone = debit(2, study="dd" * 32, noise_multiplier=math.sqrt(6001**2 - 9) / 1000)
    add(ledger, database, alone)
    assert ledger.spent_solo("dd" * 32) == pytest.approx(ledger.spent("dd" * 32), rel=1e-9)  # `local`: the same
    unprotected = debit(3, study="ee" * 32, mechanism="none", noise_multiplier=0.0, sensitivity=0.0, scale=0)
    add(ledger, database, unprotected)
    assert ledger.spent_solo("ee" * 32) == math.inf
    assert ledger.spent_solo("ff" * 32) == 0.0


def test_a_patient_pays_for_its_own_split_only(ledger: Ledger, database: Database) -> None:
    """privacy.md §6: the study's ε is the largest of its splits', never less and not the sum."""
    add(ledger, database, debit(1), debit(1, split="validation", noise_multiplier=3.0))
    splits = split_epsilon(ledger.debits())
    assert splits["validation"] == pytest.approx(gaussian_epsilon(3.0, 1), rel=1e-3)
    assert ledger.spent(DEBIT.study) == max(splits.values())


def test_l2_projection_counts_what_is_left_and_how_many_rounds_it_buys(ledger: Ledger, database: Database) -> None:
    """L-2: with a cap between the ε of 3 and of 4 rounds, two more fit after the first, then one, then none."""
    cap = (gaussian_epsilon(6.0, 3) + gaussian_epsilon(6.0, 4)) / 2
    for done, left in ((1, 2), (2, 1), (3, 0)):
        add(ledger, database, debit(done))
        projection = ledger.project(
            [debit(done + 1)], [debit(done + 1)], remaining=10, study_cap=cap, dataset_cap=100.0
        )
        assert projection.rounds_left == left
        assert (projection.study_after <= cap) is (left > 0)
        assert projection.study_spent == pytest.approx(gaussian_epsilon(6.0, done), rel=1e-3)


def test_rounds_left_is_bounded_by_the_study(ledger: Ledger) -> None:
    projection = ledger.project([debit(1)], [debit(1)], remaining=3, study_cap=100.0, dataset_cap=100.0)
    assert projection.rounds_left == 3


def test_across_studies_the_sums_of_epsilon_and_delta_count(ledger: Ledger, database: Database) -> None:
    """One ledger for the data set: another study's ε and δ stand beside this one's."""
    add(ledger, database, debit(1, study="dd" * 32), debit(2, study="dd" * 32))
    projection = ledger.project([debit(1)], [debit(1)], remaining=5, study_cap=100.0, dataset_cap=100.0)
    assert projection.study_spent == 0.0
    assert projection.dataset_spent == pytest.approx(gaussian_epsilon(6.0, 2), rel=1e-3)
    assert projection.dataset_after == pytest.approx(gaussian_epsilon(6.0, 2) + gaussian_epsilon(6.0, 1), rel=1e-3)
    assert projection.dataset_delta_after == pytest.approx(2 * DELTA)


def test_l1_a_paid_vector_costs_nothing_again(ledger: Ledger, database: Database) -> None:
    """L-1: the same x under attempt a+1 is no second debit; another vector of the same round is one."""
    add(ledger, database, debit(1))
    again = ledger.project([debit(1)], [], remaining=1, study_cap=100.0, dataset_cap=100.0, paid=True)
    assert again.study_after == again.study_spent
    other = ledger.project([debit(1, vector="x")], [], remaining=1, study_cap=100.0, dataset_cap=100.0)
    assert other.study_after > other.study_spent
    assert ledger.debited("v1")
    assert not ledger.debited("x")


def test_none_is_recorded_and_claims_no_epsilon(ledger: Ledger, database: Database) -> None:
    """`none` moves the chain and remembers the model, so that P-10's second vector is seen; it has no ε."""
    plain = debit(1, mechanism="none", noise_multiplier=0.0, delta=0.0)
    add(ledger, database, plain)
    assert ledger.spent(DEBIT.study) == math.inf  # 0 would be a claim that nothing was revealed
    repeated = ledger.project(
        [dataclasses.replace(plain, round=2, vector="other")], [], remaining=1, study_cap=1.0, dataset_cap=1.0
    )
    assert repeated.repeated
    moved_on = dataclasses.replace(plain, round=2, vector="other", model="ee" * 32)
    assert not ledger.project([moved_on], [], remaining=1, study_cap=1.0, dataset_cap=1.0).repeated


def test_chain_goes_on_after_a_restart_and_starts_anew_nowhere(ledger: Ledger, database: Database) -> None:
    """L-4: {sequence, head} rise together; two fresh ledgers with equal events have other heads (32 random bytes)."""
    start = ledger.mark()
    assert start.sequence == 0
    add(ledger, database, debit(1))
    first = ledger.mark()
    add(ledger, database, debit(2))
    assert (first.sequence, ledger.mark().sequence) == (1, 2)
    path = database.path
    database.close()
    again = open_database(path, (SCHEMA,))
    assert Ledger(again).mark() != first
    other = Ledger(open_database(path.with_name("other.sqlite"), (SCHEMA,)))
    assert other.mark().head != start.head


def test_events_cannot_be_changed_or_removed(ledger: Ledger, database: Database) -> None:
    """Append-only: the store itself refuses."""
    add(ledger, database, debit(1))
    for statement in ("UPDATE ledger SET event = x'00'", "DELETE FROM ledger"):
        with pytest.raises(Exception, match="ledger events"), database.transaction() as connection:
            connection.execute(statement)


def test_ledger_damaged_on_disk_is_refused_at_start(ledger: Ledger, database: Database) -> None:
    """L-5: whoever writes around the triggers is found by the chain, and the first broken link is named."""
    add(ledger, database, debit(1), debit(2), debit(3))
    with database.transaction() as connection:
        connection.execute("DROP TRIGGER ledger_stays")
        connection.execute(
            "UPDATE ledger SET event = CAST(replace(CAST(event AS TEXT), '6.0', '9.0') AS BLOB) WHERE sequence = 2"
        )
    with pytest.raises(ServiceError, match="event 2") as refused:
        Ledger(database)
    assert refused.value.reason is Reason.ROLLED_BACK


def test_l5_export_verifies_offline(ledger: Ledger, database: Database) -> None:
    add(ledger, database, debit(1), debit(2))
    assert verify_export(ledger.export()) == ledger.mark()
    assert verify_export([]) is None
