"""Ledger events that tests spend, and what full-batch Gaussians cost by an independent formula."""

import dataclasses
import math
from statistics import NormalDist

from services.hospital_node.events import Debit, Joined, Planned

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
    """The debit of round `number`; `changes` replace fields."""
    return dataclasses.replace(DEBIT, **{"round": number, "vector": f"v{number}", **changes})  # type: ignore[arg-type]


def joined(*plan: Planned, study: str = DEBIT.study, **changes: object) -> Joined:
    """A study with this plan under caps of ε = 10 at δ_total = 1e-4."""
    plain = Joined(study, "lesions", DELTA, 10, plan, 8.0, "ward", 10.0, 1e-4)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def planned(steps: int, **changes: object) -> Planned:
    """`steps` rounds of DEBIT as a plan."""
    plain = Planned("train", 1.0, DEBIT.noise_multiplier, DEBIT.noise_multiplier, steps)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


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
