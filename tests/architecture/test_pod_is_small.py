"""An auditor reads the whole key-share pod in one sitting."""

from pathlib import Path

POD = Path(__file__).parents[2] / "services" / "keyshare"
MOST_LINES = 1000
MOST_COLUMNS = 120


def test_the_pod_has_at_most_a_thousand_lines() -> None:
    """`cat services/keyshare/*.py | wc -l`; of no more than the usual width, so that lines are not merely longer."""
    lines = [line for path in POD.rglob("*.py") for line in path.read_text().splitlines()]
    assert len(lines) <= MOST_LINES, f"{len(lines)} lines: simplify before anything is added"
    assert max(map(len, lines)) <= MOST_COLUMNS
