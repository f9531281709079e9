"""The event log: facts in order, `PRIMARY KEY (stream, version)` is the concurrency control."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import Histogram

from services.common.errors import Reason, ServiceError
from services.common.store.database import Database

SCHEMA = """
CREATE TABLE events (
    stream TEXT NOT NULL,
    version INTEGER NOT NULL CHECK (version > 0),
    kind TEXT NOT NULL,
    payload TEXT NOT NULL,
    PRIMARY KEY (stream, version)
) WITHOUT ROWID, STRICT;
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events never change'); END;
CREATE TRIGGER events_last BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are never removed'); END
"""
"""The migration that a service puts into its own list of migrations."""

_APPENDS = Histogram(
    "wardround_store_append_seconds",
    "Time to put events on the disk, fsync included, by purpose",
    ["purpose"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
)


@dataclass(frozen=True)
class Event:
    """One fact: the `version`-th of its stream, counted from 1. `payload` is JSON; bytes stand in it as hex."""

    stream: str
    version: int
    kind: str
    payload: dict[str, Any]


class EventLog:
    """Append-only streams of events inside `database`, whose migrations hold `SCHEMA`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(
        self, stream: str, expected_version: int, events: Sequence[tuple[str, Mapping[str, Any]]], purpose: str
    ) -> int:
        """Add (kind, payload) pairs after `expected_version` (0 = empty stream); return the new version.

        All of them are on the disk on return, or none. Raises STALE_VERSION when the stream is elsewhere: read
        again, decide again. `purpose` is a constant of the code and becomes a metric label. Inside
        `Database.transaction` the events are committed with it.
        """
        rows = [
            (stream, version, kind, json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False))
            for version, (kind, payload) in enumerate(events, expected_version + 1)
        ]
        started = time.perf_counter()
        with self._database.transaction() as connection:
            found = self.version(stream)
            if found != expected_version:
                raise ServiceError(
                    Reason.STALE_VERSION,
                    f"stream {stream!r} is at version {found}, not {expected_version}: read it and decide again",
                )
            connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", rows)
        _APPENDS.labels(purpose).observe(time.perf_counter() - started)
        return expected_version + len(rows)

    def read(self, stream: str, after: int = 0) -> list[Event]:
        """The events of a stream with a version above `after`, in order; empty for an unknown stream."""
        found = self._database.query(
            "SELECT version, kind, payload FROM events WHERE stream = ? AND version > ? ORDER BY version",
            (stream, after),
        )
        return [Event(stream, version, kind, json.loads(payload)) for version, kind, payload in found]

    def version(self, stream: str) -> int:
        """The version of the newest event of a stream, 0 when there is none."""
        found = self._database.query("SELECT max(version) FROM events WHERE stream = ?", (stream,))
        return int(found[0][0] or 0)

    def streams(self) -> list[str]:
        """The names of all streams that hold an event, ascending."""
        return [str(row[0]) for row in self._database.query("SELECT DISTINCT stream FROM events ORDER BY stream")]
