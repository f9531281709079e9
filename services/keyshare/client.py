"""The pod's one connection: takes orders on Watch and answers each on the same stream.

Orders are worked off one at a time in the order in which they came. An answer that its stream did not carry is lost:
on the next one the aggregator asks again what is still open, and every order is idempotent.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

from services.common.errors import Reason, ServiceError
from services.common.rpc.channel import Caller, Stream, stub
from services.common.rpc.outbox import Outbox
from services.common.rpc.signed import from_wire, to_wire
from services.common.rpc.watch import Watch
from services.common.secagg.certificate import Ref
from services.common.secagg.messages import Signed
from services.common.secagg.signing import digest
from services.keyshare import metrics
from services.keyshare.pod import Pod
from wardround.keyshare.v1 import keyshare_pb2 as wire
from wardround.keyshare.v1.keyshare_pb2_grpc import KeyShareServiceStub

_log = logging.getLogger(__name__)
_STREAM_SECONDS = 3600.0
_WHAT = ("manifest", "certificate", "pieces", "first_chunk", "chunks")
_RELEASE, _DIGEST = attrgetter(*_WHAT, "digests"), attrgetter(*_WHAT, "pieces")  # of such an order


class Client:
    """The pod's orders, taken while `watch` runs, until `stop` is set and `caller` closed."""

    def __init__(self, pod: Pod, caller: Caller, stop: threading.Event) -> None:
        self._pod, self._caller = pod, caller
        self.watch = Watch(self._begin, self._serve, stop, metrics.CONNECTED.set)

    def _begin(self) -> Stream[wire.WatchResponse]:
        hello = wire.Hello(boot=self._pod.state.boot, charters=list(self._pod.rosters), live=self._pod.live)
        self._outbox = Outbox(wire.WatchRequest(hello=hello))
        return self._caller.converse(_rpc("Watch"), self._outbox, seconds=_STREAM_SECONDS)

    def _serve(self, order: wire.WatchResponse) -> None:
        name = order.WhichOneof("order")
        if name is None:
            _log.warning("an order of a newer version is left unanswered: upgrade this pod")
            return
        try:
            with metrics.SECONDS.labels(name).time():
                for fields in self._answers(name, getattr(order, name)):
                    self._outbox.put(wire.WatchRequest(answer=wire.Answer(command=order.command, **fields)))
        except ServiceError as error:
            _log.warning("the answer to %s did not arrive: %s", name, error.detail)

    def _answers(self, name: str, order: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from self._work(name, order)
            metrics.ANSWERS.labels(name, "done").inc()
        except Exception as error:
            yield {"refusal": _refusal(name, error)}

    def _work(self, name: str, order: Any) -> Iterator[dict[str, Any]]:
        pod = self._pod
        match name:
            case "propose":
                yield {"commitment": to_wire(pod.propose(from_wire(order.proposal), order.abandons))}
            case "endorse":
                yield {"endorsement": to_wire(pod.endorse(order.manifest))}
            case "offer":
                yield {"accepted": self._offer(order)}
            case "lock":
                yield {"lock": to_wire(pod.lock(order.manifest, order.cohort))}
            case "release":
                yield from self._sums(order.pieces, pod.release(*_RELEASE(order)))
            case "digest":
                yield from self._sums(order.pieces, pod.release(*_DIGEST(order)))
            case "abandon":
                ref = Ref(order.study, order.round, order.attempt)
                yield {"abandon": to_wire(pod.abandon(order.charter, ref, order.manifest))}
            case "close":
                pod.close(from_wire(order.close))  # done is no news: nobody waits for it
            case "high_water":
                yield self._high_water(order)

    def _high_water(self, order: wire.HighWaterOrder) -> dict[str, Any]:
        match order.WhichOneof("form"):
            case "mark":
                return {"mark": to_wire(self._pod.mark(order.mark.nonce, order.mark.asking))}
            case "deliver":
                self._pod.deliver([from_wire(mark) for mark in order.deliver.marks])
                return {"live": True}
            case _:
                return {"nonce": self._pod.state.boot}

    def _sums(
        self, pieces: Sequence[int], parts: Iterator[tuple[int, int, bytes] | Signed]
    ) -> Iterator[dict[str, Any]]:
        left = len(pieces)
        for part in parts:
            if isinstance(part, Signed):
                left -= 1
                yield {"piece_sum": to_wire(part), "more": left > 0}
            else:
                yield {"chunk": wire.ReleaseChunk(piece=part[0], index=part[1], data=part[2]), "more": True}

    def _offer(self, order: wire.OfferOrder) -> wire.Accepted:
        request = wire.FetchOfferRequest(manifest=digest("manifest", order.manifest))

        def offered() -> Iterator[tuple[Signed, bytes]]:
            asked = self._caller.stream(_rpc("FetchOffer"), request, seconds=_STREAM_SECONDS)
            with nullcontext(order.offered) if order.offered else asked as items:
                for item in items:
                    yield from_wire(item.header), item.box

        accept_list, left_out = self._pod.offer(order.manifest, offered)
        refused = []
        for hospital, why in left_out:
            reason, _, detail = why.partition(": ")
            refused.append(wire.RefusedHospital(hospital=hospital, reason=reason, detail=detail))
            metrics.REFUSED.labels(reason).inc()
            _log.warning("%s is left out: %s", hospital, why)
        return wire.Accepted(accept_list=to_wire(accept_list), refused=refused)


def _rpc(name: str) -> Callable[[Any], Any]:
    return lambda channel: getattr(stub(KeyShareServiceStub, channel), name)


def _refusal(order: str, error: Exception) -> wire.Refusal:
    """What the aggregator is told; of a fault of ours only that there was one."""
    if not isinstance(error, ServiceError):
        _log.error("%s failed", order, exc_info=error)
        error = ServiceError(Reason.INTERNAL, "internal error")
    metrics.ANSWERS.labels(order, error.reason.value).inc()
    if error.reason in metrics.ALARMING:
        metrics.ALARMS.labels(error.reason.value).inc()
    _log.warning("%s refused: %s", order, error)
    return wire.Refusal(reason=error.reason.value, detail=error.detail)
