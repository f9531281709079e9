"""SQLite as this product uses it: every commit is on the disk when `transaction` returns, one process per store.

journal_mode=WAL with synchronous=FULL: a commit is appended to the `-wal` file beside the database and fsynced there,
once (the rollback journals fsync three times: ADR 0009). SQLite moves it into the database by itself, at the latest
when the store is closed; until then the two files are one store, and are copied together or not at all (`files`).
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.common.errors import Reason, ServiceError
from services.common.store.durable import storage_error, storing, sync_folder

NEW_STORE = 'keep the folder and begin with an empty one (docs/operations.md, "A store of an earlier build")'
_FULL = 2  # PRAGMA synchronous
_VOLATILE = frozenset({"tmpfs", "ramfs", "overlay", "aufs"})
_EMPTY_DIR = "/kubernetes.io~empty-dir/"
_MOST_REMEMBERED, _MOST_ROWS = 64, 16  # answers, and rows of one: what is asked for again and again is short


class Database:
    """One open store. Safe to use from many threads: one lock around every statement and transaction."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock_file: int) -> None:
        self.path = path
        self._connection = connection
        self._lock_file = lock_file
        self._lock = threading.RLock()
        self._depth = 0
        self._answers: dict[tuple[str, tuple[Any, ...]], list[tuple[Any, ...]]] = {}
        self._answered_at = 0  # row changes of this connection when they were read

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, fsynced on return; raises STORAGE on a full or failing disk with nothing written.

        Inside another transaction of the same thread it is a savepoint: refused alone, committed with the outer one.
        """
        with self._lock, _refusing(self.path):
            begin, commit, undo = ("SAVEPOINT s", "RELEASE s", "ROLLBACK TO s; RELEASE s")
            if self._depth == 0:
                begin, commit, undo = ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK")
            self._connection.execute(begin)
            self._depth += 1
            try:
                yield self._connection
                self._connection.execute(commit)
            except BaseException:
                # SQLite has rolled back by itself after some errors (a full disk): then nothing is left to undo.
                if self._connection.in_transaction:
                    for statement in undo.split("; "):
                        self._connection.execute(statement)
                raise
            finally:
                self._depth -= 1

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of one SELECT, outside or inside a transaction.

        Nobody else writes to this store, so outside of one a short answer is given again until a row has changed.
        """
        with self._lock:
            if self._depth:  # what it changed may still be rolled back
                return self._rows(sql, parameters)
            if self._connection.total_changes != self._answered_at:
                self._answers, self._answered_at = {}, self._connection.total_changes
            key = sql, tuple(parameters)
            found = self._answers.get(key)
            if found is None:
                found = self._rows(sql, parameters)
                if len(found) <= _MOST_ROWS and len(self._answers) < _MOST_REMEMBERED:
                    self._answers[key] = found
            return list(found)

    def _rows(self, sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        with _refusing(self.path):
            return self._connection.execute(sql, parameters).fetchall()

    def close(self) -> None:
        """Give the store back; another process may open it from now on."""
        with self._lock:
            self._connection.close()
            if self._lock_file >= 0:
                os.close(self._lock_file)
                self._lock_file = -1


def open_database(path: Path, migrations: Sequence[str], demo: bool | None = None) -> Database:
    """Open or create the store at `path` and bring it to the newest schema.

    `migrations` are SQL scripts; the schema version is how many have run, each in one transaction. They are
    only ever appended to. `demo` None: no rule about the file system (aggregator, hospital); a bool (pods):
    `check_durable(folder, demo)`. Raises UNSAFE_STORE (in use by another process, volatile, not a database),
    UNKNOWN_SCHEMA (written by a newer version, or by a build from before the first release) or STORAGE.
    """
    path = Path(path)
    with storing(f"the store {path}"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if demo is not None:
        check_durable(path.parent, demo)
    lock_file = _lock(path)
    connection: sqlite3.Connection | None = None
    try:
        with _refusing(path, opening=True):
            created = not path.exists()
            if not created:
                with storing(f"the store {path}"):  # SQLite itself would only say "disk I/O error"
                    os.close(os.open(path, os.O_RDWR))
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            _check_pragmas(path, connection)
            _migrate(path, connection, migrations)
            os.chmod(path, 0o600)
            if created:
                sync_folder(path.parent)
    except BaseException:
        if connection is not None:
            connection.close()
        os.close(lock_file)
        raise
    return Database(path, connection, lock_file)


def files(path: Path) -> list[Path]:
    """All files that make up the store at `path`, to be copied while no process has it open."""
    return [file for file in (path, *(Path(f"{path}{suffix}") for suffix in ("-wal", "-journal"))) if file.exists()]


def check_durable(path: Path, demo: bool) -> None:
    """P-15: raise UNSAFE_STORE where `path` lies on an emptyDir, tmpfs or overlay, unless `demo`."""
    check_mounts(path, Path("/proc/self/mountinfo").read_text(), demo)


def check_mounts(path: Path, mountinfo: str, demo: bool) -> None:
    """`check_durable` over the given text of /proc/self/mountinfo (proc(5))."""
    resolved = str(path.resolve())
    best, fault = "", ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        root, point = (_unescape(word) for word in left.split()[3:5])
        kind = right.split()[0]
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if not inside or len(point) < len(best):
            continue  # a later mount on the same point hides the earlier one, so equal length wins
        best, fault = point, ""
        if kind in _VOLATILE:
            fault = f"a {kind} file system"
        elif _EMPTY_DIR in root + "/" or _EMPTY_DIR in point + "/":
            fault = "an emptyDir"
    if fault and not demo:
        raise ServiceError(
            Reason.UNSAFE_STORE,
            f"{path} lies on {fault} (mounted at {best}): what a pod has signed would be forgotten with the container; "
            "give it a persistent volume, or a charter with `demo: true`",
        )


def _unescape(word: str) -> str:
    for code, sign in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(code, sign)
    return word


def _lock(path: Path) -> int:
    """The exclusive lock of P-15, held by the open file until `close` or the end of the process."""
    with storing(f"the lock file of {path}"):
        handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(handle)
        raise ServiceError(
            Reason.UNSAFE_STORE,
            f"the store {path} is in use by another process (pid {holder}): one process per store; stop that one first",
        ) from None
    with storing(f"the lock file of {path}"):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def _check_pragmas(path: Path, connection: sqlite3.Connection) -> None:
    """P-15: assert that this build of SQLite took the settings that durability rests on."""
    synchronous = connection.execute("PRAGMA synchronous").fetchone()[0]
    journal = connection.execute("PRAGMA journal_mode").fetchone()[0]
    if synchronous != _FULL or journal != "wal":
        raise ServiceError(
            Reason.UNSAFE_STORE,
            f"the store {path} has synchronous={synchronous}, journal_mode={journal}, not {_FULL} and wal: "
            "use an SQLite that supports both",
        )


def _migrate(path: Path, connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(migrations):
        raise ServiceError(
            Reason.UNKNOWN_SCHEMA,
            f"the store {path} has schema {version}, this version knows {len(migrations)}: upgrade the service",
        )
    _check_schema(path, connection, migrations[:version])
    for number in range(version, len(migrations)):
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{migrations[number]}\n;PRAGMA user_version={number + 1};\nCOMMIT;"
            )
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _check_schema(path: Path, connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
    """Refuse tables other than those that the same migrations make now: their text changed before the first release."""
    expected = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for migration in migrations:
            expected.executescript(migration)
        found, made = _schema(connection), _schema(expected)
    finally:
        expected.close()
    different = sorted(name for name in found.keys() | made.keys() if found.get(name) != made.get(name))
    if different:
        raise ServiceError(
            Reason.UNKNOWN_SCHEMA,
            f"the store {path} has another table {different[0]} than this version makes: a build from before the "
            f"first release wrote it, and nothing converts it; {NEW_STORE}",
        )


def _schema(connection: sqlite3.Connection) -> dict[str, str]:
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND sql IS NOT NULL")
    return {name: " ".join(sql.split()) for name, sql in rows}


@contextmanager
def _refusing(path: Path, opening: bool = False) -> Iterator[None]:
    """SQLite's words for a failing disk or a damaged file as this product's reasons; `opening`: every other one too."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}:
            denied = code in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
            raise storage_error(f"the store {path}", str(error), denied=denied) from error
        if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            raise ServiceError(
                Reason.UNSAFE_STORE, f"the store {path} is damaged ({error}): do not repair it; see the runbook"
            ) from error
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise ServiceError(
                Reason.UNSAFE_STORE, f"the store {path} is open in another program ({error}): close that one first"
            ) from error
        if opening:
            raise ServiceError(
                Reason.UNSAFE_STORE, f"the store {path} cannot be opened ({error}): keep the folder; see the runbook"
            ) from error
        raise
