"""One pod: verifies what it is asked, lets `custody` decide, stores, and only then signs (protocol.md §4, §5).

The round keys and stream keys of an attempt live in `Pod._secrets` and nowhere else; after every event whatever
`State.held` no longer lists is dropped (P-22). Thread-safe. Every method raises ServiceError when it refuses.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from services.common.clock import Clock
from services.common.errors import Reason, ServiceError
from services.common.ids import check_id
from services.common.secagg import blob as codec
from services.common.secagg import certificate as valid
from services.common.secagg import digests, masking, messages, ring, sealing, signing
from services.common.secagg.certificate import Ref
from services.common.secagg.cohort import Cohort
from services.common.secagg.messages import Signed
from services.common.secagg.roster import Roster
from services.common.secagg.signing import Signer
from services.keyshare import custody
from services.keyshare.facts import Booted, Entry, Event, State
from services.keyshare.store import CustodyStore

T = TypeVar("T")


@dataclass
class _Secrets:
    """The round keys of one attempt, and each hospital's stream keys for this pod's pieces, ascending."""

    opener: sealing.SealingKey = field(repr=False)
    signer: Signer
    streams: dict[str, tuple[bytes, ...]] = field(default_factory=dict, repr=False)


class Pod:
    """`rosters`: the pinned charters by digest (P-2); set anew when the pins change."""

    def __init__(
        self, id: str, identity: Signer, store: CustodyStore, rosters: Mapping[bytes, Roster], clock: Clock
    ) -> None:
        self.id, self.rosters, self.clock, self.audit = id, rosters, clock, store.audit
        self._identity, self._store, self._lock = identity, store, threading.RLock()
        self._secrets: dict[Ref, _Secrets] = {}
        self.state = State(id)
        for event in store.load():
            self.state = custody.evolve(self.state, event)
        for roster in rosters.values():
            if roster.pods[roster.pod_index(id)].key != identity.public:
                raise ServiceError(Reason.INVALID_DOCUMENT, f"the charter has another identity key for {id}")
        self._append([Booted(os.urandom(32))])

    @property
    def live(self) -> bool:
        """Whether P-11 was passed under a charter that is pinned now."""
        return not self.state.rolled_back and not self.state.live.isdisjoint(self.rosters)

    def standing(self) -> tuple[Ref, str, str]:
        """(newest attempt, its phase, a sentence) for people."""
        state = self.state
        refs = [Ref(study, *record.committed) for study, record in state.records.items()]
        newest = max(refs, default=Ref(b"", 0, 0), key=lambda ref: ref.point)
        if state.rolled_back:
            return newest, "rolled back", f"{state.rolled_back}: needs a new id and key by amendment, an empty volume"
        if not self.live:
            return newest, "waiting", "waits for fresh high-water marks of other pods before it signs (P-11)"
        if not refs:
            return newest, "idle", "ready; nothing was proposed yet"
        return newest, custody.phase_of(state, newest).value, f"holds the round keys of {len(state.held)} attempts"

    def propose(self, signed: Signed, abandons: Sequence[bytes]) -> Signed:
        """Propose → signed Commitment; the same bytes again for an equal proposal in this boot."""
        checked = self._pinned(lambda roster: valid.check_proposal(signed, roster))
        core, suite, ref = checked.core, checked.roster.suite, checked.ref
        checked.roster.pod_index(self.id)
        secret, public = sealing.generate(suite)
        signer = Signer.from_seed(os.urandom(32))
        drawn = messages.Commitment(checked.digest, core.charter, *ref, self.id, suite, public, signer.public)
        with self._lock:
            blob, now = codec.encode(drawn), self.clock.now_ms()
            if self._do(lambda state: custody.propose(state, checked, blob, abandons, now)):
                self._secrets[ref] = _Secrets(secret, signer)
            return self._identity.sign("commit", self.state.held[core.study].commitment)

    def endorse(self, manifest: bytes) -> Signed:
        """Endorse → signed Endorsement."""
        checked = self._manifest(manifest)
        self._do(lambda state: custody.endorse(state, checked))
        return self._sign(checked, "endorse", messages.Endorsement(checked.M, self.id))

    def offer(
        self, manifest: bytes, offered: Callable[[], Iterable[tuple[Signed, bytes]]]
    ) -> tuple[Signed, list[tuple[str, str]]]:
        """Offer → (signed AcceptList of all accepted so far, (hospital, "REASON: why") of those left out).

        `offered` is called once the attempt is known to be served: (header, this pod's box) of each hospital.
        """
        checked = self._manifest(manifest)
        self._do(lambda state: custody.offer(state, checked, ()))  # may I?
        entries: list[Entry] = []
        streams: dict[bytes, tuple[bytes, ...]] = {}
        left_out: list[tuple[str, str]] = []
        for signed, box in offered():
            hospital = "unknown"
            try:
                hospital = codec.peek_ident(messages.Header, "hospital", signed.blob)  # not verified: for the log only
                header = valid.check_header(signed, checked)
            except ServiceError as error:
                left_out.append((hospital, str(error)))
                continue
            name, mark, refusal = signing.digest("header", signed.blob), header.ledger, ""
            try:
                streams[name] = self._open(checked, header, box)
            except ServiceError as error:
                refusal = str(error)
            entries.append(Entry(header.hospital, name, mark.sequence, mark.head, refusal))
        with self._lock:
            judged = custody.judge(self.state, checked, entries)
            left_out += [(entry.hospital, entry.refusal) for entry in judged if entry.refusal]
            self._do(lambda state: custody.offer(state, checked, entries))
            accepted, kept = self.state.held[checked.core.study].accepted, self._keys(checked).streams
            kept.update({hospital: streams[name] for hospital, name in accepted.items() if name in streams})
            members = tuple(messages.Accepted(name, accepted[name]) for name in sorted(accepted, key=str.encode))
            return self._sign(checked, "accept", messages.AcceptList(checked.M, self.id, members)), left_out

    def lock(self, manifest: bytes, cohort: bytes) -> Signed:
        """Lock → signed Lock."""
        checked, parsed = self._manifest(manifest), Cohort.parse(cohort)
        self._do(lambda state: custody.lock(state, checked, parsed))
        return self._sign(checked, "lock", messages.Lock(checked.M, parsed.digest, len(parsed.members), self.id))

    def release(
        self, blob: bytes, certificate: bytes, pieces: Sequence[int], first: int, count: int, alone: Sequence[int] = ()
    ) -> Iterator[tuple[int, int, bytes] | Signed]:
        """Release → of each piece (piece, index, lanes) a chunk, then its signed PieceSum; of `alone` only the last."""
        checked = self._manifest(blob)
        cohort = valid.check_certificate(checked, certificate)
        locks = codec.decode(messages.CohortCertificate, certificate).locks
        locked = [codec.decode(messages.Lock, signed.blob).pod for signed in locks]
        self._do(lambda state: custody.release(state, checked, cohort, locked, pieces))
        own = checked.roster.committee.pieces_of(checked.roster.pod_index(self.id))
        lanes, total = checked.table.ring, checked.table.total_bytes
        for piece in pieces:
            take = digests.digest_alone if piece in alone else digests.with_digest
            streams, hashed = self._keys(checked).streams, []
            keys = [streams[member.hospital][own.index(piece)] for member in cohort.members]
            for index, (data, digest) in enumerate(masking.sum_streams(keys, lanes, total, first, count, take), first):
                self._keys(checked)  # raises once they were dropped (P-22)
                hashed.append(digest)
                if piece not in alone:
                    yield piece, index, data
            vector = digests.vector_digest(sum(ring.chunk_lengths(total)[first : first + count]), hashed)
            answer = messages.PieceSum(checked.M, cohort.digest, piece, first, count, vector, self.id)
            yield self._sign(checked, "release", answer)

    def abandon(self, charter: bytes, ref: Ref, manifest: bytes) -> Signed:
        """Abandon → signed Abandon, under the identity key."""
        roster = self.rosters.get(charter)
        if roster is None or len(ref.study) != 32 or len(manifest) != 32:
            raise ServiceError(
                Reason.WRONG_CORE, "the charter to abandon under is not pinned, or a digest is not whole"
            )
        roster.pod_index(self.id)
        self._do(lambda state: custody.abandon(state, roster, ref, manifest))
        return self._identity.sign("abandon", codec.encode(messages.Abandon(charter, *ref, manifest, self.id)))

    def close(self, signed: Signed) -> None:
        """Close: on the disk when this returns; keys and seeds are gone."""
        roster, close = self._pinned(lambda roster: (roster, valid.check_close(signed, roster)))
        self._do(lambda state: custody.close(state, roster, close.study, close.round))

    def mark(self, nonce: bytes, asking: str) -> Signed:
        """HighWater, form 2 → signed mark about `asking` for its nonce."""
        mark = custody.mark_about(self.state, nonce, check_id(asking, "asking pod"))
        return self._identity.sign("highwater", codec.encode(mark))

    def deliver(self, marks: Sequence[Signed]) -> None:
        """HighWater, form 3: P-11 under every pinned charter that enough of the marks are for."""
        fault: ServiceError | None = None
        for roster in self.rosters.values():
            keys = {pod.id: pod.key for pod in roster.pods}
            good: list[messages.HighWaterMark] = []
            for signed in marks:
                with suppress(ServiceError):  # one bad mark does not spoil the others
                    good.append(signing.open_claimed(messages.HighWaterMark, "highwater", signed, "answering", keys))
            try:
                self._do(partial(custody.deliver, roster=roster, marks=good))
            except ServiceError as error:
                fault = error
        if not self.live:
            raise fault or ServiceError(Reason.ROLLED_BACK, self.state.rolled_back)

    def expire(self) -> None:
        """Drop the keys whose time is over, though nobody asks for anything."""
        with self._lock:
            events = custody.expire(self.state, self.clock.now_ms())
            for event in events:
                self._secrets.pop(event.ref, None)  # first: a full disk must not lengthen a key's life
            self._append(events)

    def _do(self, decide: Callable[[State], Sequence[Event]]) -> Sequence[Event]:
        with self._lock:
            self.expire()
            events = decide(self.state)
            self._append(events)
            return events

    def _append(self, events: Sequence[Event]) -> None:
        if events:
            self._store.append(events)
            for event in events:
                self.state = custody.evolve(self.state, event)
            self._secrets = {ref: keys for ref, keys in self._secrets.items() if self.state.holds(ref)}

    def _sign(self, checked: valid.CheckedManifest, label: str, message: object) -> Signed:
        return self._keys(checked).signer.sign(label, codec.encode(message))

    def _keys(self, checked: valid.CheckedManifest) -> _Secrets:
        found = self._secrets.get(checked.ref)
        if found is None:
            raise ServiceError(Reason.NOT_LIVE, "the keys of this attempt were dropped: it was closed or has expired")
        return found

    def _manifest(self, blob: bytes) -> valid.CheckedManifest:
        return self._pinned(lambda roster: valid.check_manifest(blob, roster))

    def _pinned(self, check: Callable[[Roster], T]) -> T:
        """`check` under the pinned charter that it names; the refusal that says most where it fails under all."""
        fault: ServiceError | None = None
        for roster in self.rosters.values():
            try:
                return check(roster)
            except ServiceError as error:
                fault = error if fault is None or fault.reason is Reason.WRONG_CORE else fault
        raise fault or ServiceError(Reason.NOT_FOUND, "no charter is pinned here")

    def _open(self, checked: valid.CheckedManifest, header: messages.Header, box: bytes) -> tuple[bytes, ...]:
        """The stream keys in a hospital's box; every seed matches its com (§4 step 6)."""
        place, index = (checked.M, header.hospital), checked.roster.pod_index(self.id)
        valid.check_box(header, index, box)
        pieces = checked.roster.committee.pieces_of(index)
        opened = sealing.open_box(self._keys(checked).opener, box, sealing.box_info(*place, index))
        seeds = dict(zip(pieces, sealing.unpack_seeds(opened, len(pieces)), strict=True))
        for piece, seed in seeds.items():
            if masking.commitment(*place, piece, seed) != header.commitments[piece]:
                raise ServiceError(Reason.BAD_DIGEST, f"{header.hospital}: the seed of piece {piece} is not its com")
        return tuple(masking.stream_key(seed, *place, piece) for piece, seed in seeds.items())
