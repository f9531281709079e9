"""From what a ward or an archive has to a site's folder: images/ and metadata.csv. The originals are only read.

Idempotent and resumable: each image is written whole or not at all, one that is there already is not written again,
and the table comes last. What cannot be used is a finding, and the rest goes on. A picture that carries a name, or
colours that a trainer would misread, is written as PNG with its pixels and nothing else.
"""

import csv
import hmac
import io
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from services.cli.data_check import pictures_in
from services.cli.data_findings import Finding, Kind
from services.cli.data_images import Unusable, decode, is_dicom
from services.common.errors import Reason, ServiceError
from services.common.store.durable import replace_file
from services.hospital_node.dataset import METADATA

IMAGES, KEY = "images", "import.key"
_HAM_COLUMNS = ("image_id", "lesion_id", "dx", "dataset")

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """One picture to bring in. `read` gives its bytes; `cells` are its row but for the path."""

    name: str
    target: PurePosixPath  # relative to the output, without a suffix
    read: Callable[[], bytes]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """What an import did: pictures there now, of these written by this run, and what was left out or changed."""

    images: int
    written: int
    tables: tuple[Path, ...]
    findings: tuple[Finding, ...]
    without_image: int = 0


def import_folder(source: Path, out: Path, patient: str | None, tick: Tick = lambda done, of: None) -> Imported:
    """One folder for each class. `patient`: a pattern whose first group, in a file's name, names the patient.

    DICOM files of one PatientID become one patient under a keyed pseudonym; the id itself is not copied.
    Raises INVALID_DATA where there is nothing to import, STORAGE on a full disk.
    """
    _apart(source, out)
    pattern = _pattern(patient)
    names = [name for name in pictures_in(source) if "/" in name]
    if not names:
        raise ServiceError(
            Reason.INVALID_DATA,
            f"{source} holds no folders with pictures: make one for each class, named after it",
        )
    key = _pseudonym_key(out)
    taken: dict[str, str] = {}
    sources: list[Source] = []
    findings: list[Finding] = []
    grouped = pattern is not None
    for name in names:
        label, stem = name.split("/", 1)[0], re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).with_suffix("").as_posix())
        if stem in taken:
            findings.append(
                Finding(Kind.DUPLICATE_ID, (name,), f"its name becomes {stem!r} like that of {taken[stem]}")
            )
            continue
        taken[stem] = name
        person = _person(pattern, name) or _dicom_person(source / name, key)
        grouped = grouped or person is not None
        read = (source / name).read_bytes
        sources.append(Source(name, PurePosixPath(IMAGES, stem), read, (stem, person or f"image:{stem}", label)))
    head = ("image_id", "patient_id", "label") if grouped else ("image_id", "label")
    if not grouped:
        sources = [Source(one.name, one.target, one.read, (one.cells[0], one.cells[2])) for one in sources]
    done, written, left = _bring(sources, out, tick)
    return Imported(len(done), written, (_table(out, head, done),), (*findings, *left))


def import_ham10000(
    archive: Path, out: Path, sites: Sequence[str] = (), tick: Tick = lambda done, of: None
) -> Imported:
    """The published layout: HAM10000_metadata (CSV or tab) and zips of ISIC_*.jpg, in a folder or one zip.

    One folder for each value of the column `dataset`, as `wardround demo --data` takes them; `sites` names some.
    Raises INVALID_DATA, STORAGE.
    """
    _apart(archive, out)
    with _open_archive(archive) as found:
        rows = _ham_rows(found, archive)
        known = sorted({row["dataset"] for row in rows})
        unknown = sorted(set(sites) - set(known))
        if unknown:
            raise ServiceError(
                Reason.INVALID_DATA, f"{archive} has no site {unknown[0]!r}: choose among {', '.join(known)}"
            )
        pictures = {PurePosixPath(n).stem: (n, read) for n, read in found.items() if n.lower().endswith(".jpg")}
        wanted = [row for row in rows if not sites or row["dataset"] in sites]
        sources = [
            Source(
                pictures[row["image_id"]][0],
                PurePosixPath(row["dataset"], IMAGES, row["image_id"]),
                pictures[row["image_id"]][1],
                (row["image_id"], row["lesion_id"], row["dx"]),
            )
            for row in wanted
            if row["image_id"] in pictures
        ]
        if not sources:
            raise ServiceError(
                Reason.INVALID_DATA, f"{archive} holds the table, but no image of it: put the image zips beside it"
            )
        done, written, findings = _bring(sources, out, tick)
    tables = []
    for site in sorted({path.parts[0] for path, _ in done}):
        mine = [(path.relative_to(site), cells) for path, cells in done if path.parts[0] == site]
        tables.append(_table(out / site, ("image_id", "lesion_id", "dx"), mine))
    return Imported(len(done), written, tuple(tables), findings, len(wanted) - len(sources))


Done = list[tuple[PurePosixPath, tuple[str, ...]]]


def _bring(sources: Sequence[Source], out: Path, tick: Tick) -> tuple[Done, int, tuple[Finding, ...]]:
    """Write what is not there yet. (path and cells of all that is there now, written by this run, findings)."""
    done: Done = []
    written, findings = 0, []
    with ThreadPoolExecutor(min(8, 4 * (os.cpu_count() or 1))) as pool:
        for number, (source, outcome) in enumerate(
            zip(sources, pool.map(lambda one: _one(one, out), sources), strict=True), 1
        ):
            path, new, found = outcome
            findings += found
            written += new
            if path is not None:
                done.append((path, source.cells))
            tick(number, len(sources))
    return done, written, tuple(findings)


def _one(source: Source, out: Path) -> tuple[PurePosixPath | None, bool, list[Finding]]:
    for suffix in (".jpg", ".png"):
        path = source.target.with_name(source.target.name + suffix)
        if (out / path).is_file():
            return path, False, []
    try:
        blob = source.read()
        if not blob:
            raise Unusable(Kind.EMPTY, "the file has no bytes")
        pixels, form, _, notes = decode(blob)
    except (OSError, zipfile.BadZipFile) as error:
        return None, False, [Finding(Kind.UNREADABLE, (source.name,), f"it cannot be read ({error})")]
    except Unusable as why:
        return None, False, [Finding(why.kind, (source.name,), why.detail)]
    found = [Finding(kind, (source.name,), detail) for kind, detail in notes]
    if form == "DICOM" or notes:
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        blob, form = encoded.getvalue(), "PNG"
    path = source.target.with_name(source.target.name + (".jpg" if form == "JPEG" else ".png"))
    replace_file(out / path, [blob])
    return path, True, found


def _table(folder: Path, head: tuple[str, ...], done: Done) -> Path:
    """Write metadata.csv last: a folder without one is an import that was cut off."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((head[0], "path", *head[1:]))
    writer.writerows((cells[0], path.as_posix(), *cells[1:]) for path, cells in done)
    blob, path = text.getvalue().encode(), folder / METADATA
    if not path.exists() or path.read_bytes() != blob:
        replace_file(path, [blob])
    return path


def _apart(source: Path, out: Path) -> None:
    if not source.exists():
        raise ServiceError(Reason.NOT_FOUND, f"{source} is not there: name the archive or the folder of pictures")
    inside, outer = out.resolve(), source.resolve()
    if inside == outer or (outer.is_dir() and inside.is_relative_to(outer)):
        raise ServiceError(
            Reason.CONFLICT, f"--out {out} lies inside {source}: the originals stay untouched, choose another folder"
        )


def _pattern(text: str | None) -> re.Pattern[str] | None:
    if text is None:
        return None
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ServiceError(Reason.INVALID_DATA, f"--patient {text!r} is no regular expression ({error})") from None
    if pattern.groups != 1:
        raise ServiceError(Reason.INVALID_DATA, f"--patient {text!r} needs exactly one group (…): the patient")
    return pattern


def _person(pattern: re.Pattern[str] | None, name: str) -> str | None:
    found = pattern.search(PurePosixPath(name).name) if pattern is not None else None
    return found[1] if found else None


def _dicom_person(path: Path, key: bytes) -> str | None:
    """A pseudonym that only this site's key links to the PatientID; None for anything but DICOM with an id."""
    try:
        with path.open("rb") as file:
            if not is_dicom(file.read(132)):
                return None
        import pydicom
        from pydicom.errors import InvalidDicomError

        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        except InvalidDicomError:
            return None
    except OSError:
        return None
    identity = str(dataset.get("PatientID", "") or "").strip()
    return (
        "p-" + hmac.digest(key, b"wardround/v1/patient\0" + identity.encode(), "sha256").hex()[:16]
        if identity
        else None
    )


def _pseudonym_key(out: Path) -> bytes:
    path = out / KEY
    if not path.exists():
        replace_file(path, [secrets.token_bytes(32)])
    return path.read_bytes()


@contextmanager
def _open_archive(archive: Path) -> Iterator[dict[str, Callable[[], bytes]]]:
    """Every file of the archive by name, zips inside it opened. Raises INVALID_DATA for a damaged zip."""
    with ExitStack() as opened:
        found: dict[str, Callable[[], bytes]] = {}

        def add_zip(file: "Path | zipfile.ZipExtFile", name: str) -> None:
            try:
                holder = opened.enter_context(zipfile.ZipFile(file))
            except (zipfile.BadZipFile, OSError) as error:
                raise ServiceError(
                    Reason.INVALID_DATA, f"{name} is not a whole zip ({error}): download it again"
                ) from None
            for entry in holder.infolist():
                if entry.filename.lower().endswith(".zip"):
                    add_zip(opened.enter_context(holder.open(entry)), entry.filename)  # type: ignore[arg-type]
                elif not entry.is_dir() and "__MACOSX" not in entry.filename:
                    found[entry.filename] = lambda holder=holder, entry=entry: holder.read(entry)  # type: ignore[misc]  # bound now

        if archive.is_dir():
            for path in sorted(archive.rglob("*")):
                if path.suffix.lower() == ".zip":
                    add_zip(path, str(path))
                elif path.is_file():
                    found[path.relative_to(archive).as_posix()] = path.read_bytes
        else:
            add_zip(archive, str(archive))
        yield found


def _ham_rows(found: dict[str, Callable[[], bytes]], archive: Path) -> list[dict[str, str]]:
    names = [n for n in found if PurePosixPath(n).name.startswith("HAM10000_metadata")]
    if not names:
        raise ServiceError(Reason.INVALID_DATA, f"{archive} has no HAM10000_metadata: put the table beside it")
    text = found[names[0]]().decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text.partition("\n")[0] else ",")
    missing = sorted(set(_HAM_COLUMNS) - set(reader.fieldnames or ()))
    if missing:
        raise ServiceError(Reason.INVALID_DATA, f"{names[0]} has no column {missing[0]!r}: take the table as published")
    rows = list(reader)
    plain = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # these become names of files and folders
    bad = next(
        (row for row in rows if not (plain.fullmatch(row["image_id"]) and plain.fullmatch(row["dataset"]))), None
    )
    if bad is not None:
        raise ServiceError(
            Reason.INVALID_DATA,
            f"{names[0]}: {bad['image_id']!r} in {bad['dataset']!r} is no plain name: mend the table",
        )
    return rows
