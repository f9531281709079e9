"""`wardround audit`: evidence about the noise, on invented patients (privacy.md §8); no site's data are touched."""

import platform
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from services.cli.audit_finding import Finding
from services.common.errors import Reason, ServiceError

_STEPS = 27  # things that are said, if four pictures are inverted


def audit(
    out: Annotated[Path, typer.Option(help="folder for audit.md, audit.json and audit.png; written over")] = Path(
        "build/audit"
    ),
    runs: Annotated[int, typer.Option(min=100, help="releases of the canary attack, half of them with it")] = 5000,
    seed: Annotated[int, typer.Option(help="of the invented patients; noise and coins are never seeded")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="a tenth of it, in a minute: for tests, not as evidence")
    ] = False,
) -> None:
    """Measure the noise, the sensitivity and what attacks show of ε; plant faults and show that they are seen.

    Some minutes on two cores. Exit code 1 when a meter is beyond its limit.

    Example: wardround audit --out build/audit
    """
    began, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    try:
        from services.cli import audit_canaries, audit_inversion, audit_membership, audit_noise, audit_sensitivity
        from services.cli.audit_report import write_report
    except ImportError as error:
        raise ServiceError(
            Reason.NOT_FOUND,
            f"the audit needs {error.name}, which is not installed here: pip install 'wardround[hospital,cli]'",
        ) from None
    if quick:
        runs = min(runs, 500)
    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=_STEPS)

        def say(what: str) -> None:
            progress.update(task, advance=1, description=what)

        findings: list[Finding] = [
            audit_noise.measure_noise(seed, 2 if quick else 4, say),
            audit_sensitivity.measure_sensitivity(seed, say),
            audit_canaries.measure_many_runs(seed, runs, say),
            audit_canaries.measure_one_run(seed, say),
            audit_membership.measure_membership(seed, 200, *((12, 6) if quick else (48, 24)), say=say),
        ]
        inversion, pictures = audit_inversion.measure_inversion(seed, 2 if quick else 4, 40 if quick else 250, say)
        findings.append(inversion)
        seconds = time.monotonic() - began
        about = {
            "seed": seed,
            "runs": runs,
            "quick": quick,
            "seconds": round(seconds),
            "machine": platform.machine(),
            "python": platform.python_version(),
        }
        say("writing the report")
        write_report(out, findings, pictures, about)
    for finding in findings:
        worst = [reading for reading in finding.readings if not reading.holds]
        console.print(f"{finding.title}: {'holds' if not worst else 'FAILS: ' + ', '.join(r.what for r in worst)}")
        missed = [fault for fault, seen in finding.caught.items() if not seen]
        if finding.caught:
            seen = [fault for fault, caught in finding.caught.items() if caught]
            console.print(
                f"   planted faults seen: {', '.join(seen) or 'none'}" + (f"; not: {', '.join(missed)}" * bool(missed))
            )
    console.print(f"{out / 'audit.md'}, {out / 'audit.json'}, {out / 'audit.png'} ({seconds:.0f} s)")
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)
