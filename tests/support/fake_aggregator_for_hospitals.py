"""An aggregator as hospitals see it, over real mutual TLS; tests script what it says, honest or not.

It keeps what arrives (also half uploads), holds the pods' keys and can open what it was sent.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from services.common.documents.shape import core_for
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.feed import Feed
from services.common.rpc.server import RunningServer, serve
from services.common.rpc.signed import from_wire, to_wire
from services.common.secagg import masking, sealing
from services.common.secagg.blob import encode
from services.common.secagg.certificate import CheckedManifest, check_header, check_manifest
from services.common.secagg.digests import VectorDigest
from services.common.secagg.messages import ZERO_DIGEST, Core, Header, Manifest, Receipt, Result, Signed
from services.common.secagg.ring import CHUNK_BYTES, RingSum, chunk_lengths
from services.common.secagg.signing import digest
from tests.support.consortium import derive
from tests.support.hospital_world import AGGREGATOR, World
from wardround.model.v1 import model_pb2, model_pb2_grpc
from wardround.round.v1 import round_pb2, round_pb2_grpc
from wardround.submission.v1 import submission_pb2, submission_pb2_grpc


@dataclass
class Arrived:
    """What came under one header digest."""

    header: Signed
    boxes: tuple[bytes, ...]
    chunk_digests: bytes
    chunks: list[bytes] = field(default_factory=list)
    receipt: Signed | None = None

    @property
    def bytes_sent(self) -> tuple[Any, ...]:
        return self.header, self.boxes, self.chunk_digests, b"".join(self.chunks)


class FakeAggregator(
    round_pb2_grpc.RoundCoordinationServiceServicer,
    model_pb2_grpc.ModelDistributionServiceServicer,
    submission_pb2_grpc.UpdateSubmissionServiceServicer,
):
    def __init__(self, world: World) -> None:
        self.world = world
        self.models = dict(world.models)
        self.studies = {world.study.digest: world.study.blob}
        self.state = round_pb2.WatchRoundsResponse(
            phase=round_pb2.ROUND_PHASE_IDLE, charter=world.charter.digest, study=world.study.digest
        )
        self.manifests: dict[int, CheckedManifest] = {}
        self.answer: round_pb2.GetManifestResponse | None = None
        self.abandons: list[bytes] = []
        self.links: list[round_pb2.ResultLink] = []
        self.previous = ZERO_DIGEST
        self.model = world.initial
        self.arrived: dict[bytes, Arrived] = {}
        self.opened: list[Arrived] = []
        self.calls: list[str] = []
        self.declined: list[tuple[int, str]] = []
        self.hold_receipt = False
        self.sends_along = False  # manifest and newest result travel with the state, as the real one does it
        self.address = ""
        self._feeds: list[Feed[round_pb2.WatchRoundsResponse]] = []
        self._changed = threading.Condition()
        self._running: RunningServer | None = None

    # --- life -------------------------------------------------------------------------------------------
    def start(self, address: str = "127.0.0.1:0") -> str:
        """Listen; host:port."""
        own = (Role.AGGREGATOR, AGGREGATOR)
        self._running = serve(
            [
                (round_pb2_grpc.add_RoundCoordinationServiceServicer_to_server, self),
                (model_pb2_grpc.add_ModelDistributionServiceServicer_to_server, self),
                (submission_pb2_grpc.add_UpdateSubmissionServiceServicer_to_server, self),
            ],
            self.world.tls.members,
            own,
            self.world.tls.leaf(*own),
            address=address,
            max_workers=8,
        )
        self.address = f"127.0.0.1:{self._running.port}"
        return self.address

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop(0)

    def publish(self, **changes: Any) -> None:
        """Change the state and tell the watchers."""
        with self._changed:
            for name, value in changes.items():
                setattr(self.state, name, value)
            self._send_along()
            for feed in self._feeds:
                feed.push(self._copy())

    def _send_along(self) -> None:
        self.state.ClearField("endorsed")
        self.state.ClearField("newest_result")
        collecting = self.state.phase == round_pb2.ROUND_PHASE_COLLECTING
        if self.sends_along and collecting and self.answer is not None:
            self.state.endorsed.CopyFrom(self.answer)
        if self.sends_along and not collecting and self.links:
            self.state.newest_result.CopyFrom(self.links[-1])
            self.state.newest_result_after = _round(self.links[-2]) if len(self.links) > 1 else 0

    def wait(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Return when `condition` holds; it is looked at after every call that arrives."""
        end = time.monotonic() + seconds
        with self._changed:
            while not condition():
                left = end - time.monotonic()
                assert left > 0, f"waited in vain; calls so far: {self.calls[-30:]}"
                self._changed.wait(min(left, 0.1))

    # --- what an honest aggregator says -------------------------------------------------------------------
    def core(self, round_number: int) -> Core:
        return core_for(self.world.charter, self.world.study, round_number, self.previous, self.model)

    def open_round(self, round_number: int) -> None:
        self.publish(
            phase=round_pb2.ROUND_PHASE_TRAINING,
            round=round_number,
            attempt=0,
            model=self.model,
            model_bytes=len(self.models[self.model]),
            previous_result=self.previous,
            manifest=b"",
            closed_round=round_number - 1,
        )

    def make_manifest(
        self, core: Core, attempt: int, *, seconds: float = 60, expires: float = 600
    ) -> tuple[CheckedManifest, list[Signed]]:
        """A manifest that passes P-17, with its endorsements."""
        consortium, now = self.world.consortium, int(time.time() * 1000)
        proposal = consortium.proposal(
            core, attempt, deadline=now + int(seconds * 1000), expires=now + int(expires * 1000)
        )
        commitments = tuple(consortium.commitment(proposal, pod, core, attempt) for pod in range(len(consortium.pods)))
        checked = check_manifest(encode(Manifest(proposal, commitments)), self.world.charter.roster)
        return checked, consortium.endorsements(checked)

    def collect(self, attempt: int = 1, core: Core | None = None, **times: float) -> CheckedManifest:
        """Go to COLLECTING with a fresh manifest of the open round."""
        checked, endorsements = self.make_manifest(core or self.core(self.state.round), attempt, **times)
        self.offer(checked, endorsements)
        return checked

    def offer(self, checked: CheckedManifest, endorsements: list[Signed]) -> None:
        self.manifests[checked.proposal.attempt] = checked
        self.answer = round_pb2.GetManifestResponse(
            manifest=checked.blob, endorsements=map(to_wire, endorsements), abandons=self.abandons
        )
        self.publish(phase=round_pb2.ROUND_PHASE_COLLECTING, attempt=checked.proposal.attempt, manifest=checked.M)

    def abandon(self, checked: CheckedManifest) -> None:
        """The pods give an attempt up; the round goes back to TRAINING."""
        self.abandons.append(self.world.consortium.abandon_certificate(checked))
        self.publish(phase=round_pb2.ROUND_PHASE_TRAINING, manifest=b"")

    def finish(
        self, checked: CheckedManifest, members: dict[str, bytes], model: bytes | None = None, **changes: Any
    ) -> None:
        """Publish the result of `checked` over `members` (hospital → header digest), and close its round."""
        consortium = self.world.consortium
        cohort = consortium.cohort(checked, members)
        certificate = consortium.certificate(cohort)
        core = checked.core
        plain = Result(
            core.charter, core.study, core.round, checked.proposal.attempt, checked.M, 1, cohort.digest,
            hashlib.sha256(certificate).digest(), derive("sum"), model or core.model, core.round,
            core.previous_result, b"{}",
        )  # fmt: skip
        signed = consortium.aggregator.sign("result", encode(replace(plain, **changes)))
        self.links.append(
            round_pb2.ResultLink(
                result=to_wire(signed),
                manifest=checked.blob,
                endorsements=map(to_wire, consortium.endorsements(checked)),
                certificate=certificate,
            )
        )
        self.previous, self.model, self.abandons = digest("result", signed.blob), plain.model, []
        self.publish(
            phase=round_pb2.ROUND_PHASE_IDLE, previous_result=self.previous, closed_round=core.round, manifest=b""
        )

    # --- what it finds out -------------------------------------------------------------------------------
    def submissions(self) -> list[Arrived]:
        """Complete ones, in order."""
        return [arrived for arrived in self.arrived.values() if arrived.receipt is not None]

    def open_vector(self, arrived: Arrived, checked: CheckedManifest) -> bytes:
        """x as the pods together would find it: seeds from the boxes, streams subtracted from y. Checks every com."""
        header = check_header(arrived.header, checked)
        committee, ring = checked.roster.committee, checked.table.ring
        seeds: dict[int, bytes] = {}
        for entry, box in zip(header.boxes, arrived.boxes, strict=True):
            assert hashlib.sha256(box).digest() == entry.digest
            pieces = committee.pieces_of(entry.pod)
            info = sealing.box_info(checked.M, header.hospital, entry.pod)
            plain = sealing.open_box(self.world.consortium.pods[entry.pod].sealing, box, info)
            for piece, seed in zip(pieces, sealing.unpack_seeds(plain, len(pieces)), strict=True):
                assert seeds.setdefault(piece, seed) == seed
                assert masking.commitment(checked.M, header.hospital, piece, seed) == header.commitments[piece]
        y = b"".join(arrived.chunks)
        keys = [masking.stream_key(seeds[j], checked.M, header.hospital, j) for j in sorted(seeds)]
        streams = masking.sum_streams(keys, ring, len(y), 0, len(chunk_lengths(len(y))), bytes)
        out = bytearray()
        for index, stream in enumerate(streams):
            total = RingSum(ring, len(stream))
            total.add(y[index * CHUNK_BYTES : index * CHUNK_BYTES + len(stream)])
            total.subtract(stream)
            out += total.result()
        return bytes(out)

    # --- rpcs --------------------------------------------------------------------------------------------
    def WatchRounds(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        feed: Feed[round_pb2.WatchRoundsResponse] = Feed(context)
        with self._changed:
            self._feeds.append(feed)
            feed.push(self._copy())
        yield from feed

    def GetStudy(self, request: Any, context: grpc.ServicerContext) -> round_pb2.GetStudyResponse:
        self._note("study")
        return round_pb2.GetStudyResponse(study=self.studies[request.digest])

    def GetManifest(self, request: Any, context: grpc.ServicerContext) -> round_pb2.GetManifestResponse:
        self._note("manifest")
        if self.answer is None:
            raise ServiceError(Reason.NOT_FOUND, "no manifest yet")
        return self.answer

    def ListResults(self, request: Any, context: grpc.ServicerContext) -> round_pb2.ListResultsResponse:
        self._note("results")
        found = [link for link in self.links if _round(link) > request.after_round]
        return round_pb2.ListResultsResponse(links=found)

    def DeclineRound(self, request: Any, context: grpc.ServicerContext) -> round_pb2.DeclineRoundResponse:
        with self._changed:
            self.declined.append((request.round, request.reason))
        self._note("decline")
        return round_pb2.DeclineRoundResponse()

    def FetchModel(self, request: Any, context: grpc.ServicerContext) -> Iterator[model_pb2.FetchModelResponse]:
        self._note("model")
        data = self.models[request.digest]
        for start in range(request.offset, len(data), CHUNK_BYTES):
            yield model_pb2.FetchModelResponse(chunk=data[start : start + CHUNK_BYTES], total=len(data))

    def UploadStatus(self, request: Any, context: grpc.ServicerContext) -> submission_pb2.UploadStatusResponse:
        self._note("upload-status")
        arrived = self.arrived.get(request.header)
        if arrived is None:
            return submission_pb2.UploadStatusResponse()
        receipt = None if arrived.receipt is None else to_wire(arrived.receipt)
        return submission_pb2.UploadStatusResponse(next_chunk=len(arrived.chunks), receipt=receipt)

    def SubmitUpdate(
        self, request_iterator: Iterator[Any], context: grpc.ServicerContext
    ) -> submission_pb2.SubmitUpdateResponse:
        opening = next(request_iterator).open
        header = from_wire(opening.header)
        arrived = Arrived(header, tuple(opening.boxes), opening.chunk_digests)
        with self._changed:
            self.opened.append(arrived)
            arrived = self.arrived.setdefault(digest("header", header.blob), arrived)
        self._note("submit")
        assert opening.first_chunk == len(arrived.chunks)
        for part in request_iterator:
            assert part.chunk.index == len(arrived.chunks)
            arrived.chunks.append(part.chunk.data)
            self._note("chunk")
        checked = next(m for m in self.manifests.values() if _header(header).manifest == m.M)
        parsed = check_header(header, checked)
        vector = VectorDigest(sum(map(len, arrived.chunks)))
        assert b"".join(vector.add(chunk) for chunk in arrived.chunks) == arrived.chunk_digests
        assert vector.result() == parsed.vector
        receipt = Receipt(
            checked.M, parsed.hospital, digest("header", header.blob), parsed.vector, int(time.time() * 1000)
        )
        if self.hold_receipt:
            raise ServiceError(Reason.UNREACHABLE, "the answer is lost")
        arrived.receipt = self.world.consortium.aggregator.sign("receipt", encode(receipt))
        self._note("receipt")
        return submission_pb2.SubmitUpdateResponse(receipt=to_wire(arrived.receipt))

    def _note(self, call: str) -> None:
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()

    def _copy(self) -> round_pb2.WatchRoundsResponse:
        copy = round_pb2.WatchRoundsResponse()
        copy.CopyFrom(self.state)
        return copy


def _header(signed: Signed) -> Header:
    from services.common.secagg.blob import decode

    return decode(Header, signed.blob)


def _round(link: round_pb2.ResultLink) -> int:
    from services.common.secagg.blob import decode

    return decode(Result, link.result.blob).round
