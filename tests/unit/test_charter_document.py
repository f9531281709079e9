"""Which charters are refused when they are loaded, by every role: P-1, P-12, P-2, P-26."""

import hashlib
import itertools
import math

import pytest

from services.common.documents.charter import load_charter, load_join, load_signatures
from services.common.documents.emit import emit
from services.common.documents.pin import load_pin, select
from services.common.documents.words import same_words, words_of
from services.common.errors import Reason, ServiceError
from services.common.ids import Role
from tests.support.documents import Documents, make_charter, make_documents, make_site


@pytest.fixture(scope="module")
def documents() -> Documents:
    return make_documents()


def refusal(blob: bytes) -> str:
    with pytest.raises(ServiceError) as caught:
        load_charter(blob)
    assert caught.value.reason is Reason.INVALID_DOCUMENT
    assert "\n" not in caught.value.detail
    return caught.value.detail


def test_a_valid_charter_becomes_a_roster(documents: Documents) -> None:
    charter, sites = documents.charter, documents.sites
    roster = charter.roster
    assert charter.digest == hashlib.sha256(charter.blob).digest() == roster.charter
    assert [pod.id for pod in roster.pods] == ["pod-0", "pod-1", "pod-2", "pod-3"]
    assert roster.hospital("bob").key == sites["bob"].signer.public
    assert roster.hospital("bob").organisation == "bob trust"
    committee = roster.committee
    assert (committee.pods, committee.threshold, committee.quorum, committee.slack) == (4, 2, 3, 0)
    assert (roster.minimum_cohort, roster.maximum_cohort, roster.colluding_hospitals) == (3, 16, 1)
    assert roster.limits.round_key_ms == 24 * 3_600_000
    assert not roster.demo
    found = charter.find("pod-2")
    assert found is not None
    assert found[0] is Role.POD
    assert charter.find("mallory") is None


def test_p_1_every_committee_without_a_safe_quorum_is_refused() -> None:
    """P-1 against its own words, for all committees of up to 5 pods (slack 0)."""
    for pods, threshold, quorum in itertools.product(range(1, 6), range(2, 6), range(2, 6)):
        charter, _ = make_charter(pods=pods, threshold=threshold, quorum=quorum)
        safe = (
            2 <= threshold <= pods
            and quorum <= pods
            and 2 * quorum - pods > threshold - 1
            and math.comb(pods, threshold - 1) <= 64
        )
        if safe:
            load_charter(emit(charter))
        else:
            assert "committee" in refusal(emit(charter))


def test_p_1_one_pod_alone_may_never_open_an_update() -> None:
    charter, _ = make_charter(threshold=1, quorum=3)
    assert "committee.threshold must be greater than or equal to 2, got 1" in refusal(emit(charter))


def test_p_1_two_pods_of_one_organisation_are_refused_unless_demo() -> None:
    charter, _ = make_charter()
    twin = make_site(Role.POD, "pod-twin", "pod-0 trust").entry
    changed = charter.model_copy(update={"pods": (*charter.pods[:3], twin)})
    assert "pod-0 trust" in refusal(emit(changed))
    assert load_charter(emit(changed.model_copy(update={"demo": True}))).roster.demo


def test_p_1_the_aggregators_organisation_owns_no_pod_at_threshold_2() -> None:
    charter, _ = make_charter()
    own = make_site(Role.POD, "pod-centre", "centre trust").entry
    assert "pod-centre" in refusal(emit(charter.model_copy(update={"pods": (*charter.pods[:3], own)})))
    five, _ = make_charter(pods=5, threshold=3, quorum=4)
    load_charter(emit(five.model_copy(update={"pods": (*five.pods[:4], own)})))


def test_p_1_ids_and_keys_are_distinct_over_all_roles() -> None:
    charter, _ = make_charter()
    same_id = make_site(Role.HOSPITAL, "pod-0", "another").entry
    assert "pod-0" in refusal(emit(charter.model_copy(update={"hospitals": (*charter.hospitals, same_id)})))
    twice = (*charter.hospitals, charter.hospitals[0])
    assert "alice" in refusal(emit(charter.model_copy(update={"hospitals": twice})))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"minimum": 2}, "at least 3"),
        ({"minimum": 3, "colluding": 2}, "at least 4"),
        ({"minimum": 2, "colluding": 0}, "two_hospitals: accepted"),
        ({"two_hospitals": "accepted"}, "two_hospitals is said"),
        ({"minimum": 5}, "4 organisations"),
        ({"minimum": 4, "maximum": 3}, "maximum cohort 3"),
    ],
)
def test_p_12_a_cohort_that_could_be_opened_is_refused(options: dict[str, object], words: str) -> None:
    charter, _ = make_charter(**options)  # type: ignore[arg-type]  # some are wrong on purpose
    assert words in refusal(emit(charter))


def test_p_12_k_0_loads_only_when_said_in_words() -> None:
    loaded = make_documents(minimum=2, colluding=0, two_hospitals="accepted").charter
    assert loaded.roster.colluding_hospitals == 0


@pytest.mark.parametrize("field", ["id", "organisation", "tls_root", "signature", "identity_key"])
def test_p_2_an_entry_that_was_changed_does_not_carry_its_own_signature(documents: Documents, field: str) -> None:
    """P-2 rests on it: keys come from the charter, so each entry must be what its owner signed."""
    charter, _ = make_charter()
    other = make_site(Role.HOSPITAL, "mallory").entry
    changed = charter.hospitals[1].model_copy(update={field: getattr(other, field)})
    blob = emit(charter.model_copy(update={"hospitals": (charter.hospitals[0], changed, *charter.hospitals[2:])}))
    assert "does not carry its own signature" in refusal(blob)


def test_p_2_an_entry_is_signed_for_its_role() -> None:
    charter, _ = make_charter()
    pod = make_site(Role.POD, "pod-9").entry
    assert "hospital pod-9 does not carry its own signature" in refusal(
        emit(charter.model_copy(update={"hospitals": (*charter.hospitals, pod)}))
    )


def test_keys_that_cannot_be_keys_are_refused() -> None:
    charter, _ = make_charter()
    for field, value, words in [
        ("identity_key", "AB" * 32, "identity_key must be exactly 64 lower-case hex digits"),
        ("identity_key", "ab" * 31, "identity_key must be exactly 64"),
        ("signature", "ab", "signature must be exactly 128"),
        ("id", "Alice", "DNS label"),
    ]:
        changed = charter.hospitals[0].model_copy(update={field: value})
        blob = emit(charter.model_copy(update={"hospitals": (changed, *charter.hospitals[1:])}))
        assert words in refusal(blob)


def test_a_tls_root_must_be_one_certificate_authority() -> None:
    charter, sites = make_charter()
    site = sites["alice"]
    for root in ["", "no certificate", site.entry.tls_root * 2]:
        forged = site.entry.model_copy(update={"tls_root": root})
        from services.common.documents.charter import join_blob

        signature = site.signer.sign("join", join_blob(Role.HOSPITAL, forged)).signature.hex()
        signed = forged.model_copy(update={"signature": signature})
        blob = emit(charter.model_copy(update={"hospitals": (signed, *charter.hospitals[1:])}))
        assert "alice: tls_root must be the PEM of exactly one CA certificate" in refusal(blob)


def test_crlf_in_a_charter_changes_the_digest_but_no_signed_entry(documents: Documents) -> None:
    blob = documents.charter.blob.replace(b"\n", b"\r\n")
    loaded = load_charter(blob)
    assert loaded.digest == hashlib.sha256(blob).digest() != documents.charter.digest
    assert loaded.document == documents.charter.document


def test_p_3_signatures_cover_the_exact_bytes_and_need_a_quorum(documents: Documents) -> None:
    """P-3: a charter that differs by one trailing newline is another charter."""
    charter = documents.charter
    assert load_signatures(documents.signatures(["pod-0", "pod-1", "pod-3"]), charter) == ("pod-0", "pod-1", "pod-3")
    with pytest.raises(ServiceError, match=r"2 pod owners have signed.*3 must"):
        load_signatures(documents.signatures(["pod-0", "pod-1"]), charter)
    with pytest.raises(ServiceError, match="another charter"):
        load_signatures(documents.signatures(["pod-0", "pod-1", "pod-3"]), load_charter(charter.blob + b"\n"))


def test_one_bad_signature_spoils_the_file(documents: Documents) -> None:
    good = documents.signatures(["pod-0", "pod-1", "pod-2", "pod-3"])
    at = good.index(b'pod-2: "') + 8
    flipped = good[:at] + (b"0" if good[at : at + 1] != b"0" else b"1") + good[at + 1 :]
    with pytest.raises(ServiceError, match="pod-2 does not fit"):
        load_signatures(flipped, documents.charter)
    with pytest.raises(ServiceError, match="alice is not a pod"):
        load_signatures(good.replace(b"pod-2:", b"alice:"), documents.charter)


def test_a_join_file_is_checked_before_it_is_used() -> None:
    join = make_site(Role.POD, "pod-0").join
    assert load_join(emit(join)).member == make_site(Role.POD, "pod-0").entry
    for field, value in [("role", "hospital"), ("organisation", "Other"), ("id", "pod-1")]:
        with pytest.raises(ServiceError, match="does not carry its own signature"):
            load_join(emit(join.model_copy(update={field: value})))


def test_p_26_a_digest_is_spoken_in_twelve_words() -> None:
    assert words_of(bytes(32)) == ("abandon",) * 12
    assert words_of(b"\xff" * 32) == ("zoo",) * 12
    # bits 0..10 = 1, so the first word is number 1 and no other word moves
    assert words_of(bytes([0x00, 0x20]) + bytes(30)) == ("ability", *("abandon",) * 11)
    digest = hashlib.sha256(b"a charter").digest()
    number = int(bin(int.from_bytes(digest, "big"))[2:].zfill(256)[:11], 2)
    words = words_of(digest)
    assert len(words) == 12
    assert words_of(bytes(1) + digest[1:])[0] != words[0] or number < 2**3
    assert same_words(digest, " ".join(words))
    assert same_words(digest, ", ".join(words).upper())
    assert not same_words(digest, " ".join(words[:11]))
    assert not same_words(digest, " ".join(reversed(words)))


def test_p_26_the_words_cover_132_bits_and_each_bit_moves_them() -> None:
    digest = hashlib.sha256(b"any").digest()
    for bit in range(132):
        flipped = bytearray(digest)
        flipped[bit // 8] ^= 0x80 >> bit % 8
        changed = [i for i, (a, b) in enumerate(zip(words_of(digest), words_of(bytes(flipped)), strict=True)) if a != b]
        assert changed == [bit // 11]


def test_p_26_only_a_pinned_charter_is_used(documents: Documents) -> None:
    other = load_charter(documents.charter.blob + b"\n")
    pin = load_pin(documents.pin())
    assert select(pin, [other, documents.charter]).current is documents.charter
    assert select(pin, [documents.charter]).next is None
    with pytest.raises(ServiceError, match="is not among the charter files"):
        select(pin, [other])
    amended = pin.model_copy(update={"next": other.digest.hex()})
    assert select(load_pin(emit(amended)), [documents.charter, other]).next is other
    assert select(amended, [documents.charter]).next is None
