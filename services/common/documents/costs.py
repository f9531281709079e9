"""What a study costs in privacy: integer noise, events by split, ε of the whole (privacy.md §1, §2, §4, §6).

Rules:
- A patient is in exactly one split for the data set's life, and adjacency is add/remove: so it pays only for
  the events of its own split. ε of the study = the largest over the splits, never their sum.
- Training: every round is `steps_per_round` noisy steps at (q, z). Each gate is one q = 1 event of the validation
  split (a patient adds 1 to hits and to totals: 2 votes). The final evaluation is one q = 1 event of the test
  split (the confusion matrix and one histogram a class: 1 + classes votes).
- z comes from the integer scale that is really drawn, so it is never below the σ of the file.
- `local`: one hospital's noise is the whole of it. `shared`: z is that of n_min − k shares together, and beside every ε
  stands ε_solo: what one hospital's own share gives its patients when all the others collude, cheat or fail.
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
NOISE_ROOM = 12  # deviations of one hospital's noise that a lane's bound leaves beside the data (privacy.md §3)


@dataclass(frozen=True)
class Noise:
    """One hospital's integer noise: values travel as v · 2**fraction_bits, its noise is of `scale` S_h.

    `multiplier`: z of all the noise that the claim counts on; `solo`: z of this hospital's share alone (the same under
    `local`).
    """

    fraction_bits: int
    sensitivity: float
    scale: int
    multiplier: float
    solo: float

    def room(self, bound: int) -> int:
        """The data bound: what a lane of `bound` leaves for data, in integer units; not positive = no room at all."""
        return bound - NOISE_ROOM * self.scale


@dataclass(frozen=True)
class SplitEvent:
    """One release of one split of the data set; `solo` is the same with this hospital's own noise alone."""

    split: Split
    event: Event
    solo: Event


def noisy_hospitals(study: Study) -> tuple[int, int]:
    """(n_min, k) of the share scale S_h: the study's cohort under `shared`, one honest hospital under `local`."""
    cohort = study.cohort
    return (cohort.minimum, cohort.colluding_hospitals) if study.privacy.mechanism == "shared" else (1, 0)


def training_noise(study: Study) -> Noise:
    """The noise of one step, one hospital's part. Raises INVALID_DOCUMENT for a scale that cannot be drawn."""
    privacy, parameters = study.privacy, study.model.parameters
    sensitivity = sensitivity_rint(privacy.scale_bits, privacy.clip, parameters)
    scale = share_scale(privacy.noise_multiplier, sensitivity, *noisy_hospitals(study))
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise refuse(
            study.name,
            f"privacy.noise_multiplier {privacy.noise_multiplier:g} with scale_bits {privacy.scale_bits} and clip "
            f"{privacy.clip:g} is integer noise of scale {scale}, {SMALLEST_SCALE} to 2^40 can be drawn: change one",
        )
    return _noise(study, privacy.scale_bits, sensitivity, scale)


def gate_noise(study: Study) -> Noise:
    """The noise on (hits, totals): two votes a patient."""
    return _vote_noise(study, study.evaluation.gate_noise_multiplier, 2, "gate_noise_multiplier")


def final_noise(study: Study) -> Noise:
    """The noise on the confusion matrix and the histograms: 1 + classes votes a patient."""
    votes = 1 + len(study.model.classes)
    return _vote_noise(study, study.evaluation.final_noise_multiplier, votes, "final_noise_multiplier")


def round_events(study: Study, number: int) -> tuple[SplitEvent, ...]:
    """What round `number` releases, by split; nothing is accounted under `none`."""
    if study.privacy.mechanism == "none":
        return ()
    if number > study.rounds:
        return (_evaluation("test", final_noise(study)),)
    found = [_training(study, 1)]
    if number in study.evaluation.gate_rounds:
        found.append(_evaluation("validation", gate_noise(study)))
    return tuple(found)


def spare_rounds(rounds: int) -> int:
    """A tenth of the training rounds, rounded up (L-1)."""
    return math.ceil(rounds / 10)


def study_events(study: Study, spare: bool = True) -> tuple[SplitEvent, ...]:
    """Everything that the whole study may release; `spare` counts the spare rounds. Empty under `none`."""
    if study.privacy.mechanism == "none":
        return ()
    found = [_training(study, study.rounds + (spare_rounds(study.rounds) if spare else 0))]
    gates = len(study.evaluation.gate_rounds)
    if gates:
        found.append(_evaluation("validation", gate_noise(study), gates))
    if study.evaluation.final:
        found.append(_evaluation("test", final_noise(study)))
    return tuple(found)


def study_epsilon(study: Study, spare: bool = True, solo: bool = False) -> dict[Split, float]:
    """ε (or ε_solo) of each split at the study's δ; the study's is the largest. Empty under `none`."""
    delta = study.privacy.delta
    if delta is None:
        return {}
    return {
        found.split: epsilon_of((found.solo if solo else found.event,), delta) for found in study_events(study, spare)
    }


def split_figures(study: Study) -> dict[Split, dict[str, float]]:
    """ε of each split at the study's δ: of one round, as planned, with spare rounds, and ε_solo. Empty under `none`."""
    delta = study.privacy.delta
    if delta is None:
        return {}
    covered = study_epsilon(study)
    planned, solo = study_epsilon(study, spare=False), study_epsilon(study, solo=True)
    kinds = (1, *study.evaluation.gate_rounds[:1], *([study.rounds + 1] if study.evaluation.final else []))
    once = {event.split: epsilon_of((event.event,), delta) for number in kinds for event in round_events(study, number)}
    return {
        split: {
            "one_round": once[split],
            "planned": planned[split],
            "with_spare_rounds": covered[split],
            "solo": solo[split],
        }
        for split in covered
    }


def epsilon_of(events: Iterable[Event], delta: float) -> float:
    """ε of `events` composed, remembered: the same study is held against its claim at every poll of a hospital."""
    return _epsilon(tuple(events), delta)


@lru_cache(maxsize=256)
def _epsilon(events: tuple[Event, ...], delta: float) -> float:
    return epsilon(events, delta)


def _training(study: Study, rounds: int) -> SplitEvent:
    noise, rate, steps = training_noise(study), study.privacy.sampling_rate, rounds * study.privacy.steps_per_round
    return SplitEvent("train", Event(rate, noise.multiplier, steps), Event(rate, noise.solo, steps))


def _evaluation(split: Split, noise: Noise, times: int = 1) -> SplitEvent:
    return SplitEvent(split, Event(1.0, noise.multiplier, times), Event(1.0, noise.solo, times))


def _noise(study: Study, bits: int, sensitivity: float, scale: int) -> Noise:
    minimum, colluding = noisy_hospitals(study)
    together = effective_multiplier((scale,) * (minimum - colluding), sensitivity)
    return Noise(bits, sensitivity, scale, together, effective_multiplier((scale,), sensitivity))


def _vote_noise(study: Study, multiplier: float, votes: int, key: str) -> Noise:
    smallest = SMALLEST_SCALE / math.ldexp(math.sqrt(votes), LARGEST_FRACTION_BITS)
    if multiplier <= smallest:
        raise refuse(
            study.name, f"evaluation.{key} is {multiplier:g}, so the counts would travel without noise: calibrate it"
        )
    bits = vote_scale_bits(multiplier, votes, *noisy_hospitals(study))
    sensitivity = vote_sensitivity(votes, bits)
    return _noise(study, bits, sensitivity, share_scale(multiplier, sensitivity, *noisy_hospitals(study)))
