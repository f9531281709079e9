"""Plans, gates, charters in force, marks and roles at the real aggregator."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from services.aggregator.charters import Charters
from services.aggregator.config import load_config
from services.aggregator.service import CONDITIONS, Aggregator
from services.common.documents.charter import load_charter
from services.common.documents.emit import emit
from services.common.documents.pin import Pin
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.observe.http import Health
from services.common.secagg.blob import decode
from services.common.secagg.encoding import LaneTable
from services.common.secagg.messages import OUTCOME_ACCEPTED, OUTCOME_REJECTED, Result
from services.common.store.blobs import BlobStore
from tests.support.aggregator_world import World, make_world, model_bytes, plain_study, until
from tests.support.fake_federation import NAMES, Federation, federation, over
from tests.support.fake_hospital import FakeHospital, plain_values
from tests.support.fake_pod import FakePod
from wardround.admin.v1 import admin_pb2
from wardround.admin.v1.admin_pb2_grpc import AdministrationServiceStub
from wardround.keyshare.v1 import keyshare_pb2
from wardround.keyshare.v1.keyshare_pb2_grpc import KeyShareServiceStub
from wardround.round.v1 import round_pb2
from wardround.round.v1.round_pb2_grpc import RoundCoordinationServiceStub


def results(whole: Federation) -> list[Result]:
    return [decode(Result, link.result.blob) for link in whole.running.coordinator.run.links]


def restart(whole: Federation, **changes: object) -> None:
    whole.running.stop(0.1)
    port = whole.world.address
    whole.running = whole.world.start(listen=port, **changes)


def test_through_round_is_a_target_that_a_restart_does_not_move(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=3, through_round=1) as whole:
        whole.join(*NAMES)
        alice = whole.hospitals["alice"]
        alice.wait_for(over(1))
        until(lambda: "target" in whole.running.coordinator.snapshot.waiting)
        restart(whole)
        until(lambda: "target" in whole.running.coordinator.snapshot.waiting)
        assert whole.state.round == 1
        restart(whole, through_round=2)
        alice.wait_for(over(2))
        assert whole.state.round == 2


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    path = world.write_config()
    assert load_config(path, {}).target() == 2
    assert load_config(path, {"WARDROUND_THROUGH_ROUND": "7"}).target() == 7
    with pytest.raises(ServiceError) as caught:
        load_config(path, {"WARDROUND_THROUGH_ROUND": "-1"}).target()
    assert caught.value.reason is Reason.INVALID_DOCUMENT
    path.write_text(path.read_text().replace('"listen"', '"lisen"'))
    with pytest.raises(ServiceError, match="lisen"):
        load_config(path, {})


def test_a_bad_plan_is_refused_and_the_old_one_kept(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=2, through_round=1) as whole:
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        (tmp_path / "study.yaml").write_bytes(whole.world.study.blob + b"surprise: 1\n")
        whole.running.stop(0.1)
        config = load_config(whole.world.write_config(listen=whole.world.address), {})
        health = Health(CONDITIONS)
        whole.running = Aggregator(config, health)
        health.start()
        ready, text = health.ready()
        assert ready
        assert "refused" in text
        assert "surprise" in text
        assert whole.running.coordinator.run.study.digest == whole.world.study.digest
        assert whole.state.round == 1
        assert whole.running.store.plans()[-1].kind == "Refused"


def test_a_first_plan_that_is_bad_refuses_to_start(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    (tmp_path / "v0.safetensors").write_bytes(model_bytes(51))
    with pytest.raises(ServiceError) as caught:
        world.start()
    assert "initial model" in caught.value.detail
    (tmp_path / "v0.safetensors").write_bytes(model_bytes(50))
    world.start().stop(0.1)


def test_a_new_study_begins_after_the_open_round_of_the_old_one(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=3) as whole:
        whole.join("alice", "bob", "carol")
        whole.join("dave", auto=False)
        dave = whole.hospitals["dave"]
        now = dave.wait_for(lambda now: now.phase == round_pb2.ROUND_PHASE_COLLECTING)
        new = plain_study(model_bytes(50), name="second")
        (tmp_path / "study.yaml").write_bytes(new.blob)
        restart(whole)
        assert whole.running.coordinator.run.study.digest == whole.world.study.digest
        dave.submit(dave.prepare(now))
        until(lambda: whole.running.coordinator.run.study.digest == new.digest)
        dave.wait_for(lambda now: now.study == new.digest and now.phase == round_pb2.ROUND_PHASE_COLLECTING)
        dave.submit(dave.prepare(dave.now))
        dave.wait_for(over(1))
        old = dave.call(
            RoundCoordinationServiceStub, "ListResults", round_pb2.ListResultsRequest(study=whole.world.study.digest)
        )
        assert len(old.links) == 1
        study = dave.call(RoundCoordinationServiceStub, "GetStudy", round_pb2.GetStudyRequest(digest=new.digest))
        assert study.study == new.blob


class Graded:
    """Hits that say how good the start model of each round is: `good[round]` of ten patients a class."""

    def __init__(self, good: dict[int, int]) -> None:
        self.good = good

    def __call__(self, table: LaneTable, number: int) -> dict[str, np.ndarray]:
        values = plain_values(1)(table, number)
        if "gate" in values:
            values["gate"] = np.array([self.good[number]] * 2 + [10, 10], np.int64)
        if "confusion" in values:
            values["confusion"] = np.array([8, 2, 1, 9], np.int64)
            bins = values["histogram"].reshape(2, 2, -1)
            bins[:] = 0
            bins[:, 0, 0], bins[:, 1, -1] = 10, 10
        return values


def test_a_gate_rolls_back_to_the_model_that_passed_and_the_final_round_reports(tmp_path: Path) -> None:
    study = {
        "evaluation": {"gate_rounds": (1, 2, 3), "final": True, "histogram_bins": 4},
        "gate": {"metric": "balanced_accuracy", "largest_drop": 0.1},
    }
    with federation(tmp_path, rounds=3, study=study) as whole:
        for name in NAMES:
            whole.hospitals[name] = FakeHospital(whole.world, name, Graded({1: 6, 2: 2, 3: 6}))
        alice = whole.hospitals["alice"]
        alice.wait_for(over(4))
        first, second, third, final = results(whole)
        initial = bytes.fromhex(whole.world.study.document.model.initial)
        assert (first.outcome, first.version) == (OUTCOME_ACCEPTED, 1)
        assert b'"balanced_accuracy":0.6' in first.released
        assert (second.outcome, second.version, second.model) == (OUTCOME_REJECTED, 0, initial)
        assert b"fell from 0.6000 to 0.2000" in second.released
        assert (third.outcome, third.version) == (OUTCOME_ACCEPTED, 2), "a version is never used twice"
        assert third.model != first.model
        assert (final.outcome, final.model) == (OUTCOME_ACCEPTED, third.model)
        assert b'"balanced_accuracy":0.85' in final.released
        assert b'"macro_auc":1.0' in final.released
        until(lambda: whole.state.phase == "finished")


def amended(world: World) -> bytes:
    """The charter's second version: one hospital's cohort limit raised."""
    document = world.documents.charter.document
    blob = emit(document.model_copy(update={"version": 2}))
    (world.folder / "charter2.yaml").write_bytes(blob)
    next_digest = load_charter(blob).digest
    pin = Pin(wardround="pin/v1", current=world.documents.charter.digest.hex(), next=next_digest.hex())
    world.config["charters"] = [str(world.folder / name) for name in ("charter.yaml", "charter2.yaml")]
    (world.folder / "pin.yaml").write_bytes(emit(pin))
    return next_digest


def test_P_26_an_amendment_takes_force_once_q_pods_and_n_min_hospitals_report_it(tmp_path: Path) -> None:
    world = make_world(tmp_path, rounds=3, through_round=1)
    after = amended(world)
    whole = Federation(world, world.start())
    try:
        second = load_charter((tmp_path / "charter2.yaml").read_bytes()).roster
        whole.join(*NAMES)
        alice = whole.hospitals["alice"]
        alice.wait_for(over(1))
        assert whole.state.charter == world.documents.charter.digest
        for member in (*whole.pods.values(), *whole.hospitals.values()):
            member.charters = [world.documents.charter.digest, after]
            member.roster = second
        restart(whole, through_round=2)
        alice.wait_for(over(2))
        assert whole.state.charter == after
        assert results(whole)[1].charter == after
    finally:
        whole.stop()


def test_P_11_pods_sign_nothing_before_the_marks_of_the_others(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        until(lambda: len(whole.running.coordinator.committee.live()) == 4)
        for pod in whole.pods.values():
            assert set(pod.orders) == {"high_water"}
        pod = whole.pods["pod-0"]
        pod.crash()
        until(lambda: pod.live)
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))


def test_the_second_process_with_one_pods_identity_is_refused(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        until(lambda: len(whole.running.coordinator.committee.live()) == 4)
        twin, first = FakePod(whole.world, "pod-0"), whole.pods["pod-0"]
        try:
            with pytest.raises(ServiceError) as caught:
                whole.running.coordinator.committee.join("pod-0", None, twin.boot, False, ())
            assert caught.value.reason is Reason.CONFLICT
            assert "two releases" in caught.value.detail
            whole.join(*NAMES)
            whole.hospitals["alice"].wait_for(over(1))
            assert not twin.orders
            first.stop()
            until(lambda: twin.live)
        finally:
            twin.stop()


def refusal_of(call: object) -> Reason:
    with pytest.raises(ServiceError) as caught:
        call()
    return caught.value.reason


def test_roles_are_not_confused(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        hospital, pod, olga = (
            whole.world.caller(Role.HOSPITAL, "alice"),
            whole.world.caller(Role.POD, "pod-0"),
            whole.world.operator(),
        )
        try:
            greet = keyshare_pb2.GreetRequest()
            status = admin_pb2.GetStatusRequest()
            study = round_pb2.GetStudyRequest(digest=bytes(32))
            for caller, stub, method, request in (
                (hospital, KeyShareServiceStub, "Greet", greet),
                (pod, AdministrationServiceStub, "GetStatus", status),
                (olga, RoundCoordinationServiceStub, "GetStudy", study),
            ):
                pick = lambda c, stub=stub, method=method: getattr(stub(c), method)  # noqa: E731
                assert refusal_of(lambda: caller.unary(pick, request, seconds=5)) is Reason.NOT_PERMITTED  # noqa: B023
            pick = lambda c: RoundCoordinationServiceStub(c).GetStudy  # noqa: E731
            assert refusal_of(lambda: hospital.unary(pick, study, seconds=5)) is Reason.NOT_FOUND
        finally:
            for caller in (hospital, pod, olga):
                caller.close()


def test_two_processes_never_share_a_state_folder(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with world.start():
        assert refusal_of(world.start) is Reason.UNSAFE_STORE


def test_a_process_that_cannot_start_says_one_line_and_exits_2(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    path = world.write_config(identity_key=str(tmp_path / "missing.pem"))
    (tmp_path / "state").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "services.aggregator", "--config", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "missing.pem" in done.stderr


def test_sigterm_ends_a_process_in_mid_round_and_it_goes_on(tmp_path: Path) -> None:
    world = make_world(tmp_path, rounds=1)
    service = world.spawn()
    whole_pods = [FakePod(world, pod.id) for pod in world.documents.charter.roster.pods]
    hospitals = [FakeHospital(world, name, auto=name != "dave") for name in NAMES]
    dave = hospitals[3]
    try:
        now = dave.wait_for(lambda now: now.phase == round_pb2.ROUND_PHASE_COLLECTING)
        update = dave.prepare(now)
        service.terminate()
        started = time.monotonic()
        service.wait(15)
        assert time.monotonic() - started < 8, "nobody is waited for who only watches"
        assert service.process is not None
        assert service.process.returncode == 0
        service = world.spawn()
        until(lambda: _sent(dave, update))
        dave.wait_for(over(1))
    finally:
        for member in (*hospitals, *whole_pods):
            member.stop()
        service.kill()


def _sent(hospital: FakeHospital, update: object) -> bool:
    try:
        hospital.submit(update)
    except ServiceError as error:
        if error.reason is not Reason.UNREACHABLE:
            raise
        return False
    return True


@pytest.mark.parametrize(("pods", "hospitals", "force"), [(3, 3, True), (2, 4, False), (4, 2, False)])
def test_P_26_fewer_than_q_pods_or_n_min_hospitals_leave_the_old_charter(
    tmp_path: Path, pods: int, hospitals: int, force: bool
) -> None:
    world = make_world(tmp_path)
    after = amended(world)
    charters = Charters(load_config(world.write_config(), {}), BlobStore(tmp_path / "blobs"))
    current = world.documents.charter.digest
    told_pods = {f"pod-{i}": (current, after) if i < pods else (current,) for i in range(4)}
    told = {name: (current, after) if i < hospitals else (current,) for i, name in enumerate(NAMES)}
    assert charters.in_force(current, told_pods, told).digest == (after if force else current)
    assert charters.in_force(after, {}, {}).digest == after, "once in force it stays"
