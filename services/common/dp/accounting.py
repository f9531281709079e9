"""From events to ε (privacy.md §2, §6, §7): pessimistic privacy loss distributions of the Gaussian, add/remove.

Every figure is an upper bound: what is printed is proven, or it is infinite.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NUMERICS_DELTA = 1e-15  # privacy.md §4: what the noise's tables and the accountants' arithmetic may cost


@dataclass(frozen=True)
class Event:
    """`steps` Gaussian releases at multiplier σ, each on a Poisson sample of rate q (adaptively chosen)."""

    sampling_rate: float
    noise_multiplier: float
    steps: int = 1


def epsilon(events: Iterable[Event], delta: float, interval: float = 1e-4) -> float:
    """ε at `delta` of all events composed, by PLD; infinite when an event has no noise."""
    raise NotImplementedError


def epsilon_rdp(events: Iterable[Event], delta: float) -> float:
    """ε by Rényi accounting: always above `epsilon`; what a filter across adaptive studies uses."""
    raise NotImplementedError


def epsilon_gaussian_closed_form(events: Iterable[Event], delta: float) -> float:
    """ε of events that all have q = 1: one Gaussian of μ² = Σ steps/σ² (Balle and Wang 2018), rounded up."""
    raise NotImplementedError


def solo_event(event: Event, minimum_cohort: int, colluding: int) -> Event:
    """The event as it is when every other hospital colludes: σ/√(n_min − k) (privacy.md §2, ε_solo)."""
    raise NotImplementedError


def calibrate(
    target: float, delta: float, sampling_rate: float, steps: int, others: Sequence[Event] = ()
) -> float:
    """The smallest σ (to 1e-3, upwards) with ε(steps at σ and q, and `others`) ≤ `target` at `delta`."""
    raise NotImplementedError


def epsilon_curve(rounds: Sequence[Sequence[Event]], delta: float, spent: Sequence[Event] = ()) -> list[float]:
    """ε after each round: entry r is the ε of `spent` and of the events of rounds 0 … r."""
    raise NotImplementedError
