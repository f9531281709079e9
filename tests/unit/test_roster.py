"""P-1, P-12: charters under which a single update could be read are refused."""

from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg.committee import Committee
from services.common.secagg.roster import Limits, MemberKey, Roster
from tests.support.consortium import derive, make_consortium

GOOD = make_consortium().roster


def refused(roster: Roster, words: str, reason: Reason = Reason.INVALID_DOCUMENT) -> None:
    with pytest.raises(ServiceError, match=words) as found:
        roster.check()
    assert found.value.reason is reason


def owned(**owners: str) -> Roster:
    return make_consortium(organisations={k.replace("_", "-"): v for k, v in owners.items()}, checked=False).roster


@pytest.mark.parametrize(("m", "t", "q", "s"), [(3, 2, 2, 0), (4, 1, 3, 0), (4, 2, 5, 0), (5, 2, 3, 1), (3, 3, 3, 1)])
def test_unsafe_committees_are_refused_p_1(m: int, t: int, q: int, s: int) -> None:
    """P-1: the partition attack, t = 1, an impossible quorum, slack that the quorum does not bear."""
    refused(make_consortium(m, t, q, slack=s, checked=False).roster, "committee")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"charter": b""}, "digest"),
        ({"suite": 3}, "suite"),
        ({"committee": Committee(5, 2, 4)}, "4 pods listed"),
        ({"minimum_cohort": 2}, "at least 3"),
        ({"colluding_hospitals": 2}, "at least 4"),
        ({"colluding_hospitals": -1}, "at least 2"),
        ({"colluding_hospitals": 0, "minimum_cohort": 2}, "two_hospitals"),
        ({"maximum_cohort": 2}, "maximum cohort"),
        ({"maximum_cohort": 4097}, "maximum cohort"),
        ({"minimum_cohort": 5}, "4 organisations"),
        ({"limits": Limits(ring_bits=frozenset())}, "ring bits"),
        ({"limits": Limits(ring_bits=frozenset({20}))}, "ring bits"),
        ({"limits": Limits(max_round=0)}, "limit"),
        ({"limits": Limits(round_key_ms=0)}, "limit"),
    ],
    ids=str,
)
def test_unsafe_charters_are_refused_p_12(change: dict[str, Any], words: str) -> None:
    """P-12 and the limits of §10."""
    refused(replace(GOOD, **change), words)


def test_two_hospitals_are_accepted_in_words_only_p_12() -> None:
    """P-12."""
    replace(GOOD, colluding_hospitals=0, minimum_cohort=2, two_hospitals_accepted=True).check()


def test_pods_of_one_organisation_are_refused_unless_demo_p_1() -> None:
    """P-1: every pod belongs to another organisation."""
    roster = owned(pod_0="one", pod_1="one")
    refused(roster, "owns pods")
    replace(roster, demo=True).check()


def test_the_aggregators_own_pod_is_one_of_the_t_minus_1_p_1() -> None:
    """P-1: refused at t = 2 unless demo; at t = 3 two more organisations must collude."""
    roster = owned(aggregator="centre", pod_0="centre")
    refused(roster, "aggregator's organisation")
    replace(roster, demo=True).check()
    make_consortium(5, 3, organisations={"aggregator": "centre", "pod-0": "centre"})


def test_hospitals_are_counted_by_organisation_p_12() -> None:
    """P-12."""
    refused(owned(alice="chain", bob="chain", carol="chain"), "2 organisations")


def test_members_must_have_distinct_ids_and_keys_and_an_organisation_p_1() -> None:
    """P-1."""
    alice = GOOD.hospitals["alice"]
    pod = GOOD.pods[0]
    for member, words in (
        (MemberKey("alice", pod.key, "org"), "one identity key"),
        (MemberKey("alice", alice.key, ""), "no organisation"),
        (MemberKey("bob", alice.key, "org"), "under the name"),
    ):
        refused(replace(GOOD, hospitals={**GOOD.hospitals, "alice": member}), words)
    twin = MemberKey("alice", derive("twin"), "org-twin")
    refused(replace(GOOD, pods=(twin, *GOOD.pods[1:])), "two members")
    bad_name = MemberKey("Pod", derive("twin"), "org-twin")
    refused(replace(GOOD, pods=(bad_name, *GOOD.pods[1:])), "DNS label", Reason.MALFORMED)
    for key, words in ((bytes(32), "small order"), (bytes(31), "31 bytes")):
        pods = (replace(pod, key=key), *GOOD.pods[1:])
        refused(replace(GOOD, pods=pods), words, Reason.MALFORMED)


def test_members_are_found_by_id_or_refused() -> None:
    assert GOOD.pod_index("pod-2") == 2
    assert GOOD.hospital("bob").organisation == "org-bob"
    for attempt in (lambda: GOOD.pod_index("alice"), lambda: GOOD.hospital("pod-0")):
        with pytest.raises(ServiceError) as found:
            attempt()
        assert found.value.reason is Reason.UNKNOWN_MEMBER
