"""What key-share pods call: the Watch stream, the offer, and one answer for each order (protocol.md §4, P-11).

An answer is matched to its command, verified here (signature, M, cohort, piece), then told to the coordinator. One
that does not hold counts as a refusal of that order, so the pod is not waited for.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc

from services.aggregator import facts as f
from services.aggregator import metrics
from services.aggregator.coordinator import Coordinator, Snapshot
from services.aggregator.orders import Key
from services.aggregator.round import Answer, Phase, State, subject
from services.aggregator.store import Store
from services.aggregator.vectors import PieceFile
from services.common.errors import Reason, ServiceError
from services.common.rpc.feed import Feed
from services.common.rpc.interceptor import peer
from services.common.rpc.signed import from_wire
from services.common.secagg.certificate import (
    CheckedManifest,
    check_commitment,
    check_proposal,
    open_round_signed,
)
from services.common.secagg.messages import (
    Abandon,
    AcceptList,
    Commitment,
    Endorsement,
    HighWaterMark,
    Lock,
    PieceSum,
    Signed,
)
from services.common.secagg.ring import chunk_lengths
from services.common.secagg.signing import open_signed
from wardround.keyshare.v1 import keyshare_pb2, keyshare_pb2_grpc

_OFFER_PHASES = (Phase.OFFERING, Phase.LOCKING, Phase.RELEASING, Phase.VERIFIED)


class KeyShare(keyshare_pb2_grpc.KeyShareServiceServicer):
    """Servicer of the pods. Every answer is idempotent: told twice, it stands once."""

    def __init__(self, coordinator: Coordinator, store: Store, identity: Callable[[], Mapping[str, bytes]]) -> None:
        """`identity` gives the pods' identity keys of the charter in force."""
        self._coordinator = coordinator
        self._committee = coordinator.committee
        self._store = store
        self._identity = identity

    def Watch(  # noqa: N802, D102  # gRPC's names
        self, request: keyshare_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[keyshare_pb2.WatchResponse]:
        pod = peer(context).id
        if not 1 <= len(request.boot) <= 64:
            raise ServiceError(Reason.MALFORMED, "boot must be 1 to 64 bytes, drawn at the pod's start")
        feed = Feed[keyshare_pb2.WatchResponse](context)
        self._committee.join(pod, feed, request.boot, request.live, tuple(request.charters[:4]))
        try:
            yield from feed
        finally:
            feed.close()
            self._committee.left()

    def FetchOffer(  # noqa: N802, D102
        self, request: keyshare_pb2.FetchOfferRequest, context: grpc.ServicerContext
    ) -> Iterator[keyshare_pb2.FetchOfferResponse]:
        snapshot, pod = self._coordinator.snapshot, peer(context).id
        state = snapshot.state
        if request.manifest != state.M or state.phase not in _OFFER_PHASES:
            raise ServiceError(Reason.WRONG_PHASE, "there is no offer for this manifest now: wait for the order")
        if pod not in state.pods:
            raise ServiceError(Reason.NOT_PERMITTED, f"{pod} is not in this manifest: wait for the next attempt")
        yield from snapshot.run.offered(state, pod)

    def Commit(  # noqa: N802, D102
        self, request: keyshare_pb2.CommitRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.CommitResponse:
        self._answer(request, context, ("commit",), request.commitment, self._commitment)
        return keyshare_pb2.CommitResponse()

    def Endorse(  # noqa: N802, D102
        self, request: keyshare_pb2.EndorseRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.EndorseResponse:
        self._answer(request, context, ("endorse",), request.endorsement, self._endorsement)
        return keyshare_pb2.EndorseResponse()

    def Accept(  # noqa: N802, D102
        self, request: keyshare_pb2.AcceptRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.AcceptResponse:
        refused = tuple((refusal.hospital[:63], refusal.reason[:32]) for refusal in request.refused[:4096])

        def listed(snapshot: Snapshot, pod: str, signed: Signed, at: int) -> f.Fact:
            message = _open(AcceptList, "accept", signed, snapshot, pod)
            pairs = tuple((entry.hospital, entry.header) for entry in message.accepted)
            return f.Listed(at, pod, signed, pairs, refused)

        self._answer(request, context, ("offer",), request.accept_list, listed)
        return keyshare_pb2.AcceptResponse()

    def Lock(  # noqa: N802, D102
        self, request: keyshare_pb2.LockRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.LockResponse:
        self._answer(request, context, ("lock",), request.lock, self._lock)
        return keyshare_pb2.LockResponse()

    def Abandon(  # noqa: N802, D102
        self, request: keyshare_pb2.AbandonRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.AbandonResponse:
        self._answer(request, context, ("abandon",), request.abandon, self._abandon)
        return keyshare_pb2.AbandonResponse()

    def Digest(  # noqa: N802, D102
        self, request: keyshare_pb2.DigestRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.DigestResponse:
        pod, command = peer(context).id, request.command
        key = self._key(pod, command, ("digest",))
        if request.HasField("refusal"):
            self._refused(pod, command, request.refusal)
            return keyshare_pb2.DigestResponse()
        with self._holding(pod, command):
            snapshot = self._current(key)
            claims = [self._claim(snapshot, pod, from_wire(wire), released=False) for wire in request.piece_sums[:64]]
            self._tell_claims(snapshot, claims)
        return keyshare_pb2.DigestResponse()

    def Release(  # noqa: N802, D102
        self, request_iterator: Iterator[keyshare_pb2.ReleaseRequest], context: grpc.ServicerContext
    ) -> keyshare_pb2.ReleaseResponse:
        pod = peer(context).id
        first = next(request_iterator, None)
        if first is None:
            raise ServiceError(Reason.MALFORMED, "a release begins with its command number")
        key = self._key(pod, first.command, ("release",))
        with self._holding(pod, first.command):
            self._release(pod, first.command, self._current(key), self._after(first, request_iterator))
        return keyshare_pb2.ReleaseResponse()

    def HighWater(  # noqa: N802, D102
        self, request: keyshare_pb2.HighWaterRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.HighWaterResponse:
        pod, command = peer(context).id, request.command
        key = self._key(pod, command, ("nonce", "mark", "deliver"))
        answer = request.WhichOneof("answer")
        if answer == "refusal":
            self._refused(pod, command, request.refusal)
        elif (key[0], answer) == ("nonce", "nonce") and len(request.nonce) == 32:
            self._committee.took_nonce(pod, request.nonce)
        elif (key[0], answer) == ("mark", "mark"):
            with self._holding(pod, command):
                self._mark(pod, key, from_wire(request.mark))
        elif (key[0], answer) == ("deliver", "live") and request.live:
            self._committee.took_live(pod, self._coordinator.now())
        else:
            raise ServiceError(Reason.MALFORMED, f"this is no answer to {key[0]}")
        return keyshare_pb2.HighWaterResponse()

    def Close(  # noqa: N802, D102
        self, request: keyshare_pb2.CloseRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.CloseResponse:
        pod = peer(context).id
        self._key(pod, request.command, ("close",))
        if request.HasField("refusal"):
            self._refused(pod, request.command, request.refusal)
        return keyshare_pb2.CloseResponse()

    def Greet(  # noqa: N802, D102
        self, request: keyshare_pb2.GreetRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.GreetResponse:
        held = self._coordinator.snapshot.run.charters().values()
        return keyshare_pb2.GreetResponse(time_ms=self._coordinator.now(), charters=held)

    def _answer(
        self,
        request: Any,
        context: grpc.ServicerContext,
        kinds: tuple[str, ...],
        wire: Any,
        read: Callable[[Snapshot, str, Signed, int], f.Fact],
    ) -> None:
        """One signed answer: match, verify, tell. Raises what the coordinator says, or why it does not hold."""
        pod, command = peer(context).id, request.command
        key = self._key(pod, command, kinds)
        if request.WhichOneof("answer") == "refusal":
            self._refused(pod, command, request.refusal)
            return
        with self._holding(pod, command):
            snapshot = self._current(key)
            fact = read(snapshot, pod, from_wire(wire), self._coordinator.now())
            self._coordinator.tell(Answer(subject(snapshot.state), fact))

    def _key(self, pod: str, command: int, kinds: tuple[str, ...]) -> Key:
        key = self._committee.asked(pod, command)
        if key[0] not in kinds:
            raise ServiceError(Reason.MALFORMED, f"command {command} asked {key[0]}, not {kinds[0]}")
        return key

    def _current(self, key: Key) -> Snapshot:
        """The published state, if the order is still about it. Raises WRONG_PHASE."""
        snapshot = self._coordinator.snapshot
        if subject(snapshot.state).hex() != key[1]:
            raise ServiceError(Reason.WRONG_PHASE, f"the attempt that {key[0]} was about is over")
        return snapshot

    def _refused(self, pod: str, command: int, refusal: keyshare_pb2.Refusal) -> None:
        self._committee.refuse(pod, command, refusal.reason, refusal.detail, self._coordinator.now())

    def _holding(self, pod: str, command: int) -> "_Holding":
        return _Holding(self, pod, command)

    def _commitment(self, snapshot: Snapshot, pod: str, signed: Signed, at: int) -> f.Fact:
        state = snapshot.state
        if state.phase is not Phase.PROPOSED or state.proposal is None:
            raise ServiceError(Reason.WRONG_PHASE, "commitments are not asked for now")
        checked = check_proposal(state.proposal, snapshot.run.rules.roster)
        commitment = open_signed(Commitment, "commit", signed, self._identity()[pod])
        _same(commitment.pod, pod)
        check_commitment(commitment, checked)
        return f.Committed(at, pod, signed)

    def _endorsement(self, snapshot: Snapshot, pod: str, signed: Signed, at: int) -> f.Fact:
        _open(Endorsement, "endorse", signed, snapshot, pod)
        return f.Endorsed(at, pod, signed)

    def _lock(self, snapshot: Snapshot, pod: str, signed: Signed, at: int) -> f.Fact:
        lock, state = _open(Lock, "lock", signed, snapshot, pod), snapshot.state
        if (lock.cohort, lock.size) != (state.cohort_digest, len(state.members)):
            raise ServiceError(Reason.CONFLICT, f"{pod} locked another cohort than the one it was asked for")
        return f.Locked(at, pod, signed)

    def _abandon(self, snapshot: Snapshot, pod: str, signed: Signed, at: int) -> f.Fact:
        abandon, state = open_signed(Abandon, "abandon", signed, self._identity()[pod]), snapshot.state
        _same(abandon.pod, pod)
        asked = (state.charter, snapshot.run.study.digest, state.round, state.attempt, state.M)
        if (abandon.charter, abandon.study, abandon.round, abandon.attempt, abandon.manifest) != asked:
            raise ServiceError(Reason.WRONG_CORE, f"{pod} gave up another attempt than the one it was asked for")
        return f.AbandonSigned(at, pod, signed)

    def _mark(self, pod: str, key: Key, signed: Signed) -> None:
        mark = open_signed(HighWaterMark, "highwater", signed, self._identity()[pod])
        _same(mark.answering, pod)
        if (mark.nonce.hex(), mark.asking) != (key[1], key[2]):
            raise ServiceError(Reason.WRONG_CORE, f"{pod} answered with a mark for another nonce or pod")
        self._committee.took_mark(mark.asking, pod, mark.nonce, signed)

    def _claim(self, snapshot: Snapshot, pod: str, signed: Signed, released: bool) -> f.Claimed:
        found: PieceSum = _open(PieceSum, "release", signed, snapshot, pod)
        _check_range(found, snapshot)
        return f.Claimed(self._coordinator.now(), pod, found.piece, found.vector, signed, released)

    def _tell_claims(self, snapshot: Snapshot, claims: list[f.Claimed]) -> None:
        try:
            self._coordinator.tell(*(Answer(snapshot.state.M, claim) for claim in claims))
        except ServiceError as error:
            if error.reason is Reason.CONFLICT:
                metrics.POD_FAULTS.labels("two_digests").inc()
            raise

    def _after(
        self, first: keyshare_pb2.ReleaseRequest, rest: Iterator[keyshare_pb2.ReleaseRequest]
    ) -> Iterator[keyshare_pb2.ReleaseRequest]:
        """The parts of a release: the first message may carry one beside the command number."""
        if first.WhichOneof("answer") is not None:
            yield first
        yield from rest

    def _release(
        self, pod: str, command: int, snapshot: Snapshot, parts: Iterator[keyshare_pb2.ReleaseRequest]
    ) -> None:
        state, total = snapshot.state, snapshot.run.total_bytes
        pending: tuple[int, PieceFile] | None = None
        claims: list[f.Claimed] = []
        try:
            for part in parts:
                kind = part.WhichOneof("answer")
                if kind == "refusal":
                    self._refused(pod, command, part.refusal)
                    return
                if kind == "chunk":
                    if pending is None:
                        _check_asked(state, pod, part.chunk.piece)
                        path = self._store.vectors.piece(state.round, state.attempt, pod, part.chunk.piece)
                        pending = part.chunk.piece, PieceFile(path, total)
                    if part.chunk.piece != pending[0]:
                        raise ServiceError(
                            Reason.MALFORMED, f"a chunk of piece {part.chunk.piece} inside another piece"
                        )
                    pending[1].append(part.chunk.index, part.chunk.data)
                elif kind == "piece_sum":
                    said = self._claim(snapshot, pod, from_wire(part.piece_sum), released=pending is not None)
                    if pending is not None:
                        if said.piece != pending[0]:
                            raise ServiceError(
                                Reason.MALFORMED, f"piece {said.piece} signed after the chunks of {pending[0]}"
                            )
                        pending[1].finish(said.vector)
                        pending = None
                    elif state.asked.get((pod, said.piece)) is not False:
                        raise ServiceError(Reason.MALFORMED, f"the sum of piece {said.piece} was signed, not sent")
                    claims.append(said)
                else:
                    raise ServiceError(Reason.MALFORMED, "a release is chunks, then the piece's signed digest")
        except FileNotFoundError:
            raise ServiceError(Reason.WRONG_PHASE, "the attempt that the release was about is over") from None
        finally:
            if pending is not None:
                pending[1].close()
        self._coordinator.holds(state.M, pod, [claim.piece for claim in claims if claim.released])
        self._tell_claims(snapshot, claims)


class _Holding:
    """Inside it, an answer that does not hold counts as a refusal of its order; the pod is told as well.

    One that we could not store is a passing refusal: it is asked for again.
    """

    def __init__(self, servicer: KeyShare, pod: str, command: int) -> None:
        self._servicer = servicer
        self._pod = pod
        self._command = command

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ServiceError) and error.reason is not Reason.WRONG_PHASE:
            refusal = keyshare_pb2.Refusal(reason=error.reason.value, detail=error.detail)
            self._servicer._refused(self._pod, self._command, refusal)


def _open(cls: type[Any], name: str, signed: Signed, snapshot: Snapshot, pod: str) -> Any:
    checked: CheckedManifest = snapshot.run.manifest(snapshot.state)
    _, message = open_round_signed(cls, name, signed, checked)
    _same(message.pod, pod)
    return message


def _same(named: str, pod: str) -> None:
    if named != pod:
        raise ServiceError(Reason.NOT_PERMITTED, f"{pod} may not answer for {named}")


def _check_asked(state: State, pod: str, piece: int) -> None:
    if not state.asked.get((pod, piece)):
        raise ServiceError(Reason.MALFORMED, f"{pod} was not asked for the sum of piece {piece}")


def _check_range(said: PieceSum, snapshot: Snapshot) -> None:
    state = snapshot.state
    whole = (state.cohort_digest, 0, len(chunk_lengths(snapshot.run.total_bytes)))
    if (said.cohort, said.first_chunk, said.chunks) != whole:
        raise ServiceError(Reason.WRONG_CORE, f"{said.pod} signed a sum over another cohort or range")
