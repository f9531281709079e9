"""The store: durable, alone, all or nothing."""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.common.errors import Reason, ServiceError
from services.common.store.database import Database, check_durable, check_mounts, files, open_database

ROOT = Path(__file__).parents[2]
ONE = "CREATE TABLE t (x INTEGER PRIMARY KEY) STRICT"
TWO = "CREATE TABLE u (y TEXT) STRICT; INSERT INTO u VALUES ('made;here')"
HOLDER = (
    "import sys\nfrom pathlib import Path\nfrom services.common.store.database import open_database\n"
    f"open_database(Path(sys.argv[1]), [{ONE!r}])\nprint('open', flush=True)\nsys.stdin.read()\n"
)


def insert_and_fail(db: Database, number: int) -> None:
    with db.transaction() as connection:
        connection.execute("INSERT INTO t VALUES (?)", (number,))
        raise ZeroDivisionError


def insert_inside_and_fail(db: Database, number: int) -> None:
    with db.transaction():
        with db.transaction() as inner:
            inner.execute("INSERT INTO t VALUES (?)", (number,))
        raise ZeroDivisionError


def test_transactions_are_all_or_nothing(tmp_path: Path) -> None:
    db = open_database(tmp_path / "s.db", [ONE])
    with db.transaction() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(ZeroDivisionError):
        insert_and_fail(db, 2)
    assert db.query("SELECT x FROM t") == [(1,)]
    db.close()


def test_an_inner_transaction_is_undone_alone_and_committed_with_the_outer(tmp_path: Path) -> None:
    db = open_database(tmp_path / "s.db", [ONE])
    with db.transaction() as outer:
        outer.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(ZeroDivisionError):
            insert_and_fail(db, 2)
        with db.transaction() as inner:
            inner.execute("INSERT INTO t VALUES (3)")
    with pytest.raises(ZeroDivisionError):
        insert_inside_and_fail(db, 4)
    assert db.query("SELECT x FROM t ORDER BY x") == [(1,), (3,)]
    db.close()


def test_an_answer_is_given_again_only_while_no_row_has_changed(tmp_path: Path) -> None:
    db = open_database(tmp_path / "s.db", [ONE])

    def rows() -> list[tuple[int]]:
        return db.query("SELECT x FROM t WHERE x < ?", (10,))

    assert rows() == []
    rows().append((9,))  # the caller's own list
    with pytest.raises(ZeroDivisionError):
        insert_and_fail(db, 1)
    assert rows() == []
    with db.transaction() as connection:
        connection.execute("INSERT INTO t VALUES (2)")
    assert rows() == [(2,)]
    with db.transaction() as connection:
        connection.execute("UPDATE t SET x = 3")
        assert rows() == [(3,)]
    assert rows() == [(3,)]
    with db.transaction() as connection:
        connection.execute("DELETE FROM t")
    assert rows() == []
    db.close()


def test_threads_take_turns(tmp_path: Path) -> None:
    db = open_database(tmp_path / "s.db", [ONE, "INSERT INTO t VALUES (0)"])

    def add() -> None:
        for _ in range(25):
            with db.transaction() as connection:
                (count,) = connection.execute("SELECT x FROM t").fetchone()
                connection.execute("UPDATE t SET x = ?", (count + 1,))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert db.query("SELECT x FROM t") == [(100,)]
    db.close()


def test_migrations_run_once_each_and_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    open_database(path, [ONE]).close()
    for _ in range(2):
        db = open_database(path, [ONE, TWO])
        assert db.query("SELECT y FROM u") == [("made;here",)]
        db.close()
    with pytest.raises(ServiceError) as caught:
        open_database(path, [ONE])
    assert caught.value.reason is Reason.UNKNOWN_SCHEMA
    open_database(path, [ONE, TWO]).close()


@pytest.mark.parametrize(
    ("earlier", "named"),
    [
        (ONE.replace("x", "y"), "table t"),
        (ONE.replace(" STRICT", ""), "table t"),
        (f"{ONE}; CREATE TABLE w (z TEXT)", "table w"),
        ("CREATE TABLE w (z TEXT)", "table t"),
    ],
)
def test_a_store_of_an_earlier_build_is_refused_untouched(tmp_path: Path, earlier: str, named: str) -> None:
    """The same number of migrations, other tables: no release had them, so nothing converts them."""
    path = tmp_path / "s.db"
    open_database(path, [earlier]).close()
    before = path.read_bytes()
    for migrations in ([ONE], [ONE, TWO]):
        with pytest.raises(ServiceError, match=f"another {named} than this version makes") as caught:
            open_database(path, migrations)
        assert caught.value.reason is Reason.UNKNOWN_SCHEMA
    assert path.read_bytes() == before
    open_database(path, ["  " + earlier.replace(" (", "\n    (")]).close()  # the same tables, written in another way


def test_a_failing_migration_changes_nothing_and_gives_the_store_back(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    open_database(path, [ONE]).close()
    with pytest.raises(ServiceError, match=r"cannot be opened.*table v already exists"):
        open_database(path, [ONE, "CREATE TABLE v (a INTEGER); CREATE TABLE v (b INTEGER)"])
    db = open_database(path, [ONE, "CREATE TABLE v (c INTEGER)"])
    assert db.query("SELECT c FROM v") == []
    db.close()


def test_p_15_a_second_process_on_one_store_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(ServiceError) as caught:
            open_database(path, [ONE])
        assert caught.value.reason is Reason.UNSAFE_STORE
        assert f"pid {holder.pid}" in caught.value.detail
        holder.kill()
        holder.wait()
    open_database(path, [ONE]).close()


def test_p_15_one_process_cannot_open_its_store_twice(tmp_path: Path) -> None:
    db = open_database(tmp_path / "s.db", [ONE])
    with pytest.raises(ServiceError) as caught:
        open_database(tmp_path / "s.db", [ONE])
    assert caught.value.reason is Reason.UNSAFE_STORE
    db.close()


def test_p_15_every_commit_is_synchronous(tmp_path: Path) -> None:
    db = open_database(tmp_path / "s.db", [ONE])
    assert db.query("PRAGMA synchronous") == [(2,)]
    assert db.query("PRAGMA journal_mode") == [("wal",)]
    db.close()


def test_p_15_all_files_of_a_store_together_hold_what_was_committed(tmp_path: Path) -> None:
    """A copy without the file beside the database would be an older store."""
    db = open_database(tmp_path / "s.db", [ONE])
    with db.transaction() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in files(tmp_path / "s.db"):
        shutil.copyfile(file, copied / file.name)
    db.close()
    assert [file.name for file in files(tmp_path / "s.db")] == ["s.db"]
    copy = open_database(copied / "s.db", [ONE])
    assert copy.query("SELECT * FROM t") == [(1,)]
    copy.close()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_p_15_the_kernel_is_asked_to_sync_after_the_last_write_of_a_commit(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom services.common.store.database import open_database\n"
        "db = open_database(Path(sys.argv[1]), [sys.argv[2]])\nos.write(1, b'BEGIN-MARK')\n"
        "with db.transaction() as connection: connection.execute('INSERT INTO t VALUES (1)')\n"
        "os.write(1, b'END-MARK')\n"
    )
    log = tmp_path / "trace"
    calls = "trace=write,pwrite64,ftruncate,fsync,fdatasync,unlink,rename"
    subprocess.run(
        ["strace", "-f", "-e", calls, "-o", str(log), sys.executable, "-c", program, str(tmp_path / "s.db"), ONE],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    inside = log.read_text().split("BEGIN-MARK")[1].split("END-MARK")[0]
    order = re.findall(r"\b(pwrite64|ftruncate|fsync|fdatasync|unlink|rename)\(", inside)
    assert "pwrite64" in order
    assert order[-1] in {"fsync", "fdatasync"}


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(ServiceError) as caught:
        open_database(path, [ONE])
    assert caught.value.reason is Reason.UNSAFE_STORE
    assert path.read_bytes() == b"not a database at all" * 100


MOUNTS = """\
22 1 0:1 / / rw - overlay overlay rw,lowerdir=/x
23 22 0:2 / /proc rw - proc proc rw
24 22 8:1 /var/lib/kubelet/pods/1b/volumes/kubernetes.io~empty-dir/state /state rw - ext4 /dev/sda1 rw
25 22 8:2 / /volume rw - ext4 /dev/sdb rw
26 25 0:3 / /volume/fast rw - tmpfs tmpfs rw
27 22 8:3 / /with\\040space rw - xfs /dev/sdc rw
28 22 0:4 / /shadowed rw - tmpfs tmpfs rw
29 22 8:4 / /shadowed rw - ext4 /dev/sdd rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/anywhere", "overlay"),
        ("/volumes-are-not-volume", "overlay"),
        ("/state/pod", "emptyDir"),
        ("/state", "emptyDir"),
        ("/volume/fast/x", "tmpfs"),
    ],
)
def test_p_15_volatile_stores_are_refused_unless_demo(path: str, kind: str) -> None:
    with pytest.raises(ServiceError) as caught:
        check_mounts(Path(path), MOUNTS, demo=False)
    assert caught.value.reason is Reason.UNSAFE_STORE
    assert kind in caught.value.detail
    check_mounts(Path(path), MOUNTS, demo=True)


@pytest.mark.parametrize("path", ["/volume/pod", "/volume", "/with space/pod", "/shadowed/x"])
def test_p_15_persistent_stores_are_taken(path: str) -> None:
    check_mounts(Path(path), MOUNTS, demo=False)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs on this machine")
def test_p_15_this_machines_own_tmpfs_is_refused() -> None:
    with pytest.raises(ServiceError, match="tmpfs"):
        check_durable(Path("/dev/shm/wardround"), demo=False)
    with pytest.raises(ServiceError, match="tmpfs"):
        open_database(Path("/dev/shm/wardround-never-made/s.db"), [ONE], demo=False)
