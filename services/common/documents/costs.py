"""What a study costs in privacy: integer noise, events by split, ε of the whole (privacy.md §1, §2, §4, §6).

Rules under `local`:
- A patient is in exactly one split for the data set's life, and adjacency is add/remove: so it pays only for
  the events of its own split. ε of the study = the largest over the splits, never their sum.
- Training: every round is `steps_per_round` noisy steps at (q, z). Each gate is one q = 1 event of the validation
  split (a patient adds 1 to hits and to totals: 2 votes). The final evaluation is one q = 1 event of the test
  split (the confusion matrix and one histogram a class: 1 + classes votes).
- z comes from the integer scale that is really drawn, so it is never below the σ of the file.
- The claim covers `spare_rounds` more training rounds than planned: a vector that is lost or redone under an
  amended charter is a new draw and a new debit (L-1). Evaluations belong to their round and have no spare.
Not here: what was spent (the hospital's ledger), lanes (shape.py).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from services.common.documents.strict import refuse
from services.common.documents.study import Study
from services.common.dp.accounting import Event, epsilon
from services.common.dp.noise import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    effective_multiplier,
    sensitivity_rint,
    share_scale,
    vote_scale_bits,
    vote_sensitivity,
)

Split = Literal["train", "validation", "test"]

LARGEST_FRACTION_BITS = 40  # a vote class scaled further has no room left in any ring


@dataclass(frozen=True)
class Noise:
    """One hospital's integer noise: values travel as v · 2**fraction_bits, noise of `scale` S, z = `multiplier`."""

    fraction_bits: int
    sensitivity: float
    scale: int
    multiplier: float


@dataclass(frozen=True)
class SplitEvent:
    """One release of one split of the data set."""

    split: Split
    event: Event


def training_noise(study: Study) -> Noise:
    """The noise of one local step under `local`. Raises INVALID_DOCUMENT for a scale that cannot be drawn."""
    privacy, parameters = study.privacy, study.model.parameters
    sensitivity = sensitivity_rint(privacy.scale_bits, privacy.clip, parameters)
    scale = share_scale(privacy.noise_multiplier, sensitivity, 1, 0)
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise refuse(
            study.name,
            f"privacy.noise_multiplier {privacy.noise_multiplier:g} with scale_bits {privacy.scale_bits} and clip "
            f"{privacy.clip:g} is integer noise of scale {scale}, {SMALLEST_SCALE} to 2^40 can be drawn: change one",
        )
    return Noise(privacy.scale_bits, sensitivity, scale, effective_multiplier((scale,), sensitivity))


def gate_noise(study: Study) -> Noise:
    """The noise on (hits, totals): two votes a patient."""
    return _vote_noise(study.evaluation.gate_noise_multiplier, 2, study.name, "gate_noise_multiplier")


def final_noise(study: Study) -> Noise:
    """The noise on the confusion matrix and the histograms: 1 + classes votes a patient."""
    votes = 1 + len(study.model.classes)
    return _vote_noise(study.evaluation.final_noise_multiplier, votes, study.name, "final_noise_multiplier")


def training_event(study: Study, rounds: int = 1) -> Event:
    """`rounds` rounds of training as one event."""
    privacy = study.privacy
    return Event(privacy.sampling_rate, training_noise(study).multiplier, rounds * privacy.steps_per_round)


def round_events(study: Study, number: int) -> tuple[SplitEvent, ...]:
    """What round `number` releases, by split; nothing is accounted under `none`."""
    if study.privacy.mechanism == "none":
        return ()
    if number > study.rounds:
        return (SplitEvent("test", Event(1.0, final_noise(study).multiplier)),)
    found = [SplitEvent("train", training_event(study))]
    if number in study.evaluation.gate_rounds:
        found.append(SplitEvent("validation", Event(1.0, gate_noise(study).multiplier)))
    return tuple(found)


def spare_rounds(rounds: int) -> int:
    """A tenth of the training rounds, rounded up (L-1)."""
    return math.ceil(rounds / 10)


def study_events(study: Study, spare: bool = True) -> dict[Split, tuple[Event, ...]]:
    """Everything that the whole study may release, by split; `spare` counts the spare rounds. Empty under `none`."""
    if study.privacy.mechanism == "none":
        return {}
    rounds = study.rounds + (spare_rounds(study.rounds) if spare else 0)
    found: dict[Split, tuple[Event, ...]] = {"train": (training_event(study, rounds),)}
    gates = len(study.evaluation.gate_rounds)
    if gates:
        found["validation"] = (Event(1.0, gate_noise(study).multiplier, gates),)
    if study.evaluation.final:
        found["test"] = (Event(1.0, final_noise(study).multiplier),)
    return found


def study_epsilon(study: Study, spare: bool = True) -> dict[Split, float]:
    """ε of each split at the study's δ; the study's ε is the largest. Empty under `none`."""
    delta = study.privacy.delta
    if delta is None:
        return {}
    return {split: epsilon_of(events, delta) for split, events in study_events(study, spare).items()}


def epsilon_of(events: Iterable[Event], delta: float) -> float:
    """ε of `events` composed, remembered: the same study is held against its claim at every poll of a hospital."""
    return _epsilon(tuple(events), delta)


@lru_cache(maxsize=256)
def _epsilon(events: tuple[Event, ...], delta: float) -> float:
    return epsilon(events, delta)


def _vote_noise(multiplier: float, votes: int, name: str, key: str) -> Noise:
    smallest = SMALLEST_SCALE / math.ldexp(math.sqrt(votes), LARGEST_FRACTION_BITS)
    if multiplier <= smallest:
        raise refuse(
            name, f"evaluation.{key} is {multiplier:g}, so the counts would travel without noise: calibrate it"
        )
    bits = vote_scale_bits(multiplier, votes, 1, 0)
    sensitivity = vote_sensitivity(votes, bits)
    scale = share_scale(multiplier, sensitivity, 1, 0)
    return Noise(bits, sensitivity, scale, effective_multiplier((scale,), sensitivity))
