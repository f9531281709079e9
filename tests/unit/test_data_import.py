"""`wardround data import`: the originals untouched, a second run goes on, one clear line for what cannot be used."""

import csv
import json
import os
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli import data_import
from services.cli.data import app
from services.cli.data_check import check_folder
from services.cli.data_findings import Kind
from services.cli.data_images import decode
from services.cli.data_import import import_folder, import_ham10000
from services.common.errors import Reason, ServiceError
from services.hospital_node.dataset import load_dataset
from tests.support.pictures import dicom, encoded, sixteen_bits, texture
from tests.support.sites import fixed_split


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    source = tmp_path / "pictures"
    for number, name in enumerate(["mel/P1_a.jpg", "mel/P1_b.jpg", "nv/P2_a.png", "nv/P3_a.png"]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        form = "JPEG" if name.endswith("jpg") else "PNG"
        (source / name).write_bytes(encoded(texture(number), form))
    return source


def test_a_folder_for_each_class_becomes_a_site_that_loads(pictures: Path, tmp_path: Path) -> None:
    before = contents(pictures)
    done = import_folder(pictures, tmp_path / "ward", r"^(P\d+)_")
    assert (done.images, done.written, done.findings) == (4, 4, ())
    assert contents(pictures) == before
    rows = table(tmp_path / "ward" / "metadata.csv")
    assert [(row["patient_id"], row["label"]) for row in rows] == [
        ("P1", "mel"), ("P1", "mel"), ("P2", "nv"), ("P3", "nv")
    ]  # fmt: skip
    assert (tmp_path / "ward" / rows[0]["path"]).read_bytes() == before["mel/P1_a.jpg"]  # copied byte for byte
    assert check_folder(tmp_path / "ward").passed
    dataset = load_dataset(tmp_path / "ward", ("mel", "nv"), 32, fixed_split(tmp_path / "state"))
    assert (len(dataset), dataset.unit) == (4, "patient")


def test_a_second_run_writes_nothing_and_a_cut_off_one_goes_on(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    out, real, calls = tmp_path / "ward", data_import.replace_file, []

    def breaks(path: Path, parts) -> None:
        calls.append(path)
        if len(calls) > 2:
            raise ServiceError(Reason.STORAGE, "the disk is full: enlarge it")
        real(path, parts)

    monkeypatch.setattr(data_import, "replace_file", breaks)
    with pytest.raises(ServiceError) as refused:
        import_folder(pictures, out, None)
    assert refused.value.reason is Reason.STORAGE
    assert not (out / "metadata.csv").exists()
    monkeypatch.setattr(data_import, "replace_file", real)
    there = len(list((out / "images").iterdir()))
    assert 0 < there < 4
    assert import_folder(pictures, out, None).written == 4 - there
    after = {name: os.stat(out / name).st_mtime_ns for name in contents(out)}
    assert import_folder(pictures, out, None).written == 0
    assert {name: os.stat(out / name).st_mtime_ns for name in contents(out)} == after


def test_what_cannot_be_used_is_left_out_and_said(pictures: Path, tmp_path: Path) -> None:
    (pictures / "nv" / "empty.png").write_bytes(b"")
    (pictures / "nv" / "half.jpg").write_bytes(encoded(texture(9, 300), "JPEG")[:700])
    done = import_folder(pictures, tmp_path / "ward", None)
    assert {(one.kind, one.files) for one in done.findings} == {
        (Kind.EMPTY, ("nv/empty.png",)),
        (Kind.TRUNCATED, ("nv/half.jpg",)),
    }
    assert done.images == 4
    told = CliRunner().invoke(app, ["import", "folder", str(pictures), "--out", str(tmp_path / "again")])
    assert told.exit_code == 1
    assert sum("nv/half.jpg" in line for line in told.stdout.splitlines()) == 1
    again = CliRunner().invoke(app, ["import", "folder", str(pictures), "--out", str(tmp_path / "again"), "--json"])
    found = json.loads(again.stdout)
    assert (again.exit_code, found["images"], found["written"]) == (1, 4, 0)
    assert {one["kind"] for one in found["findings"]} == {"empty file", "truncated"}


def test_dicom_becomes_png_without_its_names_and_patients_stay_together(pictures: Path, tmp_path: Path) -> None:
    for number, patient in enumerate(["MRN-1", "MRN-1", "MRN-2"]):
        (pictures / "mel" / f"d{number}.dcm").write_bytes(dicom(texture(20 + number), patient=patient))
    out = tmp_path / "ward"
    done = import_folder(pictures, out, None)
    rows = {row["image_id"]: row for row in table(out / "metadata.csv")}
    assert rows["mel_d0"]["patient_id"] == rows["mel_d1"]["patient_id"] != rows["mel_d2"]["patient_id"]
    written = b"".join(contents(out).values())
    assert b"MRN" not in written
    assert b"Doe" not in written
    pixels, form, _, notes = decode((out / rows["mel_d0"]["path"]).read_bytes())
    assert (form, notes) == ("PNG", [])
    assert (pixels == texture(20)).all()
    assert {one.kind for one in done.findings} == {Kind.IDENTIFYING}
    assert check_folder(out).passed
    other = import_folder(pictures, tmp_path / "other", None)
    assert table(other.tables[0]) != table(out / "metadata.csv")  # another site, another key: no link by pseudonym


def test_sixteen_bit_grey_becomes_what_a_trainer_reads(pictures: Path, tmp_path: Path) -> None:
    (pictures / "mel" / "deep.png").write_bytes(sixteen_bits(texture(30)))
    import_folder(pictures, tmp_path / "ward", None)
    pixels, form, colours, _ = decode((tmp_path / "ward" / "images" / "mel_deep.png").read_bytes())
    assert (form, colours) == ("PNG", "RGB")
    assert abs(pixels.astype(int) - texture(30)[..., :1]).max() <= 1


def test_without_any_patient_the_unit_is_the_image(pictures: Path, tmp_path: Path) -> None:
    import_folder(pictures, tmp_path / "ward", None)
    assert "patient_id" not in table(tmp_path / "ward" / "metadata.csv")[0]


@pytest.mark.parametrize(
    ("inside", "reason", "word"),
    [("", Reason.CONFLICT, "--out"), ("ward", Reason.CONFLICT, "--out")],
)
def test_the_output_may_not_lie_in_the_originals(pictures: Path, inside: str, reason: Reason, word: str) -> None:
    with pytest.raises(ServiceError) as refused:
        import_folder(pictures, pictures / inside, None)
    assert refused.value.reason is reason
    assert word in refused.value.detail


@pytest.mark.parametrize("pattern", ["(", "no group", "(a)(b)"])
def test_a_bad_pattern_is_one_sentence(pictures: Path, tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ServiceError, match="--patient"):
        import_folder(pictures, tmp_path / "ward", pattern)


HAM = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset\n"


def archive(folder: Path, rows: int = 6, nested: bool = False) -> Path:
    """The published layout: two zips of images and the table; one row without an image."""
    folder.mkdir()
    lines = [HAM]
    for part in (1, 2):
        with zipfile.ZipFile(folder / f"HAM10000_images_part_{part}.zip", "w") as out:
            for i in range(part - 1, rows, 2):
                out.writestr(f"ISIC_{i:07}.jpg", encoded(texture(i), "JPEG"))
    for i in range(rows + 1):
        lines.append(f"HAM_{i // 2},ISIC_{i:07},nv,histo,50.0,male,back,{'rosendahl' if i % 3 else 'vidir_modern'}\n")
    (folder / "HAM10000_metadata").write_text("".join(lines))
    if not nested:
        return folder
    whole = folder.parent / "dataverse_files.zip"
    with zipfile.ZipFile(whole, "w") as out:
        for path in folder.iterdir():
            out.write(path, path.name)
    return whole


@pytest.mark.parametrize("nested", [False, True])
def test_the_published_archive_becomes_one_folder_a_site(tmp_path: Path, nested: bool) -> None:
    done = import_ham10000(archive(tmp_path / "ham", nested=nested), tmp_path / "sites")
    assert (done.images, done.without_image) == (6, 1)
    assert sorted(path.parent.name for path in done.tables) == ["rosendahl", "vidir_modern"]
    rows = table(tmp_path / "sites" / "rosendahl" / "metadata.csv")
    assert [row["image_id"] for row in rows] == ["ISIC_0000001", "ISIC_0000002", "ISIC_0000004", "ISIC_0000005"]
    assert all(check_folder(path.parent).passed for path in done.tables)
    again = import_ham10000(archive(tmp_path / "ham2", nested=False), tmp_path / "sites", ["rosendahl"])
    assert (again.images, again.written) == (4, 0)


def test_damaged_archives_and_tables_are_one_sentence(tmp_path: Path) -> None:
    folder = archive(tmp_path / "ham")
    whole = (folder / "HAM10000_images_part_1.zip").read_bytes()
    (folder / "HAM10000_images_part_1.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ServiceError, match="not a whole zip"):
        import_ham10000(folder, tmp_path / "sites")
    (folder / "HAM10000_images_part_1.zip").write_bytes(whole)
    (folder / "HAM10000_metadata").write_text(HAM + "HAM_1,../../x,nv,histo,1,male,back,rosendahl\n")
    with pytest.raises(ServiceError, match="no plain name"):
        import_ham10000(folder, tmp_path / "sites")
    (folder / "HAM10000_metadata").unlink()
    with pytest.raises(ServiceError, match="HAM10000_metadata"):
        import_ham10000(folder, tmp_path / "sites")
    with pytest.raises(ServiceError, match="not there"):
        import_ham10000(tmp_path / "nowhere", tmp_path / "sites")


def test_an_unknown_site_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="rosendahl, vidir_modern"):
        import_ham10000(archive(tmp_path / "ham"), tmp_path / "sites", ["charite"])
