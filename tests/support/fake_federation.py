"""The real aggregator in this process with fake pods and hospitals around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from services.aggregator.service import Aggregator
from tests.support.aggregator_world import World, make_world, until
from tests.support.fake_hospital import FakeHospital
from tests.support.fake_pod import FakePod

NAMES = ("alice", "bob", "carol", "dave")


class Federation:
    def __init__(self, world: World, running: Aggregator) -> None:
        self.world, self.running = world, running
        self.pods = {pod.id: FakePod(world, pod.id) for pod in world.documents.charter.roster.pods}
        self.hospitals: dict[str, FakeHospital] = {}

    def join(self, *names: str, auto: bool = True) -> None:
        for name in names:
            self.hospitals[name] = FakeHospital(self.world, name, auto=auto)

    @property
    def state(self) -> Any:
        return self.running.coordinator.snapshot.state

    def stop(self) -> None:
        for member in (*self.hospitals.values(), *self.pods.values()):
            member.stop()
        self.running.stop(0.2)


@contextmanager
def federation(folder: Path, **options: Any) -> Iterator[Federation]:
    world = make_world(folder, **options)
    whole = Federation(world, world.start())
    try:
        # A pod that goes live late misses the first round, and a piece may then have too few holders for a majority.
        until(lambda: len(whole.running.coordinator.snapshot.live) == len(whole.pods), why="every pod is live")
        yield whole
    finally:
        whole.stop()


def over(number: int) -> Any:
    return lambda now: now.closed_round >= number


def vector_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data[8 + int.from_bytes(data[:8], "little") :], "<f4")


def expected(
    whole: Federation, start: np.ndarray, members: tuple[str, ...], number: int, attempt: int = 1
) -> np.ndarray:
    """The next model from plain integers: old + sum / (n · 2^f)."""
    sent = [whole.hospitals[name].sent[number, attempt]["parameter"] for name in members]
    bits = whole.running.coordinator.run.table.lane_class("parameter").fraction_bits
    return (start.astype(np.float64) + np.sum(sent, axis=0) / 2.0**bits / len(members)).astype(np.float32)
