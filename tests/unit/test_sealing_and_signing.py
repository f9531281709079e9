"""Boxes (P-9) and signatures (P-3): what opens, what does not, what never prints."""

import dataclasses

import pytest

from services.common.errors import Reason, ServiceError
from services.common.secagg import sealing, signing
from services.common.secagg.blob import encode, peek_ident
from services.common.secagg.messages import Abandon, Endorsement, Signed
from tests.support.consortium import derive

M = derive("M")


@pytest.mark.parametrize("suite", [1, 2])
def test_a_box_opens_only_at_its_place_p_9(suite: int) -> None:
    """P-9: another hospital's, another M's, another pod's, another key's, or an altered box does not open."""
    key, public = sealing.generate(suite)
    other, _ = sealing.generate(suite)
    seeds = tuple(derive("seed", j) for j in range(3))
    info = sealing.box_info(M, "alice", 2)
    box = sealing.seal(suite, public, sealing.pack_seeds(seeds), info)
    assert len(box) == sealing.box_bytes(suite, 3)
    assert sealing.unpack_seeds(sealing.open_box(key, box, info), 3) == seeds
    for wrong in (
        (key, box, sealing.box_info(M, "bob", 2)),
        (key, box, sealing.box_info(derive("other M"), "alice", 2)),
        (key, box, sealing.box_info(M, "alice", 1)),
        (other, box, info),
        (key, box[:-1], info),
        (key, box + b"\0", info),
        (key, bytes([box[0] ^ 1]) + box[1:], info),
        (key, box[:-1] + bytes([box[-1] ^ 1]), info),
        (key, b"", info),
        (key, bytes(len(box)), info),
    ):
        with pytest.raises(ServiceError) as refused:
            sealing.open_box(*wrong)
        assert refused.value.reason is Reason.MALFORMED


def test_keys_that_do_not_load_and_seeds_of_wrong_length_are_refused() -> None:
    _, public = sealing.generate(1)
    for attempt in (
        lambda: sealing.generate(3),
        lambda: sealing.load_public_key(1, public[:-1]),
        lambda: sealing.load_public_key(1, b"\xff" * 1184 + public[-32:]),  # not reduced: fails ML-KEM's modulus check
        lambda: sealing.load_public_key(1, public[:-32] + bytes(32)),
        lambda: sealing.load_public_key(2, bytes(32)),
        lambda: sealing.pack_seeds([bytes(31)]),
        lambda: sealing.unpack_seeds(bytes(33), 1),
    ):
        with pytest.raises(ServiceError) as refused:
            attempt()
        assert refused.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("suite", [1, 2])
def test_a_loaded_key_is_the_same_key(suite: int) -> None:
    key = sealing.load_sealing_key(suite, bytes(64) if suite == 1 else b"", derive("x25519"))
    assert "private" not in repr(key).lower()
    assert repr(key) == f"SealingKey(suite={suite})"


def test_a_signature_holds_for_its_bytes_label_and_key_only_p_3() -> None:
    """P-3: unsigned, re-encoded and relabelled blobs are refused, before they are parsed."""
    signer = signing.Signer.from_seed(derive("a"))
    blob = encode(Endorsement(M, "pod-0"))
    good = signer.sign("endorse", blob)
    assert signing.open_signed(Endorsement, "endorse", good, signer.public) == Endorsement(M, "pod-0")
    stranger = signing.Signer.from_seed(derive("b"))
    for label, signed, key in (
        ("lock", good, signer.public),
        ("endorse", good, stranger.public),
        ("endorse", Signed(blob + b"\x1a\x00", good.signature), signer.public),  # protobuf would ignore the tail
        ("endorse", Signed(blob, bytes(64)), signer.public),
        ("endorse", Signed(blob, good.signature[:-1]), signer.public),
        ("endorse", good, b"\xff" * 32),
        ("endorse", Signed(b"\xff", good.signature), signer.public),
    ):
        with pytest.raises(ServiceError) as refused:
            signing.open_signed(Endorsement, label, signed, key)
        assert refused.value.reason is Reason.BAD_SIGNATURE


def test_signed_but_not_the_one_encoding_is_refused_p_3() -> None:
    """P-3: the signer itself cannot add fields, repeats or trailing bytes."""
    signer = signing.Signer.from_seed(derive("a"))
    blob = encode(Endorsement(M, "pod-0"))
    for bad in (blob + b"\x1a\x00", blob + blob, blob + b"\0", blob[:-1]):
        with pytest.raises(ServiceError) as refused:
            signing.open_signed(Endorsement, "endorse", signer.sign("endorse", bad), signer.public)
        assert refused.value.reason is Reason.MALFORMED


def test_private_keys_and_seeds_do_not_print() -> None:
    seed = derive("a")
    signer = signing.Signer.from_seed(seed)
    assert repr(signer) == f"Signer(public={signer.public.hex()})"
    assert seed.hex() not in str(vars(signer))


def test_labels_are_a_closed_list() -> None:
    with pytest.raises(ValueError, match="no label"):
        signing.label("other")
    assert signing.label("core") == b"wardround/v1/core\0"


@pytest.mark.parametrize("y", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18])
@pytest.mark.parametrize("sign", [0, 1])
def test_identity_keys_of_small_order_are_refused(y: int, sign: int) -> None:
    """A signature under such a key verifies for many blobs."""
    with pytest.raises(ServiceError, match="small order"):
        signing.check_public_key((y | sign << 255).to_bytes(32, "little"), "key")


def test_the_order_eight_points_are_on_the_curve_and_listed() -> None:
    """-x² + y² = 1 + d·x²·y², and doubling three times gives the neutral point."""
    p = 2**255 - 19
    d = -121665 * pow(121666, p - 2, p) % p
    for encoded in (
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    ):
        y = int.from_bytes(bytes.fromhex(encoded), "little")
        square = (y * y - 1) * pow(d * y * y + 1, p - 2, p) % p
        # A point of order 8 doubles to one of order 4, whose y is 0: y² + x² = 0.
        assert (square + y * y) % p == 0
        with pytest.raises(ServiceError, match="small order"):
            signing.check_public_key(bytes.fromhex(encoded), "key")


def test_the_claimed_id_is_read_alone_and_only_to_find_the_key() -> None:
    blob = encode(Abandon(M, M, 1, 1, M, "pod-0"))
    assert peek_ident(Abandon, "pod", blob) == "pod-0"
    for bad in (b"", blob[: blob.index(b"pod-0") - 2], b"\x0d\x00", b"\x32\x03A_b", b"\x32\x05\xff\xfe\xfd\xfc\xfb"):
        with pytest.raises(ServiceError) as refused:
            peek_ident(Abandon, "pod", bad)
        assert refused.value.reason is Reason.MALFORMED


def test_messages_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Endorsement(M, "pod-0").pod = "pod-1"  # type: ignore[misc]  # on purpose
