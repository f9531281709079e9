"""`wardround data`: from a folder of pictures to a site that may take part. Everything stays at the site."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services.cli.data_check import check_folder
from services.cli.data_findings import Finding, Kind, errors
from services.cli.data_import import Imported, Tick, import_folder, import_ham10000
from services.cli.data_report import as_html, as_json, show
from services.common.errors import Reason, ServiceError
from services.common.store.durable import replace_file
from services.hospital_node.datacheck import RECORD

app = typer.Typer(no_args_is_help=True, help="A site's images: check them, or bring them in. Nothing leaves the site.")
importer = typer.Typer(no_args_is_help=True, help="Make a site's folder; the originals are only read.")
app.add_typer(importer, name="import")

_SHOWN = 40


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="the site's folder: metadata.csv and images")],
    classes: Annotated[str, typer.Option(help="the study's classes, with commas; any label else")] = "",
    html: Annotated[Path | None, typer.Option(help="write a report with pictures; it stays at the site")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="write the report for a program")] = None,
    as_program: Annotated[bool, typer.Option("--json", help="print the report for a program")] = False,
) -> None:
    """Look at every row and every picture: damaged, missing, doubled, unlabelled, with names in them.

    The verdict and a digest of what was looked at go into data-check.json there, for a study that requires them.

    Example: wardround data check ward/ --classes bcc,mel,nv --html report.html
    """
    if not folder.is_dir():
        raise ServiceError(Reason.NOT_FOUND, f"{folder} is not a folder: name the one that holds metadata.csv")
    console = Console(highlight=False, soft_wrap=True, stderr=as_program)
    began = time.perf_counter()
    with _progress(console, "checking") as tick:
        report = check_folder(folder, tuple(part.strip() for part in classes.split(",") if part.strip()), tick)
    seconds = time.perf_counter() - began
    found = as_json(report, seconds)
    if as_program:
        print(json.dumps(found, indent=2, sort_keys=True))
    else:
        show(console, report, seconds)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    try:
        replace_file(folder / RECORD, [report.record().encode()])
    except ServiceError as error:
        console.print(f"the verdict was not kept: {error.detail}", markup=False)
    if html is not None:
        html.write_text(as_html(report, seconds), encoding="utf-8")
        console.print(f"Report with pictures, for this site's eyes only: {html}")
    if not report.passed:
        raise typer.Exit(1)


@importer.command("folder")
def folder_command(
    source: Annotated[Path, typer.Argument(help="one folder for each class, named after it, with its pictures")],
    out: Annotated[Path, typer.Option(help="the site's folder; a second run goes on where the first one ended")],
    patient: Annotated[
        str | None, typer.Option(help=r"pattern whose group is the patient in a file's name, such as '^(P\d+)_'")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    r"""Bring in one folder for each class: JPEG and PNG are copied, DICOM becomes PNG without its names.

    Example: wardround data import folder pictures/ --out ward/ --patient '^(P\d+)_'
    """
    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    with _progress(console, "importing") as tick:
        done = import_folder(source, out, patient, tick)
    _told(console, done, as_json)


@importer.command("ham10000")
def ham10000_command(
    archive: Annotated[Path, typer.Argument(help="the published zips and HAM10000_metadata: a folder or one zip")],
    out: Annotated[Path, typer.Option(help="gets one folder for each of its sites")],
    sites: Annotated[str, typer.Option(help="only these, with commas: vidir_modern,rosendahl")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Bring in HAM10000 as its authors publish it, by site. Its licence is CC BY-NC 4.0.

    Example: wardround data import ham10000 dataverse_files.zip --out sites/
    """
    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    with _progress(console, "importing") as tick:
        done = import_ham10000(archive, out, tuple(part.strip() for part in sites.split(",") if part.strip()), tick)
    console.print("HAM10000: Tschandl, Rosendahl, Kittler, Sci Data 5:180161 (2018); CC BY-NC 4.0, no commercial use.")
    _told(console, done, as_json)


def _told(console: Console, done: Imported, as_json: bool) -> None:
    """What an import did; exit code 1 where files could not be used."""
    left_out = errors(done.findings)
    if as_json:
        told = {
            "images": done.images,
            "written": done.written,
            "rows_without_image": done.without_image,
            "tables": [str(table) for table in done.tables],
            "findings": [
                {"kind": one.kind.value, "severity": one.severity.value, "files": list(one.files), "detail": one.detail}
                for one in done.findings
            ],
        }
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        _told_to_a_person(console, done, len(left_out))
    if left_out:
        raise typer.Exit(1)


def _told_to_a_person(console: Console, done: Imported, left_out: int) -> None:
    for found in done.findings[:_SHOWN]:
        console.print(f"{found.severity.value}: {_line(found)}", markup=False)
    if len(done.findings) > _SHOWN:
        console.print(f"… and {len(done.findings) - _SHOWN} more")
    for table in done.tables:
        console.print(f"wrote {table}")
    if done.without_image:
        console.print(f"{done.without_image} rows of the table have no image here and were left out")
    console.print(f"{done.images} images are there, {done.written} of them new; {left_out} could not be used")
    console.print(f"Next: wardround data check {done.tables[0].parent}" if done.tables else "")


def _line(found: Finding) -> str:
    if found.kind in (Kind.IDENTIFYING, Kind.DEPTH):
        return f"{found.files[0]}: {found.detail}; it was written as PNG with its pixels alone"
    return found.line()


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Tick]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
