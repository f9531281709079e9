"""What a hospital has: a folder of images and `metadata.csv`, indexed by patient.

The columns are image_id, path, patient_id or lesion_id, label or dx, and fold where the hospital fixes it.
Rules: one patient is in exactly one split, for the data set's life; every mistake is one INVALID_DATA naming the
file and the next step, found before anything is sent. Not here: augmentation, normalisation, features.
"""

import csv
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from services.common.errors import Reason, ServiceError
from services.common.store.durable import replace_file

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
METADATA = "metadata.csv"
SPLIT_KEY = "split.key"
MEMORY_LIMIT = 512 * 2**20

_TEST_SHARE = 0.2
_VALIDATION_SHARE = 0.1  # of what is not test
FOLD_WORDS: dict[str, Split] = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
UNITS = (("patient_id", "patient"), ("lesion_id", "lesion"))

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fold:
    """The patients of one split. Patient i has the images `images[i]` (indices into the data set).

    `labels[i]` is what the patient's vote is held against: the class of most of its images, the first in the
    study's order on a tie; `votes[i]` are the images of that class.
    """

    images: tuple[NDArray[np.int64], ...]
    votes: tuple[NDArray[np.int64], ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Dataset:
    """Images by index, patients by split. `unit` is the word that really exists: patient, lesion or image."""

    folder: Path
    state: Path = field(repr=False)
    classes: tuple[str, ...]
    image_size: int
    unit: str
    paths: tuple[Path, ...] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    folds: dict[Split, Fold] = field(repr=False)
    _memory: dict[int, NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def fold(self, split: Split) -> Fold:
        """The patients of `split`."""
        return self.folds[split]

    def pixels(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, image_size, image_size, 3) RGB. Raises INVALID_DATA naming a file that cannot be decoded."""
        out = np.empty((len(index), self.image_size, self.image_size, 3), np.uint8)
        for row, image in enumerate(index.tolist()):
            kept = self._memory.get(image)
            out[row] = decode_image(self.paths[image], self.image_size) if kept is None else kept
        return out

    def check_images(self, memory_limit: int = MEMORY_LIMIT, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Decode every image once, keep them up to `memory_limit` bytes. Raises INVALID_DATA naming the bad file.

        Run at start: a file that breaks later, in the middle of a round, would make the hospital leave the round
        because of its data.
        """
        room = memory_limit // (3 * self.image_size**2)
        for image, path in enumerate(self.paths):
            if should_stop():
                return
            pixels = decode_image(path, self.image_size)
            if len(self._memory) < room:
                self._memory[image] = pixels

    def image_digest(self, image: int) -> bytes:
        """SHA-256 of the image's file, or of its pixels where it never was one. Raises INVALID_DATA, unreadable."""
        if not self.paths:
            return hashlib.sha256(self._memory[image].tobytes()).digest()
        try:
            return hashlib.sha256(self.paths[image].read_bytes()).digest()
        except OSError as error:
            raise _unreadable(self.paths[image], error) from None


@dataclass(frozen=True)
class Row:
    """One line of the CSV after all checks of the line itself."""

    line: int
    path: Path
    patient: str
    label: int
    fold: Split | None


def load_dataset(folder: Path, classes: Sequence[str], image_size: int, state: Path) -> Dataset:
    """Read `metadata.csv`; `state` holds the secret key of the split. Raises INVALID_DATA; decodes no image yet."""
    rows, unit = read_rows(folder, classes)
    patients: dict[str, list[int]] = {}
    for image, row in enumerate(rows):
        patients.setdefault(row.patient, []).append(image)
    labels = np.array([row.label for row in rows], np.int64)
    splits = _split(folder, rows, patients, split_key(state))
    folds = {split: fold_of([patients[p] for p in patients if splits[p] == split], labels) for split in SPLITS}
    if not len(folds["train"]):
        raise _invalid(f"{folder / METADATA}: no {unit} is left to train on: add rows, or set `fold` to train for some")
    for split in ("validation", "test"):
        if not len(folds[split]):
            _log.warning("no %s in the %s split: this site's counts of it will be noise only", unit, split)
    return Dataset(folder, state, tuple(classes), image_size, unit, tuple(r.path for r in rows), labels, folds)


def check_folder(folder: Path) -> int:
    """What can be known before any study: the table's columns, and that this user may read it and its first image.

    Returns the number of rows. Raises INVALID_DATA.
    """
    table, rows = folder / METADATA, 0
    with _opened(table) as reader:
        _check_columns(table, list(reader.fieldnames or ()))
        for rows, cells in enumerate(reader, 1):
            if rows == 1:
                decode_image(_image_path(folder, cells["path"] or "", f"{table} line {reader.line_num}"), 16)
    if not rows:
        raise _no_rows(table)
    return rows


def decode_image(path: Path, size: int) -> NDArray[np.uint8]:
    """(size, size, 3) RGB, squeezed to a square so that no part of a lesion is cut off. Raises INVALID_DATA."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))  # JPEG only: decode near the size that is needed
            upright = eight_bits(ImageOps.exif_transpose(image))
            if upright.size != (size, size):
                upright = upright.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(upright)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def eight_bits(image: Image.Image) -> Image.Image:
    """RGB of any mode that Pillow reads: 16-bit grey is scaled, where Pillow's own convert would cut it off."""
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def split_key(state: Path) -> bytes:
    """The site's secret key of the split, made at the first call and never changed.

    Whoever changes it moves patients between splits, and then a patient pays for more than one of them.
    """
    path = state / SPLIT_KEY
    if not path.exists():
        replace_file(path, [secrets.token_bytes(32)])
    key = path.read_bytes()
    if len(key) != 32:
        raise ServiceError(
            Reason.UNSAFE_STORE, f"{path} holds {len(key)} bytes, 32 are needed: restore it from this site's backup"
        )
    return key


def read_rows(folder: Path, classes: Sequence[str]) -> tuple[list[Row], str]:
    """All rows, checked, and the unit's word. Row i of them is image i of the data set. Raises INVALID_DATA."""
    table = folder / METADATA
    with _opened(table) as reader:
        columns = list(reader.fieldnames or ())
        patient_column, unit = _check_columns(table, columns)
        label_column = "label" if "label" in columns else "dx"
        rows: list[Row] = []
        seen: dict[tuple[str, str], int] = {}
        for cells in reader:
            at = f"{table} line {reader.line_num}"
            if None in cells or None in cells.values():
                raise _invalid(f"{at}: it has not {len(columns)} cells as the first line says: mend the row")
            path = _image_path(folder, cells["path"], at)
            for what, value in (("image_id", cells["image_id"]), ("path", str(path.resolve()))):
                first = seen.setdefault((what, value), reader.line_num)
                if first != reader.line_num:
                    raise _invalid(f"{at}: {what} {value!r} stands in line {first} already: remove one of them")
            rows.append(
                Row(
                    reader.line_num,
                    path,
                    _patient(cells[patient_column], patient_column, at),
                    _label(cells[label_column], classes, at),
                    _fold_word(cells["fold"], at) if "fold" in columns else None,
                )
            )
    if not rows:
        raise _no_rows(table)
    return rows, unit


@contextmanager
def _opened(table: Path) -> Iterator["csv.DictReader[str]"]:
    """The table; whatever keeps this user from reading it is INVALID_DATA with the next step."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as source:
            yield csv.DictReader(source, strict=True)
    except FileNotFoundError:
        raise _invalid(
            f"{table} is missing: `data` must name the folder that holds it, with one row for each image "
            "(image_id, path, patient_id, label)"
        ) from None
    except OSError as error:
        raise _unreadable_for_us(table, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise _invalid(f"{table} cannot be read ({error}): save it as CSV in UTF-8") from None


def _check_columns(table: Path, columns: list[str]) -> tuple[str, str]:
    """The column that names the patient, and the unit's word."""
    twice = sorted({c for c in columns if columns.count(c) > 1})
    if twice:
        raise _invalid(f"{table}: the column {twice[0]!r} stands there twice: keep one")
    for needed in (("image_id",), ("path",), ("label", "dx")):
        if not set(needed) & set(columns):
            raise _invalid(
                f"{table}: the column {' or '.join(needed)} is missing (found: {', '.join(columns)}): add it"
            )
    for column, unit in UNITS:
        if column in columns:
            return column, unit
    _log.warning(
        "%s has neither patient_id nor lesion_id: each IMAGE is protected by itself, a person with several is not",
        table,
    )
    return "image_id", "image"


def _patient(cell: str, column: str, at: str) -> str:
    if not cell.strip():
        raise _invalid(f"{at}: {column} is empty, so the image belongs to nobody: fill it in or remove the row")
    return cell.strip()


def _label(cell: str, classes: Sequence[str], at: str) -> int:
    if cell not in classes:
        raise _invalid(f"{at}: label {cell!r} is not one of the study's ({', '.join(classes)}): correct or remove it")
    return classes.index(cell)


def _fold_word(cell: str, at: str) -> Split:
    if cell not in FOLD_WORDS:
        raise _invalid(f"{at}: fold {cell!r} is not train, validation or test: correct it, or remove the whole column")
    return FOLD_WORDS[cell]


def written_path(cell: str) -> PurePosixPath | None:
    """What a `path` cell says; None where it is empty, absolute, a Windows path or holds '..'."""
    written = PurePosixPath(cell)
    outside = not cell or written.is_absolute() or ".." in written.parts or PureWindowsPath(cell).drive or "\\" in cell
    return None if outside else written


def _image_path(folder: Path, cell: str, at: str) -> Path:
    """The file inside `folder`; links that lead out of it are refused like .. is."""
    written = written_path(cell)
    if written is None:
        raise _invalid(f"{at}: path {cell!r} must be relative, inside {folder}, with / and without ..: correct it")
    path = folder / written
    try:
        real = path.resolve(strict=True)
    except PermissionError as error:
        raise _unreadable_for_us(path, error) from None
    except (OSError, ValueError):
        raise _invalid(f"{at}: the image {path} is missing: put it there or remove the row") from None
    if not real.is_file() or not real.is_relative_to(folder.resolve()):
        raise _invalid(f"{at}: {path} is not a file inside {folder}: copy the image into the folder")
    return path


def _split(folder: Path, rows: list[Row], patients: dict[str, list[int]], key: bytes) -> dict[str, Split]:
    """The split of each patient. Raises INVALID_DATA for one in two folds."""
    fixed: dict[str, Split | None] = {}
    for patient, images in patients.items():
        folds = {rows[i].fold for i in images}
        if len(folds) > 1:
            lines = ", ".join(str(rows[i].line) for i in images)
            raise _invalid(f"{folder / METADATA} lines {lines}: {patient!r} is in two folds: put all its images in one")
        fixed[patient] = folds.pop()
    return place_patients(fixed, key)


def place_patients(fixed: Mapping[str, Split | None], key: bytes) -> dict[str, Split]:
    """The split of each patient: the one that is fixed for it, else a keyed hash that nobody outside can compute."""
    given = set(fixed.values())
    splits: dict[str, Split] = {}
    for patient, of_hospital in fixed.items():
        fold = of_hospital
        if fold is None:
            fold = "test" if _position(key, "test", patient) < _TEST_SHARE else "train"
        if fold == "train" and "validation" not in given and _position(key, "validation", patient) < _VALIDATION_SHARE:
            fold = "validation"
        splits[patient] = fold
    return splits


def _position(key: bytes, split: str, patient: str) -> float:
    """A number in [0, 1) that depends on key, split and patient only."""
    digest = hmac.digest(key, f"wardround/v1/split/{split}\0{patient}".encode(), "sha256")
    return int.from_bytes(digest[:6], "big") / 2**48


def fold_of(images: Sequence[Sequence[int]], labels: NDArray[np.int64]) -> Fold:
    """The patients with these images (indices into `labels`), one entry a patient."""
    every = tuple(np.array(of_patient, np.int64) for of_patient in images)
    truth = np.array([np.bincount(labels[of_patient]).argmax() for of_patient in every], np.int64)
    votes = tuple(of_patient[labels[of_patient] == label] for of_patient, label in zip(every, truth, strict=True))
    return Fold(every, votes, truth)


def _no_rows(table: Path) -> ServiceError:
    return _invalid(f"{table} has no rows: write one for each image")


def _unreadable_for_us(path: Path, error: OSError) -> ServiceError:
    return _invalid(
        f"{path} cannot be read ({error.strerror}): let user {os.getuid()} read it (in Kubernetes: the volume's owner, "
        "or fsGroup)"
    )


def _unreadable(path: Path, error: Exception) -> ServiceError:
    if isinstance(error, PermissionError):
        return _unreadable_for_us(path, error)
    return _invalid(f"the image {path} cannot be decoded ({error}): replace it or remove its row in {METADATA}")


def _invalid(sentence: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DATA, sentence)
