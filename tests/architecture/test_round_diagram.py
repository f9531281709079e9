"""docs/state-machines.md shows exactly the transitions of the aggregator's ALLOWED table."""

import re
from pathlib import Path

from services.aggregator.round import ALLOWED, Phase

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "state-machines.md"


def test_the_diagram_of_rounds_is_the_table() -> None:
    section = DOCUMENT.read_text().split("## Rounds, at the aggregator")[1].split("\n## ")[0]
    drawn = set(re.findall(r"^ +(\w+) --> (\w+): (\w+)$", section, re.MULTILINE))
    table = {(before.value, after.value, fact.__name__) for (before, fact), after in ALLOWED.items()}
    assert drawn == table


def test_every_phase_but_the_last_is_explained() -> None:
    text = DOCUMENT.read_text().split("## Rounds, at the aggregator")[1]
    for phase in set(Phase) - {Phase.FINISHED}:
        assert f"| {phase.value} |" in text
