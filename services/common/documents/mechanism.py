"""What each privacy mechanism asks of a study, and whether its claim is true (privacy.md §1 to §4, §6).

Refusals are for every role: a study that claims what its parameters do not give never runs anywhere.
Not here: cohort, limits and lanes (shape.py), the figures themselves (costs.py).
"""

import math
from dataclasses import replace

from services.common.documents.charter import LoadedCharter
from services.common.documents.costs import epsilon_of, spare_rounds, study_epsilon, study_events, training_noise
from services.common.documents.strategies import check_strategy
from services.common.documents.strict import refuse
from services.common.documents.study import Study
from services.common.dp.noise import effective_multiplier

_LEAST_LETTERS = 20  # that `none_accepted` needs
_DELTA_ROOM = 10  # δ ≤ 1/(10·N): to open one patient in N altogether costs δ = 1/N


def check_mechanism(charter: LoadedCharter, study: Study) -> None:
    """Refuse settings that the study's mechanism forbids or lacks: INVALID_DOCUMENT."""
    mechanism = study.privacy.mechanism
    if mechanism == "none":
        _check_none(study)
    else:
        _check_stated(charter, study)
        _check_noise(study)
    if mechanism == "shared":
        _check_shared(study)
    check_strategy(study)


def check_claim(study: Study) -> None:
    """Refuse a claim below what the parameters give, with the true figure: INVALID_DOCUMENT."""
    claimed, found = study.privacy.epsilon, study_epsilon(study)
    if claimed is None:
        return
    split, worst = max(found.items(), key=lambda item: item[1])
    if worst > claimed:
        raise refuse(
            study.name,
            f"privacy.epsilon claims {claimed:g}, but its parameters give {_shown(worst)} for a patient of the {split} "
            f"split at δ = {study.privacy.delta:g}, {spare_rounds(study.rounds)} spare rounds included: claim that, or "
            "raise the noise",
        )


def _check_none(study: Study) -> None:
    privacy, evaluation = study.privacy, study.evaluation
    if sum(letter.isalpha() for letter in privacy.none_accepted or "") < _LEAST_LETTERS:
        raise refuse(
            study.name,
            "privacy.mechanism none protects no single patient: say so in privacy.none_accepted, in a sentence of "
            f"at least {_LEAST_LETTERS} letters, or choose local or shared",
        )
    noises = (privacy.noise_multiplier, evaluation.gate_noise_multiplier, evaluation.final_noise_multiplier)
    if privacy.epsilon is not None or privacy.delta is not None or any(noises):
        raise refuse(
            study.name, "privacy.mechanism none adds no noise: remove epsilon, delta and all noise multipliers"
        )


def _check_stated(charter: LoadedCharter, study: Study) -> None:
    privacy, limits = study.privacy, charter.document.limits
    if privacy.none_accepted is not None:
        raise refuse(study.name, f"privacy.none_accepted is said, but the mechanism is {privacy.mechanism}: remove it")
    if privacy.epsilon is None or privacy.delta is None:
        raise refuse(study.name, "privacy.epsilon and privacy.delta must say what is claimed: add both")
    if privacy.epsilon > limits.epsilon or privacy.delta > limits.delta:
        raise refuse(
            study.name,
            f"claims (ε, δ) = ({privacy.epsilon:g}, {privacy.delta:g}), the charter allows ({limits.epsilon:g}, "
            f"{limits.delta:g}): lower the claim or amend the charter",
        )
    published = sum(privacy.patients.values())
    if published and privacy.delta * _DELTA_ROOM * published > 1:
        raise refuse(
            study.name,
            f"privacy.delta {privacy.delta:g} is above 1/({_DELTA_ROOM}·N) = {1 / (_DELTA_ROOM * published):.3g} for "
            f"the N = {published} published patients, so it would allow to open one of them: lower it",
        )


def _check_noise(study: Study) -> None:
    privacy, evaluation, mechanism = study.privacy, study.evaluation, study.privacy.mechanism
    if privacy.noise_multiplier <= 0:
        raise refuse(
            study.name, f"privacy.noise_multiplier must be above 0 under {mechanism}: `wardround study draft` finds it"
        )
    if evaluation.gate_rounds and evaluation.gate_noise_multiplier <= 0:
        raise refuse(
            study.name, f"evaluation.gate_noise_multiplier must be above 0 under {mechanism}: set it, or no gate_rounds"
        )
    if evaluation.final and evaluation.final_noise_multiplier <= 0:
        raise refuse(
            study.name, f"evaluation.final_noise_multiplier must be above 0 under {mechanism}: set it, or final: false"
        )
    if study.encoding.ring_bits != 32:
        raise refuse(
            study.name, f"encoding.ring_bits is {study.encoding.ring_bits}, noised lanes need 32: set it to 32"
        )
    room, wanted = math.ldexp(privacy.clip, privacy.scale_bits), 256 * math.sqrt(study.model.parameters)
    if room < wanted:
        bits = math.ceil(math.log2(wanted / privacy.clip))
        raise refuse(
            study.name,
            f"privacy.scale_bits {privacy.scale_bits} rounds {study.model.parameters} parameters too coarsely "
            f"(2^scale_bits · clip must be at least 256·√parameters): set it to {bits} or more, or raise the clip",
        )
    training_noise(study)
    if privacy.sampling_rate < 1 and study.timing.train_seconds == 0:
        raise refuse(
            study.name,
            "timing.train_seconds is 0 with sampling_rate below 1, so the moment at which a hospital is ready depends "
            "on whom it sampled: give a time after which every hospital is",
        )


def _check_shared(study: Study) -> None:
    """A round is ONE global step on a sum of clipped gradients; the proof covers no more (privacy.md §2)."""
    privacy, cohort = study.privacy, study.cohort
    if privacy.steps_per_round != 1:
        raise refuse(
            study.name,
            f"privacy.steps_per_round is {privacy.steps_per_round}, under shared a round is one global step, since a "
            "patient would move its hospital's later gradients: set it to 1",
        )
    if study.training.momentum or study.training.weight_decay:
        raise refuse(
            study.name,
            "training.momentum and training.weight_decay belong to a hospital's own steps, under shared the server "
            "takes the step: use server.momentum, and no weight decay",
        )
    if not privacy.patients:
        raise refuse(
            study.name,
            "privacy.patients must publish each hospital's rounded number of training patients under shared, which "
            "expected_batch and δ rest on: add it",
        )
    if cohort.colluding_hospitals == 0 and privacy.against == "hospitals":
        raise refuse(study.name, _one_curious(study))


def _one_curious(study: Study) -> str:
    """k = 0 counts every share: a fellow hospital knows its own, so against it the claim is not the study's."""
    noise, shares = training_noise(study), study.cohort.minimum - 1
    multiplier = effective_multiplier((noise.scale,) * shares, noise.sensitivity)
    event = replace(study_events(study)[0].event, noise_multiplier=multiplier)
    true = epsilon_of((event,), study.privacy.delta or 0.0)
    return (
        f"cohort.colluding_hospitals is 0, so privacy.epsilon {study.privacy.epsilon:g} does not hold against a "
        f"fellow hospital, which knows its own share of the noise: against one it is {_shown(true)} in training; set "
        "it to 1, or claim `against: public`, the aggregator and the public only"
    )


def _shown(value: float) -> str:
    """Rounded up: a figure that is shown is one that the accounting proves."""
    return f"{math.ceil(value * 1000) / 1000:.3f}" if math.isfinite(value) else "not bounded"
