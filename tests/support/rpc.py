"""Small servicers behind a real listener with real mutual TLS."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from services.common.clock import Clock
from services.common.errors import ServiceError
from services.common.ids import Role
from services.common.rpc.channel import Caller, dial
from services.common.rpc.feed import Feed
from services.common.rpc.interceptor import Peer, peer
from services.common.rpc.leaf import LeafFiles
from services.common.rpc.server import RunningServer, serve
from tests.support.tls import FakeConsortium
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc
from wardround.protocol.v1 import protocol_pb2
from wardround.round.v1 import round_pb2, round_pb2_grpc
from wardround.submission.v1 import submission_pb2, submission_pb2_grpc


class FakeRounds(round_pb2_grpc.RoundCoordinationServiceServicer):
    """Answers with what it was called with; `fault` is raised instead when set."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.faults = 10**9
        self.callers: list[Peer] = []
        self.watchers: list[Feed[round_pb2.WatchRoundsResponse]] = []
        self.ended = threading.Event()
        self.answer_bytes = 0
        self.hold: threading.Event | None = None

    def GetStudy(self, request: round_pb2.GetStudyRequest, context: grpc.ServicerContext) -> round_pb2.GetStudyResponse:
        self.callers.append(peer(context))
        if self.hold is not None:
            self.hold.wait(30)
        if self.fault is not None and self.faults > 0:
            self.faults -= 1
            raise self.fault
        return round_pb2.GetStudyResponse(study=request.digest + bytes(self.answer_bytes))

    def WatchRounds(
        self, request: round_pb2.WatchRoundsRequest, context: grpc.ServicerContext
    ) -> Iterator[round_pb2.WatchRoundsResponse]:
        feed: Feed[round_pb2.WatchRoundsResponse] = Feed(context)
        self.watchers.append(feed)
        feed.push(round_pb2.WatchRoundsResponse(round=1))
        try:
            yield from feed
        finally:
            self.ended.set()


class FakeSubmissions(submission_pb2_grpc.UpdateSubmissionServiceServicer):
    def SubmitUpdate(
        self, request_iterator: Iterator[submission_pb2.SubmitUpdateRequest], context: grpc.ServicerContext
    ) -> submission_pb2.SubmitUpdateResponse:
        count = sum(1 for _ in request_iterator)
        return submission_pb2.SubmitUpdateResponse(
            receipt=protocol_pb2.Signed(blob=bytes([count]), signature=bytes(64))
        )


class FakeAdministration(admin_pb2_grpc.AdministrationServiceServicer):
    def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetStatusResponse:
        caller = peer(context)
        return admin_pb2.GetStatusResponse(status=admin_pb2.Status(role=caller.role.value, id=caller.id))


class Site:
    """One aggregator's listener over a fake consortium, and ways to call it."""

    def __init__(self, consortium: FakeConsortium) -> None:
        self.consortium = consortium
        self.rounds = FakeRounds()  # type: ignore[abstract]  # the other RPCs stay unimplemented
        self.running: RunningServer | None = None
        self.port = 0
        self.workers = 8
        self.clock: Clock | None = None
        self.members = consortium.members

    def start(self) -> None:
        own = (Role.AGGREGATOR, self.consortium.aggregator)
        servicers: list[Any] = [
            (round_pb2_grpc.add_RoundCoordinationServiceServicer_to_server, self.rounds),
            (submission_pb2_grpc.add_UpdateSubmissionServiceServicer_to_server, FakeSubmissions()),  # type: ignore[abstract]  # the same
            (admin_pb2_grpc.add_AdministrationServiceServicer_to_server, FakeAdministration()),  # type: ignore[abstract]  # the same
        ]
        self.running = serve(
            servicers,
            lambda: self.members(),  # noqa: PLW0108  # tests put another function there later
            own,
            self.consortium.leaf(*own),
            address=f"127.0.0.1:{self.port}",
            max_workers=self.workers,
            clock=self.clock,
        )
        self.port = self.running.port

    def stop(self, grace: float = 0) -> None:
        if self.running is not None:
            self.running.stop(grace)
            self.running = None

    @contextmanager
    def caller(self, leaf: LeafFiles, root: bytes | None = None, **more: Any) -> Iterator[Caller]:
        name = more.pop("server_name", self.consortium.server_name)
        trusted = root or self.consortium.aggregator_root
        address = f"127.0.0.1:{self.port}"
        made = Caller(lambda pair: dial(address, name, pair, trusted, **more), leaf)
        try:
            yield made
        finally:
            made.close()

    def study(self, leaf: LeafFiles, data: bytes = b"s", seconds: float = 5, **more: Any) -> bytes:
        """GetStudy, as the holder of `leaf`."""
        with self.caller(leaf, **more) as caller:
            return ask(caller, data, seconds)

    def refusal(self, leaf: LeafFiles, data: bytes = b"s", seconds: float = 5, **more: Any) -> ServiceError:
        """What GetStudy is refused with."""
        try:
            self.study(leaf, data, seconds, **more)
        except ServiceError as error:
            return error
        raise AssertionError("the call was answered")


def ask(caller: Caller, data: bytes = b"s", seconds: float = 5) -> bytes:
    request = round_pb2.GetStudyRequest(digest=data)
    return caller.unary(
        lambda channel: round_pb2_grpc.RoundCoordinationServiceStub(channel).GetStudy, request, seconds=seconds
    ).study
