"""The pod's one connection: takes orders on Watch and answers each with its own call.

Orders are worked off one at a time in the order in which they came. An answer that does not arrive is not repeated
here for longer than its deadline: the aggregator asks again, and every order is idempotent.
"""

import logging
import threading
from collections.abc import Iterator
from typing import Any

from services.common.errors import Reason, ServiceError
from services.common.rpc.channel import Caller, Stream, stub
from services.common.rpc.signed import from_wire, to_wire
from services.common.secagg.messages import Signed
from services.common.secagg.signing import digest
from services.keyshare import metrics
from services.keyshare.facts import Ref
from services.keyshare.masksum import Chunk
from services.keyshare.pod import Pod
from wardround.keyshare.v1 import keyshare_pb2 as wire
from wardround.keyshare.v1.keyshare_pb2_grpc import KeyShareServiceStub

_log = logging.getLogger(__name__)
_ANSWER_SECONDS, _STREAM_SECONDS = 30.0, 3600.0
_RPCS = {"propose": "Commit", "offer": "Accept", "high_water": "HighWater"}  # the others are called like their order


class Client:
    """Runs until `stop` is set and `caller` closed."""

    def __init__(self, pod: Pod, caller: Caller, stop: threading.Event) -> None:
        self._pod, self._caller, self._stop = pod, caller, stop
        self._orders: Stream[wire.WatchResponse] | None = None
        self._known = False  # an order came: to the aggregator this process is the pod
        self.refusal: ServiceError | None = None

    def run(self) -> None:
        """Dial, take orders, dial again. Ends by itself, with `refusal`, where another process is this pod already."""
        wait = 0.2
        while not self._stop.is_set():
            try:
                served = self._watch()
            except ServiceError as error:
                served = False
                _log.info("no connection to the aggregator: %s", error.detail)
                if error.reason is Reason.CONFLICT and not self._known:
                    self.refusal = error
                    return
            wait = 0.2 if served else min(2 * wait, 10.0)
            self._stop.wait(wait)

    def redial(self) -> None:
        """End this Watch; `run` begins another, which tells the aggregator of the charters that are pinned now."""
        if self._orders is not None:
            self._orders.cancel()

    def _watch(self) -> bool:
        """One stream of orders; whether there was any."""
        served = False
        hello = wire.WatchRequest(boot=self._pod.state.boot, charters=list(self._pod.rosters), live=self._pod.live)
        with self._caller.stream(
            lambda c: stub(KeyShareServiceStub, c).Watch, hello, seconds=_STREAM_SECONDS
        ) as orders:
            self._orders = orders
            metrics.CONNECTED.set(1)
            try:
                for order in orders:
                    with metrics.SECONDS.labels(order.WhichOneof("order") or "unknown").time():
                        self._serve(order)
                    served = self._known = True
            except ServiceError as error:
                if error.reason is Reason.CONFLICT:
                    raise
                _log.info("the aggregator's orders ended: %s", error.detail)
            finally:
                self._orders = None
                metrics.CONNECTED.set(0)
        return served

    def _serve(self, order: wire.WatchResponse) -> None:
        name = order.WhichOneof("order")
        if name is None:
            _log.warning("an order of a newer version is left unanswered: upgrade this pod")
            return
        rpc = _RPCS.get(name, name.capitalize())
        try:
            if name == "release":
                parts = self._released(order.command, order.release)
                self._caller.upload(lambda c: stub(KeyShareServiceStub, c).Release, parts, seconds=_STREAM_SECONDS)
            else:
                try:
                    fields = self._work(name, getattr(order, name))
                    metrics.ANSWERS.labels(name, "done").inc()
                except Exception as error:
                    fields = {"refusal": _refusal(name, error)}
                answer = getattr(wire, f"{rpc}Request")(command=order.command, **fields)
                self._caller.unary(
                    lambda c: getattr(stub(KeyShareServiceStub, c), rpc), answer, seconds=_ANSWER_SECONDS
                )
        except ServiceError as error:
            _log.warning("the answer to %s did not arrive: %s", name, error.detail)

    def _work(self, name: str, order: Any) -> dict[str, Any]:
        pod = self._pod
        match name:
            case "propose":
                return {"commitment": to_wire(pod.propose(from_wire(order.proposal), order.abandons))}
            case "endorse":
                return {"endorsement": to_wire(pod.endorse(order.manifest))}
            case "offer":
                return self._offer(order.manifest)
            case "lock":
                return {"lock": to_wire(pod.lock(order.manifest, order.cohort))}
            case "digest":
                return {
                    "piece_sums": [
                        to_wire(item) for item in self._sums(order, vectors=False) if isinstance(item, Signed)
                    ]
                }
            case "abandon":
                ref = Ref(order.study, order.round, order.attempt)
                return {"abandon": to_wire(pod.abandon(order.charter, ref, order.manifest))}
            case "close":
                pod.close(from_wire(order.close))
                return {"closed": True}
        match order.WhichOneof("form"):
            case "mark":
                return {"mark": to_wire(pod.mark(order.mark.nonce, order.mark.asking))}
            case "deliver":
                pod.deliver([from_wire(mark) for mark in order.deliver.marks])
                return {"live": True}
            case _:
                return {"nonce": pod.state.boot}

    def _sums(self, order: Any, *, vectors: bool) -> Iterator[Chunk | Signed]:
        what = order.manifest, order.certificate, order.pieces, order.first_chunk, order.chunks
        return self._pod.release(*what, vectors)

    def _released(self, command: int, order: wire.ReleaseOrder) -> Iterator[wire.ReleaseRequest]:
        try:
            for item in self._sums(order, vectors=True):
                if isinstance(item, Signed):
                    yield wire.ReleaseRequest(command=command, piece_sum=to_wire(item))
                else:
                    piece, index, data = item
                    chunk = wire.ReleaseChunk(piece=piece, index=index, data=data)
                    yield wire.ReleaseRequest(command=command, chunk=chunk)
            metrics.ANSWERS.labels("release", "done").inc()
        except Exception as error:
            yield wire.ReleaseRequest(command=command, refusal=_refusal("release", error))

    def _offer(self, manifest: bytes) -> dict[str, Any]:
        request = wire.FetchOfferRequest(manifest=digest("manifest", manifest))

        def offered() -> Iterator[tuple[Signed, bytes]]:
            with self._caller.stream(
                lambda c: stub(KeyShareServiceStub, c).FetchOffer, request, seconds=_STREAM_SECONDS
            ) as items:
                for item in items:
                    yield from_wire(item.header), item.box

        accept_list, left_out = self._pod.offer(manifest, offered)
        refused = []
        for hospital, why in left_out:
            reason, _, detail = why.partition(": ")
            refused.append(wire.RefusedHospital(hospital=hospital, reason=reason, detail=detail))
            metrics.REFUSED.labels(reason).inc()
            _log.warning("%s is left out: %s", hospital, why)
        return {"accept_list": to_wire(accept_list), "refused": refused}


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
