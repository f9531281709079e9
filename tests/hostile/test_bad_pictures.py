"""Bad input of a ward's pictures, at the import and at the node: one clear line each, the rest goes on."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from services.cli.__main__ import main
from services.cli.data import app
from services.cli.data_check import check_folder
from services.cli.data_findings import Kind
from services.cli.data_import import import_folder
from services.common.errors import Reason, ServiceError
from services.hospital_node.dataset import decode_image, load_dataset
from tests.support.pictures import bomb, dicom, encoded, sixteen_bits, texture, ward
from tests.support.sites import fixed_split
from tests.support.small_disk import mounted

NOBODY = 65534


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes, two good pictures each."""
    source = tmp_path / "pictures"
    for number, label in enumerate(["mel", "mel", "nv", "nv"]):
        (source / label).mkdir(parents=True, exist_ok=True)
        (source / label / f"good{number}.png").write_bytes(encoded(texture(number)))
    return source


@pytest.mark.parametrize(
    ("name", "blob", "kind"),
    [
        ("x.png", b"", Kind.EMPTY),
        ("x.jpg", encoded(texture(50, 200), "JPEG")[:900], Kind.TRUNCATED),
        ("x.png", encoded(texture(50, 200))[:2000], Kind.TRUNCATED),
        ("x.png", b"this is no picture", Kind.UNREADABLE),
        ("x.png", bomb(), Kind.TOO_LARGE),
        ("x.dcm", dicom(texture(51), frames=3), Kind.FRAMES),
        ("x.dcm", dicom(None), Kind.NO_PIXELS),
        ("x.dcm", dicom(texture(51))[:700], Kind.TRUNCATED),
    ],
)
def test_import_leaves_out_what_cannot_be_used_in_one_line_and_goes_on(
    pictures: Path, tmp_path: Path, name: str, blob: bytes, kind: Kind
) -> None:
    (pictures / "mel" / name).write_bytes(blob)
    told = CliRunner().invoke(app, ["import", "folder", str(pictures), "--out", str(tmp_path / "ward")])
    assert told.exit_code == 1
    (line,) = [line for line in told.stdout.splitlines() if f"mel/{name}" in line]
    assert line.startswith("error: ")
    assert "4 images are there, 4 of them new; 1 could not be used" in told.stdout
    assert [one.kind for one in import_folder(pictures, tmp_path / "ward", None).findings] == [kind]
    (pictures / "mel" / name).write_bytes(encoded(texture(52)))  # mended: the second run continues
    assert import_folder(pictures, tmp_path / "ward", None).written == 1


@pytest.mark.parametrize(
    ("name", "blob"),
    [
        ("x.png", sixteen_bits(texture(60))),
        ("x.png", encoded(texture(60), "PNG", "P")),
        ("x.jpg", encoded(texture(60), "JPEG", "CMYK")),
    ],
)
def test_unusual_colours_are_brought_in_as_what_a_trainer_reads(
    pictures: Path, tmp_path: Path, name: str, blob: bytes
) -> None:
    (pictures / "mel" / name).write_bytes(blob)
    done = import_folder(pictures, tmp_path / "ward", None)
    assert done.images == 5
    assert {one.kind for one in done.findings} == {Kind.DEPTH}
    brought = check_folder(tmp_path / "ward")
    assert brought.findings == ()
    assert {one.colours for one in brought.pictures} == {"RGB"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this user may mount one."""
    with mounted(tmp_path / "disk", "256k") as point:
        yield point


def test_a_disk_that_fills_up_in_mid_import_is_one_line_and_a_second_run_continues(
    pictures: Path, small_disk: Path, tmp_path: Path
) -> None:
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (160, 160, 3), np.uint8)
        (pictures / "nv" / f"large{number}.png").write_bytes(encoded(noise))  # 77 kB: no PNG makes noise smaller
    with pytest.raises(ServiceError, match="free or enlarge the volume") as refused:
        import_folder(pictures, small_disk / "ward", None)
    assert refused.value.reason is Reason.STORAGE
    there = sorted(path.name for path in (small_disk / "ward" / "images").iterdir())
    assert 0 < len(there) < 10
    assert not [name for name in there if name.endswith(".new")]  # nothing half-written
    assert not (small_disk / "ward" / "metadata.csv").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    done = import_folder(pictures, small_disk / "ward", None)
    assert (done.images, done.written) == (10, 10 - len(there))
    assert check_folder(small_disk / "ward").passed


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that everybody may read; pytest's own are closed again by every other run of it on the machine."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("command", ["import", "check"])
def test_a_folder_that_may_only_be_read(readable: Path, tmp_path: Path, command: str) -> None:
    """Import: one line, exit code 1. Check: it reads all the same, and says that the verdict was not kept."""
    ward(readable / "ward")
    (readable / "pictures" / "nv").mkdir(parents=True)
    (readable / "pictures" / "nv" / "x.png").write_bytes(encoded(texture(1)))
    words = {
        "import": ["import", "folder", str(readable / "pictures"), "--out", str(readable / "out")],
        "check": ["check", str(readable / "ward")],
    }[command]
    # Once as this user: what is imported on the way is loaded, whether or not the other one may read this checkout.
    assert main(["data", "check", str(ward(tmp_path / "ward"))]) == 0
    assert main(["data", "import", "folder", str(readable / "pictures"), "--out", str(tmp_path / "out")]) == 0
    code, said = as_nobody(["data", *words])
    assert f"let user {NOBODY} write there" in said
    assert "Traceback" not in said
    if command == "import":
        assert code == 1
        assert said.startswith("wardround: ")
        assert said.count("\n") == 1
    else:
        assert code == 0
        assert "may take part" in said
        assert "the verdict was not kept" in said


def as_nobody(words: list[str]) -> tuple[int, str]:
    """(exit code, everything said) of the command line in a child process of another user."""
    read, write = os.pipe()
    if not (child := os.fork()):
        code = 99
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.dup2(write, 1)
            os.dup2(write, 2)
            with os.fdopen(1, "w", closefd=False) as out, os.fdopen(2, "w", closefd=False) as err:
                sys.stdout, sys.stderr = out, err
                code = main(words)
                out.flush()
                err.flush()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def test_the_node_refuses_a_bomb_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(bomb())
    with pytest.raises(ServiceError, match=r"x\.png cannot be decoded .* replace it or remove its row") as refused:
        decode_image(tmp_path / "x.png", 28)
    assert refused.value.reason is Reason.INVALID_DATA


@pytest.mark.parametrize(
    "blob",
    [sixteen_bits(texture(60)), encoded(texture(60), "PNG", "P"), encoded(texture(60), "JPEG", "CMYK")],
    ids=["16-bit", "palette", "CMYK"],
)
def test_the_node_reads_unusual_colours_as_eight_bit_rgb(tmp_path: Path, blob: bytes) -> None:
    (tmp_path / "x.png").write_bytes(blob)
    read = decode_image(tmp_path / "x.png", 48)
    assert read.shape == (48, 48, 3)
    assert abs(float(read.mean()) - float(texture(60).mean())) < 25  # a 16-bit value cut off would be black or white


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text.replace(",", ";"), "image_id"),
        (lambda text: text.replace("label", "lable"), "label or dx is missing"),
        (lambda text: text.replace("path", "file"), "path is missing"),
    ],
)
def test_the_node_refuses_a_table_that_it_cannot_read_in_one_sentence(tmp_path: Path, edit, words: str) -> None:
    folder = ward(tmp_path / "ward")
    table = folder / "metadata.csv"
    table.write_text(edit(table.read_text()))
    with pytest.raises(ServiceError, match=words) as refused:
        load_dataset(folder, ("mel", "nv"), 28, tmp_path / "state")
    assert refused.value.reason is Reason.INVALID_DATA
    assert "\n" not in refused.value.detail


def test_the_node_reads_a_table_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = ward(tmp_path / "ward")
    table = folder / "metadata.csv"
    state = fixed_split(tmp_path / "state")
    plain = load_dataset(folder, ("mel", "nv"), 28, state).paths
    table.write_text("\ufeff" + table.read_text(), encoding="utf-8")
    assert load_dataset(folder, ("mel", "nv"), 28, state).paths == plain
