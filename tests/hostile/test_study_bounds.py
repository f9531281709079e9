"""Figures of a study outside sense, and a claim that does not hold: refused in one sentence, by every hospital too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common.documents.study import load_study
from services.common.errors import Reason, ServiceError
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_site import Site
from tests.support.hospital_world import SHARED, World, make_world, study_document, yaml

_NAN, _INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("noise_multiplier", value) for value in (-1.0, _NAN, _INFINITE)),
        *(("delta", value) for value in (0.0, -1e-5, 1e-2, 1.0, _NAN)),
        *(("epsilon", value) for value in (0.0, -1.0, _NAN, _INFINITE)),
        *(("sampling_rate", value) for value in (0.0, -0.1, 1.0001, _NAN)),
        *(("clip", value) for value in (0.0, -1.0, _NAN, _INFINITE)),
        *(("scale_bits", value) for value in (7, 31, -1, 18.5)),
        *(("expected_batch", value) for value in (0.0, -1.0, _INFINITE)),
        *(("steps_per_round", value) for value in (0, -1)),
    ],
)
def test_figures_outside_sense_are_refused_by_name(field: str, value: float) -> None:
    document = study_document(5_000, privacy={field: value})
    text = yaml(document).replace("NaN", ".nan").replace("-Infinity", "-.inf").replace("Infinity", ".inf")
    with pytest.raises(ServiceError) as refused:
        load_study(text.encode())
    assert refused.value.reason is Reason.INVALID_DOCUMENT
    assert f"privacy.{field}" in refused.value.detail
    assert "\n" not in refused.value.detail


@pytest.fixture
def hospital(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[World, Site]]:
    """A hospital whose own policy would allow everything; the study's sections are the parameter."""
    sections: dict[str, Any] = request.param
    world = make_world(tmp_path / "world", 5_000, **sections)
    aggregator = FakeAggregator(world)
    policy = {"mechanisms": ["local", "shared"], "epsilon": 100.0, "dataset_epsilon": 100.0, "minimum_cohort": 2}
    site = Site(world, aggregator, tmp_path / "alice", aggregator.start(), **policy, colluding_hospitals=0)
    yield world, site
    site.close()
    aggregator.stop()


FALSE_CLAIM = {"privacy": {"noise_multiplier": 0.7}}
K_0 = {**SHARED, "cohort": {"minimum": 3, "colluding_hospitals": 0}}
LARGE_DELTA = {**SHARED, "privacy": {**SHARED["privacy"], "patients": {"alice": 20_000, "bob": 100}}}


@pytest.mark.parametrize(
    ("hospital", "words"),
    [
        (FALSE_CLAIM, "claims 8, but its parameters give"),
        (K_0, "does not hold against a fellow hospital, which knows its own share of the noise: against one it is"),
        (LARGE_DELTA, "above 1/(10·N)"),
    ],
    indirect=["hospital"],
    ids=["a claim that its parameters do not give", "k = 0", "delta above 1/(10N)"],
)
def test_a_hospital_refuses_the_study_before_it_fetches_a_model(hospital: tuple[World, Site], words: str) -> None:
    """Whatever the aggregator let pass, and whatever the hospital's own policy would allow."""
    _, site = hospital
    site.aggregator.open_round(1)
    refused = site.refusal()
    assert refused.reason is Reason.INVALID_DOCUMENT
    assert words in refused.detail
    assert "model" not in site.aggregator.calls
    assert site.debits() == 0
