"""The own mark and the abandon certificates, apart from any connection (P-10, P-16)."""

from dataclasses import replace

import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg.certificate import CheckedManifest
from services.hospital_node.attempt import Sent, check_attempt, check_mark
from tests.support.consortium import NOW, Consortium, derive, make_consortium


@pytest.fixture(scope="module")
def consortium() -> Consortium:
    return make_consortium()


def sent(checked: CheckedManifest, **changes: object) -> Sent:
    plain = Sent(checked.core.round, checked.proposal.attempt, checked.M, checked.core_digest)
    return replace(plain, **changes)  # type: ignore[arg-type]


def attempt(consortium: Consortium, checked: CheckedManifest, abandons: list[bytes], before: list[Sent]) -> bytes:
    return check_attempt(
        checked.blob,
        consortium.endorsements(checked),
        abandons,
        roster=consortium.roster,
        own=checked.core,
        sent=before,
        now_ms=NOW,
    ).M


def test_p16_another_core_of_a_submitted_round_is_refused_even_where_it_is_the_own_one(consortium: Consortium) -> None:
    """P-16: a hospital whose own core changed (an amended charter, say) still holds to the one it submitted to."""
    second = consortium.manifest(attempt=2)
    before = sent(second, attempt=1, manifest=derive("M1"), core=derive("another core"))
    with pytest.raises(ServiceError, match="P-16") as refused:
        attempt(consortium, second, [], [before])
    assert refused.value.reason is Reason.WRONG_CORE


def test_p10_every_earlier_manifest_needs_its_own_certificate(consortium: Consortium) -> None:
    """P-10: sent under attempts 1 and 2, attempt 3 needs both; attempt 2 without a submission needs none."""
    first, second, third = (consortium.manifest(attempt=number) for number in (1, 2, 3))
    one, two = consortium.abandon_certificate(first), consortium.abandon_certificate(second)
    for abandons in ([], [one], [two], [one, one]):
        with pytest.raises(ServiceError) as refused:
            attempt(consortium, third, abandons, [sent(first), sent(second)])
        assert refused.value.reason is Reason.BURNED
    assert attempt(consortium, third, [one, two], [sent(first), sent(second)]) == third.M
    assert attempt(consortium, third, [one], [sent(first)]) == third.M
    assert attempt(consortium, third, [], []) == third.M


def test_p10_garbage_among_the_certificates_changes_nothing(consortium: Consortium) -> None:
    first, second = consortium.manifest(attempt=1), consortium.manifest(attempt=2)
    good = consortium.abandon_certificate(first)
    assert attempt(consortium, second, [b"garbage", b"", good], [sent(first)]) == second.M
    forged = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(ServiceError):
        attempt(consortium, second, [b"garbage", forged], [sent(first)])


def test_own_mark_same_manifest_again_is_a_resend(consortium: Consortium) -> None:
    """(r, a, M): the very M again is allowed without a certificate; a lower round or another M of (r, a) is not."""
    checked = consortium.manifest()
    check_mark(checked, [sent(checked)])
    with pytest.raises(ServiceError) as conflict:
        check_mark(checked, [sent(checked, manifest=derive("other"))])
    assert conflict.value.reason is Reason.CONFLICT
    with pytest.raises(ServiceError) as burned:
        check_mark(checked, [sent(checked, round=2)])
    assert burned.value.reason is Reason.BURNED
    check_mark(checked, [sent(checked, round=0, core=derive("of round 0"))])


def test_expired_attempt_is_late(consortium: Consortium) -> None:
    checked = consortium.manifest()
    for now in (checked.proposal.deadline, checked.proposal.expires):
        with pytest.raises(ServiceError) as refused:
            check_attempt(
                checked.blob,
                consortium.endorsements(checked),
                [],
                roster=consortium.roster,
                own=checked.core,
                sent=[],
                now_ms=now,
            )
        assert refused.value.reason is Reason.LATE
