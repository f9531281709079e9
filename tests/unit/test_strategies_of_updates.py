"""FedAvgM, FedAdam and FedYogi against their papers' formulas, in plain Python, and what makes them refuse a study.

The oracles are written from the papers: Hsu, Qi and Brown 2019 (arXiv:1909.06335) for FedAvgM; Reddi et al. 2021
(arXiv:2003.00295), Algorithm 2, for FedAdam and FedYogi.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.aggregator.strategy import Scalars, server_step
from services.common.documents.shape import check_study
from services.common.documents.strategies import STRATEGIES, strategy_in_words
from services.common.errors import Reason, ServiceError
from tests.support.documents import make_documents, make_study

BITS, MEMBERS = 10, 3
Oracle = Callable[[list[list[float]]], list[float]]


def fedavgm(updates: list[list[float]], beta: float, rate: float) -> list[float]:
    """Hsu 2019, §4.3: v ← βv + Δw̄, w ← w − v with Δw̄ = the mean of w_t − w_k; rate 1 is the paper's."""
    w, v, found = 0.0, 0.0, []
    for of_hospitals in updates:
        descent = -sum(of_hospitals) / len(of_hospitals)  # the paper's Δw points away from the hospitals' models
        v = beta * v + descent
        w = float(np.float32(w - rate * v))
        found.append(w)
    return found


def fedopt(updates: list[list[float]], kind: str, beta_1: float, beta_2: float, tau: float, rate: float) -> list[float]:
    """Reddi 2021, Algorithm 2, with v_{-1} = τ² and m_{-1} = 0."""
    x, m, v, found = 0.0, 0.0, tau**2, []
    for of_hospitals in updates:
        delta = sum(of_hospitals) / len(of_hospitals)
        m = beta_1 * m + (1 - beta_1) * delta
        if kind == "fedyogi":
            sign = (v > delta**2) - (v < delta**2)
            v = v - (1 - beta_2) * delta**2 * sign
        else:
            v = beta_2 * v + (1 - beta_2) * delta**2
        x = float(np.float32(x + rate * m / (math.sqrt(v) + tau)))
        found.append(x)
    return found


def run(updates: list[list[float]], **server: Any) -> list[float]:
    """One parameter from 0.0 on through the real server step; updates are multiples of 2^-10, so sums are exact."""
    study = make_study("none", rounds=len(updates), server=server).document
    model, kept, scalars, found = np.zeros(1, np.float32), None, Scalars(), []
    for number, of_hospitals in enumerate(updates, 1):
        step = server_step(study, number, len(of_hospitals), BITS, scalars)
        kept = np.zeros((step.slots, 1)) if kept is None else kept
        model = step.run(model, kept, np.array([round(sum(of_hospitals) * 2**BITS)]))
        scalars = step.scalars
        found.append(float(model[0]))
    return found


whole_updates = st.lists(
    st.lists(st.integers(-2048, 2048).map(lambda number: number / 2**BITS), min_size=2, max_size=5),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(updates=whole_updates, beta=st.floats(0.01, 0.99), rate=st.sampled_from([0.1, 1.0]))
def test_fedavgm_is_hsu_2019(updates: list[list[float]], beta: float, rate: float) -> None:
    found = run(updates, strategy="fedavgm", momentum=beta, learning_rate=rate)
    assert found == pytest.approx(fedavgm(updates, beta, rate), rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    updates=whole_updates,
    beta_1=st.floats(0, 0.99),
    beta_2=st.floats(0, 0.999),
    tau=st.sampled_from([1e-4, 1e-3, 0.1]),
    kind=st.sampled_from(["fedadam", "fedyogi"]),
)
def test_fedadam_and_fedyogi_are_algorithm_2_of_reddi_2021(
    updates: list[list[float]], beta_1: float, beta_2: float, tau: float, kind: str
) -> None:
    server = {"momentum": beta_1, "second_moment": beta_2, "adaptivity": tau, "learning_rate": 0.25}
    found = run(updates, strategy=kind, **server)
    assert found == pytest.approx(fedopt(updates, kind, beta_1, beta_2, tau, 0.25), rel=1e-5, abs=1e-6)


def test_yogi_forgets_a_large_update_more_slowly_than_adam() -> None:
    """What the paper made Yogi for: after one large update its second moment falls by a constant, not by a share."""
    updates = [[2.0] * MEMBERS, *([[2.0**-10] * MEMBERS] * 5)]
    adam, yogi = (run(updates, strategy=kind, momentum=0.0, second_moment=0.5) for kind in ("fedadam", "fedyogi"))
    adam_step, yogi_step = adam[-1] - adam[-2], yogi[-1] - yogi[-2]
    assert 0 < yogi_step < adam_step


def test_the_first_step_of_an_adaptive_strategy_begins_at_tau_squared_also_after_rejected_rounds() -> None:
    """A round number says nothing: `Scalars.steps` counts accepted rounds, and the first of them finds nothing kept."""
    study = make_study("none", rounds=9, server={"strategy": "fedyogi", "learning_rate": 0.5}).document
    late, early = (server_step(study, number, MEMBERS, BITS, Scalars()) for number in (7, 1))
    sums = np.array([3 * 2**BITS])
    model = np.zeros(1, np.float32)
    assert late.run(model, np.zeros((2, 1)), sums) == early.run(model, np.zeros((2, 1)), sums)


@pytest.mark.parametrize("mechanism", ["none", "local"])
@pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "fedyogi"])
def test_steps_of_updates_go_with_every_mechanism_that_sends_updates(mechanism: str, kind: str) -> None:
    charter = make_documents().charter
    check_study(charter, make_study(mechanism, server={"strategy": kind, "momentum": 0.9}))
    with pytest.raises(ServiceError, match="shared sends sums of gradients: choose sgd or adam"):
        check_study(charter, make_study("shared", server={"strategy": kind}))


SENSELESS: list[tuple[str, dict[str, Any], str]] = [
    ("none", {"strategy": "fedavg", "momentum": 0.9}, "server.momentum is set, but fedavg does not read it"),
    ("none", {"strategy": "fedavgm", "momentum": 0.9, "second_moment": 0.5}, "fedavgm does not read it"),
    ("none", {"strategy": "fedadam", "smallest_divisor": 0.5}, "server.smallest_divisor is set, but fedadam"),
    ("local", {"strategy": "fedavg", "adaptivity": 0.1}, "server.adaptivity is set, but fedavg"),
    ("shared", {"strategy": "adam", "adaptivity": 0.1}, "server.adaptivity is set, but adam"),
    ("local", {"strategy": "fedavgm"}, "fedavgm without momentum is fedavg"),
]


@pytest.mark.parametrize(("mechanism", "server", "words"), SENSELESS)
def test_fields_that_the_strategy_does_not_read_are_refused(mechanism: str, server: dict[str, Any], words: str) -> None:
    with pytest.raises(ServiceError) as caught:
        check_study(make_documents().charter, make_study(mechanism, server={"momentum": 0.0, **server}))
    assert caught.value.reason is Reason.INVALID_DOCUMENT
    assert words in caught.value.detail
    assert "\n" not in caught.value.detail


def test_people_read_the_name_and_every_number() -> None:
    server = {"strategy": "fedyogi", "learning_rate": 0.05, "momentum": 0.8, "averaging": "tail", "averaging_rounds": 2}
    assert strategy_in_words(make_study("none", server=server).document) == (
        "FedYogi (learning rate 0.05, momentum 0.8, second moment 0.99, adaptivity 0.001, "
        "publishes an average (tail, 2 rounds))"
    )
    assert len({one.title for one in STRATEGIES.values()}) == len(STRATEGIES)
