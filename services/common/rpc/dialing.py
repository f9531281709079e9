"""What a hospital and a pod have in common as processes: they dial one aggregator and are looked at from nearby."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from services.common.clock import Clock
from services.common.documents.charter import LoadedCharter
from services.common.documents.site import DialingConfig
from services.common.ids import Role
from services.common.observe.http import Health, serve_http
from services.common.observe.process import announce, certificate_now
from services.common.rpc.administration import Administration
from services.common.rpc.certificates import server_name
from services.common.rpc.channel import Caller, dial
from services.common.rpc.leaf import LeafFiles, check_own_leaf
from services.common.rpc.server import Servicer
from services.common.rpc.unix import serve_admin
from wardround.admin.v1.admin_pb2_grpc import add_AdministrationServiceServicer_to_server

_ADMIN_WORKERS = 8


def open_caller(config: DialingConfig, role: Role, charter: LoadedCharter, clock: Clock) -> Caller:
    """The connection to the charter's aggregator: its name and root come from the pinned charter, not the address.

    Raises as `check_own_leaf` where the site's leaf is not one that the aggregator would take.
    """
    files = LeafFiles(config.tls.certificate, config.tls.key)
    check_own_leaf(files, role, config.id, charter, clock.now_ms())
    aggregator = charter.document.aggregator
    name = server_name(aggregator.id, charter.document.consortium)
    root = aggregator.tls_root.encode()
    return Caller(lambda leaf: dial(config.aggregator, name, leaf, root, config.proxy), files)


@contextmanager
def reachable(
    config: DialingConfig,
    role: Role,
    health: Health,
    administration: Administration,
    clock: Clock,
    more: Sequence[Servicer] = (),
) -> Iterator[None]:
    """Inside the block probes and metrics are served, and the administration's socket is. Raises UNREACHABLE.

    `more` is what only this role has on that socket. The condition `certificate` of `health` follows the leaf.
    """
    announce(role.value, config.id, config.tls.certificate)
    health.look("certificate", lambda: certificate_now(config.tls.certificate, clock.now_ms()))
    http = serve_http(config.http, health, config.state / "http.address")
    servicers = [(add_AdministrationServiceServicer_to_server, administration), *more]
    try:
        admin = serve_admin(servicers, config.admin_socket, _ADMIN_WORKERS)
        try:
            yield
        finally:
            admin.stop(1)
    finally:
        http.stop()
