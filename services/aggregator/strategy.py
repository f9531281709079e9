"""Server steps: from the sum of a round to the next model, as functions over one block (privacy.md §5).

All of it is post-processing of a sum that carries its noise, so none of it costs privacy. `fedavg`, `fedavgm`,
`fedadam` and `fedyogi` move by the mean of updates; `sgd` and `adam` step along the sum of clipped gradients divided by
the study's constant D. What they keep between rounds, `slots` float64 numbers for each parameter and a few `Scalars`,
lies beside the model (modelfile.py).
Only operations that IEEE 754 rounds correctly: `verify` makes the same bytes on another machine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.common.documents.costs import training_noise
from services.common.documents.study import ServerSection, Study
from services.common.errors import Reason, ServiceError
from services.common.secagg.encoding import dequantise
from services.common.secagg.ring import I64

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Rule = Callable[[F64, F64, F64], F64]
"""(weights (n), what is kept (slots, n), decoded sum (n)) → new weights (n); the first two are changed in place."""


@dataclass(frozen=True)
class Scalars:
    """What is kept of past rounds beside the numbers of each parameter."""

    steps: int = 0  # accepted training rounds
    averaged: int = 0  # models in the average
    variance: float = 0.0  # adam: moving mean of the noise's variance in one coordinate of the gradient


@dataclass(frozen=True)
class Step:
    """The step of one training round. `scalars` are those after it; the average, if any, is the last slot."""

    slots: int
    scalars: Scalars
    fraction_bits: int
    rule: Rule = field(repr=False)
    share: float = 0.0  # of this round's model in the average; 0 = it is not averaged
    publishes_average: bool = False

    def run(self, model: F32, kept: F64, sums: I64) -> F32:
        """The next block of the model (n); `kept` (slots, n) becomes what the next round starts from.

        Raises NOT_FINITE where float32 cannot hold it.
        """
        weights = self.rule(model.astype(np.float64), kept, dequantise(sums, self.fraction_bits))
        with np.errstate(over="ignore"):
            new = weights.astype(np.float32)
        if self.share:
            kept[-1] += (new.astype(np.float64) - kept[-1]) * self.share
            new = kept[-1].astype(np.float32) if self.publishes_average else new
        if not (np.isfinite(new).all() and np.isfinite(kept).all()):
            raise ServiceError(Reason.NOT_FINITE, "the new model holds a number beyond float32: the round is rejected")
        return new


def server_step(study: Study, number: int, members: int, fraction_bits: int, before: Scalars) -> Step:
    """The step of training round `number` over a cohort of `members`, after `before`."""
    server, steps = study.server, before.steps + 1
    averaged = before.averaged + int(_averages(server, study.rounds, number))
    scalars, slots = Scalars(steps, averaged, before.variance), 0
    match server.strategy:
        case "fedavg" | "scaffold":  # of scaffold's two server steps the one of the model; c's is in next_model.py
            rule = fedavg(server.learning_rate, members)
        case "fedavgm":
            rule, slots = fedavgm(server.learning_rate, server.momentum, members), 1
        case "fedadam" | "fedyogi":
            rule, slots = adaptive(server, members, first=steps == 1), 2
        case "sgd":
            rule, slots = sgd(server.learning_rate, server.momentum, study.privacy.expected_batch), 1
        case "adam":
            variance = gradient_variance(study, members)
            decay = server.second_moment
            scalars = Scalars(steps, averaged, decay * before.variance + (1 - decay) * variance)
            rule, slots = adam(server, study.privacy.expected_batch, scalars), 2
    averaging = server.averaging != "none"
    share = 0.0
    if averaged > before.averaged:
        decay = server.averaging_decay
        share = 1 / averaged if server.averaging == "tail" else (1 - decay) / (1 - _power(decay, averaged))
    return Step(slots + averaging, scalars, fraction_bits, rule, share, averaging and number == study.rounds)


def gradient_variance(study: Study, members: int) -> float:
    """Of the noise in one coordinate of the divided gradient under `shared`: |U|·S_h²/(s·D)², not what was claimed."""
    unit = training_noise(study).scale / 2.0**study.privacy.scale_bits / study.privacy.expected_batch
    return members * unit * unit


def fedavg(learning_rate: float, members: int) -> Rule:
    """Weights + learning_rate · Σ / |U| (McMahan 2017, equal weights)."""

    def rule(weights: F64, kept: F64, total: F64) -> F64:
        weights += total * (learning_rate / members)
        return weights

    return rule


def fedavgm(learning_rate: float, momentum: float, members: int) -> Rule:
    """v ← momentum·v + Σ/|U|; weights + learning_rate·v (Hsu 2019, arXiv:1909.06335; the paper's rate is 1)."""

    def rule(weights: F64, kept: F64, total: F64) -> F64:
        velocity: F64 = kept[0]
        velocity *= momentum
        velocity += total / members
        weights += learning_rate * velocity
        return weights

    return rule


def adaptive(server: ServerSection, members: int, *, first: bool) -> Rule:
    """FedAdam or FedYogi of the mean update (Reddi 2021, arXiv:2003.00295, Algorithm 2), without bias correction.

    `first`: nothing is kept yet; the second moment begins at τ², the least that the paper allows.
    """
    one, two, tau = server.momentum, server.second_moment, server.adaptivity
    yogi = server.strategy == "fedyogi"

    def rule(weights: F64, kept: F64, total: F64) -> F64:
        update, mean, square = total / members, kept[0], kept[1]
        if first:
            square[:] = tau * tau
        mean *= one
        mean += (1 - one) * update
        latest = update * update
        if yogi:
            square -= (1 - two) * latest * np.sign(square - latest)
        else:
            square *= two
            square += (1 - two) * latest
        weights += server.learning_rate * mean / (np.sqrt(square) + tau)
        return weights

    return rule


def sgd(learning_rate: float, momentum: float, divisor: float) -> Rule:
    """v ← momentum·v + Σ/D; weights − learning_rate·v. D is a constant of the study, whatever the cohort."""

    def rule(weights: F64, kept: F64, total: F64) -> F64:
        velocity: F64 = kept[0]
        velocity *= momentum
        velocity += total / divisor
        weights -= learning_rate * velocity
        return weights

    return rule


def adam(server: ServerSection, divisor: float, scalars: Scalars) -> Rule:
    """Adam whose second moment is freed of the noise's own variance (Tang 2024, arXiv:2312.14334).

    Without that the noise, the same in every coordinate, would make all steps alike. `scalars` as after this step.
    """
    first, second = server.momentum, server.second_moment
    one, two = 1 - _power(first, scalars.steps), 1 - _power(second, scalars.steps)

    def rule(weights: F64, kept: F64, total: F64) -> F64:
        gradient = total / divisor
        mean, square = kept[0], kept[1]
        mean += (gradient - mean) * (1 - first)
        square += (gradient * gradient - square) * (1 - second)
        signal = np.sqrt(np.maximum((square - scalars.variance) / two, server.smallest_divisor**2))
        weights -= server.learning_rate * (mean / one) / signal
        return weights

    return rule


def _averages(server: ServerSection, rounds: int, number: int) -> bool:
    return server.averaging == "ema" or (server.averaging == "tail" and number > rounds - server.averaging_rounds)


def _power(base: float, exponent: int) -> float:
    """By multiplication alone: `**` is the C library's, which may differ in the last bit between machines."""
    found = 1.0
    for _ in range(exponent):
        found *= base
    return found
