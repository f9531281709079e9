"""`wardround evidence`: bring what every site kept together in one folder, for `wardround verify`."""

import json
import sys
import tarfile
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from rich.console import Console

from services.cli.evidence import place, target, write_parts
from services.cli.operator import Address, Charter, Operator, dial_aggregator, knock
from services.cli.run import write_sums
from services.common.documents.site import read
from services.common.documents.study import load_study
from services.common.errors import Reason, ServiceError
from services.common.ids import Role, check_id
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

app = typer.Typer(no_args_is_help=True, help="What every site kept of a study, in one folder.")

_SECONDS = 3600.0
_Run = Annotated[Path, typer.Argument(help="the folder to gather in", metavar="RUN")]


@app.command()
def pull(
    run: _Run,
    study: Annotated[Path, typer.Option(help="the study, exact bytes")],
    address: Address,
    operator: Operator,
    charter: Charter = Path("charter.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Fetch the aggregator's evidence of one study.

    Example: wardround evidence pull RUN --study study.yaml --address centre.example.org:443 --operator olga/
    """
    loaded = load_study(read(study), str(study))
    request = admin_pb2.ExportEvidenceRequest(study=loaded.digest)
    with dial_aggregator(address, charter, operator) as caller:
        knock(caller)
        with caller.stream(
            lambda channel: admin_pb2_grpc.AdministrationServiceStub(channel).ExportEvidence, request, seconds=_SECONDS
        ) as parts:
            files = write_parts(parts, place(run, Role.AGGREGATOR, ""))
    write_sums(run / "evidence")
    found = {"run": str(run), "role": Role.AGGREGATOR.value, "study": loaded.digest.hex(), "files": files}
    _say(f"{run}: {files} files of the aggregator, about study {loaded.document.name}", found if as_json else None)


@app.command()
def add(
    run: _Run,
    role: Annotated[Role, typer.Option(help="hospital or pod")],
    id: Annotated[str, typer.Option(help="the site's id in the charter")],
    tar: Annotated[Path | None, typer.Option(help="what the site sent; default: standard input")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Put in what one hospital or pod exported, as its own operator fetched it from its container.

    Example: wardround evidence add RUN --role hospital --id alice --tar alice.tar

    That file is: kubectl exec alice-0 -- python -m services.common.rpc.administer evidence --study SHA256 > alice.tar
    """
    if role not in (Role.HOSPITAL, Role.POD):
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"--role {role.value}: say hospital or pod; `evidence pull` does it"
        )
    folder = place(run, role, check_id(id))
    if tar is None:
        files = _unpack(sys.stdin.buffer, folder)
    else:
        with tar.open("rb") as source:
            files = _unpack(source, folder)
    write_sums(run / "evidence")
    found = {"run": str(run), "role": role.value, "id": id, "files": files}
    _say(f"{run}: {files} files of {role.value} {id}", found if as_json else None)


def _unpack(source: BinaryIO, folder: Path) -> int:
    """Plain files below `folder` and nothing else; how many. Raises MALFORMED."""
    files = 0
    try:
        with tarfile.open(fileobj=source, mode="r|") as packed:
            for entry in packed:
                content = packed.extractfile(entry)
                if not entry.isreg() or content is None:
                    raise ServiceError(
                        Reason.MALFORMED, f"the tar holds {entry.name!r}, which is no plain file: export it again"
                    )
                with target(folder, entry.name).open("wb") as out:
                    while block := content.read(1 << 20):
                        out.write(block)
                files += 1
    except tarfile.TarError as error:
        raise ServiceError(Reason.MALFORMED, f"that is not what a site exports ({error}): export it again") from None
    return files


def _say(sentence: str, found: dict[str, object] | None) -> None:
    """`found` instead of the sentence where a program asks."""
    if found is not None:
        print(json.dumps(found))
    else:
        Console(highlight=False, soft_wrap=True).print(sentence)
