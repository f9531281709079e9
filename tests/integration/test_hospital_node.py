"""The hospital's loop over real connections: what it tells, what it keeps to itself, and one real training."""

import logging
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from services.cli.synthetic import write_sites
from services.common.errors import Reason
from services.common.secagg.signing import digest
from services.hospital_node import metrics
from services.hospital_node.architectures import build
from services.hospital_node.models import layout, size, write_model_file
from services.hospital_node.node import Node
from services.hospital_node.trainer import SiteTrainer
from services.hospital_node.training import Compute
from tests.support.consortium import derive
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_site import Site, lanes_of
from tests.support.hospital_world import World, make_world

D = 5_000
FOLDER = Path(__file__).parents[2] / "services" / "hospital_node"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), D)


class Loop:
    """A node at work in a thread of this process."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.phases: list[str] = []
        self.node = Node(
            site.participation,
            site.client,
            site.participation._consents,
            lambda progress: self.phases.append(progress.phase),
        )
        self.thread = threading.Thread(target=self.node.run)

    def __enter__(self) -> "Loop":
        self.thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.node.stop()
        self.thread.join(30)
        self.site.store.close()


def test_policy_refusal_is_told_with_its_reason_and_mended_without_restart(
    world: World, aggregator: FakeAggregator, tmp_path: Path
) -> None:
    """The aggregator learns that, not why in words; a mended policy takes effect at the next look."""
    site = Site(world, aggregator, tmp_path / "alice", aggregator.address, studies=[])
    aggregator.open_round(1)
    with Loop(site):
        aggregator.wait(lambda: aggregator.declined == [(1, "POLICY_REFUSES")])
        assert "model" not in aggregator.calls
        world.write_policy(site.folder / "policy.yaml")
        aggregator.collect()
        aggregator.wait(lambda: bool(aggregator.submissions()))
    assert aggregator.declined == [(1, "POLICY_REFUSES")]


def test_p6_failed_training_is_silent(world: World, aggregator: FakeAggregator, tmp_path: Path) -> None:
    """P-6: a round that fails because of the data sends nothing, counts nothing, and is not tried again."""
    site = Site(world, aggregator, tmp_path / "alice", aggregator.address)
    site.trainer.value = float("nan")
    before = metrics._REFUSALS.labels(Reason.NOT_FINITE.value)._value.get()
    aggregator.open_round(1)
    with Loop(site) as loop:
        aggregator.wait(lambda: "waiting" in loop.phases)
        aggregator.collect()
        aggregator.collect(2)
        aggregator.publish(phase_ends=1)
        aggregator.publish(phase_ends=2)
    assert aggregator.opened == []
    assert aggregator.declined == []
    assert site.trainer.lines().count("train 1") == 1
    assert metrics._REFUSALS.labels(Reason.NOT_FINITE.value)._value.get() == before


@pytest.mark.parametrize("step", ["model-fetched", "trained", "masked", "debited"])
def test_a_fault_of_the_program_declines_the_round_unless_it_may_follow_from_images(
    world: World, aggregator: FakeAggregator, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    """The aggregator need not wait for the deadline; P-6: of work on images it is told nothing, and when neither."""
    site = Site(world, aggregator, tmp_path / "alice", aggregator.address)

    def broken(name: str) -> None:
        if name == step:
            raise ZeroDivisionError("a fault planted at " + step)

    site.reopen(checkpoint=broken)
    aggregator.open_round(1)
    aggregator.collect()
    with Loop(site) as loop:
        if step == "trained":
            aggregator.wait(lambda: "refused" in loop.phases, 60)
        else:
            aggregator.wait(lambda: aggregator.declined == [(1, "INTERNAL")], 60)
    assert aggregator.declined == ([] if step == "trained" else [(1, "INTERNAL")])
    assert aggregator.submissions() == []
    (fault,) = [record for record in caplog.records if record.exc_info]
    assert "a fault planted at " + step in str(fault.exc_info and fault.exc_info[1])


def test_p6_what_leaves_beside_y_does_not_depend_on_the_data(
    world: World, aggregator: FakeAggregator, tmp_path: Path
) -> None:
    """P-6: two sites with other data make the same calls with messages of the same sizes; only y's content differs."""
    seen = []
    for name, value in (("one", 0.125), ("two", -0.9)):
        fake = FakeAggregator(world)
        site = Site(world, fake, tmp_path / name, fake.start())
        site.trainer.value = value
        try:
            fake.open_round(1)
            site.step()
            fake.collect()
            site.step()
            (arrived,) = fake.submissions()
            sizes = [len(arrived.header.blob), *map(len, arrived.boxes), *map(len, arrived.chunks)]
            seen.append((fake.calls, sizes))
        finally:
            site.close()
            fake.stop()
    assert seen[0] == seen[1]


def test_what_came_with_the_state_is_not_asked_for(world: World, aggregator: FakeAggregator, tmp_path: Path) -> None:
    """But a manifest is asked for after a training: its attempt may be over by then."""
    site = Site(world, aggregator, tmp_path / "alice", aggregator.address)
    aggregator.sends_along = True
    for number in (1, 2):
        aggregator.open_round(number)
        site.step()
        checked = aggregator.collect()
        site.step()
        header = digest("header", aggregator.submissions()[-1].header.blob)
        others = {name: derive("header", name) for name in ("bob", "carol")}
        aggregator.finish(checked, {"alice": header, **others})
    site.step()
    assert site.store.chain(world.study.digest).round == 2
    assert {"manifest", "results"}.isdisjoint(aggregator.calls)
    aggregator.open_round(3)
    aggregator.collect()
    site.step()
    assert aggregator.calls.count("manifest") == 1
    assert len(aggregator.submissions()) == 3
    site.close()


def test_round_that_ends_stops_the_training_of_it(world: World, aggregator: FakeAggregator, tmp_path: Path) -> None:
    site = Site(world, aggregator, tmp_path / "alice", aggregator.address)
    began, stopped = threading.Event(), threading.Event()

    class Slow(type(site.trainer)):  # type: ignore[misc]  # the class of the fixture
        def train(self, study, round_number, model, model_digest, should_stop, control):  # type: ignore[no-untyped-def]
            began.set()
            while not should_stop():
                stopped.wait(0.01)
            stopped.set()

    site.participation._trainer = Slow(tmp_path / "log")
    aggregator.open_round(1)
    with Loop(site):
        assert began.wait(30)
        aggregator.open_round(2)
        assert stopped.wait(30)


def test_p8_no_generator_of_numpy_or_torch_in_participation() -> None:
    """P-8: seeds, noise keys and names come from `secrets`; only the retry waits of the loop use another class."""
    for file in FOLDER.glob("*.py"):
        if file.name in {"models.py", "backbones.py", "architectures.py"}:  # public initial weights only
            continue
        text = file.read_text()
        assert not re.search(
            r"np\.random|numpy\.random|torch\.(rand|manual_seed|normal|Generator)|import random", text
        ), file


def test_real_training_under_local_noise_goes_through_a_round(
    world: World, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Images on disk → Opacus gradients → own noise → lanes: what is opened is a finite, non-zero update."""
    caplog.set_level(logging.INFO)
    model = {"architecture": "small-cnn", "image_size": 28, "classes": ["nevus", "melanoma"]}
    write_sites(tmp_path / "data", ("alice",), patients=40)
    classes = _classes(tmp_path / "data" / "alice" / "metadata.csv")
    section = {**model, "classes": classes, "parameters": 1, "initial": "0" * 64}
    from services.common.documents.study import ModelSection

    module = build(ModelSection.model_validate({**section, "classes": tuple(classes)}))
    shapes = layout(module)
    path = tmp_path / "v0.safetensors"
    generator = np.linspace(-0.1, 0.1, size(shapes), dtype=np.float32)
    initial = write_model_file(path, shapes, generator)
    real = make_world(
        tmp_path_factory.mktemp("real"),
        size(shapes),
        model={**section, "parameters": size(shapes), "initial": initial.hex()},
        evaluation={"gate_rounds": [1]},
    )
    real.models[initial] = path.read_bytes()
    fake = FakeAggregator(real)
    site = Site(real, fake, tmp_path / "alice", fake.start())
    site.participation._trainer = SiteTrainer(tmp_path / "data" / "alice", tmp_path / "alice" / "state", Compute("cpu"))
    try:
        fake.open_round(1)
        site.step()
        fake.collect()
        site.step()
        (arrived,) = fake.submissions()
        lane = fake.manifests[1].table.lane_class("parameter")
        update = lanes_of(fake, arrived, "parameter") / 2.0**lane.fraction_bits
        assert 0 < np.abs(update).max() <= 1.0
        assert len(lanes_of(fake, arrived, "gate")) == 2 * len(classes)
        assert [debit.split for debit in site.participation.ledger.debits()] == ["train", "validation"]
    finally:
        site.close()
        fake.stop()


def _classes(table: Path) -> list[str]:
    lines = [line.split(",") for line in table.read_text().splitlines()]
    column = next(i for i, name in enumerate(lines[0]) if name in ("dx", "label"))
    return sorted({line[column] for line in lines[1:]})
