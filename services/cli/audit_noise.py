"""Noise meter (privacy.md §8, 1): what a release holds beside its signal is the accounted law, and nothing twice.

On invented patients everything but noise and sampling is known, so the noise can be looked at by itself: its variance,
its tails, and whether two pieces of it that should have nothing in common do.
"""

import math
import os
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from services.cli.audit_finding import Finding, Reading, Say
from services.cli.audit_scratch import (
    FEATURES,
    Consortium,
    Hospital,
    Patients,
    make_consortium,
    open_sum,
    os_keys,
    random_patients,
    with_privacy,
)
from services.common.documents.costs import final_noise, gate_noise

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

LIMIT = 5.0
"""Standard errors: by chance one reading in 1.7 million is beyond it."""
_LAGS = 4
CANARY_LENGTH = 100.0
"""Of a canary's features: longer than any clip, and the bias then holds a ten-thousandth of its gradient."""


def measure_noise(seed: int, rounds: int, say: Say) -> Finding:
    """The whole meter: both mechanisms, every cohort size, and what it says of each planted fault."""
    generator = np.random.default_rng(seed)
    shared, local = make_consortium(), make_consortium(mechanism="local")
    sampling = make_consortium(noise_multiplier=0.5, sampling_rate=0.5)
    wards = [Hospital(shared, random_patients(generator, 20, 7)) for _ in shared.hospitals]
    finding = Finding(
        title="1. Noise meter",
        shows="Released integers minus the known signal are a discrete Gaussian of the accounted variance at every "
        "cohort size, independent over lanes, rounds, hospitals and restarts; samples are independent and of rate q.",
        shows_not="That the accountant's theorem holds, that a real site runs this very code, or what one patient adds "
        "(meter 2).",
    )
    say("noise of shared releases")
    finding.readings += shared_readings(wards, rounds)
    say("noise of the final evaluation and of local steps")
    finding.readings += final_readings(wards) + local_readings(
        Hospital(local, random_patients(generator, 20, 7)), rounds
    )
    say("samples")
    one_hot = Hospital(sampling, one_hot_patients(1000, 7))
    finding.readings += sampling_readings(one_hot)
    say("planted faults")
    fixed = os_keys()
    halved = with_privacy(shared, noise_multiplier=shared.document.privacy.noise_multiplier / 2)
    finding.judge("a share missing", shared_readings(wards, 1, last=lambda ward, total: ward.bare_vector(total)))
    finding.judge("noise halved", shared_readings(wards, 1, lambda ward, total: ward.vector(total, study=halved)))
    finding.judge("noise repeated", shared_readings(wards, 2, lambda ward, total: ward.vector(total, lambda: fixed)))
    finding.judge("a sample re-noised", sampling_readings(one_hot, renoised=True))
    return finding


def shared_readings(
    wards: Sequence[Hospital],
    rounds: int,
    every: Callable[[Hospital, F64], bytes] = lambda ward, total: ward.vector(total),
    last: Callable[[Hospital, F64], bytes] | None = None,
) -> list[Reading]:
    """Of training rounds under `shared`; `every` makes a hospital's vector, `last` that of the last one of a cohort."""
    consortium = wards[0].consortium
    shape, noise, gate = consortium.train, consortium.noise, gate_noise(consortium.document)
    totals = [ward.clipped_sum() for ward in wards]
    signals = [ward.integers(total) for ward, total in zip(wards, totals, strict=True)]
    alone: list[list[I64]] = []
    found: dict[str, float] = {}
    for number in range(rounds):
        vectors = [every(ward, total) for ward, total in zip(wards, totals, strict=True)]
        alone.append([open_sum(shape, [v])["parameter"] - s for v, s in zip(vectors, signals, strict=True)])
        for cohort in range(consortium.document.cohort.minimum, len(wards) + 1):
            members = list(vectors[:cohort])
            if last is not None:
                members[-1] = last(wards[cohort - 1], totals[cohort - 1])
            opened = open_sum(shape, members, masked=number == 0)
            rest = opened["parameter"] - np.sum(signals[:cohort], axis=0)
            _worst(found, f"cohort of {cohort}", rest, cohort * noise.scale**2)
            counted = sum(np.concatenate([c.hits, c.totals]) for c in (ward.counts for ward in wards[:cohort]))
            counts = opened["gate"] - (counted << gate.fraction_bits)
            _most(found, f"cohort of {cohort}, gate: variance", _variance_errors(counts, cohort * gate.scale**2))
    for lag in range(1, _LAGS + 1):
        _most(found, "lanes: correlation", max(_errors(r[:-lag], r[lag:]) for row in alone for r in row))
    for one, two in combinations(range(rounds), 2):
        pairs = zip(alone[one], alone[two], strict=True)
        _most(found, "rounds: correlation", max(_errors(a, b) for a, b in pairs))
    _most(found, "hospitals: correlation", max(_errors(a, b) for row in alone for a, b in combinations(row, 2)))
    restarted = after_restart(lambda: open_sum(shape, [every(wards[0], totals[0])])["parameter"] - signals[0])
    again = open_sum(shape, [every(wards[0], totals[0])])["parameter"] - signals[0]
    _most(found, "restarts: correlation", max(_errors(restarted, other) for other in (again, *(r[0] for r in alone))))
    return _as_readings(found)


def final_readings(wards: Sequence[Hospital]) -> list[Reading]:
    """Of a final evaluation: confusion matrix and score histograms of all hospitals together."""
    consortium = wards[0].consortium
    noise = final_noise(consortium.document)
    opened = open_sum(consortium.final, [ward.final_vector() for ward in wards], masked=True)
    found: dict[str, float] = {}
    for name in ("confusion", "histogram"):
        signal = sum(np.ravel(getattr(ward.counts, name)) for ward in wards)
        rest = opened[name] - (signal << noise.fraction_bits)
        _most(found, f"final evaluation, {name}: variance", _variance_errors(rest, len(wards) * noise.scale**2))
    return _as_readings(found)


def local_readings(ward: Hospital, rounds: int) -> list[Reading]:
    """Of single steps under `local`: one hospital's noise is the whole of it."""
    signal, found = ward.integers(ward.clipped_sum()), dict[str, float]()
    rests = [ward.local_step() - signal for _ in range(max(2, rounds))]
    for rest in rests:
        _worst(found, "local step", rest, ward.consortium.noise.scale**2)
    _most(found, "local steps: correlation", max(_errors(a, b) for a, b in combinations(rests, 2)))
    return _as_readings(found)


def one_hot_patients(count: int, classes: int) -> Patients:
    """Patient i has feature i and no other, so that its clipped gradient shares (nearly) no lane with another's."""
    features = np.zeros((count, FEATURES), np.float32)
    features[np.arange(count), np.arange(count)] = CANARY_LENGTH
    return Patients(features, np.arange(count) % classes)


def presence(consortium: Consortium, released: npt.NDArray[np.generic], labels: I64) -> F64:
    """For each patient of `one_hot_patients` how much of its gradient the release holds: 1 if it is in, and noise."""
    classes = len(consortium.document.model.classes)
    errors = np.full((len(labels), classes), 1 / classes)
    errors[np.arange(len(labels)), labels] -= 1.0
    directions = errors / np.linalg.norm(errors, axis=1, keepdims=True)
    weights = released.astype(np.float64)[classes:].reshape(classes, FEATURES)[:, : len(labels)]
    scores = np.einsum("pc,cp->p", directions, weights)
    return np.asarray(np.ldexp(scores, -consortium.document.privacy.scale_bits) / consortium.document.privacy.clip)


def sampling_readings(ward: Hospital, renoised: bool = False) -> list[Reading]:
    """Two releases at q < 1: as many patients as q says, and not the same ones; `renoised` plants that they are."""
    consortium, labels = ward.consortium, ward.dataset.fold("train").labels
    rate, scale = consortium.document.privacy.sampling_rate, consortium.noise.scale
    first = ward.clipped_sum()
    totals = (first, first if renoised else ward.clipped_sum())
    scores = [presence(consortium, open_sum(consortium.train, [ward.vector(t)])["parameter"], labels) for t in totals]
    spread = math.sqrt(rate * (1 - rate) + math.ldexp(scale, -consortium.document.privacy.scale_bits) ** 2)
    found = {"samples: correlation": _errors(*(score - rate for score in scores))}
    for score in scores:
        _most(found, "samples: rate", abs(float(score.mean()) - rate) * math.sqrt(score.size) / spread)
    return _as_readings(found)


def after_restart(draw: Callable[[], I64]) -> I64:
    """`draw` in a process that has this one's memory to the last bit: whatever is equal there did not come from it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with os.fdopen(writer, "wb") as out:
                out.write(draw().astype("<i8").tobytes())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        found = np.frombuffer(source.read(), "<i8").astype(np.int64)
    os.waitpid(child, 0)
    return found


def _worst(found: dict[str, float], name: str, rest: I64, variance: float) -> None:
    """Mean, variance and kurtosis of one residual, in standard errors of what a Gaussian of `variance` has."""
    values, lanes = rest.astype(np.float64), rest.size
    second = float(np.mean(values**2))
    _most(found, f"{name}: mean", abs(float(values.mean())) * math.sqrt(lanes / variance))
    _most(found, f"{name}: variance", _variance_errors(rest, variance))
    _most(found, f"{name}: kurtosis", abs(float(np.mean(values**4)) / second**2 - 3) / math.sqrt(24 / lanes))


def _variance_errors(rest: I64, variance: float) -> float:
    """|variance / expected − 1| in units of √(2/lanes); by Wilson and Hilferty, so that few lanes raise no alarm."""
    ratio, spread = float(np.mean(rest.astype(np.float64) ** 2)) / variance, 2 / (9 * rest.size)
    return abs(math.cbrt(ratio) - (1 - spread)) / math.sqrt(spread)


def _errors(one: npt.NDArray[np.generic], two: npt.NDArray[np.generic]) -> float:
    """|correlation| in standard errors of two independent vectors; infinite where one has no spread at all."""
    a, b = one.astype(np.float64), two.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return abs(float(a @ b)) / size * math.sqrt(a.size) if size > 0 else math.inf


def _most(found: dict[str, float], name: str, value: float) -> None:
    found[name] = max(found.get(name, 0.0), value)


def _as_readings(found: dict[str, float]) -> list[Reading]:
    return [Reading(name, value, LIMIT, "standard errors") for name, value in found.items()]
