"""Attacks by canaries (privacy.md §8, 3 and 4): how much of the claimed ε an attacker who knows all else can show.

A canary is a whole patient, through the real sampler, clip, noise and ring. The attacker projects the released sum,
less all it knows, onto the canary's own gradient; thresholds and numbers of guesses are fixed before. Views: `public`
sees the sum; `colluders` also know k hospitals' vectors; `all others` every vector but that of the canary's hospital.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from services.cli.audit_finding import FAULTS, Finding, Reading, Say
from services.cli.audit_noise import CANARY_LENGTH, one_hot_patients, presence
from services.cli.audit_scratch import (
    DELTA,
    FEATURES,
    Consortium,
    Hospital,
    Patients,
    make_consortium,
    open_sum,
    os_keys,
    random_patients,
    without_claim,
)
from services.common.dp.evidence import CONFIDENCE, gaussian_epsilon, gaussian_mu, one_run_epsilon
from services.common.dp.sampling import poisson_sample

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

CANARIES, GUESSES = 1000, 100
_SURE = 0.9999  # the bound of the many runs is nearly tight: at 95 % an honest node would fail now and then
_HALF = 0.5  # of the canary's projection: the best threshold for equal chances, fixed before any run
_WEAK = ("a share missing", "a sample re-noised")  # they cost 1.5 of an ε of 3, the others much more: many runs to see
_NOBODY = Patients(np.empty((0, FEATURES), np.float32), np.empty(0, np.int64))


@dataclass(frozen=True)
class View:
    """Who looks: the vectors of a cohort of n_min that it does not know, and what is claimed against it."""

    name: str
    unknown: int
    claim: float


class Cohort:
    """n_min hospitals (one under `local`); the canaries are the first one's patients. `fault` is planted in all."""

    def __init__(self, consortium: Consortium, generator: np.random.Generator, fault: str = "") -> None:
        self.honest, self.fault = consortium, fault
        privacy, classes = consortium.document.privacy, len(consortium.document.model.classes)
        changes = {
            "noise halved": {"noise_multiplier": privacy.noise_multiplier / 2},
            # Twice the clip with noise for half of it: each patient counts double, the noise is what was claimed.
            "sensitivity doubled": {"clip": 2 * privacy.clip, "noise_multiplier": privacy.noise_multiplier / 2},
        }
        self.consortium = without_claim(consortium, **changes[fault]) if fault in changes else consortium
        fixed = os_keys()
        self._keys: Callable[[], bytes] = (lambda: fixed) if fault == "noise repeated" else os_keys
        shared = privacy.mechanism == "shared"
        others = consortium.document.cohort.minimum - 1 if shared else 0
        self._others = [self.hospital(random_patients(generator, 20, classes)) for _ in range(others)]
        # At q = 1 their sums never change: what changes from run to run is the noise, and the canary's hospital.
        self._totals = [ward.clipped_sum() for ward in self._others]
        self._known = [ward.integers(total) for ward, total in zip(self._others, self._totals, strict=True)]

    def hospital(self, patients: Patients) -> Hospital:
        """One that does what this cohort's fault says."""
        return Hospital(self.consortium, patients, self._keys)

    @cached_property
    def views(self) -> tuple[View, ...]:
        """From the one who sees least to the one who sees most; claims are the honest study's."""
        if not self._others:
            return (View("everybody", 1, self.honest.claim(1)),)
        cohort = len(self._others) + 1
        honest = cohort - self.honest.document.cohort.colluding_hospitals
        found = {"public": cohort, "colluders": honest, "all others": 1}
        return tuple(View(name, unknown, self.honest.claim(unknown)) for name, unknown in found.items())

    def seen(self, first: Hospital, without: Hospital, base: I64) -> list[F64]:
        """For each view what a round with `first` shows, less the signal that it knows.

        `without` is the same hospital without a canary, `base` (d) its own signal.
        """
        one = self._rests(first, base)
        if self.fault == "noise repeated":  # the next round, of which is known that no canary is in it
            return [a - b for a, b in zip(one, self._rests(without, base), strict=True)]
        if self.fault == "a sample re-noised":
            return [(a + b) / 2 for a, b in zip(one, self._rests(first, base), strict=True)]
        return one

    def _rests(self, first: Hospital, base: I64) -> list[F64]:
        if not self._others:
            return [(first.local_step() - base).astype(np.float64)]
        vectors = [first.vector(first.clipped_sum(), self._keys)]
        for place, (ward, total) in enumerate(zip(self._others, self._totals, strict=True)):
            missing = self.fault == "a share missing" and place == 0
            vectors.append(ward.bare_vector(total) if missing else ward.vector(total, self._keys))
        found = []
        for view in self.views:
            opened = open_sum(self.consortium.train, vectors[: view.unknown])["parameter"]
            known = np.sum([base, *self._known[: view.unknown - 1]], axis=0)
            found.append((opened - known).astype(np.float64))
        return found


def many_runs(consortium: Consortium, runs: int, seed: int, fault: str = "") -> list[Reading]:
    """Half of `runs` with one canary, half without; for each view the ε that its errors refute."""
    generator = np.random.default_rng(seed)
    cohort, classes = Cohort(consortium, generator, fault), len(consortium.document.model.classes)
    patients = random_patients(generator, 20, classes)
    canary = random_patients(generator, 1, classes)
    outside = cohort.hospital(patients)
    inside = cohort.hospital(patients.with_one(CANARY_LENGTH * canary.features, canary.labels))
    base = outside.integers(outside.clipped_sum())
    direction = (inside.integers(inside.clipped_sum()) - base).astype(np.float64)
    direction /= direction @ direction
    views, each = cohort.views, runs // 2
    wrong = np.zeros((len(views), 2), np.int64)  # said "in" without the canary, "out" with it
    for number in range(2 * each):
        present = number < each
        for place, rest in enumerate(cohort.seen(inside if present else outside, outside, base)):
            wrong[place, int(present)] += (float(rest @ direction) > _HALF) is not present
    readings = []
    for view, (positives, negatives) in zip(views, wrong.tolist(), strict=True):
        bound, sure = (
            gaussian_epsilon(gaussian_mu(positives, each, negatives, each, confidence), DELTA)
            for confidence in (CONFIDENCE, _SURE)
        )
        readings.append(_reading(consortium, view, bound, sure))
    return readings


def one_run(consortium: Consortium, seed: int, fault: str = "") -> list[Reading]:
    """ONE release with `CANARIES` canaries, each in by a coin; for each view the ε that its `GUESSES` refute."""
    cohort = Cohort(consortium, np.random.default_rng(seed), fault)
    everybody = one_hot_patients(CANARIES, len(consortium.document.model.classes))
    chosen = poisson_sample(os_keys(), CANARIES, 0.5)
    coins = np.zeros(CANARIES, bool)
    coins[chosen] = True
    first = cohort.hospital(Patients(everybody.features[chosen], everybody.labels[chosen]))
    nobody, readings = cohort.hospital(_NOBODY), []
    for view, rest in zip(cohort.views, cohort.seen(first, nobody, nobody.integers(nobody.clipped_sum())), strict=True):
        order = np.argsort(presence(consortium, rest, everybody.labels))
        correct = int((~coins[order[: GUESSES // 2]]).sum() + coins[order[-GUESSES // 2 :]].sum())
        readings.append(_reading(consortium, view, one_run_epsilon(CANARIES, GUESSES, correct, DELTA)))
    return readings


def measure_many_runs(seed: int, runs: int, say: Say) -> Finding:
    """Meter 3, under both mechanisms, and what it says of each planted fault."""
    finding = Finding(
        title="3. Many runs, one canary",
        shows=f"In {runs} releases an attacker who knows everything but the canary's coin and the noise of honest "
        "hospitals shows no more than the claimed ε against it.",
        shows_not="That the true ε is as low as the bound, for an attack gives lower bounds only; nor anything about "
        "several rounds, which the accountant composes.",
    )
    shared, local = (make_consortium(mechanism=name, classes=2) for name in ("shared", "local"))
    for consortium in (shared, local):
        say(f"{runs} runs with and without a canary, {consortium.document.privacy.mechanism}")
        finding.readings += many_runs(consortium, runs, seed)
    finding.notes["runs"] = runs
    for fault in FAULTS:
        needed = (4 * runs) // 5 if fault in _WEAK else runs // 3
        say(f"{needed} runs with a planted fault: {fault}")
        finding.judge(fault, many_runs(shared, needed, seed, fault))
    return finding


def measure_one_run(seed: int, say: Say) -> Finding:
    """Meter 4, under both mechanisms, and what it says of each planted fault."""
    finding = Finding(
        title="4. One run, many canaries",
        shows=f"ONE release with {CANARIES} canaries and {GUESSES} guesses refutes no ε that is claimed.",
        shows_not="Much: about 1.1 of a true 3 is all it sees, and every guess right refutes no more than 3.4. A low "
        "bound proves nothing, a bound above the claim proves a fault.",
    )
    shared, local = (make_consortium(mechanism=name) for name in ("shared", "local"))
    for consortium in (shared, local):
        say(f"one run with {CANARIES} canaries, {consortium.document.privacy.mechanism}")
        finding.readings += one_run(consortium, seed)
    say("one run with each planted fault")
    for fault in FAULTS:
        finding.judge(fault, one_run(shared, seed, fault))
    return finding


def _reading(consortium: Consortium, view: View, bound: float, sure: float | None = None) -> Reading:
    return Reading(f"{consortium.document.privacy.mechanism}, seen by {view.name}", bound, view.claim, "ε", sure)
