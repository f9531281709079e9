"""What an attack that was carried out proves about ε, from its counts alone (privacy.md §8). Pure.

Every figure is a LOWER bound on the true ε, at one-sided confidence: a bound above what is claimed proves a fault, a
low one proves nothing. Not here: the attacks (the command line's audit).
"""

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from services.common.dp.accounting import Event, epsilon_gaussian_closed_form

F64 = npt.NDArray[np.float64]

CONFIDENCE = 0.95
_NORMAL = NormalDist()


def binomial_tail(trials: int, at_least: int, chance: float) -> float:
    """P(X ≥ `at_least`) of a binomial X."""
    if at_least <= 0:
        return 1.0
    return min(1.0, math.fsum(_binomial(trials, chance)[at_least:]))


def largest_chance(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Clopper and Pearson's one-sided upper limit of a chance that gave `successes` in `trials`."""
    if successes >= trials:
        return 1.0
    low, high = successes / trials, 1.0
    for _ in range(45):
        middle = (low + high) / 2
        rare = 1 - binomial_tail(trials, successes + 1, middle) < 1 - confidence
        low, high = (low, middle) if rare else (middle, high)
    return high


def gaussian_mu(
    false_positives: int, without: int, false_negatives: int, with_canary: int, confidence: float = CONFIDENCE
) -> float:
    """The largest μ such that at `confidence` the mechanism is not μ-GDP (Nasr 2023; Dong, Roth and Su 2022); ≥ 0.

    A test whose threshold was fixed beforehand was wrong `false_positives` times of `without` runs and
    `false_negatives` times of `with_canary` runs. Both error rates are at or below their limits with chance
    `confidence`, each limit being missed with half of the rest.
    """
    each = 1 - (1 - confidence) / 2
    alpha, beta = largest_chance(false_positives, without, each), largest_chance(false_negatives, with_canary, each)
    if alpha >= 1 or beta >= 1:
        return 0.0
    return max(0.0, _NORMAL.inv_cdf(1 - alpha) - _NORMAL.inv_cdf(beta))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at `delta` of a mechanism that is exactly μ-GDP, as one full-batch Gaussian is."""
    return epsilon_gaussian_closed_form([Event(1.0, 1 / mu)], delta) if mu > 0 else 0.0


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest ε that ONE run refutes (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem 5.2).

    Each of `canaries` was in by a fair coin of its own; `guesses` of them were guessed, how many was fixed before,
    and `correct` guesses were right. 0.0 when nothing is refuted.
    """
    if _one_run_chance(canaries, guesses, correct, 0.0, delta) > 1 - confidence:
        return 0.0
    low, high = 0.0, 1.0
    while high < 64 and _one_run_chance(canaries, guesses, correct, high, delta) <= 1 - confidence:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        refuted = _one_run_chance(canaries, guesses, correct, middle, delta) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _one_run_chance(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """At most this likely are `correct` right guesses of an (ε, δ)-DP mechanism.

    Under pure ε the number is dominated by a binomial at e^ε/(1 + e^ε); δ lets it be i more with chance at most
    2·canaries·δ/i for the worst i.
    """
    exact = _binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    tails = np.cumsum(exact[::-1])[::-1]  # P(X ≥ count)
    worst = max(((tails[correct - i] - tails[correct]) / i for i in range(1, correct + 1)), default=0.0)
    return float(min(1.0, tails[correct] + 2 * canaries * delta * worst))


def _binomial(trials: int, chance: float) -> F64:
    """P(X = 0 … trials), (trials + 1,)."""
    if not 0 < chance < 1:
        return np.asarray(np.eye(1, trials + 1, trials if chance >= 1 else 0)[0], np.float64)
    factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, trials + 1)))))
    counts = np.arange(trials + 1)
    ways = factorials[-1] - factorials - factorials[::-1]
    logs = ways + counts * math.log(chance) + (trials - counts) * math.log1p(-chance)
    return np.asarray(np.exp(logs), np.float64)
