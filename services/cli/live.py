"""What a person sees while a federation runs: a live table in a terminal, plain lines elsewhere."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from wardround.admin.v1 import admin_pb2

RELEASED = ("balanced_accuracy", "accuracy", "macro_auc")


@dataclass(frozen=True)
class SiteView:
    """One process as the view shows it; ε only for hospitals, None where nothing is spent or known."""

    name: str
    role: str
    phase: str
    epsilon_spent: float | None = None
    epsilon_left: float | None = None
    epsilon_solo: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """The federation at one moment. `figures` are released ones only (after secure aggregation and noise)."""

    phase: str
    round: int
    rounds: int
    attempt: int
    version: int
    submitted: int
    sites: tuple[SiteView, ...]
    figures: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """The same in one line, for logs."""
        parts = [f"round {self.round}/{self.rounds}", self.phase]
        if self.attempt > 1:
            parts.append(f"attempt {self.attempt}")
        parts += [f"model v{self.version}", f"submitted {self.submitted}"]
        spent = max((site.epsilon_spent for site in self.sites if site.epsilon_spent), default=0.0)
        solo = max((site.epsilon_solo for site in self.sites if site.epsilon_solo), default=spent)
        if spent and math.isfinite(spent):
            alone = f" (ε_solo ≤ {_number(solo, math.ceil)})" if solo > spent else ""
            parts.append(f"ε spent ≤ {_number(spent, math.ceil)}{alone}")
        elif spent:
            parts.append("ε not bounded")
        parts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in sorted(self.figures.items())]
        return " · ".join([*parts, *self.notes])


def snapshot_of(
    now: admin_pb2.Status, sites: tuple[SiteView, ...] | None = None, rounds: int | None = None
) -> Snapshot:
    """The aggregator's status as the view shows it; `sites` where more is known of them than the aggregator knows."""
    seen = tuple(SiteView(member.id, member.role, member.phase) for member in now.members)
    quality = {name: value for name, value in now.figures.items() if name in RELEASED}
    return Snapshot(
        phase=now.phase,
        round=now.round,
        rounds=now.through_round if rounds is None else rounds,
        attempt=now.attempt,
        version=now.model_version,
        submitted=now.hospitals_submitted,
        sites=seen if sites is None else sites,
        figures=quality,
        notes=(now.waiting,) if now.waiting else (),
    )


class View:
    """Shows snapshots; use as a context manager. `title` says what runs, synthetic data included."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._last = ""

    def __enter__(self) -> "View":
        if self._live is not None:
            self._live.start()
        else:
            self._console.print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Draw the newest state; where there is no terminal, print a line when it changed."""
        if self._live is not None:
            self._live.update(self._panel(snapshot))
        elif snapshot.line() != self._last:
            self._last = snapshot.line()
            self._console.print(self._last, highlight=False, soft_wrap=True)

    def say(self, sentence: str) -> None:
        """A sentence that stays on the screen."""
        self._console.print(sentence, highlight=False, soft_wrap=True)

    def _panel(self, snapshot: Snapshot) -> Panel:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"round {snapshot.round}/{snapshot.rounds}", style="bold"),
            ProgressBar(total=max(1, snapshot.rounds), completed=max(0, snapshot.round - 1), width=24),
            snapshot.phase + (f" (attempt {snapshot.attempt})" if snapshot.attempt > 1 else ""),
            f"model v{snapshot.version}",
            f"{snapshot.submitted} submitted",
        )
        table = Table(expand=True, box=None, pad_edge=False)
        known = any(site.epsilon_spent is not None for site in snapshot.sites)
        for column in ("site", "role", "now", *(("ε spent", "ε_solo", "ε left") if known else ())):
            table.add_column(column, justify="right" if column.startswith("ε") else "left")
        for site in snapshot.sites:
            spent = (_number(site.epsilon_spent, math.ceil), _number(site.epsilon_solo, math.ceil))
            figures_of = (*spent, _number(site.epsilon_left, math.floor)) if known else ()
            table.add_row(site.name, site.role, site.phase, *figures_of)
        figures = "   ".join(
            f"{name.replace('_', ' ')} {value:.3f}" for name, value in sorted(snapshot.figures.items())
        )
        rows: list[RenderableType] = [
            head,
            table,
            Text(figures or "no figure released yet", style="green" if figures else "dim"),
        ]
        rows += [Text(note, style="yellow") for note in snapshot.notes]
        return Panel(Group(*rows), title=self._title)


def _number(value: float | None, rounded: Callable[[float], int]) -> str:
    """Spent is rounded up and left is rounded down: no figure flatters."""
    if value is None:
        return ""
    return f"{rounded(value * 100) / 100:.2f}" if math.isfinite(value) else "not bounded"
