"""A real gRPC server with real mutual TLS in the aggregator's place, which sends real pod processes what a test says.

The other pods are played by their keys (`Consortium`), so one pod process meets a whole committee.
"""

import hashlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from services.common.clock import SystemClock
from services.common.documents.emit import emit
from services.common.documents.site import DialingConfig, TlsSection
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.certificates import issue_leaf, server_name
from services.common.rpc.feed import Feed
from services.common.rpc.interceptor import peer
from services.common.rpc.leaf import LeafFiles
from services.common.rpc.members import Members
from services.common.rpc.server import RunningServer, serve
from services.common.rpc.signed import to_wire
from services.common.secagg import blob as codec
from services.common.secagg import sealing
from services.common.secagg.messages import Commitment, Core, HighWaterMark, Manifest, Mark, Signed
from services.common.secagg.signing import Signer, digest
from tests.support.consortium import Consortium, PodKeys, Submission, derive
from tests.support.documents import CONSORTIUM, Documents, make_documents
from wardround.keyshare.v1 import keyshare_pb2 as wire
from wardround.keyshare.v1 import keyshare_pb2_grpc

_HOUR = 3_600_000


class FakeAggregator(keyshare_pb2_grpc.KeyShareServiceServicer):
    """`ask` sends one order to a pod and waits for its answer."""

    def __init__(self, folder: Path, documents: Documents | None = None) -> None:
        self.folder = folder
        self.documents = documents or make_documents(demo=True)
        self.roster = self.documents.charter.roster
        self.consortium = consortium_of(self.documents)
        self.offers: dict[bytes, list[tuple[Signed, bytes]]] = {}
        self.lost: set[str] = set()  # kinds of answers that never arrive
        self.dropped = threading.Event()  # one of them came
        self.taken = False  # another process is this pod already
        self.hellos: queue.Queue[wire.Hello] = queue.Queue()
        self._feeds: dict[str, Feed[wire.WatchResponse]] = {}
        self._answers: dict[int, Future[Any]] = {}
        self._number = 0
        self._lock = threading.Lock()
        self.running: RunningServer | None = None
        self.port = 0

    def start(self) -> None:
        aggregator = self.roster.aggregator.id
        leaf = self.leaf(Role.AGGREGATOR, aggregator, [server_name(aggregator, CONSORTIUM)])
        self.running = serve(
            [(keyshare_pb2_grpc.add_KeyShareServiceServicer_to_server, self)],
            lambda: Members.of([self.documents.charter.document]),
            (Role.AGGREGATOR, aggregator),
            leaf,
            address=f"127.0.0.1:{self.port}",
            max_workers=16,
        )
        self.port = self.running.port

    def stop(self) -> None:
        if self.running is not None:
            self.running.stop(0)
            self.running = None

    def leaf(self, role: Role, id: str, names: Sequence[str] = ()) -> LeafFiles:
        root = self.documents.sites[id].root
        issued = issue_leaf(
            root.certificate, root.key, role, id, CONSORTIUM, days=1, now_ms=SystemClock().now_ms(), server_names=names
        )
        files = LeafFiles(self.folder / f"{id}.crt", self.folder / f"{id}.key")
        files.certificate.write_bytes(issued.certificate)
        files.key.write_bytes(issued.key)
        return files

    def ask(self, pod: str, seconds: float = 90, **order: Any) -> Any:
        """The pod's answer; for a release or digests the list of its parts."""
        with self._lock:
            self._number += 1
            number = self._number
        answer: Future[Any] = Future()
        self._answers[number] = answer
        self.send(pod, number, **order)
        parts = answer.result(seconds)
        return parts if {"release", "digest"} & set(order) else parts[0]

    def send(self, pod: str, number: int = 0, **order: Any) -> None:
        self._feeds[pod].push(wire.WatchResponse(command=number, **order))

    def wait_for(self, pod: str, seconds: float = 90) -> wire.Hello:
        """The next Watch of a pod."""
        hello = self.hellos.get(timeout=seconds)
        assert pod in self._feeds
        return hello

    def Watch(
        self, request_iterator: Iterator[wire.WatchRequest], context: grpc.ServicerContext
    ) -> Iterator[wire.WatchResponse]:
        if self.taken:
            raise ServiceError(Reason.CONFLICT, "another process with this identity is connected: stop one")
        hello = next(request_iterator).hello
        feed: Feed[wire.WatchResponse] = Feed(context)
        self._feeds[peer(context).id] = feed
        threading.Thread(target=self._listen, args=(request_iterator, feed), daemon=True).start()
        self.hellos.put(hello)
        yield from feed

    def _listen(self, requests: Iterator[wire.WatchRequest], feed: Feed[wire.WatchResponse]) -> None:
        parts: list[Any] = []
        with suppress(grpc.RpcError):
            for request in requests:
                answer = request.answer
                kind = answer.WhichOneof("answer")
                if kind in self.lost:
                    self.dropped.set()
                    continue
                # A chunk is dropped as it comes: the test's own memory is not what is measured.
                chunk = answer.chunk
                parts.append(
                    (chunk.piece, chunk.index, hashlib.sha256(chunk.data).digest()) if kind == "chunk" else answer
                )
                if not answer.more:
                    waiting = self._answers.get(answer.command)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(parts)
                    parts = []
        feed.close()

    def FetchOffer(
        self, request: wire.FetchOfferRequest, context: grpc.ServicerContext
    ) -> Iterator[wire.FetchOfferResponse]:
        for header, box in self.offers[request.manifest]:
            yield wire.FetchOfferResponse(header=to_wire(header), box=box)


def consortium_of(documents: Documents) -> Consortium:
    """All members' private keys of a real charter."""
    roster = documents.charter.roster
    pods = []
    for member in roster.pods:
        private, public = sealing.generate(roster.suite)
        identity = documents.sites[member.id].signer
        pods.append(PodKeys(identity, Signer.from_seed(derive("round", member.id)), private, public))
    hospitals = {id: documents.sites[id].signer for id in roster.hospitals}
    return Consortium(roster, documents.sites[roster.aggregator.id].signer, pods, hospitals)


class PodProcess:
    """`python -m services.keyshare` for one pod of the charter."""

    def __init__(self, aggregator: FakeAggregator, index: int = 0) -> None:
        self.aggregator = aggregator
        self.id = aggregator.roster.pods[index].id
        self.folder = aggregator.folder / self.id
        self.folder.mkdir()
        charter, pin, key = self.folder / "charter.yaml", self.folder / "pin.yaml", self.folder / "identity.pem"
        charter.write_bytes(aggregator.documents.charter.blob)
        pin.write_bytes(aggregator.documents.pin())
        private = aggregator.documents.sites[self.id].signer._private_key
        key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        leaf = aggregator.leaf(Role.POD, self.id)
        self.socket = Path("/tmp") / f"wardround-{os.getpid()}-{self.id}-{time.monotonic_ns()}.sock"
        self.config = DialingConfig(
            id=self.id, charters=(str(charter),), pins=str(pin), identity_key=str(key),
            tls=TlsSection(certificate=str(leaf.certificate), key=str(leaf.key)), state=str(self.folder / "state"),
            http="127.0.0.1:0", aggregator=f"127.0.0.1:{aggregator.port}", admin_socket=str(self.socket),
        )  # fmt: skip
        self.process: subprocess.Popen[str] | None = None

    @property
    def file(self) -> Path:
        return self.folder / "pod.yaml"

    def spawn(self, config: bytes | None = None) -> "subprocess.Popen[str]":
        self.file.write_bytes(config if config is not None else emit(self.config))
        command = [sys.executable, "-m", "services.keyshare", "--config", str(self.file)]
        self.process = subprocess.Popen(command, stderr=(self.folder / "log").open("a"), text=True)
        return self.process

    def start(self) -> wire.Hello:
        """Run until its Watch has arrived."""
        self.spawn()
        return self.aggregator.wait_for(self.id)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(20)
        self.socket.unlink(missing_ok=True)
        return code

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def memory(self) -> dict[str, int]:
        """VmRSS and VmHWM in bytes, as /proc says."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))
        }

    def go_live(self, marks: Sequence[Mark] = ()) -> Any:
        """All three forms of HighWater, with the same marks of all other pods."""
        ask, consortium = self.aggregator.ask, self.aggregator.consortium
        nonce = ask(self.id, high_water=wire.HighWaterOrder(nonce=wire.NonceForm())).nonce
        signed = [
            consortium.pods[index].identity.sign(
                "highwater", codec.encode(HighWaterMark(nonce, self.id, member.id, tuple(marks)))
            )
            for index, member in enumerate(consortium.roster.pods)
            if member.id != self.id
        ]
        deliver = wire.DeliverForm(marks=[to_wire(one) for one in signed])
        return ask(self.id, high_water=wire.HighWaterOrder(deliver=deliver))

    def commit(self, core: Core, attempt: int = 1, abandons: Sequence[bytes] = ()) -> tuple[Any, bytes]:
        """(the pod's answer to Propose, the manifest with the other pods' commitments)."""
        aggregator, consortium = self.aggregator, self.aggregator.consortium
        now = SystemClock().now_ms()
        proposal = consortium.proposal(core, attempt, deadline=now + _HOUR, expires=now + _HOUR)
        answer = aggregator.ask(self.id, propose=wire.ProposeOrder(proposal=to_wire(proposal), abandons=abandons))
        if answer.WhichOneof("answer") == "refusal":
            return answer, b""
        own = Signed(answer.commitment.blob, answer.commitment.signature)
        assert codec.decode(Commitment, own.blob).proposal == digest("proposal", proposal.blob)
        index = self.aggregator.roster.pod_index(self.id)
        listed = [
            own if other == index else consortium.commitment(proposal, other, core, attempt)
            for other in range(len(consortium.roster.pods))
        ]
        return answer, codec.encode(Manifest(proposal, tuple(listed)))

    def offer(self, manifest: bytes, submissions: Sequence[Submission], along: bool = False) -> Any:
        """The pod's answer to Offer; `along`: the order holds the submissions, else the pod asks for them."""
        index = self.aggregator.roster.pod_index(self.id)
        items = [(one.header, one.boxes[index]) for one in submissions]
        order = wire.OfferOrder(manifest=manifest)
        if along:
            order.offered.extend(wire.FetchOfferResponse(header=to_wire(header), box=box) for header, box in items)
        else:
            self.aggregator.offers[digest("manifest", manifest)] = items
        return self.aggregator.ask(self.id, offer=order)
