"""`wardround model`: the architectures that a study may name, and the file that it starts from."""

import hashlib
import json
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from services.cli.drafts import torch_side, unwritten_model
from services.cli.files import refuse_existing
from services.cli.operator import Address, Charter, Operator, dial_aggregator, knock
from services.common.documents.study import BackboneSection
from services.common.errors import Reason, ServiceError
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

app = typer.Typer(no_args_is_help=True, help="What a study may train, and the file that it starts from.")

_BLOCK = 1 << 20
_SECONDS = 3600.0


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="v0.safetensors, as `study draft` wrote it beside the study")],
    address: Address,
    operator: Operator,
    charter: Charter = Path("charter.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Bring a study's initial model to the aggregator, whose plan names it by its SHA-256.

    Example: wardround model push study/v0.safetensors --address centre.example.org:443 --operator keys/ --charter
    charter.yaml
    """
    with _opened(file) as source, dial_aggregator(address, charter, operator) as caller:
        digest = hashlib.file_digest(source, "sha256").digest()
        knock(caller)
        answer = caller.upload(
            lambda channel: admin_pb2_grpc.PlanServiceStub(channel).PushModel,
            _requests(source, digest),
            seconds=_SECONDS,
        )
    if as_json:
        print(json.dumps({"model": digest.hex(), "detail": answer.detail}))
    else:
        Console(highlight=False, soft_wrap=True).print(f"{digest.hex()}: {answer.detail}")


@app.command("list")
def list_architectures(
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="pixels a side")] = 224,
    classes: Annotated[int, typer.Option(min=2, max=256, help="how many classes")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="for a program")] = False,
) -> None:
    """The architectures that a study may name: numbers to train, bytes of a round, what suits differential privacy.

    Example: wardround model list --classes 7
    """
    architectures, models = torch_side()
    rows = []
    for name, entry in architectures.REGISTRY.items():
        backbone = BackboneSection(name="efficientnet-lite0", sha256="0" * 64) if name in architectures.HEADS else None
        names = tuple(f"class-{number}" for number in range(classes))
        wanted = unwritten_model(name, image_size, names, backbone)
        numbers = models.size(models.layout(architectures.build(wanted)))
        rows.append({"architecture": name, "parameters": numbers, "bytes_a_round": 4 * numbers, "suits": entry.note})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(title=f"Architectures at {image_size} px, {classes} classes; a round is an upload at 32 bit")
    table.add_column("architecture", no_wrap=True)
    table.add_column("parameters", justify="right")
    table.add_column("a round", justify="right")
    table.add_column("suits")
    for row in rows:
        size = f"{row['bytes_a_round'] / 1e6:,.2f} MB"
        table.add_row(row["architecture"], f"{row['parameters']:,}", size, row["suits"])
    Console(highlight=False).print(table)


@app.command()
def convert(
    weights: Annotated[Path, typer.Argument(help="a torchvision state_dict file (.pth, read with weights_only)")],
    architecture: Annotated[str, typer.Option(help="one of `wardround model list`, such as resnet18-gn")],
    classes: Annotated[str, typer.Option(help="names of the classes, in order, with commas")],
    out: Annotated[Path, typer.Option(help="the first model, v0.safetensors; not overwritten")],
    image_size: Annotated[int, typer.Option(min=8, max=1024, help="pixels a side")] = 224,
    seed: Annotated[int, typer.Option(help="of the weights that the file does not give")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Make a study's first model from public pretrained weights; GroupNorm takes the factors of their BatchNorm.

    Example: wardround model convert resnet18.pth --architecture resnet18-gn --classes bcc,mel --out v0.safetensors
    """
    architectures, models = torch_side()
    refuse_existing([out])
    names = tuple(part.strip() for part in classes.split(","))
    wanted = unwritten_model(architecture, image_size, names, None)
    shapes = models.layout(architectures.build(wanted))
    vector, left = models.converted_vector(wanted, weights, seed)
    digest = models.write_model_file(out, shapes, vector)
    if as_json:
        found = {"file": str(out), "parameters": models.size(shapes), "initial": digest.hex(), "not_from_file": left}
        print(json.dumps(found))
        return
    console = Console(highlight=False, soft_wrap=True)
    for name in left:
        console.print(f"{name}: not from the file, for its number of classes is another")
    console.print(f"{out}: {models.size(shapes):,} numbers. In the study: model.initial: {digest.hex()}")


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
