"""Blobs by digest: wholly there or not at all, on a full disk too."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Reason, ServiceError
from services.common.store.blobs import BlobStore
from services.common.store.database import Database, open_database
from tests.support.small_disk import mounted

ROOT = Path(__file__).parents[2]


def files(store: BlobStore) -> list[str]:
    return sorted(str(file.relative_to(store.folder)) for file in store.folder.rglob("*") if file.is_file())


def test_a_blob_is_found_by_its_sha_256_until_it_is_deleted(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "b")
    digest = store.write([b"ab", b"", b"c"])
    assert digest == hashlib.sha256(b"abc").digest()
    assert BlobStore(tmp_path / "b").has(digest)
    with store.open(digest) as file:
        assert file.read() == b"abc"
    assert store.write([b"abc"]) == digest
    assert files(store) == [f"blobs/{digest.hex()}"]
    store.delete(digest)
    store.delete(digest)
    assert not store.has(digest)
    with pytest.raises(ServiceError) as caught:
        store.open(digest)
    assert caught.value.reason is Reason.NOT_FOUND


def test_a_cache_forgets_at_start_what_is_not_whole(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, cache=True)
    whole, torn = store.write([b"whole"]), store.write([b"torn by a power cut"])
    with store.partial("third") as partial:
        partial.append(b"third")
        third = partial.finish()
    store.path(torn).write_bytes(bytes(19))
    again = BlobStore(tmp_path, cache=True)
    assert (again.has(whole), again.has(torn), again.has(third)) == (True, False, True)
    again.delete(whole, third)
    assert files(again) == []


def test_another_digest_than_expected_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(ServiceError) as caught:
        store.write([b"abc"], expected=bytes(32))
    assert caught.value.reason is Reason.BAD_DIGEST
    assert files(store) == []


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise ConnectionError

    store = BlobStore(tmp_path)
    with pytest.raises(ConnectionError):
        store.write(chunks())
    assert files(store) == []


def test_left_overs_of_a_crash_are_removed_at_start_and_partial_blobs_stay(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    (tmp_path / "tmp" / "half").write_bytes(b"x")
    with store.partial("upload-1") as part:
        part.append(b"x")
    assert files(BlobStore(tmp_path)) == ["partial/upload-1"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=50), st.booleans()), max_size=8), st.integers(0, 100))
def test_a_partial_blob_grows_over_several_lives(steps: list[tuple[bytes, bool]], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, expected = BlobStore(Path(folder)), b""
        part = store.partial("u")
        for data, reopen in steps:
            part.append(data)
            expected += data
            assert part.length == len(expected)
            if reopen:
                part.close()
                expected = expected[: min(cut, len(expected))]
                part = BlobStore(Path(folder)).partial("u", len(expected))
        digest = part.finish(hashlib.sha256(expected).digest())
        assert store.path(digest).read_bytes() == expected
        assert store.partials() == []


def test_a_partial_blob_of_another_digest_stays_as_it_is(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.partial("u") as part:
        part.append(b"abc")
        with pytest.raises(ServiceError) as caught:
            part.finish(bytes(32))
        assert caught.value.reason is Reason.BAD_DIGEST
        assert store.partials() == ["u"]
        part.discard()
    assert files(store) == []


def test_a_partial_blob_shorter_than_asked_for_is_not_found(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with store.partial("u") as part:
        part.append(b"abc")
    with pytest.raises(ServiceError) as caught:
        store.partial("u", 4)
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "A", "x\0", "x" * 201])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ServiceError) as caught:
        BlobStore(tmp_path).partial(name)
    assert caught.value.reason is Reason.MALFORMED


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this user may mount one."""
    with mounted(tmp_path / "disk", "1m") as point:
        yield point


def test_a_full_disk_refuses_and_leaves_nothing_half_written(small_disk: Path) -> None:
    store = BlobStore(small_disk / "b")
    kept = store.write([b"k" * 300_000])
    with pytest.raises(ServiceError) as caught:
        store.write(b"x" * 100_000 for _ in range(20))
    assert caught.value.reason is Reason.STORAGE
    assert files(store) == [f"blobs/{kept.hex()}"]
    with store.partial("u") as part:
        part.append(b"y" * 100_000)
        with pytest.raises(ServiceError) as caught:
            part.append(b"z" * 2_000_000)
        assert caught.value.reason is Reason.STORAGE
        assert part.length == 100_000
        store.delete(kept)
        part.append(b"z" * 500_000)
        assert part.finish() == hashlib.sha256(b"y" * 100_000 + b"z" * 500_000).digest()


def insert(db: Database, *rows: bytes) -> None:
    with db.transaction() as connection:
        connection.executemany("INSERT INTO t VALUES (?)", [(row,) for row in rows])


def test_a_full_disk_refuses_a_transaction_and_the_store_goes_on_when_there_is_room(small_disk: Path) -> None:
    db = open_database(small_disk / "s.db", ["CREATE TABLE t (x BLOB)"])
    insert(db, b"first")
    filler = small_disk / "filler"
    filler.write_bytes(b"f" * (shutil.disk_usage(small_disk).free - 100_000))
    with pytest.raises(ServiceError) as caught:
        insert(db, *[b"x" * 50_000] * 10)
    assert caught.value.reason is Reason.STORAGE
    assert db.query("SELECT x FROM t") == [(b"first",)]
    filler.unlink()
    insert(db, b"second")
    assert db.query("SELECT x FROM t") == [(b"first",), (b"second",)]
    db.close()


def test_a_limit_on_file_size_is_a_storage_refusal_too(tmp_path: Path) -> None:
    """Runs without the right to mount: RLIMIT_FSIZE stands in for the full disk."""
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from services.common.errors import ServiceError\nfrom services.common.store.blobs import BlobStore\n"
        "store = BlobStore(Path(sys.argv[1]))\n"
        "try:\n    store.write([b'x' * 60_000] * 5)\n"
        "except ServiceError as error:\n    print(error.reason.value)\n"
        "part = store.partial('u')\npart.append(b'y' * 60_000)\n"
        "try:\n    part.append(b'y' * 60_000)\n"
        "except ServiceError as error:\n    print(error.reason.value, part.length)\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-B", "-c", program, str(tmp_path / "b")],
        cwd=ROOT,
        preexec_fn=limit,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "STORAGE\nSTORAGE 60000\n", done.stderr
    assert sorted(file.name for file in (tmp_path / "b").rglob("*") if file.is_file()) == ["u"]
