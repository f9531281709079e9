"""Fetch a role's evidence and status over its administration service."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import grpc

from services.cli.federation import CONSORTIUM, Federation, Site
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.certificates import server_name
from services.common.rpc.channel import dial
from services.common.rpc.errors import from_rpc_error
from services.common.rpc.leaf import LeafFiles, LeafWatch
from services.common.rpc.unix import dial_admin
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc


@contextmanager
def administration(
    federation: Federation, site: Site, address: str
) -> Iterator[admin_pb2_grpc.AdministrationServiceStub]:
    """The administration of one site: the aggregator's over mTLS at `address`, the others' on their socket."""
    if site.role == Role.AGGREGATOR:
        leaf = LeafWatch(LeafFiles(site.folder / "operator.pem", site.folder / "operator-key.pem")).current()
        root = (site.folder / "tls-root.pem").read_bytes()
        channel = dial(address, server_name(site.id, CONSORTIUM), leaf, root)
    else:
        channel = dial_admin(site.socket)
    with channel:
        yield admin_pb2_grpc.AdministrationServiceStub(channel)


def status(stub: admin_pb2_grpc.AdministrationServiceStub) -> admin_pb2.Status | None:
    """What the site is doing; None while it does not answer."""
    try:
        return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=5).status
    except grpc.RpcError:
        return None


def collect(stub: admin_pb2_grpc.AdministrationServiceStub, folder: Path) -> int:
    """Write all evidence of one site under `folder`; how many files. Raises UNREACHABLE, MALFORMED for a bad path.

    A process that was started a moment ago is waited for.
    """
    try:
        parts = stub.ExportEvidence(admin_pb2.ExportEvidenceRequest(), timeout=600, wait_for_ready=True)
        return write_parts(parts, folder)
    except grpc.RpcError as error:
        why = from_rpc_error(error).detail
        raise ServiceError(Reason.UNREACHABLE, f"the evidence of {folder.name} did not come: {why}") from error


def write_parts(parts: Iterable[admin_pb2.ExportEvidenceResponse], folder: Path) -> int:
    """Write a stream of evidence under `folder`; how many files. Raises MALFORMED for a bad path."""
    files = 0
    out = None
    try:
        for part in parts:
            if part.path:
                if out is not None:
                    out.close()
                out = target(folder, part.path).open("wb")
                files += 1
            if out is None:
                raise ServiceError(
                    Reason.MALFORMED, "the evidence begins without a file name: is this a Wardround service?"
                )
            out.write(part.chunk)
    finally:
        if out is not None:
            out.close()
    return files


def place(run: Path, role: Role, id: str) -> Path:
    """The folder of one site's evidence in a run."""
    if role is Role.AGGREGATOR:
        return run / "evidence" / "aggregator"
    return run / "evidence" / ("pods" if role is Role.POD else "hospitals") / id


def target(folder: Path, name: str) -> Path:
    """Where a file of this name may be written: below `folder`, whose parents are made. Raises MALFORMED."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise ServiceError(
            Reason.MALFORMED, f"evidence names the path {name!r}: only paths below the folder are written"
        )
    path = folder / pure
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
