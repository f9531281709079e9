"""The pod's log on the disk: every event fsynced before `append` returns, in a chain of hashes.

head(n) = SHA-256(head(n-1) ‖ canonical JSON of [kind, fields]), head(0) = 32 zero bytes; bytes stand as "hex:…".
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from services.common.errors import Reason, ServiceError
from services.common.store.database import open_database
from services.common.store.events import SCHEMA, EventLog
from services.keyshare import facts
from services.keyshare.facts import Event

_STREAM = "custody"
_Row = tuple[int, str, dict[str, Any], str]


class CustodyStore:
    """One pod's store; held by this process alone until `close` (P-15). Raises UNSAFE_STORE, UNKNOWN_SCHEMA."""

    def __init__(self, folder: Path, demo: bool) -> None:
        self._database = open_database(folder / "custody.sqlite", [SCHEMA], demo)
        self._log = EventLog(self._database)
        self._version, self._head = 0, bytes(32).hex()
        self.close = self._database.close

    def load(self) -> Iterator[Event]:
        """All events in order. Raises UNSAFE_STORE where the chain is broken."""
        for version, kind, fields, head in self._rows():
            self._head = _link(self._head, kind, fields)
            if self._head != head:
                raise ServiceError(Reason.UNSAFE_STORE, f"the store's event {version} was altered: see the runbook")
            self._version = version
            yield _event(kind, fields)

    def append(self, events: Sequence[Event]) -> None:
        """All of them are on the disk on return, or none (STORAGE)."""
        rows, head = [], self._head
        for event in events:
            kind, fields = type(event).__name__, {name: _plain(value) for name, value in event._asdict().items()}
            head = _link(head, kind, fields)
            rows.append((kind, {"event": fields, "head": head}))
        self._version = self._log.append(_STREAM, self._version, rows, "custody")
        self._head = head

    def audit(self) -> Iterator[bytes]:
        """`audit.jsonl`: {sequence, kind, event, head} a line."""
        for version, kind, fields, head in self._rows():
            yield json.dumps({"sequence": version, "kind": kind, "event": fields, "head": head}).encode() + b"\n"

    def _rows(self) -> Iterator[_Row]:
        for row in self._log.read(_STREAM):
            yield row.version, row.kind, row.payload["event"], row.payload["head"]


def _link(head: str, kind: str, fields: dict[str, Any]) -> str:
    canonical = json.dumps([kind, fields], sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(bytes.fromhex(head) + canonical).hexdigest()


def _event(kind: str, fields: dict[str, Any]) -> Event:
    values = {name: _back(value) for name, value in fields.items()}
    if "ref" in values:
        values["ref"] = facts.Ref(*values["ref"])
    if "entries" in values:
        values["entries"] = tuple(facts.Entry(*entry) for entry in values["entries"])
    event: Event = getattr(facts, kind)(**values)
    return event


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return "hex:" + value.hex()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _back(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("hex:"):
        return bytes.fromhex(value[4:])
    return tuple(_back(item) for item in value) if isinstance(value, list) else value
