"""Committees: which are safe (P-1), who holds what, and who answers."""

from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Reason, ServiceError
from services.common.secagg.committee import Committee

SAFE = [(3, 3, 3, 0), (4, 2, 3, 0), (5, 3, 4, 0), (5, 2, 4, 1), (7, 3, 5, 0)]


@pytest.mark.parametrize(("m", "t", "q", "s"), SAFE)
def test_the_committees_of_the_design_are_accepted(m: int, t: int, q: int, s: int) -> None:
    committee = Committee(m, t, q, s)
    committee.check()
    assert len(committee.pieces) == comb(m, t - 1)
    assert committee.may_be_down == m - q


@given(st.integers(-1, 18), st.integers(-1, 18), st.integers(-1, 18), st.integers(-1, 4))
def test_exactly_the_committees_of_p_1_are_accepted(m: int, t: int, q: int, s: int) -> None:
    """P-1."""
    safe = 2 <= t <= m <= 16 and s >= 0 and q <= m and 2 * q - m > t - 1 + s and comb(m, t - 1) <= 64
    if safe:
        Committee(m, t, q, s).check()
    else:
        with pytest.raises(ServiceError) as refused:
            Committee(m, t, q, s).check()
        assert refused.value.reason is Reason.INVALID_DOCUMENT


@pytest.mark.parametrize(("m", "t"), [(3, 3), (4, 2), (5, 3), (7, 3), (6, 4)])
def test_any_t_minus_1_pods_lack_a_whole_piece_and_any_t_hold_all(m: int, t: int) -> None:
    committee = Committee(m, t, m)
    everything = set(range(len(committee.pieces)))
    for few in combinations(range(m), t - 1):
        assert {j for p in few for j in committee.pieces_of(p)} != everything
    for enough in combinations(range(m), t):
        assert {j for p in enough for j in committee.pieces_of(p)} == everything
    assert committee.pieces == tuple(sorted(committee.pieces))
    for p in range(m):
        assert len(committee.pieces_of(p)) == comb(m - 1, t - 1)
        assert all(p in committee.holders(j) for j in committee.pieces_of(p))


@pytest.mark.parametrize(("m", "t", "q", "s"), SAFE)
def test_any_quorum_can_release_every_piece_evenly_with_another_holder_for_the_digest(
    m: int, t: int, q: int, s: int
) -> None:
    """P-23: the digest comes from another holder, where one answers."""
    committee = Committee(m, t, q, s)
    for answering in combinations(range(m), q):
        for copies in (1, t - 1):
            shared = committee.assign(answering, copies)
            released = [j for pieces in shared.release.values() for j in pieces]
            assert sorted(released) == list(range(len(committee.pieces)))
            assert max(map(len, shared.release.values())) <= -(-len(released) // len(answering))
            for j in released:
                able = set(answering) & set(committee.holders(j))
                releasing = {p for p, pieces in shared.release.items() if j in pieces}
                checking = {p for p, pieces in shared.digest.items() if j in pieces}
                assert len(releasing) == 1
                assert releasing <= able
                assert checking <= able - releasing
                assert len(checking) == min(copies, len(able) - 1)


def test_a_full_committee_shares_the_pieces_out_exactly_evenly() -> None:
    assert {len(p) for p in Committee(5, 3, 4).assign(range(5)).release.values()} == {2}
    assert {len(p) for p in Committee(4, 2, 3).assign(range(4)).release.values()} == {1}


def test_a_piece_without_an_answering_holder_waits_for_more_pods() -> None:
    with pytest.raises(ServiceError) as refused:
        Committee(4, 2, 3).assign([1])
    assert refused.value.reason is Reason.BELOW_QUORUM


def certified_views(committee: Committee, views: list[set[int]], bad: set[int]) -> bool:
    """Can an aggregator certify a different cohort in front of each view? Bad pods sign every cohort."""
    return all(len(view | bad) >= committee.quorum for view in views)


@given(st.integers(2, 8), st.integers(2, 8), st.integers(2, 8))
def test_the_partition_attack_works_exactly_on_the_quorums_that_are_refused(m: int, t: int, q: int) -> None:
    """P-1: t-1 bad pods and a split of the honest ones certify two cohorts iff 2q - m <= t - 1."""
    committee = Committee(m, t, q)
    if not (t <= m and q <= m):
        return
    bad = set(range(t - 1))
    honest = list(range(t - 1, m))
    attack = any(
        certified_views(committee, [set(honest[:cut]), set(honest[cut:])], bad) for cut in range(len(honest) + 1)
    )
    try:
        committee.check()
        assert not attack
    except ServiceError:
        assert attack or comb(m, t - 1) > 64


def test_three_pods_threshold_two_one_down_is_partitioned_and_refused() -> None:
    """P-1: q = 2 of 3 lets one bad pod split two honest ones: {0, bad} and {1, bad} each certify a cohort.

    With the sums over U and over U minus one hospital the aggregator reads that hospital's vector.
    """
    small = Committee(3, 2, 2)
    assert certified_views(small, [{0}, {1}], bad={2})
    with pytest.raises(ServiceError, match="two cohorts"):
        small.check()
    assert not certified_views(Committee(3, 2, 3), [{0}, {1}], bad={2})


def test_threshold_one_is_refused() -> None:
    """P-1: with t = 1 every pod alone opens everything."""
    with pytest.raises(ServiceError, match="threshold 1"):
        Committee(3, 1, 2).check()
