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
    def holds(self) -> bool:
        """Whether it is what it should be."""
        return (self.value if self.sure is None else self.sure) <= self.limit


@dataclass
class Finding:
    """One meter. `shows` and `shows_not` are sentences for people; `caught` says which planted faults it saw."""

    title: str
    shows: str
    shows_not: str
    readings: list[Reading] = field(default_factory=list)
    caught: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every reading holds."""
        return all(reading.holds for reading in self.readings)

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
                    "sure": r.value if r.sure is None else r.sure,
                    "limit": r.limit,
                    "unit": r.unit,
                    "holds": r.holds,
                }
                for r in self.readings
            ],
            "planted_faults_caught": self.caught,
            "notes": self.notes,
        }


def catches(readings: list[Reading]) -> bool:
    """Whether a meter that was shown a planted fault says so."""
    return any(not reading.holds for reading in readings)
