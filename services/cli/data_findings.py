"""What a check of a ward's pictures may find: a closed list of kinds, each with the one next step that mends it.

A finding names files of the site. It stays at the site, like every report that holds it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """Errors keep a site from taking part; warnings are for a person to judge."""

    ERROR = "error"
    WARNING = "warning"


class Kind(StrEnum):
    """Why a file or a row is reported."""

    TABLE = "table"
    ROW = "row"
    UNSAFE_PATH = "unsafe path"
    MISSING = "missing file"
    DUPLICATE_ID = "duplicate id"
    LABEL = "label"
    TWO_FOLDS = "patient in two folds"
    UNLISTED = "not in the table"
    EMPTY = "empty file"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"
    TOO_LARGE = "too many pixels"
    FORMAT = "format"
    FRAMES = "several frames"
    NO_PIXELS = "no pixels"
    IDENTIFYING = "identifying data"
    BURNT_IN = "burnt-in text"
    DEPTH = "unusual colours"
    DUPLICATE = "exact duplicate"
    NEAR_DUPLICATE = "near duplicate"


NEXT_STEP = {
    Kind.TABLE: "write metadata.csv with the columns image_id, path, patient_id, label, or run `wardround data import`",
    Kind.ROW: "mend the row in metadata.csv",
    Kind.UNSAFE_PATH: "write a path inside the folder, with / and without ..",
    Kind.MISSING: "put the image there, or remove its row",
    Kind.DUPLICATE_ID: "keep one of the rows",
    Kind.LABEL: "correct the label, or remove the row",
    Kind.TWO_FOLDS: "put all images of this patient into one fold",
    Kind.UNLISTED: "add a row for it, or leave it: it is not used",
    Kind.EMPTY: "copy the image again from where it came",
    Kind.TRUNCATED: "copy the image again from where it came",
    Kind.UNREADABLE: "replace the file, or remove its row",
    Kind.TOO_LARGE: "scale it down before it goes into the folder",
    Kind.FORMAT: "convert it with `wardround data import folder`",
    Kind.FRAMES: "export the one frame that shows the lesion",
    Kind.NO_PIXELS: "export the image itself; this object holds none",
    Kind.IDENTIFYING: "remove these fields; `wardround data import folder` writes DICOM as PNG without them",
    Kind.BURNT_IN: "look at the picture and cut the text away",
    Kind.DEPTH: "nothing, if the picture in the report looks right",
    Kind.DUPLICATE: "keep one; two patients with one file are one patient too many",
    Kind.NEAR_DUPLICATE: "look at the pair: if it shows one patient, give both rows one patient_id",
}

_WARNINGS = frozenset({Kind.UNLISTED, Kind.DEPTH, Kind.NEAR_DUPLICATE, Kind.IDENTIFYING})


@dataclass(frozen=True)
class Finding:
    """One thing to look at. `files` are relative to the checked folder; `detail` is one clause without a full stop."""

    kind: Kind
    files: tuple[str, ...]
    detail: str

    @property
    def severity(self) -> Severity:
        """By kind alone."""
        return Severity.WARNING if self.kind in _WARNINGS else Severity.ERROR

    def line(self) -> str:
        """One sentence: what, where, what next."""
        return f"{', '.join(self.files)}: {self.detail}; {NEXT_STEP[self.kind]}"


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """Those that keep a site from taking part."""
    return [found for found in findings if found.severity is Severity.ERROR]
