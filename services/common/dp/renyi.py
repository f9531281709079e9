"""A Rényi filter: what releases chosen one after another cost together, whatever they were chosen by (L-2).

An accountant composes events that were fixed beforehand. Across studies they are not: the next study, its σ and its
length may depend on what earlier ones released. For each order α, exp((α−1)·(L − Σρ(α))), with L the privacy loss so
far and ρ the Rényi divergence of each release, is a supermartingale under any such choice (Feldman and Zrnic 2021,
arXiv:2008.11193), so by Ville's inequality L ≤ Σρ(α) + log(1/δ_α)/(α−1) at ALL times but with probability δ_α. The
orders share δ, hence the least bound over them holds too, at every moment: filter and odometer in one.
Not here: which events there were (the hospital's ledger).
"""

import math
from collections.abc import Iterable
from functools import lru_cache

from services.common.dp.accounting import NUMERICS_DELTA, Event

ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128)
_ROUNDING = 1e-13  # added to every divergence: more than its logarithm and sum can be off by


@lru_cache(maxsize=8192)
def divergence(sampling_rate: float, noise_multiplier: float, order: int) -> float:
    """ρ(α) of one Gaussian release at multiplier σ on a Poisson sample of rate q, add/remove; infinite without noise.

    q = 1: α/2σ². Else Mironov, Talwar and Zhang 2019 (arXiv:1908.10530) for integers α ≥ 2:
    log(Σ_k C(α,k) (1−q)^(α−k) q^k e^(k(k−1)/2σ²)) / (α−1). Rounded up.
    """
    if noise_multiplier <= 0:
        return math.inf
    if sampling_rate == 1:
        return order / (2 * noise_multiplier**2) + _ROUNDING
    kept, taken = math.log1p(-sampling_rate), math.log(sampling_rate)
    terms = [
        math.log(math.comb(order, k)) + (order - k) * kept + k * taken + k * (k - 1) / (2 * noise_multiplier**2)
        for k in range(order + 1)
    ]
    largest = max(terms)
    return (largest + math.log(math.fsum(math.exp(term - largest) for term in terms))) / (order - 1) + _ROUNDING


class RenyiFilter:
    """The filter of a cap (`epsilon`, `delta`), both fixed before the first event.

    Half of δ belongs to the order that admits most full-batch Gaussians under this cap, the other orders share the
    rest evenly: they matter where samples are small.
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        left = delta - NUMERICS_DELTA
        self._tails: dict[int, float] = {}
        if left <= 0:
            return  # no δ, no bound: everything costs infinitely much
        half = math.log(2 / left)
        favourite = max(ORDERS, key=lambda order: (epsilon - half / (order - 1)) / order)
        shared = math.log(2 * (len(ORDERS) - 1) / left)
        self._tails = {order: (half if order == favourite else shared) / (order - 1) for order in ORDERS}

    def spent(self, events: Iterable[Event]) -> float:
        """ε of all `events` at this δ: 0.0 without any, infinite when one of them has no noise."""
        everything = [event for event in events if event.steps]
        if not everything:
            return 0.0
        return min(
            (
                math.fsum(e.steps * divergence(e.sampling_rate, e.noise_multiplier, order) for e in everything) + tail
                for order, tail in self._tails.items()
            ),
            default=math.inf,
        )
