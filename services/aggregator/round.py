"""Rounds and attempts of one study: a PURE state machine (protocol.md §4, §5).

Rules of this file
- Every transition lives here and in `ALLOWED` (state.py, beside the phases).
- Nothing here reads a clock, a socket, a disk or randomness.
- `decide(state, rules, command)` returns the facts that follow and changes nothing; `evolve(state, fact)` is total.
- Time is data: every command carries `at` (Unix ms). `Tick` says in addition which pods can answer now.
- A fact that is a command already was checked at the edge (signatures, digests, membership of M); here only
  its place in the round is judged. A stale or repeated answer gives no fact; a contradiction is refused.
- P-24: U and the decision to lock are ONE fact, `CohortFixed`; there is at most one for each M, and none after
  `AbandonDecided`. Lock turns to abandon only while at most m - q pods have locked; never back.
- P-25: where neither certificate can be had the round is `Stalled`: spent, and the next is round + 1.
- A rejected round keeps the previous model (or names an earlier one: a rollback) and is a link of the chain.
Not here: choosing U and comparing sums (`selection`), signing, asking the pods (`coordinator`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from services.aggregator import facts as f
from services.aggregator.selection import choose_cohort, compare
from services.aggregator.state import ALLOWED, Phase, State, evolve
from services.common.errors import Reason, ServiceError
from services.common.secagg import blob as codec
from services.common.secagg.messages import MAX_ATTEMPT, AbandonCertificate, CohortCertificate, Manifest
from services.common.secagg.roster import Roster
from services.common.secagg.signing import digest

__all__ = ["ALLOWED", "Answer", "Phase", "Rules", "State", "Tick", "alarms", "decide", "ends", "evolve", "subject"]


@dataclass(frozen=True)
class Rules:
    """What charter and study say, and this site's patience.

    `minimum` is the study's n_min (organisations), `rounds` the number of its last round, `grace_ms` how long a
    silent pod is waited for once q have answered, `patience_ms` how long q are waited for.
    """

    roster: Roster
    minimum: int
    rounds: int
    verify: str = "one"
    grace_ms: int = 2_000
    patience_ms: int = 30_000
    most_abandoned: int = 3


@dataclass(frozen=True)
class Tick:
    """Time passed. `able`: pods that can answer what this phase asks; `lost`: pods that never will for this attempt.

    `awake`: since when this process listens (Unix ms). Waiting for pods begins anew with it: after a restart they
    need a moment to dial, and an attempt must not be given up because we were away.
    """

    at: int
    able: frozenset[str]
    lost: frozenset[str] = frozenset()
    awake: int = 0


@dataclass(frozen=True)
class Answer:
    """A fact about one question: `about` is the proposal's digest or M; an answer to an older one gives nothing."""

    about: bytes
    fact: f.Fact


def subject(state: State) -> bytes:
    """What the present phase's questions are about: the proposal's digest before there is a manifest, then M."""
    if state.phase is Phase.PROPOSED and state.proposal is not None:
        return digest("proposal", state.proposal.blob)
    return state.M


def alarms(state: State, rules: Rules, awake: int = 0) -> tuple[int, ...]:
    """When a Tick may bring something by time alone (Unix ms)."""
    if state.phase in (Phase.IDLE, Phase.FINISHED):
        return ()
    if state.phase is Phase.TRAINING:
        return (state.train_until,)
    if state.phase is Phase.COLLECTING:
        return (state.deadline,)
    since = max(state.entered, awake)
    return (since + rules.grace_ms, since + rules.patience_ms, state.expires)


def ends(state: State) -> int:
    """When the present phase should be over at the latest (Unix ms), 0 where it may last for ever."""
    match state.phase:
        case Phase.IDLE | Phase.FINISHED:
            return 0
        case Phase.TRAINING:
            return state.train_until
        case Phase.COLLECTING:
            return state.deadline
        case _:
            return state.expires


def decide(state: State, rules: Rules, command: "f.Fact | Answer | Tick") -> tuple[f.Fact, ...]:
    """The facts that follow from `command`. Raises WRONG_PHASE, LATE, CONFLICT, UNKNOWN_MEMBER or BELOW_QUORUM."""
    if isinstance(command, Tick):
        return _tick(state, rules, command)
    if isinstance(command, Answer):
        if command.about == subject(state):
            return _take(state, rules, command.fact)
        if isinstance(command.fact, f.Submitted):
            raise _refused(Reason.LATE, "the attempt that this update is for is over: fetch the newest manifest")
        return ()
    return _take(state, rules, command)


def _take(state: State, rules: Rules, fact: f.Fact) -> tuple[f.Fact, ...]:
    """Whether a fact from outside may stand, once."""
    match fact:
        case f.Opened():
            if state.phase is not Phase.IDLE or not state.round < fact.round <= rules.rounds:
                raise _refused(
                    Reason.WRONG_PHASE, f"round {fact.round} cannot open in {state.phase}, round {state.round}"
                )
        case f.Proposed():
            if state.phase is not Phase.TRAINING or fact.attempt != state.attempt + 1 or fact.at < state.train_until:
                raise _refused(Reason.WRONG_PHASE, f"attempt {fact.attempt} cannot be proposed in {state.phase}")
        case f.Committed():
            return _first(
                state,
                Phase.PROPOSED,
                fact,
                fact.pod,
                seen=state.commitments,
                members={pod.id for pod in rules.roster.pods},
            )
        case f.Endorsed():
            return _first(state, Phase.ENDORSING, fact, fact.pod, seen=state.endorsements, members=state.pods)
        case f.Declined():
            over = state.phase in (Phase.IDLE, Phase.FINISHED) or fact.hospital in state.declined
            return () if over or fact.hospital in state.submissions else (fact,)
        case f.Submitted():
            return _submitted(state, rules, fact)
        case f.Listed():
            return _first(state, Phase.OFFERING, fact, fact.pod, seen=state.lists, members=state.pods)
        case f.Locked():
            return _first(state, Phase.LOCKING, fact, fact.pod, seen=state.locks, members=state.pods)
        case f.Claimed():
            return _claimed(state, fact)
        case f.AbandonSigned():
            members = {pod.id for pod in rules.roster.pods}
            return _first(state, Phase.ABANDONING, fact, fact.pod, seen=state.abandons, members=members)
        case f.Concluded():
            if state.phase is not Phase.VERIFIED:
                raise _refused(Reason.WRONG_PHASE, f"round {state.round} cannot be concluded in {state.phase}")
        case _:
            raise _refused(Reason.WRONG_PHASE, f"{type(fact).__name__} is decided here, never told")
    return (fact,)


def _first(
    state: State, phase: Phase, fact: f.Fact, pod: str, *, seen: Mapping[str, Any], members: Collection[str]
) -> tuple[f.Fact, ...]:
    return (fact,) if state.phase is phase and pod in members and pod not in seen else ()


def _submitted(state: State, rules: Rules, fact: f.Submitted) -> tuple[f.Fact, ...]:
    """P-7: identical again gives no fact (and the same receipt), another header is a conflict; late is late."""
    before = state.submissions.get(fact.hospital)
    if before is not None:
        if before.header_digest == fact.header_digest:
            return ()
        raise _refused(Reason.CONFLICT, f"{fact.hospital} submitted another update for this manifest already")
    rules.roster.hospital(fact.hospital)
    if state.phase is not Phase.COLLECTING or fact.at > state.deadline:
        raise _refused(
            Reason.LATE, f"round {state.round} attempt {state.attempt} takes no more: wait for the next round"
        )
    return (fact,)


def _claimed(state: State, fact: f.Claimed) -> tuple[f.Fact, ...]:
    if state.phase is not Phase.RELEASING or (fact.pod, fact.piece) not in state.asked:
        return ()
    before = state.claims.get(fact.piece, {}).get(fact.pod)
    if before is None:
        return (fact,)
    if before[0] != fact.vector:
        raise _refused(
            Reason.CONFLICT, f"{fact.pod} signed two digests for piece {fact.piece}: see the runbook, pod at fault"
        )
    return (fact,) if fact.released and not before[1] else ()


def _tick(state: State, rules: Rules, tick: Tick) -> tuple[f.Fact, ...]:
    at, quorum = tick.at, rules.roster.committee.quorum
    match state.phase:
        case Phase.IDLE:
            return (f.Finished(at),) if state.round >= rules.rounds else ()
        case Phase.TRAINING:
            if state.attempt >= MAX_ATTEMPT or len(state.abandoned) >= rules.most_abandoned:
                return (f.Stalled(at, f"{len(state.abandoned)} attempts were abandoned, {state.attempt} tried"),)
            return ()
        case Phase.PROPOSED:
            everyone = {pod.id for pod in rules.roster.pods}
            if _ready(state, rules, tick, set(state.commitments), everyone):
                return (_manifest(state, rules, at),)
            return _failed(state, rules, tick, set(state.commitments), everyone, step="commit")
        case Phase.ENDORSING:
            if _ready(state, rules, tick, set(state.endorsements), set(state.pods)):
                return (f.Collecting(at),)
            return _failed(state, rules, tick, set(state.endorsements), set(state.pods), step="endorse")
        case Phase.COLLECTING:
            return _collecting(state, rules, tick)
        case Phase.OFFERING:
            if _ready(state, rules, tick, set(state.lists), set(state.pods)):
                return (_cohort(state, rules, at),)
            if _hopeless(state, rules, tick, set(state.lists), set(state.pods)):
                return (
                    f.AbandonDecided(at, f"only {len(state.lists)} pods answered the offer, the quorum is {quorum}"),
                )
            return ()
        case Phase.LOCKING:
            return _locking(state, rules, tick)
        case Phase.RELEASING:
            return _releasing(state, rules, tick)
        case Phase.VERIFIED:
            return (
                (f.Stalled(at, "the sums were not had again before the attempt expired"),)
                if at >= state.expires
                else ()
            )
        case Phase.ABANDONING:
            if len(state.abandons) >= quorum:
                return (f.Abandoned(at, _abandon_certificate(state, rules)),)
            refusing = len(tick.lost - set(state.abandons))
            if at >= state.expires or rules.roster.committee.pods - refusing < quorum:
                return (
                    f.Stalled(
                        at, f"neither certificate: {len(state.abandons)} pods gave up, {len(state.locks)} locked"
                    ),
                )
            return ()
        case Phase.FINISHED:
            return ()


def _waited(state: State, tick: Tick) -> int:
    return tick.at - max(state.entered, tick.awake)


def _ready(state: State, rules: Rules, tick: Tick, answered: set[str], asked: set[str]) -> bool:
    """At least q answered, and nobody else is worth waiting for."""
    if len(answered) < rules.roster.committee.quorum:
        return False
    waited = _waited(state, tick)
    missing = asked - answered - tick.lost
    return not missing or waited >= rules.patience_ms or (waited >= rules.grace_ms and not missing & tick.able)


def _hopeless(state: State, rules: Rules, tick: Tick, answered: set[str], asked: set[str]) -> bool:
    """Fewer than q will ever answer, or we waited long enough for them."""
    quorum = rules.roster.committee.quorum
    if len((asked - tick.lost) | answered) < quorum or tick.at >= state.expires:
        return True
    return _waited(state, tick) >= rules.patience_ms and len((asked & tick.able) | answered) < quorum


def _failed(
    state: State, rules: Rules, tick: Tick, answered: set[str], asked: set[str], *, step: str
) -> tuple[f.Fact, ...]:
    if _hopeless(state, rules, tick, answered, asked) or _waited(state, tick) >= rules.patience_ms:
        quorum = rules.roster.committee.quorum
        return (f.AttemptFailed(tick.at, f"{len(answered)} pods answered {step}, the quorum is {quorum}"),)
    return ()


def _manifest(state: State, rules: Rules, at: int) -> f.Manifested:
    order = [pod.id for pod in rules.roster.pods if pod.id in state.commitments]
    assert state.proposal is not None  # noqa: S101  # PROPOSED is entered with one
    blob = codec.encode(Manifest(state.proposal, tuple(state.commitments[pod] for pod in order)))
    return f.Manifested(at, blob, digest("manifest", blob), tuple(order))


def _collecting(state: State, rules: Rules, tick: Tick) -> tuple[f.Fact, ...]:
    roster, at = rules.roster, tick.at
    if len(set(state.pods) - tick.lost) < roster.committee.quorum:
        return (f.AbandonDecided(at, "more pods lost their keys of this attempt than the committee can bear"),)
    organisations = {roster.hospitals[hospital].organisation for hospital in state.submissions}
    enough = len(organisations) >= rules.minimum
    everyone = set(roster.hospitals) <= set(state.submissions) | set(state.declined)
    if enough and (everyone or at >= state.deadline):
        return (f.Offering(at),)
    if at >= state.deadline:
        why = (
            f"{len(state.submissions)} hospitals of {len(organisations)} organisations submitted, {rules.minimum} must"
        )
        return (f.AbandonDecided(at, why),)
    return ()


def _cohort(state: State, rules: Rules, at: int) -> f.Fact:
    chosen = choose_cohort(state.M, state.lists, state.submissions, rules.roster, rules.minimum)
    if chosen is None:
        return f.AbandonDecided(at, f"no {rules.roster.committee.quorum} pods accept one cohort of {rules.minimum}")
    cohort, left_out, dropped = chosen
    members = tuple(member.hospital for member in cohort.members)
    return f.CohortFixed(at, cohort.blob, cohort.digest, members, left_out, dropped)


def _locking(state: State, rules: Rules, tick: Tick) -> tuple[f.Fact, ...]:
    committee, at = rules.roster.committee, tick.at
    if len(state.locks) >= committee.quorum:
        order = [pod.id for pod in rules.roster.pods if pod.id in state.locks]
        blob = codec.encode(CohortCertificate(state.cohort, tuple(state.locks[pod] for pod in order)))
        return (f.Certified(at, blob),)
    if not _hopeless(state, rules, tick, set(state.locks), set(state.pods)):
        return ()
    if len(state.locks) <= committee.may_be_down and at < state.expires:
        return (f.AbandonDecided(at, f"only {len(state.locks)} pods locked, the quorum is {committee.quorum}"),)
    if at >= state.expires or len((set(state.pods) - tick.lost) | set(state.locks)) < committee.quorum:
        return (f.Stalled(at, f"{len(state.locks)} pods locked, the quorum is {committee.quorum}"),)
    return ()


def _releasing(state: State, rules: Rules, tick: Tick) -> tuple[f.Fact, ...]:
    if tick.at >= state.expires:
        return (f.Stalled(tick.at, "the sums of all pieces were not had before the attempt expired"),)
    found = compare(
        state.claims, state.asked, state.pods, roster=rules.roster, verify=rules.verify, able=tick.able, lost=tick.lost
    )
    if found.doomed:
        return (f.Stalled(tick.at, "too many holders of a piece lost their keys of this attempt"),)
    if found.release or found.digest:
        return (f.Assigned(tick.at, found.release, found.digest),)
    if found.settled is not None:
        return (f.Verified(tick.at, found.settled, found.named, found.disputed, found.how),)
    return ()


def _abandon_certificate(state: State, rules: Rules) -> bytes:
    order = [pod.id for pod in rules.roster.pods if pod.id in state.abandons]
    return codec.encode(AbandonCertificate(tuple(state.abandons[pod] for pod in order)))


def _refused(reason: Reason, detail: str) -> ServiceError:
    return ServiceError(reason, detail)
