"""Counts of one evaluation, against counting by hand."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.hospital_node.dataset import Dataset
from services.hospital_node.evaluation import count, evaluate, patient_probabilities
from services.hospital_node.models import initial_vector
from services.hospital_node.training import Compute
from tests.support.sites import small_site, small_study


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("site")
    return small_site(folder / "data", folder / "state", extra_image_every=1)


def test_counts_of_three_patients() -> None:
    shares = np.array([[0.7, 0.2, 0.1], [0.05, 0.35, 0.6], [0.0, 0.0, 1.0]])
    found = count(shares, np.array([0, 1, 2]), 4)
    assert found.hits.tolist() == [1, 0, 1]
    assert found.totals.tolist() == [1, 1, 1]
    assert found.confusion.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert found.histogram.tolist() == [
        [[2, 0, 0, 0], [0, 0, 1, 0]],
        [[2, 0, 0, 0], [0, 1, 0, 0]],
        [[1, 0, 1, 0], [0, 0, 0, 1]],
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda c: st.tuples(
            st.lists(st.lists(st.floats(0, 1), min_size=c, max_size=c), min_size=1, max_size=20), st.integers(0, c - 1)
        )
    ),
    st.integers(4, 30),
)
def test_a_patient_touches_one_plus_classes_tables(case: tuple[list[list[float]], int], bins: int) -> None:
    """privacy.md §6: with and without one patient the tables differ by exactly one cell each, by one."""
    rows, label = case
    shares = np.array(rows)
    labels = np.full(len(rows), label)
    whole, rest = count(shares, labels, bins), count(shares[1:], labels[1:], bins)
    assert np.abs(whole.confusion - rest.confusion).sum() == 1
    assert np.abs(whole.histogram - rest.histogram).sum((1, 2)).tolist() == [1] * shares.shape[1]
    assert np.abs(whole.hits - rest.hits).sum() + np.abs(whole.totals - rest.totals).sum() in (1, 2)
    assert whole.totals.sum() == len(rows)


def test_not_a_number_votes_too() -> None:
    """A broken score changes where a patient is counted, never whether."""
    found = count(np.full((2, 3), np.nan), np.array([1, 2]), 5)
    assert found.confusion.sum() == 2
    assert found.histogram.sum() == 6


def test_a_patient_votes_once_with_the_mean_of_its_images(site: Dataset) -> None:
    study = small_study(training={"micro_batch": 3})
    vector = initial_vector(study.model, 1) + 0.05
    fold = site.fold("test")
    assert all(votes.size == 2 for votes in fold.votes)
    found = evaluate(vector, site, "test", study, Compute(threads=1))
    assert found.totals.sum() == len(fold)
    assert found.histogram.sum() == 2 * len(fold)
    mean = patient_probabilities(vector, site, "test", study)
    assert np.allclose(mean.sum(1), 1)
    other = patient_probabilities(vector, site, "test", small_study(training={"micro_batch": 64}))
    assert np.allclose(mean, other, atol=1e-5)


def test_an_empty_split_counts_nobody(tmp_path: Path) -> None:
    data = small_site(tmp_path / "data", tmp_path / "state", patients=4)
    study = small_study()
    found = evaluate(initial_vector(study.model, 1), data, "test", study)
    assert len(data.fold("test")) == 0
    assert found.totals.tolist() == [0, 0]
    assert found.histogram.sum() == 0
