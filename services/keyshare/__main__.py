"""A key-share pod: `python -m services.keyshare --config FILE.yaml`. Exit code 2 and one line: it must not start so."""

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path

from services.common.clock import SystemClock
from services.common.documents.charter import LoadedCharter
from services.common.documents.site import PinnedCharters, load_signer
from services.common.errors import ServiceError
from services.common.ids import Role
from services.common.observe import logs, process
from services.common.observe.harden import harden
from services.common.observe.http import Health, serve_http
from services.common.observe.last_words import refused
from services.common.rpc.certificates import server_name
from services.common.rpc.channel import Caller, dial
from services.common.rpc.leaf import LeafFiles, check_own_leaf
from services.common.rpc.unix import serve_admin
from services.common.secagg.roster import Roster
from services.keyshare import metrics
from services.keyshare.admin import Administration
from services.keyshare.client import Client
from services.keyshare.config import PodConfig, load_config
from services.keyshare.pod import Pod
from services.keyshare.store import CustodyStore
from wardround.admin.v1.admin_pb2_grpc import add_AdministrationServiceServicer_to_server

_log = logging.getLogger(__name__)
_TICK_SECONDS = 1.0


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="wardround key-share pod")
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(load_config(arguments.config), stop)
    except ServiceError as error:
        return refused("key-share pod", error)
    return 0


def run(config: PodConfig, stop: threading.Event) -> None:
    """Serve until `stop` is set. Raises ServiceError where the pod must not start."""
    logs.configure("pod", config.id, config.log_level)
    process.announce("pod", config.id, config.tls.certificate)
    pinned, state = PinnedCharters(config, lambda roster: roster.pod_index(config.id)), config.state
    charters, leaf, clock = pinned.read(), LeafFiles(config.tls.certificate, config.tls.key), SystemClock()
    check_own_leaf(leaf, Role.POD, config.id, charters[0], clock.now_ms())
    demo = all(charter.document.demo for charter in charters)
    if not harden(demo):
        _log.warning("memory is not locked; this machine has no swap, or the charter is a demo")
    if demo:
        _log.warning("DEMO charter: the store, swap and organisation rules are lifted")
    store = CustodyStore(state, demo)
    try:
        pod = Pod(config.id, load_signer(config.identity_key), store, _rosters(charters), clock)
        aggregator = charters[0].document.aggregator
        name, root = server_name(aggregator.id, charters[0].document.consortium), aggregator.tls_root.encode()
        caller = Caller(lambda pair: dial(config.aggregator, name, pair, root, config.proxy), leaf)
        client, administration = Client(pod, caller, stop), Administration(pod)
        health = Health(["store", "certificate"])
        health.look("certificate", lambda: process.certificate_now(config.tls.certificate, clock.now_ms()))
        servicers = [(add_AdministrationServiceServicer_to_server, administration)]
        admin = serve_admin(servicers, config.admin_socket, max_workers=4)
        process.LOOK.watch(lambda: metrics.show(pod))
        http = serve_http(config.http, health, state / "http.address")
        worker = threading.Thread(target=client.run, name="client", daemon=True)
        worker.start()
        health.start()
        while not stop.wait(_TICK_SECONDS) and worker.is_alive():
            _tick(pod, pinned, client, health)
            administration.show()
        if not stop.is_set():
            raise client.refusal or RuntimeError("the connection loop has ended by itself")
        _log.info("stopping")
        caller.close()
        worker.join()
        admin.stop(1)
        http.stop()
    finally:
        store.close()


def _tick(pod: Pod, pinned: PinnedCharters, client: Client, health: Health) -> None:
    """Keys expire, charters are read again."""
    try:
        pod.expire()
        health.set("store", True, f"{len(pod.state.records)} studies")
    except ServiceError as error:
        health.set("store", False, error.detail)
    try:
        rosters = _rosters(pinned.read())
        health.note("charters", None)
    except ServiceError as error:
        health.note("charters", f"the old ones stay: {error.detail}")
        return
    if rosters.keys() != pod.rosters.keys():
        pod.rosters = rosters
        client.redial()


def _rosters(charters: tuple[LoadedCharter, ...]) -> dict[bytes, Roster]:
    return {charter.digest: charter.roster for charter in charters}


if __name__ == "__main__":
    sys.exit(main())
