"""The aggregator's round machine under arbitrary orders of events, crashes and time (P-10, P-16, P-23, P-24, P-25).

Pods here keep to the protocol (a lock and an abandon exclude each other, one cohort for one M) or are silent; hospitals
come and go. Everything else is chance. After every step the invariants of protocol.md §5 must hold over the log.
"""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.aggregator import facts as f
from services.aggregator.round import ALLOWED, Answer, Phase, Rules, State, Tick, alarms, decide, evolve, subject
from services.common.errors import ServiceError
from services.common.secagg.blob import decode
from services.common.secagg.cohort import Cohort
from services.common.secagg.messages import (
    OUTCOME_ACCEPTED,
    OUTCOME_REJECTED,
    AbandonCertificate,
    CohortCertificate,
    Signed,
)
from services.common.store.records import to_json
from tests.support.consortium import derive, make_consortium

CONSORTIUM = make_consortium(4, 2, 3, organisations={"dave": "org-carol"})
ROSTER = replace(CONSORTIUM.roster, maximum_cohort=16)
PODS = tuple(pod.id for pod in ROSTER.pods)
HOSPITALS = tuple(ROSTER.hospitals)
RULES = Rules(roster=ROSTER, minimum=3, rounds=4, grace_ms=100, patience_ms=1000, most_abandoned=2)
BAD_VECTOR = derive("wrong sum")


def signed(*parts: object) -> Signed:
    return Signed(derive(*parts), bytes(64))


class RoundMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.at = 1_000_000
        self.state = State()
        self.log: list[f.Fact] = []
        self.live = set(PODS)
        self.keys: dict[bytes, set[str]] = {}  # M -> pods that still have round keys of it
        self.locked: dict[bytes, dict[str, bytes]] = {}  # M -> pod -> cohort digest
        self.gave_up: dict[bytes, set[str]] = {}  # M -> pods
        self.results = 0

    # what the world does

    def tell(self, command: "f.Fact | Answer | Tick") -> tuple[f.Fact, ...]:
        before = self.state
        try:
            found = decide(self.state, RULES, command)
        except ServiceError:
            assert self.state is before
            return ()
        for fact in found:
            self.log.append(fact)
            self.state = evolve(self.state, fact)
        return found

    def tick(self) -> None:
        lost = set()
        if self.state.M and self.state.phase not in (Phase.PROPOSED, Phase.ABANDONING):
            lost = set(PODS) - self.keys.get(self.state.M, set())
        if self.state.phase is Phase.ABANDONING:
            lost = set(self.locked.get(self.state.M, {}))
        for _ in range(20):
            if not self.tell(Tick(self.at, frozenset(self.live - lost), frozenset(lost))):
                return
        raise AssertionError("a tick that never rests")

    @rule(milliseconds=st.sampled_from([1, 50, 120, 600, 1100, 5000, 60_000]))
    def time_passes(self, milliseconds: int) -> None:
        self.at += milliseconds
        self.tick()

    @rule()
    def next_alarm(self) -> None:
        later = [time for time in alarms(self.state, RULES) if time > self.at]
        if later:
            self.at = min(later)
        self.tick()

    @rule(pod=st.sampled_from(PODS), up=st.booleans())
    def pod_comes_or_goes(self, pod: str, up: bool) -> None:
        self.live = self.live | {pod} if up else self.live - {pod}

    @rule(pod=st.sampled_from(PODS))
    def pod_restarts(self, pod: str) -> None:
        for of_manifest in self.keys.values():
            of_manifest.discard(pod)
        self.live.add(pod)
        self.tick()

    @rule()
    def aggregator_restarts(self) -> None:
        """kill -9: the state is what the log says."""
        again = State()
        for fact in self.log:
            again = evolve(again, f.from_json(*to_json(fact)))
        assert again == self.state
        self.state = again

    @rule()
    def open_round(self) -> None:
        number = self.state.round + 1
        model = self.state.model or derive("v0")
        core, until = derive("core", number), self.at + 10
        self.tell(f.Opened(self.at, number, ROSTER.charter, core, model, self.state.version, "train", until))

    @rule()
    def propose(self) -> None:
        attempt = self.state.attempt + 1
        proposal = signed("proposal", self.state.round, attempt)
        self.tell(f.Proposed(self.at, attempt, proposal, self.at + 2000, self.at + 20_000))

    @rule(pods=st.sets(st.sampled_from(PODS), min_size=1))
    def pods_answer(self, pods: set[str]) -> None:
        for pod in sorted(pods & self.live):
            self.pod_answers(pod)
        self.tick()

    def pod_answers(self, pod: str) -> None:
        state, about, at = self.state, subject(self.state), self.at
        held = self.keys.setdefault(state.M, set()) if state.M else set()
        match state.phase:
            case Phase.PROPOSED:
                self.tell(Answer(about, f.Committed(at, pod, signed("commit", about.hex(), pod))))
                if state.proposal is not None:
                    self.fresh = getattr(self, "fresh", {})
                    self.fresh.setdefault(about, set()).add(pod)
            case Phase.ENDORSING if pod in state.pods:
                held.add(pod)
                self.tell(Answer(about, f.Endorsed(at, pod, signed("endorse", pod))))
            case Phase.OFFERING if pod in held:
                pairs = tuple((who, sub.header_digest) for who, sub in state.submissions.items())
                self.tell(Answer(about, f.Listed(at, pod, signed("accept", pod), pairs, ())))
            case Phase.LOCKING if pod in held and pod not in self.gave_up.get(state.M, set()):
                mine = self.locked.setdefault(state.M, {})
                assert mine.setdefault(pod, state.cohort_digest) == state.cohort_digest, "a second U for one M"
                self.tell(Answer(about, f.Locked(at, pod, signed("lock", pod))))
            case Phase.RELEASING if pod in held:
                for (who, piece), whole in state.asked.items():
                    if who == pod:
                        vector = BAD_VECTOR if pod in getattr(self, "liars", set()) else derive("sum", piece)
                        claim = f.Claimed(at, pod, piece, vector, signed("claim", pod, piece), whole)
                        self.tell(Answer(about, claim))
            case Phase.ABANDONING if pod not in self.locked.get(state.M, {}):
                self.gave_up.setdefault(state.M, set()).add(pod)
                self.tell(Answer(about, f.AbandonSigned(at, pod, signed("abandon", pod))))

    @rule(pod=st.sampled_from(PODS), lies=st.booleans())
    def pod_lies(self, pod: str, lies: bool) -> None:
        self.liars = {pod} if lies else set()

    @rule(hospital=st.sampled_from(HOSPITALS), salt=st.integers(0, 1))
    def submit(self, hospital: str, salt: int) -> None:
        state = self.state
        header = signed("header", state.M.hex(), hospital, salt)
        before = state.submissions.get(hospital)
        fact = f.Submitted(self.at, hospital, header, header.blob, derive("y"), signed("receipt"))
        found = self.tell(Answer(state.M, fact))
        assert not (before is not None and found), "P-7: one submission stands"
        self.tick()

    @rule()
    def most_submit(self) -> None:
        for hospital in HOSPITALS[:3]:
            self.submit(hospital, 0)
        self.submit(HOSPITALS[3], 0)

    @rule(hospital=st.sampled_from(HOSPITALS))
    def decline(self, hospital: str) -> None:
        self.tell(f.Declined(self.at, hospital, "POLICY_REFUSES"))
        self.tick()

    @rule(accepted=st.booleans())
    def conclude(self, accepted: bool) -> None:
        state = self.state
        self.results += 1
        result = derive("result", self.results)
        code = OUTCOME_ACCEPTED if accepted and state.chosen else OUTCOME_REJECTED
        model = derive("model", self.results) if code == OUTCOME_ACCEPTED else state.model
        version = state.newest_version + 1 if code == OUTCOME_ACCEPTED else state.version
        figure = "0.5" if accepted else ""
        close = signed("close")
        self.tell(f.Concluded(self.at, code, "", signed("r"), result, close, bytes(32), model, version, figure))

    @rule()
    def a_good_round(self) -> None:
        """Chance alone seldom reaches a certificate: let everybody do what is right for a while."""
        self.live = set(PODS)
        self.open_round()
        for _ in range(12):
            if self.state.phase is Phase.TRAINING:
                self.at += 600
                self.propose()
            if self.state.phase is Phase.COLLECTING:
                self.most_submit()
            self.pods_answer(set(PODS))

    # what must always hold

    @invariant()
    def every_move_is_allowed(self) -> None:
        state = State()
        for fact in self.log:
            after = evolve(state, fact)
            if after.phase is not state.phase:
                assert ALLOWED[state.phase, type(fact)] is after.phase
            state = after

    @invariant()
    def one_cohort_for_one_manifest_and_never_after_giving_up(self) -> None:
        """P-24: U stands before any lock; no second U for one M; after the abandon decision nothing is locked."""
        manifest, fixed, given_up = b"", None, False
        for fact in self.log:
            match fact:
                case f.Manifested():
                    manifest, fixed, given_up = fact.digest, None, False
                case f.CohortFixed():
                    assert fixed is None
                    assert not given_up
                    assert Cohort.parse(fact.cohort).manifest == manifest
                    fixed = fact
                case f.Locked() | f.Certified():
                    assert fixed is not None, "U is on the disk before the first Lock"
                    assert not given_up
                case f.AbandonDecided():
                    given_up = True

    @invariant()
    def lock_turns_to_abandon_only_below_the_bound(self) -> None:
        locks = 0
        for fact in self.log:
            match fact:
                case f.Proposed():
                    locks = 0
                case f.Locked():
                    locks += 1
                case f.AbandonDecided():
                    assert locks <= ROSTER.committee.may_be_down

    @invariant()
    def certificates_have_a_quorum_and_exclude_each_other(self) -> None:
        for of_manifest, who in self.locked.items():
            both = set(who) & self.gave_up.get(of_manifest, set())
            assert not both
        for fact in self.log:
            if isinstance(fact, f.Certified):
                assert len(decode(CohortCertificate, fact.certificate).locks) >= ROSTER.committee.quorum
            if isinstance(fact, f.Abandoned):
                assert len(decode(AbandonCertificate, fact.certificate).abandons) >= ROSTER.committee.quorum

    @invariant()
    def rounds_and_attempts_rise_and_the_chain_holds(self) -> None:
        """P-16, P-25: numbers only rise; each result names the one before it; a stalled round has none."""
        number, attempt, newest, model = 0, 0, bytes(32), b""
        state = State()
        for fact in self.log:
            match fact:
                case f.Opened():
                    assert fact.round > number
                    number, attempt = fact.round, 0
                    assert fact.model == (model or derive("v0"))
                case f.Proposed():
                    assert fact.attempt == attempt + 1 <= 64
                    attempt = fact.attempt
                case f.Concluded():
                    assert state.previous_result == newest
                    newest, model = fact.result_digest, fact.model
            state = evolve(state, fact)
        assert state.previous_result == newest

    @invariant()
    def a_later_attempt_has_a_certificate_for_each_that_hospitals_saw(self) -> None:
        """P-10: no attempt follows one that reached COLLECTING without its abandon certificate."""
        seen = certified = False
        for fact in self.log:
            match fact:
                case f.Opened():
                    seen = certified = False
                case f.Collecting():
                    seen, certified = True, False
                case f.Abandoned():
                    certified = True
                case f.Proposed():
                    assert not seen or certified
                    seen = False

    @invariant()
    def cohorts_are_large_enough_by_organisation(self) -> None:
        """P-12: dave and carol are of one organisation and count once."""
        for fact in self.log:
            if isinstance(fact, f.CohortFixed):
                owners = {ROSTER.hospitals[who].organisation for who in fact.members}
                assert len(owners) >= RULES.minimum

    @invariant()
    def a_single_liar_is_never_believed(self) -> None:
        """P-23 at (4,2): with one liar at a time the chosen sums are the right ones or there are none."""
        claims: dict[tuple[str, int], bytes] = {}
        for fact in self.log:
            match fact:
                case f.Proposed():
                    claims = {}
                case f.Claimed():
                    claims[fact.pod, fact.piece] = fact.vector
                case f.Verified():
                    for piece, pod in enumerate(fact.chosen):
                        said = [v for (_, p), v in claims.items() if p == piece]
                        assert 2 * said.count(claims[pod, piece]) > len(said) or len(set(said)) == 1


TestRoundMachine = RoundMachine.TestCase
TestRoundMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
