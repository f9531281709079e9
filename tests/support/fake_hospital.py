"""A hospital in the test process: watches rounds and submits what the test says, masked and sealed for real.

`values(round)` gives the int64 array of every lane class but the sentinels; the default is i + round for parameter i.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.signed import from_wire, to_wire
from services.common.secagg import masking, sealing
from services.common.secagg.blob import encode
from services.common.secagg.certificate import CheckedManifest, check_endorsed, check_manifest
from services.common.secagg.digests import VectorDigest, chunk_digest
from services.common.secagg.encoding import LaneTable
from services.common.secagg.messages import BoxDigest, Header, LedgerMark, Signed
from services.common.secagg.ring import CHUNK_BYTES
from services.common.secagg.signing import digest
from tests.support.aggregator_world import World
from tests.support.packed import encoded, masked
from wardround.model.v1 import model_pb2
from wardround.model.v1.model_pb2_grpc import ModelDistributionServiceStub
from wardround.round.v1 import round_pb2
from wardround.round.v1.round_pb2_grpc import RoundCoordinationServiceStub
from wardround.submission.v1 import submission_pb2 as pb
from wardround.submission.v1.submission_pb2_grpc import UpdateSubmissionServiceStub

Values = Callable[[LaneTable, int], dict[str, np.ndarray]]
Mark = Callable[[CheckedManifest], LedgerMark]


def plain_values(seed: int) -> Values:
    """parameter i of round r = (i % 11) + seed + r, control i = (i % 7) - seed, in units of the lane; all else 1."""

    def values(table: LaneTable, number: int) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for lane in table.lanes[1:]:
            if lane.name == "parameter":
                found[lane.name] = np.arange(lane.values, dtype=np.int64) % 11 + seed + number
            elif lane.name == "control":
                found[lane.name] = np.arange(lane.values, dtype=np.int64) % 7 - seed
            else:
                found[lane.name] = np.ones(lane.values, np.int64)
        return found

    return values


@dataclass
class Update:
    """A masked, sealed, signed update, ready to be sent (or spoilt)."""

    checked: CheckedManifest
    header: Signed
    boxes: list[bytes]
    chunks: list[bytes]

    @property
    def name(self) -> bytes:
        return digest("header", self.header.blob)

    def opening(self, first_chunk: int = 0) -> pb.SubmitUpdateRequest:
        digests = b"".join(chunk_digest(chunk) for chunk in self.chunks)
        opening = pb.SubmissionOpen(
            header=to_wire(self.header), boxes=self.boxes, chunk_digests=digests, first_chunk=first_chunk
        )
        return pb.SubmitUpdateRequest(open=opening)

    def parts(self, first_chunk: int = 0) -> Iterator[pb.SubmitUpdateRequest]:
        yield self.opening(first_chunk)
        for index, chunk in enumerate(self.chunks[first_chunk:], first_chunk):
            yield pb.SubmitUpdateRequest(chunk=pb.SubmissionChunk(index=index, data=chunk))


class FakeHospital:
    """One hospital. With `auto` it submits once for every manifest as soon as it sees it."""

    def __init__(
        self, world: World, id: str, values: Values | None = None, auto: bool = True, mark: Mark | None = None
    ) -> None:
        self.id = id
        self._world = world
        self.signer = world.sites[id].signer
        self.roster = world.documents.charter.roster
        self.charters = [world.documents.charter.digest]
        self.values = values or plain_values(len(id))
        self.auto = auto
        self.mark = mark or (lambda checked: LedgerMark(checked.core.round, os.urandom(32)))
        self.seen: list[round_pb2.WatchRoundsResponse] = []
        self.receipts: dict[bytes, Signed] = {}
        self.refusals: list[ServiceError] = []
        self.sent: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._changed = threading.Condition()
        self._caller = world.caller(Role.HOSPITAL, id)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def stop(self) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._caller.close()
        self._thread.join(5)
        self._worker.join(5)

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                request = round_pb2.WatchRoundsRequest(charters=self.charters)
                pick = lambda c: RoundCoordinationServiceStub(c).WatchRounds  # noqa: E731
                with self._caller.stream(pick, request, seconds=3600) as stream:
                    for message in stream:
                        with self._changed:
                            self.seen.append(message)
                            self._changed.notify_all()
            except ServiceError:
                self._stop.wait(0.05)

    def _work(self) -> None:
        done = 0
        while not self._stop.is_set():
            with self._changed:
                while len(self.seen) <= done and not self._stop.is_set():
                    self._changed.wait(0.5)
                done = len(self.seen)
                now = self.seen[-1] if self.seen else None
            if not self.auto or now is None or now.phase != round_pb2.ROUND_PHASE_COLLECTING:
                continue
            if now.manifest in self.receipts:
                continue
            try:
                self.submit(self.prepare(now))
            except ServiceError as error:
                self.refusals.append(error)
                if error.reason in (Reason.UNREACHABLE, Reason.STORAGE):
                    done = 0  # again, a little later
                    self._stop.wait(0.1)

    @property
    def now(self) -> round_pb2.WatchRoundsResponse:
        return self.seen[-1]

    def wait_for(
        self, what: Callable[[round_pb2.WatchRoundsResponse], bool], seconds: float = 120
    ) -> round_pb2.WatchRoundsResponse:
        """The first state (from now on) for which `what` holds."""
        with self._changed:
            found = self._changed.wait_for(lambda: bool(self.seen) and what(self.seen[-1]), seconds)
            assert found, f"not within {seconds} s; last seen: {self.seen[-1] if self.seen else None}"
            return self.seen[-1]

    def call(self, stub: Any, method: str, request: Any, seconds: float = 60) -> Any:
        return self._caller.unary(lambda c: getattr(stub(c), method), request, seconds=seconds)

    def manifest(self, study: bytes, number: int) -> CheckedManifest:
        answer = self.call(
            RoundCoordinationServiceStub, "GetManifest", round_pb2.GetManifestRequest(study=study, round=number)
        )
        checked = check_manifest(answer.manifest, self.roster)
        check_endorsed(checked, [from_wire(endorsement) for endorsement in answer.endorsements])
        self.abandons = list(answer.abandons)
        return checked

    def fetch_model(self, model: bytes, offset: int = 0) -> bytes:
        request = model_pb2.FetchModelRequest(digest=model, offset=offset)
        with self._caller.stream(lambda c: ModelDistributionServiceStub(c).FetchModel, request, seconds=60) as answers:
            return b"".join(answer.chunk for answer in answers)

    def prepare(self, now: round_pb2.WatchRoundsResponse, salt: bytes = b"") -> Update:
        """Encode, mask, seal, sign for the open manifest."""
        checked = self.manifest(now.study, now.round)
        place = (checked.core.round, checked.proposal.attempt)
        if place not in self.sent:
            self.sent[place] = self.values(checked.table, checked.core.round)
        x = encoded(checked.table, self.sent[place], noised=True)
        return self.mask(checked, bytes(x))

    def mask(self, checked: CheckedManifest, x: bytes) -> Update:
        committee = self.roster.committee
        seeds = [os.urandom(32) for _ in committee.pieces]
        keys = [masking.stream_key(seed, checked.M, self.id, piece) for piece, seed in enumerate(seeds)]
        vector, chunks = VectorDigest(len(x)), []
        for chunk in masked(x, checked.table.ring, keys):
            vector.add(chunk)
            chunks.append(bytes(chunk))
        assert all(len(chunk) == CHUNK_BYTES for chunk in chunks[:-1])
        boxes = [
            sealing.seal(
                self.roster.suite,
                commitment.sealing_key,
                sealing.pack_seeds(seeds[piece] for piece in committee.pieces_of(pod)),
                sealing.box_info(checked.M, self.id, pod),
            )
            for pod, commitment in checked.commitments.items()
        ]
        digests = tuple(
            BoxDigest(pod, hashlib.sha256(box).digest()) for pod, box in zip(checked.commitments, boxes, strict=True)
        )
        coms = tuple(masking.commitment(checked.M, self.id, piece, seed) for piece, seed in enumerate(seeds))
        lanes = checked.table.total_lanes
        header = Header(checked.M, self.id, lanes, coms, digests, vector.result(), self.mark(checked))
        return Update(checked, self.signer.sign("header", encode(header)), boxes, chunks)

    def submit(self, update: Update, parts: Iterator[pb.SubmitUpdateRequest] | None = None) -> Signed:
        """Send; the receipt is kept. Raises the aggregator's refusal."""
        answer = self._caller.upload(
            lambda c: UpdateSubmissionServiceStub(c).SubmitUpdate,
            update.parts() if parts is None else parts,
            seconds=60,
        )
        self.receipts[update.checked.M] = from_wire(answer.receipt)
        return self.receipts[update.checked.M]

    def status(self, update: Update) -> pb.UploadStatusResponse:
        request = pb.UploadStatusRequest(manifest=update.checked.M, header=update.name)
        return self.call(UpdateSubmissionServiceStub, "UploadStatus", request)

    def decline(self, now: round_pb2.WatchRoundsResponse) -> None:
        request = round_pb2.DeclineRoundRequest(study=now.study, round=now.round, reason="POLICY_REFUSES")
        self.call(RoundCoordinationServiceStub, "DeclineRound", request)
