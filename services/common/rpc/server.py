"""The listener: mutual TLS always, limits, keepalive (docs/operations.md)."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from services.common.clock import Clock, SystemClock
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.interceptor import Authenticate, Gate, Stopping, by_certificate
from services.common.rpc.leaf import LeafFiles, LeafWatch
from services.common.rpc.members import Members

MAX_MESSAGE_BYTES = 4 << 20
Servicer = tuple[Callable[[Any, grpc.Server], None], Any]
"""A generated `add_XServicer_to_server` and the servicer to add."""

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second process on the port must fail, not take half of the calls
    ("grpc.max_concurrent_streams", 32),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    # Unread bytes of a stream are held outside Python: a fixed window keeps memory the same for any vector.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2 << 20),
    # A connection outlives neither a renewed leaf nor a changed charter for long: watchers dial again.
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
]


class RunningServer:
    """A server that listens; `port` is the bound one (0 on a Unix socket)."""

    def __init__(self, server: grpc.Server, port: int, stop_signal: Stopping) -> None:
        self._server = server
        self._stopping = stop_signal
        self.port = port

    def stop(self, grace: float) -> None:
        """Take no new calls, end the feeds now and the other calls after `grace` seconds; return when all is quiet."""
        ended = self._server.stop(grace)
        self._stopping.stop()
        ended.wait()


def serve(
    servicers: Sequence[Servicer],
    members: Callable[[], Members],
    own: tuple[Role, str],
    leaf: LeafFiles,
    *,
    address: str,
    max_workers: int,
    clock: Clock | None = None,
) -> RunningServer:
    """Listen at `address` (host:port, port 0 = any) for the members that `members()` lists at each call.

    `own` is this site's role and id: its operators are known by its root. The leaf is read again when its
    files change. One thread serves one call: `max_workers` covers every member's open stream and some more.
    Raises UNREACHABLE when the port cannot be had, INVALID_DOCUMENT for an unusable leaf.
    """
    signal = Stopping()
    server = _server(by_certificate(members, own, clock or SystemClock()), signal, max_workers)
    for add, servicer in servicers:
        add(servicer, server)
    credentials = _credentials(LeafWatch(leaf), members)
    return start(server, address, lambda: server.add_secure_port(address, credentials), signal)


def serve_local(
    servicers: Sequence[Servicer], path: str, authenticate: Authenticate, max_workers: int
) -> RunningServer:
    """Listen on a Unix socket; who may open the file is who may call (see `unix.serve_admin`)."""
    signal = Stopping()
    server = _server(authenticate, signal, max_workers)
    for add, servicer in servicers:
        add(servicer, server)
    credentials = grpc.local_server_credentials(grpc.LocalConnectionType.UDS)
    return start(server, path, lambda: server.add_secure_port(f"unix:{path}", credentials), signal)


def start(server: grpc.Server, address: str, bind: Callable[[], int], signal: Stopping) -> RunningServer:
    """Bind, then start; a bind that fails is one clear refusal."""
    try:
        port = bind()
    except RuntimeError as error:
        raise ServiceError(
            Reason.UNREACHABLE, f"cannot listen on {address}: in use or not ours; stop the other process or change it"
        ) from error
    server.start()
    return RunningServer(server, port, signal)


def _server(authenticate: Authenticate, signal: Stopping, max_workers: int) -> grpc.Server:
    pool = ThreadPoolExecutor(max_workers, thread_name_prefix="rpc")
    return grpc.server(pool, interceptors=[Gate(authenticate, signal)], options=_OPTIONS)


def _credentials(leaf: LeafWatch, members: Callable[[], Members]) -> grpc.ServerCredentials:
    """Credentials that follow the leaf's files and the charter's roots; asked at each new connection."""
    lock = threading.Lock()

    def state() -> tuple[bytes, bytes, bytes]:
        pair = leaf.current()
        return pair.key, pair.certificate, members().bundle()

    def configuration(now: tuple[bytes, bytes, bytes]) -> grpc.ServerCertificateConfiguration:
        key, certificate, roots = now
        return grpc.ssl_server_certificate_configuration([(key, certificate)], roots)

    last = state()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal last
        with lock:
            now = state()
            if now == last:
                return None
            last = now
            return configuration(now)

    # The stubs leave out that None means "no change" (grpc's own documentation says so).
    return grpc.dynamic_ssl_server_credentials(configuration(last), fetch, True)  # type: ignore[arg-type]
