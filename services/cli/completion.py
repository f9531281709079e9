"""`wardround completion`: what makes a shell complete this command's words."""

from enum import StrEnum
from typing import Annotated

import typer
from typer.completion import get_completion_script  # type: ignore[attr-defined]  # imported there, not re-exported

VARIABLE = "_WARDROUND_COMPLETE"
"""Set by the script when a shell asks for words; `main` then answers it and nothing else."""


class Shell(StrEnum):
    """Those that people have."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="the shell that is to complete")]) -> None:
    """Print a script after which TAB completes commands, options and file names.

    For bash put the example into ~/.bashrc; for zsh the same line with zsh into ~/.zshrc; for fish:
    wardround completion fish > ~/.config/fish/completions/wardround.fish

    Example: eval "$(wardround completion bash)"
    """
    print(get_completion_script(prog_name="wardround", complete_var=VARIABLE, shell=shell.value))
