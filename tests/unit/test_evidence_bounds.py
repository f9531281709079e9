"""Lower bounds on ε from what attacks counted: against other ways to compute them, and how often they are wrong."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from services.common.dp.accounting import Event, calibrate, epsilon
from services.common.dp.evidence import (
    binomial_tail,
    gaussian_epsilon,
    gaussian_mu,
    largest_chance,
    one_run_epsilon,
)

DELTA = 1e-5
CDF = NormalDist().cdf


@pytest.mark.parametrize(
    ("trials", "at_least", "chance"), [(10, 3, 0.2), (100, 95, 0.9), (5000, 2600, 0.5), (7, 0, 0.1)]
)
def test_binomial_tail_is_scipys(trials: int, at_least: int, chance: float) -> None:
    assert binomial_tail(trials, at_least, chance) == pytest.approx(
        stats.binom.sf(at_least - 1, trials, chance), rel=1e-9
    )
    assert binomial_tail(5, 6, 0.5) == 0.0
    assert binomial_tail(5, 5, 1.0) == 1.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (3, 20), (899, 2500), (19, 20)])
def test_clopper_pearson_is_the_beta_quantile(successes: int, trials: int) -> None:
    assert largest_chance(successes, trials, 0.95) == pytest.approx(
        stats.beta.ppf(0.95, successes + 1, trials - successes), rel=1e-6
    )
    assert largest_chance(trials, trials, 0.95) == 1.0


def test_gaussian_epsilon_of_one_release_is_the_accountants() -> None:
    assert gaussian_epsilon(0.5, DELTA) == pytest.approx(epsilon([Event(1.0, 2.0)], DELTA))
    assert gaussian_epsilon(0.0, DELTA) == 0.0


def test_many_runs_see_most_of_a_true_epsilon_and_catch_halved_noise() -> None:
    """privacy.md §8: 5,000 runs see about 2.6 of a true 3; with half the noise the bound passes 3 by far."""
    mu = 1 / calibrate(3.0, DELTA, 1.0, 1)
    for factor, low, high in ((1, 2.4, 3.0), (2, 5.5, 7.0)):
        wrong = round(2500 * CDF(-mu * factor / 2))
        assert low < gaussian_epsilon(gaussian_mu(wrong, 2500, wrong, 2500), DELTA) < high
    assert gaussian_mu(1250, 2500, 1250, 2500) == 0.0
    assert gaussian_mu(10, 10, 0, 10) == 0.0


def test_gaussian_bound_is_wrong_as_seldom_as_it_says() -> None:
    """True μ = 0.7, 150 audits of 2 × 500 runs, seeded: at most 5 % of the bounds lie above (+ 3 errors)."""
    generator, mu, audits = np.random.default_rng(3), 0.7, 150
    wrong = generator.binomial(500, CDF(-mu / 2), (audits, 2))
    above = sum(gaussian_mu(int(a), 500, int(b), 500) > mu for a, b in wrong)
    assert above <= audits * (0.05 + 3 * math.sqrt(0.05 * 0.95 / audits))


def test_one_run_bound_sees_little_and_a_missing_noise() -> None:
    """privacy.md §8: 1,000 canaries and 100 guesses show about 1.1 of a true 3; all 100 right refute an ε of 3."""
    generator, mu = np.random.default_rng(11), 1 / calibrate(3.0, DELTA, 1.0, 1)

    def audit(strength: float) -> float:
        coins = generator.integers(0, 2, 1000)
        order = np.argsort((coins - 0.5) * strength + generator.normal(size=1000))
        correct = int((coins[order[:50]] == 0).sum() + (coins[order[-50:]] == 1).sum())
        return one_run_epsilon(1000, 100, correct, DELTA)

    bounds = [audit(mu) for _ in range(60)]
    assert 0.9 < np.mean(bounds) < 1.4
    assert sum(bound > 3 for bound in bounds) == 0
    assert audit(100.0) > 3.0
    assert one_run_epsilon(1000, 100, 50, DELTA) == 0.0
    assert one_run_epsilon(1000, 100, 0, DELTA) == 0.0


def test_one_run_bound_without_delta_is_the_binomials() -> None:
    """δ = 0: P(Bin(r, e^ε/(1+e^ε)) ≥ v) = 5 % exactly at the bound."""
    found = one_run_epsilon(1000, 100, 80, 0.0)
    assert stats.binom.sf(79, 100, 1 / (1 + math.exp(-found))) == pytest.approx(0.05, rel=1e-3)
    assert one_run_epsilon(1000, 100, 80, 1e-5) < found
