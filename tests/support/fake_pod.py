"""A pod in the test process: real keys, real seals, real sums over real mTLS; custody only as far as a test needs it.

`lie`, `refuse` and `hold` make it misbehave; `crash()` forgets all round keys as a restart does.
"""

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from services.common.rpc.outbox import Outbox
from services.common.rpc.signed import from_wire, to_wire
from services.common.secagg import masking, sealing
from services.common.secagg.blob import decode, encode
from services.common.secagg.certificate import (
    CheckedManifest,
    check_certificate,
    check_header,
    check_manifest,
    check_proposal,
)
from services.common.secagg.cohort import Cohort
from services.common.secagg.digests import VectorDigest
from services.common.secagg.messages import (
    Abandon,
    Accepted,
    AcceptList,
    Commitment,
    Endorsement,
    HighWaterMark,
    Lock,
    PieceSum,
    Signed,
)
from services.common.secagg.ring import chunk_lengths
from services.common.secagg.sealing import SealingKey
from services.common.secagg.signing import Signer, digest
from tests.support.aggregator_world import World
from wardround.keyshare.v1 import keyshare_pb2 as pb
from wardround.keyshare.v1.keyshare_pb2_grpc import KeyShareServiceStub


class FakePod:
    """One pod. Orders are served one after another in a thread of its own, another one keeps the Watch stream."""

    def __init__(self, world: World, id: str) -> None:
        self.id = id
        self._world = world
        self._identity = world.sites[id].signer
        self.roster = world.documents.charter.roster
        self.index = self.roster.pod_index(id)
        self.charters = [world.documents.charter.digest]
        self.refuse: dict[str, Reason] = {}  # order kind -> reason
        self.leave_out: set[str] = set()  # hospitals that it will not accept
        self.lie: set[int] = set()  # pieces whose sum is wrong
        self.hold: dict[str, threading.Event] = {}  # order kind -> served once set
        self.orders: list[str] = []  # kinds in order of arrival
        self.locked: dict[bytes, bytes] = {}  # M -> cohort digest (on its disk: survives crash)
        self.boot = os.urandom(32)
        self.live = False
        self._forget()
        self._caller = world.caller(Role.POD, id)
        self._stop = threading.Event()
        self._queue: queue.Queue[pb.WatchResponse] = queue.Queue()
        self._stream: Any = None
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._serve)]
        for thread in self._threads:
            thread.start()

    def _forget(self) -> None:
        self._keys: dict[bytes, tuple[Signer, SealingKey, Signed]] = {}
        self._by_manifest: dict[bytes, tuple[Signer, SealingKey]] = {}
        self._seeds: dict[bytes, dict[str, tuple[bytes, dict[int, bytes]]]] = {}

    def crash(self) -> None:
        """Restart: round keys are gone, a new boot dials in."""
        self._forget()
        self.boot, self.live = os.urandom(32), False
        if self._stream is not None:
            self._stream.cancel()

    def stop(self) -> None:
        self._stop.set()
        for event in self.hold.values():
            event.set()
        self._caller.close()
        for thread in self._threads:
            thread.join(5)

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                hello = pb.Hello(boot=self.boot, charters=self.charters, live=self.live)
                outbox = Outbox(pb.WatchRequest(hello=hello))
                with self._caller.converse(lambda c: KeyShareServiceStub(c).Watch, outbox, seconds=3600) as stream:
                    self._outbox, self._stream = outbox, stream
                    for message in stream:
                        self.orders.append(message.WhichOneof("order"))
                        self._queue.put(message)
            except ServiceError:
                self._stop.wait(0.05)

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                order = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            kind = order.WhichOneof("order")
            if kind in self.hold:
                self.hold[kind].wait(30)
            with suppress(ServiceError):  # its stream has ended: asked again on the next
                self._one(kind, order)

    def _say(self, number: int, **answer: Any) -> None:
        self._outbox.put(pb.WatchRequest(answer=pb.Answer(command=number, **answer)))

    def _one(self, kind: str, order: pb.WatchResponse) -> None:
        number = order.command
        try:
            if kind in self.refuse:
                raise ServiceError(self.refuse[kind], "as the test says")
            if kind not in ("high_water", "close") and not self.live:
                raise ServiceError(Reason.NOT_LIVE, "no marks yet")
            getattr(self, f"_{kind}")(number, getattr(order, kind))
        except ServiceError as error:
            self._say(number, refusal=pb.Refusal(reason=error.reason.value, detail=error.detail))

    def _high_water(self, number: int, order: pb.HighWaterOrder) -> None:
        form = order.WhichOneof("form")
        if form == "nonce":
            self._say(number, nonce=self.boot)
        elif form == "mark":
            mark = HighWaterMark(order.mark.nonce, order.mark.asking, self.id, ())
            self._say(number, mark=to_wire(self._identity.sign("highwater", encode(mark))))
        else:
            others = {decode(HighWaterMark, mark.blob).answering for mark in order.deliver.marks}
            assert len(others - {self.id}) >= self.roster.committee.quorum - 1
            self.live = True
            self._say(number, live=True)

    def _propose(self, number: int, order: pb.ProposeOrder) -> None:
        signed = from_wire(order.proposal)
        checked = check_proposal(signed, self.roster)
        if checked.digest not in self._keys:
            private, public = sealing.generate(self.roster.suite)
            signer, core = Signer.from_seed(os.urandom(32)), checked.core
            commitment = Commitment(
                checked.digest, core.charter, core.study, core.round, checked.proposal.attempt, self.id,
                self.roster.suite, public, signer.public,
            )  # fmt: skip
            self._keys[checked.digest] = signer, private, self._identity.sign("commit", encode(commitment))
        self._say(number, commitment=to_wire(self._keys[checked.digest][2]))

    def _endorse(self, number: int, order: pb.EndorseOrder) -> None:
        checked = check_manifest(order.manifest, self.roster)
        found = next((keys for keys in self._keys.values() if keys[0].public == self._commitment_key(checked)), None)
        if found is None:
            raise ServiceError(Reason.NOT_LIVE, "the keys of this manifest are gone")
        self._by_manifest[checked.M] = found[0], found[1]
        signed = found[0].sign("endorse", encode(Endorsement(checked.M, self.id)))
        self._say(number, endorsement=to_wire(signed))

    def _commitment_key(self, checked: CheckedManifest) -> bytes:
        mine = checked.commitments.get(self.index)
        return mine.round_key if mine is not None else b""

    def _of(self, manifest: bytes) -> tuple[CheckedManifest, Signer, SealingKey]:
        checked = check_manifest(manifest, self.roster)
        if checked.M not in self._by_manifest:
            raise ServiceError(Reason.NOT_LIVE, "the keys of this manifest are gone")
        return checked, *self._by_manifest[checked.M]

    def _offer(self, number: int, order: pb.OfferOrder) -> None:
        checked, signer, private = self._of(order.manifest)
        seeds: dict[str, tuple[bytes, dict[int, bytes]]] = {}
        request = pb.FetchOfferRequest(manifest=checked.M)
        with self._caller.stream(lambda c: KeyShareServiceStub(c).FetchOffer, request, seconds=30) as offers:
            for offer in offers:
                signed = from_wire(offer.header)
                header = check_header(signed, checked)
                if header.hospital in self.leave_out:
                    continue
                info = sealing.box_info(checked.M, header.hospital, self.index)
                pieces = self.roster.committee.pieces_of(self.index)
                opened = sealing.unpack_seeds(sealing.open_box(private, offer.box, info), len(pieces))
                for piece, seed in zip(pieces, opened, strict=True):
                    assert masking.commitment(checked.M, header.hospital, piece, seed) == header.commitments[piece]
                keys = {
                    piece: masking.stream_key(seed, checked.M, header.hospital, piece)
                    for piece, seed in zip(pieces, opened, strict=True)
                }
                seeds[header.hospital] = digest("header", signed.blob), keys
        self._seeds[checked.M] = seeds
        accepted = tuple(Accepted(hospital, seeds[hospital][0]) for hospital in sorted(seeds, key=str.encode))
        blob = encode(AcceptList(checked.M, self.id, accepted))
        refused = [pb.RefusedHospital(hospital=who, reason="MALFORMED", detail="") for who in self.leave_out]
        self._say(number, accepted=pb.Accepted(accept_list=to_wire(signer.sign("accept", blob)), refused=refused))

    def _lock(self, number: int, order: pb.LockOrder) -> None:
        checked, signer, _ = self._of(order.manifest)
        cohort = Cohort.parse(order.cohort)
        cohort.check_cohort_size(self.roster, checked.core.minimum_cohort)
        self._check_accepted(checked.M, cohort)
        if self.locked.setdefault(checked.M, cohort.digest) != cohort.digest:
            raise ServiceError(Reason.LOCKED, "another cohort is locked")
        blob = encode(Lock(checked.M, cohort.digest, len(cohort.members), self.id))
        self._say(number, lock=to_wire(signer.sign("lock", blob)))

    def _check_accepted(self, manifest: bytes, cohort: Cohort) -> None:
        held = self._seeds.get(manifest, {})
        for member in cohort.members:
            if member.hospital not in held or held[member.hospital][0] != member.header:
                raise ServiceError(Reason.CONFLICT, f"{member.hospital} is not on this pod's accept list")

    def _sums(self, order: Any, piece: int) -> Iterator[bytes]:
        checked, _, _ = self._of(order.manifest)
        cohort = check_certificate(checked, order.certificate)
        self._check_accepted(checked.M, cohort)
        keys = [self._seeds[checked.M][member.hospital][1][piece] for member in cohort.members]
        total = checked.table.total_bytes
        for number, chunk in enumerate(
            masking.sum_streams(keys, checked.table.ring, total, order.first_chunk, order.chunks, bytes)
        ):
            wrong = piece in self.lie and number == 0
            yield bytes([chunk[0] ^ 1]) + chunk[1:] if wrong else chunk

    def _claim(self, order: Any, piece: int, vector: bytes) -> Signed:
        checked, signer, _ = self._of(order.manifest)
        cohort = check_certificate(checked, order.certificate)
        blob = encode(PieceSum(checked.M, cohort.digest, piece, order.first_chunk, order.chunks, vector, self.id))
        return signer.sign("release", blob)

    def _release(self, number: int, order: pb.ReleaseOrder) -> None:
        self._sum_up(number, order, order.digests)

    def _digest(self, number: int, order: pb.DigestOrder) -> None:
        self._sum_up(number, order, order.pieces)

    def _sum_up(self, number: int, order: Any, alone: Sequence[int]) -> None:
        checked, _, _ = self._of(order.manifest)
        assert order.chunks == len(chunk_lengths(checked.table.total_bytes))
        for piece in order.pieces:
            vector = VectorDigest(checked.table.total_bytes)
            for index, chunk in enumerate(self._sums(order, piece)):
                vector.add(chunk)
                if piece not in alone:
                    self._say(number, chunk=pb.ReleaseChunk(piece=piece, index=index, data=chunk), more=True)
            claim = self._claim(order, piece, vector.result())
            self._say(number, piece_sum=to_wire(claim), more=piece != order.pieces[-1])

    def _abandon(self, number: int, order: pb.AbandonOrder) -> None:
        if order.manifest in self.locked:
            raise ServiceError(Reason.LOCKED, "a lock is on disk")
        blob = encode(Abandon(order.charter, order.study, order.round, order.attempt, order.manifest, self.id))
        self._by_manifest.pop(order.manifest, None)
        self._say(number, abandon=to_wire(self._identity.sign("abandon", blob)))

    def _close(self, number: int, order: pb.CloseOrder) -> None:
        """It has kept nothing that must be dropped."""
