"""A hospital's control variate over rounds that count it, leave it out and are rejected (SCAFFOLD, Algorithm 1)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.common.errors import Reason
from services.common.secagg.messages import OUTCOME_REJECTED
from services.common.secagg.signing import digest
from services.hospital_node.control import own_control
from tests.support.consortium import derive
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_site import Site, lanes_of
from tests.support.hospital_world import World, make_world
from tests.support.kill_every_write import NOT_PRIVATE, STUDIES

PARAMETERS = 1000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), PARAMETERS, **STUDIES["scaffold"])


@pytest.fixture
def site(world: World, aggregator: FakeAggregator, tmp_path: Path) -> Iterator[Site]:
    made = Site(world, aggregator, tmp_path / "alice", aggregator.address, mechanisms=["none"], **NOT_PRIVATE)
    yield made
    made.close()


def submit(site: Site, number: int) -> np.ndarray:
    """Take part in round `number`; the change of the control variate that was sent, opened with the pods' keys."""
    aggregator = site.aggregator
    aggregator.open_round(number)
    aggregator.collect()
    site.step()
    table = aggregator.manifests[1].table
    bits = table.lane_class("control").fraction_bits
    return lanes_of(aggregator, aggregator.submissions()[-1], "control") / 2.0**bits


def end(site: Site, *, counted: bool, **changes: object) -> np.ndarray | None:
    header = digest("header", site.aggregator.submissions()[-1].header.blob)
    members = {"bob": derive("bob"), "carol": derive("carol"), "dave": derive("dave")}
    site.aggregator.finish(
        site.aggregator.manifests[1], {"alice": header, **members} if counted else members, **changes
    )
    site.step()
    return own_control(site.store, site.world.study)


def test_it_moves_by_what_was_sent_and_only_where_the_sum_counts_it(site: Site) -> None:
    own = own_control(site.store, site.world.study)
    assert own is not None
    assert not own.any()
    sent = submit(site, 1)
    assert np.array_equal(own_control(site.store, site.world.study), own)  # sent is not counted
    own = end(site, counted=True)
    assert own == pytest.approx(sent)
    assert own.any()
    submit(site, 2)
    assert np.array_equal(end(site, counted=False), own)
    site.reopen()
    again = submit(site, 3)
    assert np.array_equal(end(site, counted=True, outcome=OUTCOME_REJECTED), own)
    assert again == pytest.approx((0.125 + own) / 4, abs=1e-6)  # the trainer was given c_i


def test_a_damaged_one_is_refused_before_anything_leaves(site: Site) -> None:
    submit(site, 1)
    end(site, counted=True)
    (blob,) = (site.store.blobs.folder / "blobs").iterdir()
    blob.write_bytes(blob.read_bytes()[:-4])
    site.aggregator.open_round(2)
    refusal = site.refusal()
    assert refusal.reason is Reason.STORAGE
    assert "control variate" in refusal.detail
