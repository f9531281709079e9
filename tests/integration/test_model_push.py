"""A plan without its model waits for it, and an operator brings it over mTLS; nobody else, and nothing else."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.aggregator.config import load_config
from services.aggregator.service import CONDITIONS, Aggregator
from services.cli.__main__ import main
from services.cli.operator import CERTIFICATE, KEY
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.observe.http import Health
from tests.support.aggregator_world import CENTRE, World, make_world, model_bytes, plain_study, until
from tests.support.fake_federation import NAMES, Federation, over
from tests.support.proxy import LosesTheFirst
from wardround.admin.v1 import admin_pb2
from wardround.admin.v1.admin_pb2_grpc import PlanServiceStub

PARAMETERS = 50


@contextmanager
def waiting(folder: Path, **config: object) -> Iterator[tuple[Federation, Health]]:
    """A federation whose plan names a model that is nowhere yet."""
    world = make_world(folder, parameters=PARAMETERS, rounds=1)
    whole, health = begin(world, **config)
    try:
        whole.join(*NAMES)
        yield whole, health
    finally:
        whole.stop()


def begin(world: World, **config: object) -> tuple[Federation, Health]:
    running, health = start(world, **config)
    return Federation(world, running), health


def start(world: World, **config: object) -> tuple[Aggregator, Health]:
    health = Health(CONDITIONS)
    listen = {"listen": world.address} if world.address else {}
    found = load_config(world.write_config(**{"initial_model": None, **listen, **config}), {})
    running = Aggregator(found, health)
    world.address = f"127.0.0.1:{running.server.port}"
    health.start()
    return running, health


def push(world: World, digest: bytes, size: int, chunks: list[bytes], who: Role = Role.OPERATOR) -> str:
    caller = world.operator() if who is Role.OPERATOR else world.caller(who, "alice")
    first = admin_pb2.PushModelRequest(digest=digest, size=size)
    requests = iter([first, *(admin_pb2.PushModelRequest(chunk=chunk) for chunk in chunks)])
    try:
        return caller.upload(lambda c: PlanServiceStub(c).PushModel, requests, seconds=20).detail
    finally:
        caller.close()


def refusal(world: World, digest: bytes, size: int, chunks: list[bytes], who: Role = Role.OPERATOR) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        push(world, digest, size, chunks, who)
    return caught.value


def test_a_first_plan_waits_for_its_model_and_goes_on_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with waiting(tmp_path) as (whole, health):
        world = whole.world
        digest = world.study.document.model.initial
        until(lambda: digest in whole.running.coordinator.snapshot.waiting)
        ready, text = health.ready()
        assert ready, "readiness waits for no operator"
        assert f"waiting for the model {digest}: run wardround model push" in text
        assert REGISTRY.get_sample_value("wardround_plan_waits_for_model") == 1
        keys = tmp_path / "olga"
        keys.mkdir()
        leaf = world.leaf(Role.OPERATOR, "olga", CENTRE)
        leaf.certificate.rename(keys / CERTIFICATE)
        leaf.key.rename(keys / KEY)
        with LosesTheFirst(whole.running.server.port) as way:
            words = ["model", "push", str(tmp_path / "v0.safetensors"), "--operator", str(keys), "--charter"]
            words += [str(tmp_path / "charter.yaml"), "--address"]
            assert main([*words, way.address]) == 0
            assert way.lost == 1
        assert "is here" in capsys.readouterr().out
        whole.hospitals["alice"].wait_for(over(1))
        assert "note plan" not in health.ready()[1]
        assert REGISTRY.get_sample_value("wardround_plan_waits_for_model") == 0
        assert main([*words, world.address, "--json"]) == 0, "again is no harm"
        said = json.loads(capsys.readouterr().out)
        assert said["model"] == digest
        assert "was here already" in said["detail"]


def test_only_what_a_plan_names_and_only_from_an_operator(tmp_path: Path) -> None:
    with waiting(tmp_path) as (whole, _):
        world, model = whole.world, model_bytes(PARAMETERS)
        digest = hashlib.sha256(model).digest()
        other = model_bytes(PARAMETERS, start=1)
        error = refusal(world, hashlib.sha256(other).digest(), len(other), [other])
        assert error.reason is Reason.NOT_PERMITTED
        assert digest.hex() in error.detail, "the one that is wanted"
        assert refusal(world, digest, len(other), [other]).reason is Reason.BAD_DIGEST
        assert refusal(world, digest, 1 << 40, [model]).reason is Reason.TOO_LARGE
        for announced in (len(model) - 1, len(model) + 1):
            assert refusal(world, digest, announced, [model]).reason is Reason.MALFORMED
        assert refusal(world, digest, len(model), [model], Role.HOSPITAL).reason is Reason.NOT_PERMITTED
        assert not whole.running.store.blobs.has(digest)
        assert not list((whole.running.store.blobs.folder / "tmp").iterdir()), "nothing half-written is left"
        half = len(model) // 2
        assert "is here" in push(world, digest, len(model), [model[:half], b"", model[half:]])


def test_a_file_that_is_no_model_is_not_kept(tmp_path: Path) -> None:
    """The study names the digest of a file that its own architecture cannot have."""
    world = make_world(tmp_path, parameters=PARAMETERS)
    wrong = model_bytes(PARAMETERS + 1)
    (tmp_path / "study.yaml").write_bytes(plain_study(wrong, PARAMETERS).blob)
    running, _ = start(world)
    try:
        error = refusal(world, hashlib.sha256(wrong).digest(), len(wrong), [wrong])
        assert error.reason is Reason.INVALID_DATA
        assert not running.store.blobs.has(hashlib.sha256(wrong).digest())
    finally:
        running.stop(0.1)


def test_the_older_study_is_served_until_the_newer_ones_model_arrives(tmp_path: Path) -> None:
    with waiting(tmp_path, initial_model=str(tmp_path / "v0.safetensors")) as (whole, _):
        whole.hospitals["alice"].wait_for(over(1))
        newer = model_bytes(PARAMETERS, start=2)
        digest = hashlib.sha256(newer).digest()
        study = plain_study(newer, PARAMETERS, name="second")
        (tmp_path / "study.yaml").write_bytes(study.blob)
        whole.running.stop(0.1)
        whole.running, health = start(whole.world)
        assert whole.running.coordinator.run.study.digest == whole.world.study.digest
        text = health.ready()[1]
        assert digest.hex() in text
        assert "is served" in text
        push(whole.world, digest, len(newer), [newer])
        now = whole.hospitals["alice"].wait_for(lambda now: now.study == study.digest and now.closed_round == 1)
        assert now.study == study.digest
        assert "note plan" not in health.ready()[1]


def test_a_bad_target_is_a_bad_plan_and_the_old_one_goes_on(tmp_path: Path) -> None:
    """`kubectl set env` with a word instead of a number: refused with its sentence, nothing stops."""
    with waiting(tmp_path, initial_model=str(tmp_path / "v0.safetensors")) as (whole, _):
        whole.hospitals["alice"].wait_for(over(1))
        for _ in range(2):
            whole.running.stop(0.1)
            health = Health(CONDITIONS)
            config = load_config(
                whole.world.write_config(listen=whole.world.address), {"WARDROUND_THROUGH_ROUND": "all"}
            )
            whole.running = Aggregator(config, health)
        assert "WARDROUND_THROUGH_ROUND='all' is not a round number" in health.ready()[1]
        assert whole.running.coordinator.snapshot.plan.through_round == 1
        assert [event.kind for event in whole.running.store.plans()] == ["Adopted", "Refused"], "once, not per restart"
