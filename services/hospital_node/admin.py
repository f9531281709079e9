"""Administration on the Unix socket: status for people, evidence for `wardround verify`."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import grpc

from services.common.rpc.feed import Feed
from services.common.secagg.blob import encode
from services.hospital_node.ledger import Ledger
from services.hospital_node.ports import Progress
from services.hospital_node.store import Store
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

_BLOCK = 1 << 20


class StatusBoard:
    """The newest status, for askers and watchers. Thread-safe."""

    def __init__(self, hospital: str) -> None:
        self._hospital = hospital
        self._lock = threading.Lock()
        self._progress = Progress()
        self._watchers: list[Feed[admin_pb2.WatchStatusResponse]] = []

    def show(self, progress: Progress) -> None:
        """Take a copy and tell every watcher."""
        with self._lock:
            self._progress = replace(progress, figures=dict(progress.figures))
            self._watchers = [watcher for watcher in self._watchers if not watcher.ended]
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.replace(admin_pb2.WatchStatusResponse(status=self.status()))

    def watch(self, feed: Feed[admin_pb2.WatchStatusResponse]) -> None:
        """The status now and at every change."""
        with self._lock:
            self._watchers.append(feed)
        feed.replace(admin_pb2.WatchStatusResponse(status=self.status()))

    def status(self) -> admin_pb2.Status:
        """The newest status as it travels."""
        with self._lock:
            progress = self._progress
        return admin_pb2.Status(
            role="hospital",
            id=self._hospital,
            phase=progress.phase,
            study=progress.study,
            round=progress.round,
            attempt=progress.attempt,
            model_version=progress.model_version,
            detail=progress.detail,
            figures=progress.figures,
            finished=progress.phase == "finished",
        )


class Administration(admin_pb2_grpc.AdministrationServiceServicer):
    """GetStatus, WatchStatus, ExportEvidence."""

    def __init__(self, board: StatusBoard, store: Store, ledger: Ledger) -> None:
        self._board = board
        self._store = store
        self._ledger = ledger

    def GetStatus(  # noqa: N802  # generated name
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        """What the hospital is doing now."""
        return admin_pb2.GetStatusResponse(status=self._board.status())

    def WatchStatus(  # noqa: N802  # generated name
        self, request: admin_pb2.WatchStatusRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.WatchStatusResponse]:
        """The same at every change."""
        feed: Feed[admin_pb2.WatchStatusResponse] = Feed(context)
        self._board.watch(feed)
        yield from feed

    def ExportEvidence(  # noqa: N802  # generated name
        self, request: admin_pb2.ExportEvidenceRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb2.ExportEvidenceResponse]:
        """ledger.jsonl, receipts/RRRR-A.signed, left-out/RRRR-A.certificate; all studies when none is named.

        The ledger is one chain over all studies and always whole.
        """
        for path, data in evidence(self._store, self._ledger, request.study):
            for start in range(0, max(1, len(data)), _BLOCK):
                yield admin_pb2.ExportEvidenceResponse(
                    path=path if start == 0 else "", chunk=data[start : start + _BLOCK]
                )


def evidence(store: Store, ledger: Ledger, study: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of all that `wardround verify` checks; of one study when its digest is given."""
    yield "ledger.jsonl", "".join(line + "\n" for line in ledger.export()).encode()
    submissions = store.submissions(study) if study else store.all_submissions()
    for sent in submissions:
        if sent.receipt is not None:
            yield f"receipts/{sent.round:04d}-{sent.attempt}.signed", encode(sent.receipt)
    for round_number, attempt, certificate in store.left_out():
        yield f"left-out/{round_number:04d}-{attempt}.certificate", certificate
