"""The words of custody: what a pod knows (`State`), what it may be asked (commands), what has happened (events).

Events hold facts, never secrets: they are the log on the disk, and `audit.jsonl` for everybody who asks.
Not here: any decision (custody.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from services.common.secagg.certificate import CheckedManifest, CheckedProposal
from services.common.secagg.cohort import Cohort
from services.common.secagg.messages import HighWaterMark
from services.common.secagg.roster import Roster

Point = tuple[int, int]
"""(round, attempt); (0, 0) = never."""


class Ref(NamedTuple):
    """One attempt."""

    study: bytes
    round: int
    attempt: int

    @property
    def point(self) -> Point:
        """(round, attempt)."""
        return self.round, self.attempt


class Entry(NamedTuple):
    """A hospital's signed header at Offer: its digest, its ledger mark (L-4), why it is refused ("" = accepted)."""

    hospital: str
    header: bytes
    sequence: int
    head: bytes
    refusal: str


@dataclass(frozen=True)
class Record:
    """What the disk knows of one study. `charter` to `locks` are of the round of `committed` only."""

    committed: Point = (0, 0)  # highest of each
    endorsed: Point = (0, 0)
    locked: Point = (0, 0)
    closed: int = 0  # this round and all below
    charter: bytes = b""
    core: bytes = b""  # digest (P-16)
    manifests: Mapping[int, bytes] = field(default_factory=dict)  # attempt → the one M endorsed
    locks: Mapping[int, tuple[bytes, bytes]] = field(default_factory=dict)  # attempt → (M, cohort digest)
    abandoned: Mapping[Point, bytes] = field(default_factory=dict)  # → M
    ledger: Mapping[str, int] = field(default_factory=dict)  # hospital → highest sequence (L-4)
    seen: Mapping[str, tuple[Point, Point]] = field(default_factory=dict)  # other pod → highest (commit, lock) (P-11)


@dataclass(frozen=True)
class Held:
    """The attempt whose round keys this boot holds; at most one a study (P-22)."""

    ref: Ref
    proposal: bytes  # digest
    commitment: bytes  # exact blob
    expires: int
    manifest: bytes | None = None  # M, once endorsed
    accepted: Mapping[str, bytes] = field(default_factory=dict)  # hospital → header digest


@dataclass(frozen=True)
class State:
    """Everything that the pod called `pod` knows; folded from its log. `boot` is also the nonce of P-11."""

    pod: str
    boot: bytes = b""
    live: frozenset[bytes] = frozenset()  # charters under which P-11 was passed in this boot
    rolled_back: str = ""
    records: Mapping[bytes, Record] = field(default_factory=dict)  # by study
    held: Mapping[bytes, Held] = field(default_factory=dict)  # by study
    heads: Mapping[str, Mapping[int, bytes]] = field(default_factory=dict)  # hospital → sequence → head (L-4)

    def record(self, study: bytes) -> Record:
        """What is known of `study`; empty for a new one."""
        return self.records.get(study) or Record()

    def holds(self, ref: Ref) -> bool:
        """Whether this boot has the round keys of `ref`."""
        held = self.held.get(ref.study)
        return held is not None and held.ref == ref


# --- events ---------------------------------------------------------------------------------------------------------


class Booted(NamedTuple):
    """A process has started: all round keys of earlier boots are gone. `boot` is 32 fresh bytes."""

    boot: bytes


class Passed(NamedTuple):
    """P-11: enough other pods of `charter` have answered, and none has seen more of this pod than its own store."""

    charter: bytes


class RolledBack(NamedTuple):
    """Another pod has seen more of this pod than its store knows: it never signs again under this id."""

    detail: str


class Committed(NamedTuple):
    """Fresh round keys for one attempt; digest `core` is pinned for the round. `commitment` is the exact blob."""

    ref: Ref
    charter: bytes
    core: bytes
    proposal: bytes
    commitment: bytes
    expires: int


class Endorsed(NamedTuple):
    """The one manifest of the attempt; `others`: pods whose commitments in it verified (P-11)."""

    ref: Ref
    manifest: bytes
    others: tuple[str, ...]


class Offered(NamedTuple):
    """Headers seen; those without a `refusal` are accepted."""

    ref: Ref
    entries: tuple[Entry, ...]


class Locked(NamedTuple):
    """The one cohort (digest) of the attempt; `others`: pods whose signatures on it verified (P-11)."""

    ref: Ref
    manifest: bytes
    cohort: bytes
    others: tuple[str, ...]


class Abandoned(NamedTuple):
    """The attempt is given up for ever; its keys are gone."""

    ref: Ref
    manifest: bytes


class Expired(NamedTuple):
    """The keys of the attempt are gone because its time is over (P-22)."""

    ref: Ref


class Closed(NamedTuple):
    """The round and all before it are over."""

    study: bytes
    round: int


Event = Booted | Passed | RolledBack | Committed | Endorsed | Offered | Locked | Abandoned | Expired | Closed


# --- commands: what they carry was verified before (P-3) ----------------------------------------------------------


class DeliverMarks(NamedTuple):
    """Marks whose signatures by pods of `roster` verified."""

    roster: Roster
    marks: tuple[HighWaterMark, ...]


class Propose(NamedTuple):
    """`commitment`: the blob with keys drawn just now; `abandons`: blobs of abandon certificates (P-13)."""

    checked: CheckedProposal
    commitment: bytes
    abandons: tuple[bytes, ...]
    now: int


class Endorse(NamedTuple):
    """A manifest valid by P-17."""

    manifest: CheckedManifest


class Offer(NamedTuple):
    """Headers of the manifest, signatures verified, boxes tried."""

    manifest: CheckedManifest
    entries: tuple[Entry, ...]


class LockCohort(NamedTuple):
    """The aggregator's choice of U."""

    manifest: CheckedManifest
    cohort: Cohort


class Release(NamedTuple):
    """Sums or digests over `cohort`, whose certificate is valid by P-19 and has locks of the pods `locked`."""

    manifest: CheckedManifest
    cohort: Cohort
    locked: tuple[str, ...]
    pieces: tuple[int, ...]


class Abandon(NamedTuple):
    """Give up one attempt, whose manifest has digest `manifest`."""

    roster: Roster
    ref: Ref
    manifest: bytes


class CloseRound(NamedTuple):
    """The aggregator's signed word that the round is over."""

    roster: Roster
    study: bytes
    round: int


class Expire(NamedTuple):
    """It is `now` (Unix ms)."""

    now: int


Command = DeliverMarks | Propose | Endorse | Offer | LockCohort | Release | Abandon | CloseRound | Expire
