"""The charter that a simulation assumes: its hospitals and nobody else, as wide as a charter may be.

What a round looks like is a function of charter and study (documents.shape), so a simulation needs one too. Nobody
signed it: its keys are stand-ins that no code here uses, and no process would load it.
"""

import hashlib
from collections.abc import Sequence

from services.common.documents.charter import (
    Charter,
    CohortSection,
    CommitteeSection,
    LimitsSection,
    LoadedCharter,
    Member,
)
from services.common.documents.shape import check_study
from services.common.documents.study import LoadedStudy
from services.common.errors import Reason, ServiceError
from services.common.ids import check_id
from services.common.secagg.committee import Committee
from services.common.secagg.messages import MAX_HOSPITALS
from services.common.secagg.roster import MemberKey, Roster

COMMITTEE = Committee(pods=4, threshold=2, quorum=3)
_LIMITS = LimitsSection(rounds=100_000, parameters=2**31, round_key_hours=168, epsilon=1e6, delta=9.9e-3)


def assumed_charter(hospitals: Sequence[str], minimum: int, colluding: int) -> LoadedCharter:
    """A charter over exactly these hospitals, each of an organisation of its own.

    Raises INVALID_DATA for fewer than two hospitals, more than a charter may list, one name twice or no DNS label.
    """
    if len(hospitals) < 2:
        raise _bad(f"{len(hospitals)} hospital is no federation: give at least 2 sites, or divide one among more")
    if len(hospitals) > MAX_HOSPITALS:
        raise _bad(f"{len(hospitals)} hospitals, a charter lists at most {MAX_HOSPITALS}: ask for fewer")
    for name in hospitals:
        check_id(name, "hospital")
    if len(set(hospitals)) < len(hospitals):
        raise _bad("two hospitals have one name: rename one of them")
    members = {name: MemberKey(name, hashlib.sha256(name.encode()).digest(), name) for name in hospitals}
    pods = tuple(MemberKey(f"pod-{i}", hashlib.sha256(b"pod" + bytes([i])).digest(), f"pod-{i}") for i in range(4))
    centre = MemberKey("centre", hashlib.sha256(b"centre").digest(), "centre")
    accepted = colluding == 0
    document = Charter(
        wardround="charter/v1",
        consortium="simulation",
        version=1,
        demo=True,
        committee=CommitteeSection(threshold=COMMITTEE.threshold, quorum=COMMITTEE.quorum),
        cohort=CohortSection(
            minimum=minimum,
            maximum=len(hospitals),
            colluding_hospitals=colluding,
            two_hospitals="accepted" if accepted else None,
        ),
        limits=_LIMITS,
        aggregator=_entry(centre),
        pods=tuple(map(_entry, pods)),
        hospitals=tuple(map(_entry, members.values())),
    )
    digest = hashlib.sha256("\n".join(("simulation", *hospitals)).encode()).digest()
    roster = Roster(
        charter=digest,
        consortium=document.consortium,
        aggregator=centre,
        pods=pods,
        hospitals=members,
        committee=COMMITTEE,
        minimum_cohort=minimum,
        maximum_cohort=len(hospitals),
        colluding_hospitals=colluding,
        two_hospitals_accepted=accepted,
        demo=True,
    )
    return LoadedCharter(document, digest, b"", roster)


def charter_of(count: int) -> LoadedCharter:
    """For a study that is to be simulated: `count` hospitals, n_min 3 and k = 1 where there are three or more."""
    return assumed_charter([f"hospital-{i + 1}" for i in range(count)], min(3, count), min(1, count - 2))


def charter_for(study: LoadedStudy, hospitals: Sequence[str]) -> LoadedCharter:
    """The assumed charter, under which the study was checked. Raises INVALID_DATA, INVALID_DOCUMENT."""
    cohort = study.document.cohort
    if 2 <= len(hospitals) < cohort.minimum:
        raise _bad(
            f"{study.document.name} asks for cohort.minimum {cohort.minimum}, these are {len(hospitals)} hospitals, so "
            "no round could ever end: give more, or lower it"
        )
    charter = assumed_charter(hospitals, cohort.minimum, cohort.colluding_hospitals)
    check_study(charter, study)
    return charter


def _entry(member: MemberKey) -> Member:
    return Member(
        id=member.id, organisation=member.organisation, identity_key=member.key.hex(), tls_root="", signature=""
    )


def _bad(sentence: str) -> ServiceError:
    return ServiceError(Reason.INVALID_DATA, sentence)
