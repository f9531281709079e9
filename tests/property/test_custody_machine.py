"""A liar in the aggregator's place sends one pod anything, in any order, with restarts and a clock of its choice.

Failures (each an assertion): two cohorts signed for one attempt · a lock after an abandon or an abandon after a lock ·
two commitments, manifests or cores where one is promised · two locked attempts of one round without the abandon
certificate · a sum without a certificate over exactly that cohort · a key in memory that the state does not list ·
anything signed before the marks · a state that the log does not give back.
Non-failures: any refusal; a pod that can do nothing any more.
"""

from collections.abc import Iterator, Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.common.errors import ServiceError
from services.common.secagg import blob as codec
from services.common.secagg.certificate import CheckedManifest, Ref, check_manifest
from services.common.secagg.cohort import Cohort
from services.common.secagg.messages import (
    Accepted,
    AcceptList,
    Close,
    CohortCertificate,
    Commitment,
    Endorsement,
    HighWaterMark,
    Lock,
    Manifest,
    Signed,
)
from services.common.secagg.signing import open_signed
from services.keyshare import custody
from services.keyshare.custody import Phase, phase_of
from services.keyshare.facts import Event, State
from services.keyshare.pod import Pod
from tests.support.consortium import STUDY, Submission, derive, make_consortium
from tests.support.pods import FakeClock, vector

HOSPITALS = ("alice", "bob", "carol", "dave")
COHORTS = (HOSPITALS, HOSPITALS[:3], HOSPITALS[1:], HOSPITALS[:2])
CONSORTIUM = make_consortium()
ROSTER = CONSORTIUM.roster
rounds = st.integers(1, 2)
attempts = st.integers(1, 3)
models = st.sampled_from(["model", "model", "model", "other"])


class MemoryStore:
    """A log that survives a restart of its pod and nothing else."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def load(self) -> Iterator[Event]:
        yield from list(self.events)

    def append(self, events: Sequence[Event]) -> None:
        self.events += events

    def audit(self) -> Iterator[bytes]:
        yield b""


class CustodyMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.store, self.clock = MemoryStore(), FakeClock()
        self.manifests: dict[bytes, CheckedManifest] = {}
        self.own: dict[Ref, bytes] = {}
        self.endorsed: dict[Ref, bytes] = {}
        self.cores: dict[int, bytes] = {}
        self.locked: dict[Ref, bytes] = {}
        self.abandoned: set[Ref] = set()
        self.boot()

    def boot(self) -> None:
        self.pod = Pod("pod-0", CONSORTIUM.pods[0].identity, self.store, {ROSTER.charter: ROSTER}, self.clock)  # type: ignore[arg-type]  # a fake store

    @rule()
    def restart(self) -> None:
        """kill −9 and start: keys are gone, nothing is signed before the marks."""
        before = self.pod.state
        self.boot()
        assert not self.pod._secrets
        assert not self.pod.state.held
        assert not self.pod.live
        assert self.pod.state.records == before.records

    @rule(
        number=rounds, attempt=attempts, model=models, depth=st.integers(1, 4), names=st.sampled_from(COHORTS),
        show=st.booleans(),
    )  # fmt: skip
    def advance(self, number: int, attempt: int, model: str, depth: int, names: tuple[str, ...], show: bool) -> None:
        """An honest aggregator for a while: `depth` steps of one attempt, so that the liar finds locks to attack."""
        if not self.pod.live:
            self.marks(3, True)
        known = set(self.manifests)
        self.propose(number, attempt, model, True, show)
        fresh = [blob for blob in self.manifests if blob not in known]
        if fresh:
            steps = (self.endorse_one, self.offer_all, lambda blob: self.lock_one(blob, names),
                     lambda blob: self.release_one(blob, names, 3, 1))  # fmt: skip
            for step in steps[:depth]:
                step(fresh[0])

    @rule(count=st.integers(1, 3), fresh=st.booleans())
    def marks(self, count: int, fresh: bool) -> None:
        """P-11: q − 1 = 2 fresh marks make live."""
        was = self.pod.live
        nonce = self.pod.state.boot if fresh else derive("old nonce")
        marks = [
            CONSORTIUM.pods[i].identity.sign("highwater", codec.encode(HighWaterMark(nonce, "pod-0", f"pod-{i}", ())))
            for i in range(1, count + 1)
        ]
        try:
            self.pod.deliver(marks)
        except ServiceError:
            assert was or not (fresh and count >= 2)
        assert self.pod.live == (was or (fresh and count >= 2))

    @rule(number=rounds, attempt=attempts, model=models, study=st.booleans(), show=st.booleans())
    def propose(self, number: int, attempt: int, model: str, study: bool, show: bool) -> None:
        core = CONSORTIUM.core(round=number, model=derive(model), study=STUDY if study else derive("s2"))
        proposal = CONSORTIUM.proposal(core, attempt)
        given_up = [m for m in self.manifests.values() if show and m.core.round == number]
        certificates = [CONSORTIUM.abandon_certificate(m, [1, 2, 3]) for m in given_up]
        ref = Ref(core.study, number, attempt)
        try:
            signed = self.pod.propose(proposal, certificates)
        except ServiceError:
            return
        assert self.pod.live
        assert self.own.setdefault(ref, signed.blob) == signed.blob
        assert ref not in self.abandoned
        if study:
            assert self.cores.setdefault(number, codec.encode(core)) == codec.encode(core)
        for other, manifest in self.endorsed.items():
            if other[:2] == ref[:2] and other in self.locked and other != ref:
                assert manifest in {m.M for m in given_up}
        others = [CONSORTIUM.commitment(proposal, i, core, attempt) for i in (1, 2, 3)]
        for listed in ((signed, *others), (signed, *others[:2])):
            blob = codec.encode(Manifest(proposal, listed))
            self.manifests[blob] = check_manifest(blob, ROSTER)

    def pick(self, data: st.DataObject) -> bytes:
        """A manifest, most often of the attempt that is open."""
        newest = list(reversed(self.manifests))
        return data.draw(st.one_of(st.just(newest[min(1, len(newest) - 1)]), st.sampled_from(newest)))

    def about(self, blob: bytes) -> tuple[CheckedManifest, Ref]:
        return self.manifests[blob], self.manifests[blob].ref

    @precondition(lambda self: self.manifests)
    @rule(data=st.data())
    def endorse(self, data: st.DataObject) -> None:
        self.endorse_one(self.pick(data))

    def endorse_one(self, blob: bytes) -> None:
        checked, ref = self.about(blob)
        try:
            signed = self.pod.endorse(blob)
        except ServiceError:
            return
        assert open_signed(Endorsement, "endorse", signed, self.round_key(checked)).manifest == checked.M
        assert self.endorsed.setdefault(ref, checked.M) == checked.M
        assert ref not in self.abandoned

    @precondition(lambda self: self.manifests)
    @rule(data=st.data(), names=st.sets(st.sampled_from(HOSPITALS), min_size=1))
    def offer(self, data: st.DataObject, names: set[str]) -> None:
        self.offer_some(self.pick(data), names)

    def offer_all(self, blob: bytes) -> None:
        self.offer_some(blob, set(HOSPITALS))

    def offer_some(self, blob: bytes, names: set[str]) -> None:
        checked, ref = self.about(blob)
        sent = [self.submission(checked, name) for name in sorted(names)]
        try:
            signed, _ = self.pod.offer(blob, lambda: [(one.header, one.boxes[0]) for one in sent])
        except ServiceError:
            return
        assert open_signed(AcceptList, "accept", signed, self.round_key(checked)).manifest == self.endorsed[ref]
        assert ref not in self.abandoned

    @precondition(lambda self: self.manifests)
    @rule(data=st.data(), names=st.sampled_from(COHORTS))
    def lock(self, data: st.DataObject, names: tuple[str, ...]) -> None:
        self.lock_one(self.pick(data), names)

    def lock_one(self, blob: bytes, names: tuple[str, ...]) -> None:
        checked, ref = self.about(blob)
        cohort = self.cohort(checked, names)
        try:
            signed = self.pod.lock(blob, cohort.blob)
        except ServiceError:
            return
        lock = open_signed(Lock, "lock", signed, self.round_key(checked))
        self.promise(ref, lock.cohort, names)

    @precondition(lambda self: self.manifests)
    @rule(data=st.data(), names=st.sampled_from(COHORTS), signers=st.integers(2, 3), piece=st.integers(0, 3))
    def release(self, data: st.DataObject, names: tuple[str, ...], signers: int, piece: int) -> None:
        self.release_one(self.pick(data), names, signers, piece)

    def release_one(self, blob: bytes, names: tuple[str, ...], count: int, piece: int) -> None:
        checked, ref = self.about(blob)
        cohort = self.cohort(checked, names)
        signers = [i for i in (1, 2, 3) if i in checked.commitments][:count]
        enough = len(signers) == ROSTER.committee.quorum
        locks = tuple(CONSORTIUM.lock(cohort, i) for i in signers)
        certificate = codec.encode(CohortCertificate(cohort.blob, locks))
        try:
            items = list(self.pod.release(blob, certificate, [piece], 0, 1))
        except ServiceError:
            return
        assert enough
        assert piece != 0  # not pod-0's
        assert isinstance(items[-1], Signed)
        self.promise(ref, cohort.digest, names)

    def promise(self, ref: Ref, cohort: bytes, names: tuple[str, ...]) -> None:
        assert self.pod.live
        assert self.locked.setdefault(ref, cohort) == cohort
        assert ref not in self.abandoned
        assert len(names) >= ROSTER.minimum_cohort

    @rule(data=st.data(), number=rounds, attempt=attempts)
    def abandon(self, data: st.DataObject, number: int, attempt: int) -> None:
        ref, manifest = Ref(STUDY, number, attempt), derive("an M never seen")
        if self.manifests and data.draw(st.booleans()):
            checked, ref = self.about(self.pick(data))
            manifest = checked.M
        try:
            self.pod.abandon(ROSTER.charter, ref, manifest)
        except ServiceError:
            return
        self.abandoned.add(ref)
        assert ref not in self.locked
        assert not self.pod.state.holds(ref)
        assert self.pod.live

    @rule(number=rounds)
    def close(self, number: int) -> None:
        signed = CONSORTIUM.aggregator.sign("close", codec.encode(Close(ROSTER.charter, STUDY, number)))
        self.pod.close(signed)
        assert all(ref.study != STUDY or ref.round > number for ref in self.pod._secrets)

    @rule(seconds=st.sampled_from([1, 4000]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += 1000 * seconds
        self.pod.expire()
        assert all(held.expires > self.clock.now for held in self.pod.state.held.values())
        if seconds > 3600:
            self.clock.now -= 1000 * seconds  # or nothing would ever be proposed again

    @invariant()
    def memory_holds_no_other_keys(self) -> None:
        """P-22: what is in memory is what the state lists, at most one attempt a study."""
        assert set(self.pod._secrets) == {held.ref for held in self.pod.state.held.values()}

    @invariant()
    def promises_stand_in_the_state(self) -> None:
        """P-4, P-14: every lock and abandon that was signed is still known, unless the round is past or closed."""
        for ref in self.locked:
            assert phase_of(self.pod.state, ref) in (Phase.LOCKED, Phase.PAST, Phase.CLOSED)
        for ref in self.abandoned:
            assert phase_of(self.pod.state, ref) in (Phase.ABANDONED, Phase.PAST, Phase.CLOSED)

    @invariant()
    def the_log_gives_the_state_back(self) -> None:
        state = State("pod-0")
        for event in self.store.events:
            state = custody.evolve(state, event)
        assert state == self.pod.state

    def round_key(self, checked: CheckedManifest) -> bytes:
        own = codec.decode(Commitment, self.own[checked.ref])
        return own.round_key

    def submission(self, checked: CheckedManifest, name: str) -> Submission:
        return CONSORTIUM.submit(checked, name, vector(checked.table, HOSPITALS.index(name)))

    def cohort(self, checked: CheckedManifest, names: tuple[str, ...]) -> Cohort:
        # A header has no random part but its boxes: the accepted one is looked up where there is one.
        held = self.pod.state.held.get(checked.core.study)
        known = held.accepted if held else {}
        return Cohort(checked.M, tuple(Accepted(name, known.get(name, derive(name))) for name in sorted(names)))


CustodyMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCustodyMachine = CustodyMachine.TestCase


def test_the_machine_reaches_a_release() -> None:
    """The liar's rules, in the honest order, do reach lock and release: the machine is not idle (P-20)."""
    machine = CustodyMachine()
    machine.start()
    machine.marks(3, True)
    machine.propose(1, 1, "model", True, False)
    blob = next(iter(machine.manifests))
    machine.endorse_one(blob)
    machine.offer_all(blob)
    machine.release_one(blob, HOSPITALS, 3, 1)
    assert machine.locked
    assert phase_of(machine.pod.state, Ref(STUDY, 1, 1)) is Phase.LOCKED
