"""The charter: the consortium's constitution (architecture.md §1, protocol.md §1-§3).

A YAML file whose EXACT bytes are hashed (plain SHA-256), signed by pod owners and pinned by members.
Loading refuses whatever is unsafe: P-1 (committee), P-12 (cohort), distinct ids, keys and organisations.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import Field

from services.common.documents.strict import Document, Section, hex_bytes, load, refuse
from services.common.errors import ServiceError
from services.common.ids import Role, check_id
from services.common.secagg.blob import encode
from services.common.secagg.committee import Committee
from services.common.secagg.messages import SUITE_HYBRID, SUITE_X25519, Join, Signed
from services.common.secagg.roster import Limits, MemberKey, Roster
from services.common.secagg.signing import verify

_SUITES = {"mlkem768-x25519": SUITE_HYBRID, "x25519": SUITE_X25519}


class Member(Section):
    """One site's entry, as its join file has it; `signature` is over the Join blob (label join)."""

    id: str
    organisation: str = Field(min_length=1, max_length=128)
    identity_key: str = Field(description="Ed25519 public key, 64 hex digits")
    tls_root: str = Field(description="PEM of the site's own TLS root certificate")
    signature: str = Field(description="Ed25519 signature over the join blob, 128 hex digits")


class CommitteeSection(Section):
    """(t, q, s); m is the number of pods."""

    threshold: int = Field(ge=2, description="t: pods that must collude to open one hospital's update")
    quorum: int = Field(ge=2, description="q: pods whose signatures fix a cohort")
    slack: int = Field(default=0, ge=0, description="s: rolled-back honest pods to be borne beside t-1 bad ones")


class CohortSection(Section):
    """Limits of every cohort, counted by organisation."""

    minimum: int = Field(ge=2, description="n_min, at least colluding_hospitals + 2")
    maximum: int = Field(ge=2, le=4096, description="n_max")
    colluding_hospitals: int = Field(default=1, ge=0, description="k; 0 needs `two_hospitals: accepted`")
    two_hospitals: Literal["accepted"] | None = Field(
        default=None, description="`accepted` says in words that with k = 0 each of two hospitals can read the other"
    )


class LimitsSection(Section):
    """What no study under this charter may exceed."""

    rounds: int = Field(default=1000, ge=1, le=100_000, description="highest round number of a study")
    parameters: int = Field(default=200_000_000, ge=1, le=2**31, description="d")
    ring_bits: tuple[Literal[16, 24, 32], ...] = (16, 24, 32)
    round_key_hours: float = Field(default=24, gt=0, le=168, description="longest life of a round key")
    epsilon: float = Field(default=10, gt=0, description="largest ε of one study")
    delta: float = Field(default=1e-5, gt=0, lt=1e-2, description="largest δ of one study")


class Charter(Document):
    """`members` by role; a pod's index is its position in `pods`."""

    wardround: Literal["charter/v1"]
    consortium: str = Field(description="DNS label; part of TLS names")
    version: int = Field(ge=1)
    demo: bool = Field(default=False, description="lifts the organisation, store and swap rules; printed everywhere")
    suite: Literal["mlkem768-x25519", "x25519"] = "mlkem768-x25519"
    committee: CommitteeSection
    cohort: CohortSection
    limits: LimitsSection = LimitsSection()
    verify: Literal["one", "full"] = Field(default="one", description="P-23: holders compared for each piece")
    aggregator: Member
    pods: tuple[Member, ...]
    hospitals: tuple[Member, ...]


class JoinFile(Document):
    """What a site sends to the charter's drafter: its entry, with the role that the signature covers."""

    wardround: Literal["join/v1"]
    consortium: str = Field(description="DNS label of the consortium that the site joins")
    role: Literal["aggregator", "pod", "hospital"]
    id: str
    organisation: str = Field(min_length=1, max_length=128)
    identity_key: str = Field(description="Ed25519 public key, 64 hex digits")
    tls_root: str = Field(description="PEM of the site's own TLS root certificate")
    signature: str = Field(description="Ed25519 signature over the join blob, 128 hex digits")

    @property
    def member(self) -> Member:
        """The entry as the charter holds it."""
        return Member(**self.model_dump(include=set(Member.model_fields)))


class CharterSignatures(Document):
    """Detached signatures of pod owners over label(charter) and the charter's exact bytes."""

    wardround: Literal["signatures/v1"]
    charter: str = Field(description="SHA-256 of the charter's exact bytes, 64 hex digits")
    signatures: dict[str, str] = Field(description="pod id to Ed25519 signature, 128 hex digits")


@dataclass(frozen=True)
class LoadedCharter:
    """A charter that passed every check; `digest` is the plain SHA-256 of `blob`, the exact bytes."""

    document: Charter
    digest: bytes
    blob: bytes = field(repr=False)
    roster: Roster = field(repr=False)

    def members(self) -> Iterator[tuple[Role, Member]]:
        """Every member with its role: the aggregator, then pods and hospitals in the charter's order."""
        return _members(self.document)

    def find(self, member_id: str) -> tuple[Role, Member] | None:
        """The member called `member_id`, or None. Ids are unique over all roles."""
        return next((pair for pair in self.members() if pair[1].id == member_id), None)


def load_charter(blob: bytes, name: str = "charter.yaml") -> LoadedCharter:
    """Parse and check the exact bytes of a charter.

    P-1, P-12, distinct ids, keys, roots and organisations, and every member's self-signature.
    Raises INVALID_DOCUMENT.
    """
    document = load(Charter, blob, name)
    digest = hashlib.sha256(blob).digest()
    _label(document.consortium, name, "consortium")
    roots: dict[bytes, str] = {}
    for role, member in _members(document):
        check_member(role, member, name)
        root = _root_certificate(member, name)
        if root in roots:
            raise refuse(name, f"{roots[root]} and {member.id} have the same TLS root: each site makes its own")
        roots[root] = member.id
    cohort = document.cohort
    if cohort.colluding_hospitals > 0 and cohort.two_hospitals is not None:
        raise refuse(name, "cohort.two_hospitals is said, but colluding_hospitals is not 0: remove one of them")
    roster = _roster(document, digest)
    try:
        roster.check()
    except ServiceError as error:
        raise refuse(name, error.detail) from None
    return LoadedCharter(document, digest, blob, roster)


def join_blob(role: Role, member: Member, name: str = "join.yaml") -> bytes:
    """The exact bytes that a member's self-signature covers (label join)."""
    key = hex_bytes(member.identity_key, 32, name, f"{member.id}: identity_key")
    return encode(Join(role.value, member.id, member.organisation, key, member.tls_root.encode()))


def check_member(role: Role, member: Member, name: str) -> None:
    """The id is a DNS label and the entry carries its own owner's signature, else INVALID_DOCUMENT."""
    _label(member.id, name, f"the {role.value}'s id")
    try:
        blob = join_blob(role, member, name)
        signature = hex_bytes(member.signature, 64, name, f"{member.id}: signature")
        verify("join", Signed(blob, signature), bytes.fromhex(member.identity_key))
    except ServiceError as error:
        if error.detail.startswith(name):
            raise
        raise refuse(
            name,
            f"the entry of {role.value} {member.id} does not carry its own signature ({error.detail}): copy its "
            "join.yaml unchanged, or let the site make a new one",
        ) from None


def load_join(blob: bytes, name: str = "join.yaml") -> JoinFile:
    """Parse and check one site's join file. Raises INVALID_DOCUMENT."""
    join = load(JoinFile, blob, name)
    _label(join.consortium, name, "consortium")
    check_member(Role(join.role), join.member, name)
    _root_certificate(join.member, name)
    return join


def load_signatures(blob: bytes, charter: LoadedCharter, name: str = "charter.signatures.yaml") -> tuple[str, ...]:
    """The ids of the pods whose owners signed exactly this charter: at least q, every one valid.

    Raises INVALID_DOCUMENT.
    """
    signed = check_signatures(blob, charter, name)
    quorum = charter.roster.committee.quorum
    if len(signed) < quorum:
        raise refuse(
            name,
            f"{len(signed)} pod owners have signed ({', '.join(signed) or 'none'}), {quorum} must: "
            "`wardround charter sign` at the other pods",
        )
    return signed


def check_signatures(blob: bytes, charter: LoadedCharter, name: str) -> tuple[str, ...]:
    """As `load_signatures`, however few there are yet."""
    document = load(CharterSignatures, blob, name)
    if hex_bytes(document.charter, 32, name, "charter") != charter.digest:
        raise refuse(
            name, f"is for another charter ({document.charter[:12]}…, this one is {charter.digest.hex()[:12]}…)"
        )
    pods = {pod.id: pod for pod in charter.roster.pods}
    for pod_id, signature in document.signatures.items():
        if pod_id not in pods:
            raise refuse(name, f"{pod_id} is not a pod of this charter: remove its signature")
        signed = Signed(charter.blob, hex_bytes(signature, 64, name, f"signatures.{pod_id}"))
        try:
            verify("charter", signed, pods[pod_id].key)
        except ServiceError:
            raise refuse(
                name, f"the signature of {pod_id} does not fit this charter and its key: sign again there"
            ) from None
    return tuple(sorted(document.signatures))


def _members(document: Charter) -> Iterator[tuple[Role, Member]]:
    yield Role.AGGREGATOR, document.aggregator
    for member in document.pods:
        yield Role.POD, member
    for member in document.hospitals:
        yield Role.HOSPITAL, member


def _roster(document: Charter, digest: bytes) -> Roster:
    committee, limits, cohort = document.committee, document.limits, document.cohort
    return Roster(
        charter=digest,
        consortium=document.consortium,
        aggregator=_key(document.aggregator),
        pods=tuple(_key(member) for member in document.pods),
        hospitals={member.id: _key(member) for member in document.hospitals},
        committee=Committee(len(document.pods), committee.threshold, committee.quorum, committee.slack),
        suite=_SUITES[document.suite],
        minimum_cohort=cohort.minimum,
        maximum_cohort=cohort.maximum,
        colluding_hospitals=cohort.colluding_hospitals,
        two_hospitals_accepted=cohort.two_hospitals == "accepted",
        limits=Limits(
            max_round=limits.rounds,
            max_parameters=limits.parameters,
            ring_bits=frozenset(limits.ring_bits),
            round_key_ms=int(limits.round_key_hours * 3_600_000),
        ),
        demo=document.demo,
    )


def _key(member: Member) -> MemberKey:
    return MemberKey(member.id, bytes.fromhex(member.identity_key), member.organisation)


def _label(text: str, name: str, what: str) -> None:
    try:
        check_id(text, what)
    except ServiceError as error:
        raise refuse(name, error.detail) from None


def _root_certificate(member: Member, name: str) -> bytes:
    """The fingerprint of the member's root key; exactly one CA certificate may stand in its entry."""
    try:
        certificates = x509.load_pem_x509_certificates(member.tls_root.encode())
        authority = [c.extensions.get_extension_for_class(x509.BasicConstraints).value.ca for c in certificates]
    except (ValueError, x509.ExtensionNotFound):
        certificates, authority = [], []
    if authority != [True]:
        raise refuse(
            name, f"{member.id}: tls_root must be the PEM of exactly one CA certificate: copy it from its join.yaml"
        )
    key = certificates[0].public_key()
    return hashlib.sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).digest()
