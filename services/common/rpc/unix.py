"""Administration at hospital and pod: a Unix socket (0600) that `kubectl exec` reaches and no network does."""

import os
from collections.abc import Sequence
from pathlib import Path

import grpc

from services.common.errors import Reason, ServiceError
from services.common.rpc.interceptor import as_local_operator
from services.common.rpc.server import MAX_MESSAGE_BYTES, RunningServer, Servicer, serve_local

_LONGEST = 107  # sun_path of unix(7)


def serve_admin(servicers: Sequence[Servicer], path: Path, max_workers: int) -> RunningServer:
    """Serve `servicers` on a socket file that only this user may open; a stale file is replaced.

    The caller has the store's lock, so no second process can be behind that file. Every caller has the role
    operator. Raises INVALID_DOCUMENT for a path that is too long, UNREACHABLE when it cannot be bound.
    """
    if len(os.fsencode(path)) > _LONGEST:
        raise ServiceError(
            Reason.INVALID_DOCUMENT, f"admin_socket {path} has more than {_LONGEST} bytes: choose a shorter path"
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    before = os.umask(0o177)  # the file must never be open to others, not even for the moment until a chmod
    try:
        return serve_local(servicers, str(path), as_local_operator, max_workers)
    finally:
        os.umask(before)


def dial_admin(path: Path) -> grpc.Channel:
    """A channel to `serve_admin` at `path`."""
    return grpc.secure_channel(
        f"unix:{path}",
        grpc.local_channel_credentials(grpc.LocalConnectionType.UDS),
        [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.default_authority", "localhost"),  # the path itself is no valid HTTP/2 authority
        ],
    )
