"""L-3 under `shared`: when the others fail, what was sent counts with this hospital's own noise alone, at once."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.ledger import figures
from services.common.errors import Reason
from services.common.secagg.signing import digest
from tests.support.consortium import derive
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_site import Site
from tests.support.hospital_world import SHARED, World, make_world
from tests.support.ledgers import gaussian_epsilon

D = 4096


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), D, **SHARED)


@pytest.fixture
def site(world: World, tmp_path: Path) -> Iterator[Site]:
    aggregator = FakeAggregator(world)
    made = Site(world, aggregator, tmp_path / "alice", aggregator.start(), mechanisms=["shared"])
    yield made
    made.close()
    aggregator.stop()


def run_round(site: Site, number: int, *others: str) -> None:
    aggregator = site.aggregator
    aggregator.open_round(number)
    checked = aggregator.collect()
    site.step()
    header = digest("header", aggregator.submissions()[-1].header.blob)
    aggregator.finish(checked, {"alice": header, **{name: derive(name) for name in others}})


def test_cohort_below_the_minimum_counts_with_the_own_noise(world: World, site: Site) -> None:
    """Round 1 was honest; round 2 was opened over two hospitals: its event is the solo one, round 1's stays."""
    run_round(site, 1, "bob", "carol")
    site.step()
    honest = site.participation.consent.figures(world.study.digest)
    (first,) = site.participation.ledger.debits()
    together, alone = first.noise_multiplier, first.solo_event().noise_multiplier
    # n_min - k = 2 equal shares together: the own one is smaller by sqrt(2), but for the rounding up to whole units.
    assert alone == pytest.approx(together / math.sqrt(2), rel=1e-4)
    assert honest["epsilon_spent"] == pytest.approx(gaussian_epsilon(together, 1), rel=1e-3)
    assert honest["epsilon_solo"] == pytest.approx(gaussian_epsilon(alone, 1), rel=1e-3)

    run_round(site, 2, "bob")
    assert site.refusal().reason is Reason.CONFLICT
    told = site.participation.consent.figures(world.study.digest)
    mixed = 1 / math.sqrt(together**-2 + alone**-2)
    train = site.participation.ledger.account().splits(world.study.digest.hex())["train"]
    assert train == pytest.approx(gaussian_epsilon(mixed, 1), rel=1e-3)
    assert told["epsilon_spent"] >= train > gaussian_epsilon(together, 2)
    shown = figures(site.participation.ledger.account(), None)["studies"][0]
    assert shown["exposed_rounds"] == [2]
    assert shown["epsilon_by_split"]["train"] == pytest.approx(train, abs=1e-4)
    site.reopen()
    assert "stopped here" in site.refusal().detail


def test_larger_cohort_only_lowers_what_was_debited(site: Site) -> None:
    """The debit is at n_min and k, whoever else took part: nothing is added or given back."""
    run_round(site, 1, "bob", "carol", "dave")
    before = site.participation.ledger.mark()
    site.step()
    assert site.participation.ledger.mark() == before
    assert not site.participation.ledger.account().exposed
