"""From events to ε (privacy.md §2, §6, §7): pessimistic privacy loss distributions of the Gaussian, add/remove.

Every figure is an upper bound: what is printed is proven, or it is infinite. Three ways, which tests hold to one
another: `epsilon` (PLD; closed form where all q = 1), `epsilon_rdp`, `epsilon_gaussian_closed_form`.
The Gaussian stands for the integer noise at the multiplier of `noise.effective_multiplier`.
Not here: what was spent (the ledger), which events a study has (documents).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from services.common.dp.exact import exact
from services.common.errors import Reason, ServiceError

NUMERICS_DELTA = 1e-15  # privacy.md §4: what the noise's tables may cost
# What double-precision Fourier transforms may add to or hide from δ, per composed step: unit round-off 1.1e-16,
# times log2 of 2^22 points, times the ratio (at most 40) of the array's length to the distribution's width.
FFT_DELTA = 1e-13
FINE = 1e-4  # discretisation of the privacy loss for what is claimed
COARSE = 1e-3  # for searches and curves: as pessimistic, ε higher by less than 1e-4 relative
_LARGEST_LOSS = 16.0  # beyond it the grid widens in powers of two, so that no σ needs more than 10^6 points
_LARGEST_TOTAL = 128.0  # the same for the composed loss, at which no ε means anything
_NEARLY_NOTHING = 1e-9  # only where doubles find less than this ε (or overflow) may it be exactly zero
_PROOF_BITS = 203  # 60 decimal digits
_GUESS_MARGIN = 1e-11  # by which a closed form found in doubles is raised before it is proven
_SIGMA_STEPS = 10_000  # calibration grid: 1e-4
_LARGEST_SIGMA = 10_000


@dataclass(frozen=True)
class Event:
    """`steps` Gaussian releases at multiplier σ, each on a Poisson sample of rate q (adaptively chosen).

    σ = 0 is a release without noise: its ε is infinite. Raises ServiceError(OUT_OF_BOUND) for a rate not in (0, 1],
    a negative or NaN σ, or negative steps.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.sampling_rate <= 1 and self.noise_multiplier >= 0 and self.steps >= 0):
            raise ServiceError(
                Reason.OUT_OF_BOUND,
                f"no privacy event has sampling rate {self.sampling_rate}, noise multiplier {self.noise_multiplier} "
                f"and {self.steps} steps: the rate is in (0, 1], the others are not negative",
            )


def epsilon(events: Iterable[Event], delta: float, interval: float = FINE) -> float:
    """ε at `delta` of all events composed, by PLD at this discretisation; infinite when an event has no noise.

    δ is reduced by `NUMERICS_DELTA` and `FFT_DELTA` a step before it is spent. Remembered by events.
    """
    return _epsilon(_merged(events), delta, interval)


def epsilon_rdp(events: Iterable[Event], delta: float) -> float:
    """ε by Rényi accounting: above `epsilon`; what a filter across adaptively chosen studies uses (L-2)."""
    merged, left = _merged(events), delta - NUMERICS_DELTA
    if not merged:
        return 0.0
    if left <= 0 or not _noised(merged):
        return math.inf
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    for event in merged:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.steps)
    return float(accountant.get_epsilon(left))


def epsilon_gaussian_closed_form(events: Iterable[Event], delta: float) -> float:
    """ε of events that all have q = 1: one Gaussian of μ² = Σ steps/σ², exact and rounded up.

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Balle and Wang 2018). Raises ServiceError(OUT_OF_BOUND) if some q < 1.
    """
    merged = _merged(events)
    if not _whole(merged):
        raise ServiceError(Reason.OUT_OF_BOUND, "the closed form is for sampling rate 1 only: ask `epsilon`")
    return _one_gaussian(merged, delta)


def solo_event(event: Event, minimum_cohort: int, colluding: int) -> Event:
    """The event as it is when every other hospital colludes: σ/√(n_min − k) (privacy.md §2, ε_solo)."""
    return replace(event, noise_multiplier=event.noise_multiplier / math.sqrt(minimum_cohort - colluding))


def calibrate(target: float, delta: float, sampling_rate: float, steps: int, others: Sequence[Event] = ()) -> float:
    """The smallest σ, to 1e-4 upwards, with ε(`steps` at σ and q, composed with `others`) ≤ `target` at `delta`.

    Raises ServiceError(OUT_OF_BOUND) when no σ up to 10,000 is enough.
    """

    def fits(ticks: int, interval: float) -> bool:
        event = Event(sampling_rate, ticks / _SIGMA_STEPS, steps)
        return epsilon((event, *others), delta, interval) <= target

    high = _SIGMA_STEPS
    while not fits(high, COARSE):
        high *= 2
        if high > _LARGEST_SIGMA * _SIGMA_STEPS:
            raise ServiceError(
                Reason.OUT_OF_BOUND,
                f"no noise makes {steps} steps cost at most ε {target:g} at δ {delta:g}: "
                "what is composed with them costs too much already, or δ is too small",
            )
    ticks = _least(high, lambda candidate: fits(candidate, COARSE))
    while not fits(ticks, FINE):  # never seen: the finer grid is the tighter one
        ticks += 1
    return ticks / _SIGMA_STEPS


def epsilon_curve(rounds: Sequence[Sequence[Event]], delta: float, spent: Sequence[Event] = ()) -> list[float]:
    """ε after each round: entry r is the ε of `spent` and of the events of rounds 0 … r, on the coarse grid."""
    merged = [_merged(events) for events in (spent, *rounds)]
    everything = _merged(event for events in merged for event in events)
    if _whole(everything) or not _noised(everything):
        return [
            epsilon([event for events in merged[: last + 1] for event in events], delta)
            for last in range(1, len(merged))
        ]
    grid = COARSE * _widening(everything)
    total, steps, curve = None, 0, []
    for events in merged:
        for event in events:
            one = _composed(event.sampling_rate, event.noise_multiplier, event.steps, grid)
            total = one if total is None else total.compose(one)
            steps += event.steps + 1  # the composition with what came before is a transform as well
        curve.append(0.0 if total is None else _spend(total, delta, steps))
    return curve[1:]


@lru_cache(maxsize=1024)
def _epsilon(merged: tuple[Event, ...], delta: float, interval: float) -> float:
    if not merged:
        return 0.0
    if not _noised(merged):
        return math.inf
    if _whole(merged):
        return _one_gaussian(merged, delta)
    grid = interval * _widening(merged)
    total, steps = None, 0
    for event in merged:
        one = _composed(event.sampling_rate, event.noise_multiplier, event.steps, grid)
        total = one if total is None else total.compose(one)
        steps += event.steps + 1
    return _spend(total, delta, steps)


def _merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same privacy in the fewest events: equal (q, σ) added up, all q = 1 made one Gaussian (exact)."""
    precision, grouped = 0.0, dict[tuple[float, float], int]()
    whole = False
    for event in events:
        if event.steps == 0:
            continue
        if event.sampling_rate < 1:
            key = (event.sampling_rate, event.noise_multiplier)
            grouped[key] = grouped.get(key, 0) + event.steps
        else:
            whole = True
            precision += event.steps / event.noise_multiplier**2 if event.noise_multiplier > 0 else math.inf
    found = [Event(rate, multiplier, steps) for (rate, multiplier), steps in sorted(grouped.items())]
    if whole:  # rounded down: the sum and the root are off by less than this
        found.append(Event(1.0, 1 / math.sqrt(precision) * (1 - 1e-13) if precision > 0 else math.inf))
    return tuple(found)


def _noised(merged: Iterable[Event]) -> bool:
    return all(event.noise_multiplier > 0 for event in merged)


def _whole(merged: Sequence[Event]) -> bool:
    return all(event.sampling_rate == 1 for event in merged)


def _widening(merged: Iterable[Event]) -> int:
    """How many times the grid is widened, a power of two: 1 for every σ that anybody should use."""
    single = total = 0.0
    for event in merged:
        precision = event.noise_multiplier**-2
        single = max(single, precision / 2 + 10 / event.noise_multiplier)
        # Rényi divergence of order 2 bounds the mean loss: log(1 + q²(e^(1/σ²) − 1)).
        mean = math.log1p(event.sampling_rate**2 * math.expm1(precision)) if precision < 1 else precision
        total += event.steps * mean
    return int(2 ** max(0, math.ceil(math.log2(max(single / _LARGEST_LOSS, total / _LARGEST_TOTAL, 1)))))


# dp_accounting's distributions have no types: Any stands for its PrivacyLossDistribution.
@lru_cache(maxsize=16)
def _step(sampling_rate: float, noise_multiplier: float, grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, pessimistic_estimate=True, value_discretization_interval=grid, sampling_prob=sampling_rate
    )


@lru_cache(maxsize=32)
def _composed(sampling_rate: float, noise_multiplier: float, steps: int, grid: float) -> Any:
    one = _step(sampling_rate, noise_multiplier, grid)
    return one if steps == 1 else one.self_compose(steps)


def _spend(total: Any, delta: float, steps: int) -> float:
    left = delta - NUMERICS_DELTA - FFT_DELTA * steps
    return float(total.get_epsilon_for_delta(left)) if left > 0 else math.inf


def _one_gaussian(merged: Sequence[Event], delta: float) -> float:
    """The closed form of what `_merged` made of events that all have q = 1: at most one event."""
    left = delta - NUMERICS_DELTA
    if not merged or merged[0].noise_multiplier == math.inf:
        return 0.0
    return _closed_form(1 / merged[0].noise_multiplier, left) if left > 0 and _noised(merged) else math.inf


@lru_cache(maxsize=1024)
def _closed_form(mu: float, delta: float) -> float:
    with exact(_PROOF_BITS) as mpmath:
        ratio = mpmath.mpf(mu)

        def enough(candidate: Any) -> bool:
            shift = candidate / ratio
            spent = mpmath.ncdf(ratio / 2 - shift) - mpmath.exp(candidate) * mpmath.ncdf(-ratio / 2 - shift)
            return bool(spent <= delta)

        guess = _double_closed_form(mu, delta) * (1 + _GUESS_MARGIN)
        if guess < _NEARLY_NOTHING and enough(mpmath.mpf(0)):
            return 0.0
        if 0 < guess < math.inf and enough(mpmath.mpf(guess)):  # proven here, whatever the doubles were worth
            return math.nextafter(guess, math.inf)
        low, high = mpmath.mpf(0), mpmath.mpf(1)
        while not enough(high):
            low, high = high, 2 * high
        while high - low > high * mpmath.mpf(2) ** -60:
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return math.nextafter(float(high), math.inf)


def _double_closed_form(mu: float, delta: float) -> float:
    """About the same by bisection in doubles, a hundred times faster; 0.0 where they overflow. Proves nothing."""

    def spent(candidate: float) -> float:
        near, far = (candidate / mu - mu / 2) / math.sqrt(2), (candidate / mu + mu / 2) / math.sqrt(2)
        return (math.erfc(near) - math.exp(candidate) * math.erfc(far)) / 2

    low, high = 0.0, 1.0
    try:
        while spent(high) > delta:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) > delta else (low, middle)
    except OverflowError:
        return 0.0
    return high


def _least(high: int, fits: Callable[[int], bool]) -> int:
    """The smallest integer in 1 … `high` that fits, given that `high` does and that fitting is monotone."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
