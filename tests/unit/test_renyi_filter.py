"""The Rényi filter: its divergences by two other ways, its bound, and that adaptive choices do not break it."""

import math

import numpy as np
import pytest
from scipy import integrate

from services.common.dp.accounting import Event, epsilon, epsilon_rdp
from services.common.dp.renyi import ORDERS, RenyiFilter, divergence

DELTA = 1e-5


@pytest.mark.parametrize("rate", [0.01, 0.256, 0.9, 1.0])
@pytest.mark.parametrize("order", [2, 3, 8])
def test_divergence_is_the_integral_of_its_definition(rate: float, order: int) -> None:
    """D_α(mixture ‖ Gaussian) = log ∫ p^α q^(1−α) / (α−1), by quadrature."""
    sigma = 1.5

    def gaussian(x: float, mean: float) -> float:
        return math.exp(-((x - mean) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    def integrand(x: float) -> float:
        base = gaussian(x, 0)
        return ((1 - rate) + rate * gaussian(x, 1) / base) ** order * base

    total, _ = integrate.quad(integrand, -30, 45, limit=500, epsabs=0, epsrel=1e-11)
    assert divergence(rate, sigma, order) == pytest.approx(math.log(total) / (order - 1), rel=1e-8)


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(1.0, 6.0, 12), (0.256, 3.358, 79), (0.05, 1.5, 300)])
def test_filter_is_above_pld_and_rdp_and_not_far(rate: float, sigma: float, steps: int) -> None:
    """A filter pays for adaptivity: above PLD and above plain RDP at the same δ, but no worse than 1.6 times PLD."""
    event = Event(rate, sigma, steps)
    exact = epsilon([event], DELTA)
    filtered = RenyiFilter(exact, DELTA).spent([event])
    assert exact <= epsilon_rdp([event], DELTA) < filtered < 1.6 * exact


def test_filter_only_adds_up() -> None:
    """Order and grouping of events do not matter: the state of a filter is a sum for each order."""
    filter_bound = RenyiFilter(8.0, DELTA)
    events = [Event(0.2, 2.0, 3), Event(1.0, 9.0, 2), Event(0.2, 2.0, 1)]
    split = [Event(0.2, 2.0), Event(1.0, 9.0), Event(0.2, 2.0), Event(1.0, 9.0), Event(0.2, 2.0, 2)]
    assert filter_bound.spent(events) == pytest.approx(filter_bound.spent(split), rel=1e-12)
    assert filter_bound.spent([*events, Event(1.0, 50.0)]) > filter_bound.spent(events)


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert RenyiFilter(8.0, DELTA).spent([]) == 0.0
    assert RenyiFilter(8.0, DELTA).spent([Event(1.0, 0.0)]) == math.inf
    assert RenyiFilter(8.0, 0.0).spent([Event(1.0, 5.0)]) == math.inf
    assert RenyiFilter(0.0, DELTA).spent([Event(1.0, 5.0)]) > 0


def test_shares_of_delta_are_no_more_than_delta() -> None:
    """The bound of each order holds but with its own δ; together they may not fail more often than δ."""
    for cap in (0.0, 0.5, 3.0, 8.0, 100.0):
        used = 0.0
        for order, tail in RenyiFilter(cap, DELTA)._tails.items():
            used += math.exp(-tail * (order - 1))
        assert used <= DELTA
        assert used == pytest.approx(DELTA, rel=1e-9)
    assert len(ORDERS) == len(set(ORDERS))


def test_losses_of_an_adaptive_adversary_stay_below_the_bound() -> None:
    """Chooses each σ by the loss so far, and stops when it likes: the loss passes the bound at most as often as δ.

    δ = 0.05 so that failures are seen; 20,000 runs, seeded: at most 0.05 + 4 standard errors.
    """
    generator, delta, cap = np.random.default_rng(5), 0.05, 3.0
    filter_bound = RenyiFilter(cap, delta)
    tails = filter_bound._tails
    runs = 20_000
    loss, precision = np.zeros(runs), np.zeros(runs)
    passed = np.zeros(runs, bool)
    for _ in range(60):
        # When the loss is high it takes louder answers, when it is low quiet ones: it gambles for a crossing.
        sigma = np.where(loss > 0.5, 4.0, 12.0)
        bound_after = np.min([order * (precision + sigma**-2) / 2 + tail for order, tail in tails.items()], axis=0)
        alive = bound_after <= cap
        loss += np.where(alive, generator.normal(0.5 * sigma**-2, 1 / sigma), 0.0)
        precision += np.where(alive, sigma**-2, 0.0)
        bound = np.min([order * precision / 2 + tail for order, tail in tails.items()], axis=0)
        passed |= loss > bound
    assert 0 < passed.mean() < delta + 4 * math.sqrt(delta / runs)
