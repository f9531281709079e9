"""Commands that the documents tell people to type: fenced blocks by their title.

`laptop` blocks, of shell and of Python, run here as they stand; `site` lines must parse against the real command line;
`kubernetes` lines name real charts and values, and the end-to-end test on a cluster runs them (kubernetes_guide.py).
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from typer.core import TyperGroup
from typer.main import get_command

from services.cli.__main__ import app

_BLOCK = re.compile(r'^```bash title="([a-z]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r'^```python title="([a-z]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_ANY = re.compile(r"^```(bash|python)", re.MULTILINE)


def commands(path: Path, title: str) -> list[list[str]]:
    """The words of every line in the blocks of that title, in order; comments and redirections are dropped."""
    found = []
    for block in _BLOCK.finditer(path.read_text()):
        if block[1] == title:
            lines = block[2].replace("\\\n", " ").splitlines()
            found += [shlex.split(line.split(" > ")[0], comments=True) for line in lines if line.strip()]
    return [words for words in found if words]


def programs(path: Path, title: str) -> list[str]:
    """The Python of the blocks of that title, in order: each runs in a process of its own."""
    return [block[2] for block in _PYTHON.finditer(path.read_text()) if block[1] == title]


def untitled(path: Path) -> int:
    """Blocks of shell or Python without a title: nothing would hold them to what is real."""
    text = path.read_text()
    return len(_ANY.findall(text)) - len(_BLOCK.findall(text)) - len(_PYTHON.findall(text))


def parse(words: Sequence[str]) -> None:
    """Hold `wardround …` against the real command line without running it. Raises the usage error of a person."""
    command, rest = get_command(app), list(words[1:])
    context = command.make_context("wardround", rest.copy())
    while isinstance(command, TyperGroup):
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None
        assert name is not None
        parent = context
        context = command.make_context(name, rest.copy(), parent=parent)
