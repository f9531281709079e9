"""The words of custody: what a pod knows (`State`), and what has happened (events).

Events hold facts, never secrets: they are the log on the disk, and `audit.jsonl` for everybody who asks.
Not here: any decision (custody.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from services.common.secagg.certificate import Ref

Point = tuple[int, int]
"""(round, attempt); (0, 0) = never."""

Entry = NamedTuple(
    "Entry", [("hospital", str), ("header", bytes), ("sequence", int), ("head", bytes), ("refusal", str)]
)
"""A hospital's signed header at Offer: its digest, its ledger mark (L-4), why it is refused ("" = accepted)."""

# What has happened, one line an event.
Booted = NamedTuple("Booted", [("boot", bytes)])
"""A process has started: all round keys of earlier boots are gone. `boot` is 32 fresh bytes."""
Passed = NamedTuple("Passed", [("charter", bytes)])
"""P-11: enough other pods of `charter` have answered, and none has seen more of this pod than its own store."""
RolledBack = NamedTuple("RolledBack", [("detail", str)])
"""Another pod has seen more of this pod than its store knows: it never signs again under this id."""
Committed = NamedTuple(
    "Committed",
    [("ref", Ref), ("charter", bytes), ("core", bytes), ("proposal", bytes), ("commitment", bytes), ("expires", int)],
)
"""Fresh round keys for one attempt; digest `core` is pinned for the round. `commitment` is the exact blob."""
Endorsed = NamedTuple("Endorsed", [("ref", Ref), ("manifest", bytes), ("others", tuple[str, ...])])
"""The one manifest of the attempt; `others`: pods whose commitments in it verified (P-11)."""
Offered = NamedTuple("Offered", [("ref", Ref), ("entries", tuple[Entry, ...])])
"""Headers seen; those without a `refusal` are accepted."""
Locked = NamedTuple("Locked", [("ref", Ref), ("manifest", bytes), ("cohort", bytes), ("others", tuple[str, ...])])
"""The one cohort (digest) of the attempt; `others`: pods whose signatures on it verified (P-11)."""
Abandoned = NamedTuple("Abandoned", [("ref", Ref), ("manifest", bytes)])
"""The attempt is given up for ever; its keys are gone."""
Expired = NamedTuple("Expired", [("ref", Ref)])
"""The keys of the attempt are gone because its time is over (P-22)."""
Closed = NamedTuple("Closed", [("study", bytes), ("round", int)])
"""The round and all before it are over."""
Event = Booted | Passed | RolledBack | Committed | Endorsed | Offered | Locked | Abandoned | Expired | Closed


class Seen(NamedTuple):
    """The newest attempts in which another pod's commitment, and its lock signature, were seen (P-11)."""

    commit: Point = (0, 0)
    lock: Point = (0, 0)


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
    seen: Mapping[str, Seen] = field(default_factory=dict)  # by other pod


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
