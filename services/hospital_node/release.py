"""What one round releases of the data set: its lanes, their noise, and the debits that pay for them.

Order (privacy.md §3): per-patient clip happens in training, under `local` the noise too; here update → clip → round.
Under `shared`: clipped sum → scale → projection onto the data bound → rint → discrete Gaussian share, and nothing is
clipped or checked after it. Exact counts → power-of-two scale → discrete Gaussian noise. Dangers: a count without
noise, or a debit that does not cover a lane, is a leak; so lanes and debits are made side by side from one lane table.
Not here: masking (submission.py), when a debit is due (participate.py), the table itself (documents.shape).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from services.common.documents.charter import LoadedCharter
from services.common.documents.costs import Noise, final_noise, gate_noise, spare_rounds, training_noise
from services.common.documents.policy import LoadedPolicy
from services.common.documents.shape import RoundShape, round_shape, total_rounds
from services.common.documents.study import LoadedStudy, Study
from services.common.dp.noise import discrete_gaussian, integer_sum
from services.common.errors import Reason, ServiceError
from services.common.secagg.digests import with_digest
from services.common.secagg.encoding import LaneTable, encode_vector
from services.common.secagg.messages import LaneClass
from services.common.secagg.rounding import Reals, clip_update
from services.hospital_node.events import Debit, Joined, Planned

I64 = npt.NDArray[np.int64]
Keys = Callable[[], bytes]
"""Gives 32 fresh bytes of the operating system's generator at every call (P-8)."""
_NO_NOISE = Noise(0, 0.0, 0, 0.0, 0.0)


class Counts(Protocol):
    """Exact counts of one evaluation, int64: hits (c), totals (c), confusion (c, c), histogram (c, 2, bins)."""

    @property
    def hits(self) -> I64:
        """Patients of each class that were recognised."""
        ...

    @property
    def totals(self) -> I64:
        """Patients of each class."""
        ...

    @property
    def confusion(self) -> I64:
        """Row = truth."""
        ...

    @property
    def histogram(self) -> I64:
        """Score histograms: [class][0 negatives, 1 positives][bin]."""
        ...


def split_of(name: str) -> str:
    """The split of the data set that a class of lanes is drawn from (privacy.md §6)."""
    return {"parameter": "train", "control": "train", "gate": "validation", "confusion": "test", "histogram": "test"}[
        name
    ]


def encode_round(
    study: Study, shape: RoundShape, update: object, counts: Counts | None, keys: Keys
) -> Iterator[tuple[bytes, bytes]]:
    """x, the packed vector of this round: its chunks, each with its digest.

    `update` is what `Trainer.train` gave in a training round: d floats, under scaffold (2, d). Raises NOT_FINITE for a
    failed training and
    OUT_OF_BOUND for a count beyond its lane: nothing is sent then. Under `shared` neither can happen: what is not
    finite counts as zero, what is beyond a lane's data bound is projected.
    """
    table, noises, shared = shape.table, lane_noises(study, shape), study.privacy.mechanism == "shared"
    names = {lane.name for lane in table.lanes}
    values: dict[str, I64 | Reals] = {"weight": np.ones(1, np.int64)}
    if "parameter" in names:
        given = np.asarray(update)
        if "control" in names:
            given, change = given
            values["control"] = _reals(study, table, "control", change, keys)
        values["parameter"] = (
            _gradient_lanes(study, table, given, keys) if shared else _reals(study, table, "parameter", given, keys)
        )
    if "gate" in names:
        exact = np.concatenate([_need(counts).hits, _need(counts).totals])
        values["gate"] = _count_lanes(table.lane_class("gate"), exact, noises.get("gate"), keys, project=shared)
    for name in ("confusion", "histogram"):
        if name in names:
            exact = np.ravel(getattr(_need(counts), name))
            values[name] = _count_lanes(table.lane_class(name), exact, noises.get(name), keys, project=shared)
    # Noise is within the bounds of the table (data bound + 12 S): under `local` a value beyond them is a bug, never
    # wrapped; under `shared` nothing is looked at after the noise.
    return encode_vector(table, values, with_digest, noised=shared)


def round_debits(
    loaded: LoadedStudy,
    shape: RoundShape,
    model: bytes,
    vector: str,
    *,
    attempt: int = 0,
    manifest: bytes = b"",
) -> tuple[Debit, ...]:
    """What releasing this round's lanes costs: one debit a split that is touched, under `none` too (with no noise).

    `attempt` 0 and an empty manifest stand for "not yet known" in a projection (L-2).
    """
    study, names = loaded.document, {lane.name for lane in shape.table.lanes}
    privacy, noises = study.privacy, lane_noises(study, shape)

    def debit(name: str, rate: float, steps: int) -> Debit:
        noise = noises.get(name, _NO_NOISE)
        return Debit(
            mechanism=privacy.mechanism,
            split=split_of(name),
            sampling_rate=rate,
            noise_multiplier=noise.multiplier,
            steps=steps,
            sensitivity=noise.sensitivity,
            scale=noise.scale,
            minimum_cohort=study.cohort.minimum,
            colluding_hospitals=study.cohort.colluding_hospitals,
            delta=privacy.delta or 0.0,
            study=loaded.digest.hex(),
            round=shape.number,
            attempt=attempt,
            manifest=manifest.hex(),
            model=model.hex(),
            vector=vector,
        )

    found = []
    if "parameter" in names:
        found.append(debit("parameter", privacy.sampling_rate, privacy.steps_per_round))
    if "gate" in names:
        found.append(debit("gate", 1.0, 1))
    if "confusion" in names:
        found.append(debit("confusion", 1.0, 1))  # the histograms are part of the same vector and its Δ₂
    return tuple(found)


def whole_study(charter: LoadedCharter, loaded: LoadedStudy) -> tuple[Debit, ...]:
    """All that the study may release, spare rounds included: one debit a split, with all its steps."""
    study, gates = loaded.document, loaded.document.evaluation.gate_rounds
    times = {"train": study.rounds + spare_rounds(study.rounds), "validation": len(gates), "test": 1}
    shapes = [round_shape(charter, loaded, number) for number in sorted({1, *gates[:1], total_rounds(loaded)})]
    once = {debit.split: debit for shape in shapes for debit in round_debits(loaded, shape, b"", "")}
    return tuple(replace(debit, steps=debit.steps * times[split]) for split, debit in once.items())


def study_plan(charter: LoadedCharter, loaded: LoadedStudy, policy: LoadedPolicy) -> Joined:
    """What joining the study means: its plan, and the site's caps at this moment."""
    study, allowed = loaded.document, policy.allowed(loaded.digest)
    plan = [debit for debit in whole_study(charter, loaded) if debit.mechanism != "none"]
    return Joined(
        study=loaded.digest.hex(),
        name=study.name,
        delta=study.privacy.delta or 0.0,
        rounds=study.rounds,
        plan=tuple(
            Planned(d.split, d.sampling_rate, d.noise_multiplier, d.solo_event().noise_multiplier, d.steps)
            for d in plan
        ),
        study_epsilon=0.0 if allowed is None else allowed.epsilon,
        dataset=policy.document.dataset,
        dataset_epsilon=policy.document.dataset_epsilon,
        dataset_delta=policy.document.dataset_delta,
    )


def lane_noises(study: Study, shape: RoundShape) -> dict[str, Noise]:
    """The integer noise under each class of lanes that is drawn from the data; empty under `none`."""
    if study.privacy.mechanism == "none":
        return {}
    names = {lane.name for lane in shape.table.lanes}
    found = {}
    if "parameter" in names:
        found["parameter"] = training_noise(study)
    if "gate" in names:
        found["gate"] = gate_noise(study)
    if "confusion" in names:
        found["confusion"] = found["histogram"] = final_noise(study)
    return found


def _reals(study: Study, table: LaneTable, name: str, numbers: npt.NDArray[np.floating], keys: Keys) -> Reals:
    lane, encoding = _sized(table, name, numbers), study.encoding
    clips = {
        "parameter": (encoding.update_clip, encoding.update_bound),
        "control": (encoding.control_clip, encoding.control_bound),
    }
    # protocol.md §6: unbiased stochastic rounding for codes of at most 16 bits without DP noise, else to the nearest.
    stochastic = study.privacy.mechanism == "none" and lane.bound < 2**15
    return clip_update(numbers, *clips[name], keys() if stochastic else None)


def _gradient_lanes(study: Study, table: LaneTable, total: npt.NDArray[np.floating], keys: Keys) -> I64:
    """`shared`: scale → projection onto the data bound, the same at all hospitals → rint → this hospital's share."""
    lane, noise = _sized(table, "parameter", total), training_noise(study)
    exact = integer_sum(total.astype(np.float64, copy=False), lane.fraction_bits, noise.room(lane.bound))
    return exact + discrete_gaussian(noise.scale).draw(keys(), lane.values)


def _sized(table: LaneTable, name: str, update: npt.NDArray[np.floating]) -> LaneClass:
    lane = table.lane_class(name)
    if update.shape != (lane.values,):
        raise ServiceError(
            Reason.INVALID_DATA, f"the update has shape {update.shape}, the study says {lane.values} parameters"
        )
    return lane


def _count_lanes(lane: LaneClass, exact: I64, noise: Noise | None, keys: Keys, *, project: bool) -> I64:
    """Counts at the lane's power-of-two scale, with this hospital's noise, exact under `none`.

    `project`: onto what the lane's bound leaves beside the noise, coordinate by coordinate (Δ₂ unchanged).
    """
    scaled = exact.astype(np.int64) * np.int64(2**lane.fraction_bits)
    if noise is None:
        return scaled
    if project:
        room = noise.room(lane.bound)
        scaled = np.clip(scaled, -room, room)
    return scaled + discrete_gaussian(noise.scale).draw(keys(), len(scaled))


def _need(counts: Counts | None) -> Counts:
    if counts is None:
        raise ServiceError(Reason.INTERNAL, "this round carries metric lanes, and no evaluation was made")
    return counts
