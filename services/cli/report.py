"""`wardround report RUN`: one self-contained HTML page about a run, for people; `--pdf` prints it as well."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli import browser
from services.cli.claim import claim_in_words, up
from services.cli.drawing import CELLS
from services.cli.history import AttemptStory
from services.cli.passport import SPLITS
from services.cli.report_content import Report, epsilon_cell, gather, words
from services.common.clock import SystemClock
from services.common.errors import Reason, ServiceError
from services.common.observe.process import package_version
from services.common.store.durable import replace_file

_PHASES = {
    "training": "hospitals train; also the wait between two attempts",
    "proposed": "pods commit to fresh keys",
    "endorsing": "pods endorse the manifest",
    "collecting": "hospitals upload masked updates",
    "offering": "pods look at headers and boxes",
    "locking": "pods sign the one cohort",
    "releasing": "pods send the sums of the masks",
    "verified": "sum, gate, next model, signed result",
    "abandoning": "pods sign that the attempt is given up",
}


def report(
    run: Annotated[Path, typer.Argument(help="folder that `wardround demo --output` made, or collected evidence")],
    out: Annotated[Path | None, typer.Option(help="the page; default: report.html in RUN")] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="also print it to a PDF beside it (needs Chromium)")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Write a study report: one HTML page with curves, ε, cohorts, calibration, timings and the passport.

    It runs `wardround verify` and prints the outcome on the page.

    Example: wardround report build/demo --pdf
    """
    page = out or run / "report.html"
    holds = write_report(run, page)
    printed = page.with_suffix(".pdf") if pdf else None
    if printed is not None:
        browser.print_pdf(page, printed)
    if as_json:
        found = {"report": str(page), "pdf": str(printed) if printed is not None else "", "verifies": holds}
        print(json.dumps(found, indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"report: {page}")
        if printed is not None:
            console.print(f"printed: {printed}")
    if not holds:
        raise ServiceError(
            Reason.BAD_DIGEST,
            f"{run} does not verify, and the page says so: see `wardround verify {run}` for the fault",
        )


def write_report(run: Path, page: Path) -> bool:
    """Write the page about RUN; whether its evidence verifies. Raises what unreadable evidence raises."""
    content = gather(run)
    html = render(content, str(run), datetime.fromtimestamp(SystemClock().now_ms() / 1000, UTC))
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_file(page, [html.encode()])
    return content.verdict.holds


def render(content: Report, folder: str, written: datetime) -> str:
    """The page. Everything from the evidence is escaped: a study's name is not our text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("services.cli", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("report.html").render(
        r=content,
        p=content.passport,
        splits=SPLITS,
        results={one["round"]: one for one in content.passport["rounds"]},
        worst=max((one.total for one in content.spent), default=0.0),
        phase_words=_PHASES,
        fates=CELLS,
        words=words,
        epsilon=lambda site, split: epsilon_cell(content.passport["privacy"], site, split),
        claimed=claim_in_words(content.passport["privacy"]["claim"], content.passport["privacy"]["unit"]),
        up=up,
        whole=lambda value: f"{value:+.0f}".lstrip("+").replace("-0", "0").replace("-", "−"),
        ended=lambda how: sum(try_.ended == how for try_ in _attempts(content)),
        folder=folder,
        version=package_version(),
        written=f"{written:%Y-%m-%d %H:%M} UTC",
    )


def _attempts(content: Report) -> Iterable[AttemptStory]:
    return (attempt for story in content.stories for attempt in story.attempts)
