"""What the tests of one hospital share: an aggregator that does what it is told, for the `world` of the module."""

from collections.abc import Iterator

import pytest

from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_world import World


@pytest.fixture
def aggregator(world: World) -> Iterator[FakeAggregator]:
    fake = FakeAggregator(world)
    fake.start()
    yield fake
    fake.stop()
