"""A pod's answers on its stream: what does not hold is a refusal of that order alone, what is no answer ends it."""

from pathlib import Path
from typing import Any

import pytest

from services.aggregator import metrics
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.outbox import Outbox
from services.common.secagg.blob import decode
from services.common.secagg.messages import PieceSum
from tests.support.fake_federation import NAMES, Federation, federation, over
from tests.support.fake_pod import FakePod
from wardround.keyshare.v1 import keyshare_pb2 as pb
from wardround.keyshare.v1.keyshare_pb2_grpc import KeyShareServiceStub


def conversation(whole: Federation, first: pb.WatchRequest) -> tuple[Outbox[pb.WatchRequest], Any]:
    """The stream of pod-0, which has left, to be used as a context."""
    whole.pods["pod-0"].stop()
    outbox = Outbox(first)
    caller = whole.world.caller(Role.POD, "pod-0")
    return outbox, caller.converse(lambda c: KeyShareServiceStub(c).Watch, outbox, seconds=60)


@pytest.mark.parametrize("first", [pb.WatchRequest(), pb.WatchRequest(hello=pb.Hello(boot=bytes(65)))])
def test_a_pod_begins_with_hello(tmp_path: Path, first: pb.WatchRequest) -> None:
    with federation(tmp_path) as whole:
        outbox, stream = conversation(whole, first)
        with stream as orders, pytest.raises(ServiceError, match="begins with hello") as refused:
            list(orders)
        assert refused.value.reason is Reason.MALFORMED
        with pytest.raises(ServiceError):
            outbox.put(pb.WatchRequest())


def test_an_unasked_answer_is_let_go_and_what_is_none_ends_the_stream(tmp_path: Path) -> None:
    with federation(tmp_path) as whole:
        outbox, stream = conversation(whole, pb.WatchRequest(hello=pb.Hello(boot=b"b")))
        with stream as orders:
            outbox.put(pb.WatchRequest(answer=pb.Answer(command=1, live=True)))
            order = next(iter(orders))
            assert order.high_water.WhichOneof("form") == "nonce"
            outbox.put(pb.WatchRequest(answer=pb.Answer(command=order.command, nonce=bytes(32))))
            assert next(iter(orders)).high_water.WhichOneof("form") == "deliver"
            outbox.put(pb.WatchRequest(hello=pb.Hello(boot=b"b")))
            with pytest.raises(ServiceError, match="only answers follow") as refused:
                list(orders)
        assert refused.value.reason is Reason.MALFORMED


def refusals(order: str) -> float:
    return metrics.POD_REFUSALS.labels(order, Reason.MALFORMED.value)._value.get()


def test_another_kind_of_answer_is_a_refusal_and_the_pod_is_not_waited_for(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1) as whole:
        pod, before = whole.pods["pod-1"], refusals("endorse")
        pod._endorse = lambda number, order: pod._say(number, live=True)  # type: ignore[method-assign]
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        assert refusals("endorse") == before + 1
        assert "pod-1" not in whole.state.locks


class Breaking(FakePod):
    """Its first release has a hole; more of it follows."""

    broken = False

    def _sum_up(self, number: int, order: Any, alone: Any) -> None:
        if not self.broken and order.pieces != alone:
            self.broken = True
            for index in (7, 8, 9):
                chunk = pb.ReleaseChunk(piece=order.pieces[0], index=index, data=b"x")
                self._say(number, chunk=chunk, more=True)
            self._say(number, chunk=chunk)
            return
        super()._sum_up(number, order, alone)


def test_a_broken_release_is_refused_once_and_the_stream_goes_on(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=2) as whole:
        whole.pods["pod-1"].stop()
        pod, before = Breaking(whole.world, "pod-1"), refusals("release")
        whole.pods["pod-1"] = pod
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        stream = pod._stream
        whole.hospitals["alice"].wait_for(over(2))
        assert pod.broken
        assert refusals("release") == before + 1
        assert pod._stream is stream
        assert "pod-1" in whole.state.lists, "it took part in the round that followed"  # its lock may be one too many


class Repeating(FakePod):
    """Signs once more what it had signed before its sum was asked, as an order that crossed with this one makes it."""

    repeated = False

    def _sum_up(self, number: int, order: Any, alone: Any) -> None:
        signed = self.__dict__.setdefault("signed", {})
        for piece in order.pieces:
            if piece not in alone and piece in signed:
                self.repeated = True
                self._say(number, piece_sum=signed[piece], more=True)
        super()._sum_up(number, order, alone)

    def _say(self, number: int, **answer: Any) -> None:
        if "piece_sum" in answer:
            claim = decode(PieceSum, answer["piece_sum"].blob)
            self.__dict__.setdefault("signed", {})[claim.piece] = answer["piece_sum"]
        super()._say(number, **answer)


def test_a_digest_that_comes_again_after_its_sum_was_asked_is_no_fault(tmp_path: Path) -> None:
    with federation(tmp_path, rounds=1, pods=5, threshold=3, quorum=4) as whole:
        whole.pods["pod-2"].lie = set(range(10))
        before, honest = refusals("release"), ("pod-0", "pod-1", "pod-3", "pod-4")
        for pod in honest:
            whole.pods[pod].stop()
            whole.pods[pod] = Repeating(whole.world, pod)
        whole.join(*NAMES)
        whole.hospitals["alice"].wait_for(over(1))
        assert any(whole.pods[pod].repeated for pod in honest)  # type: ignore[attr-defined]
        assert refusals("release") == before
