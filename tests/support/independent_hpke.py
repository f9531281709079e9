"""HPKE opened by hand: RFC 9180 base mode over X-Wing (kem 0x647a) and over DHKEM(X25519) (kem 0x0020).

Built from ML-KEM-768, X25519, SHA3-256, HKDF and AES-GCM alone, to judge the library's own HPKE.
"""

import hashlib
import hmac

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HKDF_SHA256, AES_256_GCM = 1, 2
X_WING, DHKEM_X25519 = 0x647A, 0x0020


def _extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, "sha256")


def _expand(suite: bytes, prk: bytes, label: bytes, info: bytes, size: int) -> bytes:
    labelled = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac.digest(prk, labelled + b"\x01", "sha256")[:size]


def _open(kem: int, shared: bytes, info: bytes, ciphertext: bytes) -> bytes:
    suite = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (kem, HKDF_SHA256, AES_256_GCM))
    context = b"\0" + _extract(suite, b"", b"psk_id_hash", b"") + _extract(suite, b"", b"info_hash", info)
    secret = _extract(suite, shared, b"secret", b"")
    key, nonce = _expand(suite, secret, b"key", context, 32), _expand(suite, secret, b"base_nonce", context, 12)
    return AESGCM(key).decrypt(nonce, ciphertext, b"")


def open_x_wing(lattice_seed: bytes, exchange_key: bytes, box: bytes, info: bytes) -> bytes:
    """The plaintext of a suite 1 box."""
    exchange = X25519PrivateKey.from_private_bytes(exchange_key)
    ours, theirs = exchange.public_key().public_bytes_raw(), box[1088:1120]
    lattice = MLKEM768PrivateKey.from_seed_bytes(lattice_seed).decapsulate(box[:1088])
    joined = lattice + exchange.exchange(X25519PublicKey.from_public_bytes(theirs)) + theirs + ours + b"\\.//^\\"
    return _open(X_WING, hashlib.sha3_256(joined).digest(), info, box[1120:])


def open_x25519(exchange_key: bytes, box: bytes, info: bytes) -> bytes:
    """The plaintext of a suite 2 box."""
    exchange = X25519PrivateKey.from_private_bytes(exchange_key)
    ours, theirs = exchange.public_key().public_bytes_raw(), box[:32]
    suite = b"KEM" + DHKEM_X25519.to_bytes(2, "big")
    prk = _extract(suite, b"", b"eae_prk", exchange.exchange(X25519PublicKey.from_public_bytes(theirs)))
    return _open(DHKEM_X25519, _expand(suite, prk, b"shared_secret", theirs + ours, 32), info, box[32:])
