"""Where a study stands: phases, the table of allowed transitions, and the state that follows from the facts.

Pure. `evolve` is total and never judges: `round.decide` does, and only facts that it let through are stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from services.aggregator import facts as f
from services.aggregator.selection import Claims
from services.common.secagg.messages import OUTCOME_ACCEPTED, ZERO_DIGEST, Signed

RETRY_MS = 500  # before the next attempt after one that failed unendorsed: a dead committee must not burn all 64


class Phase(StrEnum):
    """Where the study stands."""

    IDLE = "idle"  # no round is open
    TRAINING = "training"  # a round is open and no attempt is under way
    PROPOSED = "proposed"  # waiting for commitments
    ENDORSING = "endorsing"  # the manifest is fixed, waiting for endorsements
    COLLECTING = "collecting"  # hospitals submit
    OFFERING = "offering"  # pods look at headers and boxes
    LOCKING = "locking"  # U is fixed, pods lock it
    RELEASING = "releasing"  # the certificate stands, pods release
    VERIFIED = "verified"  # the sums to use are chosen, the tally is due
    ABANDONING = "abandoning"  # pods sign that the attempt is given up
    FINISHED = "finished"  # every round of the study is over


ALLOWED: dict[tuple[Phase, type[Any]], Phase] = {
    (Phase.IDLE, f.Opened): Phase.TRAINING,
    (Phase.IDLE, f.Finished): Phase.FINISHED,
    (Phase.TRAINING, f.Proposed): Phase.PROPOSED,
    (Phase.TRAINING, f.Stalled): Phase.IDLE,
    (Phase.PROPOSED, f.Manifested): Phase.ENDORSING,
    (Phase.PROPOSED, f.AttemptFailed): Phase.TRAINING,
    (Phase.ENDORSING, f.Collecting): Phase.COLLECTING,
    (Phase.ENDORSING, f.AttemptFailed): Phase.TRAINING,
    (Phase.COLLECTING, f.Offering): Phase.OFFERING,
    (Phase.COLLECTING, f.AbandonDecided): Phase.ABANDONING,
    (Phase.OFFERING, f.CohortFixed): Phase.LOCKING,
    (Phase.OFFERING, f.AbandonDecided): Phase.ABANDONING,
    (Phase.LOCKING, f.Certified): Phase.RELEASING,
    (Phase.LOCKING, f.AbandonDecided): Phase.ABANDONING,
    (Phase.LOCKING, f.Stalled): Phase.IDLE,
    (Phase.RELEASING, f.Verified): Phase.VERIFIED,
    (Phase.RELEASING, f.Stalled): Phase.IDLE,
    (Phase.VERIFIED, f.Concluded): Phase.IDLE,
    (Phase.VERIFIED, f.Stalled): Phase.IDLE,
    (Phase.ABANDONING, f.Abandoned): Phase.TRAINING,
    (Phase.ABANDONING, f.Stalled): Phase.IDLE,
}
"""(phase, moving fact) to the next phase. A fact that moves nothing is not in here."""


@dataclass(frozen=True)
class Gated:
    """A model whose released figure passed the gate."""

    model: bytes
    version: int
    figure: float
    kept: bytes = b""


@dataclass(frozen=True)
class State:
    """Everything that follows from the facts so far. Round and attempt fields are of the open ones."""

    phase: Phase = Phase.IDLE
    entered: int = 0
    round: int = 0
    previous_result: bytes = ZERO_DIGEST
    model: bytes = b""  # that the next round starts from; empty = the study's initial one
    version: int = 0
    kept: bytes = b""  # beside that model, for the server's next step; empty = nothing
    newest_version: int = 0
    gated: Gated | None = None
    close: Signed | None = None  # of the newest concluded round
    charter: bytes = b""
    core: bytes = b""
    kind: str = "train"
    train_until: int = 0
    declined: Mapping[str, str] = field(default_factory=dict)
    abandoned: tuple[bytes, ...] = ()
    attempt: int = 0
    proposal: Signed | None = None
    deadline: int = 0
    expires: int = 0
    commitments: Mapping[str, Signed] = field(default_factory=dict)
    manifest: bytes = b""
    M: bytes = b""
    pods: tuple[str, ...] = ()  # of the manifest
    endorsements: Mapping[str, Signed] = field(default_factory=dict)
    submissions: Mapping[str, f.Submitted] = field(default_factory=dict)
    lists: Mapping[str, tuple[f.Pair, ...]] = field(default_factory=dict)
    cohort: bytes = b""
    cohort_digest: bytes = b""
    members: tuple[str, ...] = ()
    locks: Mapping[str, Signed] = field(default_factory=dict)
    certificate: bytes = b""
    asked: Mapping[tuple[str, int], bool] = field(default_factory=dict)  # (pod, piece): True = the sum itself
    claims: Claims = field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    how: str = ""
    named: tuple[str, ...] = ()
    disputed: tuple[str, ...] = ()
    abandons: Mapping[str, Signed] = field(default_factory=dict)


_NO_ATTEMPT: dict[str, Any] = {
    "commitments": {},
    "manifest": b"",
    "M": b"",
    "pods": (),
    "endorsements": {},
    "submissions": {},
    "lists": {},
    "cohort": b"",
    "cohort_digest": b"",
    "members": (),
    "locks": {},
    "certificate": b"",
    "asked": {},
    "claims": {},
    "chosen": (),
    "how": "",
    "named": (),
    "disputed": (),
    "abandons": {},
}
"""The attempt fields before anything happened."""


def evolve(state: State, fact: f.Fact) -> State:
    """The state after `fact`, whatever the state was."""
    phase = ALLOWED.get((state.phase, type(fact)), state.phase)
    if phase is not state.phase:
        state = replace(state, phase=phase, entered=fact.at)
    match fact:
        case f.Opened():
            return replace(
                state, round=fact.round, charter=fact.charter, core=fact.core, model=fact.model, kind=fact.kind,
                train_until=fact.train_until, declined={}, abandoned=(), attempt=0, proposal=None, **_NO_ATTEMPT,
            )  # fmt: skip
        case f.Proposed():
            return replace(
                state,
                attempt=fact.attempt,
                proposal=fact.proposal,
                deadline=fact.deadline,
                expires=fact.expires,
                **_NO_ATTEMPT,
            )
        case f.Committed():
            return replace(state, commitments={**state.commitments, fact.pod: fact.commitment})
        case f.Manifested():
            return replace(state, manifest=fact.manifest, M=fact.digest, pods=fact.pods)
        case f.Endorsed():
            return replace(state, endorsements={**state.endorsements, fact.pod: fact.endorsement})
        case f.Submitted():
            return replace(state, submissions={**state.submissions, fact.hospital: fact})
        case f.Declined():
            return replace(state, declined={**state.declined, fact.hospital: fact.reason})
        case f.Listed():
            return replace(state, lists={**state.lists, fact.pod: fact.accepted})
        case f.CohortFixed():
            return replace(state, cohort=fact.cohort, cohort_digest=fact.digest, members=fact.members)
        case f.Locked():
            return replace(state, locks={**state.locks, fact.pod: fact.lock})
        case f.Certified():
            return replace(state, certificate=fact.certificate)
        case f.Assigned():
            asked = dict(state.asked) | dict.fromkeys(fact.digest, False) | dict.fromkeys(fact.release, True)
            return replace(state, asked=asked)
        case f.Claimed():
            of_piece = {**state.claims.get(fact.piece, {}), fact.pod: (fact.vector, fact.released)}
            return replace(state, claims={**state.claims, fact.piece: of_piece})
        case f.Verified():
            return replace(state, chosen=fact.chosen, how=fact.how, named=fact.named, disputed=fact.disputed)
        case f.AbandonSigned():
            return replace(state, abandons={**state.abandons, fact.pod: fact.abandon})
        case f.Abandoned():
            return replace(state, abandoned=(*state.abandoned, fact.certificate), train_until=fact.at)
        case f.AttemptFailed():
            return replace(state, train_until=fact.at + RETRY_MS)
        case f.Concluded():
            gated = state.gated
            if fact.outcome == OUTCOME_ACCEPTED and fact.figure:
                gated = Gated(state.model, state.version, float(fact.figure), state.kept)
            return replace(
                state, previous_result=fact.result_digest, model=fact.model, version=fact.version, gated=gated,
                newest_version=max(state.newest_version, fact.version), close=fact.close, kept=fact.kept,
            )  # fmt: skip
        case _:
            return state
