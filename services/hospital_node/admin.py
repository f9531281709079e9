"""What the Unix socket shows: status for people, evidence for `wardround verify`."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from services.common.errors import ServiceError
from services.common.rpc.administration import Files
from services.common.secagg.blob import encode
from services.hospital_node.ledger import Ledger
from services.hospital_node.ports import Progress
from services.hospital_node.store import Store
from wardround.admin.v1 import admin_pb2


class StatusBoard:
    """The newest status; `epsilon` gives what a study and the data set have spent. Thread-safe."""

    def __init__(self, hospital: str, epsilon: Callable[[bytes], dict[str, float]]) -> None:
        self._hospital = hospital
        self._epsilon = epsilon
        self._lock = threading.Lock()
        self._progress = Progress()

    def show(self, progress: Progress) -> None:
        """Take a copy."""
        with self._lock:
            self._progress = replace(progress, figures=dict(progress.figures))

    def status(self) -> admin_pb2.Status:
        """The newest status as it travels."""
        with self._lock:
            progress = self._progress
        figures = dict(progress.figures)
        if progress.study:
            with suppress(ServiceError):  # a policy that cannot be used: nothing is left by it, and `detail` names it
                figures |= self._epsilon(progress.study)
        return admin_pb2.Status(
            role="hospital",
            id=self._hospital,
            phase=progress.phase,
            study=progress.study,
            round=progress.round,
            attempt=progress.attempt,
            model_version=progress.model_version,
            detail=progress.detail,
            figures=figures,
            finished=progress.phase == "finished",
        )


def evidence(store: Store, ledger: Ledger, study: bytes) -> Files:
    """All that `wardround verify` checks; of one study when its digest is given."""
    yield "ledger.jsonl", ["".join(line + "\n" for line in ledger.export()).encode()]
    submissions = store.submissions(study) if study else store.all_submissions()
    for sent in submissions:
        if sent.receipt is not None:
            yield f"receipts/{sent.round:04d}-{sent.attempt}.signed", [encode(sent.receipt)]
    for round_number, attempt, certificate in store.left_out():
        yield f"left-out/{round_number:04d}-{attempt}.certificate", [certificate]
