"""The pod's log on the disk: every event fsynced before `append` returns, in a chain of hashes (store.chain)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from services.common.store.chain import ChainedLog
from services.common.store.database import open_database
from services.common.store.events import SCHEMA
from services.common.store.records import from_json, to_json
from services.keyshare.facts import Event

_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


class CustodyStore:
    """One pod's store; held by this process alone until `close` (P-15). Raises UNSAFE_STORE, UNKNOWN_SCHEMA."""

    def __init__(self, folder: Path, demo: bool) -> None:
        database = open_database(folder / "custody.sqlite", [SCHEMA], demo)
        self._log = ChainedLog(database, "custody")
        self.audit, self.close = self._log.lines, database.close

    def load(self) -> Iterator[Event]:
        """All events in order. Raises UNSAFE_STORE where the chain is broken."""
        return (from_json(_KINDS, kind, fields) for kind, fields in self._log.load())

    def append(self, events: Sequence[Event]) -> None:
        """All of them are on the disk on return, or none (STORAGE)."""
        self._log.append([to_json(event) for event in events])
