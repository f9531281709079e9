"""A hospital's consent, decided before anything of a round is downloaded. Deny by default.

`decide` is the whole of it. Pure: the documents, what the ledger projects and today's date come in as
arguments. Not here: what the ledger holds (ledger.py), whether a manifest is valid (attempt.py).
"""

import datetime
import math
from dataclasses import dataclass
from typing import Literal

from services.common.documents.charter import LoadedCharter
from services.common.documents.policy import AllowedStudy, LoadedPolicy
from services.common.documents.study import LoadedStudy
from services.common.errors import Reason, ServiceError


@dataclass(frozen=True)
class Projection:
    """What the ledger says about one more round: ε derived from events, never stored.

    Of the study at its own δ; of the data set at δ_total, by the `dataset_rule` that gives less, with
    `dataset_sum_delta` the δ of all its studies together. All ε are 0 under `none`, which this account does not cover.
    `repeated`: under `none`, a vector for this very model file has been submitted in another round.
    """

    round: int
    study_spent: float
    study_after: float
    dataset_spent: float
    dataset_after: float
    dataset_rule: Literal["sum", "filter"]
    dataset_sum_delta: float
    rounds_left: int
    repeated: bool


def check_hospital(policy: LoadedPolicy, hospital: str) -> None:
    """The policy is this hospital's own, else INVALID_DOCUMENT."""
    if policy.document.hospital != hospital:
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            f"the policy is {policy.document.hospital}'s, this hospital is {hospital}: give it its own policy file",
        )


def decide_study(policy: LoadedPolicy, study_digest: bytes) -> ServiceError | None:
    """Deny by default: is the study listed at all? Asked before its bytes are fetched."""
    if policy.allowed(study_digest) is None:
        return _refuse(
            f"study {study_digest.hex()[:12]}… is not listed: nothing outside `studies` is allowed; read the study, "
            "then add its sha256"
        )
    return None


def decide(
    policy: LoadedPolicy, charter: LoadedCharter, study: LoadedStudy, projection: Projection, today: datetime.date
) -> ServiceError | None:
    """None when this hospital takes part in the projected round, else the refusal in one sentence.

    POLICY_REFUSES names what, the limit and the next step; BUDGET_EXHAUSTED (privacy.md L-2) says what is left
    and how many rounds that buys. P-12: k and n_min are the strictest of policy, study and charter.
    """
    allowed = policy.allowed(study.digest)
    if allowed is None:
        return decide_study(policy, study.digest)
    return (
        _decide_dates(allowed, study, today)
        or _decide_mechanism(allowed, study, projection)
        or _decide_cohort(allowed, charter, study)
        or _decide_caps(allowed, study, projection)
        or _decide_budget(policy, allowed, study, projection)
    )


def _decide_dates(allowed: AllowedStudy, study: LoadedStudy, today: datetime.date) -> ServiceError | None:
    name = study.document.name
    if today > allowed.until:
        return _refuse(f"study {name} is allowed until {allowed.until}, today is {today}: extend `until`")
    if today > study.document.expires:
        return _refuse(f"study {name} expired on {study.document.expires}, today is {today}: a new study is needed")
    return None


def _decide_mechanism(allowed: AllowedStudy, study: LoadedStudy, projection: Projection) -> ServiceError | None:
    name, mechanism = study.document.name, study.document.privacy.mechanism
    if mechanism not in allowed.mechanisms:
        listed = ", ".join(allowed.mechanisms) or "none at all"
        return _refuse(f"study {name} uses mechanism {mechanism}, allowed are {listed}: add it to `mechanisms`")
    if mechanism != "none":
        return None
    if allowed.no_privacy != "accepted":
        return _refuse(f"study {name} protects no single patient (mechanism none): say `no_privacy: accepted` to allow")
    if projection.repeated and allowed.repeat != "allowed":
        return _refuse(
            f"a vector for the model of round {projection.round} of study {name} was already submitted, and mechanism "
            "none has no fresh noise (P-10): say `repeat: allowed` to allow a second one"
        )
    return None


def _decide_cohort(allowed: AllowedStudy, charter: LoadedCharter, study: LoadedStudy) -> ServiceError | None:
    name, cohort = study.document.name, study.document.cohort
    if cohort.minimum < allowed.minimum_cohort:
        return _refuse(
            f"study {name} opens sums of {cohort.minimum} hospitals, at least {allowed.minimum_cohort} are demanded: "
            "lower `minimum_cohort` or change the study"
        )
    colluding = min(cohort.colluding_hospitals, charter.document.cohort.colluding_hospitals)
    if colluding < allowed.colluding_hospitals:
        return _refuse(
            f"study {name} bears {colluding} colluding hospitals, at least {allowed.colluding_hospitals} are demanded: "
            "lower `colluding_hospitals` or change the study"
        )
    if cohort.minimum < allowed.colluding_hospitals + 2:
        return _refuse(
            f"study {name} has a minimum cohort of {cohort.minimum}, {allowed.colluding_hospitals + 2} are needed "
            f"against {allowed.colluding_hospitals} colluding hospitals (P-12): change the study"
        )
    return None


def _decide_caps(allowed: AllowedStudy, study: LoadedStudy, projection: Projection) -> ServiceError | None:
    name, privacy = study.document.name, study.document.privacy
    # The final evaluation is one round after the last training round and is part of the same consent.
    last = allowed.rounds + (1 if study.document.evaluation.final and study.document.rounds <= allowed.rounds else 0)
    if projection.round > last:
        return _refuse(
            f"round {projection.round} of study {name} is beyond the {allowed.rounds} rounds: raise `rounds`"
        )
    if privacy.mechanism == "none":
        return None
    if privacy.delta is None or privacy.epsilon is None:
        return _refuse(
            f"study {name} claims no ε or no δ under mechanism {privacy.mechanism}: the study must name both"
        )
    if privacy.delta > allowed.delta:
        return _refuse(f"study {name} has δ = {privacy.delta:g}, at most {allowed.delta:g}: raise `delta`")
    if privacy.epsilon > allowed.epsilon:
        return _refuse(f"study {name} claims ε = {privacy.epsilon:g}, at most {allowed.epsilon:g}: raise `epsilon`")
    return None


def _decide_budget(
    policy: LoadedPolicy, allowed: AllowedStudy, study: LoadedStudy, projection: Projection
) -> ServiceError | None:
    if study.document.privacy.mechanism == "none":
        return None
    document, buys = policy.document, _buys(projection.rounds_left)
    if projection.study_after > allowed.epsilon:
        left = max(0.0, allowed.epsilon - projection.study_spent)
        return ServiceError(
            Reason.BUDGET_EXHAUSTED,
            f"round {projection.round} of study {study.document.name} would bring its ε to "
            f"{projection.study_after:.3f}, the cap is {allowed.epsilon:g}: {left:.3f} is left, which buys {buys}; "
            "raise the study's `epsilon` to go on",
        )
    if projection.dataset_after > document.dataset_epsilon:
        left = max(0.0, document.dataset_epsilon - projection.dataset_spent)
        return ServiceError(
            Reason.BUDGET_EXHAUSTED,
            f"round {projection.round} of study {study.document.name} would bring the ε of data set {document.dataset} "
            f"over all studies to {_shown(projection.dataset_after)} by {_rule(policy, projection)}, the cap is "
            f"{document.dataset_epsilon:g}: {left:.3f} is left, which buys {buys}; {_advice(policy, projection)}",
        )
    return None


def _rule(policy: LoadedPolicy, projection: Projection) -> str:
    if projection.dataset_rule == "sum":
        return "the sum of its studies"
    return f"the Rényi filter at δ = {policy.document.dataset_delta / 2:g}"


def _advice(policy: LoadedPolicy, projection: Projection) -> str:
    """Half of δ_total is the sum's: studies that together claim more δ can only be bounded by the filter."""
    total, needed = policy.document.dataset_delta, 2 * projection.dataset_sum_delta
    if needed > total:
        return (
            f"the studies' δ are {needed / 2:g} together, more than half of `dataset_delta` {total:g}, so that their "
            f"sum does not count: raise `dataset_delta` to {needed:g}, or `dataset_epsilon`"
        )
    return "raise `dataset_epsilon`"


def _shown(epsilon: float) -> str:
    return f"{epsilon:.3f}" if math.isfinite(epsilon) else "no finite figure"


def _buys(rounds: int) -> str:
    return "1 more training round" if rounds == 1 else f"{rounds or 'no'} more training rounds"


def _refuse(sentence: str) -> ServiceError:
    return ServiceError(Reason.POLICY_REFUSES, f"the policy refuses: {sentence}")
