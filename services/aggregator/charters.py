"""The pinned charters, read again when their files change, and which of them is in force (P-2, P-26)."""

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from services.aggregator.config import Config
from services.common.documents.charter import LoadedCharter, load_charter, load_signatures
from services.common.documents.pin import Pinned, load_pin, select
from services.common.errors import Reason, ServiceError
from services.common.rpc.members import Members
from services.common.store.blobs import BlobStore
from services.common.store.durable import replace_file

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0


class Charters:
    """Thread-safe. A half-made change on disk is passed over with a warning until it is whole."""

    def __init__(self, config: Config, blobs: BlobStore) -> None:
        self._config = config
        self._blobs = blobs
        self._lock = threading.Lock()
        self._known: dict[bytes, LoadedCharter] = {}
        self._fresh_until = 0.0
        self._stamp = self._stamps()
        self._pinned = self._load()
        self._members = self._roots()

    @property
    def pinned(self) -> Pinned:
        """The pinned charters."""
        with self._lock:
            return self._pinned

    def members(self) -> Members:
        """Members and TLS roots of both pinned charters; looks at the files first."""
        with self._lock:
            if time.monotonic() < self._fresh_until:  # asked at every call of every member
                return self._members
            stamp, self._fresh_until = self._stamps(), time.monotonic() + _LOOK_SECONDS
            if stamp != self._stamp:
                try:
                    self._pinned = self._load()
                    self._members = self._roots()
                    self._stamp = stamp
                except ServiceError as error:
                    _log.warning("the charter or pin on disk is not usable yet, the old one stays: %s", error.detail)
            return self._members

    def get(self, digest: bytes) -> LoadedCharter:
        """The charter of this digest: pinned now, or when its round was opened. Raises NOT_FOUND."""
        with self._lock:
            if digest not in self._known:
                with self._blobs.open(digest) as file:
                    self._known[digest] = load_charter(file.read())
            return self._known[digest]

    def in_force(
        self, last: bytes, pods: Mapping[str, tuple[bytes, ...]], hospitals: Mapping[str, tuple[bytes, ...]]
    ) -> LoadedCharter:
        """P-26: the charter of a new round; `last` is the newest round's, the maps say who reports which digests."""
        pinned = self.pinned
        if pinned.next is None or pinned.next.digest == last:
            return pinned.next or pinned.current
        roster = pinned.next.roster
        ready = sum(pinned.next.digest in pods.get(pod.id, ()) for pod in roster.pods)
        owners = {
            member.organisation
            for member in roster.hospitals.values()
            if pinned.next.digest in hospitals.get(member.id, ())
        }
        return (
            pinned.next if ready >= roster.committee.quorum and len(owners) >= roster.minimum_cohort else pinned.current
        )

    def keep(self, charter: LoadedCharter) -> None:
        """Store the charter's bytes: a round that opened under it ends under it, whatever is pinned by then."""
        if not self._blobs.has(charter.digest):
            self._blobs.write([charter.blob], charter.digest)

    def signatures(self, charter: bytes) -> Path | None:
        """The pods' signatures on a charter that is or was pinned here as the current one, if there were any."""
        kept = self._kept(charter)
        return kept if kept.exists() else None

    def _kept(self, charter: bytes) -> Path:
        return self._config.state / "signatures" / f"{charter.hex()}.yaml"

    def _paths(self) -> Iterable[Path]:
        signatures = self._config.charter_signatures
        return (*self._config.charters, self._config.pins, *([signatures] if signatures else []))

    def _stamps(self) -> tuple[tuple[int, int], ...]:
        found = []
        for path in self._paths():
            try:
                entry = path.stat()
            except OSError:
                found.append((0, 0))
            else:
                found.append((entry.st_mtime_ns, entry.st_size))
        return tuple(found)

    def _load(self) -> Pinned:
        charters = [load_charter(_read(path), path.name) for path in self._config.charters if path.exists()]
        pinned = select(load_pin(_read(self._config.pins), self._config.pins.name), charters)
        if pinned.current.document.aggregator.id != self._config.id:
            named = pinned.current.document.aggregator.id
            raise ServiceError(
                Reason.INVALID_DOCUMENT, f"the charter's aggregator is {named}, this is {self._config.id}: check `id`"
            )
        if self._config.charter_signatures is not None:
            signatures = _read(self._config.charter_signatures)
            load_signatures(signatures, pinned.current)
            # Kept with the log: evidence of older rounds needs them when the file is that of a newer charter.
            replace_file(self._kept(pinned.current.digest), [signatures])
        self._known.update({charter.digest: charter for charter in charters})
        return pinned

    def _roots(self) -> Members:
        return Members.of(
            charter.document for charter in (self._pinned.current, self._pinned.next) if charter is not None
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServiceError(Reason.INVALID_DOCUMENT, f"cannot read {path} ({error.strerror})") from error
