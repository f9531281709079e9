"""Server steps that keep something beside the model, over whole rounds, also killed in one (privacy.md §5)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.aggregator import facts as f
from services.aggregator.store import Store
from services.aggregator.strategy import Scalars, server_step
from services.common.documents.shape import round_shape
from tests.support.aggregator_world import World, make_world, model_bytes
from tests.support.fake_federation import NAMES, federation, over, vector_of
from tests.support.fake_hospital import FakeHospital
from tests.support.fake_pod import FakePod

ROUNDS = 4
ADAM = {"strategy": "adam", "learning_rate": 0.5, "momentum": 0.9, "averaging": "tail", "averaging_rounds": 2}
STUDY: dict[str, Any] = {
    "privacy": {"sampling_rate": 1.0, "noise_multiplier": 4.0, "expected_batch": 1.0, "scale_bits": 18},
    "server": ADAM,
}
YOGI: dict[str, Any] = {
    "server": {"strategy": "fedyogi", "learning_rate": 0.5, "momentum": 0.9, "adaptivity": 0.1}
}  # of updates, so without `shared`
SCAFFOLD: dict[str, Any] = {
    "server": {"strategy": "scaffold", "learning_rate": 0.5},
    "encoding": {"update_bound": 1000.0, "update_clip": 1e6, "control_bound": 1.0, "control_clip": 1e6},
}
KEEPING = {"adam": ("shared", STUDY), "fedyogi": ("none", YOGI), "scaffold": ("none", SCAFFOLD)}


def expected_models(world: World, hospitals: dict[str, FakeHospital]) -> list[np.ndarray]:
    """The models after each round, from the plain integers that the hospitals sent."""
    lane = round_shape(world.documents.charter, world.study, 1).table.lane_class("parameter")
    if world.study.document.server.strategy == "scaffold":
        return scaffold_models(world, hospitals)
    model, scalars, kept, found = vector_of(model_bytes(50)), Scalars(), None, []
    for number in range(1, ROUNDS + 1):
        attempt = max(attempt for at, attempt in hospitals["alice"].sent if at == number)
        sums = np.sum([hospitals[name].sent[number, attempt]["parameter"] for name in NAMES], axis=0)
        step = server_step(world.study.document, number, len(NAMES), lane.fraction_bits, scalars)
        kept = np.zeros((step.slots, 50)) if kept is None else kept
        model, scalars = step.run(model, kept, sums), step.scalars
        found.append(model)
    return found


def scaffold_models(world: World, hospitals: dict[str, FakeHospital]) -> list[np.ndarray]:
    """x and behind it c after each round, from plain integers; the last round publishes x alone."""
    table = round_shape(world.documents.charter, world.study, 1).table
    x, c, found = vector_of(model_bytes(50)).astype(np.float64), np.zeros(50), []
    for number in range(1, ROUNDS + 1):
        attempt = max(attempt for at, attempt in hospitals["alice"].sent if at == number)
        sums = {
            name: np.sum([one.sent[number, attempt][name] for one in hospitals.values()], axis=0)
            / 2.0 ** table.lane_class(name).fraction_bits
            for name in ("parameter", "control")
        }
        x = (x + 0.5 * sums["parameter"] / len(hospitals)).astype(np.float32).astype(np.float64)
        c = (c + sums["control"] / len(NAMES)).astype(np.float32).astype(np.float64)
        found.append((x if number == ROUNDS else np.concatenate([x, c])).astype(np.float32))
    return found


def test_scaffold_divides_by_the_cohort_and_by_all_hospitals(tmp_path: Path) -> None:
    """Three of four take part: x moves by their mean, c by their sum over all four; every file is the digest's."""
    with federation(tmp_path, rounds=ROUNDS, study={**SCAFFOLD, "timing": {"submit_seconds": 6.0}}) as whole:
        whole.join(*NAMES[:3])
        alice = whole.hospitals["alice"]
        alice.wait_for(over(ROUNDS), seconds=120)
        models = scaffold_models(whole.world, whole.hospitals)
        facts = whole.running.store.facts(whole.world.study.digest)
        concluded = [fact for fact in facts if isinstance(fact, f.Concluded)]
        assert len(models[0]) == 100
        assert models[0][50:].any()
        for fact, model in zip(concluded, models, strict=True):
            assert np.allclose(vector_of(whole.running.store.blobs.path(fact.model).read_bytes()), model, rtol=1e-6)
        assert len(alice.fetch_model(concluded[0].model)) > 8 * 50  # hospitals get both under one digest


def test_every_model_follows_from_the_sums_and_the_last_one_is_the_average(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=ROUNDS, mechanism="shared", study=STUDY) as whole:
        whole.join(*NAMES)
        alice = whole.hospitals["alice"]
        alice.wait_for(over(ROUNDS), seconds=60)
        models = expected_models(whole.world, whole.hospitals)
        assert np.array_equal(vector_of(alice.fetch_model(whole.state.model)), models[-1])
        concluded = [
            fact for fact in whole.running.store.facts(whole.world.study.digest) if isinstance(fact, f.Concluded)
        ]
        for fact, model in zip(concluded, models, strict=True):
            assert np.array_equal(vector_of(whole.running.store.blobs.path(fact.model).read_bytes()), model)
        newest = concluded[-1].kept
        assert whole.running.store.blobs.has(newest)
        assert not any(whole.running.store.blobs.has(fact.kept) for fact in concluded[:-1])  # no step starts from them


@pytest.mark.parametrize(
    ("place", "strategy"),
    [("before", "adam"), ("between", "adam"), ("after", "adam"), ("between", "fedyogi"), ("after", "scaffold")],
)
def test_kill_minus_9_while_it_concludes_loses_no_optimiser_state(tmp_path: Path, place: str, strategy: str) -> None:
    """Killed before, between and after the writes of the new model and what is kept beside it: the same models."""
    mechanism, study = KEEPING[strategy]
    world = make_world(tmp_path, rounds=ROUNDS, mechanism=mechanism, study=study)
    world.config |= {"patience_seconds": 120, "grace_seconds": 60}  # pods come back when they will: no round stalls
    service = world.spawn("tests.support.killed_aggregator", {"KILL_PLACE": place, "KILL_ROUND": "2"})
    pods = {pod.id: FakePod(world, pod.id) for pod in world.documents.charter.roster.pods}
    hospitals = {name: FakeHospital(world, name) for name in NAMES}
    try:
        assert service.process is not None
        assert service.process.wait(60) == -9
        service = world.spawn()
        hospitals["alice"].wait_for(over(ROUNDS), seconds=180)
    finally:
        for member in (*hospitals.values(), *pods.values()):
            member.stop()
        service.kill()
    store = Store(tmp_path / "state")
    concluded = [fact for fact in store.facts(world.study.digest) if isinstance(fact, f.Concluded)]
    models = expected_models(world, hospitals)
    assert len(concluded) == ROUNDS
    for fact, model in zip(concluded, models, strict=True):
        assert np.array_equal(vector_of(store.blobs.path(fact.model).read_bytes()), model)
    store.close()
