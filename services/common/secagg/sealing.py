"""HPKE boxes that carry seeds to the pods (protocol.md §10, "box").

Suite 1 (default) is ML-KEM-768 + X25519 (X-Wing), suite 2 X25519; both with HKDF-SHA256 and AES-256-GCM,
base mode, single shot. The charter fixes the suite, nothing negotiates.
The one impure corner of the core: the library draws its own randomness for keys and encapsulation.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from services.common.errors import Reason, ServiceError
from services.common.secagg.masking import hospital_bytes
from services.common.secagg.messages import SUITE_HYBRID, SUITE_X25519
from services.common.secagg.signing import label

SEED_BYTES = 32
_MLKEM_BYTES = 1184
_TAG_BYTES = 16
PUBLIC_KEY_BYTES = {SUITE_HYBRID: _MLKEM_BYTES + 32, SUITE_X25519: 32}
ENC_BYTES = {SUITE_HYBRID: 1088 + 32, SUITE_X25519: 32}

_SUITES = {
    SUITE_HYBRID: Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
    SUITE_X25519: Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
}
# The private half of the P-17 test exchange: fixed, public, and worth nothing.
_REMEMBERED = (
    64  # public keys that loaded: each is met when its manifest is checked, and when something is sealed to it
)
_TEST_KEY = x25519.X25519PrivateKey.from_private_bytes(bytes(range(1, 33)))

_Private = MLKEM768X25519PrivateKey | x25519.X25519PrivateKey
_Public = MLKEM768X25519PublicKey | x25519.X25519PublicKey


@dataclass(frozen=True)
class SealingKey:
    """The private half of a pod's round key pair for boxes. In memory only (P-4); never shown."""

    suite: int
    _private: _Private = field(repr=False)


def generate(suite: int) -> tuple[SealingKey, bytes]:
    """A fresh key pair: (private, public bytes of 1216 (suite 1) or 32 (suite 2))."""
    _check_suite(suite)
    exchange = x25519.X25519PrivateKey.generate()
    half = exchange.public_key().public_bytes_raw()
    if suite == SUITE_X25519:
        return SealingKey(suite, exchange), half
    lattice = mlkem.MLKEM768PrivateKey.generate()
    public = lattice.public_key().public_bytes_raw() + half
    return SealingKey(suite, MLKEM768X25519PrivateKey(lattice, exchange)), public


def load_sealing_key(suite: int, lattice_seed: bytes, exchange_key: bytes) -> SealingKey:
    """The private key of given bytes (ML-KEM's 64-byte seed, empty in suite 2, and X25519's 32 bytes).

    For known-answer tests: a pod's own key comes from `generate` and is never stored.
    """
    _check_suite(suite)
    exchange = x25519.X25519PrivateKey.from_private_bytes(exchange_key)
    if suite == SUITE_X25519:
        return SealingKey(suite, exchange)
    return SealingKey(suite, MLKEM768X25519PrivateKey(mlkem.MLKEM768PrivateKey.from_seed_bytes(lattice_seed), exchange))


@lru_cache(maxsize=_REMEMBERED)
def load_public_key(suite: int, public: bytes) -> _Public:
    """The public key, proved usable (P-17). Raises MALFORMED.

    A low-order X25519 half would make sealing fail at every hospital: it is found here by an exchange
    with a fixed test key.
    """
    _check_suite(suite)
    if len(public) != PUBLIC_KEY_BYTES[suite]:
        raise _malformed(f"a sealing key of {len(public)} bytes, suite {suite} has {PUBLIC_KEY_BYTES[suite]}")
    try:
        exchange = x25519.X25519PublicKey.from_public_bytes(public[-32:])
        _TEST_KEY.exchange(exchange)
        if suite == SUITE_X25519:
            return exchange
        return MLKEM768X25519PublicKey(mlkem.MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_BYTES]), exchange)
    except ValueError as error:
        raise _malformed("a sealing key that does not load or is of low order") from error


def box_info(manifest: bytes, hospital: str, pod: int) -> bytes:
    """label(box) ‖ M ‖ lp(hospital) ‖ u16(pod index): what binds a box to its place (P-9)."""
    return label("box") + manifest + hospital_bytes(hospital) + pod.to_bytes(2, "big")


def box_bytes(suite: int, pieces: int) -> int:
    """The exact length of a box with `pieces` seeds."""
    _check_suite(suite)
    return ENC_BYTES[suite] + SEED_BYTES * pieces + _TAG_BYTES


def seal(suite: int, public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """enc ‖ ciphertext of `plaintext` for `public`. Raises MALFORMED for a bad key."""
    return _SUITES[_check_suite(suite)].encrypt(plaintext, load_public_key(suite, public), info=info)


def open_box(key: SealingKey, box: bytes, info: bytes) -> bytes:
    """The plaintext of `box`. Raises MALFORMED for a copied, replayed, altered or misaddressed one (P-9)."""
    try:
        return _SUITES[key.suite].decrypt(box, key._private, info=info)
    except InvalidTag as error:
        raise _malformed("a box that does not open: sealed for another pod, hospital or attempt, or altered") from error


def pack_seeds(seeds: Iterable[bytes]) -> bytes:
    """The plaintext of a box: the seeds of the pod's pieces, ascending. Raises MALFORMED unless each has 32 bytes."""
    listed = tuple(seeds)
    if any(len(seed) != SEED_BYTES for seed in listed):
        raise _malformed(f"a seed that has not {SEED_BYTES} bytes")
    return b"".join(listed)


def unpack_seeds(plaintext: bytes, count: int) -> tuple[bytes, ...]:
    """The `count` seeds of a box's plaintext. Raises MALFORMED for another length."""
    if len(plaintext) != SEED_BYTES * count:
        raise _malformed(f"a box with {len(plaintext)} bytes inside, {count} seeds have {SEED_BYTES * count}")
    return tuple(plaintext[at : at + SEED_BYTES] for at in range(0, len(plaintext), SEED_BYTES))


def _check_suite(suite: int) -> int:
    if suite not in _SUITES:
        raise _malformed(f"HPKE suite {suite} is unknown: 1 or 2")
    return suite


def _malformed(detail: str) -> ServiceError:
    return ServiceError(Reason.MALFORMED, f"sealing: {detail}")
