"""`wardround data check`: every fault is one finding, and the rest goes on."""

import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from services.cli.data import app
from services.cli.data_check import check_folder, near_duplicates
from services.cli.data_findings import NEXT_STEP, Kind, Severity
from services.cli.data_images import look
from services.cli.data_report import as_html
from tests.support.pictures import bomb, dicom, encoded, sixteen_bits, texture, ward


def kinds(folder: Path, classes: tuple[str, ...] = ()) -> list[Kind]:
    return sorted({one.kind for one in check_folder(folder, classes).findings})


def with_picture(tmp_path: Path, blob: bytes, name: str = "images/x.png") -> Path:
    folder = ward(tmp_path / "ward")
    (folder / name).write_bytes(blob)
    with (folder / "metadata.csv").open("a") as table:
        table.write(f"x,{name},px,nv\n")
    return folder


def test_a_clean_folder_passes_and_is_counted(tmp_path: Path) -> None:
    report = check_folder(ward(tmp_path / "ward"), ("mel", "nv"))
    assert report.passed
    assert report.findings == ()
    assert report.classes() == {"mel": 3, "nv": 3}
    assert report.patients() == 6
    assert report.table.unit == "patient"
    assert report.sizes() == {"48 x 48": 6}


@pytest.mark.parametrize(
    ("blob", "kind"),
    [
        (b"", Kind.EMPTY),
        (encoded(texture(50, 200), "JPEG")[:900], Kind.TRUNCATED),
        (encoded(texture(50, 200))[:2000], Kind.TRUNCATED),
        (b"this is no picture", Kind.UNREADABLE),
        (bomb(), Kind.TOO_LARGE),
        (bomb(11_000, 11_000), Kind.TOO_LARGE),
        (dicom(texture(51), frames=3), Kind.FRAMES),
        (dicom(None), Kind.NO_PIXELS),
        (dicom(texture(51))[:700], Kind.TRUNCATED),
        (dicom(texture(51), burnt=True), Kind.BURNT_IN),
    ],
)
def test_a_picture_that_cannot_be_used_is_an_error_and_the_rest_goes_on(
    tmp_path: Path, blob: bytes, kind: Kind
) -> None:
    report = check_folder(with_picture(tmp_path, blob))
    assert kind in {one.kind for one in report.findings}
    assert not report.passed
    assert {f"images/i{i}.png" for i in range(6)} <= {one.name for one in report.pictures}


@pytest.mark.parametrize(
    "blob",
    [
        sixteen_bits(texture(60)),
        encoded(texture(60), "PNG", "P"),
        encoded(texture(60), "JPEG", "CMYK"),
    ],
)
def test_unusual_colours_are_a_warning(tmp_path: Path, blob: bytes) -> None:
    report = check_folder(with_picture(tmp_path, blob))
    assert [one.kind for one in report.findings] == [Kind.DEPTH]
    assert report.passed


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(sixteen_bits(texture(61)))
    looked, _ = look(tmp_path, "x.png")
    assert looked is not None
    assert looked.mean[0] == pytest.approx(texture(61)[..., 0].mean(), abs=2)


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(bomb())
    tracemalloc.start()
    look(tmp_path, "x.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20  # its pixels would be 2.7 GB


def test_names_are_reported_and_never_their_values(tmp_path: Path) -> None:
    picture = Image.fromarray(texture(62))
    exif = picture.getexif()
    exif[0x013B] = "Doctor Secret"  # Artist
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif)
    folder = with_picture(tmp_path, out.getvalue(), "images/x.jpg")
    (folder / "images" / "y.dcm").write_bytes(dicom(texture(63), patient="MRN-4711"))
    report = check_folder(folder)
    found = [one for one in report.findings if one.kind is Kind.IDENTIFYING]
    assert "EXIF Artist" in found[0].detail
    assert "PatientID" in found[1].detail
    told = as_html(report, 1.0) + " ".join(one.line() for one in report.findings)
    for value in ("Doctor Secret", "MRN-4711", "Doe", "Jane"):
        assert value not in told


def test_rows_are_judged_one_by_one(tmp_path: Path) -> None:
    folder = ward(tmp_path / "ward")
    (tmp_path / "outside.png").write_bytes(encoded(texture(70)))
    (folder / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    with (folder / "metadata.csv").open("a") as table:
        table.write("i0,images/i1.png,p9,nv\n")  # id and path twice
        table.write("a,/etc/passwd,p9,nv\nb,../outside.png,p9,nv\nc,images/link.png,p9,nv\nd,C:\\x.png,p9,nv\n")
        table.write("e,images/none.png,p9,nv\nf,images/i2.png,,zebra\nshort,row\n")
    report = check_folder(folder, ("mel", "nv"))
    lines = [(one.kind, one.files[0]) for one in report.findings]
    for line in (9, 10, 11, 12):
        assert (Kind.UNSAFE_PATH, f"metadata.csv line {line}") in lines
    assert (Kind.DUPLICATE_ID, "metadata.csv line 8") in lines
    assert (Kind.MISSING, "metadata.csv line 13") in lines
    assert (Kind.LABEL, "metadata.csv line 14") in lines
    assert (Kind.ROW, "metadata.csv line 14") in lines
    assert (Kind.ROW, "metadata.csv line 15") in lines
    assert "outside.png" not in {one.name for one in report.pictures}


def test_a_patient_in_two_folds(tmp_path: Path) -> None:
    folder = ward(tmp_path / "ward")
    rows = "i0,images/i0.png,p0,mel,train\ni1,images/i1.png,p0,nv,test\ni2,images/i2.png,p2,nv,tset\n"
    (folder / "metadata.csv").write_text("image_id,path,patient_id,label,fold\n" + rows)
    found = {one.kind: one for one in check_folder(folder).findings}
    assert found[Kind.TWO_FOLDS].files == ("metadata.csv line 2", "metadata.csv line 3")
    assert "tset" in found[Kind.ROW].detail


@pytest.mark.parametrize(
    ("edit", "passes", "rows"),
    [
        (lambda text: "\ufeff" + text, True, 6),
        (lambda text: text.replace(",", ";"), False, 6),
        (lambda text: text.replace("label", "lable"), False, 0),
        (lambda text: "", False, 0),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, edit, passes: bool, rows: int) -> None:
    folder = ward(tmp_path / "ward")
    table = folder / "metadata.csv"
    table.write_text(edit(table.read_text()), encoding="utf-8")
    report = check_folder(folder)
    assert report.passed is passes
    assert len(report.table.rows) == rows
    assert len(report.pictures) == 6  # the pictures are looked at all the same
    assert passes or Kind.TABLE in {one.kind for one in report.findings}


def test_a_missing_table_is_said_and_the_pictures_are_checked(tmp_path: Path) -> None:
    folder = ward(tmp_path / "ward")
    (folder / "metadata.csv").unlink()
    report = check_folder(folder)
    assert Kind.TABLE in {one.kind for one in report.findings}
    assert len(report.pictures) == 6
    assert not report.passed


def test_duplicates_exact_and_near(tmp_path: Path) -> None:
    folder = ward(tmp_path / "ward")
    again = np.clip(texture(0).astype(int) + 3, 0, 255).astype(np.uint8)
    (folder / "images" / "near.jpg").write_bytes(encoded(again, "JPEG", quality=85))
    (folder / "images" / "same.png").write_bytes((folder / "images" / "i1.png").read_bytes())
    found = check_folder(folder).findings
    assert [one.files for one in found if one.kind is Kind.DUPLICATE] == [("images/i1.png", "images/same.png")]
    assert [one.files for one in found if one.kind is Kind.NEAR_DUPLICATE] == [("images/i0.png", "images/near.jpg")]


def test_every_pair_within_the_distance_is_found(tmp_path: Path) -> None:
    """The bands lose none: against all pairs by hand, on hashes a few bits apart."""
    (tmp_path / "x.png").write_bytes(encoded(texture(1)))
    looked, _ = look(tmp_path, "x.png")
    assert looked is not None
    random = np.random.default_rng(5)
    hashes = [int(random.integers(0, 2**63)) for _ in range(20)]
    hashes += [h ^ sum(1 << int(b) for b in random.choice(64, k, replace=False)) for h in hashes for k in (2, 3, 4)]
    pictures = [
        type(looked)(**{**looked.__dict__, "name": f"{i:03}", "hash": h, "sha256": i.to_bytes(32, "big")})
        for i, h in enumerate(hashes)
    ]
    found = {one.files for one in near_duplicates(pictures)}
    near = {
        (f"{a:03}", f"{b:03}")
        for a in range(len(hashes))
        for b in range(a + 1, len(hashes))
        if (hashes[a] ^ hashes[b]).bit_count() <= 3
    }
    assert found == near
    assert len(near) >= 40


def test_every_kind_says_the_next_step() -> None:
    assert set(NEXT_STEP) == set(Kind)


def test_the_page_asks_nothing_of_anybody_and_shows_the_faults(tmp_path: Path) -> None:
    folder = with_picture(tmp_path, encoded(texture(0)))
    page = as_html(check_folder(folder), 0.5)
    assert "http" not in page
    assert 'src="data:image/jpeg' in page
    assert "exact duplicate" in page
    assert "may not take part" in page


def test_a_name_in_a_file_cannot_write_markup(tmp_path: Path) -> None:
    folder = ward(tmp_path / "ward")
    with (folder / "metadata.csv").open("a") as table:
        table.write("x,images/none.png,px,<script>alert(1)</script>\n")
    assert "<script>" not in as_html(check_folder(folder), 0.5)


def test_the_command_prints_for_a_program_and_exits_by_the_verdict(tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["check", str(ward(tmp_path / "good")), "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["passed"] is True
    bad = runner.invoke(app, ["check", str(with_picture(tmp_path, b"")), "--json"])
    assert bad.exit_code == 1
    found = json.loads(bad.stdout)["findings"]
    assert [(one["kind"], one["files"], one["severity"]) for one in found] == [
        ("empty file", ["images/x.png"], Severity.ERROR.value)
    ]
