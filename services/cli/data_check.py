"""Checks a ward's folder as a data manager would: every row, every picture, and what they are together.

Every fault is a finding and the rest goes on. Reads only. Not here: how a report looks (data_report.py), what one
picture is (data_images.py).
"""

import csv
import hashlib
import io
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from services.cli.data_findings import Finding, Kind, errors
from services.cli.data_images import SUFFIXES, Looked, look
from services.hospital_node.datacheck import Record, dataset_digest
from services.hospital_node.dataset import FOLD_WORDS, METADATA, UNITS, written_path

NEAR = 3  # bits of 64 in which two near duplicates may differ at most
_BANDS = NEAR + 1  # two hashes that differ in at most NEAR bits agree in at least one of NEAR + 1 bands
_MOST_PAIRS = 1000


@dataclass(frozen=True)
class Row:
    """One line of the table as it is written; `fold` is empty where the table has no such column."""

    line: int
    image_id: str
    path: str
    patient: str
    label: str
    fold: str


@dataclass
class Table:
    """What could be read of metadata.csv. `unit` is the word that really exists: patient, lesion or image."""

    rows: list[Row] = field(default_factory=list)
    unit: str = "image"
    sha256: bytes = b""
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The whole check."""

    folder: Path
    table: Table
    pictures: tuple[Looked, ...]
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether a site may take part with this folder."""
        return bool(self.table.rows) and not errors(self.findings)

    def record(self) -> Record:
        """What the hospital node reads of it (datacheck.py)."""
        digests = {one.name: one.sha256 for one in self.pictures}
        images = {row.path: digests.get(row.path, b"") for row in self.table.rows}
        return Record(self.passed, dataset_digest(self.table.sha256, images))

    def classes(self) -> dict[str, int]:
        """Rows by label, most first."""
        return dict(Counter(row.label for row in self.table.rows).most_common())

    def folds(self) -> dict[str, int]:
        """Rows by fold; empty where the site's secret key decides."""
        return dict(Counter(row.fold for row in self.table.rows if row.fold))

    def patients(self) -> int:
        """People, or what stands for them."""
        return len({row.patient for row in self.table.rows})

    def sizes(self) -> dict[str, int]:
        """Pictures by width x height, most first."""
        return dict(Counter(f"{one.width} x {one.height}" for one in self.pictures).most_common())

    def formats(self) -> dict[str, int]:
        """Pictures by format and colours."""
        return dict(Counter(f"{one.format} {one.colours}" for one in self.pictures).most_common())

    def colours(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and spread of red, green and blue (0 to 255) over all pictures; they stay at the site."""
        if not self.pictures:
            return (), ()
        means = np.array([one.mean for one in self.pictures])
        inside = np.array([one.spread for one in self.pictures])
        spread = np.sqrt((inside**2).mean(axis=0) + means.var(axis=0))
        return tuple(means.mean(axis=0).tolist()), tuple(spread.tolist())


def check_folder(
    folder: Path, classes: Sequence[str] = (), tick: Callable[[int, int], None] = lambda done, of: None
) -> Report:
    """Check everything. `classes`: the study's, where known; `tick(done, of)` is called as pictures are read."""
    table = read_table(folder, classes)
    names = pictures_in(folder)
    listed = {row.path for row in table.rows}
    findings = list(table.findings)
    findings += [Finding(Kind.UNLISTED, (name,), "no row names this picture") for name in names if name not in listed]
    pictures: list[Looked] = []
    wanted = sorted({*names, *(path for path in listed if _inside(folder, path))})
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, (looked, found) in enumerate(pool.map(lambda name: look(folder, name), wanted), 1):
            findings += found
            if looked is not None:
                pictures.append(looked)
            tick(done, len(wanted))
    findings += [
        Finding(Kind.FORMAT, (one.name,), "a hospital node trains on JPEG and PNG, this is DICOM")
        for one in pictures
        if one.format == "DICOM" and one.name in listed
    ]
    findings += exact_duplicates(pictures)
    findings += near_duplicates(pictures)
    return Report(folder, table, tuple(pictures), tuple(findings))


def pictures_in(folder: Path) -> list[str]:
    """All pictures below `folder` by their suffix, relative, ascending; links are not followed out of it."""
    found = []
    for base, folders, files in os.walk(folder):
        folders.sort()
        found += [
            (Path(base) / name).relative_to(folder).as_posix()
            for name in files
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def read_table(folder: Path, classes: Sequence[str] = ()) -> Table:
    """metadata.csv, row by row; whatever is wrong is a finding, and the other rows are read."""
    table = Table()
    path = folder / METADATA
    try:
        blob = path.read_bytes()
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        table.findings.append(Finding(Kind.TABLE, (METADATA,), f"the table {why}"))
        return table
    table.sha256 = hashlib.sha256(blob).digest()
    text, encoding = _decoded(blob)
    if encoding != "utf-8-sig":
        table.findings.append(Finding(Kind.TABLE, (METADATA,), "it is not UTF-8; save it as CSV in UTF-8"))
    delimiter = _delimiter(text)
    if delimiter != ",":
        table.findings.append(
            Finding(Kind.TABLE, (METADATA,), f"its columns are separated by {delimiter!r}; save it with commas")
        )
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    missing = [" or ".join(c) for c in (("image_id",), ("path",), ("label", "dx")) if not set(c) & set(columns)]
    if missing:
        table.findings.append(
            Finding(
                Kind.TABLE, (METADATA,), f"the columns {', '.join(missing)} are missing, it has {', '.join(columns)}"
            )
        )
        return table
    unit_column, table.unit = next(((c, unit) for c, unit in UNITS if c in columns), ("image_id", "image"))
    label_column = "label" if "label" in columns else "dx"
    try:
        for cells in reader:
            if None in cells or None in cells.values():
                at = f"{METADATA} line {reader.line_num}"
                table.findings.append(Finding(Kind.ROW, (at,), f"it has not {len(columns)} cells"))
                continue
            table.rows.append(
                Row(reader.line_num, cells["image_id"], cells["path"], cells[unit_column].strip(), cells[label_column],
                    cells.get("fold", ""))
            )  # fmt: skip
    except csv.Error as error:
        table.findings.append(Finding(Kind.TABLE, (METADATA,), f"it breaks off near line {reader.line_num} ({error})"))
    table.findings += _row_findings(folder, table.rows, classes, "fold" in columns)
    return table


def exact_duplicates(pictures: Iterable[Looked]) -> list[Finding]:
    """Files with the same bytes."""
    groups: dict[bytes, list[str]] = defaultdict(list)
    for one in pictures:
        groups[one.sha256].append(one.name)
    return [Finding(Kind.DUPLICATE, tuple(g), "they are the same file") for g in groups.values() if len(g) > 1]


def near_duplicates(pictures: Sequence[Looked]) -> list[Finding]:
    """Pairs whose perceptual hashes differ in at most NEAR bits; the same bytes are not told twice.

    Pigeonhole: only hashes that agree in one of NEAR + 1 bands are compared, so 100,000 pictures take seconds.
    """
    width = 64 // _BANDS
    found: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        buckets: dict[int, list[int]] = defaultdict(list)
        for index, one in enumerate(pictures):
            buckets[(one.hash >> (band * width)) & ((1 << width) - 1)].append(index)
        for bucket in buckets.values():
            for a, b in itertools.combinations(bucket, 2):
                if (pictures[a].hash ^ pictures[b].hash).bit_count() <= NEAR:
                    found.add((a, b))
                if len(found) >= _MOST_PAIRS:
                    break
    pairs = sorted(found)
    return [
        Finding(
            Kind.NEAR_DUPLICATE,
            (pictures[a].name, pictures[b].name),
            f"they look alike ({(pictures[a].hash ^ pictures[b].hash).bit_count()} of 64 hash bits differ)",
        )
        for a, b in pairs
        if pictures[a].sha256 != pictures[b].sha256
    ]


def _row_findings(folder: Path, rows: Sequence[Row], classes: Sequence[str], folded: bool) -> Iterator[Finding]:
    ids: dict[str, int] = {}
    paths: dict[str, int] = {}
    folds: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        at = (f"{METADATA} line {row.line}",)
        if ids.setdefault(row.image_id, row.line) != row.line:
            yield Finding(
                Kind.DUPLICATE_ID, at, f"image_id {row.image_id!r} stands in line {ids[row.image_id]} already"
            )
        if paths.setdefault(row.path, row.line) != row.line:
            yield Finding(Kind.DUPLICATE_ID, at, f"path {row.path!r} stands in line {paths[row.path]} already")
        if not row.patient:
            yield Finding(Kind.ROW, at, "nobody is named as the patient")
        if not row.label or (classes and row.label not in classes):
            known = f", the study's classes are {', '.join(classes)}" if classes else ""
            yield Finding(Kind.LABEL, at, f"label {row.label!r} is unknown{known}")
        if written_path(row.path) is None or not _leads_inside(folder, row.path):
            yield Finding(Kind.UNSAFE_PATH, at, f"path {row.path!r} leads out of the folder")
        elif not _inside(folder, row.path):
            yield Finding(Kind.MISSING, at, f"the image {row.path} is not there")
        if folded and row.fold not in FOLD_WORDS:
            yield Finding(Kind.ROW, at, f"fold {row.fold!r} is not {', '.join(FOLD_WORDS)}")
        folds[row.patient].add(FOLD_WORDS.get(row.fold, row.fold) if folded else "")
    for patient, words in folds.items():
        if patient and len(words) > 1:
            lines = tuple(f"{METADATA} line {row.line}" for row in rows if row.patient == patient)
            yield Finding(Kind.TWO_FOLDS, lines, f"one person's images are in {' and '.join(sorted(words))}")


def _leads_inside(folder: Path, path: str) -> bool:
    try:
        return (folder / path).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False


def _inside(folder: Path, path: str) -> bool:
    """Whether the written path names a file inside the folder, links resolved."""
    return written_path(path) is not None and _leads_inside(folder, path) and (folder / path).is_file()


def _decoded(blob: bytes) -> tuple[str, str]:
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return blob.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return blob.decode("latin-1"), "latin-1"


def _delimiter(text: str) -> str:
    """What separates the columns, by the first line."""
    first = text.partition("\n")[0]
    return max(",;\t", key=lambda sign: (first.count(sign), sign == ","))
