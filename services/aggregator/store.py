"""The aggregator's state folder: event log, blobs by digest, vectors of the open attempt."""

from pathlib import Path

from services.aggregator.facts import Fact, from_json
from services.aggregator.vectors import Vectors
from services.common.store.blobs import BlobStore
from services.common.store.database import open_database
from services.common.store.events import SCHEMA, Event, EventLog
from services.common.store.records import to_json

MIGRATIONS = (SCHEMA,)
PLAN = "plan"


def stream_of(study: bytes) -> str:
    """The name of a study's stream."""
    return f"study/{study.hex()}"


class Store:
    """Everything that survives. Raises UNSAFE_STORE, UNKNOWN_SCHEMA or STORAGE when it cannot be opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._database = open_database(folder / "aggregator.db", MIGRATIONS)
        self._log = EventLog(self._database)
        self.blobs = BlobStore(folder / "blobs")
        self.vectors = Vectors(folder / "vectors")

    def facts(self, study: bytes) -> list[Fact]:
        """What happened to a study, oldest first."""
        return [from_json(event.kind, event.payload) for event in self._log.read(stream_of(study))]

    def events(self, study: bytes) -> list[Event]:
        """The same as rows of the log."""
        return self._log.read(stream_of(study))

    def append(self, study: bytes, version: int, facts: list[Fact]) -> int:
        """Put facts on the disk after `version`; return the new version. Raises STALE_VERSION, STORAGE."""
        return self._log.append(stream_of(study), version, [to_json(fact) for fact in facts], "round")

    def plans(self) -> list[Event]:
        """Adopted and refused plans, oldest first."""
        return self._log.read(PLAN)

    def record_plan(self, kind: str, payload: dict[str, str | int]) -> None:
        """Note that a plan was adopted or refused."""
        self._log.append(PLAN, self._log.version(PLAN), [(kind, payload)], "plan")

    def studies(self) -> list[bytes]:
        """Digests of all studies with a stream, ascending."""
        return [bytes.fromhex(name.removeprefix("study/")) for name in self._log.streams() if name.startswith("study/")]

    def close(self) -> None:
        """Give the folder back."""
        self.vectors.close()
        self._database.close()
