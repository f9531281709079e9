"""A yes is given again while nothing that it follows from has changed, and only then (privacy.md L-1, L-2)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import Reason
from services.hospital_node import consent
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_site import Site
from tests.support.hospital_world import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), 5_000)


@pytest.fixture
def site(world: World, aggregator: FakeAggregator, tmp_path: Path) -> Iterator[Site]:
    made = Site(world, aggregator, tmp_path / "alice", aggregator.address)
    yield made
    made.close()


def test_l2_a_second_draw_in_a_round_is_held_against_the_budget(aggregator: FakeAggregator, site: Site) -> None:
    """The round was consented to while its vector was there and paid for; that is no yes to a new one."""
    own, world = site.participation.consent, site.world
    policy = site.participation._consents.policy()
    one = own.projection(policy, world.charter, world.study, 1, world.initial).dataset_after
    world.write_policy(site.folder / "policy.yaml", dataset_epsilon=one * 1.001)  # one vector, and no second
    aggregator.open_round(1)
    first = aggregator.collect()
    site.step()
    assert site.debits() == 1
    aggregator.collect(2)
    assert site.refusal().reason is Reason.BURNED  # consented to, but it may not be sent again yet
    aggregator.abandon(first)
    aggregator.collect(2)
    for blob in (site.store.blobs.folder / "blobs").iterdir():
        blob.unlink()
    assert site.refusal().reason is Reason.BUDGET_EXHAUSTED
    assert site.trainer.lines().count("train 1") == 1
    assert site.debits() == 1


def test_a_policy_that_changed_in_the_round_is_obeyed(aggregator: FakeAggregator, site: Site) -> None:
    aggregator.open_round(1)
    site.step()
    site.world.write_policy(site.folder / "policy.yaml", minimum_cohort=4)
    aggregator.collect()
    assert site.refusal().reason is Reason.POLICY_REFUSES


def test_what_a_round_costs_is_worked_out_once(
    aggregator: FakeAggregator, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    decide = consent.decide
    monkeypatch.setattr(consent, "decide", lambda *of: asked.append(of[3].round) or decide(*of))
    aggregator.open_round(1)
    site.step()
    aggregator.collect()
    site.step()
    assert site.debits() == 1
    assert asked == [1]
