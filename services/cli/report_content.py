"""What the study report says, as plain values and pictures from a run's evidence; the template only places them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.cli import drawing
from services.cli.claim import up
from services.cli.drawing import Axes, Picture, Point, Series
from services.cli.history import RoundStory, read_log, tell
from services.cli.passport import SPLITS, passport, shown_epsilon, shown_with_solo
from services.cli.run import Round, Run, load_run
from services.cli.spent import Spent, spent_by_round
from services.cli.uncertainty import Interval, Reliability, deviation, intervals, reliability
from services.cli.verify import verify_run
from services.common.errors import ServiceError

_ORDER = ("balanced_accuracy", "macro_auc", "accuracy")


@dataclass(frozen=True)
class Verdict:
    """What `wardround verify` said when the report was written."""

    holds: bool
    fault: str
    checked: tuple[str, ...]


@dataclass(frozen=True)
class Released:
    """One released figure of one model: of which split, from which round, with its interval where it is known."""

    name: str
    version: int
    round: int
    split: str
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Matrix:
    """Released confusion matrix: rows are the truth. `cells`: (count, share of its row in 0 … 1)."""

    classes: tuple[str, ...]
    rows: tuple[tuple[tuple[float, float], ...], ...]
    noise: float


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    passport: dict[str, Any]
    verdict: Verdict
    figures: tuple[Released, ...]
    last: tuple[Released, ...]  # the newest of each name
    models: tuple[tuple[int, str, dict[str, Released]], ...]  # (version, split, its figures by name)
    curve: Picture | None
    spent: tuple[Spent, ...]
    epsilon: Picture | None
    solo: Picture | None  # only where ε_solo is another figure: under `shared`
    stories: tuple[RoundStory, ...]
    hospitals: tuple[str, ...]
    cohorts: Picture | None
    timings: Picture | None
    phases: tuple[tuple[str, float, float, float], ...]  # (phase, median, longest, sum) in seconds
    matrix: Matrix | None
    calibration: Reliability | None
    reliability: Picture | None


def gather(folder: Path) -> Report:
    """Read RUN, verify it, and put the report together. Raises what unreadable evidence raises."""
    verdict = check(folder)
    run = load_run(folder)
    stories = tuple(tell(read_log((run.aggregator / "log.jsonl").read_text().splitlines())))
    figures = tuple(_figures(run))
    spent = tuple(spent_by_round(run))
    hospitals = tuple(sorted(run.charter.roster.hospitals))
    matrix, calibration = _final(run)
    return Report(
        passport=passport(run, units(folder, run)),
        verdict=verdict,
        figures=figures,
        last=tuple(sorted({one.name: one for one in figures}.values(), key=lambda one: _ORDER.index(one.name))),
        models=_models(figures),
        curve=_curve(run, figures),
        spent=spent,
        epsilon=_epsilon(run, spent),
        solo=_solo(run, spent),
        stories=stories,
        hospitals=hospitals,
        cohorts=_cohorts(hospitals, stories),
        timings=_timings(stories),
        phases=_phases(stories),
        matrix=matrix,
        calibration=calibration,
        reliability=_reliability(calibration),
    )


def check(folder: Path) -> Verdict:
    """Run `verify` and keep what it said, a failure too: a report that hides it would be worse than none."""
    said: list[str] = []
    try:
        verify_run(folder, said.append)
    except ServiceError as error:
        return Verdict(False, error.detail, tuple(said))
    return Verdict(True, "", tuple(said))


def units(folder: Path, run: Run) -> dict[str, str]:
    """By hospital, what its privacy unit really is: from the passport beside the evidence, else the study's word."""
    path = folder / "passport.json"
    if path.exists():
        return dict(json.loads(path.read_text())["privacy"]["unit_by_site"])
    return dict.fromkeys(sorted(run.charter.roster.hospitals), run.study.document.privacy.unit)


def _figures(run: Run) -> list[Released]:
    found, version, classes = list[Released](), 0, len(run.study.document.model.classes)
    for one in run.rounds:
        kind = one.released["kind"]
        noise = deviation(run.study.document, kind, one.released["cohort"])
        known = intervals(one.released.get("sums", {}), classes, noise)
        split = "test" if kind == "final" else "validation"
        for name, value in sorted(one.figures.items()):
            found.append(Released(name, version, one.number, split, value, known.get(name)))
        version = one.result.version
    return found


def _models(figures: tuple[Released, ...]) -> tuple[tuple[int, str, dict[str, Released]], ...]:
    keys = dict.fromkeys((one.round, one.version, one.split) for one in figures)
    return tuple(
        (version, split, {one.name: one for one in figures if one.round == number}) for number, version, split in keys
    )


def _curve(run: Run, figures: tuple[Released, ...]) -> Picture | None:
    """A line for the validation patients' figures; single marks for the final evaluation on the test patients."""
    if not figures:
        return None
    names = [name for name in _ORDER if any(one.name == name for one in figures)]
    series: list[Series] = []
    for name, split in dict.fromkeys((one.name, one.split) for one in figures):
        mine = [one for one in figures if (one.name, one.split) == (name, split)]
        hue = names.index(name)
        earlier = any(one.name == words(name) for one in series)
        dodge = hue - (len(names) - 1) / 2
        series.append(
            Series(words(name), tuple(map(_point, mine)), hue, joined=split != "test", listed=not earlier, dodge=dodge)
        )
    most = max(1, *(one.version for one in figures))
    chance = 1 / len(run.study.document.model.classes)
    axes = Axes("model version", "", (-0.3, most + 0.3), (0, 1), rule=(chance, "guessing"))
    newest = "; ".join(f"{words(one.name)} of v{one.version}: {one.value:.3f}" for one in figures[-3:])
    text = f"Bars are 95 % intervals, noise included. The newest: {newest}."
    return drawing.lines("Released quality by model version", text, axes, series)


def _point(one: Released) -> Point:
    if one.interval is None:
        return Point(one.version, one.value, faint=True)
    return Point(one.version, one.value, one.interval.low, one.interval.high)


def _epsilon(run: Run, spent: tuple[Spent, ...]) -> Picture | None:
    claimed = run.study.document.privacy.epsilon
    rule = (claimed, f"claimed ε = {claimed:g}") if claimed is not None else None
    return _over_rounds("ε spent after each round", [(one.site, one.split, one.after) for one in spent], rule)


def _solo(run: Run, spent: tuple[Spent, ...]) -> Picture | None:
    if run.study.document.privacy.mechanism != "shared":
        return None
    lines = [(one.site, one.split, one.solo) for one in spent]
    return _over_rounds("ε_solo after each round: if all other hospitals collude", lines, None)


def _over_rounds(
    title: str, lines: list[tuple[str, str, tuple[tuple[int, float], ...]]], rule: tuple[float, str] | None
) -> Picture | None:
    """Lines of (site, split, ((round, ε), …)); sites whose ledgers read the same share one."""
    alike: dict[tuple[str, tuple[tuple[int, float], ...]], list[str]] = {}
    for site, split, after in lines:
        if math.isfinite(after[-1][1]):
            alike.setdefault((split, after), []).append(site)
    if not alike:
        return None
    everybody = {site for site, _, _ in lines}
    series: list[Series] = []
    for (split, after), sites in alike.items():
        who = "every site" if set(sites) == everybody else ", ".join(sites)
        points = tuple(Point(number, value) for number, value in after)
        series.append(Series(f"{split}: {who}", points, len(series), SPLITS.index(split), step=True))
    worst = max(after[-1][1] for _, after in alike)
    last = max(after[-1][0] for _, after in alike)
    axes = Axes("round", "", (0, last + 0.3), (0, max(worst, rule[0] if rule else 0.0) * 1.12), rule=rule)
    text = f"By split and site; the largest is {up(worst)} after round {last}."
    return drawing.lines(title, text, axes, series)


def _cohorts(hospitals: tuple[str, ...], stories: tuple[RoundStory, ...]) -> Picture | None:
    if not stories:
        return None
    cells = [[story.fate(hospital) for story in stories] for hospital in hospitals]
    missing = sum(word != "cohort" for row in cells for word in row)
    text = f"{len(hospitals)} hospitals over {len(stories)} rounds; {missing} absences."
    numbers = [story.number for story in stories]
    return drawing.grid("Which hospitals are in the sum of which round", text, hospitals, numbers, cells)


def _timings(stories: tuple[RoundStory, ...]) -> Picture | None:
    if not stories:
        return None
    parts = list(dict.fromkeys(phase for story in stories for phase in story.seconds))
    rows = [(story.number, story.seconds) for story in stories]
    longest = max(stories, key=lambda story: story.total)
    text = f"The longest round is {longest.number} with {longest.total:.1f} seconds."
    return drawing.bars("Seconds by phase and round", text, rows, parts)


def _phases(stories: tuple[RoundStory, ...]) -> tuple[tuple[str, float, float, float], ...]:
    names = dict.fromkeys(phase for story in stories for phase in story.seconds)
    found = []
    for name in names:
        seconds = [story.seconds.get(name, 0.0) for story in stories]
        found.append((name, float(np.median(seconds)), max(seconds), sum(seconds)))
    return tuple(found)


def _final(run: Run) -> tuple[Matrix | None, Reliability | None]:
    """Of the last final evaluation whose sums fitted its result."""
    evaluated: list[Round] = [one for one in run.rounds if "confusion" in one.released.get("sums", {})]
    if not evaluated:
        return None, None
    one, classes = evaluated[-1], run.study.document.model.classes
    noise = deviation(run.study.document, "final", one.released["cohort"])
    confusion = np.asarray(one.released["sums"]["confusion"], np.float64).reshape(len(classes), len(classes))
    histogram = np.asarray(one.released["sums"]["histogram"], np.float64).reshape(len(classes), 2, -1)
    rows = tuple(
        tuple((float(count), float(np.clip(count / total, 0, 1)) if total > 0 else 0.0) for count in row)
        for row, total in zip(confusion, confusion.sum(axis=1), strict=True)
    )
    return Matrix(tuple(classes), rows, noise), reliability(histogram, noise)


def _reliability(found: Reliability | None) -> Picture | None:
    if found is None or not found.points:
        return None
    points = tuple(Point(*point) for point in found.points)
    axes = Axes("score that the model gave", "share that came true", (0, 1), (0, 1), diagonal=True, whole_x=False)
    text = f"Expected calibration error {found.error:.3f}; the dotted line is a model whose scores come true."
    return drawing.lines("Reliability of the scores", text, axes, [Series("all classes together", points, 0)])


def words(name: str) -> str:
    """A figure's name for a reader."""
    return {"macro_auc": "macro AUC"}.get(name, name.replace("_", " "))


def epsilon_cell(privacy: dict[str, Any], site: str, split: str) -> str:
    """One ε of the table, rounded up; under `shared` with ε_solo in brackets."""
    splits = privacy["epsilon_by_site_and_split"][site]
    if privacy["claim"]["mechanism"] != "shared":
        return shown_epsilon(splits, split, 3)
    return shown_with_solo(splits, privacy["epsilon_solo_by_site_and_split"][site], split, 3)
