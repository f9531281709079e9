"""What key-share pods call: Watch, on which orders go down and answers come up, and the offer (protocol.md §4, P-11).

An answer is matched to its command, verified here (signature, M, cohort, piece), then told to the coordinator. One
that does not hold counts as a refusal of that order, so the pod is not waited for.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import grpc

from services.aggregator import facts as f
from services.aggregator import metrics
from services.aggregator.coordinator import Coordinator, Snapshot
from services.aggregator.orders import Key
from services.aggregator.round import Answer as RoundAnswer
from services.aggregator.round import Phase, State, subject
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

_log = logging.getLogger(__name__)
_OFFER_PHASES = (Phase.OFFERING, Phase.LOCKING, Phase.RELEASING, Phase.VERIFIED)
_ANSWERS = {
    "commit": "commitment",
    "endorse": "endorsement",
    "offer": "accepted",
    "lock": "lock",
    "abandon": "abandon",
    "close": "refusal",  # met before it is judged; that it was done is no news
    "nonce": "nonce",
    "mark": "mark",
    "deliver": "live",
}
"""What answers an order of each kind; one for a release or for digests has several parts."""
_MOST_REFUSED = 4096  # hospitals that one answer may leave out

Answers = Iterator[keyshare_pb2.Answer]


class KeyShare(keyshare_pb2_grpc.KeyShareServiceServicer):
    """Servicer of the pods. Every answer is idempotent: told twice, it stands once."""

    def __init__(self, coordinator: Coordinator, store: Store, identity: Callable[[], Mapping[str, bytes]]) -> None:
        """`identity` gives the pods' identity keys of the charter in force."""
        self._coordinator = coordinator
        self._committee = coordinator.committee
        self._store = store
        self._identity = identity

    def Watch(  # noqa: N802, D102  # gRPC's names
        self, request_iterator: Iterator[keyshare_pb2.WatchRequest], context: grpc.ServicerContext
    ) -> Iterator[keyshare_pb2.WatchResponse]:
        pod, first = peer(context).id, next(request_iterator, keyshare_pb2.WatchRequest())
        if not 1 <= len(first.hello.boot) <= 64:
            raise ServiceError(Reason.MALFORMED, "a pod begins with hello; boot is 1 to 64 bytes, drawn at its start")
        feed = Feed[keyshare_pb2.WatchResponse](context)
        self._committee.join(pod, feed, first.hello.boot, first.hello.live, tuple(first.hello.charters[:4]))
        listener = threading.Thread(
            target=self._listen, args=(pod, request_iterator, feed), daemon=True, name="answers"
        )
        listener.start()
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

    def Greet(  # noqa: N802, D102
        self, request: keyshare_pb2.GreetRequest, context: grpc.ServicerContext
    ) -> keyshare_pb2.GreetResponse:
        held = self._coordinator.snapshot.run.charters().values()
        return keyshare_pb2.GreetResponse(time_ms=self._coordinator.now(), charters=held)

    def _listen(
        self, pod: str, requests: Iterator[keyshare_pb2.WatchRequest], feed: Feed[keyshare_pb2.WatchResponse]
    ) -> None:
        """Take the pod's answers, one after another, until its stream ends; bytes that are no answer end it."""
        try:
            answers = map(_answer, requests)
            for answer in answers:
                self._take(pod, answer, answers)
        except ServiceError as error:
            feed.fail(error)
        except grpc.RpcError:
            pass  # the pod hung up
        except Exception:
            _log.exception("an answer of %s could not be taken", pod)
            feed.fail(ServiceError(Reason.INTERNAL, "internal error"))
        finally:
            feed.close()

    def _take(self, pod: str, first: keyshare_pb2.Answer, more: Answers) -> None:
        """One answer, whole: match, verify, tell. What does not hold is a refusal of its order.

        One that we could not store is a passing refusal: it is asked for again.
        """
        parts = _parts(first, more)
        try:
            key = self._committee.asked(pod, first.command)
            try:
                self._judge(pod, key, parts)
            except _Refused as said:
                self._committee.refuse(pod, first.command, said.reason, said.detail, self._coordinator.now())
            except ServiceError as error:
                if error.reason is Reason.WRONG_PHASE:
                    raise
                self._committee.refuse(pod, first.command, error.reason, error.detail, self._coordinator.now())
        except ServiceError as error:
            _log.info("an answer of %s is let go: %s", pod, error.detail)
        with suppress(_Refused):
            for _ in parts:
                pass  # the rest of an answer that did not hold

    def _judge(self, pod: str, key: Key, parts: Answers) -> None:
        if key[0] in ("release", "digest"):
            self._release(pod, self._current(key), parts)
            return
        answer = next(parts)
        kind = answer.WhichOneof("answer")
        if kind != _ANSWERS[key[0]]:
            raise ServiceError(Reason.MALFORMED, f"{kind} is no answer to {key[0]}")
        match kind:
            case "nonce" if len(answer.nonce) == 32:
                self._committee.took_nonce(pod, answer.nonce)
            case "mark":
                self._mark(pod, key, from_wire(answer.mark))
            case "live" if answer.live:
                self._committee.took_live(pod, self._coordinator.now())
            case "nonce" | "live":
                raise ServiceError(Reason.MALFORMED, f"this {kind} is no answer to {key[0]}")
            case _:
                snapshot = self._current(key)
                fact = self._fact(kind, snapshot, pod, answer)
                self._coordinator.tell(RoundAnswer(subject(snapshot.state), fact))

    def _fact(self, kind: str, snapshot: Snapshot, pod: str, answer: keyshare_pb2.Answer) -> f.Fact:
        """What a signed answer of a round says, verified."""
        at = self._coordinator.now()
        match kind:
            case "commitment":
                return self._commitment(snapshot, pod, from_wire(answer.commitment), at)
            case "endorsement":
                signed = from_wire(answer.endorsement)
                _open(Endorsement, "endorse", signed, snapshot, pod)
                return f.Endorsed(at, pod, signed)
            case "accepted":
                signed, left_out = from_wire(answer.accepted.accept_list), answer.accepted.refused[:_MOST_REFUSED]
                message = _open(AcceptList, "accept", signed, snapshot, pod)
                pairs = tuple((entry.hospital, entry.header) for entry in message.accepted)
                refused = tuple((refusal.hospital[:63], refusal.reason[:32]) for refusal in left_out)
                return f.Listed(at, pod, signed, pairs, refused)
            case "lock":
                return self._lock(snapshot, pod, from_wire(answer.lock), at)
            case _:
                return self._abandon(snapshot, pod, from_wire(answer.abandon), at)

    def _current(self, key: Key) -> Snapshot:
        """The published state, if the order is still about it. Raises WRONG_PHASE."""
        snapshot = self._coordinator.snapshot
        if subject(snapshot.state).hex() != key[1]:
            raise ServiceError(Reason.WRONG_PHASE, f"the attempt that {key[0]} was about is over")
        return snapshot

    def _commitment(self, snapshot: Snapshot, pod: str, signed: Signed, at: int) -> f.Fact:
        state = snapshot.state
        if state.phase is not Phase.PROPOSED or state.proposal is None:
            raise ServiceError(Reason.WRONG_PHASE, "commitments are not asked for now")
        checked = check_proposal(state.proposal, snapshot.run.rules.roster)
        commitment = open_signed(Commitment, "commit", signed, self._identity()[pod])
        _same(commitment.pod, pod)
        check_commitment(commitment, checked)
        return f.Committed(at, pod, signed)

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
            self._coordinator.tell(*(RoundAnswer(snapshot.state.M, claim) for claim in claims))
        except ServiceError as error:
            if error.reason is Reason.CONFLICT:
                metrics.POD_FAULTS.labels("two_digests").inc()
            raise

    def _release(self, pod: str, snapshot: Snapshot, parts: Answers) -> None:
        """Sums of pieces, each its chunks and then its signed digest; where the digest alone was asked, only that."""
        state, total = snapshot.state, snapshot.run.total_bytes
        pending: tuple[int, PieceFile] | None = None
        claims: list[f.Claimed] = []
        try:
            for part in parts:
                kind = part.WhichOneof("answer")
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
                    elif (
                        pod not in state.claims.get(said.piece, {}) and state.asked.get((pod, said.piece)) is not False
                    ):
                        # One signed before may come again, from an order that crossed with the one for the whole sum.
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


def _answer(request: keyshare_pb2.WatchRequest) -> keyshare_pb2.Answer:
    if request.WhichOneof("part") != "answer":
        raise ServiceError(Reason.MALFORMED, "only answers follow a pod's hello")
    return request.answer


def _parts(first: keyshare_pb2.Answer, more: Answers) -> Answers:
    """The parts of one answer; the command number counts in the first. Raises _Refused where one is a refusal."""
    for part in chain((first,), more):
        if part.HasField("refusal"):
            raise _Refused(part.refusal)
        yield part
        if not part.more:
            return


class _Refused(Exception):  # noqa: N818  # it is an answer, no error of ours
    """A pod does not do what it was asked."""

    def __init__(self, refusal: keyshare_pb2.Refusal) -> None:
        super().__init__(refusal.reason)
        self.reason, self.detail = refusal.reason, refusal.detail


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
