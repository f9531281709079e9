"""What to ask which pod now: derived from the state alone, so a restart asks again what is still open.

The key of an order says what it is about; the same key is the same question, whatever its command number.
Key = (kind, M or the proposal's digest, ...).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.aggregator.round import Phase, Rules, State, subject
from services.common.errors import ServiceError
from services.common.rpc.signed import to_wire
from services.common.secagg.ring import chunk_lengths
from services.common.secagg.signing import digest
from wardround.keyshare.v1.keyshare_pb2 import (
    AbandonOrder,
    CloseOrder,
    DigestOrder,
    EndorseOrder,
    FetchOfferResponse,
    LockOrder,
    OfferOrder,
    ProposeOrder,
    ReleaseOrder,
    WatchResponse,
)

Key = tuple[str, ...]


@dataclass(frozen=True)
class Order:
    """One question to one pod; `make` builds the message without its command number."""

    key: Key
    make: Callable[[], WatchResponse]


Offered = Callable[[str], Iterable[FetchOfferResponse]]
"""What an offer holds for a pod."""
_FEW = 32  # submissions that an offer may hold: at most 12 KiB each, far below what one message may have

Held = frozenset[tuple[str, int]]
"""(pod, piece) whose sum lies on our disk in this life of the process."""


def orders(
    state: State, rules: Rules, study: bytes, total_bytes: int, held: Held, offered: Offered
) -> dict[str, list[Order]]:
    """The open questions by pod id. `total_bytes` of one packed vector of the open round."""
    about = subject(state).hex()
    everyone = tuple(pod.id for pod in rules.roster.pods)
    found: dict[str, list[Order]] = {pod: [] for pod in everyone}

    def ask(pods: tuple[str, ...], done: object, kind: str, make: Callable[[], WatchResponse]) -> None:
        for pod in pods:
            if pod not in done:  # type: ignore[operator]  # every caller passes a container of pod ids
                found[pod].append(Order((kind, about), make))

    def endorse() -> WatchResponse:
        return WatchResponse(endorse=EndorseOrder(manifest=state.manifest))

    match state.phase:
        case Phase.PROPOSED:
            proposal = state.proposal
            assert proposal is not None  # noqa: S101  # PROPOSED is entered with one
            abandons = state.abandoned

            def propose() -> WatchResponse:
                return WatchResponse(propose=ProposeOrder(proposal=to_wire(proposal), abandons=abandons))

            ask(everyone, state.commitments, "commit", propose)
        case Phase.ENDORSING:
            ask(state.pods, state.endorsements, "endorse", endorse)
        case Phase.COLLECTING:
            # Asked again of a pod that dials anew: its answer tells whether its keys are still there.
            ask(state.pods, (), "endorse", endorse)
        case Phase.OFFERING:
            along = offered if len(state.submissions) <= _FEW else lambda pod: ()
            for pod in state.pods:
                ask((pod,), state.lists, "offer", lambda pod=pod: _offer(state.manifest, along, pod))  # type: ignore[misc]  # bound now
        case Phase.LOCKING:
            order = LockOrder(manifest=state.manifest, cohort=state.cohort)
            ask(state.pods, state.locks, "lock", lambda: WatchResponse(lock=order))
        case Phase.RELEASING | Phase.VERIFIED:
            _release_orders(state, found, len(chunk_lengths(total_bytes)), held)
        case Phase.ABANDONING:
            abandon = AbandonOrder(
                charter=state.charter, study=study, round=state.round, attempt=state.attempt, manifest=state.M
            )
            ask(everyone, state.abandons, "abandon", lambda: WatchResponse(abandon=abandon))
    close = state.close
    if close is not None:  # after what the open attempt asks: its pods wait for nothing that is over
        name = ("close", digest("close", close.blob).hex())
        for pod in everyone:
            found[pod].append(Order(name, lambda: WatchResponse(close=CloseOrder(close=to_wire(close)))))
    return found


def _release_orders(state: State, found: dict[str, list[Order]], chunks: int, held: Held) -> None:
    for pod in state.pods:
        said = {piece: of_piece[pod] for piece, of_piece in state.claims.items() if pod in of_piece}
        whole_here = {piece for piece, (_, released) in said.items() if released and (pod, piece) in held}
        asked = sorted((piece, whole) for (who, piece), whole in state.asked.items() if who == pod)
        sums = [piece for piece, whole in asked if whole and piece not in whole_here]
        if state.phase is Phase.VERIFIED:
            sums = [piece for piece in sums if state.chosen and state.chosen[piece] == pod]
        digests = [piece for piece, whole in asked if not whole and piece not in said]
        if state.phase is Phase.VERIFIED:
            digests = []
        whole, more = (",".join(map(str, pieces)) for pieces in (sums, digests))
        if sums:  # a digest that is asked of the same pod travels with them
            release = ReleaseOrder(
                manifest=state.manifest, certificate=state.certificate, pieces=sorted((*sums, *digests)),
                digests=digests, first_chunk=0, chunks=chunks,
            )  # fmt: skip
            key: Key = ("release", state.M.hex(), whole, more)
            found[pod].append(Order(key, lambda message=release: WatchResponse(release=message)))  # type: ignore[misc]  # bound now
        elif digests:
            order = DigestOrder(
                manifest=state.manifest, certificate=state.certificate, pieces=digests, first_chunk=0, chunks=chunks
            )
            key = ("digest", state.M.hex(), more)
            found[pod].append(Order(key, lambda message=order: WatchResponse(digest=message)))  # type: ignore[misc]  # bound now


def _offer(manifest: bytes, offered: Offered, pod: str) -> WatchResponse:
    order = OfferOrder(manifest=manifest)
    try:
        order.offered.extend(offered(pod))
    except (ServiceError, OSError):
        del order.offered[:]  # the pod asks, and hears why there is nothing
    return WatchResponse(offer=order)
