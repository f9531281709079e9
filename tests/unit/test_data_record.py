"""What `wardround data check` leaves for the node, and what the node makes of it (ADR 0016)."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from services.cli.__main__ import main
from services.common.errors import Reason, ServiceError
from services.hospital_node.datacheck import RECORD, DataCheck, Record, dataset_digest
from tests.support.pictures import encoded, texture, ward

KEY = bytes(range(32))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 60.0  # long enough for every look to be a new one
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that has passed its check."""
    made = ward(tmp_path / "ward")
    assert main(["data", "check", str(made)]) == 0
    return made


def told(folder: Path, key: bytes = KEY) -> str:
    return DataCheck(folder, lambda: key, Clock()).told()


def test_the_digest_is_the_one_that_the_guide_defines() -> None:
    table, a, b = (hashlib.sha256(word).digest() for word in (b"table", b"a", b"b"))
    parts = b"wardround/v1/dataset\x00" + table + b"\x00\x00\x00\x05a.png" + a + b"\x00\x00\x00\x06bb.png" + b
    assert dataset_digest(table, {"bb.png": b, "a.png": a}) == hashlib.sha256(parts).digest()


def test_the_node_finds_what_the_check_wrote(folder: Path) -> None:
    """Two readers, one digest; what is told depends on the site's key and is not the digest itself."""
    record = Record.decode((folder / RECORD).read_bytes())
    assert record.passed
    assert told(folder) == told(folder)
    assert len({told(folder), told(folder, bytes(32)), record.dataset.hex()}) == 3
    (folder / "notes.txt").write_text("no row names me")
    assert told(folder) == told(folder)


def test_a_second_copy_of_the_same_data_has_the_same_digest(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert told(tmp_path / "copy") == told(folder)


def picture(folder: Path) -> Path:
    return next((folder / "images").iterdir())


def other_row(folder: Path) -> None:
    table = folder / "metadata.csv"
    table.write_text(table.read_text().replace("mel", "nv", 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / RECORD).unlink(), "data-check.json is missing"),
        (lambda folder: (folder / RECORD).write_text("{}"), "no record of this version"),
        (lambda folder: (folder / RECORD).write_text("\xff"), "no record of this version"),
        (lambda folder: picture(folder).write_bytes(encoded(texture(77), "PNG")), "has changed since it was checked"),
        (lambda folder: picture(folder).unlink(), "cannot be held against its check"),
        (other_row, "has changed since it was checked"),
        (lambda folder: (folder / "metadata.csv").unlink(), "cannot be held against its check"),
        (lambda folder: (folder / "metadata.csv").write_text("image_id,path\nx,../x.png\n"), "leads out of the folder"),
    ],
)
def test_no_verdict_no_round(folder: Path, change: Callable[[Path], object], words: str) -> None:
    check = DataCheck(folder, lambda: KEY, Clock())
    check.told()
    change(folder)
    with pytest.raises(ServiceError, match=words) as refused:
        check.told()
    assert refused.value.reason is Reason.POLICY_REFUSES
    assert "run `wardround data check`" in refused.value.detail


def test_a_failed_check_is_kept_as_failed(tmp_path: Path) -> None:
    folder = ward(tmp_path / "ward")
    picture(folder).write_bytes(b"")
    assert main(["data", "check", str(folder)]) == 1
    with pytest.raises(ServiceError, match="says that the check failed"):
        told(folder)


def test_files_are_read_again_only_when_one_has_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = hashlib.file_digest

    def counted(file, name):  # type: ignore[no-untyped-def]
        read.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    check = DataCheck(folder, lambda: KEY, Clock())
    check.told()
    first = len(read)
    assert first == 7  # six pictures and the table
    check.told()
    assert len(read) == first
