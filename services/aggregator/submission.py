"""The one upload of a round (protocol.md §4 step 5): checked before anything is allocated, resumable by chunk.

P-7: identical again gets the same receipt, a different one is refused and counted; after the deadline or once the
cohort is being fixed it is late.
"""

import threading
from collections.abc import Iterator

import grpc

from services.aggregator import facts as f
from services.aggregator import metrics
from services.aggregator.coordinator import Coordinator, Snapshot
from services.aggregator.round import Answer, Phase
from services.aggregator.store import Store
from services.aggregator.vectors import Upload
from services.common.errors import Reason, ServiceError
from services.common.rpc.interceptor import peer
from services.common.rpc.signed import from_wire, to_wire
from services.common.secagg import blob as codec
from services.common.secagg.certificate import CheckedManifest, check_box, check_header
from services.common.secagg.digests import vector_digest
from services.common.secagg.messages import Header, Receipt, Signed
from services.common.secagg.ring import chunk_lengths
from services.common.secagg.signing import Signer, digest
from wardround.submission.v1 import submission_pb2, submission_pb2_grpc

_MOST_BOX = 4096 + 32 * 64
_OUTCOMES = {Reason.CONFLICT: "conflict", Reason.LATE: "late"}


class UpdateSubmission(submission_pb2_grpc.UpdateSubmissionServiceServicer):
    """Uploads in progress live in files and in `_uploads`; a submission stands once the coordinator took it."""

    def __init__(self, coordinator: Coordinator, store: Store, signer: Signer) -> None:
        self._coordinator = coordinator
        self._store = store
        self._signer = signer
        self._lock = threading.Lock()
        self._uploads: dict[bytes, Upload] = {}
        self._place = (0, 0)

    def UploadStatus(  # noqa: N802, D102  # gRPC's names
        self, request: submission_pb2.UploadStatusRequest, context: grpc.ServicerContext
    ) -> submission_pb2.UploadStatusResponse:
        snapshot = self._coordinator.snapshot
        state, caller = snapshot.state, peer(context)
        if not state.manifest or request.manifest != state.M:
            raise ServiceError(Reason.LATE, "this manifest is not open any more: fetch the newest one")
        done = state.submissions.get(caller.id)
        if done is not None and done.header_digest == request.header:
            return submission_pb2.UploadStatusResponse(
                next_chunk=len(chunk_lengths(snapshot.run.total_bytes)), receipt=to_wire(done.receipt)
            )
        with self._lock:
            upload = self._uploads.get(request.header)
        # Without one in memory (this process is new) the opening message says which chunks are good: start over.
        return submission_pb2.UploadStatusResponse(next_chunk=upload.next_chunk if upload is not None else 0)

    def SubmitUpdate(  # noqa: N802, D102
        self, request_iterator: Iterator[submission_pb2.SubmitUpdateRequest], context: grpc.ServicerContext
    ) -> submission_pb2.SubmitUpdateResponse:
        try:
            with metrics.SUBMIT_SECONDS.time():
                receipt, outcome = self._submit(request_iterator, peer(context).id)
        except ServiceError as error:
            metrics.SUBMISSIONS.labels(_OUTCOMES.get(error.reason, "refused")).inc()
            raise
        metrics.SUBMISSIONS.labels(outcome).inc()
        return submission_pb2.SubmitUpdateResponse(receipt=to_wire(receipt))

    def _submit(self, parts: Iterator[submission_pb2.SubmitUpdateRequest], caller: str) -> tuple[Signed, str]:
        first = next(parts, None)
        if first is None or first.WhichOneof("part") != "open":
            raise ServiceError(Reason.MALFORMED, "an upload begins with its opening message")
        snapshot = self._coordinator.snapshot
        checked = self._manifest(snapshot, first.open)
        header, signed = self._check_open(first.open, checked, caller)
        name = digest("header", signed.blob)
        done = snapshot.state.submissions.get(caller)
        if done is not None:
            if done.header_digest == name:
                return done.receipt, "repeated"
            raise ServiceError(
                Reason.CONFLICT, f"{caller} submitted another update for this manifest already (P-7): only one counts"
            )
        if snapshot.state.phase is not Phase.COLLECTING or self._coordinator.now() > snapshot.state.deadline:
            raise ServiceError(
                Reason.LATE, f"round {checked.core.round} attempt {checked.proposal.attempt} takes no more: wait"
            )
        place = (checked.core.round, checked.proposal.attempt)
        upload = self._upload(place, name, checked, first.open)
        if not upload.lock.acquire(blocking=False):
            raise ServiceError(Reason.UNREACHABLE, "this update is being uploaded by another call: wait for its end")
        try:
            self._receive(upload, first.open.first_chunk, parts)
            upload.seal(first.open.SerializeToString())
            receipt = self._stand(checked, header, signed, name)
        except FileNotFoundError:
            raise ServiceError(Reason.LATE, "the attempt ended during the upload: wait for the next one") from None
        finally:
            upload.lock.release()
        return receipt, "received"

    def _manifest(self, snapshot: Snapshot, opening: submission_pb2.SubmissionOpen) -> CheckedManifest:
        """The open manifest, if the header is for it; LATE for one that was or is no longer."""
        state = snapshot.state
        if not state.manifest or state.M not in opening.header.blob[:64]:
            raise ServiceError(Reason.LATE, "the header is for a manifest that is not open: fetch the newest one")
        return snapshot.run.manifest(state)

    def _check_open(
        self, opening: submission_pb2.SubmissionOpen, checked: CheckedManifest, caller: str
    ) -> tuple[Header, Signed]:
        """Signature, roster, M, and every announced size, before a byte is allocated for it."""
        signed = from_wire(opening.header)
        header = check_header(signed, checked)
        if header.hospital != caller:
            raise ServiceError(Reason.NOT_PERMITTED, f"{caller} may not submit for {header.hospital}")
        if len(opening.boxes) != len(header.boxes):
            raise ServiceError(Reason.MALFORMED, f"{len(opening.boxes)} boxes, the header names {len(header.boxes)}")
        for box, named in zip(opening.boxes, header.boxes, strict=True):
            if len(box) > _MOST_BOX:
                raise ServiceError(Reason.TOO_LARGE, f"a box of {len(box)} bytes, at most {_MOST_BOX}")
            check_box(header, named.pod, box)
        total = checked.table.total_bytes
        if len(opening.chunk_digests) != 32 * len(chunk_lengths(total)):
            raise ServiceError(
                Reason.MALFORMED, f"{len(opening.chunk_digests)} bytes of chunk digests do not fit the manifest"
            )
        if vector_digest(total, _split(opening.chunk_digests)) != header.vector:
            raise ServiceError(Reason.BAD_DIGEST, "the chunk digests are not those of the vector in the header")
        return header, signed

    def _upload(
        self, place: tuple[int, int], name: bytes, checked: CheckedManifest, opening: submission_pb2.SubmissionOpen
    ) -> Upload:
        with self._lock:
            if self._place != place:
                self._uploads, self._place = {}, place
            upload = self._uploads.get(name)
            if upload is None:
                path = self._store.vectors.submission(*place, name)
                upload = Upload(path, checked.table.total_bytes, _split(opening.chunk_digests))
                upload.resume()
                self._uploads[name] = upload
            return upload

    def _receive(self, upload: Upload, first_chunk: int, parts: Iterator[submission_pb2.SubmitUpdateRequest]) -> None:
        if first_chunk > upload.next_chunk:
            raise ServiceError(
                Reason.MALFORMED,
                f"the upload goes on at chunk {upload.next_chunk}, not {first_chunk}: ask UploadStatus",
            )
        upload.next_chunk = first_chunk
        for part in parts:
            if part.WhichOneof("part") != "chunk":
                raise ServiceError(Reason.MALFORMED, "only chunks follow the opening message")
            upload.append(part.chunk.index, part.chunk.data)
        if not upload.complete:
            raise ServiceError(
                Reason.MALFORMED,
                f"the upload ended after {upload.next_chunk} of {len(upload.digests)} chunks: resume it",
            )

    def _stand(self, checked: CheckedManifest, header: Header, signed: Signed, name: bytes) -> Signed:
        at = self._coordinator.now()
        receipt = self._signer.sign(
            "receipt", codec.encode(Receipt(checked.M, header.hospital, name, header.vector, at))
        )
        fact = f.Submitted(at, header.hospital, signed, name, header.vector, receipt)
        self._coordinator.tell(Answer(checked.M, fact))
        return receipt


def _split(digests: bytes) -> tuple[bytes, ...]:
    return tuple(digests[start : start + 32] for start in range(0, len(digests), 32))
