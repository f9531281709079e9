"""docs/cli.md, made from the command line itself: `python -m services.cli.reference > docs/cli.md`.

A test holds the file to this text, so a command or an option that is not in it does not pass.
"""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.main import get_command

from services.cli.__main__ import BROKEN, INTERRUPTED, REFUSED, USAGE, app

_HEAD = f"""# The command line

Every command says with `--help` what it does, with an example. This page is made by
`python -m services.cli.reference > docs/cli.md`.

## For every command

| exit code | means |
|---|---|
| 0 | done; for a check: it holds |
| {REFUSED} | refused, or it does not hold: one line on standard error says what, the limit and the next step |
| {USAGE} | wrong usage: the line names the command whose `--help` to read |
| {BROKEN} | a fault of this program: run again with `--debug` and report it |
| {INTERRUPTED} | interrupted (Ctrl-C) |

Results go to standard output, everything else to standard error. `--json`, where a command has it, prints one JSON
value for a program and nothing else; exit codes stay the same. `--debug`, anywhere on the line, shows where an error
came from. A service (`python -m services.aggregator`, `services.keyshare`, `services.hospital_node`) ends with 0 after
SIGTERM, and with 2 and one line when it must not start.

TAB completes words after `eval "$(wardround completion bash)"` (also zsh, fish).
"""


def commands(command: Any, words: tuple[str, ...] = ("wardround",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command that does something, in the order of `--help`."""
    children = getattr(command, "commands", None)
    if children is None:
        yield words, command
        return
    for name, child in children.items():
        yield from commands(child, (*words, name))


def reference() -> str:
    """The whole page."""
    return _HEAD + "".join(_section(words, command) for words, command in commands(get_command(app)))


def _section(words: tuple[str, ...], command: Any) -> str:
    text, example = told(command)
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join([*words, *(_metavar(argument) for argument in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"\n## {' '.join(words)}", "", text, "", "```text", usage, f"Example: {example}", "```"]
    if arguments or options:
        lines += ["", "| | |", "|---|---|"]
        lines += [f"| `{_metavar(argument)}` | {_cell(argument.help)} |" for argument in arguments]
        lines += [f"| {_names(option)} | {_cell(option.help)}{_default(option)} |" for option in options]
    return "\n".join(lines) + "\n"


def told(command: Any) -> tuple[str, str]:
    """What a command's help says, and its example, each with its lines joined."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(command.help or "").split("\n\n")]
    examples = [part.removeprefix("Example: ") for part in paragraphs if part.startswith("Example: ")]
    text = "\n\n".join(part for part in paragraphs if not part.startswith("Example: "))
    return text, examples[0] if examples else ""


def _metavar(argument: Any) -> str:
    name = (argument.metavar or argument.name or "").upper().replace("_", "-").strip("[]")
    return f"{name}…" if argument.nargs == -1 else name


def _names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    plain = isinstance(option.default, (str, int, float)) and not isinstance(option.default, bool)
    if option.required:
        return " (required)"
    if not plain or option.default == "":
        return ""
    return f" (default: {getattr(option.default, 'value', option.default)})"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", r"\|")


if __name__ == "__main__":
    typer.echo(reference(), nl=False)
    sys.exit(0)
