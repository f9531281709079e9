"""`python -m services.hospital_node --config FILE.yaml`: the hospital node until SIGTERM.

Exit codes: 0 after SIGTERM or SIGINT, 2 with one line on stderr for a bad configuration, document or data folder.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from services.common.clock import SystemClock
from services.common.documents.charter import LoadedCharter
from services.common.documents.site import load_signer
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.observe.http import Health
from services.common.observe.last_words import refused
from services.common.observe.logs import configure
from services.common.observe.process import LOOK, show_charters
from services.common.rpc.administration import Administration
from services.common.rpc.dialing import open_caller, reachable
from services.common.secagg.signing import Signer
from services.common.store.blobs import BlobStore
from services.hospital_node import metrics
from services.hospital_node.admin import StatusBoard, evidence
from services.hospital_node.alarms import Alarms
from services.hospital_node.client import AggregatorClient
from services.hospital_node.config import HospitalConfig, SiteDocuments, load_config
from services.hospital_node.node import Node
from services.hospital_node.participate import Participation
from services.hospital_node.ports import Progress, Trainer
from services.hospital_node.store import Store
from wardround.admin.v1.admin_pb2_grpc import add_AlarmServiceServicer_to_server


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.hospital_node", description=__doc__)
    parser.add_argument("--config", required=True, type=Path)
    try:
        config = load_config(parser.parse_args(arguments).config)
        if config.threads:
            os.environ["OMP_NUM_THREADS"] = str(config.threads)  # read once, when torch is first imported
        return run(config, open_trainer)
    except ServiceError as error:
        return refused("hospital node", error)


def open_trainer(config: HospitalConfig) -> Trainer:
    """The trainer over the site's images; torch is imported here. Raises INVALID_DATA, NOT_FOUND for a missing GPU."""
    from services.hospital_node.dataset import check_folder

    check_folder(config.data)
    from services.hospital_node.trainer import SiteTrainer
    from services.hospital_node.training import Compute, open_device

    compute = Compute(config.device, config.threads, config.backbones)
    open_device(compute)
    return SiteTrainer(config.data, config.state, compute)


def run(
    config: HospitalConfig,
    make_trainer: Callable[[HospitalConfig], Trainer],
    checkpoint: Callable[[str], None] = lambda name: None,
) -> int:
    """Open everything, work until SIGTERM, close everything. Raises ServiceError before the work begins."""
    for number in (signal.SIGTERM, signal.SIGINT):  # before torch is imported: process 1 else ignores them
        signal.signal(number, lambda *_: sys.exit(0))
    configure("hospital", config.id, config.log_level)
    documents, clock = SiteDocuments(config), SystemClock()
    charter = next(iter(documents.charters().values()))
    documents.policy()
    signer = own_signer(config.identity_key, charter, config.id)
    caller = open_caller(config, Role.HOSPITAL, charter, clock)
    store = Store(config.state)
    trainer = make_trainer(config)
    health = Health(["store", "certificate", "loop"])
    metrics.hide_the_process()
    client = AggregatorClient(caller)

    def report(progress: Progress) -> None:
        board.show(progress)
        administration.show()
        metrics.show(progress)
        ledger.show(participation.ledger.mark().sequence, clock.now_ms())

    participation = Participation(
        config.id,
        signer,
        documents,
        client=client,
        store=store,
        models=BlobStore(config.state / "models", cache=True),
        trainer=trainer,
        clock=clock,
        report=report,
        checkpoint=checkpoint,
    )
    board = StatusBoard(config.id, participation.consent.figures)
    ledger = metrics.LedgerHead(participation.ledger.mark().sequence, store.last_receipt_ms())

    def look() -> None:
        policy = documents.policy()
        metrics.show_policy(policy)
        show_charters(tuple(documents.charters()))
        for entry in policy.document.studies:  # known and alerted on, whether or not the aggregator is there
            study = bytes.fromhex(entry.sha256)
            metrics.show_figures(study, participation.consent.figures(study))

    LOOK.watch(look)
    metrics.halted(bool(store.alarms()))
    node = Node(participation, client, documents, report)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.stop())
    administration = Administration(board.status, lambda study: evidence(store, participation.ledger, study))
    try:
        alarms = (add_AlarmServiceServicer_to_server, Alarms(store, clock, node.look_again))
        with reachable(config, Role.HOSPITAL, health, administration, clock, [alarms]):
            health.set("store", True, "ledger verified")
            health.set("loop", True, "connection loop up")
            health.start()
            node.run()
    finally:
        LOOK.forget(look)
        store.close()
    return 0


def own_signer(path: Path, charter: LoadedCharter, hospital: str) -> Signer:
    """The identity key, which must be the one that the charter lists. Raises INVALID_DOCUMENT."""
    signer = load_signer(path)
    if signer.public != charter.roster.hospital(hospital).key:
        raise ServiceError(
            Reason.INVALID_DOCUMENT,
            f"{path} is not the key that the pinned charter lists for {hospital}: give that one",
        )
    return signer


if __name__ == "__main__":
    sys.exit(main())
