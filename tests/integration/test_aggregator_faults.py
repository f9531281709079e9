"""Pods and the aggregator itself failing at every step: abandon, stall, named liars, kill -9, bounded memory."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from services.aggregator import facts as f
from services.aggregator.store import Store
from services.common.errors import Reason, ServiceError
from services.common.secagg.blob import decode
from services.common.secagg.certificate import check_abandon_certificate
from services.common.secagg.messages import OUTCOME_ACCEPTED, OUTCOME_REJECTED, Result
from services.common.store.database import Database
from services.common.store.events import EventLog
from tests.support.aggregator_world import make_world, model_bytes, until
from tests.support.fake_federation import NAMES, expected, federation, over, vector_of
from tests.support.fake_hospital import FakeHospital
from tests.support.fake_pod import FakePod
from wardround.admin.v1 import admin_pb2
from wardround.admin.v1.admin_pb2_grpc import AdministrationServiceStub
from wardround.round.v1 import round_pb2

COLLECTING = round_pb2.ROUND_PHASE_COLLECTING


def released(whole: object, number: int) -> Result:
    link = whole.running.coordinator.run.links[number]
    return decode(Result, link.result.blob)


def test_two_pods_restart_while_collecting_then_abandon_and_attempt_2(tmp_path: Path) -> None:
    """P-10, P-14, P-24: more than m - q pods lost their keys, so the attempt is given up with a certificate."""
    with federation(tmp_path, rounds=1) as whole:
        whole.join("alice", "bob", "carol")
        whole.join("dave", auto=False)
        dave = whole.hospitals["dave"]
        first = dave.wait_for(lambda now: now.phase == COLLECTING and now.attempt == 1)
        until(lambda: len(whole.state.submissions) == 3)
        whole.pods["pod-0"].crash()
        whole.pods["pod-1"].crash()
        second = dave.wait_for(lambda now: now.phase == COLLECTING and now.attempt == 2)
        assert second.manifest != first.manifest
        assert second.round == first.round == 1
        dave.submit(dave.prepare(second))
        roster = whole.world.documents.charter.roster
        assert check_abandon_certificate(dave.abandons[0], roster, first.study, 1, 1) == first.manifest
        dave.wait_for(over(1))
        assert released(whole, 0).attempt == 2
        model = expected(whole, vector_of(model_bytes(50)), NAMES, 1, attempt=2)
        assert np.array_equal(vector_of(dave.fetch_model(whole.state.model)), model)


def test_one_pod_down_is_borne(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=2) as whole:
        whole.pods["pod-3"].stop()
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(2))
        assert released(whole, 1).outcome == OUTCOME_ACCEPTED


def test_P_23_a_wrong_sum_is_named_and_the_right_one_used(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        whole.pods["pod-2"].lie = {0, 1, 2, 3}
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        result = released(whole, 0)
        assert result.outcome == OUTCOME_ACCEPTED
        assert b'"named":["pod-2"]' in result.released
        model = expected(whole, vector_of(model_bytes(50)), NAMES, 1)
        assert np.array_equal(vector_of(whole.hospitals["alice"].fetch_model(whole.state.model)), model)


def test_P_23_at_5_3_a_wrong_sum_is_only_in_dispute(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1, pods=5, threshold=3, quorum=4) as whole:
        whole.pods["pod-2"].lie = set(range(10))
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        result = released(whole, 0)
        assert b'"named":[]' in result.released
        assert b'"pod-2"' in result.released
        model = expected(whole, vector_of(model_bytes(50)), NAMES, 1)
        assert np.array_equal(vector_of(whole.hospitals["alice"].fetch_model(whole.state.model)), model)


def test_a_wrong_sum_of_3_3_is_seen_by_the_sentinels_and_the_round_rejected(tmp_path: Path) -> None:
    """P-23: with t = m nobody can be named; the previous model stays and the next round is a new one."""
    with federation(tmp_path, rounds=2, pods=3, threshold=3, quorum=3) as whole:
        whole.pods["pod-1"].lie = {0, 1, 2}
        whole.join(*NAMES)
        alice = whole.hospitals["alice"]
        alice.wait_for(over(1))
        whole.pods["pod-1"].lie = set()
        assert released(whole, 0).outcome == OUTCOME_REJECTED
        assert released(whole, 0).model == bytes.fromhex(whole.world.study.document.model.initial)
        alice.wait_for(over(2))


def test_P_24_a_hospital_that_one_pod_will_not_accept_is_left_out(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        whole.pods["pod-0"].leave_out = {"dave"}
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        assert whole.running.coordinator.run.state.members == ("alice", "bob", "carol")


def test_P_24_a_pod_that_leaves_too_many_out_is_dropped(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        whole.pods["pod-0"].leave_out = {"dave", "carol"}
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        assert whole.running.coordinator.run.state.members == NAMES


def test_P_25_neither_certificate_stalls_and_the_next_round_is_a_new_one(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=2) as whole:
        for name in ("pod-0", "pod-1"):
            whole.pods[name].refuse = {"lock": Reason.NOT_LIVE, "abandon": Reason.LOCKED}
        whole.join(*NAMES)
        dave = whole.hospitals["dave"]
        dave.wait_for(over(1))
        assert not whole.running.coordinator.run.links
        for name in ("pod-0", "pod-1"):
            whole.pods[name].refuse = {}
        dave.wait_for(over(2))
        assert released(whole, 0).round == 2
        assert released(whole, 0).previous_result == bytes(32), "a stalled round has no link in the chain"


def test_too_few_submissions_end_in_a_bounded_number_of_attempts_then_a_stall(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1, study={"timing": {"submit_seconds": 0.4}}) as whole:
        whole.join("alice", "bob")
        whole.join("carol", auto=False)
        carol = whole.hospitals["carol"]
        carol.wait_for(over(1))
        stored = whole.running.store.facts(whole.world.study.digest)
        assert [type(fact) for fact in stored].count(f.Abandoned) == 3
        assert isinstance(stored[-2 if isinstance(stored[-1], f.Finished) else -1], f.Stalled)


def test_a_refusing_pod_does_not_stop_a_commit(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        whole.pods["pod-1"].refuse = {"propose": Reason.BURNED}
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        assert "pod-1" not in whole.running.coordinator.run.state.pods


def test_aggregator_killed_between_two_locks_goes_on_with_the_same_cohort(tmp_path: Path) -> None:
    """P-24: U and the decision were on the disk before the first Lock left; after kill -9 the same U is locked."""
    world = make_world(tmp_path, rounds=1)
    service = world.spawn(patience_seconds=120)
    pods = {pod.id: FakePod(world, pod.id) for pod in world.documents.charter.roster.pods}
    for name in ("pod-1", "pod-2", "pod-3"):
        pods[name].hold["lock"] = threading.Event()
    hospitals = {name: FakeHospital(world, name) for name in NAMES}
    try:
        until(lambda: pods["pod-0"].locked, why="the first pod locks")
        until(lambda: all("lock" in pods[name].orders for name in pods), why="Lock was sent to all")
        service.kill()
        cohort = next(iter(pods["pod-0"].locked.values()))
        store = Store(tmp_path / "state")
        fixed = [fact for fact in store.facts(world.study.digest) if isinstance(fact, f.CohortFixed)]
        store.close()
        assert [fact.digest for fact in fixed] == [cohort]
        for pod in pods.values():
            pod.hold["lock"].set() if "lock" in pod.hold else None
        service = world.spawn(patience_seconds=120)
        hospitals["alice"].wait_for(over(1))
        assert {cohort} == {found for pod in pods.values() for found in pod.locked.values()}
    finally:
        for member in (*hospitals.values(), *pods.values()):
            member.stop()
        service.kill()
    store = Store(tmp_path / "state")
    stored = store.facts(world.study.digest)
    store.close()
    assert sum(isinstance(fact, f.CohortFixed) for fact in stored) == 1
    assert any(isinstance(fact, f.Concluded) for fact in stored)


@pytest.mark.parametrize("kind", ["propose", "endorse", "offer", "release", "digest"])
def test_kill_minus_9_at_each_step_loses_nothing(tmp_path: Path, kind: str) -> None:
    """Digests travel with the sums of the same pod; of five pods, one is asked for nothing else."""
    world = make_world(tmp_path, rounds=1, **({"pods": 5, "quorum": 4} if kind == "digest" else {}))
    service = world.spawn(patience_seconds=120)
    pods = {pod.id: FakePod(world, pod.id) for pod in world.documents.charter.roster.pods}
    for pod in pods.values():
        pod.hold[kind] = threading.Event()
    hospitals = {name: FakeHospital(world, name) for name in NAMES}
    try:
        until(lambda: any(kind in pod.orders for pod in pods.values()), why=f"{kind} was asked")
        service.kill()
        for pod in pods.values():
            pod.hold[kind].set()
        service = world.spawn(patience_seconds=120)
        hospitals["alice"].wait_for(over(1), seconds=60)
    finally:
        for member in (*hospitals.values(), *pods.values()):
            member.stop()
        service.kill()
    store = Store(tmp_path / "state")
    ended = [fact for fact in store.facts(world.study.digest) if isinstance(fact, f.Concluded)]
    store.close()
    assert [fact.outcome for fact in ended] == [OUTCOME_ACCEPTED]


@pytest.mark.slow
def test_memory_stays_bounded_at_11_million_parameters(tmp_path: Path) -> None:
    """protocol.md §8: at most 256 MiB at any d."""
    world = make_world(
        tmp_path, rounds=1, parameters=11_000_000, study={"timing": {"submit_seconds": 120.0, "attempt_seconds": 240.0}}
    )
    service = world.spawn(patience_seconds=60)
    assert service.process is not None
    watched, peak = psutil.Process(service.process.pid), 0
    pods = {pod.id: FakePod(world, pod.id) for pod in world.documents.charter.roster.pods}
    hospitals = {name: FakeHospital(world, name) for name in NAMES}
    try:
        ends = time.monotonic() + 200
        while not (hospitals["alice"].seen and hospitals["alice"].now.closed_round) and time.monotonic() < ends:
            peak = max(peak, watched.memory_info().rss)
            time.sleep(0.01)
        assert hospitals["alice"].now.closed_round == 1
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
    finally:
        for member in (*hospitals.values(), *pods.values()):
            member.stop()
        service.kill()
    assert peak < 256 * 2**20, f"{peak / 2**20:.0f} MiB"


class FlakyLog(EventLog):
    """Every `every`-th append fails as a full disk does, with nothing written."""

    def __init__(self, database: Database, every: int) -> None:
        super().__init__(database)
        self.every, self.calls, self.failed = every, 0, 0

    def append(self, *arguments: Any) -> int:
        self.calls += 1
        if self.calls % self.every == 0:
            self.failed += 1
            raise ServiceError(Reason.STORAGE, "the disk is full, says the test")
        return super().append(*arguments)


def test_a_disk_that_is_full_now_and_then_delays_but_loses_nothing(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=2) as whole:
        flaky = FlakyLog(whole.running.store._database, 3)
        whole.running.store._log = flaky
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(2), seconds=60)
        assert flaky.failed >= 2
        model = vector_of(model_bytes(50))
        for number in (1, 2):
            assert released(whole, number - 1).outcome == OUTCOME_ACCEPTED
            model = expected(whole, model, NAMES, number)
        assert np.array_equal(vector_of(whole.hospitals["alice"].fetch_model(whole.state.model)), model)


def test_operators_see_the_status_and_take_the_evidence(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        olga = whole.world.operator()
        try:
            until(
                lambda: (
                    olga.unary(
                        lambda c: AdministrationServiceStub(c).GetStatus, admin_pb2.GetStatusRequest(), seconds=5
                    ).status.finished
                )
            )
            files: dict[str, bytes] = {}
            name = ""
            request = admin_pb2.ExportEvidenceRequest()
            with olga.stream(lambda c: AdministrationServiceStub(c).ExportEvidence, request, seconds=30) as parts:
                for part in parts:
                    name = part.path or name
                    files[name] = files.get(name, b"") + part.chunk
        finally:
            olga.close()
        assert files["study.yaml"] == whole.world.study.blob
        assert files["charter.yaml"] == whole.world.documents.charter.blob
        assert set(files) >= {"models/v0000.safetensors", "models/v0001.safetensors", "log.jsonl"}
        of_round = {path.split("/")[-1] for path in files if path.startswith("rounds/0001/")}
        expected_files = {"manifest-1.blob", "certificate-1.blob", "sum.bin", "result.signed", "close.signed"}
        expected_files |= {f"header-1-{name}.signed" for name in NAMES} | {f"receipt-1-{name}.signed" for name in NAMES}
        assert of_round >= expected_files
        assert sum(name.startswith("accept-1-") for name in of_round) >= 3
        assert sum(name.startswith("release-1-") for name in of_round) == 4
        assert sum(name.startswith("digest-1-") for name in of_round) >= 4
