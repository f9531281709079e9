"""The hospital's side of the wire: every call it ever makes, each to the one aggregator that it dials.

Wire types end here; the rest of the hospital sees exact bytes and frozen dataclasses, nothing of them checked
yet (attempt.py does that). Every call has a deadline and is safe to repeat.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from services.common.errors import Reason, ServiceError
from services.common.rpc.channel import Caller, Stream, stub
from services.common.rpc.signed import from_wire, to_wire
from services.common.secagg.messages import Signed
from services.common.store.blobs import Partial
from wardround.model.v1 import model_pb2, model_pb2_grpc
from wardround.round.v1 import round_pb2, round_pb2_grpc
from wardround.submission.v1 import submission_pb2, submission_pb2_grpc

_SECONDS = 30.0
_TRANSFER_SECONDS = 3600.0
_WATCH_SECONDS = 6 * 3600.0


class Phase(IntEnum):
    """What the aggregator says a round is doing; the numbers are the wire's."""

    UNSPECIFIED = round_pb2.ROUND_PHASE_UNSPECIFIED
    IDLE = round_pb2.ROUND_PHASE_IDLE
    TRAINING = round_pb2.ROUND_PHASE_TRAINING
    COLLECTING = round_pb2.ROUND_PHASE_COLLECTING
    CLOSING = round_pb2.ROUND_PHASE_CLOSING
    FINISHED = round_pb2.ROUND_PHASE_FINISHED


@dataclass(frozen=True)
class ManifestAnswer:
    """Exact bytes of a manifest, its endorsements, and blobs of abandon certificates of earlier attempts."""

    manifest: bytes
    endorsements: tuple[Signed, ...]
    abandons: tuple[bytes, ...]


@dataclass(frozen=True)
class ResultAnswer:
    """One link of the chain of signed results; `certificate` is the blob of its cohort certificate."""

    result: Signed
    manifest: bytes
    endorsements: tuple[Signed, ...]
    certificate: bytes


@dataclass(frozen=True)
class RoundState:
    """The aggregator's present claim; digests are 32 bytes or empty. Nothing rests on it that is not checked.

    `endorsed` and `newest_result` are what would be asked for next, where they came along; the latter is for whoever
    holds the results through round `newest_result_after`.
    """

    phase: Phase
    charter: bytes
    study: bytes
    round: int
    attempt: int
    model: bytes
    model_bytes: int
    previous_result: bytes
    manifest: bytes
    phase_ends: int
    closed_round: int
    endorsed: ManifestAnswer | None = field(default=None, repr=False)
    newest_result: ResultAnswer | None = field(default=None, repr=False)
    newest_result_after: int = 0


@dataclass(frozen=True)
class Upload:
    """All that one submission sends: header, boxes in the header's order, the digests of y's chunks."""

    header: Signed
    boxes: tuple[bytes, ...] = field(repr=False)
    chunk_digests: tuple[bytes, ...] = field(repr=False)


class AggregatorClient:
    """Calls to the aggregator. Every method raises ServiceError with the aggregator's own reason, or UNREACHABLE."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def watch(self, charters: Sequence[bytes]) -> Stream[round_pb2.WatchRoundsResponse]:
        """The state now and at every change, each to be read with `round_state`; `charters` are the pinned digests."""
        return self._caller.stream(
            lambda channel: stub(round_pb2_grpc.RoundCoordinationServiceStub, channel).WatchRounds,
            round_pb2.WatchRoundsRequest(charters=charters),
            seconds=_WATCH_SECONDS,
        )

    def study(self, digest: bytes) -> bytes:
        """The bytes of a study; the caller checks their SHA-256."""
        return self._caller.unary(
            lambda channel: stub(round_pb2_grpc.RoundCoordinationServiceStub, channel).GetStudy,
            round_pb2.GetStudyRequest(digest=digest),
            seconds=_SECONDS,
        ).study

    def fetch_model(self, digest: bytes, partial: Partial, limit: int) -> bytes:
        """Complete `partial` to the model file of this digest, from where an earlier life came to.

        Returns the digest, checked. Raises BAD_DIGEST (what had arrived is dropped) and TOO_LARGE beyond `limit` bytes.
        """
        request = model_pb2.FetchModelRequest(digest=digest, offset=partial.length)
        with self._caller.stream(
            lambda channel: stub(model_pb2_grpc.ModelDistributionServiceStub, channel).FetchModel,
            request,
            seconds=_TRANSFER_SECONDS,
        ) as answers:
            for answer in answers:
                if max(answer.total, partial.length + len(answer.chunk)) > limit:
                    partial.discard()
                    raise ServiceError(
                        Reason.TOO_LARGE,
                        f"model {digest.hex()[:12]}… has more than the {limit} bytes that the study allows: not taken",
                    )
                partial.append(answer.chunk)
        try:
            return partial.finish(digest)
        except ServiceError as error:
            if error.reason is Reason.BAD_DIGEST:
                partial.discard()
            raise

    def manifest(self, study: bytes, round_number: int) -> ManifestAnswer:
        """The newest endorsed manifest of a round."""
        answer = self._caller.unary(
            lambda channel: stub(round_pb2_grpc.RoundCoordinationServiceStub, channel).GetManifest,
            round_pb2.GetManifestRequest(study=study, round=round_number),
            seconds=_SECONDS,
        )
        return _manifest_answer(answer)

    def results(self, study: bytes, after_round: int) -> tuple[ResultAnswer, ...]:
        """The results after the one that the caller holds, oldest first; perhaps not all at once."""
        answer = self._caller.unary(
            lambda channel: stub(round_pb2_grpc.RoundCoordinationServiceStub, channel).ListResults,
            round_pb2.ListResultsRequest(study=study, after_round=after_round),
            seconds=_SECONDS,
        )
        return tuple(map(_result_answer, answer.links))

    def decline(self, study: bytes, round_number: int, reason: Reason) -> None:
        """Say that this hospital stays out; never for a reason that depends on patients' data (P-6)."""
        self._caller.unary(
            lambda channel: stub(round_pb2_grpc.RoundCoordinationServiceStub, channel).DeclineRound,
            round_pb2.DeclineRoundRequest(study=study, round=round_number, reason=reason.value),
            seconds=_SECONDS,
        )

    def upload_status(self, manifest: bytes, header_digest: bytes) -> tuple[int, Signed | None]:
        """(chunks that the aggregator holds of this very header's y, the receipt once it holds all)."""
        answer = self._caller.unary(
            lambda channel: stub(submission_pb2_grpc.UpdateSubmissionServiceStub, channel).UploadStatus,
            submission_pb2.UploadStatusRequest(manifest=manifest, header=header_digest),
            seconds=_SECONDS,
        )
        return answer.next_chunk, from_wire(answer.receipt) if answer.HasField("receipt") else None

    def submit(self, upload: Upload, first_chunk: int, chunks: Iterator[bytes]) -> Signed:
        """Send the header and y's chunks from `first_chunk` on; the receipt, not yet checked."""

        def requests() -> Iterator[submission_pb2.SubmitUpdateRequest]:
            yield submission_pb2.SubmitUpdateRequest(
                open=submission_pb2.SubmissionOpen(
                    header=to_wire(upload.header),
                    boxes=upload.boxes,
                    chunk_digests=b"".join(upload.chunk_digests),
                    first_chunk=first_chunk,
                )
            )
            for index, chunk in enumerate(chunks, first_chunk):
                yield submission_pb2.SubmitUpdateRequest(chunk=submission_pb2.SubmissionChunk(index=index, data=chunk))

        answer = self._caller.upload(
            lambda channel: stub(submission_pb2_grpc.UpdateSubmissionServiceStub, channel).SubmitUpdate,
            requests(),
            seconds=_TRANSFER_SECONDS,
        )
        return from_wire(answer.receipt)

    def close(self) -> None:
        """End every call, also those of other threads."""
        self._caller.close()


def round_state(answer: round_pb2.WatchRoundsResponse) -> RoundState:
    """The claim as the hospital reads it. Raises MALFORMED for a digest that is none."""
    known = {phase.value for phase in Phase}
    for name in ("charter", "study", "model", "previous_result", "manifest"):
        if len(getattr(answer, name)) not in (0, 32):
            raise ServiceError(Reason.MALFORMED, f"the aggregator's state has a {name} that is no SHA-256")
    return RoundState(
        Phase(answer.phase) if answer.phase in known else Phase.UNSPECIFIED,
        answer.charter,
        answer.study,
        answer.round,
        answer.attempt,
        answer.model,
        answer.model_bytes,
        answer.previous_result,
        answer.manifest,
        answer.phase_ends,
        answer.closed_round,
        _manifest_answer(answer.endorsed) if answer.HasField("endorsed") else None,
        _result_answer(answer.newest_result) if answer.HasField("newest_result") else None,
        answer.newest_result_after,
    )


def _manifest_answer(answer: round_pb2.GetManifestResponse) -> ManifestAnswer:
    return ManifestAnswer(answer.manifest, tuple(map(from_wire, answer.endorsements)), tuple(answer.abandons))


def _result_answer(link: round_pb2.ResultLink) -> ResultAnswer:
    return ResultAnswer(
        from_wire(link.result), link.manifest, tuple(map(from_wire, link.endorsements)), link.certificate
    )
