"""The report of a data check: for the terminal, for a program, and as one HTML page with pictures. All for the site."""

import base64
from collections import Counter
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.table import Table

from services.cli.data_check import Report
from services.cli.data_findings import NEXT_STEP, Finding, Kind, Severity, errors
from services.cli.data_images import thumbnail

_LINES = 12  # findings of one kind in the terminal
_CARDS = 60  # findings of one kind with pictures in the page


def as_json(report: Report, seconds: float) -> dict[str, Any]:
    """Everything but pictures. It holds counts and file names: it is the site's."""
    mean, spread = report.colours()
    return {
        "folder": str(report.folder),
        "passed": report.passed,
        "seconds": round(seconds, 3),
        "pictures": len(report.pictures),
        "rows": len(report.table.rows),
        "unit": report.table.unit,
        "units": report.patients(),
        "classes": report.classes(),
        "folds": report.folds(),
        "sizes": report.sizes(),
        "formats": report.formats(),
        "colour_mean": [round(value, 2) for value in mean],
        "colour_spread": [round(value, 2) for value in spread],
        "findings": [
            {"kind": f.kind.value, "severity": f.severity.value, "files": list(f.files), "detail": f.detail,
             "next": NEXT_STEP[f.kind]}
            for f in report.findings
        ],
    }  # fmt: skip


def show(console: Console, report: Report, seconds: float) -> None:
    """The report as a person reads it in a terminal."""
    total = len(report.table.rows)
    table = Table(title=f"{report.folder}: {total} rows, {report.patients()} {report.table.unit}s")
    for column in ("class", "images", "share"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for label, count in report.classes().items():
        table.add_row(label, str(count), f"{count / total:.1%}")
    if total:
        console.print(table)
    if report.table.unit == "image":
        console.print(
            "No patient_id and no lesion_id: each IMAGE is protected by itself, a person with several is not."
        )
    if report.pictures:
        shapes = list(report.sizes().items())
        shown = ", ".join(f"{size} ({count})" for size, count in shapes[:5])
        console.print(f"sizes: {shown}" + (f" and {len(shapes) - 5} others" if len(shapes) > 5 else ""))
        mean, spread = report.colours()
        colours = ", ".join(f"{word} {m:.0f} ± {s:.0f}" for word, m, s in zip(_COLOURS, mean, spread, strict=True))
        console.print(f"colours (0 to 255): {colours}")
    for kind, found in _by_kind(report.findings).items():
        console.print(f"\n{found[0].severity.value}: {kind.value} ({len(found)})", style=_STYLE[found[0].severity])
        for one in found[:_LINES]:
            console.print("  " + one.line(), markup=False)
        if len(found) > _LINES:
            console.print(f"  … and {len(found) - _LINES} more; --json or --html has them all")
    wrong = len(errors(report.findings))
    verdict = "may take part" if report.passed else f"may not take part yet: {wrong or 'no rows; 0'} errors"
    rate = 1000 * seconds / max(1, len(report.pictures))
    pace = f"{len(report.pictures)} pictures in {seconds:.1f} s ({rate:.1f} s a thousand)"
    console.print(f"\n{report.folder} {verdict}. {pace}")


def as_html(report: Report, seconds: float) -> str:
    """One page without a single outside request; pictures are inside it, so it must stay at the site."""
    samples: dict[str, list[str]] = {}
    readable = {one.name for one in report.pictures}
    for row in report.table.rows:
        kept = samples.setdefault(row.label, [])
        if len(kept) < 6 and row.path in readable:
            kept.append(row.path)
    groups = [
        {
            "kind": kind.value,
            "severity": found[0].severity.value,
            "count": len(found),
            "next": NEXT_STEP[kind],
            "more": max(0, len(found) - _CARDS),
            "cards": [
                {
                    "detail": one.detail,
                    "files": [{"name": name, "picture": _picture(report, name, readable)} for name in one.files[:8]],
                }
                for one in found[:_CARDS]
            ],
        }
        for kind, found in _by_kind(report.findings).items()
    ]
    total = max(1, len(report.table.rows))
    mean, spread = report.colours()
    page = Environment(loader=PackageLoader("services.cli", "templates"), autoescape=True)
    return page.get_template("data_report.html").render(
        folder=report.folder.resolve().name,
        passed=report.passed,
        seconds=seconds,
        pictures=len(report.pictures),
        rows=len(report.table.rows),
        unit=report.table.unit,
        units=report.patients(),
        classes=[
            {
                "name": label,
                "count": count,
                "share": count / total,
                "pictures": [_picture(report, name, readable) for name in samples.get(label, [])],
            }
            for label, count in report.classes().items()
        ],
        folds=report.folds(),
        sizes=list(report.sizes().items())[:12],
        formats=list(report.formats().items()),
        colours=list(zip(_COLOURS, mean, spread, strict=False)),
        groups=groups,
        errors=len(errors(report.findings)),
        warnings=sum(one.severity is Severity.WARNING for one in report.findings),
    )


_COLOURS = ("red", "green", "blue")
_STYLE = {Severity.ERROR: "bold red", Severity.WARNING: "yellow"}


def _by_kind(findings: tuple[Finding, ...]) -> dict[Kind, list[Finding]]:
    """Errors first, then by how many there are."""
    counts = Counter(one.kind for one in findings)
    order = sorted(counts, key=lambda kind: (Finding(kind, (), "").severity is Severity.WARNING, -counts[kind]))
    return {kind: [one for one in findings if one.kind is kind] for kind in order}


def _picture(report: Report, name: str, readable: set[str]) -> str | None:
    """A data URI; None where there is nothing to draw."""
    blob = thumbnail(report.folder, name) if name in readable else None
    return None if blob is None else "data:image/jpeg;base64," + base64.b64encode(blob).decode()
