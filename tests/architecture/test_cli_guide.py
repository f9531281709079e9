"""docs/cli.md is made from the command line: whoever adds an option makes it anew."""

from pathlib import Path

from services.cli.reference import reference

GUIDE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_guide_is_the_command_line() -> None:
    assert GUIDE.read_text() == reference(), "make it anew: python -m services.cli.reference > docs/cli.md"
