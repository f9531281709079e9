"""Every caller that the edge must turn away, over real gRPC with real mutual TLS."""

from __future__ import annotations  # grpc classes are generic in their stubs only

import logging
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.common.clock import SystemClock
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.certificates import make_root
from services.common.rpc.channel import Caller, Stream, dial
from services.common.rpc.leaf import LeafWatch
from services.common.rpc.server import serve
from tests.support.rpc import FakeAdministration, Site, ask
from tests.support.tls import FakeConsortium, make_consortium
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc
from wardround.round.v1 import round_pb2, round_pb2_grpc
from wardround.submission.v1 import submission_pb2, submission_pb2_grpc

NORTH = (Role.HOSPITAL, "north")
DAY_MS = 86_400_000


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> FakeConsortium:
    return make_consortium(tmp_path_factory.mktemp("tls"), pods=("pod-a",), hospitals=("north", "south"))


@pytest.fixture
def site(consortium: FakeConsortium) -> Iterator[Site]:
    made = Site(consortium)
    made.start()
    yield made
    made.stop()


def test_a_member_is_served_and_named_by_its_certificate(site: Site) -> None:
    assert site.study(site.consortium.leaf(*NORTH), b"abc") == b"abc"
    assert [(caller.role, caller.id) for caller in site.rounds.callers] == [NORTH]


def test_a_plaintext_client_gets_nothing(site: Site) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{site.port}") as channel, pytest.raises(grpc.RpcError) as caught:
        round_pb2_grpc.RoundCoordinationServiceStub(channel).GetStudy(round_pb2.GetStudyRequest(), timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert site.rounds.callers == []


def test_a_client_without_a_certificate_gets_nothing(site: Site) -> None:
    credentials = grpc.ssl_channel_credentials(site.consortium.aggregator_root)
    options = [("grpc.ssl_target_name_override", site.consortium.server_name)]
    with (
        grpc.secure_channel(f"127.0.0.1:{site.port}", credentials, options) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        round_pb2_grpc.RoundCoordinationServiceStub(channel).GetStudy(round_pb2.GetStudyRequest(), timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert site.rounds.callers == []


def test_a_certificate_of_an_unlisted_root_gets_nothing(site: Site) -> None:
    site.consortium.roots[Role.HOSPITAL, "stranger"] = make_root("demo", "stranger", SystemClock().now_ms())
    known = site.consortium.members()
    site.members = lambda: replace(known, roots={w: r for w, r in known.roots.items() if w[1] != "stranger"})
    leaf = site.consortium.issue(Role.HOSPITAL, "stranger")
    impostor = site.consortium.issue(*NORTH, signer=(Role.HOSPITAL, "stranger"), name="impostor")
    del site.consortium.roots[Role.HOSPITAL, "stranger"]
    site.stop()
    site.start()
    assert site.refusal(leaf, seconds=1).reason is Reason.UNREACHABLE
    assert site.refusal(impostor, seconds=1).reason is Reason.UNREACHABLE
    assert site.rounds.callers == []


@pytest.mark.parametrize("signer", [(Role.HOSPITAL, "south"), (Role.POD, "pod-a"), (Role.AGGREGATOR, "centre")])
def test_another_members_root_cannot_sign_a_members_name(site: Site, signer: tuple[Role, str]) -> None:
    leaf = site.consortium.issue(*NORTH, signer=signer, name="forged")
    refusal = site.refusal(leaf)
    assert refusal.reason is Reason.NOT_PERMITTED
    assert "own root" in refusal.detail
    assert site.rounds.callers == []


def test_a_name_that_no_charter_lists_is_unknown(site: Site) -> None:
    leaf = site.consortium.issue(Role.HOSPITAL, "east", signer=(Role.HOSPITAL, "south"), name="unlisted")
    assert site.refusal(leaf).reason is Reason.UNKNOWN_MEMBER


def test_a_hospital_that_is_listed_as_pod_only_is_unknown(site: Site) -> None:
    leaf = site.consortium.issue(Role.HOSPITAL, "pod-a", signer=(Role.POD, "pod-a"), name="other-role")
    assert site.refusal(leaf).reason is Reason.UNKNOWN_MEMBER


def test_another_consortiums_certificate_is_unknown(site: Site, tmp_path: Path) -> None:
    other = FakeConsortium(tmp_path, "other", "centre", roots=site.consortium.roots)
    assert site.refusal(other.issue(*NORTH)).reason is Reason.UNKNOWN_MEMBER


def test_an_expired_certificate_is_stopped_by_tls(site: Site) -> None:
    leaf = site.consortium.issue(*NORTH, now_ms=SystemClock().now_ms() - 3 * DAY_MS, name="expired")
    assert site.refusal(leaf, seconds=1).reason is Reason.UNREACHABLE
    assert site.rounds.callers == []


class LateClock:
    def __init__(self, ahead_ms: int) -> None:
        self.ahead_ms = ahead_ms

    def now_ms(self) -> int:
        return SystemClock().now_ms() + self.ahead_ms


def test_a_certificate_that_expires_on_an_open_connection_is_refused_at_the_next_call(site: Site) -> None:
    clock = LateClock(0)
    site.stop()
    site.clock = clock
    site.start()
    with site.caller(site.consortium.leaf(*NORTH)) as caller:
        assert ask(caller) == b"s"
        clock.ahead_ms = 2 * DAY_MS
        with pytest.raises(ServiceError) as caught:
            ask(caller)
        assert caught.value.reason is Reason.NOT_PERMITTED
        assert "valid from" in caught.value.detail


def test_a_member_taken_off_the_charter_is_refused_on_its_open_connection(site: Site) -> None:
    with site.caller(site.consortium.leaf(*NORTH)) as caller:
        assert ask(caller) == b"s"
        known = site.consortium.members()
        site.members = lambda: replace(known, roots={w: r for w, r in known.roots.items() if w != NORTH})
        with pytest.raises(ServiceError) as caught:
            ask(caller)
        assert caught.value.reason is Reason.UNKNOWN_MEMBER


@pytest.mark.parametrize("who", [(Role.POD, "pod-a"), (Role.OPERATOR, "olga"), (Role.AGGREGATOR, "centre")])
def test_role_confusion_is_refused(site: Site, who: tuple[Role, str]) -> None:
    refusal = site.refusal(site.consortium.leaf(*who))
    assert refusal.reason is Reason.NOT_PERMITTED
    assert "may not call" in refusal.detail
    assert site.rounds.callers == []


def status_of(site: Site, role: Role, id: str, signer: tuple[Role, str]) -> admin_pb2.Status:
    leaf = site.consortium.issue(role, id, signer=signer, name=f"{id}-admin")
    with site.caller(leaf) as caller:
        return caller.unary(
            lambda channel: admin_pb2_grpc.AdministrationServiceStub(channel).GetStatus,
            admin_pb2.GetStatusRequest(),
            seconds=5,
        ).status


def test_operators_of_the_serving_site_alone_administer_it(site: Site) -> None:
    served = status_of(site, Role.OPERATOR, "olga", (Role.AGGREGATOR, "centre"))
    assert (served.role, served.id) == ("operator", "olga")
    for signer in [(Role.HOSPITAL, "north"), (Role.POD, "pod-a")]:
        with pytest.raises(ServiceError) as caught:
            status_of(site, Role.OPERATOR, "olga", signer)
        assert caught.value.reason is Reason.NOT_PERMITTED
    with pytest.raises(ServiceError) as caught:
        status_of(site, Role.HOSPITAL, "north", NORTH)
    assert caught.value.reason is Reason.NOT_PERMITTED


def test_the_client_trusts_the_aggregators_root_and_name_alone(site: Site) -> None:
    leaf = site.consortium.leaf(*NORTH)
    assert site.refusal(leaf, seconds=1, root=site.consortium.root(*NORTH)).reason is Reason.UNREACHABLE
    assert site.refusal(leaf, seconds=1, server_name="centre.evil.wardround.internal").reason is Reason.UNREACHABLE
    assert site.rounds.callers == []


def test_messages_above_4_mib_are_refused_both_ways(site: Site) -> None:
    leaf = site.consortium.leaf(*NORTH)
    assert site.refusal(leaf, bytes((4 << 20) + 1)).reason is Reason.TOO_LARGE
    assert site.rounds.callers == []
    site.rounds.answer_bytes = (4 << 20) + 1
    assert site.refusal(leaf).reason is Reason.TOO_LARGE
    site.rounds.answer_bytes = 0
    assert len(site.study(leaf, bytes((4 << 20) - 16))) == (4 << 20) - 16


def raw_call(site: Site, data: bytes) -> grpc.RpcError:
    pair = LeafWatch(site.consortium.leaf(*NORTH)).current()
    with dial(f"127.0.0.1:{site.port}", site.consortium.server_name, pair, site.consortium.aggregator_root) as channel:
        call: Any = channel.unary_unary("/wardround.round.v1.RoundCoordinationService/GetStudy")
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=60)
    return caught.value


def test_bytes_that_are_no_message_are_malformed(site: Site) -> None:
    assert raw_call(site, b"\xff\xff\xff").code() is grpc.StatusCode.INVALID_ARGUMENT


def test_malformed_bytes_inside_a_stream_are_malformed(site: Site) -> None:
    pair = LeafWatch(site.consortium.leaf(*NORTH)).current()
    with dial(f"127.0.0.1:{site.port}", site.consortium.server_name, pair, site.consortium.aggregator_root) as channel:
        call: Any = channel.stream_unary("/wardround.submission.v1.UpdateSubmissionService/SubmitUpdate")
        with pytest.raises(grpc.RpcError) as caught:
            call(iter([b"", b"\xff\xff\xff"]), timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_method_is_not_found(site: Site) -> None:
    with site.caller(site.consortium.leaf(*NORTH)) as caller, pytest.raises(ServiceError) as caught:
        caller.unary(
            lambda channel: channel.unary_unary("/wardround.round.v1.RoundCoordinationService/Steal"),
            b"",
            seconds=5,
        )
    assert caught.value.reason is Reason.NOT_FOUND


def test_an_unexpected_fault_shows_only_internal_error(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    for fault in (RuntimeError("key 0123 of /secret/path"), ServiceError(Reason.INTERNAL, "key 0123", place="/secret")):
        caplog.clear()
        site.rounds.fault = fault
        with caplog.at_level(logging.INFO):
            refusal = site.refusal(site.consortium.leaf(*NORTH))
        assert refusal.reason is Reason.INTERNAL
        assert refusal.detail == "internal error"
        assert refusal.metadata == {}
        assert any("0123" in str(vars(record).get("detail")) for record in caplog.records)


def test_a_full_upload_answers_and_a_failing_source_says_its_own_fault(site: Site) -> None:
    def pick(
        channel: grpc.Channel,
    ) -> grpc.StreamUnaryMultiCallable[submission_pb2.SubmitUpdateRequest, submission_pb2.SubmitUpdateResponse]:
        return submission_pb2_grpc.UpdateSubmissionServiceStub(channel).SubmitUpdate

    def failing() -> Iterator[submission_pb2.SubmitUpdateRequest]:
        yield submission_pb2.SubmitUpdateRequest()
        raise ServiceError(Reason.STORAGE, "cannot read y")

    with site.caller(site.consortium.leaf(*NORTH)) as caller:
        requests = [submission_pb2.SubmitUpdateRequest()] * 3
        assert caller.upload(pick, iter(requests), seconds=5).receipt.blob == b"\x03"
        with pytest.raises(ServiceError, match="cannot read y"):
            caller.upload(pick, failing(), seconds=5)


def test_one_member_cannot_take_all_threads(consortium: FakeConsortium) -> None:
    site = Site(consortium)
    site.workers = 24
    site.start()
    try:
        with site.caller(consortium.leaf(*NORTH)) as caller:
            streams = [watch(caller) for _ in range(16)]
            with pytest.raises(ServiceError, match="16 calls open"):
                ask(caller, seconds=2)
            assert site.study(consortium.leaf(Role.HOSPITAL, "south")) == b"s"
            for stream in streams:
                stream.__exit__()
    finally:
        site.stop()


def watch(caller: Caller) -> Stream[round_pb2.WatchRoundsResponse]:
    stream = caller.stream(
        lambda channel: round_pb2_grpc.RoundCoordinationServiceStub(channel).WatchRounds,
        round_pb2.WatchRoundsRequest(),
        seconds=60,
    ).__enter__()
    assert next(iter(stream)).round == 1
    return stream


def test_a_port_in_use_is_one_clear_line(site: Site) -> None:
    for holder in ("grpc", "plain"):
        with socket.socket() as plain:
            plain.bind(("127.0.0.1", 0))
            plain.listen()
            port = site.port if holder == "grpc" else plain.getsockname()[1]
            with pytest.raises(ServiceError) as caught:
                serve(
                    [(admin_pb2_grpc.add_AdministrationServiceServicer_to_server, FakeAdministration())],  # type: ignore[abstract]  # never called
                    site.consortium.members,
                    (Role.AGGREGATOR, "centre"),
                    site.consortium.leaf(Role.AGGREGATOR, "centre"),
                    address=f"127.0.0.1:{port}",
                    max_workers=2,
                )
            assert f"cannot listen on 127.0.0.1:{port}" in caught.value.detail
            assert "\n" not in caught.value.detail
