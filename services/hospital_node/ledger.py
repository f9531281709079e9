"""The ledger: what a data set has spent, debited BEFORE the first byte leaves (privacy.md §7, L-1 … L-5).

Append-only rows in the hospital's SQLite file, each bound to the one before by SHA-256:
    head_0 = H(label ‖ 32 random bytes that never leave)      head_n = H(label ‖ head_{n-1} ‖ u64(n) ‖ event bytes)
Events hold what happened, never ε: that is derived by `services.common.dp.accounting`, so a better accountant
improves the past as well. Nothing is ever refunded. Not here: when a debit is due (participate.py).
"""

import hashlib
import json
import math
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

from services.common.dp.accounting import Event, epsilon
from services.common.dp.noise import effective_multiplier
from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import LedgerMark
from services.common.store.database import Database
from services.hospital_node.policy import Projection

_LABEL = b"wardround/v1/ledger\x00"

SCHEMA = """
CREATE TABLE ledger_start (only INTEGER PRIMARY KEY CHECK (only = 1), random BLOB NOT NULL) STRICT;
CREATE TABLE ledger (
    sequence INTEGER PRIMARY KEY CHECK (sequence > 0),
    previous BLOB NOT NULL,
    head BLOB NOT NULL,
    event BLOB NOT NULL
) STRICT;
CREATE TRIGGER ledger_stays BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'ledger events never change'); END;
CREATE TRIGGER ledger_lasts BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'ledger events are never removed'); END
"""


@dataclass(frozen=True)
class Debit:
    """One release of one split of the data set (privacy.md §7). Digests are hex; Δ₂, `sensitivity`, is in integers.

    `noise_multiplier` is z of what may be opened: of this hospital's share alone under `local`, of the n_min − k honest
    shares together under `shared` (L-3). `scale` is S_h, this hospital's own share, so the solo event follows.
    `vector` names the draw of sampling and noise: the same vector under another attempt is no second debit.
    """

    mechanism: str
    split: str
    sampling_rate: float
    noise_multiplier: float
    steps: int
    sensitivity: float
    scale: int
    minimum_cohort: int
    colluding_hospitals: int
    delta: float
    study: str
    round: int
    attempt: int
    manifest: str
    model: str
    vector: str

    def event(self) -> Event:
        """What ε is derived from: at n_min and k under `shared`."""
        return Event(self.sampling_rate, self.noise_multiplier, self.steps)

    def solo_event(self) -> Event:
        """The same release when all the others collude, cheat or fail: this hospital's share alone (ε_solo)."""
        alone = effective_multiplier((self.scale,), self.sensitivity) if self.scale else 0.0
        return Event(self.sampling_rate, alone, self.steps)


@dataclass(frozen=True)
class Entry:
    """One link of the chain; `event` are the exact bytes that the head covers."""

    sequence: int
    previous: bytes
    head: bytes
    event: bytes

    def debit(self) -> Debit:
        """The event, parsed."""
        return Debit(**json.loads(self.event))

    def line(self) -> str:
        """The entry as one line of ledger.jsonl."""
        return json.dumps(
            {
                "sequence": self.sequence,
                "previous": self.previous.hex(),
                "head": self.head.hex(),
                "event": self.event.decode(),
            },
            sort_keys=True,
        )


class Ledger:
    """The ledger of one data set inside `database`, whose migrations hold `SCHEMA`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO ledger_start VALUES (1, ?)", (secrets.token_bytes(32),))
        verify_entries(self._entries(), self._start())

    def mark(self) -> LedgerMark:
        """{sequence, head} after the last event (L-4)."""
        found = self._database.query("SELECT sequence, head FROM ledger ORDER BY sequence DESC LIMIT 1")
        return LedgerMark(*found[0]) if found else LedgerMark(0, self._start())

    def append(self, connection: sqlite3.Connection, debits: Iterable[Debit]) -> LedgerMark:
        """Add the debits inside the caller's transaction, so that the pending record and they are one (L-1)."""
        mark = self.mark()
        for debit in debits:
            event = json.dumps(asdict(debit), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
            following = LedgerMark(mark.sequence + 1, _head(mark.head, mark.sequence + 1, event))
            connection.execute(
                "INSERT INTO ledger VALUES (?, ?, ?, ?)", (following.sequence, mark.head, following.head, event)
            )
            mark = following
        return mark

    def debits(self) -> tuple[Debit, ...]:
        """Every event, oldest first."""
        return tuple(entry.debit() for entry in self._entries())

    def debited(self, vector: str) -> bool:
        """Whether this draw of sampling and noise has been paid for."""
        return any(debit.vector == vector for debit in self.debits())

    def spent(self, study: str) -> float:
        """ε of one study (hex digest) at its own δ: 0.0 before its first event, infinite once `none` has sent one."""
        return _study_epsilon(d for d in self.debits() if d.study == study)

    def spent_solo(self, study: str) -> float:
        """ε_solo of one study: what holds even if every other hospital colludes and the pods fail (privacy.md §2)."""
        return max(split_epsilon((d for d in self.debits() if d.study == study), solo=True).values(), default=0.0)

    def dataset_spent(self) -> float:
        """The sum of the studies' ε."""
        return sum(map(self.spent, {debit.study for debit in self.debits()}))

    def project(
        self,
        cost: Sequence[Debit],
        plain: Sequence[Debit],
        *,
        remaining: int,
        study_cap: float,
        dataset_cap: float,
        paid: bool = False,
    ) -> Projection:
        """What one more round of `cost` would bring, and how many rounds of `plain` still fit (L-2).

        `cost` is not empty; `paid` when its vector has been debited already, so that sending it again costs nothing.
        `remaining` bounds the rounds that are counted. Caps are the policy's ε. Across studies: the sum of the
        studies' ε and δ. Only noised events are held against caps: a release under `none` has no ε that any cap
        could bound, and the policy allows it by its own words or not at all.
        """
        first, everything = cost[0], self.debits()
        held, cost, each = _noised(everything), _noised(cost), _noised(plain)
        mine = tuple(d for d in held if d.study == first.study)
        studies = {d.study: tuple(e for e in held if e.study == d.study) for d in held if d.study != first.study}
        others = sum(_study_epsilon(events) for events in studies.values())
        other_delta = sum(max(d.delta for d in events) for events in studies.values())

        def fits(rounds: int) -> bool:
            after = _study_epsilon(mine + each * rounds)
            return after <= study_cap and others + after <= dataset_cap

        spent = _study_epsilon(mine)
        after = spent if paid else _study_epsilon((*mine, *cost))
        return Projection(
            round=first.round,
            study_spent=spent,
            study_after=after,
            dataset_spent=others + spent,
            dataset_after=others + after,
            dataset_delta_after=other_delta + max((d.delta for d in (*mine, *cost)), default=0.0),
            rounds_left=_largest(fits, remaining) if plain else 0,
            repeated=any(
                d.mechanism == "none" and d.model == first.model and d.split == first.split and d.vector != first.vector
                for d in everything
            ),
        )

    def export(self) -> Iterator[str]:
        """The lines of ledger.jsonl, oldest first."""
        return (entry.line() for entry in self._entries())

    def _start(self) -> bytes:
        return hashlib.sha256(_LABEL + self._database.query("SELECT random FROM ledger_start")[0][0]).digest()

    def _entries(self) -> Iterator[Entry]:
        rows = self._database.query("SELECT sequence, previous, head, event FROM ledger ORDER BY sequence")
        return (Entry(*row) for row in rows)


def verify_entries(entries: Iterable[Entry], start: bytes | None = None) -> LedgerMark | None:
    """Walk the chain; the last {sequence, head}, or None when it is empty. Raises ROLLED_BACK naming the link.

    `start` is head_0 where it is known (at the hospital); an export is held together by its own links.
    """
    mark = None if start is None else LedgerMark(0, start)
    for expected, entry in enumerate(entries, 1):
        previous = entry.previous if mark is None else mark.head
        if (
            entry.sequence != expected
            or entry.previous != previous
            or entry.head != _head(previous, expected, entry.event)
        ):
            raise ServiceError(
                Reason.ROLLED_BACK,
                f"the ledger is broken at event {expected}: it was changed, cut or restored from a backup; stop this "
                "hospital and compare with the {sequence, head} in its last receipts",
            )
        mark = LedgerMark(expected, entry.head)
    return None if mark is None or mark.sequence == 0 else mark


def parse_export(lines: Iterable[str]) -> Iterator[Entry]:
    """The entries of a ledger.jsonl, exact bytes only. Raises MALFORMED naming the line."""
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            entry = Entry(
                int(fields["sequence"]),
                bytes.fromhex(fields["previous"]),
                bytes.fromhex(fields["head"]),
                fields["event"].encode(),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            entry = None
        if entry is None or entry.line() != line.rstrip("\n"):
            raise ServiceError(Reason.MALFORMED, f"line {number} of the ledger is no event: export it again")
        yield entry


def verify_export(lines: Iterable[str]) -> LedgerMark | None:
    """L-5: check an exported ledger offline; its last mark. Raises ROLLED_BACK or MALFORMED naming the first fault."""
    return verify_entries(parse_export(lines))


def split_epsilon(debits: Iterable[Debit], solo: bool = False) -> dict[str, float]:
    """ε (or ε_solo) by split at the study's δ. A patient is in one split for the data set's life: it pays for that one.

    A split of which something left without noise (`none`) has an infinite ε.
    """
    by_split: dict[str, list[Debit]] = {}
    for debit in debits:
        by_split.setdefault(debit.split, []).append(debit)
    return {
        split: _compose(tuple(events), solo) if len(_noised(events)) == len(events) else math.inf
        for split, events in by_split.items()
    }


def _noised(debits: Iterable[Debit]) -> tuple[Debit, ...]:
    return tuple(debit for debit in debits if debit.mechanism != "none")


def _study_epsilon(debits: Iterable[Debit]) -> float:
    """privacy.md §6: under add/remove the worst split's ε holds for every patient."""
    return max(split_epsilon(debits).values(), default=0.0)


def _compose(debits: tuple[Debit, ...], solo: bool) -> float:
    steps: dict[tuple[float, float], int] = {}
    for debit in debits:
        event = debit.solo_event() if solo else debit.event()
        law = (event.sampling_rate, event.noise_multiplier)
        steps[law] = steps.get(law, 0) + event.steps
    # One event a law: composing the same mechanism n times is the accountant's fast path, and a cache key.
    return _epsilon(tuple((*law, steps[law]) for law in sorted(steps)), min(debit.delta for debit in debits))


@lru_cache(maxsize=4096)
def _epsilon(laws: tuple[tuple[float, float, int], ...], delta: float) -> float:
    return epsilon([Event(*law) for law in laws], delta)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count in 0..most that fits; `fits` is monotone."""
    if most <= 0 or fits(most):
        return max(0, most)
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _head(previous: bytes, sequence: int, event: bytes) -> bytes:
    return hashlib.sha256(_LABEL + previous + sequence.to_bytes(8, "big") + event).digest()
