"""The ledger: what a data set has spent, debited BEFORE the first byte leaves (privacy.md §7, L-1 … L-5).

Append-only rows in the hospital's SQLite file, each bound to the one before by SHA-256:
    head_0 = H(label ‖ 32 random bytes that never leave)      head_n = H(label ‖ head_{n-1} ‖ u64(n) ‖ event bytes)
Nothing is ever refunded or rewritten: a debit that was worse than thought is followed by an event that says so (L-3).
Not here: what the events say (events.py), what they cost (spending.py), when a debit is due (participate.py).
"""

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.common.errors import Reason, ServiceError
from services.common.secagg.messages import LedgerMark
from services.common.store.database import Database
from services.hospital_node.events import Checked, Debit, Exposed, Joined, LedgerEvent, decode_event, encode_event
from services.hospital_node.spending import Account

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


_ENTRIES = "SELECT sequence, previous, head, event FROM ledger ORDER BY sequence"
_ENTRIES_AFTER = "SELECT sequence, previous, head, event FROM ledger WHERE sequence > ? ORDER BY sequence"


@dataclass(frozen=True)
class Entry:
    """One link of the chain; `event` are the exact bytes that the head covers."""

    sequence: int
    previous: bytes
    head: bytes
    event: bytes

    def parsed(self) -> LedgerEvent:
        """What the event says. Raises MALFORMED."""
        return decode_event(self.event)

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


@dataclass(frozen=True)
class _Reading:
    """The events through `mark`, and what they cost."""

    mark: LedgerMark
    events: tuple[LedgerEvent, ...]
    account: Account


class Ledger:
    """The ledger of one data set inside `database`, whose migrations hold `SCHEMA`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO ledger_start VALUES (1, ?)", (secrets.token_bytes(32),))
        self._start = hashlib.sha256(_LABEL + database.query("SELECT random FROM ledger_start")[0][0]).digest()
        self._nothing = _Reading(LedgerMark(0, self._start), (), Account(()))
        self._last = self._nothing
        verify_entries(self._entries(), self._start)

    @classmethod
    def read(cls, database: Database) -> tuple[tuple[Entry, ...], bytes | None]:
        """The links as they lie there, unverified, and head_0 (None in a store that no hospital ever opened)."""
        started = database.query("SELECT random FROM ledger_start")
        entries = tuple(Entry(*row) for row in database.query(_ENTRIES))
        return entries, hashlib.sha256(_LABEL + started[0][0]).digest() if started else None

    def mark(self) -> LedgerMark:
        """{sequence, head} after the last event (L-4)."""
        found = self._database.query("SELECT sequence, head FROM ledger ORDER BY sequence DESC LIMIT 1")
        return LedgerMark(*found[0]) if found else LedgerMark(0, self._start)

    def append(self, connection: sqlite3.Connection, events: Iterable[LedgerEvent]) -> LedgerMark:
        """Add the events inside the caller's transaction, so that the pending record and they are one (L-1)."""
        mark = self.mark()
        for event in events:
            blob = encode_event(event)
            following = LedgerMark(mark.sequence + 1, _head(mark.head, mark.sequence + 1, blob))
            connection.execute(
                "INSERT INTO ledger VALUES (?, ?, ?, ?)", (following.sequence, mark.head, following.head, blob)
            )
            mark = following
        return mark

    def debit(
        self,
        connection: sqlite3.Connection,
        joining: Joined,
        debits: Iterable[Debit],
        checked: Checked | None = None,
    ) -> LedgerMark:
        """Append the debits of one vector; before the first ones of a study, that it was `joining`.

        `checked`, where the study requires it, stands before them unless the study's last one said the same.
        """
        first = [joining] if joining.study not in self.account().joined else []
        seen = [event for event in self.events() if isinstance(event, Checked) and event.study == joining.study]
        news = [checked] if checked is not None and checked not in seen[-1:] else []
        return self.append(connection, (*first, *news, *debits))

    def expose(self, connection: sqlite3.Connection, study: str, round_number: int, reason: str) -> None:
        """L-3: from now on the round's debits count with the own noise alone. Nothing when it has none, or already."""
        events = self.events()
        spent = any(isinstance(e, Debit) and (e.study, e.round) == (study, round_number) for e in events)
        known = any(isinstance(e, Exposed) and (e.study, e.round) == (study, round_number) for e in events)
        if spent and not known:
            self.append(connection, [Exposed(study, round_number, reason)])

    def events(self) -> tuple[LedgerEvent, ...]:
        """Every event, oldest first."""
        return self._reading().events

    def debits(self) -> tuple[Debit, ...]:
        """The debits alone, as they were written."""
        return self.account().debits

    def debited(self, vector: str) -> bool:
        """Whether this draw of sampling and noise has been paid for."""
        return any(debit.vector == vector for debit in self.debits())

    def account(self) -> Account:
        """What it all costs."""
        return self._reading().account

    def _reading(self) -> _Reading:
        """All that is there now. What was read before is not parsed again while the chain goes on from it.

        From any thread: a reading is replaced as a whole, and its mark is that of the last row which it holds.
        """
        known = self._last
        if self.mark() == known.mark:
            return known
        rows = self._database.query(_ENTRIES_AFTER, (known.mark.sequence,))
        if not rows or rows[0][1] != known.mark.head:  # a transaction in which this was read was rolled back
            rows, known = self._database.query(_ENTRIES), self._nothing
        entries = [Entry(*row) for row in rows]
        mark = LedgerMark(entries[-1].sequence, entries[-1].head) if entries else known.mark
        events = (*known.events, *(entry.parsed() for entry in entries))
        self._last = found = _Reading(mark, events, Account(events))
        return found

    def export(self) -> Iterator[str]:
        """The lines of ledger.jsonl, oldest first."""
        return (entry.line() for entry in self._entries())

    def _entries(self) -> Iterator[Entry]:
        return (Entry(*row) for row in self._database.query(_ENTRIES))


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


def _head(previous: bytes, sequence: int, event: bytes) -> bytes:
    return hashlib.sha256(_LABEL + previous + sequence.to_bytes(8, "big") + event).digest()
