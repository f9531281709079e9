"""What a valid manifest, endorsement, header, cohort, certificate and abandon certificate is.

Pure functions that pod, hospital, aggregator and `wardround verify` all use (P-17, P-19, P-10, P-12).
Every one takes exact bytes and the pinned roster; identity keys come from the roster alone (P-2), round
keys from the manifest alone. Not here: what a role does about it (custody, round, participate).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

from services.common.errors import Reason, ServiceError
from services.common.secagg import blob as codec
from services.common.secagg.cohort import Cohort, check_certificate_bytes
from services.common.secagg.encoding import LaneTable
from services.common.secagg.messages import (
    MAX_ATTEMPT,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    Abandon,
    AbandonCertificate,
    AcceptList,
    Close,
    CohortCertificate,
    Commitment,
    Core,
    Endorsement,
    Header,
    Lock,
    Manifest,
    PieceSum,
    Proposal,
    Receipt,
    Result,
    Signed,
)
from services.common.secagg.roster import Roster
from services.common.secagg.sealing import load_public_key
from services.common.secagg.signing import check_public_key, digest, open_claimed, open_signed

RoundSigned = TypeVar("RoundSigned", Endorsement, AcceptList, Lock, PieceSum)
_REMEMBERED = 8  # valid proposals and manifests: one is looked at in every step of its round, with the same outcome


class Ref(NamedTuple):
    """One attempt of a round: ρ of protocol.md §4."""

    study: bytes
    round: int
    attempt: int

    @property
    def point(self) -> tuple[int, int]:
        """(round, attempt)."""
        return self.round, self.attempt

    def __str__(self) -> str:
        return f"round {self.round} attempt {self.attempt} of study {self.study.hex()[:16]}"


@dataclass(frozen=True)
class CheckedProposal:
    """A proposal of the charter's aggregator within the charter's limits. `digest` is D(proposal, blob)."""

    digest: bytes
    proposal: Proposal
    core: Core
    core_digest: bytes
    table: LaneTable
    roster: Roster

    @property
    def ref(self) -> Ref:
        """Which attempt it proposes."""
        return Ref(self.core.study, self.core.round, self.proposal.attempt)


@dataclass(frozen=True)
class CheckedManifest:
    """A manifest valid by P-17. `M` is its digest; `commitments` by pod index, ascending."""

    M: bytes
    blob: bytes
    proposal: Proposal
    core: Core
    core_digest: bytes
    table: LaneTable
    commitments: Mapping[int, Commitment]
    roster: Roster

    @property
    def ref(self) -> Ref:
        """Which attempt it is of."""
        return Ref(self.core.study, self.core.round, self.proposal.attempt)

    def round_keys(self) -> dict[str, bytes]:
        """The round key of every pod in the manifest, by pod id."""
        return {commitment.pod: commitment.round_key for commitment in self.commitments.values()}


def check_proposal(signed: Signed, roster: Roster) -> CheckedProposal:
    """Verify the aggregator's signature, parse, and hold the core to the charter (P-12, §6).

    Raises BAD_SIGNATURE, MALFORMED, or WRONG_CORE for another charter or a value outside its limits.
    """
    return _checked_proposal(signed, roster)


@lru_cache(maxsize=_REMEMBERED)
def _checked_proposal(signed: Signed, roster: Roster) -> CheckedProposal:
    proposal = open_signed(Proposal, "proposal", signed, roster.aggregator.key)
    core = codec.decode(Core, proposal.core)
    limits = roster.limits
    if core.charter != roster.charter:
        raise _wrong(f"it names charter {core.charter.hex()[:16]}…, here is {roster.charter.hex()[:16]}…")
    if not 1 <= core.round <= limits.max_round or not 1 <= proposal.attempt <= MAX_ATTEMPT:
        raise _wrong(f"round {core.round} attempt {proposal.attempt}: rounds 1..{limits.max_round}, attempts 1..64")
    if core.parameters > limits.max_parameters or core.ring_bits not in limits.ring_bits:
        raise _wrong(f"{core.parameters} parameters in a ring of {core.ring_bits} bits exceed the charter's limits")
    if not roster.minimum_cohort <= core.minimum_cohort <= roster.maximum_cohort:
        raise _wrong(f"minimum cohort {core.minimum_cohort}, the charter has {roster.minimum_cohort} at least (P-12)")
    if not 0 < proposal.deadline <= proposal.expires:
        raise _wrong("its deadline must be set and not lie behind its expiry")
    table = LaneTable(core.lanes, core.ring_bits)
    table.check(roster.maximum_cohort)
    return CheckedProposal(
        digest("proposal", signed.blob), proposal, core, digest("core", proposal.core), table, roster
    )


def check_expiry(proposal: Proposal, roster: Roster, now_ms: int) -> None:
    """Raise WRONG_CORE for a round key that would live longer than the charter allows, LATE for an expired one."""
    if proposal.expires <= now_ms:
        raise ServiceError(Reason.LATE, "the attempt has expired: wait for the next one")
    if proposal.expires - now_ms > roster.limits.round_key_ms:
        raise _wrong(f"its round keys would live {proposal.expires - now_ms} ms, at most {roster.limits.round_key_ms}")


def check_manifest(blob: bytes, roster: Roster) -> CheckedManifest:
    """P-17: the one test of a valid manifest, for pod and hospital alike.

    Raises TOO_LARGE, MALFORMED, BAD_SIGNATURE, UNKNOWN_MEMBER, WRONG_CORE, BELOW_QUORUM, CONFLICT.
    """
    if len(blob) > MAX_MANIFEST_BYTES:
        raise ServiceError(Reason.TOO_LARGE, f"manifest of {len(blob)} bytes, at most {MAX_MANIFEST_BYTES}")
    return _checked_manifest(blob, roster)


@lru_cache(maxsize=_REMEMBERED)
def _checked_manifest(blob: bytes, roster: Roster) -> CheckedManifest:
    manifest = codec.decode(Manifest, blob)
    checked = check_proposal(manifest.proposal, roster)
    identity = {pod.id: pod.key for pod in roster.pods}
    commitments: dict[int, Commitment] = {}
    last = -1
    for signed in manifest.commitments:
        commitment = open_claimed(Commitment, "commit", signed, "pod", identity)
        index = roster.pod_index(commitment.pod)
        if index <= last:
            raise _malformed(f"manifest: the commitment of {commitment.pod} is repeated or out of order")
        last = index
        check_commitment(commitment, checked)
        commitments[index] = commitment
    if len(commitments) < roster.committee.quorum:
        raise _below(f"manifest: {len(commitments)} pods committed, the quorum is {roster.committee.quorum}")
    _check_distinct_keys(commitments, roster)
    return CheckedManifest(
        digest("manifest", blob), blob, checked.proposal, checked.core, checked.core_digest, checked.table,
        commitments, roster,
    )  # fmt: skip


def check_commitment(commitment: Commitment, checked: CheckedProposal) -> None:
    """Raise WRONG_CORE unless it is for exactly this proposal and suite, MALFORMED for a key that cannot be used."""
    core, proposal = checked.core, checked.proposal
    named = (commitment.proposal, commitment.charter, commitment.study, commitment.round, commitment.attempt)
    if named != (checked.digest, core.charter, core.study, core.round, proposal.attempt):
        raise _wrong(f"the commitment of {commitment.pod} is for another proposal")
    if commitment.suite != checked.roster.suite:
        raise _wrong(f"the commitment of {commitment.pod} is in suite {commitment.suite}, the charter's is fixed")
    load_public_key(commitment.suite, commitment.sealing_key)
    check_public_key(commitment.round_key, f"round key of {commitment.pod}")


def _check_distinct_keys(commitments: Mapping[int, Commitment], roster: Roster) -> None:
    """Signing and sealing keys: distinct from one another and from every identity key; so are the X25519 halves."""
    members = (roster.aggregator, *roster.pods, *roster.hospitals.values())
    signing = [member.key for member in members] + [c.round_key for c in commitments.values()]
    halves = [c.sealing_key[-32:] for c in commitments.values()]
    whole = [c.sealing_key for c in commitments.values()]
    for keys in (signing, halves, whole):
        if len(set(keys)) != len(keys):
            raise ServiceError(Reason.CONFLICT, "manifest: one key stands in two places; every key must be distinct")


def open_round_signed(
    cls: type[RoundSigned], name: str, signed: Signed, checked: CheckedManifest
) -> tuple[int, RoundSigned]:
    """(pod index, message) of an endorsement, accept list, lock or piece sum, under its pod's round key.

    Raises UNKNOWN_MEMBER for a pod that is not in the manifest, BAD_SIGNATURE, MALFORMED, and WRONG_CORE
    for another manifest.
    """
    message = open_claimed(cls, name, signed, "pod", checked.round_keys())
    if message.manifest != checked.M:
        raise _wrong(f"{name} of {message.pod} is for another manifest")
    return checked.roster.pod_index(message.pod), message


def check_endorsed(checked: CheckedManifest, endorsements: Iterable[Signed]) -> tuple[int, ...]:
    """The pods (indices, ascending) that endorsed M: at least q distinct ones of the manifest (P-17).

    Raises BELOW_QUORUM, CONFLICT for one pod twice, and as `open_round_signed`.
    """
    pods: set[int] = set()
    for signed in endorsements:
        index, endorsement = open_round_signed(Endorsement, "endorse", signed, checked)
        if index in pods:
            raise ServiceError(Reason.CONFLICT, f"{endorsement.pod} endorses twice: one pod counts once")
        pods.add(index)
    quorum = checked.roster.committee.quorum
    if len(pods) < quorum:
        raise _below(f"{len(pods)} pods endorsed the manifest, the quorum is {quorum}")
    return tuple(sorted(pods))


def check_header(signed: Signed, checked: CheckedManifest) -> Header:
    """A hospital's header for this manifest, complete: all pieces, a box for every pod of the manifest, all lanes.

    Raises TOO_LARGE, UNKNOWN_MEMBER, BAD_SIGNATURE, MALFORMED, WRONG_CORE.
    """
    if len(signed.blob) > MAX_HEADER_BYTES:
        raise ServiceError(Reason.TOO_LARGE, f"header of {len(signed.blob)} bytes, at most {MAX_HEADER_BYTES}")
    keys = {hospital.id: hospital.key for hospital in checked.roster.hospitals.values()}
    header = open_claimed(Header, "header", signed, "hospital", keys)
    if header.manifest != checked.M:
        raise _wrong(f"the header of {header.hospital} is for another manifest")
    if header.lanes != checked.table.total_lanes:
        raise _malformed(f"header: {header.lanes} lanes, the manifest has {checked.table.total_lanes}")
    if len(header.commitments) != len(checked.roster.committee.pieces):
        raise _malformed(f"header: {len(header.commitments)} commitments, not one for each piece")
    if tuple(box.pod for box in header.boxes) != tuple(checked.commitments):
        raise _malformed("header: the boxes must be one for every pod of the manifest, ascending")
    return header


def check_box(header: Header, pod: int, box: bytes) -> None:
    """Raise BAD_DIGEST unless `box` is the one that the header names for the pod with this index."""
    if hashlib.sha256(box).digest() != next((named.digest for named in header.boxes if named.pod == pod), None):
        raise ServiceError(Reason.BAD_DIGEST, f"{header.hospital}: the box for pod {pod} is not the one in its header")


def check_receipt(signed: Signed, checked: CheckedManifest, header: Signed, hospital: str, vector: bytes) -> Receipt:
    """The aggregator's receipt for exactly this header and vector. Raises BAD_SIGNATURE, MALFORMED, CONFLICT."""
    receipt = open_signed(Receipt, "receipt", signed, checked.roster.aggregator.key)
    expected = (checked.M, hospital, digest("header", header.blob), vector)
    if (receipt.manifest, receipt.hospital, receipt.header, receipt.vector) != expected:
        raise ServiceError(Reason.CONFLICT, f"the receipt is not for what {hospital} sent")
    return receipt


def check_close(signed: Signed, roster: Roster) -> Close:
    """The aggregator's word that a round under this charter is over. Raises BAD_SIGNATURE, MALFORMED, WRONG_CORE."""
    close = open_signed(Close, "close", signed, roster.aggregator.key)
    if close.charter != roster.charter:
        raise _wrong("the close names a charter that is not pinned here")
    return close


def check_certificate(checked: CheckedManifest, blob: bytes) -> Cohort:
    """P-19: the cohort that at least q distinct pods of the manifest locked, with its size checked (P-12).

    Raises TOO_LARGE, MALFORMED, WRONG_CORE, UNKNOWN_MEMBER, BAD_SIGNATURE, BELOW_QUORUM, BELOW_COHORT.
    """
    check_certificate_bytes(blob, checked.roster.maximum_cohort)
    certificate = codec.decode(CohortCertificate, blob)
    cohort = Cohort.parse(certificate.cohort)
    if cohort.manifest != checked.M:
        raise _wrong("the certificate's cohort is of another manifest")
    cohort.check_cohort_size(checked.roster, checked.core.minimum_cohort)
    last = -1
    for signed in certificate.locks:
        index, lock = open_round_signed(Lock, "lock", signed, checked)
        if index <= last:
            raise _malformed(f"certificate: the lock of {lock.pod} is repeated or out of order")
        last = index
        if (lock.cohort, lock.size) != (cohort.digest, len(cohort.members)):
            raise _wrong(f"certificate: {lock.pod} locked another cohort")
    if len(certificate.locks) < checked.roster.committee.quorum:
        raise _below(f"{len(certificate.locks)} pods locked, the quorum is {checked.roster.committee.quorum}")
    return cohort


def check_abandon_certificate(
    blob: bytes, roster: Roster, study: bytes, round_number: int, attempt: int, *, manifest: bytes | None = None
) -> bytes:
    """The M that at least q distinct charter pods gave up for (study, round, attempt); `manifest` demands that M.

    Raises MALFORMED, UNKNOWN_MEMBER, BAD_SIGNATURE, BELOW_QUORUM, WRONG_CORE (P-10, P-14).
    """
    certificate = codec.decode(AbandonCertificate, blob)
    identity = {pod.id: pod.key for pod in roster.pods}
    last, given_up = -1, manifest
    for signed in certificate.abandons:
        abandon = open_claimed(Abandon, "abandon", signed, "pod", identity)
        index = roster.pod_index(abandon.pod)
        if index <= last:
            raise _malformed(f"abandon certificate: {abandon.pod} is repeated or out of order")
        last = index
        named = (abandon.charter, abandon.study, abandon.round, abandon.attempt)
        if named != (roster.charter, study, round_number, attempt):
            raise _wrong(f"{abandon.pod} gave up another attempt")
        given_up = abandon.manifest if given_up is None else given_up
        if abandon.manifest != given_up:
            raise _wrong(f"{abandon.pod} gave up another manifest")
    if given_up is None or len(certificate.abandons) < roster.committee.quorum:
        raise _below(f"{len(certificate.abandons)} pods gave up, the quorum is {roster.committee.quorum}")
    return given_up


@dataclass(frozen=True)
class ResultLink:
    """A signed result with the manifest of its round."""

    result: Signed
    manifest: bytes


def check_result_chain(
    links: Sequence[ResultLink], rosters: Mapping[bytes, Roster], study: bytes, held: bytes, held_round: int = 0
) -> tuple[bytes, Result | None]:
    """Follow signed results from the one whose digest is `held` (32 zero bytes before round 1).

    Each link is the aggregator's, names the one before it, and belongs to its manifest; rounds rise
    (stalled ones have no link). `rosters` are the pinned charters by digest. Returns (digest of the last
    result, that result or None without links); the caller compares it with core.previous_result.
    Raises BAD_SIGNATURE, MALFORMED, WRONG_CORE, and as `check_manifest`.
    """
    last: Result | None = None
    for link in links:
        core_charter = _charter_of(link.manifest)
        roster = rosters.get(core_charter)
        if roster is None:
            raise _wrong(
                f"a result under charter {core_charter.hex()[:16]}…, which is not pinned here: a member that joined "
                "after it begins with the next study"
            )
        checked = check_manifest(link.manifest, roster)
        result = open_signed(Result, "result", link.result, roster.aggregator.key)
        core, place = checked.core, f"the result of round {result.round}"
        named = (result.charter, result.study, result.round, result.attempt, result.manifest)
        if named != (core.charter, study, core.round, checked.proposal.attempt, checked.M) or core.study != study:
            raise _wrong(f"{place} does not belong to its manifest")
        if (result.previous_result, core.previous_result) != (held, held) or result.round <= held_round:
            raise _wrong(f"{place} does not follow the one before it")
        if last is not None and core.model != last.model:
            raise _wrong(f"{place} did not start from the model of the one before it")
        held, held_round, last = digest("result", link.result.blob), result.round, result
    return held, last


def _charter_of(manifest: bytes) -> bytes:
    """The charter that a manifest claims: only to choose the pinned roster that then checks everything."""
    return codec.decode(Core, codec.decode(Proposal, codec.decode(Manifest, manifest).proposal.blob).core).charter


def _wrong(detail: str) -> ServiceError:
    return ServiceError(Reason.WRONG_CORE, detail)


def _malformed(detail: str) -> ServiceError:
    return ServiceError(Reason.MALFORMED, detail)


def _below(detail: str) -> ServiceError:
    return ServiceError(Reason.BELOW_QUORUM, detail)
