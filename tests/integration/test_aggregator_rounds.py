"""Whole rounds of the real aggregator over real mTLS, with fake pods and hospitals that do the real cryptography."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.aggregator import facts as f
from services.aggregator.coordinator import Coordinator
from services.common.rpc.signed import from_wire
from services.common.secagg.blob import decode
from services.common.secagg.certificate import ResultLink, check_certificate, check_manifest, check_result_chain
from services.common.secagg.messages import ZERO_DIGEST, Result
from tests.support.aggregator_world import model_bytes, until
from tests.support.fake_federation import NAMES, expected, federation, over, vector_of
from wardround.round.v1 import round_pb2
from wardround.round.v1.round_pb2_grpc import RoundCoordinationServiceStub


def test_three_rounds_give_the_plain_average_and_an_unbroken_chain(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=3) as whole:
        whole.join(*NAMES)
        alice = whole.hospitals["alice"]
        alice.wait_for(over(3))
        until(lambda: whole.state.phase == "finished")
        model = vector_of(model_bytes(50))
        for number in (1, 2, 3):
            model = expected(whole, model, NAMES, number)
        assert np.array_equal(vector_of(alice.fetch_model(whole.state.model)), model)
        assert alice.fetch_model(whole.state.model, 40) == alice.fetch_model(whole.state.model)[40:]
        answer = alice.call(
            RoundCoordinationServiceStub,
            "ListResults",
            round_pb2.ListResultsRequest(study=whole.world.study.digest),
        )
        roster = whole.world.documents.charter.roster
        links = [ResultLink(from_wire(link.result), link.manifest) for link in answer.links]
        held, last = check_result_chain(links, {roster.charter: roster}, whole.world.study.digest, ZERO_DIGEST)
        assert held == whole.state.previous_result
        assert last is not None
        assert (last.version, last.model) == (3, whole.state.model)
        for link in answer.links:
            cohort = check_certificate(check_manifest(link.manifest, roster), link.certificate)
            assert [member.hospital for member in cohort.members] == list(NAMES)
            assert b'"verify":"one"' in decode(Result, from_wire(link.result).blob).released
        until(lambda: not list((tmp_path / "state" / "vectors").iterdir()), why="the vectors are scrubbed")


def test_a_tally_that_is_over_before_the_coordinator_looks_up_holds_no_round_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine its thread may have told the result before the one that began it runs on."""
    told = threading.Event()
    submit, tell = ThreadPoolExecutor.submit, Coordinator.tell

    def late(pool: ThreadPoolExecutor, work: Any, *of: Any, **more: Any) -> Any:
        told.clear()
        future = submit(pool, work, *of, **more)
        if getattr(work, "__name__", "") == "_conclude":
            assert told.wait(60)
        return future

    def telling(coordinator: Coordinator, *facts: Any) -> None:
        if any(isinstance(fact, f.Concluded) for fact in facts):
            told.set()
        tell(coordinator, *facts)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", late)
    monkeypatch.setattr(Coordinator, "tell", telling)
    with federation(tmp_path, rounds=2) as whole:
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(2))


def test_what_was_asked_about_old_rounds_is_forgotten(tmp_path: Path) -> None:
    """An aggregator runs for years: a round leaves six questions to each pod behind."""
    with federation(tmp_path, rounds=8) as whole:
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(8), seconds=120)
        committee = whole.running.coordinator.committee
        assert len(committee._commands) < 3 * 6 * len(whole.pods)
        assert all(len(link.sent) < 3 * 6 for link in committee._links.values())


def test_a_hospital_that_never_comes_is_simply_not_in_the_cohort(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1, study={"timing": {"submit_seconds": 1.5}}) as whole:
        whole.join("alice", "bob", "carol")
        whole.hospitals["alice"].wait_for(over(1))
        model = expected(whole, vector_of(model_bytes(50)), ("alice", "bob", "carol"), 1)
        assert np.array_equal(vector_of(whole.hospitals["bob"].fetch_model(whole.state.model)), model)


def test_whose_update_is_here_is_told_nothing_before_the_round_is_over(tmp_path: Path) -> None:
    """Who is late hears that it is too late; nobody else has anything to do."""
    with federation(tmp_path, rounds=1, study={"timing": {"submit_seconds": 1.5}}) as whole:
        hold = threading.Event()
        for pod in whole.pods.values():
            pod.hold["lock"] = hold
        whole.join("dave", auto=False)
        whole.join("alice", "bob", "carol")
        whole.hospitals["dave"].wait_for(lambda now: now.phase == round_pb2.ROUND_PHASE_CLOSING)
        hold.set()
        whole.hospitals["alice"].wait_for(over(1))
        assert round_pb2.ROUND_PHASE_CLOSING not in {now.phase for now in whole.hospitals["alice"].seen}


@pytest.mark.parametrize(("pods", "threshold", "quorum"), [(3, 3, 3), (5, 3, 4)])
def test_other_committees(tmp_path: Path, pods: int, threshold: int, quorum: int) -> None:
    with federation(tmp_path, rounds=1, pods=pods, threshold=threshold, quorum=quorum) as whole:
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        model = expected(whole, vector_of(model_bytes(50)), NAMES, 1)
        assert np.array_equal(vector_of(whole.hospitals["alice"].fetch_model(whole.state.model)), model)
        released = whole.running.coordinator.run.links[0].result
        how = "sentinels only" if pods == threshold else "one"
        assert f'"verify":"{how}"'.encode() in decode(Result, released.blob).released
