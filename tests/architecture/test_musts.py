"""Every MUST of the protocol is named by at least one test and by its documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MUSTS = [f"P-{number}" for number in range(1, 27)]


def named_in(text: str) -> set[str]:
    return set(re.findall(r"\bP-\d+\b", text))


def test_every_must_is_named_by_a_test() -> None:
    here = Path(__file__)
    named: set[str] = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        if file != here:
            named |= named_in(file.read_text())
    assert sorted(set(MUSTS) - named) == []


def test_every_must_is_explained() -> None:
    assert sorted(set(MUSTS) - named_in((ROOT / "docs/protocol.md").read_text())) == []
