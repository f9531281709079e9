"""Single decisions of the aggregator's round machine, each from a state reached by the facts that lead there."""

from dataclasses import replace

import pytest

from services.aggregator import facts as f
from services.aggregator.orders import orders
from services.aggregator.round import Answer, Phase, Rules, State, Tick, alarms, decide, evolve, subject
from services.common.errors import Reason, ServiceError
from services.common.secagg.cohort import Cohort
from services.common.secagg.messages import MAX_ATTEMPT, OUTCOME_ACCEPTED, OUTCOME_REJECTED, Signed
from services.common.store.records import to_json
from tests.support.consortium import derive, make_consortium
from wardround.keyshare.v1.keyshare_pb2 import FetchOfferResponse

T0 = 1_000_000
EXPIRES = T0 + 60_000
NAMES = ("alice", "bob", "carol", "dave")


def signed(*parts: object) -> Signed:
    return Signed(derive(*parts), bytes(64))


class Script:
    """Drives one study; `to` plays everybody's right answers up to a phase."""

    def __init__(self, pods: int = 4, threshold: int = 2, quorum: int = 3, **rules: object) -> None:
        self.roster = make_consortium(pods, threshold, quorum).roster
        plain = Rules(roster=self.roster, minimum=3, rounds=2, grace_ms=100, patience_ms=1000)
        self.rules = replace(plain, **rules)
        self.pods = tuple(pod.id for pod in self.roster.pods)
        self.able, self.lost = frozenset(self.pods), frozenset[str]()
        self.state, self.log, self.at = State(), [], T0

    def tell(self, command: "f.Fact | Answer | Tick") -> tuple[f.Fact, ...]:
        found = decide(self.state, self.rules, command)
        for fact in found:
            self.log.append(fact)
            self.state = evolve(self.state, fact)
        return found

    def answer(self, fact: f.Fact) -> tuple[f.Fact, ...]:
        return self.tell(Answer(subject(self.state), fact))

    def tick(self, later: int = 0, awake: int = 0) -> tuple[f.Fact, ...]:
        self.at += later
        return self.tell(Tick(self.at, self.able, self.lost, awake))

    def refusal(self, command: "f.Fact | Answer | Tick") -> Reason:
        with pytest.raises(ServiceError) as caught:
            self.tell(command)
        return caught.value.reason

    def opened(self, number: int) -> f.Opened:
        return f.Opened(self.at, number, self.roster.charter, derive("core", number), derive("v0"), 0, "train", self.at)

    def proposed(self, attempt: int) -> f.Proposed:
        return f.Proposed(self.at, attempt, signed("proposal", attempt), self.at + 5000, EXPIRES)

    def submitted(self, who: str, salt: int = 0) -> f.Submitted:
        header = signed("header", who, salt)
        return f.Submitted(self.at, who, header, header.blob, derive("y", who), signed("receipt", who))

    def commit(self, *pods: str) -> None:
        for pod in pods or self.pods:
            self.answer(f.Committed(self.at, pod, signed("commit", pod)))

    def endorse(self, *pods: str) -> None:
        for pod in pods or self.pods:
            self.answer(f.Endorsed(self.at, pod, signed("endorse", pod)))

    def submit(self, *names: str) -> None:
        for who in names or NAMES:
            self.answer(self.submitted(who))

    def listed(self, pod: str, *without: str) -> None:
        pairs = tuple((who, sub.header_digest) for who, sub in self.state.submissions.items() if who not in without)
        self.answer(f.Listed(self.at, pod, signed("accept", pod), pairs, tuple((who, "MALFORMED") for who in without)))

    def lock(self, *pods: str) -> None:
        for pod in pods:
            self.answer(f.Locked(self.at, pod, signed("lock", pod)))

    def give_up(self, *pods: str) -> None:
        for pod in pods:
            self.answer(f.AbandonSigned(self.at, pod, signed("abandon", pod)))

    def claim(self, pod: str, piece: int, vector: bytes = b"", released: bool = False) -> tuple[f.Fact, ...]:
        found = vector or derive("sum", piece)
        return self.answer(f.Claimed(self.at, pod, piece, found, signed("claim", pod, piece), released))

    def claim_all(self, liars: dict[str, bytes] | None = None) -> None:
        """Everybody gives what was asked until nothing more is asked."""
        for _ in range(5):
            for (pod, piece), whole in tuple(self.state.asked.items()):
                self.claim(pod, piece, (liars or {}).get(pod, b""), whole)
            if not self.tick():
                return

    def conclude(self, outcome: int = OUTCOME_ACCEPTED, figure: str = "", version: int = 1) -> tuple[f.Fact, ...]:
        result, model = derive("result", self.state.round), derive("model", version)
        close = signed("close")
        return self.tell(
            f.Concluded(self.at, outcome, "", signed("r"), result, close, bytes(32), model, version, figure)
        )

    def to(self, phase: Phase) -> "Script":
        steps = [
            (Phase.TRAINING, lambda: self.tell(self.opened(self.state.round + 1))),
            (Phase.PROPOSED, lambda: self.tell(self.proposed(self.state.attempt + 1))),
            (Phase.ENDORSING, lambda: (self.commit(), self.tick())),
            (Phase.COLLECTING, lambda: (self.endorse(), self.tick())),
            (Phase.OFFERING, lambda: (self.submit(), self.tick())),
            (Phase.LOCKING, lambda: ([self.listed(pod) for pod in self.pods], self.tick())),
            (Phase.RELEASING, lambda: (self.lock(*self.pods), self.tick())),
            (Phase.VERIFIED, lambda: (self.tick(), self.claim_all())),
        ]
        for reached, step in steps:
            step()
            assert self.state.phase is reached, self.log[-3:]
            if reached is phase:
                return self
        raise AssertionError(phase)


def kinds(found: tuple[f.Fact, ...]) -> list[str]:
    return [type(fact).__name__ for fact in found]


def test_a_whole_study_runs_to_its_end() -> None:
    script = Script()
    for number in (1, 2):
        script.to(Phase.VERIFIED)
        assert script.state.how == "one"
        script.conclude(version=number)
    assert kinds(script.tick()) == ["Finished"]
    assert (script.state.phase, script.state.version, script.state.newest_version) == (Phase.FINISHED, 2, 2)
    assert script.tick() == ()
    assert alarms(script.state, script.rules) == ()
    assert script.refusal(script.opened(3)) is Reason.WRONG_PHASE


def test_rounds_open_in_order_and_only_when_none_is() -> None:
    script = Script()
    assert script.refusal(script.opened(3)) is Reason.WRONG_PHASE, "beyond the study"
    assert script.refusal(replace(script.opened(1), round=0)) is Reason.WRONG_PHASE
    script.to(Phase.TRAINING)
    assert script.refusal(script.opened(2)) is Reason.WRONG_PHASE
    assert alarms(script.state, script.rules) == (T0,)
    assert script.refusal(script.proposed(2)) is Reason.WRONG_PHASE, "attempts rise by one"
    assert script.refusal(replace(script.proposed(1), at=T0 - 1)) is Reason.WRONG_PHASE, "never before train_until"
    assert script.refusal(f.Finished(T0)) is Reason.WRONG_PHASE
    assert script.refusal(f.Concluded(T0, 1, "", signed(), b"", signed(), b"", b"", 1, "")) is Reason.WRONG_PHASE


def test_commits_of_q_pods_make_a_manifest_after_the_grace() -> None:
    script = Script().to(Phase.PROPOSED)
    script.commit("pod-0", "pod-1", "pod-0")
    script.answer(f.Committed(T0, "stranger", signed()))
    assert list(script.state.commitments) == ["pod-0", "pod-1"]
    assert script.tick(500) == (), "q - 1"
    script.commit("pod-2")
    assert script.tick() == (), "pod-3 can still answer"
    script.able = frozenset(script.pods[:3])
    assert kinds(script.tick()) == ["Manifested"], "beyond the grace nobody able is missing"
    assert script.state.pods == ("pod-0", "pod-1", "pod-2")


def test_a_pod_that_will_never_answer_is_not_waited_for() -> None:
    script = Script().to(Phase.PROPOSED)
    script.lost = frozenset({"pod-3"})
    script.commit("pod-0", "pod-1", "pod-2")
    assert kinds(script.tick()) == ["Manifested"]


@pytest.mark.parametrize("phase", [Phase.PROPOSED, Phase.ENDORSING])
def test_too_few_pods_before_the_endorsement_need_no_certificate(phase: Phase) -> None:
    """P-14: where no manifest got q endorsements the next attempt needs no certificate; it waits a little."""
    script = Script().to(phase)
    assert script.tick() == ()
    assert script.tick(1000), "patience is over"
    assert isinstance(script.log[-1], f.AttemptFailed)
    assert script.state.phase is Phase.TRAINING
    assert script.refusal(script.proposed(2)) is Reason.WRONG_PHASE
    script.at += 500
    script.tell(script.proposed(2))
    assert script.state.abandoned == ()


def test_pods_lost_while_endorsing_fail_the_attempt_at_once() -> None:
    script = Script().to(Phase.ENDORSING)
    script.lost = frozenset({"pod-0", "pod-1"})
    assert kinds(script.tick()) == ["AttemptFailed"]


def test_waiting_begins_anew_after_a_restart() -> None:
    script = Script().to(Phase.OFFERING)
    script.able = frozenset()
    back = script.at + 5000
    assert script.tick(5000, awake=back) == ()
    assert script.tick(900, awake=back) == ()
    assert back + 1000 in alarms(script.state, script.rules, back)
    assert kinds(script.tick(100, awake=back)) == ["AbandonDecided"]


def test_P_7_submissions_stand_once_and_late_is_late() -> None:
    script = Script().to(Phase.COLLECTING)
    script.submit("alice")
    assert script.answer(script.submitted("alice")) == ()
    assert script.refusal(Answer(subject(script.state), script.submitted("alice", 1))) is Reason.CONFLICT
    assert script.refusal(Answer(subject(script.state), script.submitted("mallory"))) is Reason.UNKNOWN_MEMBER
    assert script.refusal(Answer(derive("other M"), script.submitted("bob"))) is Reason.LATE
    assert script.answer(f.Declined(script.at, "alice", "x")) == (), "who submitted cannot decline"
    script.at = script.state.deadline + 1
    assert script.refusal(Answer(subject(script.state), script.submitted("bob"))) is Reason.LATE


def test_collecting_ends_when_everybody_spoke_or_at_the_deadline() -> None:
    script = Script().to(Phase.COLLECTING)
    script.submit("alice", "bob", "carol")
    assert script.tick() == ()
    assert alarms(script.state, script.rules) == (script.state.deadline,)
    script.tell(f.Declined(script.at, "dave", "POLICY_REFUSES"))
    assert script.tell(f.Declined(script.at, "dave", "POLICY_REFUSES")) == ()
    assert kinds(script.tick()) == ["Offering"]
    again = Script().to(Phase.COLLECTING)
    again.submit("alice", "bob", "carol")
    assert kinds(again.tick(5000)) == ["Offering"]
    assert Script().tell(f.Declined(T0, "dave", "x")) == (), "no round, nothing to decline"


def test_too_few_submissions_are_abandoned_a_bounded_number_of_times_then_stalled() -> None:
    script = Script(most_abandoned=2).to(Phase.COLLECTING)
    for attempt in (1, 2):
        script.submit("alice", "bob")
        assert kinds(script.tick(5000)) == ["AbandonDecided"]
        script.give_up("pod-0", "pod-1")
        assert script.tick() == ()
        script.give_up("pod-3")
        assert kinds(script.tick()) == ["Abandoned"]
        if attempt == 1:
            assert script.tick() == ()
            script.tell(script.proposed(2))
            script.commit()
            script.tick()
            script.endorse()
            script.tick()
    assert kinds(script.tick()) == ["Stalled"]
    assert (script.state.phase, script.state.round) == (Phase.IDLE, 1)
    script.to(Phase.TRAINING)
    assert script.state.round == 2
    assert script.state.abandoned == ()


def test_P_16_attempts_end_at_64() -> None:
    script = Script().to(Phase.TRAINING)
    script.state = replace(script.state, attempt=MAX_ATTEMPT)
    assert kinds(script.tick()) == ["Stalled"]


def test_pods_that_lost_their_keys_while_collecting_end_the_attempt_early() -> None:
    script = Script().to(Phase.COLLECTING)
    script.lost = frozenset({"pod-0", "pod-2"})
    assert kinds(script.tick()) == ["AbandonDecided"]


def test_P_24_the_cohort_is_what_every_answering_pod_accepts() -> None:
    script = Script().to(Phase.OFFERING)
    script.listed("pod-0")
    script.listed("pod-1", "bob")
    script.listed("pod-2")
    script.listed("pod-3")
    (fixed,) = script.tick()
    assert isinstance(fixed, f.CohortFixed)
    assert fixed.members == ("alice", "carol", "dave")
    assert fixed.left_out == (("bob", "pod-1"),)
    assert fixed.dropped_pod == ""
    assert Cohort.parse(fixed.cohort).digest == fixed.digest == script.state.cohort_digest


def test_P_24_the_pod_with_the_shortest_list_may_be_dropped_but_never_below_q() -> None:
    script = Script().to(Phase.OFFERING)
    for pod in ("pod-0", "pod-1", "pod-2"):
        script.listed(pod)
    script.listed("pod-3", "alice", "bob")
    (fixed,) = script.tick()
    assert isinstance(fixed, f.CohortFixed)
    assert (fixed.members, fixed.dropped_pod) == (NAMES, "pod-3")
    few = Script().to(Phase.OFFERING)
    few.lost = frozenset({"pod-0"})
    few.listed("pod-1")
    few.listed("pod-2")
    few.listed("pod-3", "alice", "bob")
    assert kinds(few.tick()) == ["AbandonDecided"], "three lists are q already"


def test_offers_that_fewer_than_q_answer_are_abandoned() -> None:
    script = Script().to(Phase.OFFERING)
    script.listed("pod-0")
    script.listed("pod-1")
    assert script.tick(100) == ()
    script.able = frozenset({"pod-0", "pod-1"})
    assert kinds(script.tick(1000)) == ["AbandonDecided"]


def test_P_24_lock_turns_to_abandon_while_at_most_m_minus_q_locked() -> None:
    script = Script().to(Phase.LOCKING)
    script.lock("pod-0")
    script.lost = frozenset({"pod-1", "pod-2"})
    assert kinds(script.tick()) == ["AbandonDecided"]
    assert script.answer(f.Locked(script.at, "pod-3", signed())) == (), "never back"
    script.lost = frozenset({"pod-0"})
    script.give_up("pod-1", "pod-2", "pod-3")
    assert kinds(script.tick()) == ["Abandoned"]
    assert len(script.state.abandoned) == 1


def test_P_25_two_locks_and_no_hope_of_a_third_stall_the_round() -> None:
    script = Script().to(Phase.LOCKING)
    script.lock("pod-0", "pod-1")
    script.able = frozenset({"pod-0", "pod-1"})
    assert script.tick(2000) == (), "the others may come back with their keys"
    script.lost = frozenset({"pod-2", "pod-3"})
    assert kinds(script.tick()) == ["Stalled"]


def test_P_25_at_expiry_a_locking_attempt_stalls() -> None:
    script = Script().to(Phase.LOCKING)
    script.lock("pod-0", "pod-1")
    script.at = EXPIRES
    assert kinds(script.tick()) == ["Stalled"]


@pytest.mark.parametrize("phase", [Phase.RELEASING, Phase.VERIFIED])
def test_P_25_sums_that_do_not_come_before_expiry_stall_the_round(phase: Phase) -> None:
    script = Script().to(phase)
    script.at = EXPIRES
    assert kinds(script.tick()) == ["Stalled"]


def test_P_25_abandon_that_cannot_be_certified_stalls() -> None:
    script = Script().to(Phase.COLLECTING)
    script.tick(5000)
    assert script.state.phase is Phase.ABANDONING
    script.lost = frozenset({"pod-0", "pod-1"})
    assert kinds(script.tick()) == ["Stalled"]
    late = Script().to(Phase.COLLECTING)
    late.tick(5000)
    late.at = EXPIRES
    assert kinds(late.tick()) == ["Stalled"]


def test_answers_to_an_older_question_give_nothing() -> None:
    script = Script().to(Phase.LOCKING)
    assert script.tell(Answer(derive("old"), f.Locked(script.at, "pod-0", signed()))) == ()
    assert script.answer(f.Locked(script.at, "stranger", signed())) == ()


def test_P_23_one_release_and_one_other_digest_for_each_piece() -> None:
    script = Script().to(Phase.RELEASING)
    (assigned,) = script.tick()
    assert isinstance(assigned, f.Assigned)
    assert sorted(piece for _, piece in assigned.release) == [0, 1, 2, 3]
    assert sorted(piece for _, piece in assigned.digest) == [0, 1, 2, 3]
    assert not set(assigned.release) & set(assigned.digest), "another holder"
    assert len({pod for pod, _ in assigned.release}) >= 3, "the work is shared"
    assert script.tick() == ()
    assert script.claim("pod-0", 0) == (), "pod-0 does not hold piece 0 and was not asked"
    script.claim_all()
    assert script.state.phase is Phase.VERIFIED
    assert [("pod", piece) for piece in range(4)] == [("pod", piece) for piece, _ in enumerate(script.state.chosen)]
    assert script.claim("pod-1", 0) == (), "too late to matter"


def test_P_23_full_compares_t_holders() -> None:
    script = Script(5, 3, 4, verify="full").to(Phase.RELEASING)
    script.tick()
    for piece in range(10):
        assert sum(p == piece for _, p in script.state.asked) == 3
    script.claim_all()
    assert script.state.how == "full"


def test_P_23_full_takes_all_that_still_answer() -> None:
    script = Script(5, 3, 4, verify="full").to(Phase.RELEASING)
    script.able = frozenset(script.pods[:4])
    script.tick()
    script.claim_all()
    assert script.state.phase is Phase.VERIFIED


def test_P_23_a_digest_of_a_pod_that_left_is_asked_of_another() -> None:
    script = Script().to(Phase.RELEASING)
    script.tick()
    gone = next(pod for (pod, _), whole in script.state.asked.items() if whole)
    script.able -= {gone}
    (more,) = script.tick()
    assert isinstance(more, f.Assigned)
    assert gone not in {pod for pod, _ in (*more.release, *more.digest)}
    script.claim_all()
    assert script.state.phase is Phase.VERIFIED


def test_P_23_a_liar_is_named_by_t_holders_and_not_used() -> None:
    script = Script().to(Phase.RELEASING)
    script.tick()
    script.claim_all({"pod-1": derive("lie")})
    verified = script.log[-1]
    assert isinstance(verified, f.Verified)
    assert verified.named == ("pod-1",)
    assert verified.disputed == ()
    assert "pod-1" not in verified.chosen


def test_P_23_two_that_differ_and_no_third_reject_the_round() -> None:
    script = Script().to(Phase.RELEASING)
    script.able = frozenset({"pod-0", "pod-1", "pod-2"})
    script.tick()
    script.claim_all({"pod-1": derive("lie")})
    verified = script.log[-1]
    assert isinstance(verified, f.Verified)
    assert verified.chosen == ()
    assert "pod-1" in verified.disputed
    script.conclude(OUTCOME_REJECTED, version=0)
    assert script.state.phase is Phase.IDLE


def test_P_23_at_5_3_a_majority_below_t_is_used_and_all_are_in_dispute() -> None:
    script = Script(5, 3, 4).to(Phase.RELEASING)
    script.tick()
    script.claim_all({"pod-1": derive("lie")})
    verified = script.log[-1]
    assert isinstance(verified, f.Verified)
    assert verified.named == ()
    assert "pod-1" in verified.disputed
    assert len(verified.chosen) == 10
    assert "pod-1" not in {
        pod for piece, pod in enumerate(verified.chosen) if 1 not in script.roster.committee.pieces[piece]
    }


def test_P_23_where_a_piece_has_one_holder_only_the_sentinels_speak() -> None:
    script = Script(3, 3, 3).to(Phase.VERIFIED)
    assert script.state.how == "sentinels only"
    assert all(script.state.asked.values())


def test_a_pod_that_signs_two_digests_of_one_sum_is_a_conflict() -> None:
    script = Script().to(Phase.RELEASING)
    script.tick()
    pod, piece = next(key for key, whole in script.state.asked.items() if not whole)
    assert script.claim(pod, piece)
    assert script.claim(pod, piece) == ()
    with pytest.raises(ServiceError) as caught:
        script.claim(pod, piece, derive("another"))
    assert caught.value.reason is Reason.CONFLICT


def test_a_piece_whose_holders_are_all_lost_stalls_the_round_at_once() -> None:
    script = Script().to(Phase.RELEASING)
    script.tick()
    script.lost = frozenset({"pod-0", "pod-1", "pod-2"})
    assert kinds(script.tick()) == ["Stalled"]


def test_gate_figures_are_kept_of_accepted_models_only() -> None:
    script = Script().to(Phase.VERIFIED)
    script.conclude(figure="0.75")
    assert script.state.gated is not None
    assert (script.state.gated.version, script.state.gated.figure) == (0, 0.75)
    script.to(Phase.VERIFIED)
    script.conclude(OUTCOME_REJECTED, figure="0.1", version=0)
    assert script.state.gated.figure == 0.75
    assert script.state.newest_version == 1


def test_P_12_the_cohort_is_counted_by_organisation_and_cut_at_n_max() -> None:
    script = Script()
    hospitals = {who: replace(entry, organisation="one trust") for who, entry in script.roster.hospitals.items()}
    hospitals["alice"] = script.roster.hospitals["alice"]
    script.rules = replace(script.rules, roster=replace(script.roster, hospitals=hospitals))
    script.to(Phase.COLLECTING)
    script.submit()
    assert kinds(script.tick(5000)) == ["AbandonDecided"], "four hospitals of two organisations"
    cut = Script()
    cut.rules = replace(cut.rules, roster=replace(cut.roster, maximum_cohort=3))
    cut.to(Phase.LOCKING)
    assert cut.state.members == ("alice", "bob", "carol")


def test_facts_survive_the_log_unchanged_and_an_unknown_one_is_refused() -> None:
    script = Script().to(Phase.VERIFIED)
    script.conclude()
    for fact in script.log:
        assert f.from_json(*to_json(fact)) == fact
    for kind, payload in (
        ("Invented", {}),
        ("Offering", {"at": 1, "more": 2}),
        ("Certified", {"at": 1, "certificate": "x"}),
    ):
        with pytest.raises(ServiceError) as caught:
            f.from_json(kind, payload)
        assert caught.value.reason is Reason.UNKNOWN_SCHEMA


@pytest.mark.parametrize(("submissions", "lost", "along"), [(32, False, 1), (33, False, 0), (4, True, 0)])
def test_an_offer_holds_few_submissions_and_is_asked_for_when_there_are_many_or_none_to_be_had(
    submissions: int, lost: bool, along: int
) -> None:
    script = Script()
    state = replace(
        State(),
        phase=Phase.OFFERING,
        pods=script.pods,
        submissions={f"h{number}": script.submitted(f"h{number}") for number in range(submissions)},
    )

    def offered(pod: str) -> list[FetchOfferResponse]:
        if lost:
            raise ServiceError(Reason.CLOSED, "the attempt is over")
        return [FetchOfferResponse(box=pod.encode())]

    found = orders(state, script.rules, derive("study"), 0, frozenset(), offered)
    for pod in script.pods:
        (order,) = found[pod]
        assert [item.box for item in order.make().offer.offered] == [pod.encode()] * along
