"""ε from the distribution of the privacy loss itself: a second opinion beside the PLD (privacy.md §7).

Numerical composition of privacy loss random variables (Gopi, Lee and Wutschitz 2021, arXiv:2106.02848) for the Gaussian
on a Poisson sample, add/remove: the loss of one step is put on a grid by its exact distribution function, its mean is
kept, and T steps are one Fourier transform. It shares no code with the PLD of `accounting`. An estimate to within
`error`, not a bound: what is claimed comes from `accounting.epsilon`.
"""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from services.common.dp.accounting import Event
from services.common.dp.renyi import ORDERS, divergence
from services.common.errors import Reason, ServiceError

F64 = npt.NDArray[np.float64]
_DELTA_SHARE = 1e-3  # of δ, for what the window leaves out
_MOST_POINTS = 1 << 24
_FINER = 8  # points of the mean's integral for each point of the grid


def epsilon_prv(events: Iterable[Event], delta: float, error: float = 2e-3) -> float:
    """ε at `delta` of all events composed, to within about `error`; infinite when an event has no noise.

    Raises ServiceError(OUT_OF_BOUND) where the grid would be too fine for this machine.
    """
    everything = [event for event in events if event.steps]
    if not everything:
        return 0.0
    if min(event.noise_multiplier for event in everything) <= 0:
        return math.inf
    steps, lost = sum(event.steps for event in everything), _DELTA_SHARE * delta
    half = max(_window(everything, lost), 1.0) + 3.0
    mesh = error / math.sqrt(steps / 2 * math.log(12 / lost))
    points = 2 * math.ceil(half / mesh)
    if points > _MOST_POINTS:
        raise ServiceError(
            Reason.OUT_OF_BOUND, f"a second opinion to {error:g} needs {points} points here: ask for a larger error"
        )
    grid: F64 = (np.arange(points) - points // 2).astype(np.float64) * mesh
    return max(_epsilon(everything, delta, grid, mesh, remove) for remove in (True, False))


def _window(events: list[Event], lost: float) -> float:
    """Beyond it the composed loss lies with a probability below `lost`, by its Rényi divergence."""
    tails = [
        math.fsum(e.steps * divergence(e.sampling_rate, e.noise_multiplier, order) for e in events)
        + math.log(4 / lost) / (order - 1)
        for order in ORDERS
    ]
    return min(tails)


def _epsilon(events: list[Event], delta: float, grid: F64, mesh: float, remove: bool) -> float:
    transform: npt.NDArray[np.complex128] | None = None
    mean = 0.0
    for event in events:
        mass, shift = _discrete(event, grid, mesh, remove)
        one = np.fft.rfft(np.fft.ifftshift(mass)) ** event.steps
        transform = one if transform is None else transform * one
        mean += shift * event.steps
    assert transform is not None  # noqa: S101  # there is an event
    mass = np.maximum(np.fft.fftshift(np.fft.irfft(transform, grid.size)), 0.0)
    return _solve(grid + mean, mass, delta)


def _discrete(event: Event, grid: F64, mesh: float, remove: bool) -> tuple[F64, float]:
    """The loss of one step rounded to the grid, and by how much its mean is short of the true one."""
    edges = np.append(grid, grid[-1] + mesh) - mesh / 2
    below = _distribution(event, edges, remove)
    mass = np.diff(below)
    inside = mass.sum()
    fine = np.linspace(edges[0], edges[-1], _FINER * grid.size + 1)
    values = _distribution(event, fine, remove)
    # E of the truncated loss by parts: b·F(b) − a·F(a) − ∫F over the window.
    mean = edges[-1] * values[-1] - edges[0] * values[0] - float(np.trapezoid(values, fine))
    return mass / inside, (mean - float(mass @ grid)) / inside


def _distribution(event: Event, losses: F64, remove: bool) -> F64:
    """P(loss ≤ t) of one step: under the mixture for a patient removed, under the plain Gaussian for one added."""
    from scipy.special import ndtr

    rate, sigma = event.sampling_rate, event.noise_multiplier
    bounded = losses if remove else -losses
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inner = (np.expm1(bounded) + rate) / rate  # (e^t − (1 − q)) / q
        place = sigma**2 * np.log(inner) + 0.5
    place = np.where(inner > 0, place, -np.inf)
    place = np.where(np.isposinf(inner), np.inf, place)
    if remove:
        found: F64 = (1 - rate) * ndtr(place / sigma) + rate * ndtr((place - 1) / sigma)
    else:
        found = ndtr(-place / sigma)
    return found


def _solve(losses: F64, mass: F64, delta: float) -> float:
    """The smallest ε ≥ 0 with Σ over losses above it of mass·(1 − e^(ε − loss)) ≤ δ."""

    def spent(candidate: float) -> float:
        above = losses > candidate
        return float(mass[above] @ -np.expm1(candidate - losses[above]))

    low, high = 0.0, float(losses[-1])
    if spent(low) <= delta:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high
