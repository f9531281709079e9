"""What the core needs of a charter: members, committee, limits (protocol.md §2, §3; P-1, P-2, P-12).

Not here: the YAML and its signatures (documents.charter makes a Roster of them).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.common.errors import Reason, ServiceError
from services.common.ids import check_id
from services.common.secagg.committee import Committee
from services.common.secagg.messages import (
    MAX_HOSPITALS,
    MAX_LANES,
    SUITE_HYBRID,
    SUITE_X25519,
)
from services.common.secagg.ring import RING_BITS
from services.common.secagg.signing import check_public_key


@dataclass(frozen=True)
class MemberKey:
    """One member: its id, its Ed25519 identity key (32 bytes) and the organisation that owns it."""

    id: str
    key: bytes
    organisation: str


@dataclass(frozen=True)
class Limits:
    """What no study of the charter may exceed. `round_key_ms` is the longest life of a round key."""

    max_round: int = 1000
    max_parameters: int = 200_000_000
    ring_bits: frozenset[int] = frozenset(RING_BITS)
    round_key_ms: int = 24 * 3600 * 1000


@dataclass(frozen=True)
class Roster:
    """A charter as the protocol sees it. `charter` is the SHA-256 of its exact bytes; a pod's index is its position."""

    charter: bytes
    consortium: str
    aggregator: MemberKey
    pods: tuple[MemberKey, ...]
    hospitals: Mapping[str, MemberKey]
    committee: Committee
    suite: int = SUITE_HYBRID
    minimum_cohort: int = 3
    maximum_cohort: int = MAX_HOSPITALS
    colluding_hospitals: int = 1
    two_hospitals_accepted: bool = False  # k = 0 said in words
    limits: Limits = field(default_factory=Limits)
    demo: bool = False

    def __hash__(self) -> int:
        return hash(self.charter)

    def check(self) -> None:
        """P-1 and P-12: raise INVALID_DOCUMENT for a charter under which a single update could be read."""
        if len(self.charter) != 32:
            raise _invalid(f"its digest has {len(self.charter)} bytes, not 32")
        if self.suite not in (SUITE_HYBRID, SUITE_X25519):
            raise _invalid(f"HPKE suite {self.suite} is unknown: 1 or 2")
        if self.committee.pods != len(self.pods):
            raise _invalid(f"a committee of {self.committee.pods} with {len(self.pods)} pods listed")
        self.committee.check()
        self._check_members()
        if not self.demo:
            self._check_organisations()
        self._check_cohort()
        self._check_limits()

    def pod_index(self, pod: str) -> int:
        """The position of `pod` in the charter's list. Raises UNKNOWN_MEMBER."""
        for index, member in enumerate(self.pods):
            if member.id == pod:
                return index
        raise ServiceError(Reason.UNKNOWN_MEMBER, f"the charter lists no pod {pod!r}")

    def hospital(self, hospital: str) -> MemberKey:
        """The entry of `hospital`. Raises UNKNOWN_MEMBER."""
        member = self.hospitals.get(hospital)
        if member is None:
            raise ServiceError(Reason.UNKNOWN_MEMBER, f"the charter lists no hospital {hospital!r}")
        return member

    def _check_members(self) -> None:
        check_id(self.consortium, "consortium")
        ids: set[str] = set()
        keys: dict[bytes, str] = {}
        for name, member in self.hospitals.items():
            if name != member.id:
                raise _invalid(f"hospital {member.id!r} stands under the name {name!r}")
        for member in (self.aggregator, *self.pods, *self.hospitals.values()):
            check_id(member.id, "member id")
            check_public_key(member.key, f"identity key of {member.id}")
            if not member.organisation:
                raise _invalid(f"{member.id} names no organisation")
            if member.id in ids:
                raise _invalid(f"two members are called {member.id!r}: every id must be distinct")
            if member.key in keys:
                raise _invalid(f"{member.id} and {keys[member.key]} have one identity key: every key must be distinct")
            ids.add(member.id)
            keys[member.key] = member.id

    def _check_organisations(self) -> None:
        owners: dict[str, str] = {}
        for pod in self.pods:
            if pod.organisation in owners:
                raise _invalid(
                    f"{pod.organisation!r} owns pods {owners[pod.organisation]} and {pod.id}: "
                    "every pod belongs to another organisation (only a demo charter may differ)"
                )
            owners[pod.organisation] = pod.id
        if self.aggregator.organisation in owners and self.committee.threshold == 2:
            raise _invalid(
                f"the aggregator's organisation owns pod {owners[self.aggregator.organisation]}: with threshold 2 "
                "it and one other pod's owner could read every update; raise the threshold or move the pod"
            )

    def _check_cohort(self) -> None:
        least, k = self.minimum_cohort, self.colluding_hospitals
        if k < 0 or least < k + 2:
            raise _invalid(f"minimum cohort {least} with {k} colluding hospitals: at least {max(k, 0) + 2} is needed")
        if k == 0 and not self.two_hospitals_accepted:
            raise _invalid(
                "colluding_hospitals 0 lets each of two hospitals read the other's vector together with the "
                "aggregator: say `two_hospitals: accepted`, or take 1"
            )
        if not least <= self.maximum_cohort <= MAX_HOSPITALS:
            raise _invalid(f"maximum cohort {self.maximum_cohort} is not in {least}..{MAX_HOSPITALS}")
        organisations = len({member.organisation for member in self.hospitals.values()})
        if organisations < least:
            raise _invalid(f"hospitals of {organisations} organisations can never reach the minimum cohort {least}")

    def _check_limits(self) -> None:
        limits = self.limits
        if not limits.ring_bits or not limits.ring_bits <= set(RING_BITS):
            raise _invalid(f"ring bits {sorted(limits.ring_bits)}: choose from {list(RING_BITS)}")
        if not (1 <= limits.max_round < 2**32 and 1 <= limits.max_parameters <= MAX_LANES and limits.round_key_ms > 0):
            raise _invalid("a limit on rounds, parameters or the life of a round key is out of range")


def _invalid(detail: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DOCUMENT, f"charter: {detail}")
