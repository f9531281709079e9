"""One hospital's participation in this process, over a real connection to the fake aggregator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from services.common.clock import Clock, SystemClock
from services.common.errors import ServiceError
from services.common.ids import Role
from services.common.rpc.dialing import open_caller
from services.common.secagg.encoding import decode_class
from services.common.store.blobs import BlobStore
from services.hospital_node.__main__ import own_signer
from services.hospital_node.client import AggregatorClient, round_state
from services.hospital_node.config import SiteDocuments, load_config
from services.hospital_node.participate import Participation
from services.hospital_node.store import Store
from tests.support.fake_aggregator_for_hospitals import Arrived, FakeAggregator
from tests.support.hospital_world import FixedTrainer, World


class Site:
    """A hospital that a test drives step by step; `step` = look at the aggregator's claim once."""

    def __init__(self, world: World, aggregator: FakeAggregator, folder: Path, address: str, **policy: Any) -> None:
        self.world = world
        self.aggregator = aggregator
        self.folder = folder
        self.config = load_config(world.write_site(folder, address, **policy))
        self.trainer = FixedTrainer(folder / "trainer.log")
        self.clock: Clock = SystemClock()
        self.open()

    def open(self, checkpoint: Callable[[str], None] = lambda name: None) -> None:
        """A new life of the process."""
        documents = SiteDocuments(self.config)
        charter = next(iter(documents.charters().values()))
        state = Path(self.config.state)
        self.client = AggregatorClient(open_caller(self.config, Role.HOSPITAL, charter, SystemClock()))
        self.store = Store(state)
        self.participation = Participation(
            self.config.id,
            own_signer(self.config.identity_key, charter, self.config.id),
            documents,
            client=self.client,
            store=self.store,
            models=BlobStore(state / "models"),
            trainer=self.trainer,
            clock=self.clock,
            checkpoint=checkpoint,
        )

    def close(self) -> None:
        self.client.close()
        self.store.close()

    def reopen(self, **more: Any) -> None:
        self.close()
        self.open(**more)

    def step(self) -> None:
        self.participation.advance(round_state(self.aggregator.state))

    def refusal(self) -> ServiceError:
        """What the present claim is refused with; nothing may leave."""
        before = len(self.aggregator.opened)
        try:
            self.step()
        except ServiceError as error:
            assert len(self.aggregator.opened) == before
            return error
        raise AssertionError("nothing was refused")

    def debits(self) -> int:
        return len(self.participation.ledger.debits())


def lanes_of(aggregator: FakeAggregator, arrived: Arrived, name: str) -> np.ndarray:
    """The values that were hidden in one class of lanes, opened with the pods' keys."""
    checked = next(m for m in aggregator.manifests.values() if arrived.header.blob.find(m.M) >= 0)
    packed = aggregator.open_vector(arrived, checked)
    first, end = checked.table.lane_range(name)
    size = checked.table.ring.lane_bytes
    return decode_class(checked.table, name, packed[first * size : end * size])
