"""P-21: what a round looks like is a function of charter + study; every role computes it for itself.

Classes of lanes, in order:
  sentinel 4 | weight 1 (uniform: always 1) | gate 2·classes, hits then totals (gate rounds) |
  confusion classes², row = truth, and histogram classes·2·bins, [class][0 negatives, 1 positives][bin] (final
  round) | parameter d (training rounds) | control d (training rounds under scaffold).
Rounds 1 … `rounds` train; with `evaluation.final` round `rounds` + 1 evaluates and carries no parameters. A gate
in round r judges the model that r starts from. `check_study` refuses what makes no sense before anything runs.
Not here: the noise and ε of it (costs.py), what a mechanism asks for (mechanism.py), encoding (secagg.encoding).
"""

import math
from dataclasses import dataclass
from typing import Literal

from services.common.documents.charter import LoadedCharter
from services.common.documents.costs import (
    Noise,
    SplitEvent,
    final_noise,
    gate_noise,
    round_events,
    training_noise,
)
from services.common.documents.mechanism import check_claim, check_mechanism
from services.common.documents.strategies import has_control
from services.common.documents.strict import refuse
from services.common.documents.study import LoadedStudy, Study
from services.common.errors import Reason, ServiceError
from services.common.secagg.encoding import SENTINEL, LaneTable
from services.common.secagg.messages import Core, LaneClass

_COUNT_BITS = 20  # without noise a count up to a million travels, over several limbs where the ring is narrow
_SMALLEST_SPLIT = 1000  # a lane table that overflows below so many patients is refused


@dataclass(frozen=True)
class RoundShape:
    """One round: its lanes and what it costs a hospital. `has_gate`: it judges the model that it starts from."""

    number: int
    kind: Literal["train", "final"]
    table: LaneTable
    parameters: int
    minimum_cohort: int
    has_gate: bool
    events: tuple[SplitEvent, ...]


def total_rounds(study: LoadedStudy) -> int:
    """Training rounds, and one more for the final evaluation."""
    return study.document.rounds + int(study.document.evaluation.final)


def round_shape(charter: LoadedCharter, study: LoadedStudy, number: int) -> RoundShape:
    """The shape of round `number` (from 1). Raises WRONG_PHASE beyond the study, INVALID_DOCUMENT."""
    document, last = study.document, total_rounds(study)
    if not 1 <= number <= last:
        raise ServiceError(
            Reason.WRONG_PHASE, f"study {document.name} has rounds 1 to {last}, not {number}: a new study is needed"
        )
    train = number <= document.rounds
    has_gate = train and number in document.evaluation.gate_rounds
    lanes = [SENTINEL, LaneClass("weight", 1, 0, 1, 1)]
    if has_gate:
        lanes.append(_counts(charter, document, "gate", 2 * len(document.model.classes)))
    if train:
        lanes.append(_parameters(charter, document))
        if has_control(document):
            lanes.append(_reals(charter, document, "control", "control_bound"))
    else:
        classes = len(document.model.classes)
        lanes.append(_counts(charter, document, "confusion", classes**2))
        lanes.append(_counts(charter, document, "histogram", classes * 2 * document.evaluation.histogram_bins))
    table = LaneTable(tuple(lanes), document.encoding.ring_bits)
    return RoundShape(
        number,
        "train" if train else "final",
        table,
        document.model.parameters,
        document.cohort.minimum,
        has_gate,
        round_events(document, number),
    )


def core_for(charter: LoadedCharter, study: LoadedStudy, number: int, previous_result: bytes, model: bytes) -> Core:
    """The core of round `number`; `previous_result` and `model` are digests of 32 bytes."""
    shape = round_shape(charter, study, number)
    return Core(
        charter=charter.digest,
        study=study.digest,
        round=number,
        previous_result=previous_result,
        model=model,
        parameters=shape.parameters,
        ring_bits=shape.table.ring_bits,
        lanes=shape.table.lanes,
        minimum_cohort=shape.minimum_cohort,
    )


def largest_split(charter: LoadedCharter, study: LoadedStudy) -> int | None:
    """Patients of a validation or test split that surely fit the lanes of counts; None without evaluations."""
    document, found = study.document, []
    if document.evaluation.gate_rounds:
        found.append(_room(charter, document, "gate"))
    if document.evaluation.final:
        found.append(_room(charter, document, "confusion"))
    return min(found, default=None)


def largest_batch(charter: LoadedCharter, study: LoadedStudy) -> int | None:
    """Patients of one hospital in one step that surely never meet the data bound (privacy.md §3); only under `shared`.

    More are as private: the sum is projected onto the bound before it is rounded, at some cost in use.
    """
    document = study.document
    if document.privacy.mechanism != "shared":
        return None
    room = training_noise(document).room(_lane_bound(charter, document))
    return math.floor(room / math.ldexp(document.privacy.clip, document.privacy.scale_bits))


def check_study(charter: LoadedCharter, study: LoadedStudy) -> None:
    """Refuse a study that this charter forbids or that makes no sense: INVALID_DOCUMENT, one sentence."""
    document = study.document
    check_mechanism(charter, document)
    _check_cohort(charter, document)
    _check_limits(charter, document)
    _check_timing(charter, document)
    _check_lanes(charter, study)
    check_claim(document)


def _check_cohort(charter: LoadedCharter, study: Study) -> None:
    cohort, ours = study.cohort, charter.document.cohort
    if cohort.minimum < ours.minimum:
        raise refuse(
            study.name, f"cohort.minimum is {cohort.minimum}, the charter's is {ours.minimum} (P-12): raise it"
        )
    if cohort.colluding_hospitals < ours.colluding_hospitals:
        raise refuse(
            study.name,
            f"cohort.colluding_hospitals is {cohort.colluding_hospitals}, the charter's is {ours.colluding_hospitals} "
            "(P-12): raise it",
        )
    if cohort.minimum < cohort.colluding_hospitals + 2:
        raise refuse(
            study.name,
            f"cohort.minimum is {cohort.minimum}, but must be at least colluding_hospitals + 2 = "
            f"{cohort.colluding_hospitals + 2} (P-12): raise it",
        )
    organisations = len({member.organisation for member in charter.roster.hospitals.values()})
    if cohort.minimum > min(organisations, ours.maximum):
        raise refuse(
            study.name,
            f"cohort.minimum is {cohort.minimum}, the charter's hospitals belong to {organisations} organisations and "
            f"at most {ours.maximum} take part: no round could ever end, lower it",
        )


def _check_limits(charter: LoadedCharter, study: Study) -> None:
    limits = charter.document.limits
    last = study.rounds + int(study.evaluation.final)
    if last > limits.rounds:
        raise refuse(
            study.name, f"has {last} rounds with the final one, the charter allows {limits.rounds}: lower `rounds`"
        )
    if study.model.parameters > limits.parameters:
        raise refuse(
            study.name,
            f"model.parameters is {study.model.parameters}, the charter allows {limits.parameters}: a smaller model",
        )
    if study.encoding.ring_bits not in limits.ring_bits:
        raise refuse(
            study.name,
            f"encoding.ring_bits is {study.encoding.ring_bits}, the charter allows "
            f"{', '.join(map(str, limits.ring_bits))}: choose one of these",
        )
    outside = [number for number in study.evaluation.gate_rounds if not 1 <= number <= study.rounds]
    if outside:
        raise refuse(
            study.name,
            f"evaluation.gate_rounds holds {outside[0]}, the training rounds are 1 to {study.rounds}: mend it",
        )


def _check_timing(charter: LoadedCharter, study: Study) -> None:
    timing, hours = study.timing, charter.document.limits.round_key_hours
    if timing.attempt_seconds > hours * 3600:
        raise refuse(
            study.name,
            f"timing.attempt_seconds is {timing.attempt_seconds:g}, round keys live at most {hours:g} hours under this "
            "charter: lower it",
        )
    if timing.attempt_seconds <= timing.submit_seconds:
        raise refuse(
            study.name,
            f"timing.attempt_seconds ({timing.attempt_seconds:g}) must be more than submit_seconds "
            f"({timing.submit_seconds:g}): the pods need time between the deadline and their keys' end",
        )


def _check_lanes(charter: LoadedCharter, study: LoadedStudy) -> None:
    document, evaluation = study.document, study.document.evaluation
    rounds = {1, *evaluation.gate_rounds[:1], *([document.rounds + 1] if evaluation.final else [])}
    for number in sorted(rounds):
        try:
            round_shape(charter, study, number).table.check(charter.document.cohort.maximum)
        except ServiceError as error:
            if error.reason is Reason.INVALID_DOCUMENT:
                raise
            raise refuse(document.name, error.detail) from None
    batch = largest_batch(charter, study)
    if batch is not None and batch < 1:
        raise refuse(
            document.name,
            f"privacy.scale_bits {document.privacy.scale_bits} leaves no room for one patient's gradient beside the "
            f"noise in {document.encoding.ring_bits} bits with {charter.document.cohort.maximum} hospitals: lower it",
        )
    room = largest_split(charter, study)
    if room is not None and room < _SMALLEST_SPLIT:
        raise refuse(
            document.name,
            f"the lanes of counts would overflow at {max(room, 0)} patients of a split with "
            f"{document.encoding.ring_bits} bits and {charter.document.cohort.maximum} hospitals: raise the noise "
            "multiplier of the evaluation, or lower the charter's cohort.maximum",
        )


def _parameters(charter: LoadedCharter, study: Study) -> LaneClass:
    """As many fraction bits as the ring bears: n_max · ⌈bound · 2^f⌉ ≤ 2^(b−1) − 1; under `shared` the study's s."""
    if study.privacy.mechanism == "shared":
        return LaneClass("parameter", study.model.parameters, study.privacy.scale_bits, _lane_bound(charter, study), 1)
    return _reals(charter, study, "parameter", "update_bound")


def _reals(charter: LoadedCharter, study: Study, name: str, key: str) -> LaneClass:
    """d numbers that are clipped to ±`encoding.key` before they are rounded."""
    room, bound = _lane_bound(charter, study), float(getattr(study.encoding, key))
    bits = min(63, math.floor(math.log2(room / bound)) + 1)
    while bits >= 0 and math.ceil(math.ldexp(bound, bits)) > room:
        bits -= 1
    if bits < 0:
        raise refuse(
            study.name,
            f"encoding.{key} {bound:g} does not fit {study.encoding.ring_bits} bits with "
            f"{charter.document.cohort.maximum} hospitals: at most {room} does",
        )
    return LaneClass(name, study.model.parameters, bits, math.ceil(math.ldexp(bound, bits)), 1)


def _counts(charter: LoadedCharter, study: Study, name: str, values: int) -> LaneClass:
    """Counts of patients: noised at a power-of-two scale under DP, exact over enough limbs without."""
    bound = _lane_bound(charter, study)
    if study.privacy.mechanism != "none":
        return LaneClass(name, values, _count_noise(study, name).fraction_bits, bound, 1)
    width = bound.bit_length() - 1
    limbs = 1 if width >= _COUNT_BITS else math.ceil(_COUNT_BITS / max(1, width))
    if limbs > 8:
        raise refuse(
            study.name,
            f"counts do not fit {study.encoding.ring_bits} bits with {charter.document.cohort.maximum} hospitals: a "
            "wider ring, or a lower cohort.maximum in the charter",
        )
    return LaneClass(name, values, 0, bound, limbs)


def _room(charter: LoadedCharter, study: Study, name: str) -> int:
    """Patients that one hospital can count in one lane of the class: (B − 12·S) / 2^f, or what the limbs hold."""
    lane = _counts(charter, study, name, 1)
    if study.privacy.mechanism == "none":
        return int(lane.bound << (lane.bound.bit_length() - 1) * (lane.limbs - 1))
    return _count_noise(study, name).room(lane.bound) >> lane.fraction_bits


def _count_noise(study: Study, name: str) -> Noise:
    return gate_noise(study) if name == "gate" else final_noise(study)


def _lane_bound(charter: LoadedCharter, study: Study) -> int:
    """The largest B of one lane: n_max · B ≤ 2^(b−1) − 1."""
    return int((2 ** (study.encoding.ring_bits - 1) - 1) // charter.document.cohort.maximum)
