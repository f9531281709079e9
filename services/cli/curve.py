"""ε and ε_solo over the rounds of a study, as a PNG and in a terminal; released quality of its models as a PNG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.documents.costs import round_events, spare_rounds
from services.common.documents.study import Study
from services.common.dp.accounting import epsilon_curve

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT = 60, 6


@dataclass(frozen=True)
class Curve:
    """Entry r is what a training patient has spent after round r + 1; the last `spare` rounds are the reserve."""

    epsilon: list[float]
    solo: list[float]
    spare: int


def training_curve(study: Study) -> Curve | None:
    """None under `none`, which has no ε."""
    delta, spare = study.privacy.delta, spare_rounds(study.rounds)
    found = [event for event in round_events(study, 1) if event.split == "train"]
    if delta is None or not found:
        return None
    rounds = study.rounds + spare
    together = epsilon_curve([[event.event for event in found]] * rounds, delta)
    return Curve(together, epsilon_curve([[event.solo for event in found]] * rounds, delta), spare)


def sketch(values: Sequence[float], title: str) -> list[str]:
    """Bars as lines of text, the highest value at the top left; as wide as there are rounds, 60 columns at most."""
    columns = min(_WIDTH, len(values))
    shown = [values[math.ceil((column + 1) * len(values) / columns) - 1] for column in range(columns)]
    top = max(shown)
    if not (0 < top < math.inf):
        return [f"{title}: not bounded"]
    levels = [math.ceil(value / top * _HEIGHT * 8) for value in shown]
    lines = [title]
    for row in reversed(range(_HEIGHT)):
        label = f"{math.ceil(top * 1000 * (row + 1) / _HEIGHT) / 1000:8.3f}"
        lines.append(f"{label} │" + "".join(_BARS[min(8, max(0, level - 8 * row))] for level in levels))
    lines.append(" " * 8 + " └" + "─" * columns + f" round {len(values)}")
    return lines


def draw(curve: Curve, study: Study, path: Path) -> None:
    """The picture as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    rounds = range(1, len(curve.epsilon) + 1)
    axes.plot(rounds, curve.epsilon, label="ε")
    if curve.solo != curve.epsilon:
        axes.plot(rounds, curve.solo, linestyle="--", label="ε_solo: if all the others collude")
    if study.privacy.epsilon is not None:
        axes.axhline(study.privacy.epsilon, color="grey", linewidth=0.8, linestyle=":", label="claimed ε")
    axes.axvline(study.rounds, color="grey", linewidth=0.8)
    axes.set(xlabel=f"training round (the last {curve.spare} are spare)", ylabel=f"ε at δ = {study.privacy.delta:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{study.name}: a training patient's ε, mechanism {study.privacy.mechanism}", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def learning_points(rounds: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, list[tuple[int, float]]]:
    """Points of each figure from (version that a round started from, figures released of it)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for version, figures in rounds:
        for name, value in figures.items():
            found.setdefault(name, []).append((version, value))
    return found


def draw_learning(points: Mapping[str, list[tuple[int, float]]], study: Study, note: str, path: Path) -> None:
    """Released quality of each model version, noise included, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for name, line in sorted(points.items()):
        axes.plot(*zip(*line, strict=True), marker="o", label=name.replace("_", " "))
    axes.axhline(1 / len(study.model.classes), color="grey", linewidth=0.8, linestyle=":")
    last = max((version for line in points.values() for version, _ in line), default=0)
    axes.set(
        xlabel="model version",
        ylabel="released figure (noise included)",
        ylim=(0, 1),
        xlim=(-0.2, max(1, last) + 0.2),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    claimed = study.privacy.epsilon
    privacy = f"ε ≤ {claimed:g}" if claimed is not None and math.isfinite(claimed) else "no differential privacy"
    axes.set_title(f"{study.name} ({note}, {privacy})", fontsize=10)
    if points:
        axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
