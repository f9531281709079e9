"""One study as it runs here: its state, its log, and what the aggregator does by its own hand.

Used by the coordinator's thread; `conclude` and the cached look-ups also by others. The state may be ahead of the
disk by `unstored`; `Coordinator` publishes nothing before `store_facts`.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from services.aggregator import facts as f
from services.aggregator import metrics
from services.aggregator.charters import Charters
from services.aggregator.conclude import conclude
from services.aggregator.plan import Plan, waiting_for
from services.aggregator.round import Phase, Rules, State, evolve
from services.aggregator.store import Store
from services.aggregator.vectors import read_opening
from services.common.documents.charter import LoadedCharter
from services.common.documents.shape import core_for, round_shape, total_rounds
from services.common.documents.study import LoadedStudy
from services.common.errors import Reason, ServiceError
from services.common.secagg import blob as codec
from services.common.secagg.certificate import CheckedManifest, check_manifest
from services.common.secagg.encoding import LaneTable
from services.common.secagg.messages import OUTCOME_ACCEPTED, Core, Proposal, Result, Signed
from services.common.secagg.signing import Signer
from wardround.keyshare.v1.keyshare_pb2 import FetchOfferResponse
from wardround.submission.v1.submission_pb2 import SubmissionOpen

_log = logging.getLogger(__name__)
_SKEW_MS = 60_000  # pods' clocks may be behind: round keys must not seem to live longer than the charter allows
_PASSING = frozenset({Phase.PROPOSED, Phase.ENDORSING, Phase.OFFERING, Phase.LOCKING, Phase.RELEASING})
"""Phases of every round, between two that are logged: metrics count and time them all."""


@lru_cache(maxsize=32)  # every pod is offered the same few; their files never change
def _opening(path: Path, total: int) -> SubmissionOpen:
    return SubmissionOpen.FromString(read_opening(path, total))


@dataclass(frozen=True)
class Patience:
    """How long pods are waited for (ms), and how many attempts of a round may be abandoned."""

    grace_ms: int = 2_000
    patience_ms: int = 30_000
    most_abandoned: int = 3


@dataclass(frozen=True)
class Link:
    """One signed result with what proves it, for the chain that hospitals follow."""

    round: int
    result: Signed
    manifest: bytes
    endorsements: tuple[Signed, ...]
    certificate: bytes


class StudyRun:
    """The study's log, folded. Raises UNKNOWN_SCHEMA for a log of a newer version."""

    def __init__(
        self, store: Store, charters: Charters, signer: Signer, study: LoadedStudy, patience: Patience
    ) -> None:
        self.study = study
        self._store = store
        self._charters = charters
        self._signer = signer
        self._patience = patience
        self._checked: CheckedManifest | None = None
        self._core: tuple[bytes, LaneTable] | None = None
        self._rules: dict[bytes, Rules] = {}
        self.waiting = ""
        self.reload()

    def reload(self) -> None:
        """Read the log again: what was not stored is forgotten."""
        self.state = State()
        self.links: list[Link] = []
        self.models: set[bytes] = {bytes.fromhex(self.study.document.model.initial)}
        self._kept: set[bytes] = set()  # what was kept beside any model; scrubbed when no step can start from it
        self.unstored: list[f.Fact] = []
        self.closed_round = 0
        self.figures: dict[str, float] = {}  # newest released ones by name
        self.cohort: tuple[str, ...] = ()  # the newest
        self.newest: dict[tuple[str, str], int] = {}  # (role, member) → round whose cohort it was in, or locked
        stored = self._store.facts(self.study.digest)
        for fact in stored:
            self._fold(fact)
        self._version = len(stored)

    @property
    def rules(self) -> Rules:
        """Of the charter that the newest round opened under, else of the pinned one."""
        charter = self.state.charter or self._charters.pinned.current.digest
        if charter not in self._rules:
            loaded = self._charters.get(charter)
            self._rules[charter] = Rules(
                roster=loaded.roster,
                minimum=max(self.study.document.cohort.minimum, loaded.roster.minimum_cohort),
                rounds=total_rounds(self.study),
                verify=loaded.document.verify,
                grace_ms=self._patience.grace_ms,
                patience_ms=self._patience.patience_ms,
                most_abandoned=self._patience.most_abandoned,
            )
        return self._rules[charter]

    def charters(self) -> dict[str, bytes]:
        """Digests of the pinned charters by the words `current` and `next`."""
        pinned = self._charters.pinned
        found = {"current": pinned.current.digest}
        return found if pinned.next is None else {**found, "next": pinned.next.digest}

    @property
    def table(self) -> LaneTable:
        """The lane table of the newest round. Raises WRONG_PHASE before the first."""
        if not self.state.core:
            raise ServiceError(Reason.WRONG_PHASE, "no round has been opened yet: wait")
        if self._core is None or self._core[0] != self.state.core:
            core = codec.decode(Core, self.state.core)
            self._core = (self.state.core, LaneTable(core.lanes, core.ring_bits))
        return self._core[1]

    @property
    def total_bytes(self) -> int:
        """Bytes of one packed vector of the newest round, 0 before the first."""
        return self.table.total_bytes if self.state.core else 0

    def manifest(self, state: State) -> CheckedManifest:
        """The checked manifest of the attempt in `state`. Raises WRONG_PHASE where there is none."""
        if not state.manifest:
            raise ServiceError(Reason.WRONG_PHASE, f"round {state.round} has no manifest yet: wait for the next phase")
        checked = self._checked
        if checked is None or checked.M != state.M:
            checked = self._checked = check_manifest(state.manifest, self._charters.get(state.charter).roster)
        return checked

    def offered(self, state: State, pod: str) -> Iterator[FetchOfferResponse]:
        """Header and `pod`'s box of every submission of the attempt in `state`. Raises CLOSED once it is over."""
        checked = self.manifest(state)
        place = list(checked.commitments).index(checked.roster.pod_index(pod))
        for hospital in sorted(state.submissions, key=str.encode):
            header = state.submissions[hospital].header_digest
            path = self._store.vectors.submission(state.round, state.attempt, header)
            try:
                opening = _opening(path, checked.table.total_bytes)
            except FileNotFoundError:
                raise ServiceError(Reason.CLOSED, "the attempt is over: nothing is offered any more") from None
            yield FetchOfferResponse(header=opening.header, box=opening.boxes[place])

    def take(self, fact: f.Fact) -> None:
        """Fold in a new fact; it is on the disk after `store_facts`."""
        before = self.state
        self._fold(fact)
        self.unstored.append(fact)
        self._measure(before, fact)

    def store_facts(self) -> None:
        """Put everything taken on the disk; drop the vectors of attempts that are over. Raises STORAGE."""
        if not self.unstored:
            return
        fresh, self.unstored = self.unstored, []
        self._version = self._store.append(self.study.digest, self._version, fresh)
        if any(isinstance(fact, f.Concluded | f.Stalled | f.Abandoned | f.AttemptFailed) for fact in fresh):
            self.scrub()

    def scrub(self) -> None:
        """Remove the vectors of every attempt but the open one, and what no later step will start from."""
        over = self.state.phase in (Phase.IDLE, Phase.TRAINING, Phase.FINISHED)
        self._store.vectors.scrub(None if over else (self.state.round, self.state.attempt))
        needed = {self.state.kept, self.state.gated.kept if self.state.gated is not None else b""}
        for kept in self._kept - needed:
            self._store.blobs.delete(kept)
        self._kept &= needed

    def open_round(
        self,
        plan: Plan,
        pods: Mapping[str, tuple[bytes, ...]],
        live: frozenset[str],
        hospitals: Mapping[str, tuple[bytes, ...]],
        at: int,
    ) -> f.Opened | None:
        """The next round, if the plan wants one and enough pods and hospitals are there; `waiting` says why not."""
        state, document = self.state, self.study.document
        if state.round >= plan.target:
            self.waiting = f"the plan's target, round {plan.target}, is reached: raise through_round to go on"
            return None
        if datetime.fromtimestamp(at / 1000, UTC).date() > document.expires:
            self.waiting = f"study {document.name} expired on {document.expires}: roll out a new one"
            return None
        if not self._store.blobs.has(state.model or plan.initial):
            self.waiting = waiting_for(plan.initial)
            return None
        charter = self._charters.in_force(state.charter, pods, hospitals)
        roster = charter.roster
        count = len(live & {pod.id for pod in roster.pods})
        owners = {roster.hospitals[who].organisation for who in hospitals if who in roster.hospitals}
        minimum = max(document.cohort.minimum, roster.minimum_cohort)
        if count < roster.committee.quorum or len(owners) < minimum:
            self.waiting = (
                f"waiting for pods ({count} of {roster.committee.quorum}) and hospitals "
                f"({len(owners)} organisations of {minimum})"
            )
            return None
        self.waiting = ""
        self._charters.keep(charter)
        return self._opened(charter, at)

    def _opened(self, charter: LoadedCharter, at: int) -> f.Opened:
        state, number = self.state, self.state.round + 1
        model = state.model or bytes.fromhex(self.study.document.model.initial)
        core = core_for(charter, self.study, number, state.previous_result, model)
        shape = round_shape(charter, self.study, number)
        until = at + int(self.study.document.timing.train_seconds * 1000)
        return f.Opened(at, number, charter.digest, codec.encode(core), model, state.version, shape.kind, until)

    def propose(self, live: frozenset[str], at: int) -> f.Proposed | None:
        """The next attempt of the open round, once q pods are live."""
        state, rules, timing = self.state, self.rules, self.study.document.timing
        count = len(live & {pod.id for pod in rules.roster.pods})
        if count < rules.roster.committee.quorum:
            self.waiting = f"waiting for pods: {count} of {rules.roster.committee.quorum} are live"
            return None
        self.waiting = ""
        longest = rules.roster.limits.round_key_ms
        expires = at + min(int(timing.attempt_seconds * 1000), longest - min(_SKEW_MS, longest // 10))
        deadline = min(at + int(timing.submit_seconds * 1000), expires)
        attempt = state.attempt + 1
        proposal = self._signer.sign("proposal", codec.encode(Proposal(state.core, attempt, deadline, expires)))
        return f.Proposed(at, attempt, proposal, deadline, expires)

    def conclude(self, state: State, at: int) -> f.Concluded:
        """Tally and sign the result of the round in `state` (phase VERIFIED). Raises STORAGE."""
        hospitals = len(self.rules.roster.hospitals)
        return conclude(state, self.table, self.study, self._store, hospitals=hospitals, signer=self._signer, at=at)

    def _fold(self, fact: f.Fact) -> None:
        self.state = evolve(self.state, fact)
        state = self.state
        match fact:
            case f.Concluded():
                endorsements = tuple(state.endorsements[pod] for pod in state.pods if pod in state.endorsements)
                self.links.append(Link(state.round, fact.result, state.manifest, endorsements, state.certificate))
                self.models.add(fact.model)
                self._kept |= {fact.kept} - {b""}
                self.closed_round = state.round
                self.figures = self.figures | json.loads(codec.decode(Result, fact.result.blob).released)["figures"]
            case f.Stalled():
                self.closed_round = state.round
            case f.CohortFixed():
                self.cohort = fact.members
                self.newest = self.newest | {("hospital", hospital): state.round for hospital in fact.members}
            case f.Locked():
                self.newest = {**self.newest, ("pod", fact.pod): state.round}

    def _measure(self, before: State, fact: f.Fact) -> None:
        state = self.state
        if state.phase is not before.phase:
            if before.entered:
                metrics.PHASE_SECONDS.labels(before.phase.value).observe(max(0, fact.at - before.entered) / 1000)
            words = {"round": state.round, "attempt": state.attempt, "phase": state.phase.value}
            reason = getattr(fact, "reason", "")
            level = logging.DEBUG if state.phase in _PASSING else logging.INFO
            _log.log(level, "phase", extra=words | ({"reason": reason} if reason else {}))
        match fact:
            case f.Proposed():
                metrics.ATTEMPTS.inc()
            case f.Declined():
                metrics.DECLINED.labels(fact.reason).inc()
            case f.AbandonDecided():
                metrics.ATTEMPTS_ENDED.labels("abandoned").inc()
            case f.AttemptFailed():
                metrics.ATTEMPTS_ENDED.labels("failed").inc()
            case f.Stalled():
                metrics.ROUNDS.labels("stalled").inc()
            case f.Concluded():
                metrics.ROUNDS.labels("accepted" if fact.outcome == OUTCOME_ACCEPTED else "rejected").inc()
            case f.CohortFixed():
                metrics.count_dropped(state, fact, self.rules.roster)
                for hospital, pod in fact.left_out:
                    _log.warning("left out of the cohort", extra={"hospital": hospital, "pod": pod})
            case f.Verified():
                metrics.POD_FAULTS.labels("named").inc(len(fact.named))
                metrics.POD_FAULTS.labels("disputed").inc(len(fact.disputed))
                for pod in (*fact.named, *fact.disputed):
                    _log.error("pod at fault or in dispute about a sum", extra={"pod": pod, "named": pod in fact.named})
