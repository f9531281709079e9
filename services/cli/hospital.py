"""`wardround hospital`: what the people of one hospital decide about their own running node."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.common.documents.site import read
from services.common.documents.study import load_study
from services.hospital_node.resume import SOCKET
from services.hospital_node.resume import resume as acknowledge

app = typer.Typer(no_args_is_help=True, help="A running hospital node, through its administration socket.")

_DIGEST = re.compile(r"[0-9a-f]{64}")


@app.callback()
def _group() -> None:
    """Keeps `resume` a command of its own while it is the only one."""


@app.command()
def resume(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="the study, exact bytes, or its SHA-256")],
    socket: Annotated[Path, typer.Option(help="the node's admin_socket")] = SOCKET,
    confirm: Annotated[
        str, typer.Option(help="what is acknowledged, in the words that this command prints without it")
    ] = "",
) -> None:
    """Let a study go on that an alarm stopped here. Without --confirm it says what stopped it, and changes nothing.

    It passes over one result, named by round and digest; the next one that cannot be followed stops the study again.

    Example: wardround hospital resume study.yaml --socket alice/admin.sock --confirm "round 7, result 1c0ffee1c0ff"
    """
    known = _DIGEST.fullmatch(study) is not None
    digest = bytes.fromhex(study) if known else load_study(read(Path(study)), study).digest
    Console(highlight=False, soft_wrap=True).print(acknowledge(socket, digest, confirm), markup=False)
