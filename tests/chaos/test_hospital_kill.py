"""kill −9 of a real hospital process at EVERY named step of a round, then a new life against the same aggregator.

What must hold whatever the step (P-10, L-1): a debit is never lost and never doubled; after the debit the bytes
that leave are those of the first life; before it nothing had left; x is drawn once as soon as it is stored.
"""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.rpc.unix import dial_admin
from services.common.secagg.digests import chunk_digest, vector_digest
from services.common.secagg.ring import CHUNK_BYTES
from services.common.secagg.signing import digest
from services.hospital_node.ledger import verify_export
from services.hospital_node.ports import STEPS
from tests.support.consortium import derive
from tests.support.fake_aggregator_for_hospitals import FakeAggregator
from tests.support.hospital_world import FixedTrainer, World, make_world
from wardround.admin.v1 import admin_pb2, admin_pb2_grpc

ROOT = Path(__file__).parents[2]
AFTER_DEBIT = STEPS[STEPS.index("debited") :]
AFTER_VECTOR = STEPS[STEPS.index("vector-kept") :]
AFTER_RESULT = ("result-checked", "scrubbed")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def aggregator(world: World) -> Iterator[FakeAggregator]:
    fake = FakeAggregator(world)
    fake.start()
    yield fake
    fake.stop()


class Process:
    """A hospital process and what it left on disk."""

    def __init__(self, world: World, aggregator: FakeAggregator, folder: Path) -> None:
        self.folder = folder
        self.config = world.write_site(folder, aggregator.address)
        self.running: subprocess.Popen[bytes] | None = None
        self.trainer = FixedTrainer(folder / "trainer.log")

    def start(self, *kill: str) -> None:
        self.running = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hospital_runner", str(self.config), *kill],
            cwd=ROOT,
            stderr=(self.folder / "stderr.log").open("ab"),
        )

    def wait_killed(self) -> None:
        assert self.running is not None
        assert self.running.wait(60) == -signal.SIGKILL, (self.folder / "stderr.log").read_text()[-3000:]

    def stop(self) -> None:
        """SIGTERM: a clean end, exit code 0."""
        if self.running is not None and self.running.poll() is None:
            self.running.terminate()
            assert self.running.wait(60) == 0, (self.folder / "stderr.log").read_text()[-3000:]

    def kill(self) -> None:
        if self.running is not None and self.running.poll() is None:
            self.running.kill()
            self.running.wait(60)

    def rows(self, sql: str) -> list[tuple[object, ...]]:
        connection = sqlite3.connect(self.folder / "state" / "hospital.sqlite")
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def vectors(self) -> list[Path]:
        return sorted((self.folder / "state" / "vectors" / "blobs").iterdir())


@pytest.fixture
def process(world: World, aggregator: FakeAggregator, tmp_path: Path) -> Iterator[Process]:
    made = Process(world, aggregator, tmp_path / "alice")
    yield made
    made.kill()


def finish(aggregator: FakeAggregator) -> None:
    header = digest("header", aggregator.submissions()[0].header.blob)
    members = {"alice": header, "bob": derive("header", "bob"), "carol": derive("header", "carol")}
    aggregator.finish(aggregator.manifests[1], members)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_no_debit_is_lost_or_doubled_and_bytes_are_equal(
    aggregator: FakeAggregator, process: Process, step: str
) -> None:
    """P-10, L-1: one debit, one vector, one submission in the end; identical bytes on a resend."""
    aggregator.open_round(1)
    aggregator.collect()
    process.start(step)
    if step in AFTER_RESULT:
        aggregator.wait(lambda: bool(aggregator.submissions()))
        finish(aggregator)
    process.wait_killed()

    first_life = process.rows("SELECT header, boxes, chunk_digests, seeds FROM submissions")
    debits = process.rows("SELECT sequence, head FROM ledger")
    assert (len(first_life), len(debits)) == ((1, 2) if step in AFTER_DEBIT else (0, 0))  # joined, debited
    if step not in AFTER_DEBIT:
        assert aggregator.opened == []  # debit before the first byte
    first_bytes = aggregator.opened[0] if aggregator.opened else None

    calls = len(aggregator.calls)
    process.start()
    aggregator.wait(lambda: "study" in aggregator.calls[calls:] and bool(aggregator.submissions()))
    if step not in AFTER_RESULT:
        finish(aggregator)
    aggregator.wait(lambda: not process.vectors())  # the second life has taken the result and scrubbed
    process.stop()

    (arrived,) = aggregator.arrived.values()
    if first_life:
        header, _, chunk_digests, _ = first_life[0]
        assert (arrived.header.blob, arrived.chunk_digests) == (header, chunk_digests)
    for opened in aggregator.opened:
        assert (opened.header, opened.boxes, opened.chunk_digests) == (
            arrived.header,
            arrived.boxes,
            arrived.chunk_digests,
        )
    assert first_bytes is None or first_bytes.header == arrived.header
    ledger = process.rows("SELECT sequence, head FROM ledger")
    assert len(ledger) == 2
    assert not debits or ledger == debits
    trained = process.trainer.lines().count("train 1")
    assert trained == (1 if step in AFTER_VECTOR else 2 if step in ("trained", "vector-stored") else 1)
    checked = aggregator.manifests[1]
    assert set(aggregator.open_vector(arrived, checked)[:16:4]) == {1}  # sentinels


def test_killed_in_the_upload_the_next_life_goes_on_from_the_chunk_that_is_missing(
    aggregator: FakeAggregator, process: Process
) -> None:
    """Resumable by chunk: y has three chunks, the process dies having passed the second to gRPC."""
    aggregator.open_round(1)
    aggregator.collect()
    process.start("chunk-sent", "2")
    process.wait_killed()
    aggregator.wait(lambda: aggregator.calls.count("chunk") >= 1)
    process.start()
    aggregator.wait(lambda: bool(aggregator.submissions()))
    process.stop()
    assert aggregator.calls.count("chunk") == len(aggregator.submissions()[0].chunks) == 3


def test_killed_before_the_receipt_x_is_reused_under_the_next_attempt(
    aggregator: FakeAggregator, process: Process
) -> None:
    """P-10: killed mid-upload, the attempt is abandoned meanwhile; under a+1 the same x, fresh masks, no new debit."""
    aggregator.open_round(1)
    first = aggregator.collect()
    process.start("chunk-sent")
    process.wait_killed()
    half = next(iter(aggregator.arrived.values()))
    aggregator.abandon(first)
    second = aggregator.collect(2)
    process.start()
    aggregator.wait(lambda: bool(aggregator.submissions()))
    process.stop()
    (whole,) = aggregator.submissions()
    assert whole.header != half.header
    assert process.trainer.lines().count("train 1") == 1
    assert len(process.rows("SELECT 1 FROM ledger")) == 2  # joined, and one debit
    ((x,),) = process.rows("SELECT x FROM vectors")
    plain = aggregator.open_vector(whole, second)
    starts = range(0, len(plain), CHUNK_BYTES)
    assert vector_digest(len(plain), [chunk_digest(plain[at : at + CHUNK_BYTES]) for at in starts]) == x


def test_status_and_evidence_over_the_admin_socket(aggregator: FakeAggregator, process: Process) -> None:
    """GetStatus, WatchStatus and ExportEvidence on the Unix socket; the exported ledger verifies offline (L-5)."""
    aggregator.open_round(1)
    aggregator.collect()
    process.start()
    aggregator.wait(lambda: bool(aggregator.submissions()))
    with dial_admin(process.folder / "admin.sock") as channel:
        stub = admin_pb2_grpc.AdministrationServiceStub(channel)
        for answer in stub.WatchStatus(admin_pb2.WatchStatusRequest(), timeout=30):
            if answer.status.phase == "submitted":
                break
        status = stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=60).status
        files: dict[str, bytes] = {}
        path = ""
        for part in stub.ExportEvidence(admin_pb2.ExportEvidenceRequest(), timeout=60):
            path = part.path or path
            files[path] = files.get(path, b"") + part.chunk
    assert (status.role, status.id, status.round, status.attempt) == ("hospital", "alice", 1, 1)
    assert 0 < status.figures["epsilon_left"] <= 8
    assert set(files) == {"ledger.jsonl", "receipts/0001-1.signed"}
    mark = verify_export(files["ledger.jsonl"].decode().splitlines())
    assert mark is not None
    assert mark.head in aggregator.submissions()[0].header.blob  # L-4: in the signed header
    process.stop()


def test_hospital_comes_back_when_the_aggregator_does(
    world: World, process: Process, aggregator: FakeAggregator
) -> None:
    """Nodes that lose the connection dial again by themselves."""
    process.start()
    aggregator.wait(lambda: bool(aggregator._feeds))
    address = aggregator.address
    aggregator.stop()
    second = FakeAggregator(world)
    second.start(address)
    try:
        second.open_round(1)
        second.collect()
        second.wait(lambda: bool(second.submissions()), 60)
        process.stop()
    finally:
        second.stop()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.yaml").write_text("idd: alice\n"), "idd"),
        (lambda folder: (folder / "policy.yaml").unlink(), "policy.yaml"),
        (lambda folder: (folder / "identity.pem").write_text("no key"), "identity.pem"),
    ],
)
def test_bad_configuration_ends_with_code_2_and_one_line(
    world: World, aggregator: FakeAggregator, tmp_path: Path, damage: object, words: str
) -> None:
    folder = tmp_path / "alice"
    config = world.write_site(folder, "127.0.0.1:1")
    damage(folder)  # type: ignore[operator]  # a lambda of the table above
    ended = subprocess.run(
        [sys.executable, "-m", "services.hospital_node", "--config", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert words in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_missing_data_folder_ends_with_code_2_and_one_line(
    world: World, aggregator: FakeAggregator, tmp_path: Path
) -> None:
    config = world.write_site(tmp_path / "alice", "127.0.0.1:1")
    ended = subprocess.run(
        [sys.executable, "-m", "services.hospital_node", "--config", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "metadata.csv" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
