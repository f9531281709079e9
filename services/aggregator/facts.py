"""What happened to a study: the events of its stream, as frozen dataclasses and as JSON.

The event log IS the storage (architecture.md §4): `round.evolve` folds these into the state, and whatever must
follow is found again from that state. Facts only: never a vector, a seed or a box.
Every `at` is Unix milliseconds. Bytes travel in JSON as hex.
"""

import typing
from dataclasses import dataclass
from typing import Any

from services.common.secagg.messages import Signed
from services.common.store import records

Pair = tuple[str, bytes]  # (hospital id, D(header, blob))


@dataclass(frozen=True)
class Opened:
    """Round `core.round` is open: hospitals train until `train_until`, then attempt 1 is proposed."""

    at: int
    round: int
    charter: bytes
    core: bytes
    model: bytes
    version: int
    kind: str  # train | final
    train_until: int


@dataclass(frozen=True)
class Proposed:
    """Attempt `attempt` was signed and goes to the pods (protocol.md §4 step 1)."""

    at: int
    attempt: int
    proposal: Signed
    deadline: int
    expires: int


@dataclass(frozen=True)
class Committed:
    """A pod's commitment for the attempt (step 2)."""

    at: int
    pod: str
    commitment: Signed


@dataclass(frozen=True)
class Manifested:
    """The manifest's exact bytes; M is `digest` (step 3)."""

    at: int
    manifest: bytes
    digest: bytes
    pods: tuple[str, ...]


@dataclass(frozen=True)
class Endorsed:
    """A pod's signature over M under its round key."""

    at: int
    pod: str
    endorsement: Signed


@dataclass(frozen=True)
class Collecting:
    """At least q pods endorsed M: hospitals may submit until the deadline."""

    at: int


@dataclass(frozen=True)
class Submitted:
    """A hospital's whole upload is on disk and its receipt is signed (step 5)."""

    at: int
    hospital: str
    header: Signed
    header_digest: bytes
    vector: bytes
    receipt: Signed


@dataclass(frozen=True)
class Declined:
    """A hospital said that it takes no part in this round."""

    at: int
    hospital: str
    reason: str


@dataclass(frozen=True)
class Offering:
    """Collecting is over; the pods are offered what came (step 6)."""

    at: int


@dataclass(frozen=True)
class Listed:
    """A pod's signed accept list; `refused` says (hospital, reason) of what it left out."""

    at: int
    pod: str
    accept_list: Signed
    accepted: tuple[Pair, ...]
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CohortFixed:
    """U (exact bytes) and with it the decision to lock, on disk BEFORE the first Lock leaves (P-24)."""

    at: int
    cohort: bytes
    digest: bytes
    members: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]  # (hospital, the pod that refused it)
    dropped_pod: str


@dataclass(frozen=True)
class Locked:
    """A pod's lock signature (step 7)."""

    at: int
    pod: str
    lock: Signed


@dataclass(frozen=True)
class Certified:
    """The cohort certificate: U and at least q locks."""

    at: int
    certificate: bytes


@dataclass(frozen=True)
class Assigned:
    """Which pods are asked for which pieces: sums (`release`) and signed digests only (`digest`) (step 8)."""

    at: int
    release: tuple[tuple[str, int], ...]
    digest: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Claimed:
    """A pod signed the digest of one piece's sum; `released` says that the sum itself came with it."""

    at: int
    pod: str
    piece: int
    vector: bytes
    claim: Signed
    released: bool


@dataclass(frozen=True)
class Verified:
    """P-23: whose sum is used for each piece (ascending), who was named, who is in dispute; empty `chosen` = none."""

    at: int
    chosen: tuple[str, ...]
    named: tuple[str, ...]
    disputed: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class AbandonDecided:
    """From here on nothing of this attempt is locked or released by us (P-24)."""

    at: int
    reason: str


@dataclass(frozen=True)
class AbandonSigned:
    """A pod's identity signature that the attempt is given up (P-14)."""

    at: int
    pod: str
    abandon: Signed


@dataclass(frozen=True)
class Abandoned:
    """The attempt is over with an abandon certificate; the same x may be masked under attempt + 1 (P-10)."""

    at: int
    certificate: bytes


@dataclass(frozen=True)
class AttemptFailed:
    """The attempt ended before q endorsements: no hospital can have masked under it, so no certificate is needed."""

    at: int
    reason: str


@dataclass(frozen=True)
class Concluded:
    """The round's signed result and its Close; the vectors of the round are scrubbed after this."""

    at: int
    outcome: int
    reason: str
    result: Signed
    result_digest: bytes
    close: Signed
    sum: bytes
    model: bytes
    version: int
    figure: str  # decimal text of the gate's figure for the model that the round started from; empty = none
    kept: bytes = b""  # SHA-256 of what the server keeps beside the model for its next step; empty = nothing


@dataclass(frozen=True)
class Stalled:
    """P-25: neither certificate can be had; the round is spent and the next one is round + 1."""

    at: int
    reason: str


@dataclass(frozen=True)
class Finished:
    """Every round of the study is over."""

    at: int


Fact = (
    Opened
    | Proposed
    | Committed
    | Manifested
    | Endorsed
    | Collecting
    | Submitted
    | Declined
    | Offering
    | Listed
    | CohortFixed
    | Locked
    | Certified
    | Assigned
    | Claimed
    | Verified
    | AbandonDecided
    | AbandonSigned
    | Abandoned
    | AttemptFailed
    | Concluded
    | Stalled
    | Finished
)

KINDS: dict[str, type[Any]] = {cls.__name__: cls for cls in typing.get_args(Fact)}

# Facts that can be had again by asking again: they may wait for the next hard fact's fsync, because nothing that
# leaves this process rests on them being on disk. All others are on disk before anybody is answered or asked.
SOFT: tuple[type[Any], ...] = (
    Committed,
    Endorsed,
    Declined,
    Offering,
    Listed,
    Locked,
    Certified,
    Assigned,
    Claimed,
    Verified,
    AbandonSigned,
)


def from_json(kind: str, payload: dict[str, Any]) -> Fact:
    """The fact of a row of the log. Raises UNKNOWN_SCHEMA for a kind or shape of another version of this service."""
    fact: Fact = records.from_json(KINDS, kind, payload)
    return fact
