"""An event log in a chain of hashes: one stream whose past nobody can change unseen, and its export as lines.

head(n) = SHA-256(head(n-1) ‖ canonical JSON of [kind, event]), head(0) = 32 zero bytes; heads stand in hex.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from services.common.errors import Reason, ServiceError
from services.common.store.database import Database
from services.common.store.events import EventLog

_START = bytes(32).hex()
Kept = tuple[str, dict[str, Any]]
"""(kind, JSON event)."""


class ChainedLog:
    """The stream `stream` of the events in `database`. `load` is called once, before anything is appended."""

    def __init__(self, database: Database, stream: str) -> None:
        self._log = EventLog(database)
        self._stream = stream
        self._version, self._head = 0, _START

    def load(self) -> Iterator[Kept]:
        """All events in order. Raises UNSAFE_STORE where the chain is broken."""
        for version, kind, event, head in self._rows():
            self._head = _link(self._head, kind, event)
            if self._head != head:
                raise ServiceError(Reason.UNSAFE_STORE, f"the store's event {version} was altered: see the runbook")
            self._version = version
            yield kind, event

    def append(self, events: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """All of them are on the disk on return, or none (STORAGE)."""
        rows, head = [], self._head
        for kind, event in events:
            head = _link(head, kind, event)
            rows.append((kind, {"event": event, "head": head}))
        self._version = self._log.append(self._stream, self._version, rows, self._stream)
        self._head = head

    def lines(self) -> Iterator[bytes]:
        """{sequence, kind, event, head} a line, oldest first."""
        for version, kind, event, head in self._rows():
            yield json.dumps({"sequence": version, "kind": kind, "event": event, "head": head}).encode() + b"\n"

    def _rows(self) -> Iterator[tuple[int, str, dict[str, Any], str]]:
        for row in self._log.read(self._stream):
            yield row.version, row.kind, row.payload["event"], row.payload["head"]


def verify_lines(log: bytes) -> str:
    """Walk an export of `ChainedLog.lines`; the last head. Raises ROLLED_BACK naming the first broken link."""
    head = _START
    for number, line in enumerate(log.splitlines(keepends=True), 1):
        try:
            entry = json.loads(line)
            head = _link(head, entry["kind"], entry["event"])
            whole = (entry["sequence"], entry["head"]) == (number, head) and line.endswith(b"\n")
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ServiceError(Reason.ROLLED_BACK, f"the audit log breaks at entry {number}")
    return head


def _link(head: str, kind: str, event: Mapping[str, Any]) -> str:
    canonical = json.dumps([kind, event], sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(bytes.fromhex(head) + canonical).hexdigest()
