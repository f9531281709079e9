"""The hospital's consent, decided from the documents alone: deny by default, one sentence each."""

import datetime
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.common.documents.policy import LoadedPolicy, load_policy
from services.common.documents.study import LoadedStudy, load_study
from services.common.errors import Reason, ServiceError
from services.hospital_node.policy import Projection, check_hospital, decide, decide_study
from tests.support.hospital_world import World, make_world, study_document, yaml

TODAY = datetime.date(2026, 11, 24)
FITS = Projection(
    round=1,
    study_spent=1.0,
    study_after=2.0,
    dataset_spent=1.0,
    dataset_after=2.0,
    dataset_rule="sum",
    dataset_sum_delta=1e-5,
    rounds_left=2,
    repeated=False,
)
NONE = {
    "privacy": {"mechanism": "none", "epsilon": None, "delta": None, "noise_multiplier": 0.0,
                "none_accepted": "synthetic images only, nobody is behind them"},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), 100)


def policy_for(study: LoadedStudy, **changes: Any) -> LoadedPolicy:
    top = {"hospital": "alice", "dataset": "ward", "dataset_epsilon": 10.0, "dataset_delta": 1e-4}
    entry: dict[str, Any] = {
        "sha256": study.digest.hex(),
        "mechanisms": ["local"],
        "epsilon": 8.0,
        "delta": 1e-5,
        "rounds": 3,
        "until": "2099-12-31",
    }
    for key, value in changes.items():
        (top if key in top else entry)[key] = value
    return load_policy(yaml({"wardround": "policy/v1", **top, "studies": [entry]}).encode())


def test_what_is_allowed_is_allowed(world: World) -> None:
    assert decide(policy_for(world.study), world.charter, world.study, FITS, TODAY) is None


def test_study_that_is_not_listed_is_refused_before_its_bytes_are_known(world: World) -> None:
    """Deny by default: by digest, so one changed byte of a study takes the consent away."""
    policy = policy_for(world.study)
    other = load_study(world.study.blob + b"\n")
    for refusal in (decide_study(policy, other.digest), decide(policy, world.charter, other, FITS, TODAY)):
        assert refusal is not None
        assert refusal.reason is Reason.POLICY_REFUSES
        assert "not listed" in refusal.detail
    assert decide_study(policy, world.study.digest) is None


@pytest.mark.parametrize(
    ("policy", "projection", "reason", "words"),
    [
        ({"until": "2020-01-01"}, {}, Reason.POLICY_REFUSES, ("until", "2020-01-01", "2026-11-24")),
        ({"mechanisms": ["shared"]}, {}, Reason.POLICY_REFUSES, ("local", "shared", "mechanisms")),
        ({"minimum_cohort": 4}, {}, Reason.POLICY_REFUSES, ("3", "4", "minimum_cohort")),
        ({"colluding_hospitals": 2, "minimum_cohort": 4}, {}, Reason.POLICY_REFUSES, ("3", "4")),
        ({"epsilon": 7.9}, {}, Reason.POLICY_REFUSES, ("8", "7.9", "epsilon")),
        ({"delta": 1e-6}, {}, Reason.POLICY_REFUSES, ("1e-05", "1e-06", "delta")),
        ({"rounds": 2}, {"round": 3}, Reason.POLICY_REFUSES, ("round 3", "2 rounds", "rounds")),
        ({}, {"round": 5}, Reason.POLICY_REFUSES, ("round 5",)),
        (
            {},
            {"study_after": 8.5, "study_spent": 7.0, "rounds_left": 0},
            Reason.BUDGET_EXHAUSTED,
            ("8.500", "8", "1.000 is left", "no more training rounds"),
        ),
        (
            {"dataset_epsilon": 3.0},
            {"dataset_after": 3.5, "dataset_spent": 2.5, "rounds_left": 1},
            Reason.BUDGET_EXHAUSTED,
            ("ward", "3.500", "0.500 is left", "1 more training round"),
        ),
        (
            {"dataset_epsilon": 3.0},
            {"dataset_after": 3.5, "dataset_rule": "filter", "dataset_sum_delta": 6e-5},
            Reason.BUDGET_EXHAUSTED,
            ("3.500 by the Rényi filter at δ = 5e-05", "6e-05", "0.0001", "raise `dataset_delta` to 0.00012"),
        ),
        ({}, {"dataset_after": math.inf}, Reason.BUDGET_EXHAUSTED, ("no finite figure",)),
    ],
)
def test_each_limit_refuses_in_one_sentence_that_names_it(
    world: World, policy: dict[str, Any], projection: dict[str, Any], reason: Reason, words: tuple[str, ...]
) -> None:
    """Policy caps and L-2: what, the limit, what is left and how many rounds that buys."""
    refusal = decide(policy_for(world.study, **policy), world.charter, world.study, replace(FITS, **projection), TODAY)
    assert refusal is not None
    assert refusal.reason is reason
    for word in words:
        assert word in refusal.detail
    assert "\n" not in refusal.detail


def test_budget_exactly_at_the_cap_is_allowed(world: World) -> None:
    at_cap = replace(FITS, study_after=8.0, dataset_after=10.0)
    assert decide(policy_for(world.study), world.charter, world.study, at_cap, TODAY) is None


def test_final_round_belongs_to_the_consent_of_the_last_training_round(world: World) -> None:
    final = replace(FITS, round=4)
    assert decide(policy_for(world.study, rounds=3), world.charter, world.study, final, TODAY) is None
    assert decide(policy_for(world.study, rounds=2), world.charter, world.study, final, TODAY) is not None


def test_expired_study_is_refused_whatever_the_policy_says(world: World) -> None:
    late = datetime.date(2100, 1, 1)
    refusal = decide(policy_for(world.study, until="2099-12-31"), world.charter, world.study, FITS, late)
    assert refusal is not None


def test_none_needs_the_words_and_a_second_vector_needs_more(world: World) -> None:
    """`none`: `no_privacy: accepted`; P-10: a second vector for one model only with `repeat: allowed`."""
    study = load_study(yaml(study_document(100, **NONE)).encode())
    with pytest.raises(ServiceError):  # the document itself already demands the words
        policy_for(study, mechanisms=["none"])
    accepts = {"mechanisms": ["none"], "no_privacy": "accepted"}
    assert decide(policy_for(study, **accepts), world.charter, study, FITS, TODAY) is None
    repeated = replace(FITS, repeated=True)
    refusal = decide(policy_for(study, **accepts), world.charter, study, repeated, TODAY)
    assert refusal is not None
    assert "repeat: allowed" in refusal.detail
    assert decide(policy_for(study, **accepts, repeat="allowed"), world.charter, study, repeated, TODAY) is None


def test_policy_of_another_hospital_is_refused(world: World) -> None:
    with pytest.raises(ServiceError, match="alice's, this hospital is bob"):
        check_hospital(policy_for(world.study), "bob")


def test_policy_module_reads_no_clock_socket_disk_or_randomness() -> None:
    """architecture.md §3: policy.py is pure."""
    import ast

    import services.hospital_node.policy as module

    tree = ast.parse(Path(str(module.__file__)).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"datetime", "dataclasses", "math", "services", "typing"}
