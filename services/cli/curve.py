"""ε and ε_solo over the training rounds of a study: as a PNG and as a few lines of a terminal."""

import math
from collections.abc import Sequence
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
