"""P-17, P-19, P-10, P-12: what is refused of manifests, endorsements, headers, certificates, abandons, chains."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg.blob import encode
from services.common.secagg.certificate import (
    ResultLink,
    check_abandon_certificate,
    check_certificate,
    check_endorsed,
    check_expiry,
    check_header,
    check_manifest,
    check_receipt,
    check_result_chain,
    open_round_signed,
)
from services.common.secagg.cohort import Cohort
from services.common.secagg.encoding import SENTINEL
from services.common.secagg.messages import (
    ZERO_DIGEST,
    Accepted,
    AcceptList,
    CohortCertificate,
    LaneClass,
    Manifest,
    Receipt,
    Signed,
)
from services.common.secagg.signing import digest
from tests.support.consortium import NOW, STUDY, Consortium, derive, make_consortium, values_for
from tests.support.packed import encoded

C = make_consortium()
CHECKED = C.manifest()
HEADERS = {h: derive("header", h) for h in C.hospitals}


def refused(reason: Reason, attempt: Callable[[], Any]) -> None:
    with pytest.raises(ServiceError) as found:
        attempt()
    assert found.value.reason is reason, found.value


def manifest_of(c: Consortium, commitments: list[Signed], **proposal: Any) -> bytes:
    return encode(Manifest(c.proposal(**proposal), tuple(commitments)))


def test_a_valid_manifest_gives_its_parts_p_17() -> None:
    """P-17."""
    assert digest("manifest", CHECKED.blob) == CHECKED.M
    assert list(CHECKED.commitments) == [0, 1, 2, 3]
    assert check_endorsed(CHECKED, C.endorsements(CHECKED)) == (0, 1, 2, 3)
    assert check_manifest(C.manifest_blob(pods=[0, 2, 3]), C.roster).commitments.keys() == {0, 2, 3}
    hybrid = make_consortium(5, 3, suite=1)
    assert len(hybrid.manifest().commitments) == 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"charter": derive("other")}, Reason.WRONG_CORE),
        ({"round": 101}, Reason.WRONG_CORE),
        ({"round": 0}, Reason.WRONG_CORE),
        ({"parameters": 200_000_001}, Reason.WRONG_CORE),
        ({"ring_bits": 20}, Reason.WRONG_CORE),
        ({"minimum_cohort": 2}, Reason.WRONG_CORE),
        ({"minimum_cohort": 17}, Reason.WRONG_CORE),
        ({"lanes": (SENTINEL, LaneClass("parameter", 6, 0, 2**30, 1))}, Reason.MALFORMED),
    ],
)
def test_a_core_outside_the_charter_is_refused_p_12(change: dict[str, Any], reason: Reason) -> None:
    """P-12: a proposal below the charter's n_min, another charter, a lane that could wrap."""
    refused(reason, lambda: C.manifest(C.core(**change)))


@pytest.mark.parametrize("change", [{"attempt": 0}, {"deadline": 0}, {"deadline": NOW + 10, "expires": NOW}], ids=str)
def test_a_proposal_without_sense_is_refused_p_17(change: dict[str, Any]) -> None:
    """P-17."""
    refused(Reason.WRONG_CORE, lambda: check_manifest(manifest_of(C, [], **change), C.roster))


def test_a_proposal_not_signed_by_the_charters_aggregator_is_refused_p_2() -> None:
    """P-2."""
    forged = C.pods[0].identity.sign("proposal", C.proposal().blob)
    refused(Reason.BAD_SIGNATURE, lambda: check_manifest(encode(Manifest(forged, ())), C.roster))


def test_round_keys_that_live_too_long_or_are_over_are_refused_p_22() -> None:
    """P-22: `expires` is at most the charter's life of a round key away."""
    check_expiry(CHECKED.proposal, C.roster, NOW)
    refused(Reason.LATE, lambda: check_expiry(CHECKED.proposal, C.roster, CHECKED.proposal.expires))
    refused(Reason.WRONG_CORE, lambda: check_expiry(replace(CHECKED.proposal, expires=NOW * 2), C.roster, NOW))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"proposal": derive("x")}, Reason.WRONG_CORE),
        ({"charter": derive("x")}, Reason.WRONG_CORE),
        ({"study": derive("x")}, Reason.WRONG_CORE),
        ({"round": 2}, Reason.WRONG_CORE),
        ({"attempt": 2}, Reason.WRONG_CORE),
        ({"suite": 1}, Reason.WRONG_CORE),
        ({"sealing_key": bytes(32)}, Reason.MALFORMED),  # low order
        ({"sealing_key": (1).to_bytes(32, "little")}, Reason.MALFORMED),  # low order
        ({"sealing_key": bytes(31)}, Reason.MALFORMED),
        ({"round_key": (1).to_bytes(32, "little")}, Reason.MALFORMED),  # small order
        ({"round_key": C.pods[1].round.public}, Reason.CONFLICT),
        ({"round_key": C.pods[0].identity.public}, Reason.CONFLICT),
        ({"sealing_key": C.pods[1].sealing_public}, Reason.CONFLICT),
        ({"pod": "pod-9"}, Reason.UNKNOWN_MEMBER),
        ({"pod": "pod-1"}, Reason.BAD_SIGNATURE),
        ({"pod": "alice"}, Reason.UNKNOWN_MEMBER),
    ],
    ids=str,
)
def test_a_commitment_that_names_or_holds_something_else_is_refused_p_17(
    change: dict[str, Any], reason: Reason
) -> None:
    """P-17: substituted, shared, low-order and foreign keys."""
    proposal, core = C.proposal(), C.core()
    first = C.commitment(proposal, 0, core, **change)
    others = [C.commitment(proposal, p, core) for p in (1, 2, 3)]
    refused(reason, lambda: check_manifest(encode(Manifest(proposal, (first, *others))), C.roster))


def test_a_hybrid_key_with_a_low_order_half_is_refused_p_17() -> None:
    """P-17: it would load, and make sealing fail at every hospital."""
    hybrid = make_consortium(suite=1)
    proposal, core = hybrid.proposal(), hybrid.core()
    bad = hybrid.pods[0].sealing_public[:-32] + bytes(32)
    commitments = (
        hybrid.commitment(proposal, 0, core, sealing_key=bad),
        *(hybrid.commitment(proposal, p, core) for p in (1, 2, 3)),
    )
    refused(Reason.MALFORMED, lambda: check_manifest(encode(Manifest(proposal, commitments)), hybrid.roster))


def test_one_pod_twice_out_of_order_or_too_few_pods_are_refused_p_17() -> None:
    """P-17: one pod counts once; a quorum cannot be downgraded."""
    proposal, core = C.proposal(), C.core()
    one = [C.commitment(proposal, p, core) for p in range(4)]
    for order, reason in (
        ([0, 0, 1, 2], Reason.MALFORMED),
        ([1, 0, 2], Reason.MALFORMED),
        ([0, 1], Reason.BELOW_QUORUM),
        ([], Reason.BELOW_QUORUM),
    ):
        blob = encode(Manifest(proposal, tuple(one[p] for p in order)))
        refused(reason, lambda blob=blob: check_manifest(blob, C.roster))


def test_a_manifest_beyond_64_kib_is_refused_before_it_is_read() -> None:
    refused(Reason.TOO_LARGE, lambda: check_manifest(bytes(64 * 1024 + 1), C.roster))


def test_endorsements_too_few_twice_foreign_or_for_another_manifest_are_refused_p_17() -> None:
    """P-17: a substituted round key, one pod counted twice, a quorum downgrade."""
    good = C.endorsements(CHECKED)
    other = C.manifest(attempt=2)
    small = C.manifest(pods=[0, 1, 2])
    stolen = C.pods[3].round.sign("endorse", good[0].blob)
    identity = C.pods[0].identity.sign("endorse", good[0].blob)
    refused(Reason.BELOW_QUORUM, lambda: check_endorsed(CHECKED, good[:2]))
    refused(Reason.CONFLICT, lambda: check_endorsed(CHECKED, [good[0], good[0], good[1]]))
    refused(Reason.WRONG_CORE, lambda: check_endorsed(CHECKED, C.endorsements(other)))
    refused(Reason.UNKNOWN_MEMBER, lambda: check_endorsed(small, [C.endorse(small, 3)]))
    refused(Reason.BAD_SIGNATURE, lambda: check_endorsed(CHECKED, [stolen]))
    refused(Reason.BAD_SIGNATURE, lambda: check_endorsed(CHECKED, [identity]))


def submission() -> Any:
    return C.submit(CHECKED, "alice", encoded(CHECKED.table, values_for(CHECKED.table, 0)))


def test_headers_forged_unknown_incomplete_or_of_another_manifest_are_refused() -> None:
    sent = submission()
    assert check_header(sent.header, CHECKED) == sent.parsed

    def signed(by: str = "alice", **change: Any) -> Signed:
        return C.hospitals[by].sign("header", encode(replace(sent.parsed, **change)))

    boxes = sent.parsed.boxes
    for header, reason in (
        (signed("bob"), Reason.BAD_SIGNATURE),
        (signed(hospital="mallory"), Reason.UNKNOWN_MEMBER),
        (signed(manifest=derive("x")), Reason.WRONG_CORE),
        (signed(lanes=1), Reason.MALFORMED),
        (signed(commitments=sent.parsed.commitments[:3]), Reason.MALFORMED),
        (signed(boxes=boxes[:3]), Reason.MALFORMED),
        (signed(boxes=boxes[::-1]), Reason.MALFORMED),
        (signed(boxes=(boxes[0], *boxes)), Reason.MALFORMED),
        (Signed(sent.header.blob + b"\x00", sent.header.signature), Reason.BAD_SIGNATURE),
        (C.hospitals["alice"].sign("header", sent.header.blob + b"\x00\x00"), Reason.MALFORMED),
        (Signed(bytes(8193), bytes(64)), Reason.TOO_LARGE),
        (Signed(sent.header.blob, bytes(64)), Reason.BAD_SIGNATURE),
    ):
        refused(reason, lambda header=header: check_header(header, CHECKED))


def test_a_receipt_must_be_for_exactly_what_was_sent() -> None:
    sent = submission()
    plain = Receipt(CHECKED.M, "alice", digest("header", sent.header.blob), sent.parsed.vector, NOW)
    good = C.aggregator.sign("receipt", encode(plain))
    assert check_receipt(good, CHECKED, sent.header, "alice", sent.parsed.vector) == plain
    wrong = C.aggregator.sign("receipt", encode(replace(plain, vector=derive("x"))))
    refused(Reason.CONFLICT, lambda: check_receipt(wrong, CHECKED, sent.header, "alice", sent.parsed.vector))


def test_an_accept_list_opens_under_its_pods_round_key_only() -> None:
    cohort = C.cohort(CHECKED, HEADERS)
    index, accepted = open_round_signed(AcceptList, "accept", C.accept(CHECKED, cohort, 2), CHECKED)
    assert (index, accepted.accepted) == (2, cohort.members)


def test_a_certificate_gives_its_cohort_p_19() -> None:
    """P-19."""
    cohort = C.cohort(CHECKED, HEADERS)
    assert check_certificate(CHECKED, C.certificate(cohort)) == cohort
    assert Cohort.parse(cohort.blob) == cohort


def test_certificates_below_quorum_twice_foreign_or_of_another_cohort_are_refused_p_19() -> None:
    """P-19: quorum downgrade, one pod twice, locks on another set, another manifest, forged."""
    cohort = C.cohort(CHECKED, HEADERS)
    three = C.cohort(CHECKED, {h: HEADERS[h] for h in ("alice", "bob", "carol")})
    other = C.cohort(C.manifest(attempt=2), HEADERS)
    small = C.manifest(pods=[0, 1, 2])
    locks = [C.lock(cohort, pod) for pod in range(4)]
    for certificate, reason in (
        (C.certificate(cohort, [0, 1]), Reason.BELOW_QUORUM),
        (C.certificate(cohort, [0, 0, 1]), Reason.MALFORMED),
        (C.certificate(cohort, [1, 0, 2]), Reason.MALFORMED),
        (encode(CohortCertificate(three.blob, tuple(locks[:3]))), Reason.WRONG_CORE),
        (C.certificate(other), Reason.WRONG_CORE),
        (
            encode(CohortCertificate(cohort.blob, tuple(replace(x, signature=bytes(64)) for x in locks))),
            Reason.BAD_SIGNATURE,
        ),
        (bytes(128 * 16 + 4097), Reason.TOO_LARGE),
    ):
        refused(reason, lambda certificate=certificate: check_certificate(CHECKED, certificate))
    absent = C.certificate(C.cohort(small, HEADERS), [0, 1, 3])
    refused(Reason.UNKNOWN_MEMBER, lambda: check_certificate(small, absent))


def test_a_cohort_too_small_by_count_or_by_organisation_too_large_or_unknown_is_refused_p_12() -> None:
    """P-12: two hospitals of one owner count once."""
    refused(
        Reason.BELOW_COHORT,
        lambda: check_certificate(CHECKED, C.certificate(C.cohort(CHECKED, {h: HEADERS[h] for h in ("alice", "bob")}))),
    )
    chain = make_consortium(organisations={"alice": "chain", "bob": "chain"})
    checked = chain.manifest()
    three = chain.cohort(checked, {h: HEADERS[h] for h in ("alice", "bob", "carol")})
    refused(Reason.BELOW_COHORT, lambda: check_certificate(checked, chain.certificate(three)))
    check_certificate(checked, chain.certificate(chain.cohort(checked, HEADERS)))
    tight = make_consortium(maximum_cohort=3)
    checked = tight.manifest()
    refused(Reason.TOO_LARGE, lambda: check_certificate(checked, tight.certificate(tight.cohort(checked, HEADERS))))
    unknown = C.cohort(CHECKED, HEADERS | {"mallory": derive("x")})
    refused(Reason.UNKNOWN_MEMBER, lambda: check_certificate(CHECKED, C.certificate(unknown)))


def test_cohort_bytes_that_are_not_exact_are_refused() -> None:
    """Duplicate or descending hospitals, truncation, trailing bytes, oversized claims, broken ids."""
    good = C.cohort(CHECKED, HEADERS).blob
    one = Accepted("alice", derive("x"))
    refused(Reason.MALFORMED, lambda: Cohort(CHECKED.M, (one, one)))
    refused(Reason.MALFORMED, lambda: Cohort(CHECKED.M, (Accepted("bob", derive("x")), one)))
    for blob in (
        b"",
        good[:-1],
        good + b"\0",
        good[:35],
        good[:32] + (4097).to_bytes(4, "big") + good[36:],
        good[:32] + (5).to_bytes(4, "big") + good[36:],
        good.replace(b"alice", b"ALICE"),
        good[:36] + (64).to_bytes(4, "big") + good[40:],
    ):
        refused(Reason.MALFORMED, lambda blob=blob: Cohort.parse(blob))


def test_abandon_certificates_of_a_quorum_on_one_manifest_only_p_10_p_14() -> None:
    """P-10, P-14: at least q distinct charter pods, identity keys, one M."""
    other = C.manifest(C.core(model=derive("other")))
    good = C.abandon_certificate(CHECKED)
    roster = C.roster
    assert check_abandon_certificate(good, roster, STUDY, 1, 1) == CHECKED.M
    assert check_abandon_certificate(good, roster, STUDY, 1, 1, manifest=CHECKED.M) == CHECKED.M

    def made(*abandons: Signed) -> bytes:
        from services.common.secagg.messages import AbandonCertificate

        return encode(AbandonCertificate(abandons))

    one = [C.abandon(CHECKED, pod) for pod in range(4)]
    by_round_key = C.pods[2].round.sign("abandon", one[2].blob)
    for blob, reason in (
        (made(), Reason.BELOW_QUORUM),
        (made(*one[:2]), Reason.BELOW_QUORUM),
        (made(one[0], one[0], one[1]), Reason.MALFORMED),
        (made(one[1], one[0], one[2]), Reason.MALFORMED),
        (made(one[0], one[1], C.abandon(other, 2)), Reason.WRONG_CORE),
        (made(one[0], one[1], by_round_key), Reason.BAD_SIGNATURE),
    ):
        refused(reason, lambda blob=blob: check_abandon_certificate(blob, roster, STUDY, 1, 1))
    refused(Reason.WRONG_CORE, lambda: check_abandon_certificate(good, roster, STUDY, 1, 2))
    refused(Reason.WRONG_CORE, lambda: check_abandon_certificate(good, roster, STUDY, 1, 1, manifest=other.M))


def chain(c: Consortium, rounds: list[int]) -> list[ResultLink]:
    """Signed results of `rounds`, each on the one before."""
    links, previous = [], ZERO_DIGEST
    for number in rounds:
        checked = c.manifest(c.core(round=number, previous_result=previous))
        result = c.result(checked)
        links.append(ResultLink(result, checked.blob))
        previous = digest("result", result.blob)
    return links


def test_a_result_chain_is_followed_from_the_result_that_is_held_p_17() -> None:
    rosters = {C.roster.charter: C.roster}
    links = chain(C, [1, 2, 4])  # round 3 stalled
    end, last = check_result_chain(links, rosters, STUDY, ZERO_DIGEST)
    assert end == digest("result", links[-1].result.blob)
    assert last is not None
    assert last.round == 4
    held = digest("result", links[0].result.blob)
    assert check_result_chain(links[1:], rosters, STUDY, held, 1)[0] == end
    assert check_result_chain([], rosters, STUDY, held, 1) == (held, None)


def test_result_chains_that_are_cut_forged_reordered_or_foreign_are_refused() -> None:
    rosters = {C.roster.charter: C.roster}
    one, two, three = chain(C, [1, 2, 3])
    first = C.manifest(C.core(previous_result=ZERO_DIGEST))
    forged = ResultLink(C.pods[0].identity.sign("result", one.result.blob), one.manifest)
    other_round = ResultLink(C.result(first, round=2), first.blob)
    # The second round does not start from the model that the first one names.
    moved = C.result(first, model=derive("moved"))
    next_core = C.core(round=2, previous_result=digest("result", moved.blob))
    after = C.manifest(next_core)
    for links, reason in (
        ([one, three], Reason.WRONG_CORE),
        ([two], Reason.WRONG_CORE),
        ([one, one], Reason.WRONG_CORE),
        ([forged], Reason.BAD_SIGNATURE),
        ([other_round], Reason.WRONG_CORE),
        ([ResultLink(moved, first.blob), ResultLink(C.result(after), after.blob)], Reason.WRONG_CORE),
    ):
        refused(reason, lambda links=links: check_result_chain(links, rosters, STUDY, ZERO_DIGEST))
    refused(Reason.WRONG_CORE, lambda: check_result_chain([one], rosters, derive("study"), ZERO_DIGEST))
    refused(Reason.WRONG_CORE, lambda: check_result_chain([one], rosters, STUDY, ZERO_DIGEST, 1))
    refused(Reason.WRONG_CORE, lambda: check_result_chain([one], {}, STUDY, ZERO_DIGEST))
