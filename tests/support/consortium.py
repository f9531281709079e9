"""A whole fake consortium: keys, roster, and signed blobs of a round, for everybody's tests.

Everything follows from a seed by hashing, so two runs make the same bytes (except HPKE, which draws its
own randomness). Private keys lie in the open here on purpose.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from services.common.secagg import masking, sealing
from services.common.secagg.blob import encode
from services.common.secagg.certificate import CheckedManifest, check_manifest
from services.common.secagg.cohort import Cohort
from services.common.secagg.committee import Committee
from services.common.secagg.digests import VectorDigest
from services.common.secagg.encoding import SENTINEL, LaneTable
from services.common.secagg.messages import (
    SUITE_X25519,
    ZERO_DIGEST,
    Abandon,
    AbandonCertificate,
    Accepted,
    AcceptList,
    BoxDigest,
    CohortCertificate,
    Commitment,
    Core,
    Endorsement,
    Header,
    LaneClass,
    LedgerMark,
    Lock,
    Manifest,
    Proposal,
    Result,
    Signed,
)
from services.common.secagg.roster import Limits, MemberKey, Roster
from services.common.secagg.sealing import SealingKey
from services.common.secagg.signing import Signer, digest
from tests.support.packed import masked

NOW = 1_800_000_000_000  # Unix ms
STUDY = hashlib.sha256(b"a study").digest()
MODEL = hashlib.sha256(b"a model").digest()


def derive(*parts: object) -> bytes:
    """32 bytes that stand for `parts`: test keys and seeds."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()


def lanes(parameters: int = 6, bound: int = 1000, fraction_bits: int = 8) -> tuple[LaneClass, ...]:
    """A small lane table: sentinels, one weight, two-limb metrics, parameters."""
    return (
        SENTINEL,
        LaneClass("weight", 1, 0, 1, 1),
        LaneClass("gate", 3, 0, min(bound, 1000), 2),
        LaneClass("parameter", parameters, fraction_bits, bound, 1),
    )


@dataclass
class PodKeys:
    """One pod's identity and the keys of its present boot."""

    identity: Signer
    round: Signer
    sealing: SealingKey = field(repr=False)
    sealing_public: bytes = field(repr=False)


@dataclass
class Submission:
    """What one hospital sends, and (for the tests) what it hides."""

    header: Signed
    boxes: dict[int, bytes]
    y: bytes
    seeds: tuple[bytes, ...] = field(repr=False)
    parsed: Header = field(repr=False)


@dataclass
class Consortium:
    """Members with all their private keys. Pod index = position; hospitals by id."""

    roster: Roster
    aggregator: Signer
    pods: list[PodKeys]
    hospitals: dict[str, Signer]

    @property
    def pod_ids(self) -> list[str]:
        return [pod.id for pod in self.roster.pods]

    def core(self, **changes: object) -> Core:
        """A core of round 1 within the charter; `changes` replace fields."""
        table = changes.pop("lanes", None) or lanes()
        plain = Core(
            self.roster.charter, STUDY, 1, ZERO_DIGEST, MODEL, table[-1].values, 32, table, self.roster.minimum_cohort
        )
        return replace(plain, **changes)

    def proposal(self, core: Core | None = None, attempt: int = 1, **changes: object) -> Signed:
        """The aggregator's signed proposal of `core`."""
        plain = Proposal(encode(core or self.core()), attempt, NOW + 60_000, NOW + 3_600_000)
        return self.aggregator.sign("proposal", encode(replace(plain, **changes)))

    def commitment(self, proposal: Signed, pod: int, core: Core, /, attempt: int = 1, **changes: object) -> Signed:
        """Pod `pod`'s signed commitment to `proposal`; `changes` replace fields."""
        keys = self.pods[pod]
        plain = Commitment(
            digest("proposal", proposal.blob), core.charter, core.study, core.round, attempt,
            self.roster.pods[pod].id, self.roster.suite, keys.sealing_public, keys.round.public,
        )  # fmt: skip
        return keys.identity.sign("commit", encode(replace(plain, **changes)))

    def manifest_blob(self, core: Core | None = None, attempt: int = 1, pods: Sequence[int] | None = None) -> bytes:
        """The exact bytes of a manifest with commitments of `pods` (all by default)."""
        core = core or self.core()
        proposal = self.proposal(core, attempt)
        chosen = range(len(self.pods)) if pods is None else pods
        return encode(Manifest(proposal, tuple(self.commitment(proposal, p, core, attempt) for p in chosen)))

    def manifest(
        self, core: Core | None = None, attempt: int = 1, pods: Sequence[int] | None = None
    ) -> CheckedManifest:
        """A manifest that passed P-17."""
        return check_manifest(self.manifest_blob(core, attempt, pods), self.roster)

    def endorse(self, checked: CheckedManifest, pod: int) -> Signed:
        return self.pods[pod].round.sign("endorse", encode(Endorsement(checked.M, self.roster.pods[pod].id)))

    def endorsements(self, checked: CheckedManifest) -> list[Signed]:
        """One of every pod in the manifest."""
        return [self.endorse(checked, pod) for pod in checked.commitments]

    def submit(self, checked: CheckedManifest, hospital: str, x: bytes, ledger: LedgerMark | None = None) -> Submission:
        """`hospital` masks the packed vector `x`, seals its seeds and signs its header."""
        roster, ring = self.roster, checked.table.ring
        seeds = tuple(derive("seed", checked.M.hex(), hospital, j) for j in range(len(roster.committee.pieces)))
        keys = [masking.stream_key(seed, checked.M, hospital, j) for j, seed in enumerate(seeds)]
        vector = VectorDigest(len(x))
        y = bytearray()
        for chunk in masked(x, ring, keys):
            vector.add(chunk)
            y += chunk
        boxes = {
            pod: sealing.seal(
                roster.suite,
                commitment.sealing_key,
                sealing.pack_seeds(seeds[j] for j in roster.committee.pieces_of(pod)),
                sealing.box_info(checked.M, hospital, pod),
            )
            for pod, commitment in checked.commitments.items()
        }
        header = Header(
            checked.M, hospital, checked.table.total_lanes,
            tuple(masking.commitment(checked.M, hospital, j, seed) for j, seed in enumerate(seeds)),
            tuple(BoxDigest(pod, hashlib.sha256(box).digest()) for pod, box in boxes.items()),
            vector.result(), ledger or LedgerMark(1, derive("ledger", hospital)),
        )  # fmt: skip
        return Submission(self.hospitals[hospital].sign("header", encode(header)), boxes, bytes(y), seeds, header)

    def cohort(self, checked: CheckedManifest, headers: Mapping[str, bytes]) -> Cohort:
        """The cohort of hospital → header digest."""
        return Cohort(checked.M, tuple(Accepted(h, headers[h]) for h in sorted(headers, key=str.encode)))

    def accept(self, checked: CheckedManifest, cohort: Cohort, pod: int) -> Signed:
        plain = AcceptList(checked.M, self.roster.pods[pod].id, cohort.members)
        return self.pods[pod].round.sign("accept", encode(plain))

    def lock(self, cohort: Cohort, pod: int) -> Signed:
        plain = Lock(cohort.manifest, cohort.digest, len(cohort.members), self.roster.pods[pod].id)
        return self.pods[pod].round.sign("lock", encode(plain))

    def certificate(self, cohort: Cohort, pods: Sequence[int] | None = None) -> bytes:
        """The exact bytes of a cohort certificate with locks of `pods` (the first q by default)."""
        chosen = range(self.roster.committee.quorum) if pods is None else pods
        return encode(CohortCertificate(cohort.blob, tuple(self.lock(cohort, pod) for pod in chosen)))

    def abandon(self, checked: CheckedManifest, pod: int) -> Signed:
        core = checked.core
        plain = Abandon(
            core.charter, core.study, core.round, checked.proposal.attempt, checked.M, self.roster.pods[pod].id
        )
        return self.pods[pod].identity.sign("abandon", encode(plain))

    def abandon_certificate(self, checked: CheckedManifest, pods: Sequence[int] | None = None) -> bytes:
        """The exact bytes of an abandon certificate of `pods` (the first q by default)."""
        chosen = range(self.roster.committee.quorum) if pods is None else pods
        return encode(AbandonCertificate(tuple(self.abandon(checked, pod) for pod in chosen)))

    def result(self, checked: CheckedManifest, **changes: object) -> Signed:
        """The aggregator's signed result of that round; `changes` replace fields."""
        core = checked.core
        plain = Result(
            core.charter, core.study, core.round, checked.proposal.attempt, checked.M, 1, derive("cohort"),
            derive("certificate"), derive("sum"), core.model, core.round, core.previous_result, b"{}",
        )  # fmt: skip
        return self.aggregator.sign("result", encode(replace(plain, **changes)))


def make_consortium(
    pods: int = 4,
    threshold: int = 2,
    quorum: int | None = None,
    hospitals: Sequence[str] = ("alice", "bob", "carol", "dave"),
    *,
    organisations: Mapping[str, str] | None = None,
    suite: int = SUITE_X25519,
    slack: int = 0,
    checked: bool = True,
    **roster: object,
) -> Consortium:
    """A consortium of `pods` pods (threshold, quorum: the smallest safe one) and `hospitals`.

    Each member is its own organisation unless `organisations` (by member id) says otherwise. Suite 2 by
    default because it is quick. `roster` replaces fields of the Roster; `checked=False` leaves out
    Roster.check(), to make what must be refused.
    """
    if quorum is None:
        quorum = (pods + threshold - 1 + slack) // 2 + 1
    owner = dict(organisations or {})
    aggregator = Signer.from_seed(derive("identity", "aggregator"))
    pod_ids = [f"pod-{index}" for index in range(pods)]
    people = {name: Signer.from_seed(derive("identity", name)) for name in (*pod_ids, *hospitals)}
    members = {name: MemberKey(name, who.public, owner.get(name, f"org-{name}")) for name, who in people.items()}
    plain = Roster(
        charter=derive("charter", pods, threshold, quorum, *hospitals),
        consortium="test",
        aggregator=MemberKey("aggregator", aggregator.public, owner.get("aggregator", "org-aggregator")),
        pods=tuple(members[name] for name in pod_ids),
        hospitals={name: members[name] for name in hospitals},
        committee=Committee(pods, threshold, quorum, slack),
        suite=suite,
        minimum_cohort=3,
        maximum_cohort=16,
        limits=Limits(max_round=100),
    )
    whole = replace(plain, **roster)
    if checked:
        whole.check()
    keys = []
    for name in pod_ids:
        private, public = sealing.generate(whole.suite)
        keys.append(PodKeys(people[name], Signer.from_seed(derive("round", name)), private, public))
    return Consortium(whole, aggregator, keys, {name: people[name] for name in hospitals})


def values_for(table: LaneTable, hospital: int) -> dict[str, np.ndarray]:
    """Small int64 values for every class but the sentinels; different for every hospital."""
    found = {}
    for lane in table.lanes[1:]:
        spread = np.arange(lane.values, dtype=np.int64) * 7 + 31 * hospital
        found[lane.name] = (spread % (2 * lane.bound + 1)) - lane.bound
    return found
