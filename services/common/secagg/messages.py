"""The blobs of the protocol as frozen dataclasses (protocol.md §4, §10).

Each is encoded by `blob.encode`, signed over its exact bytes by `signing.sign` and parsed by
`blob.decode` only after its signature verified. The .proto file beside the services' own
(protos/wardround/protocol/v1) says the same in protobuf; a test holds the two equal.
Times are Unix milliseconds. Digests are SHA-256, 32 bytes.
"""

from dataclasses import dataclass

from services.common.secagg.blob import data, ident, many, nested, raw, text, u

MAX_PODS = 16
MAX_PIECES = 64
MAX_HOSPITALS = 4096
MAX_LANES = 2**31
MAX_ATTEMPT = 64
MAX_MANIFEST_BYTES = 64 * 1024
MAX_HEADER_BYTES = 8 * 1024
ZERO_DIGEST = bytes(32)

SUITE_HYBRID = 1  # ML-KEM-768 + X25519 / HKDF-SHA256 / AES-256-GCM
SUITE_X25519 = 2  # X25519 / HKDF-SHA256 / AES-256-GCM

OUTCOME_ACCEPTED = 1
OUTCOME_REJECTED = 2


@dataclass(frozen=True)
class Signed:
    """Exact bytes and an Ed25519 signature over label ‖ blob. The signer's id is inside the blob."""

    blob: bytes = data(1, maximum=2**22)
    signature: bytes = raw(2, 64)


@dataclass(frozen=True)
class LaneClass:
    """`values` numbers of one scale, each spread over `limbs` lanes.

    A number v travels as round(v * 2**fraction_bits); `bound` is B of protocol.md §6: the largest
    absolute value of ONE lane of ONE hospital.
    """

    name: str = text(1, 32)
    values: int = u(2, MAX_LANES)
    fraction_bits: int = u(3, 63)
    bound: int = u(4, 2**31)
    limbs: int = u(5, 8)


@dataclass(frozen=True)
class Core:
    """What every attempt of one round has in common; its digest is D(core, blob)."""

    charter: bytes = raw(1, 32)
    study: bytes = raw(2, 32)
    round: int = u(3, 2**32 - 1)
    previous_result: bytes = raw(4, 32)
    model: bytes = raw(5, 32)
    parameters: int = u(6, MAX_LANES)
    ring_bits: int = u(7, 32)
    lanes: tuple[LaneClass, ...] = many(8, LaneClass, maximum=16)
    minimum_cohort: int = u(9, MAX_HOSPITALS)


@dataclass(frozen=True)
class Proposal:
    """Signed by the aggregator's identity key (label proposal)."""

    core: bytes = data(1, 8192)
    attempt: int = u(2, MAX_ATTEMPT)
    deadline: int = u(3)
    expires: int = u(4)


@dataclass(frozen=True)
class Commitment:
    """A pod's fresh keys for one attempt, signed by its identity key (label commit)."""

    proposal: bytes = raw(1, 32)  # D(proposal, blob)
    charter: bytes = raw(2, 32)
    study: bytes = raw(3, 32)
    round: int = u(4, 2**32 - 1)
    attempt: int = u(5, MAX_ATTEMPT)
    pod: str = ident(6)
    suite: int = u(7, 2)
    sealing_key: bytes = data(8, 2048)
    round_key: bytes = raw(9, 32)


@dataclass(frozen=True)
class Manifest:
    """M = D(manifest, blob). Commitments ascend by pod index (position in the charter)."""

    proposal: Signed = nested(1, Signed)
    commitments: tuple[Signed, ...] = many(2, Signed, maximum=MAX_PODS)


@dataclass(frozen=True)
class Endorsement:
    """Signed by the pod's round key (label endorse)."""

    manifest: bytes = raw(1, 32)
    pod: str = ident(2)


@dataclass(frozen=True)
class BoxDigest:
    """H(box) of the box for pod index `pod`."""

    pod: int = u(1, MAX_PODS - 1)
    digest: bytes = raw(2, 32)


@dataclass(frozen=True)
class LedgerMark:
    """The hospital's ledger after the debit for this submission (privacy.md L-4)."""

    sequence: int = u(1)
    head: bytes = raw(2, 32)


@dataclass(frozen=True)
class Header:
    """Signed by the hospital's identity key (label header)."""

    manifest: bytes = raw(1, 32)
    hospital: str = ident(2)
    lanes: int = u(3, MAX_LANES)
    commitments: tuple[bytes, ...] = many(4, size=32, maximum=MAX_PIECES)
    boxes: tuple[BoxDigest, ...] = many(5, BoxDigest, maximum=MAX_PODS)
    vector: bytes = raw(6, 32)
    ledger: LedgerMark = nested(7, LedgerMark)


@dataclass(frozen=True)
class Receipt:
    """Signed by the aggregator's identity key (label receipt)."""

    manifest: bytes = raw(1, 32)
    hospital: str = ident(2)
    header: bytes = raw(3, 32)  # D(header, blob)
    vector: bytes = raw(4, 32)
    time: int = u(5)


@dataclass(frozen=True)
class Accepted:
    """One hospital whose header and box a pod found good."""

    hospital: str = ident(1)
    header: bytes = raw(2, 32)


@dataclass(frozen=True)
class AcceptList:
    """Signed by the pod's round key (label accept); ascending by hospital id."""

    manifest: bytes = raw(1, 32)
    pod: str = ident(2)
    accepted: tuple[Accepted, ...] = many(3, Accepted, maximum=MAX_HOSPITALS)


@dataclass(frozen=True)
class Lock:
    """Signed by the pod's round key (label lock)."""

    manifest: bytes = raw(1, 32)
    cohort: bytes = raw(2, 32)  # D(cohort, cohort bytes)
    size: int = u(3, MAX_HOSPITALS)
    pod: str = ident(4)


@dataclass(frozen=True)
class CohortCertificate:
    """The exact cohort bytes (§10) and at least q lock signatures, ascending by pod index."""

    cohort: bytes = data(1, 128 * MAX_HOSPITALS + 4096)
    locks: tuple[Signed, ...] = many(2, Signed, maximum=MAX_PODS)


@dataclass(frozen=True)
class PieceSum:
    """The digest of one piece's summed streams over one cohort and chunk range, under the pod's round key.

    Release and Digest sign the same blob, under the labels release and digest share: label release.
    """

    manifest: bytes = raw(1, 32)
    cohort: bytes = raw(2, 32)
    piece: int = u(3, MAX_PIECES - 1)
    first_chunk: int = u(4, 2**32 - 1)
    chunks: int = u(5, 2**32 - 1)
    vector: bytes = raw(6, 32)
    pod: str = ident(7)


@dataclass(frozen=True)
class Abandon:
    """Signed by the pod's IDENTITY key (label abandon)."""

    charter: bytes = raw(1, 32)
    study: bytes = raw(2, 32)
    round: int = u(3, 2**32 - 1)
    attempt: int = u(4, MAX_ATTEMPT)
    manifest: bytes = raw(5, 32)
    pod: str = ident(6)


@dataclass(frozen=True)
class AbandonCertificate:
    """At least q distinct charter pods on one M, ascending by pod index."""

    abandons: tuple[Signed, ...] = many(1, Signed, maximum=MAX_PODS)


@dataclass(frozen=True)
class Mark:
    """What a pod has seen of one study; (0, 0) = never. `commit` and `lock` are of the ASKING pod."""

    study: bytes = raw(1, 32)
    endorsed_round: int = u(2, 2**32 - 1)
    endorsed_attempt: int = u(3, MAX_ATTEMPT)
    commit_round: int = u(4, 2**32 - 1)
    commit_attempt: int = u(5, MAX_ATTEMPT)
    lock_round: int = u(6, 2**32 - 1)
    lock_attempt: int = u(7, MAX_ATTEMPT)


@dataclass(frozen=True)
class HighWaterMark:
    """Signed by the answering pod's identity key (label highwater), for one nonce of the asking pod."""

    nonce: bytes = raw(1, 32)
    asking: str = ident(2)
    answering: str = ident(3)
    marks: tuple[Mark, ...] = many(4, Mark, maximum=4096)


@dataclass(frozen=True)
class Result:
    """Signed by the aggregator's identity key (label result); previous_result links the chain.

    `released` is canonical JSON: the figures decoded from the metric lanes, the verdict and its reason.
    """

    charter: bytes = raw(1, 32)
    study: bytes = raw(2, 32)
    round: int = u(3, 2**32 - 1)
    attempt: int = u(4, MAX_ATTEMPT)
    manifest: bytes = raw(5, 32)
    outcome: int = u(6, 2)
    cohort: bytes = raw(7, 32)
    certificate: bytes = raw(8, 32)  # plain SHA-256 of the certificate's blob
    sum: bytes = raw(9, 32)  # vector digest of Σ; zeros when there is none
    model: bytes = raw(10, 32)  # SHA-256 of the model file that the next round starts from
    version: int = u(11, 2**32 - 1)  # of that model: v0 is the initial one
    previous_result: bytes = raw(12, 32)
    released: bytes = data(13, 65536)


@dataclass(frozen=True)
class Close:
    """Signed by the aggregator's identity key (label close): the round is over at every attempt."""

    charter: bytes = raw(1, 32)
    study: bytes = raw(2, 32)
    round: int = u(3, 2**32 - 1)


@dataclass(frozen=True)
class Join:
    """One member's entry in the charter, self-signed once at `site init` (label join)."""

    role: str = text(1, 16)
    id: str = ident(2)
    organisation: str = text(3, 128)
    identity_key: bytes = raw(4, 32)
    tls_root: bytes = data(5, 8192)  # PEM
