"""What a hospital's folder may hold, and that every mistake is one sentence naming the file and the next step."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from services.common.errors import Reason, ServiceError
from services.hospital_node.dataset import SPLITS, decode_image, load_dataset
from tests.support.sites import CLASSES, COLUMNS, SIZE, fixed_split, small_site, write_image, write_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    for name in ("a", "b", "c", "e"):
        write_image(site / "images" / f"{name}.png", 50)
    fixed_split(tmp_path / "state")
    return site


GOOD = [("a", "images/a.png", "p1", "dark"), ("b", "images/b.png", "p2", "light"), ("c", "images/c.png", "p2", "light")]


def refusal(folder: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> str:
    write_table(folder, rows, columns)
    with pytest.raises(ServiceError) as refused:
        load_dataset(folder, CLASSES, SIZE, folder.parent / "state")
    assert refused.value.reason is Reason.INVALID_DATA
    assert str(folder) in refused.value.detail
    return refused.value.detail


def many(folder: Path, patients: int, images_each: int = 1) -> None:
    rows = []
    write_image(folder / "images" / "x.png", 50)
    for patient in range(patients):
        for view in range(images_each):
            name = f"{patient}-{view}.png"
            os.link(folder / "images" / "x.png", folder / "images" / name)
            rows.append((name, f"images/{name}", f"p{patient}", CLASSES[patient % 2]))
    write_table(folder, rows)


def test_patients_are_the_unit_and_keep_their_images_together(folder: Path) -> None:
    many(folder, 300, images_each=2)
    data = load_dataset(folder, CLASSES, SIZE, folder.parent / "state")
    assert data.unit == "patient"
    sizes = {split: len(data.fold(split)) for split in SPLITS}
    assert sum(sizes.values()) == 300
    assert 35 <= sizes["test"] <= 90
    assert 8 <= sizes["validation"] <= 45
    seen = np.concatenate([np.concatenate(data.fold(split).images) for split in SPLITS])
    assert sorted(seen) == list(range(600))
    assert all(len(images) == 2 for split in SPLITS for images in data.fold(split).images)


def test_split_is_fixed_by_the_sites_key_and_not_by_the_files_order(folder: Path) -> None:
    many(folder, 200)
    state = folder.parent / "one-sites-state"
    first = load_dataset(folder, CLASSES, SIZE, state)
    assert (state / "split.key").stat().st_mode & 0o077 == 0
    rows = list(csv.reader((folder / "metadata.csv").open()))
    write_table(folder, [tuple(row) for row in reversed(rows[1:])][:150])  # data grow and shrink, patients stay put
    again = load_dataset(folder, CLASSES, SIZE, state)
    for split in SPLITS:
        before = {first.paths[i[0]] for i in first.fold(split).images}
        assert {again.paths[i[0]] for i in again.fold(split).images} <= before
    other = load_dataset(folder, CLASSES, SIZE, folder.parent / "another-sites-state")
    assert {other.paths[i[0]] for i in other.fold("test").images} != {
        again.paths[i[0]] for i in again.fold("test").images
    }


def test_given_folds_are_kept_and_validation_comes_out_of_train_only(folder: Path) -> None:
    many(folder, 300)
    rows = [tuple(row) for row in csv.reader((folder / "metadata.csv").open())][1:]
    folds = ["test" if i < 100 else "train" for i in range(300)]
    write_table(folder, [(*row, fold) for row, fold in zip(rows, folds, strict=True)], (*COLUMNS, "fold"))
    data = load_dataset(folder, CLASSES, SIZE, folder.parent / "state")
    assert sorted(i[0] for i in data.fold("test").images) == list(range(100))
    assert 5 <= len(data.fold("validation")) <= 45
    assert min(i[0] for split in ("train", "validation") for i in data.fold(split).images) == 100


def test_lesion_stands_in_for_patient_and_image_for_lesion_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(folder, GOOD, ("image_id", "path", "lesion_id", "dx"))
    lesions = load_dataset(folder, CLASSES, SIZE, folder.parent / "state")
    assert lesions.unit == "lesion"
    assert sum(len(lesions.fold(s)) for s in SPLITS) == 2
    caplog.clear()
    write_table(folder, [(a, b, d) for a, b, _, d in GOOD], ("image_id", "path", "label"))
    images = load_dataset(folder, CLASSES, SIZE, folder.parent / "state")
    assert images.unit == "image"
    assert sum(len(images.fold(s)) for s in SPLITS) == 3
    assert "neither patient_id nor lesion_id" in caplog.text


def test_a_patient_votes_with_the_images_of_its_commonest_class(folder: Path) -> None:
    rows = [
        ("a", "images/a.png", "p1", "dark"),
        ("b", "images/b.png", "p1", "light"),
        ("c", "images/c.png", "p1", "light"),
    ]
    write_table(folder, [(*row, "train") for row in rows], (*COLUMNS, "fold"))
    fold = load_dataset(folder, CLASSES, SIZE, folder.parent / "state").fold("train")
    assert fold.images[0].tolist() == [0, 1, 2]
    assert fold.votes[0].tolist() == [1, 2]
    assert fold.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("d", "images/d.png", "p3", "dark"), ("line 5", "images/d.png", "missing")),
        (("d", "images/e.png", "p3", "blue"), ("line 5", "'blue'", "dark, light")),
        (("d", "../a.png", "p3", "dark"), ("line 5", "'../a.png'", "relative")),
        (("d", "/etc/passwd", "p3", "dark"), ("line 5", "/etc/passwd", "relative")),
        (("d", "images", "p3", "dark"), ("line 5", "not a file")),
        (("d", "", "p3", "dark"), ("line 5", "relative")),
        (("d", "images/a.png", "p3", "dark"), ("line 5", "line 2", "a.png")),
        (("a", "images/e.png", "p3", "dark"), ("line 5", "line 2", "image_id")),
        (("d", "images/e.png", " ", "dark"), ("line 5", "patient_id is empty")),
        (("d", "images/e.png"), ("line 5", "4 cells")),
        (("d", "images/e.png", "p3", "dark", "more"), ("line 5", "4 cells")),
    ],
)
def test_a_bad_row_is_named_with_its_line(folder: Path, row: tuple[str, ...], words: tuple[str, ...]) -> None:
    detail = refusal(folder, [*GOOD, row])
    assert all(word in detail for word in words), detail


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    write_image(folder.parent / "elsewhere.png", 1)
    (folder / "images" / "d.png").symlink_to(folder.parent / "elsewhere.png")
    assert "not a file inside" in refusal(folder, [*GOOD, ("d", "images/d.png", "p3", "dark")])


def test_a_patient_in_two_folds_is_refused(folder: Path) -> None:
    rows = [(*row, fold) for row, fold in zip(GOOD, ("train", "train", "test"), strict=True)]
    detail = refusal(folder, rows, (*COLUMNS, "fold"))
    assert "'p2' is in two folds" in detail
    assert "lines 3, 4" in detail
    assert "fold 'dev'" in refusal(folder, [(*row, "dev") for row in GOOD], (*COLUMNS, "fold"))


def test_a_table_that_is_missing_empty_or_short_of_columns_is_refused(folder: Path) -> None:
    with pytest.raises(ServiceError, match=r"metadata\.csv is missing"):
        load_dataset(folder, CLASSES, SIZE, folder.parent / "state")
    assert "no rows" in refusal(folder, [])
    assert "label or dx is missing" in refusal(folder, [row[:3] for row in GOOD], COLUMNS[:3])
    assert "'path' stands there twice" in refusal(folder, [], (*COLUMNS, "path"))
    (folder / "metadata.csv").write_bytes(b"image_id,path,patient_id,label\n\xff\xfe,x,y,z\n")
    with pytest.raises(ServiceError, match="UTF-8"):
        load_dataset(folder, CLASSES, SIZE, folder.parent / "state")


def test_nobody_to_train_on_is_refused(folder: Path) -> None:
    assert "no patient is left to train on" in refusal(folder, [(*row, "test") for row in GOOD], (*COLUMNS, "fold"))


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_a_corrupt_image_is_found_before_anything_is_trained(folder: Path, content: bytes | str) -> None:
    """§9: one clear error naming the file; the check decodes everything once."""
    bad = folder / "images" / "b.png"
    bad.write_bytes(bad.read_bytes()[:60] if content == "half" else content)  # type: ignore[arg-type]  # narrowed
    write_table(folder, [(*row, "train") for row in GOOD], (*COLUMNS, "fold"))
    data = load_dataset(folder, CLASSES, SIZE, folder.parent / "state")
    with pytest.raises(
        ServiceError, match=r"images/b\.png cannot be decoded .* replace it or remove its row"
    ) as refused:
        data.check_images()
    assert refused.value.reason is Reason.INVALID_DATA


def test_checked_images_stay_in_memory_up_to_the_limit(tmp_path: Path) -> None:
    data = small_site(tmp_path / "site", tmp_path / "state")
    one = 3 * SIZE**2
    data.check_images(memory_limit=5 * one + one // 2)
    for path in data.paths:
        path.unlink()
    assert data.pixels(np.arange(5)).shape == (5, SIZE, SIZE, 3)
    with pytest.raises(ServiceError, match="cannot be decoded"):
        data.pixels(np.array([5]))


def test_images_are_turned_upright_made_rgb_and_squeezed(tmp_path: Path) -> None:
    wide = np.zeros((40, 80), np.uint8)
    wide[:, 40:] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(wide).save(tmp_path / "x.jpg", exif=exif, quality=95)
    pixels = decode_image(tmp_path / "x.jpg", 20)
    assert pixels.shape == (20, 20, 3)
    assert pixels[:, :8].min() > 200
    assert pixels[:, 12:].max() < 50


def test_a_damaged_split_key_is_refused(folder: Path) -> None:
    write_table(folder, GOOD)
    state = folder.parent / "state"
    (state / "split.key").write_bytes(b"short")
    with pytest.raises(ServiceError, match="32 are needed"):
        load_dataset(folder, CLASSES, SIZE, state)


HAM = Path(__file__).parents[3] / "shared" / "data" / "ham10000" / "ham10000_28.npz"


@pytest.mark.skipif(
    not HAM.exists(), reason="HAM10000 is not at ../shared/data (its licence keeps it out of this repository)"
)
def test_real_site_splits_lesions_as_published(tmp_path: Path) -> None:
    with np.load(HAM, allow_pickle=False) as stored:
        rows = np.flatnonzero(stored["site"] == "vienna_dias")
        (tmp_path / "images").mkdir()
        table = []
        for i in rows:
            name = str(stored["image_id"][i])
            Image.fromarray(stored["images"][i]).save(tmp_path / "images" / f"{name}.png")
            dx = str(stored["classes"][stored["labels"][i]])
            table.append((name, f"images/{name}.png", str(stored["lesion_id"][i]), dx, str(stored["fold"][i])))
        classes = [str(c) for c in stored["classes"]]
    write_table(tmp_path, table, ("image_id", "path", "lesion_id", "dx", "fold"))
    data = load_dataset(tmp_path, classes, 28, tmp_path / "state")
    data.check_images()
    assert data.unit == "lesion"
    assert len(data.fold("test")) == 46
    assert len(data.fold("train")) + len(data.fold("validation")) == 174
