"""What a hospital must not forget between two lives of its process: one SQLite file, the ledger's own.

Rows stay for ever (they are the marks that refuse replays); vectors are blobs by digest and are scrubbed when
their round is over. The pending record and the debit are one transaction of this file (L-1): `Store.pend`.
"""

import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.common.errors import Reason, ServiceError
from services.common.secagg.blob import data, decode, encode, many
from services.common.secagg.messages import MAX_PODS, ZERO_DIGEST, Receipt, Signed
from services.common.store.blobs import BlobStore
from services.common.store.database import Database, open_database
from services.hospital_node import ledger
from services.hospital_node.attempt import Sent

SCHEMA = """
CREATE TABLE vectors (
    study BLOB NOT NULL, round INTEGER NOT NULL, name TEXT NOT NULL, charter BLOB NOT NULL, model BLOB NOT NULL,
    x BLOB NOT NULL, scrubbed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (study, round)
) STRICT;
CREATE TABLE submissions (
    study BLOB NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, manifest BLOB NOT NULL UNIQUE,
    manifest_blob BLOB NOT NULL, charter BLOB NOT NULL, core BLOB NOT NULL, vector_name TEXT NOT NULL,
    header BLOB NOT NULL, header_signature BLOB NOT NULL, header_digest BLOB NOT NULL, boxes BLOB NOT NULL,
    chunk_digests BLOB NOT NULL, seeds BLOB NOT NULL, vector BLOB NOT NULL,
    receipt BLOB, receipt_signature BLOB, scrubbed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (study, round, attempt)
) STRICT;
CREATE TABLE chain (
    study BLOB PRIMARY KEY, round INTEGER NOT NULL, digest BLOB NOT NULL, model BLOB NOT NULL, version INTEGER NOT NULL
) STRICT;
CREATE TABLE controls (study BLOB PRIMARY KEY, digest BLOB NOT NULL) STRICT;
CREATE TABLE left_out (
    study BLOB NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, certificate BLOB NOT NULL,
    PRIMARY KEY (study, round, attempt)
) STRICT;
CREATE TABLE halts (
    study BLOB PRIMARY KEY, round INTEGER NOT NULL, result BLOB NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL
) STRICT;
CREATE TABLE acknowledged (
    study BLOB NOT NULL, round INTEGER NOT NULL, result BLOB NOT NULL, detail TEXT NOT NULL, at_ms INTEGER NOT NULL,
    PRIMARY KEY (study, round, result)
) STRICT;
"""
DATABASE = "hospital.sqlite"
MIGRATIONS = (ledger.SCHEMA, SCHEMA)
_SELECT = (
    "SELECT study, round, attempt, manifest, manifest_blob, charter, core, vector_name, header, header_signature, "
    "header_digest, boxes, chunk_digests, seeds, vector, receipt, receipt_signature FROM submissions"
)
_OF_STUDY = _SELECT + " WHERE study = ? ORDER BY round, attempt"
_OF_MANIFEST = _SELECT + " WHERE manifest = ?"


@dataclass(frozen=True)
class Vector:
    """One draw of sampling and noise, encoded: x under (study, round) and nothing else (P-10)."""

    study: bytes
    round: int
    name: str
    charter: bytes
    model: bytes
    x: bytes = field(repr=False)


@dataclass(frozen=True)
class Submission:
    """A pending record: all that a crash must send again byte for byte. `receipt` once the aggregator holds it.

    `seeds` names the blob of those that with x make y again; `vector` is the digest of y that the header carries.
    """

    study: bytes
    round: int
    attempt: int
    manifest: bytes
    manifest_blob: bytes = field(repr=False)
    charter: bytes
    core: bytes
    vector_name: str
    header: Signed = field(repr=False)
    header_digest: bytes
    boxes: tuple[bytes, ...] = field(repr=False)
    chunk_digests: tuple[bytes, ...] = field(repr=False)
    seeds: bytes = field(repr=False)
    vector: bytes
    receipt: Signed | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Chain:
    """The last verified result of a study; `model` is what the next round starts from. Round 0 = none yet."""

    round: int
    digest: bytes
    model: bytes
    version: int


@dataclass(frozen=True)
class Alarm:
    """What stopped a study here: the result of a round, by digest, and why it cannot be followed."""

    study: bytes
    round: int
    result: bytes
    detail: str


class Store:
    """Rows and blobs of one hospital under `state`. Raises UNSAFE_STORE when another process has it open."""

    def __init__(self, state: Path) -> None:
        self.database: Database = open_database(state / DATABASE, MIGRATIONS)
        self.blobs = BlobStore(state / "vectors")
        self._sweep()

    def _sweep(self) -> None:
        """Remove vectors and control variates that a crash left without their row: nobody would ever scrub them."""
        rows = self.database.query(
            "SELECT x FROM vectors UNION SELECT seeds FROM submissions UNION SELECT digest FROM controls"
        )
        known = {digest.hex() for (digest,) in rows}
        for file in (self.blobs.folder / "blobs").iterdir():
            if file.name not in known:
                self.blobs.delete(bytes.fromhex(file.name))

    def close(self) -> None:
        """Give the store back."""
        self.database.close()

    def vector(self, study: bytes, round_number: int) -> Vector | None:
        """The unscrubbed vector of (study, round) whose x is still here, whole or not."""
        rows = self.database.query(
            "SELECT study, round, name, charter, model, x FROM vectors WHERE study = ? AND round = ? AND scrubbed = 0",
            (study, round_number),
        )
        found = Vector(*rows[0]) if rows else None
        return found if found is not None and self.blobs.has(found.x) else None

    def keep_vector(self, vector: Vector) -> None:
        """Bind a stored x to its (study, round); an earlier draw there is replaced and its x removed."""
        old = self.vector(vector.study, vector.round)
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?, ?, 0)",
                (vector.study, vector.round, vector.name, vector.charter, vector.model, vector.x),
            )
        if old is not None and old.x != vector.x:
            self.blobs.delete(old.x)

    def pend(self, connection: sqlite3.Connection, pending: Submission) -> None:
        """Write the pending record inside the transaction that debits the ledger (L-1)."""
        connection.execute(
            "INSERT INTO submissions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL, 0)",
            (
                pending.study,
                pending.round,
                pending.attempt,
                pending.manifest,
                pending.manifest_blob,
                pending.charter,
                pending.core,
                pending.vector_name,
                pending.header.blob,
                pending.header.signature,
                pending.header_digest,
                encode(_Boxes(tuple(map(_Box, pending.boxes)))),
                b"".join(pending.chunk_digests),
                pending.seeds,
                pending.vector,
            ),
        )

    def submissions(self, study: bytes) -> tuple[Submission, ...]:
        """Every submission of a study that left or may have left, ascending by round and attempt."""
        return tuple(map(_submission, self.database.query(_OF_STUDY, (study,))))

    def sent(self, study: bytes, from_round: int) -> tuple[Sent, ...]:
        """Those of this round and later ones, as the own mark sees them."""
        rows = self.database.query(
            "SELECT round, attempt, manifest, core FROM submissions WHERE study = ? AND round >= ?", (study, from_round)
        )
        return tuple(Sent(*row) for row in rows)

    def highest_sent(self, study: bytes) -> int:
        """The highest round with a submission, 0 before the first."""
        return int(self.database.query("SELECT max(round) FROM submissions WHERE study = ?", (study,))[0][0] or 0)

    def last_receipt_ms(self) -> int:
        """The aggregator's time (Unix ms) in the newest receipt, 0 before the first."""
        found = self.database.query(
            "SELECT receipt FROM submissions WHERE receipt IS NOT NULL ORDER BY rowid DESC LIMIT 1"
        )
        return decode(Receipt, found[0][0]).time if found else 0

    def all_submissions(self) -> tuple[Submission, ...]:
        """Those of every study."""
        return tuple(map(_submission, self.database.query(_SELECT)))

    def submission(self, manifest: bytes) -> Submission | None:
        """The submission under M, if any."""
        rows = self.database.query(_OF_MANIFEST, (manifest,))
        return _submission(rows[0]) if rows else None

    def keep_receipt(self, manifest: bytes, receipt: Signed) -> None:
        """Store a verified receipt; the first one stays."""
        with self.database.transaction() as connection:
            connection.execute(
                "UPDATE submissions SET receipt = ?, receipt_signature = ? WHERE manifest = ? AND receipt IS NULL",
                (receipt.blob, receipt.signature, manifest),
            )

    def scrub(self, study: bytes, through_round: int) -> int:
        """Remove x, seeds and boxes of every round up to this one; rows stay. Returns how many vectors went."""
        rows = self.database.query(
            "SELECT x FROM vectors WHERE study = ? AND round <= ? AND scrubbed = 0 UNION ALL "
            "SELECT seeds FROM submissions WHERE study = ? AND round <= ? AND scrubbed = 0",
            (study, through_round) * 2,
        )
        if rows:
            # Files first: after a crash between the two the rows say what is left to do.
            self.blobs.delete(*(digest for (digest,) in rows))
            with self.database.transaction() as connection:
                for statement in (
                    "UPDATE vectors SET scrubbed = 1 WHERE study = ? AND round <= ? AND scrubbed = 0",
                    "UPDATE submissions SET scrubbed = 1, boxes = x'' WHERE study = ? AND round <= ? AND scrubbed = 0",
                ):
                    connection.execute(statement, (study, through_round))
        return len(rows)

    def chain(self, study: bytes) -> Chain:
        """The last verified result; round 0 and 32 zero bytes before the first."""
        rows = self.database.query("SELECT round, digest, model, version FROM chain WHERE study = ?", (study,))
        return Chain(*rows[0]) if rows else Chain(0, ZERO_DIGEST, b"", 0)

    def control(self, study: bytes) -> bytes | None:
        """The blob of this hospital's control variate, None before the first."""
        rows = self.database.query("SELECT digest FROM controls WHERE study = ?", (study,))
        return bytes(rows[0][0]) if rows else None

    def advance_chain(
        self, study: bytes, chain: Chain, left_out: tuple[int, bytes] | None, control: bytes | None = None
    ) -> None:
        """Take a verified result as the chain's end; `left_out` = (attempt, certificate) is kept as evidence.

        `control`: the blob of the control variate that this result moves; the one before it is removed.
        """
        before = self.control(study)
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO chain VALUES (?, ?, ?, ?, ?)",
                (study, chain.round, chain.digest, chain.model, chain.version),
            )
            if left_out is not None:
                connection.execute(
                    "INSERT OR IGNORE INTO left_out VALUES (?, ?, ?, ?)", (study, chain.round, *left_out)
                )
            if control is not None:
                connection.execute("INSERT OR REPLACE INTO controls VALUES (?, ?)", (study, control))
        if control is not None and before not in (None, control):
            self.blobs.delete(before)  # a life that ends here leaves it to the next one's sweep

    def left_out(self) -> list[tuple[int, int, bytes]]:
        """(round, attempt, certificate) where this hospital holds a receipt and is not in the cohort."""
        rows = self.database.query("SELECT round, attempt, certificate FROM left_out ORDER BY study, round, attempt")
        return [(row[0], row[1], row[2]) for row in rows]

    def halt(self, alarm: Alarm, reason: Reason) -> None:
        """Stop a study here for good: only a person's word clears it (`acknowledge`). The first alarm stays."""
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO halts VALUES (?, ?, ?, ?, ?)",
                (alarm.study, alarm.round, alarm.result, reason.value, alarm.detail),
            )

    def alarms(self) -> tuple[Alarm, ...]:
        """The alarm of every study that is stopped here."""
        return tuple(Alarm(*row) for row in self.database.query("SELECT study, round, result, detail FROM halts"))

    def halted(self, study: bytes) -> str | None:
        """Why a study is stopped here, or None."""
        return next((alarm.detail for alarm in self.alarms() if alarm.study == study), None)

    def acknowledge(self, study: bytes, round_number: int, result: bytes, at_ms: int) -> None:
        """Let a study go on past the result that stopped it, and past no other. Raises NOT_FOUND, CONFLICT."""
        with self.database.transaction() as connection:
            alarm = next((alarm for alarm in self.alarms() if alarm.study == study), None)
            if alarm is None:
                raise ServiceError(Reason.NOT_FOUND, f"study {study.hex()[:12]}… is not stopped here")
            if (alarm.round, alarm.result) != (round_number, result):
                raise ServiceError(
                    Reason.CONFLICT,
                    f"study {study.hex()[:12]}… was stopped by round {alarm.round}, result {alarm.result.hex()[:12]}, "
                    "not by what is acknowledged: look at the alarm again",
                )
            connection.execute(
                "INSERT INTO acknowledged VALUES (?, ?, ?, ?, ?)", (study, round_number, result, alarm.detail, at_ms)
            )
            connection.execute("DELETE FROM halts WHERE study = ?", (study,))

    def acknowledged(self, study: bytes, round_number: int, result: bytes) -> bool:
        """Whether a person has let the study go on past this very result."""
        key = (study, round_number, result)
        sql = "SELECT 1 FROM acknowledged WHERE study = ? AND round = ? AND result = ?"
        return bool(self.database.query(sql, key))

    def acknowledgements(self) -> int:
        """How often that was done here: grows with each."""
        return int(self.database.query("SELECT count(*) FROM acknowledged")[0][0])


@dataclass(frozen=True)
class _Box:
    sealed: bytes = data(1, maximum=8192)


@dataclass(frozen=True)
class _Boxes:
    """The boxes of one submission as one column."""

    boxes: tuple[_Box, ...] = many(1, _Box, maximum=MAX_PODS)


def _submission(row: tuple[Any, ...]) -> Submission:
    study, number, attempt, manifest, manifest_blob, charter, core, name, *rest = row
    header, signature, header_digest, boxes, digests, seeds, vector, receipt, receipt_signature = rest
    return Submission(
        study=study,
        round=number,
        attempt=attempt,
        manifest=manifest,
        manifest_blob=manifest_blob,
        charter=charter,
        core=core,
        vector_name=name,
        header=Signed(header, signature),
        header_digest=header_digest,
        boxes=tuple(box.sealed for box in decode(_Boxes, boxes).boxes),
        chunk_digests=tuple(digests[at : at + 32] for at in range(0, len(digests), 32)),
        seeds=seeds,
        vector=vector,
        receipt=None if receipt is None else Signed(receipt, receipt_signature),
    )
