"""Connections that live through restarts, renewals, proxies and shutdowns; the Unix socket."""

import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from prometheus_client import REGISTRY

from services.common.clock import SystemClock
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.administration import Administration
from services.common.rpc.certificates import Issued, issue_leaf, make_root
from services.common.rpc.channel import Caller, Stream
from services.common.rpc.errors import CODES
from services.common.rpc.leaf import LeafWatch
from services.common.rpc.unix import dial_admin, serve_admin
from tests.support.proxy import ConnectProxy
from tests.support.rpc import FakeAdministration, Site, ask
from tests.support.tls import FakeConsortium, make_consortium
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc
from wardround.round.v1 import round_pb2, round_pb2_grpc

NORTH = (Role.HOSPITAL, "north")
CENTRE = (Role.AGGREGATOR, "centre")


@pytest.fixture
def consortium(tmp_path: Path) -> FakeConsortium:
    return make_consortium(tmp_path / "tls", pods=("pod-a",), hospitals=("north", "south"))


@pytest.fixture
def site(consortium: FakeConsortium) -> Iterator[Site]:
    made = Site(consortium)
    made.start()
    yield made
    made.stop()


def eventually(holds: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_crosses_the_wire_whole(site: Site, reason: Reason) -> None:
    site.rounds.fault = ServiceError(reason, "ε of study 7 is spent: 3 of 3 — ask an operator", study="07af", limit="3")
    hidden = reason is Reason.INTERNAL
    retried = CODES[reason] is grpc.StatusCode.UNAVAILABLE
    refusal = site.refusal(site.consortium.leaf(*NORTH), seconds=2 if retried else 10)
    assert refusal.reason is reason
    assert refusal.detail == ("internal error" if hidden else "ε of study 7 is spent: 3 of 3 — ask an operator")
    assert refusal.metadata == ({} if hidden else {"study": "07af", "limit": "3"})
    assert (len(site.rounds.callers) > 1) == retried


def test_a_very_long_refusal_still_arrives_with_its_reason(site: Site) -> None:
    site.rounds.fault = ServiceError(Reason.CONFLICT, "ε" * 20_000, a="b" * 20_000)
    refusal = site.refusal(site.consortium.leaf(*NORTH))
    assert refusal.reason is Reason.CONFLICT
    assert refusal.detail.startswith("εεε")


def test_unavailable_is_retried_until_it_is_served(site: Site) -> None:
    site.rounds.fault, site.rounds.faults = ServiceError(Reason.STORAGE, "disk full"), 2
    assert site.study(site.consortium.leaf(*NORTH), seconds=20) == b"s"
    assert len(site.rounds.callers) == 3


def test_a_restarted_server_is_reached_again_over_the_same_caller(site: Site) -> None:
    with site.caller(site.consortium.leaf(*NORTH)) as caller:
        assert ask(caller, b"1") == b"1"
        site.stop()
        with pytest.raises(ServiceError) as caught:
            ask(caller, seconds=0.2)
        assert caught.value.reason is Reason.UNREACHABLE
        site.start()
        assert ask(caller, b"2", seconds=20) == b"2"


def serial_shown_by(site: Site) -> int:
    """The serial number of the certificate that a new connection to the server is shown."""
    context = ssl.create_default_context(cadata=site.consortium.aggregator_root.decode())
    pair = site.consortium.leaf(*NORTH)
    context.load_cert_chain(pair.certificate, pair.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", site.port), 5) as plain,
        context.wrap_socket(plain, server_hostname=site.consortium.server_name) as wrapped,
    ):
        shown = wrapped.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def serial_in(file: Path) -> int:
    return x509.load_pem_x509_certificate(file.read_bytes()).serial_number


def test_the_server_takes_a_renewed_leaf_and_passes_over_a_half_made_one(site: Site) -> None:
    files = site.consortium.leaf(*CENTRE)
    first = serial_in(files.certificate)
    assert serial_shown_by(site) == first
    site.consortium.issue(*CENTRE)
    second = serial_in(files.certificate)
    assert second != first
    assert serial_shown_by(site) == second
    whole = files.certificate.read_bytes()
    files.certificate.write_bytes(make_root("demo", "x", SystemClock().now_ms()).certificate)  # not of that key
    assert serial_shown_by(site) == second
    files.certificate.write_bytes(b"-----BEGIN")
    assert serial_shown_by(site) == second
    files.certificate.write_bytes(whole)
    assert site.study(site.consortium.leaf(*NORTH)) == b"s"


def test_a_client_dials_anew_with_its_renewed_leaf_while_its_streams_go_on(site: Site) -> None:
    with site.caller(site.consortium.leaf(*NORTH)) as caller:
        with watch(caller) as stream:
            answers = iter(stream)
            assert next(answers).round == 1
            # The renewal names another site, so the answer shows which leaf the connection carries.
            root = site.consortium.roots[Role.HOSPITAL, "south"]
            install(site, root)
            assert ask(caller) == b"s"
            assert site.rounds.callers[-1].id == "south"
            site.rounds.watchers[0].push(round_pb2.WatchRoundsResponse(round=2))
            assert next(answers).round == 2
        assert caller._retired == []


def install(site: Site, root: Issued) -> None:
    now = SystemClock().now_ms()
    issued = issue_leaf(root.certificate, root.key, Role.HOSPITAL, "south", "demo", days=1, now_ms=now)
    files = site.consortium.leaf(*NORTH)
    files.certificate.write_bytes(issued.certificate)
    files.key.write_bytes(issued.key)


def watch(caller: Caller) -> Stream[round_pb2.WatchRoundsResponse]:
    return caller.stream(
        lambda channel: round_pb2_grpc.RoundCoordinationServiceStub(channel).WatchRounds,
        round_pb2.WatchRoundsRequest(),
        seconds=60,
    )


def test_a_new_members_root_is_taken_without_a_restart(site: Site) -> None:
    site.consortium.roots[Role.HOSPITAL, "east"] = make_root("demo", "east", SystemClock().now_ms())
    leaf = site.consortium.issue(Role.HOSPITAL, "east")
    assert site.study(leaf) == b"s"


def test_stopping_ends_feeds_at_once(site: Site) -> None:
    with site.caller(site.consortium.leaf(*NORTH)) as caller, watch(caller) as stream:
        answers = iter(stream)
        assert next(answers).round == 1
        started = time.monotonic()
        site.stop(grace=30)
        with pytest.raises(ServiceError) as caught:
            next(answers)
        assert caught.value.reason is Reason.UNREACHABLE
        assert site.rounds.ended.wait(60)
        assert time.monotonic() - started < 10


def test_stopping_lets_a_call_in_progress_finish(site: Site) -> None:
    site.rounds.hold = threading.Event()
    answers: list[bytes] = []
    with site.caller(site.consortium.leaf(*NORTH)) as caller:
        asking = threading.Thread(target=lambda: answers.append(ask(caller, b"late", seconds=30)))
        asking.start()
        assert eventually(lambda: len(site.rounds.callers) == 1)
        stopping = threading.Thread(target=site.stop, args=(30,))
        stopping.start()
        # "Connection refused", not a deadline: the stop has begun while the first call is still held.
        assert eventually(lambda: "refused" in site.refusal(site.consortium.leaf(*NORTH), seconds=0.5).detail)
        site.rounds.hold.set()
        asking.join(60)
        stopping.join(60)
    assert answers == [b"late"]


def test_a_watcher_that_hangs_up_frees_its_thread(site: Site) -> None:
    with site.caller(site.consortium.leaf(*NORTH)) as caller:
        with watch(caller) as stream:
            assert next(iter(stream)).round == 1
        assert site.rounds.ended.wait(60)
        assert eventually(lambda: site.rounds.watchers[0].ended)


def test_closing_a_caller_ends_a_stream_that_another_thread_reads(site: Site) -> None:
    ended: list[Reason] = []
    with site.caller(site.consortium.leaf(*NORTH)) as caller:
        first = threading.Event()

        def read() -> None:
            try:
                with watch(caller) as stream:
                    for _ in stream:
                        first.set()
            except ServiceError as error:
                ended.append(error.reason)

        reader = threading.Thread(target=read)
        reader.start()
        assert first.wait(60)
        caller.close()
        reader.join(60)
        assert ended == [Reason.UNREACHABLE]
        with pytest.raises(ServiceError, match="stopping"):
            ask(caller)


def test_closing_a_caller_ends_the_wait_between_retries(site: Site) -> None:
    site.stop()
    with site.caller(site.consortium.leaf(*NORTH)) as caller:
        closer = threading.Timer(0.3, caller.close)
        closer.start()
        started = time.monotonic()
        with pytest.raises(ServiceError) as caught:
            ask(caller, seconds=60)
        assert caught.value.reason is Reason.UNREACHABLE
        assert time.monotonic() - started < 20
        closer.join()


def test_a_proxy_is_used_when_it_is_a_value_and_never_from_the_environment(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ConnectProxy() as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert site.study(site.consortium.leaf(*NORTH)) == b"s"
        assert proxy.targets == []
        assert site.study(site.consortium.leaf(*NORTH), proxy=proxy.url) == b"s"
        assert proxy.targets == [f"127.0.0.1:{site.port}"]


def test_calls_and_bytes_are_counted_by_method(site: Site) -> None:
    method = "/wardround.round.v1.RoundCoordinationService/GetStudy"

    def figure(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, {"method": method, **labels}) or 0

    served = figure("wardround_rpc_calls_total", outcome="OK")
    refused = figure("wardround_rpc_calls_total", outcome="PERMISSION_DENIED")
    received = figure("wardround_rpc_bytes_total", direction="received")
    sent = figure("wardround_rpc_client_bytes_total", direction="sent")
    answered = figure("wardround_rpc_client_bytes_total", direction="received")
    site.study(site.consortium.leaf(*NORTH), b"x" * 100)
    assert figure("wardround_rpc_client_bytes_total", direction="sent") == sent + 102
    assert figure("wardround_rpc_client_bytes_total", direction="received") == answered + 102  # it is echoed
    site.refusal(site.consortium.leaf(Role.POD, "pod-a"))
    assert eventually(lambda: figure("wardround_rpc_calls_total", outcome="PERMISSION_DENIED") == refused + 1)
    assert figure("wardround_rpc_calls_total", outcome="OK") == served + 1
    assert figure("wardround_rpc_bytes_total", direction="received") == received + 102  # tag, length, 100 bytes
    assert figure("wardround_rpc_open") == 0


def test_the_admin_socket_is_this_users_alone_and_replaces_a_stale_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "admin.sock"
    path.parent.mkdir()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    servicers = [(admin_pb2_grpc.add_AdministrationServiceServicer_to_server, FakeAdministration())]  # type: ignore[abstract]  # the other RPCs stay unimplemented
    running = serve_admin(servicers, path, 4)
    try:
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        with dial_admin(path) as channel:
            answer = admin_pb2_grpc.AdministrationServiceStub(channel).GetStatus(
                admin_pb2.GetStatusRequest(), timeout=5
            )
        assert (answer.status.role, answer.status.id) == ("operator", "local")
    finally:
        running.stop(0)


def test_a_status_that_changes_while_it_is_told_is_told_again(tmp_path: Path) -> None:
    phases = ["new", "old"]

    def status() -> admin_pb2.Status:
        found = admin_pb2.Status(phase=phases[-1])
        if len(phases) > 1:  # the round goes on while the status of before is put together
            phases.pop()
            administration.show()
        return found

    administration = Administration(status, lambda study: [])
    add = admin_pb2_grpc.add_AdministrationServiceServicer_to_server
    running = serve_admin([(add, administration)], tmp_path / "admin.sock", 4)
    try:
        with dial_admin(tmp_path / "admin.sock") as channel:
            stub = admin_pb2_grpc.AdministrationServiceStub(channel)
            told = stub.WatchStatus(admin_pb2.WatchStatusRequest(), timeout=20)
            assert [next(told).status.phase, next(told).status.phase] == ["old", "new"]
            told.cancel()
    finally:
        running.stop(0)


def test_an_admin_socket_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="more than 107 bytes"):
        serve_admin([], tmp_path / ("x" * 120), 1)


def test_a_leaf_with_another_key_is_refused_at_start(consortium: FakeConsortium) -> None:
    files = consortium.leaf(*NORTH)
    files.key.write_bytes(consortium.leaf(*CENTRE).key.read_bytes())
    with pytest.raises(ServiceError, match="not that of the certificate"):
        LeafWatch(files)


def test_keys_do_not_print(consortium: FakeConsortium) -> None:
    pair = LeafWatch(consortium.leaf(*NORTH)).current()
    issued = consortium.roots[NORTH]
    assert "PRIVATE" not in repr(pair) + repr(issued)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
def test_openssl_accepts_the_chain(consortium: FakeConsortium, tmp_path: Path) -> None:
    """An independent implementation reads our certificates: issuer, name, purpose."""
    root = tmp_path / "root.pem"
    root.write_bytes(consortium.aggregator_root)
    leaf = consortium.leaf(*CENTRE).certificate
    done = subprocess.run(
        f"openssl verify -x509_strict -purpose sslserver -CAfile {root}".split()
        + f"-verify_hostname {consortium.server_name} {leaf}".split(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_process_ends_though_a_watcher_hangs_on(consortium: FakeConsortium) -> None:
    """After `stop` no thread of the server keeps the process alive."""
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.support.tls import FakeConsortium, make_consortium\n"
        "from tests.support.rpc import Site\n"
        "from tests.integration.test_edge_connections import NORTH, watch\n"
        "site = Site(make_consortium(Path(sys.argv[1]))); site.start()\n"
        "with site.caller(site.consortium.leaf(*NORTH)) as caller:\n"
        "    stream = watch(caller).__enter__(); assert next(iter(stream)).round == 1\n"
        "    site.stop(1)\n"
        "print('stopped')\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(consortium.folder / "again")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "stopped\n", done.stderr
