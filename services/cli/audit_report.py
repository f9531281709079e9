"""The audit's report: markdown for people, JSON for machines, one picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from services.cli.audit_finding import FAULTS, Finding, Reading
from services.cli.audit_inversion import VIEWS, Recovered

_WIDTHS = {"ε": 2, "of Δ₂": 6, "standard errors": 2, "of 1": 3, "correlation": 2}


def write_report(
    folder: Path, findings: list[Finding], pictures: dict[str, list[Recovered]], about: dict[str, Any]
) -> None:
    """audit.json, audit.md and audit.png in `folder`. `about`: how it was made, as plain values."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "about": about,
        "holds": all(finding.holds for finding in findings),
        "findings": [finding.plain() for finding in findings],
    }
    (folder / "audit.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "audit.md").write_text(markdown(findings, about), encoding="utf-8")
    draw(folder / "audit.png", findings, pictures)


def markdown(findings: list[Finding], about: dict[str, Any]) -> str:
    """The report for people: every meter says what it shows and what it does not."""
    holds = all(finding.holds for finding in findings)
    lines = [
        "# Audit: what the noise really is",
        "",
        "On invented patients and drawn pictures, through the real sampler, clip, rounding, noise, masks and ring. "
        "No site's data, identity or ledger was touched.",
        "",
        f"**{'Every meter is within its limits.' if holds else 'A meter is beyond its limit: see below.'}** "
        + ", ".join(f"{key} {value}" for key, value in about.items())
        + ".",
        "",
        "Evidence of this kind can prove a fault. It cannot prove privacy: that is what the accounting is for "
        "(docs/privacy.md).",
        "",
        "![bounds, planted faults, membership and gradient inversion](audit.png)",
        "",
    ]
    for finding in findings:
        lines += [f"## {finding.title}", "", f"Shows: {finding.shows}", "", f"Does not show: {finding.shows_not}", ""]
        lines += ["| what | measured | limit | |", "|---|---|---|---|"]
        lines += [_row(reading) for reading in finding.readings]
        lines += ["", *_notes(finding)]
        if finding.caught:
            lines += ["| planted fault | | worst reading |", "|---|---|---|"]
            lines += [
                f"| {fault} | {'caught' if seen else 'not seen'} | {finding.told.get(fault, '')} |"
                for fault, seen in finding.caught.items()
            ]
            lines.append("")
    return "\n".join(lines)


def _row(reading: Reading) -> str:
    measured, limit = (_number(value, reading.unit) for value in (reading.value, reading.limit))
    if reading.sure is not None:
        measured += f" ({_number(reading.sure, reading.unit)} at 99.99 %)"
    return f"| {reading.what} | {measured} {reading.unit} | {limit} | {'holds' if reading.holds else '**fails**'} |"


def _notes(finding: Finding) -> list[str]:
    attacks = {name: note for name, note in finding.notes.items() if isinstance(note, dict) and "LiRA" in note}
    if attacks:
        head = "| training | AUC, loss | AUC, LiRA | found at 1 % false alarms, LiRA | accuracy on others |"
        rows = [
            f"| {name} | {note['loss threshold']['auc']:.2f} | {note['LiRA']['auc']:.2f} | "
            f"{note['LiRA']['rate_at_one_percent']:.1%} | {note['accuracy on others']:.2f} |"
            for name, note in attacks.items()
        ]
        return [head, "|---|---|---|---|---|", *rows, ""]
    likeness = {name: note for name, note in finding.notes.items() if isinstance(note, dict) and VIEWS[1] in note}
    if likeness:
        rows = [
            f"| {name} | " + " | ".join(f"{np.mean(note[view]):.2f}" for view in VIEWS[1:]) + " |"
            for name, note in likeness.items()
        ]
        head = "| correlation with the original | " + " | ".join(VIEWS[1:]) + " |"
        return [head, "|---" * len(VIEWS) + "|", *rows, ""]
    return []


def draw(path: Path, findings: list[Finding], pictures: dict[str, list[Recovered]]) -> None:
    """One PNG: ε shown against ε claimed, planted faults by meter, membership, and pictures side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = sum(len(recovered) for recovered in pictures.values())
    figure = pyplot.figure(figsize=(10, 8.5 + 1.25 * rows), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(8.5, max(1.25 * rows, 0.1)))
    top, bottom = parts
    axes = top.subplots(2, 2)
    _draw_bounds(axes[0][0], findings)
    _draw_faults(axes[0][1], findings)
    _draw_membership(axes[1][0], findings)
    _draw_margins(axes[1][1], findings)
    if rows:
        grid = bottom.subplots(rows, len(VIEWS), squeeze=False)
        row = 0
        for model, recovered in pictures.items():
            for one in recovered:
                for column, picture in enumerate(one.pictures):
                    spot = grid[row][column]
                    spot.imshow(np.moveaxis(picture, 0, 2), interpolation="nearest")
                    spot.set(xticks=[], yticks=[])
                    spot.set_xlabel("" if column == 0 else f"r = {one.likeness[column]:.2f}", fontsize=7)
                    if row == 0:
                        spot.set_title(VIEWS[column], fontsize=8)
                grid[row][0].set_ylabel(model, fontsize=8)
                row += 1
        bottom.suptitle("What gradient inversion reads (drawn pictures)", fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_bounds(axes: Any, findings: list[Finding]) -> None:
    bounds = [
        (f"{finding.title[:2]} {reading.what}", reading)
        for finding in findings
        for reading in finding.readings
        if reading.unit == "ε"
    ]
    places = np.arange(len(bounds))
    axes.barh(places, [r.value for _, r in bounds], color="#4878a8", label="shown by the attack (95 %)")
    axes.plot([r.limit for _, r in bounds], places, "k|", markersize=14, label="claimed")
    axes.set_yticks(places, [name for name, _ in bounds], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="ε of one release at δ = 1e-5", title="What attacks show of what is claimed")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _draw_faults(axes: Any, findings: list[Finding]) -> None:
    meters = [finding for finding in findings if set(finding.caught) & set(FAULTS)]
    table = np.array([[{True: 1.0, False: 0.0, None: 0.5}[m.caught.get(f)] for m in meters] for f in FAULTS])
    if table.size:
        axes.imshow(table, cmap="PiYG", vmin=-0.6, vmax=1.6, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            axes.text(column, row, {1.0: "caught", 0.0: "not seen", 0.5: "–"}[float(value)], ha="center", fontsize=7)
    axes.set_xticks(
        range(len(meters)), [meter.title.split(",")[0].replace(" meter", "") for meter in meters], fontsize=7
    )
    axes.set_yticks(range(len(FAULTS)), FAULTS, fontsize=7)
    axes.set_title("Planted faults")


def _draw_membership(axes: Any, findings: list[Finding]) -> None:
    notes = {name: n for f in findings for name, n in f.notes.items() if isinstance(n, dict) and "LiRA" in n}
    places = np.arange(len(notes))
    for shift, attack, colour in ((-0.2, "loss threshold", "#a8a8a8"), (0.2, "LiRA", "#b04a4a")):
        axes.bar(places + shift, [n[attack]["auc"] for n in notes.values()], 0.4, label=attack, color=colour)
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(places, list(notes), fontsize=8)
    axes.set(ylim=(0.4, 1), ylabel="AUC, 0.5 = guessing", title="Membership inference")
    if notes:
        axes.legend(fontsize=7)


def _draw_margins(axes: Any, findings: list[Finding]) -> None:
    for place, (unit, label) in enumerate((("standard errors", "1. noise"), ("of Δ₂", "2. sensitivity"))):
        shares = [r.value / r.limit for f in findings for r in f.readings if r.unit == unit]
        axes.plot(np.full(len(shares), place), shares, "o", alpha=0.5, color="#4878a8")
        axes.text(place, 1.04, label, ha="center", fontsize=8)
    axes.axhline(1, color="#b04a4a")
    axes.set(xlim=(-0.5, 1.5), ylim=(0, 1.15), xticks=[], ylabel="measured / limit", title="Meters 1 and 2")


def _number(value: float, unit: str) -> str:
    digits = _WIDTHS.get(unit, 2)
    return f"{value:.{digits}f}"
