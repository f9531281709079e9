"""A key-share pod: `python -m services.keyshare --config FILE.yaml`. Exit code 2 and one line: it must not start so."""

import sys
import threading
from contextlib import closing
from pathlib import Path

from services.common.clock import SystemClock
from services.common.documents.site import PinnedCharters, load_dialing, load_signer
from services.common.errors import ServiceError
from services.common.ids import Role
from services.common.observe import logs
from services.common.observe.harden import harden
from services.common.observe.http import Health
from services.common.observe.process import LOOK
from services.common.observe.service import serve_until_stopped
from services.common.rpc.administration import Administration
from services.common.rpc.dialing import open_caller, reachable
from services.keyshare import metrics
from services.keyshare.client import Client
from services.keyshare.pod import Pod
from services.keyshare.store import CustodyStore
from wardround.admin.v1.admin_pb2 import Status

_TICK_SECONDS = 1.0


def run(path: Path, stop: threading.Event) -> None:
    """Serve until `stop` is set. Raises ServiceError where the pod must not start."""
    config, clock = load_dialing(path), SystemClock()
    logs.configure("pod", config.id, config.log_level)
    pinned = PinnedCharters(config, lambda roster: roster.pod_index(config.id))
    charters = pinned.read()
    caller = open_caller(config, Role.POD, charters[0], clock)
    demo = all(charter.document.demo for charter in charters)
    harden(demo)
    with closing(CustodyStore(config.state, demo)) as store:
        pod = Pod(config.id, load_signer(config.identity_key), store, pinned.rosters(), clock)
        client = Client(pod, caller, stop)
        administration = Administration(lambda: _status(pod), lambda study: [("audit.jsonl", pod.audit())])
        health = Health(["store", "certificate"])
        LOOK.watch(lambda: metrics.show(pod))
        with reachable(config, Role.POD, health, administration, clock):
            client.watch.start()
            health.start()
            while not stop.wait(_TICK_SECONDS):
                client.watch.check()
                _tick(pod, pinned, client, health)
                administration.show()
            caller.close()
            client.watch.join()


def _tick(pod: Pod, pinned: PinnedCharters, client: Client, health: Health) -> None:
    """Keys expire, charters are read again."""
    try:
        pod.expire()
        health.set("store", True, f"{len(pod.state.records)} studies")
    except ServiceError as error:
        health.set("store", False, error.detail)
    try:
        rosters = pinned.rosters()
        health.note("charters", None)
    except ServiceError as error:
        health.note("charters", f"the old ones stay: {error.detail}")
        return
    if rosters.keys() != pod.rosters.keys():
        pod.rosters = rosters
        client.watch.redial()


def _status(pod: Pod) -> Status:
    """What the pod holds now, for people."""
    ref, phase, detail = pod.standing()
    found = Status(role="pod", id=pod.id, phase=phase, detail=detail, pods_live=int(pod.live))
    found.study, found.round, found.attempt = ref
    return found


if __name__ == "__main__":
    sys.exit(serve_until_stopped("key-share pod", run))
