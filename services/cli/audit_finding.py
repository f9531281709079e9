"""What a meter of the audit found, as plain data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Say = Callable[[str], None]
"""Told what a meter is doing."""

FAULTS = (
    "a share missing",
    "noise halved",
    "noise repeated",
    "sensitivity doubled",
    "a sample re-noised",
)
"""Planted one by one; a meter is shown to see those that it can see (privacy.md §8)."""


@dataclass(frozen=True)
class Reading:
    """One measured value, which holds when it is at most `limit`; `unit`: standard errors, ε, or a share of Δ₂.

    `sure` stands where chance alone may bring `value` over the limit: the same at a confidence of 99.99 %.
    """

    what: str
    value: float
    limit: float
    unit: str
    sure: float | None = None

    @property
    def counted(self) -> float:
        """What is held against the limit."""
        return self.value if self.sure is None else self.sure

    @property
    def holds(self) -> bool:
        """Whether it is what it should be."""
        return self.counted <= self.limit


@dataclass
class Finding:
    """One meter. `shows` and `shows_not` are sentences for people.

    `caught`: which planted faults it saw; `told`: the reading that is worst under each.
    """

    title: str
    shows: str
    shows_not: str
    readings: list[Reading] = field(default_factory=list)
    caught: dict[str, bool] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every reading holds."""
        return all(reading.holds for reading in self.readings)

    def judge(self, fault: str, readings: list[Reading]) -> None:
        """Take what the meter reads when this fault is planted."""
        self.caught[fault] = catches(readings)
        worst = max(readings, key=lambda reading: reading.counted / reading.limit)
        self.told[fault] = f"{worst.what} {worst.counted:.2f} {worst.unit}, limit {worst.limit:.2f}"

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "title": self.title,
            "holds": self.holds,
            "shows": self.shows,
            "does_not_show": self.shows_not,
            "readings": [
                {
                    "what": r.what,
                    "value": r.value,
                    "held_against_the_limit": r.counted,
                    "limit": r.limit,
                    "unit": r.unit,
                    "holds": r.holds,
                }
                for r in self.readings
            ],
            "planted_faults_caught": self.caught,
            "planted_faults_worst_reading": self.told,
            "notes": self.notes,
        }


def catches(readings: list[Reading]) -> bool:
    """Whether a meter that was shown a planted fault says so."""
    return any(not reading.holds for reading in readings)
