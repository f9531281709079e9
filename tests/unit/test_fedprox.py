"""FedProx at the hospital (Li et al. 2020, arXiv:1812.06127): the formula, what it costs (nothing), what is refused."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.common.documents.costs import study_events
from services.common.documents.shape import check_study
from services.common.documents.strategies import strategy_in_words
from services.common.errors import Reason, ServiceError
from services.hospital_node.architectures import build
from services.hospital_node.dataset import Dataset
from services.hospital_node.gradients import gradients
from services.hospital_node.inputs import open_inputs
from services.hospital_node.models import initial_vector, load_vector
from services.hospital_node.release import whole_study
from services.hospital_node.training import Compute, Task, discard_progress, open_device, train_round
from tests.support.documents import make_documents, make_study
from tests.support.sites import small_site, small_study

ONE_CORE = Compute(device="cpu", threads=1)
RATE, MOMENTUM, STEPS = 0.2, 0.5, 3


def counted_keys() -> Callable[[], bytes]:
    """A reproducible stand-in for the operating system."""
    numbers = itertools.count()
    return lambda: next(numbers).to_bytes(32, "big")


def study_with(mechanism: str, proximal: float) -> Any:
    training = {"learning_rate": RATE, "momentum": MOMENTUM, "proximal": proximal, "local_steps": STEPS}
    return small_study(mechanism, training=training, privacy={"steps_per_round": STEPS})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("site")
    return small_site(folder / "data", folder / "state")


def trained(site: Dataset, study: Any, progress: Path) -> np.ndarray:
    task, start = Task(bytes(32), 1, bytes(32)), initial_vector(study.model, 1)
    found = train_round(
        start, site, study, task, progress=progress, keys=counted_keys(), should_stop=lambda: False, compute=ONE_CORE
    )
    assert found is not None
    discard_progress(progress)
    return found.delta


def fedprox(site: Dataset, plain: Any, proximal: float) -> list[float]:
    """The paper's local objective h(w) = F(w) + μ/2·|w − w_t|² by SGD with momentum, in plain Python.

    ∇F comes from the study WITHOUT the term, so under `local` its clip and its noise know nothing of μ.
    """
    module = build(plain.model).train()
    start = [float(number) for number in initial_vector(plain.model, 1)]
    load_vector(module, np.array(start, np.float32))
    inputs = open_inputs(site, plain.model, open_device(ONE_CORE), None)
    gradient_of, steps = gradients(module, inputs, site, plain, counted_keys())
    assert steps == STEPS
    weights, velocity = list(start), [0.0] * len(start)
    for _ in range(steps):
        load_vector(module, np.array(weights))
        gradient = gradient_of()[0].tolist()
        for i, (w, w_t) in enumerate(zip(weights, start, strict=True)):
            velocity[i] = MOMENTUM * velocity[i] + gradient[i] + proximal * (w - w_t)
            weights[i] = w - RATE * velocity[i]
    return [w - w_t for w, w_t in zip(weights, start, strict=True)]


@pytest.mark.parametrize("mechanism", ["none", "local"])
def test_the_proximal_gradient_is_added_to_the_gradient_after_its_noise(
    site: Dataset, tmp_path: Path, mechanism: str
) -> None:
    found = trained(site, study_with(mechanism, 1.5), tmp_path)
    assert np.allclose(found, fedprox(site, study_with(mechanism, 0.0), 1.5), rtol=0, atol=1e-9)
    assert not np.allclose(found, trained(site, study_with(mechanism, 0.0), tmp_path), rtol=0, atol=1e-4)


def test_a_stronger_pull_stays_closer_to_the_global_model(site: Dataset, tmp_path: Path) -> None:
    norms = [float(np.linalg.norm(trained(site, study_with("none", mu), tmp_path))) for mu in (0.0, 1.0, 4.0)]
    assert norms == sorted(norms, reverse=True)


def test_under_local_it_costs_no_privacy() -> None:
    """Post-processing of noised steps: the same events, debits and noise, whatever μ is."""
    charter = make_documents().charter
    plain, pulled = (
        make_study("local", privacy={"steps_per_round": 3}, training={"proximal": mu}) for mu in (0.0, 2.0)
    )
    assert study_events(plain.document) == study_events(pulled.document)
    without, with_it = whole_study(charter, plain), whole_study(charter, pulled)
    assert [replace(debit, study="") for debit in without] == [replace(debit, study="") for debit in with_it]


REFUSED = [
    ("shared", "every gradient is taken at that model, where the pull is zero: remove it"),
    ("local", "privacy.steps_per_round is 1"),
    ("none", "training.local_steps is 1"),
]


@pytest.mark.parametrize(("mechanism", "words"), REFUSED)
def test_a_pull_that_is_always_zero_is_refused(mechanism: str, words: str) -> None:
    study = make_study(mechanism, training={"proximal": 0.1})
    with pytest.raises(ServiceError) as caught:
        check_study(make_documents().charter, study)
    assert caught.value.reason is Reason.INVALID_DOCUMENT
    assert words in caught.value.detail
    assert "\n" not in caught.value.detail


def test_people_read_it() -> None:
    study = make_study("none", training={"proximal": 0.1, "local_steps": 4})
    check_study(make_documents().charter, study)
    assert strategy_in_words(study.document) == "FedAvg (learning rate 1); FedProx at the hospitals (μ 0.1)"
