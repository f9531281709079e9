"""A real pod process against a scripted aggregator over real mutual TLS."""

import hashlib
import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from services.common.documents.charter import load_charter
from services.common.documents.emit import emit
from services.common.documents.pin import Pin
from services.common.rpc.signed import to_wire
from services.common.rpc.unix import dial_admin
from services.common.secagg import blob as codec
from services.common.secagg import masking
from services.common.secagg.certificate import CheckedManifest, check_manifest, open_round_signed
from services.common.secagg.cohort import Cohort
from services.common.secagg.messages import (
    Accepted,
    AcceptList,
    BoxDigest,
    Close,
    Core,
    Header,
    LedgerMark,
    Lock,
    Mark,
    PieceSum,
    Signed,
)
from services.common.secagg.ring import CHUNK_BYTES
from services.common.secagg.sealing import box_info, pack_seeds, seal
from services.common.secagg.signing import digest
from tests.support.consortium import STUDY, Submission, derive, lanes
from tests.support.fake_aggregator_for_pods import FakeAggregator, PodProcess
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc
from wardround.keyshare.v1 import keyshare_pb2 as wire

HOSPITALS = ("alice", "bob", "carol")


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[FakeAggregator]:
    made = FakeAggregator(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def pod(aggregator: FakeAggregator) -> Iterator[PodProcess]:
    made = PodProcess(aggregator)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def header_only(aggregator: FakeAggregator, checked: CheckedManifest, name: str) -> Submission:
    """As `Consortium.submit` without masking a vector: the pod never sees y."""
    roster = aggregator.roster
    seeds = tuple(derive("seed", checked.M.hex(), name, j) for j in range(len(roster.committee.pieces)))
    boxes = {
        index: seal(
            roster.suite, commitment.sealing_key,
            pack_seeds(seeds[j] for j in roster.committee.pieces_of(index)), box_info(checked.M, name, index),
        )
        for index, commitment in checked.commitments.items()
    }  # fmt: skip
    header = Header(
        checked.M, name, checked.table.total_lanes,
        tuple(masking.commitment(checked.M, name, j, seed) for j, seed in enumerate(seeds)),
        tuple(BoxDigest(index, hashlib.sha256(box).digest()) for index, box in boxes.items()),
        derive("y", name), LedgerMark(1, derive("ledger", name)),
    )  # fmt: skip
    signed = aggregator.consortium.hospitals[name].sign("header", codec.encode(header))
    return Submission(signed, boxes, b"", seeds, header)


def cohort_of(checked: CheckedManifest, submissions: list[Submission]) -> Cohort:
    return Cohort(
        checked.M, tuple(Accepted(one.parsed.hospital, digest("header", one.header.blob)) for one in submissions)
    )


def endorsed(pod: PodProcess, core: Core) -> tuple[bytes, CheckedManifest, list[Submission]]:
    """Live, committed, endorsed and offered: one submission that it asks for, then all with the order itself."""
    assert pod.go_live().live
    _, manifest = pod.commit(core)
    answer = pod.aggregator.ask(pod.id, endorse=wire.EndorseOrder(manifest=manifest))
    assert answer.WhichOneof("answer") == "endorsement"
    checked = check_manifest(manifest, pod.aggregator.roster)
    submissions = [header_only(pod.aggregator, checked, name) for name in HOSPITALS]
    accepted = pod.offer(manifest, submissions[:1]).accepted
    first = Signed(accepted.accept_list.blob, accepted.accept_list.signature)
    assert len(open_round_signed(AcceptList, "accept", first, checked)[1].accepted) == 1
    accepted = pod.offer(manifest, submissions, along=True).accepted
    listed = Signed(accepted.accept_list.blob, accepted.accept_list.signature)
    assert len(open_round_signed(AcceptList, "accept", listed, checked)[1].accepted) == 3
    return manifest, checked, submissions


def certificate_with_own_lock(pod: PodProcess, checked: CheckedManifest, cohort: Cohort) -> bytes:
    answer = pod.aggregator.ask(pod.id, lock=wire.LockOrder(manifest=checked.blob, cohort=cohort.blob))
    lock = Signed(answer.lock.blob, answer.lock.signature)
    assert open_round_signed(Lock, "lock", lock, checked)[1].cohort == cohort.digest
    return pod.aggregator.consortium.certificate(cohort, [1, 2, 3])


def core_of(aggregator: FakeAggregator, **changes: object) -> Core:
    return aggregator.consortium.core(**changes)


def test_whole_round_over_the_wire(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """P-5, P-11, P-18, P-20 end to end: every order is answered; the sum equals one made from the seeds."""
    hello = pod.start()
    assert not hello.live
    assert list(hello.charters) == [aggregator.roster.charter]
    refusal, _ = pod.commit(core_of(aggregator))
    assert refusal.refusal.reason == "NOT_LIVE"
    manifest, checked, submissions = endorsed(pod, core_of(aggregator))
    cohort = cohort_of(checked, submissions)
    certificate = certificate_with_own_lock(pod, checked, cohort)
    order = {"manifest": manifest, "certificate": certificate, "pieces": [1, 2], "first_chunk": 0, "chunks": 1}
    released = aggregator.ask(pod.id, release=wire.ReleaseOrder(**order))
    sums = [message.piece_sum for message in released if not isinstance(message, tuple)]
    chunks = {message[0]: message[2] for message in released if isinstance(message, tuple)}
    for piece in (1, 2):
        total = np.zeros(checked.table.total_lanes, np.uint32)
        for one in submissions:
            key = masking.stream_key(one.seeds[piece], checked.M, one.parsed.hospital, piece)
            (stream,) = masking.sum_streams([key], checked.table.ring, checked.table.total_bytes, 0, 1, bytes)
            total += checked.table.ring.unpack(stream)
        assert chunks[piece] == hashlib.sha256(checked.table.ring.pack(total)).digest()
    digests = aggregator.ask(pod.id, digest=wire.DigestOrder(**order))
    assert [part.piece_sum.blob for part in digests] == [one.blob for one in sums]
    both = aggregator.ask(pod.id, release=wire.ReleaseOrder(**order, digests=[2]))
    assert [message[0] for message in both if isinstance(message, tuple)] == [1]  # of piece 2 no sum leaves
    assert [part.piece_sum.blob for part in both if not isinstance(part, tuple)] == [one.blob for one in sums]
    parsed = open_round_signed(PieceSum, "release", Signed(sums[0].blob, sums[0].signature), checked)[1]
    assert (parsed.piece, parsed.cohort) == (1, cohort.digest)
    wrong = aggregator.ask(pod.id, release=wire.ReleaseOrder(**{**order, "pieces": [0]}))
    assert wrong[0].refusal.reason == "NOT_PERMITTED"
    mark = wire.MarkForm(nonce=derive("n"), asking="pod-1")
    assert aggregator.ask(pod.id, high_water=wire.HighWaterOrder(mark=mark)).mark.blob
    over = codec.encode(Close(aggregator.roster.charter, STUDY, 1))
    close = to_wire(aggregator.consortium.aggregator.sign("close", over))
    aggregator.send(pod.id, close=wire.CloseOrder(close=close))  # it says nothing to that
    assert aggregator.ask(pod.id, release=wire.ReleaseOrder(**order))[0].refusal.reason == "CLOSED"
    abandon = wire.AbandonOrder(
        charter=aggregator.roster.charter, study=STUDY, round=2, attempt=1, manifest=derive("M")
    )
    assert aggregator.ask(pod.id, abandon=abandon).abandon.blob
    assert pod.stop() == 0


def test_killed_between_lock_and_answer(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """P-4, P-13, P-14: the lock is on the disk, the answer never came, kill −9: no abandon, no second attempt."""
    pod.start()
    manifest, checked, submissions = endorsed(pod, core_of(aggregator))
    aggregator.lost.add("lock")
    aggregator.send(pod.id, 10**6, lock=wire.LockOrder(manifest=manifest, cohort=cohort_of(checked, submissions).blob))
    assert aggregator.dropped.wait(20)
    pod.kill()
    aggregator.lost.clear()
    pod.start()
    assert pod.go_live([Mark(STUDY, 1, 1, 1, 1, 0, 0)]).live
    abandon = wire.AbandonOrder(charter=aggregator.roster.charter, study=STUDY, round=1, attempt=1, manifest=checked.M)
    assert aggregator.ask(pod.id, abandon=abandon).refusal.reason == "LOCKED"
    assert pod.commit(core_of(aggregator), attempt=2)[0].refusal.reason == "LOCKED"
    again = wire.LockOrder(manifest=manifest, cohort=cohort_of(checked, submissions).blob)
    assert aggregator.ask(pod.id, lock=again).refusal.reason == "NOT_LIVE"
    given_up = aggregator.consortium.abandon_certificate(checked, [1, 2, 3])
    assert pod.commit(core_of(aggregator), 2, [given_up])[0].WhichOneof("answer") == "commitment"


def test_rolled_back_volume_is_refused_for_good(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """P-11: a peer has seen more of this pod than its store knows."""
    pod.start()
    assert pod.go_live([Mark(STUDY, 1, 1, 1, 1, 0, 0)]).refusal.reason == "ROLLED_BACK"
    pod.kill()
    pod.start()
    assert pod.go_live().live is False
    assert pod.commit(core_of(aggregator))[0].refusal.reason == "ROLLED_BACK"
    with dial_admin(pod.socket) as channel:
        status = admin_pb2_grpc.AdministrationServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest()).status
    assert (status.phase, status.pods_live) == ("rolled back", 0)


def test_memory_stays_small_whatever_the_model(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """Memory O(block): a release of 11 million parameters (44 MB a piece, three hospitals) fits in 256 MiB."""
    d = 11_200_000
    core = core_of(aggregator, lanes=lanes(d), parameters=d)
    pod.start()
    manifest, checked, submissions = endorsed(pod, core)
    before = pod.memory()["VmRSS"]
    certificate = certificate_with_own_lock(pod, checked, cohort_of(checked, submissions))
    chunks = -(-checked.table.total_bytes // CHUNK_BYTES)
    order = {"manifest": manifest, "certificate": certificate, "pieces": [1, 2, 3], "first_chunk": 0, "chunks": chunks}
    started = time.monotonic()
    released = aggregator.ask(pod.id, 120, release=wire.ReleaseOrder(**order))
    seconds = time.monotonic() - started
    peak = pod.memory()["VmHWM"]
    assert len(released) == 3 * (chunks + 1)
    print(f"RSS {before >> 20} MiB before, peak {peak >> 20} MiB, {seconds:.1f} s for 3 pieces of {chunks} chunks")
    assert peak < 256 << 20
    assert peak - before < 96 << 20


def test_watch_is_dialled_again(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """The aggregator goes away and comes back: the same boot, still live, keys kept."""
    boot = pod.start().boot
    manifest, checked, submissions = endorsed(pod, core_of(aggregator))
    aggregator.stop()
    aggregator.start()
    hello = aggregator.wait_for(pod.id, 30)
    assert (hello.boot, hello.live) == (boot, True)
    assert certificate_with_own_lock(pod, checked, cohort_of(checked, submissions))
    assert manifest


def test_admin_socket_and_probes(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """GetStatus, WatchStatus, ExportEvidence (a whole chain), /readyz before any aggregator's word, metrics."""
    pod.start()
    endorsed(pod, core_of(aggregator))
    with dial_admin(pod.socket) as channel:
        stub = admin_pb2_grpc.AdministrationServiceStub(channel)
        status = stub.GetStatus(admin_pb2.GetStatusRequest()).status
        assert (status.role, status.id, status.phase, status.round) == ("pod", pod.id, "endorsed", 1)
        watch = stub.WatchStatus(admin_pb2.WatchStatusRequest())
        assert next(watch).status.phase == "endorsed"
        assert next(watch).status.phase == "endorsed"
        watch.cancel()
        evidence = list(stub.ExportEvidence(admin_pb2.ExportEvidenceRequest()))
    assert evidence[0].path == "audit.jsonl"
    lines = b"".join(one.chunk for one in evidence).splitlines()
    check_chain(lines)
    assert (os.stat(pod.socket).st_mode & 0o777) == 0o600
    address = (pod.folder / "state" / "http.address").read_text()
    charter = aggregator.roster.charter.hex()[:12]
    for path, needles in {
        "/readyz": ["\nready"],
        "/metrics": [
            "wardround_pod_live 1.0",
            'wardround_pod_phase{phase="endorsed"} 1.0',
            "wardround_committee_quorum 3.0",
            'wardround_pod_answer_seconds_count{order="propose"} 1.0',
            f'wardround_charter_info{{charter="current",digest="{charter}"}} 1.0',
        ],
    }.items():
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
        assert all(needle in text for needle in needles), text


def check_chain(lines: list[bytes]) -> None:
    """Independently of the store: each head is SHA-256(previous head ‖ canonical JSON of [kind, event])."""
    head = bytes(32)
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        canonical = json.dumps([row["kind"], row["event"]], sort_keys=True, separators=(",", ":")).encode()
        head = hashlib.sha256(head + canonical).digest()
        assert (row["sequence"], row["head"]) == (number, head.hex())
    assert len(lines) >= 5


def test_hardened(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """P-22: no core dumps; nobody of this user may look into the process."""
    pod.start()
    assert pod.process is not None
    limits = Path(f"/proc/{pod.process.pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if "core file" in line).split()[4:6] == ["0", "0"]
    # A process that is not dumpable belongs to root in /proc whoever runs it.
    assert os.stat(f"/proc/{pod.process.pid}/mem").st_uid == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda text: text + b"\nspeling: 1\n", "speling"),
        (lambda text: text.replace(b"id: pod-0", b"id: pod-9"), "pod-9"),
        (lambda text: text.replace(b"identity.pem", b"charter.yaml"), "Ed25519"),
        (lambda text: text.replace(b"pin.yaml", b"missing.yaml"), "missing.yaml"),
    ],
)
def test_bad_configuration_is_one_line(aggregator: FakeAggregator, pod: PodProcess, change, word: str) -> None:  # type: ignore[no-untyped-def]  # a lambda
    """Exit code 2 and one line on stderr that names the thing."""
    process = pod.spawn(change(emit(pod.config)))
    assert process.wait(30) == 2
    (line,) = [line for line in pod.log().splitlines() if not line.startswith("{")]
    assert word in line


def test_unpinned_charter_is_refused(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """P-2: the bytes on disk are not those that were pinned."""
    charter = Path(pod.config.charters[0])
    charter.write_bytes(charter.read_bytes() + b"# one more line\n")
    assert pod.spawn().wait(30) == 2
    assert "pinned" in pod.log()


def test_second_process_on_the_store(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """P-15: the second one ends with exit code 2, the first goes on."""
    pod.start()
    first = pod.process
    assert pod.spawn().wait(30) == 2
    assert "in use by another process" in pod.log()
    pod.process = first
    assert pod.go_live().live


def test_second_release_of_one_identity(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """Another store, so no lock stands between them: the aggregator refuses the one that comes second, and it ends."""
    aggregator.taken = True
    assert pod.spawn().wait(30) == 2
    (line,) = [line for line in pod.log().splitlines() if not line.startswith("{")]
    assert "another process with this identity is connected" in line
    aggregator.taken = False
    pod.start()
    assert pod.go_live().live
    aggregator.taken = True
    assert pod.process is not None
    aggregator.stop()
    aggregator.start()
    with pytest.raises(subprocess.TimeoutExpired):
        pod.process.wait(2)
    aggregator.taken = False
    assert aggregator.wait_for(pod.id).live, "who was the pod before does not end, and keeps its round keys"


def test_sigterm_without_an_aggregator(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """SIGTERM ends a pod that has nobody to talk to."""
    pod.start()
    aggregator.stop()
    assert pod.process is not None
    pod.process.send_signal(signal.SIGTERM)
    assert pod.process.wait(20) == 0


def test_new_charter_is_taken_without_a_restart(aggregator: FakeAggregator, pod: PodProcess) -> None:
    """P-26's ground: `next` is reported in a new Watch once it is pinned."""
    pod.start()
    document = aggregator.documents.charter.document
    amended = emit(document.model_copy(update={"version": 2}))
    path = pod.folder / "charter.yaml"
    pod.kill()
    second = pod.folder / "next.yaml"
    second.write_bytes(amended)
    pod.config = pod.config.model_copy(update={"charters": (str(path), str(second))})
    assert len(pod.start().charters) == 1
    digests = (aggregator.roster.charter, load_charter(amended).digest)
    pin = Pin(wardround="pin/v1", current=digests[0].hex(), next=digests[1].hex())
    Path(pod.config.pins).write_bytes(emit(pin))
    assert tuple(aggregator.wait_for(pod.id).charters) == digests
