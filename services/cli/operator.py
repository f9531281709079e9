"""Calls to the aggregator with an operator's certificate, from anywhere: `model push`, `watch`, `evidence`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from services.common.documents.charter import load_charter
from services.common.documents.site import read
from services.common.rpc.certificates import server_name
from services.common.rpc.channel import Caller, dial
from services.common.rpc.leaf import LeafFiles
from wardround.admin.v1.admin_pb2 import GetStatusRequest
from wardround.admin.v1.admin_pb2_grpc import AdministrationServiceStub

CERTIFICATE, KEY = "operator.pem", "operator-key.pem"
_KNOCK_SECONDS = 20.0  # a forwarded port or a pod that is replaced is back by then

Address = Annotated[str, typer.Option(help="host:port of the aggregator, from here")]
Charter = Annotated[
    Path, typer.Option(help="the pinned charter: it says which name and root the aggregator must prove")
]
Operator = Annotated[Path, typer.Option(help=f"folder with {CERTIFICATE} and {KEY}, as `site operator` makes it")]


@contextmanager
def dial_aggregator(address: str, charter: Path, operator: Path) -> Iterator[Caller]:
    """A connection as this operator. Raises INVALID_DOCUMENT for an unusable charter or certificate."""
    document = load_charter(read(charter), str(charter)).document
    name, root = server_name(document.aggregator.id, document.consortium), document.aggregator.tls_root.encode()
    leaf = LeafFiles(operator / CERTIFICATE, operator / KEY)
    caller = Caller(lambda pair: dial(address, name, pair, root), leaf)
    try:
        yield caller
    finally:
        caller.close()


def knock(caller: Caller) -> None:
    """Ask until the aggregator answers: a stream that is to follow would not be repeated. Raises UNREACHABLE."""
    caller.unary(
        lambda channel: AdministrationServiceStub(channel).GetStatus, GetStatusRequest(), seconds=_KNOCK_SECONDS
    )
