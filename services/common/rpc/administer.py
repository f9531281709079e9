"""A look at a hospital node or key-share pod from inside its own container, through its Unix socket.

`kubectl exec POD -- python -m services.common.rpc.administer status`, or `evidence --study SHA256 > alice.tar`:
a service's image holds nothing of the `wardround` command, and its socket is on no network.
"""

import argparse
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import grpc
from google.protobuf.json_format import MessageToJson

from services.common.errors import Reason, ServiceError
from services.common.rpc.errors import from_rpc_error
from services.common.rpc.unix import dial_admin
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

_SOCKET = Path("/run/wardround/admin.sock")  # as the charts say it
_IN_MEMORY = 8 << 20
_SECONDS = 600.0


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m services.common.rpc.administer", description=__doc__)
    parser.add_argument("what", choices=("status", "evidence"))
    parser.add_argument("--socket", type=Path, default=_SOCKET)
    parser.add_argument("--study", default="", help="SHA-256 of one study, 64 hex digits; else all")
    found = parser.parse_args(arguments)
    try:
        study = bytes.fromhex(found.study)
        with dial_admin(found.socket) as channel:
            stub = admin_pb2_grpc.AdministrationServiceStub(channel)
            if found.what == "status":
                print(MessageToJson(stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=_SECONDS).status))
            else:
                request = admin_pb2.ExportEvidenceRequest(study=study)
                write_tar(stub.ExportEvidence(request, timeout=_SECONDS), sys.stdout.buffer)
    except (grpc.RpcError, ServiceError) as error:
        refusal = error if isinstance(error, ServiceError) else from_rpc_error(error)
        print(f"administer: {found.socket}: {refusal.detail}", file=sys.stderr)
        return 2
    return 0


def write_tar(parts: Iterable[admin_pb2.ExportEvidenceResponse], out: BinaryIO) -> None:
    """The files of a stream of evidence as a tar, one in memory (or in a scratch file) at a time."""
    with tarfile.open(fileobj=out, mode="w|") as tar, tempfile.SpooledTemporaryFile(_IN_MEMORY) as held:
        path = ""
        for part in parts:
            if part.path:
                _add(tar, path, held)
                path = part.path
            elif not path:
                raise ServiceError(Reason.MALFORMED, "the evidence begins without a file name: is this a service?")
            held.write(part.chunk)
        _add(tar, path, held)


def _add(tar: tarfile.TarFile, path: str, held: "tempfile.SpooledTemporaryFile[bytes]") -> None:
    if path:
        entry = tarfile.TarInfo(path)
        entry.size = held.tell()
        held.seek(0)
        tar.addfile(entry, held)
        held.seek(0)
        held.truncate()


if __name__ == "__main__":
    sys.exit(main())
