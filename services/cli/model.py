"""`wardround model`: the file that a study starts from."""

import hashlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.operator import Address, Charter, Operator, dial_aggregator
from services.common.errors import Reason, ServiceError
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

app = typer.Typer(no_args_is_help=True, help="The model file that a study starts from.")

_BLOCK = 1 << 20
_SECONDS = 3600.0


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="v0.safetensors, as `study draft` wrote it beside the study")],
    address: Address,
    operator: Operator,
    charter: Charter = Path("charter.yaml"),
) -> None:
    """Bring a study's initial model to the aggregator, whose plan names it by its SHA-256.

    Example: wardround model push study/v0.safetensors --address centre.example.org:443 --operator keys/ --charter
    charter.yaml
    """
    with _opened(file) as source, dial_aggregator(address, charter, operator) as caller:
        digest = hashlib.file_digest(source, "sha256").digest()
        answer = caller.upload(
            lambda channel: admin_pb2_grpc.PlanServiceStub(channel).PushModel,
            _requests(source, digest),
            seconds=_SECONDS,
        )
    Console(highlight=False, soft_wrap=True).print(f"{digest.hex()}: {answer.detail}")


def _requests(source: BufferedReader, digest: bytes) -> Iterator[admin_pb2.PushModelRequest]:
    size = source.seek(0, 2)
    source.seek(0)
    yield admin_pb2.PushModelRequest(digest=digest, size=size)
    while block := source.read(_BLOCK):
        yield admin_pb2.PushModelRequest(chunk=block)


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise ServiceError(
            Reason.NOT_FOUND, f"{path} cannot be read ({error.strerror}): give the study's v0.safetensors"
        ) from None
