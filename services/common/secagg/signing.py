"""Ed25519 over exact bytes under a domain label (protocol.md P-3, §10).

A blob is parsed only after its signature verified. Which key to verify with comes from the pinned
charter (identity keys, P-2) or from the manifest (round keys), never from the message itself.
Not here: drawing keys (their 32 bytes are an argument), storing them.
"""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.common.errors import Reason, ServiceError
from services.common.secagg import blob as codec
from services.common.secagg.messages import Signed

T = TypeVar("T")
_REMEMBERED = 256  # messages that verified: most are met again in a later step of their round, byte for byte

LABELS = frozenset(
    {
        "proposal",
        "commit",
        "manifest",
        "endorse",
        "header",
        "receipt",
        "accept",
        "cohort",
        "lock",
        "release",
        "abandon",
        "highwater",
        "result",
        "mask",
        "com",
        "box",
        "vector",
        "close",
        "charter",
        "join",
        "core",
    }
)

_P = 2**255 - 19
_Y8 = int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little")
# y coordinates (also unreduced) of the eight points of small order: one signature under such a key fits many blobs.
_SMALL_ORDER = frozenset({0, 1, _P - 1, _P, _P + 1, _Y8, _P - _Y8})


def label(name: str) -> bytes:
    """The domain label `name` as bytes: "wardround/v1/" ‖ name ‖ 0x00. Raises ValueError for a name not in §10."""
    if name not in LABELS:
        raise ValueError(f"no label {name!r} in protocol.md §10")
    return b"wardround/v1/" + name.encode() + b"\0"


def digest(name: str, blob: bytes) -> bytes:
    """D(name, blob) = SHA-256(label(name) ‖ blob), 32 bytes."""
    return hashlib.sha256(label(name) + blob).digest()


def check_public_key(key: bytes, what: str) -> bytes:
    """Return `key` if it is 32 bytes and not of small order; else raise MALFORMED naming `what`."""
    if len(key) != 32:
        raise ServiceError(Reason.MALFORMED, f"{what}: {len(key)} bytes, an Ed25519 public key has 32")
    if int.from_bytes(key, "little") & (2**255 - 1) in _SMALL_ORDER:
        raise ServiceError(Reason.MALFORMED, f"{what}: a point of small order verifies forged signatures")
    return key


class Signer:
    """Holds one Ed25519 private key; its repr shows the public half only."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.public: bytes = private_key.public_key().public_bytes_raw()

    @classmethod
    def from_seed(cls, seed: bytes) -> "Signer":
        """The signer of 32 bytes from the operating system's generator."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, name: str, blob: bytes) -> Signed:
        """`blob` with the signature over label(name) ‖ blob."""
        return Signed(blob, self._private_key.sign(label(name) + blob))

    def __repr__(self) -> str:
        return f"Signer(public={self.public.hex()})"


def verify(name: str, signed: Signed, public_key: bytes) -> None:
    """Raise BAD_SIGNATURE unless `signed` is by `public_key` (32 bytes) under label `name`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signed.signature, label(name) + signed.blob)
    except (InvalidSignature, ValueError) as error:
        raise ServiceError(Reason.BAD_SIGNATURE, f"{name}: the signature does not verify") from error


def open_signed(cls: type[T], name: str, signed: Signed, public_key: bytes) -> T:
    """Verify, THEN parse strictly. Raises BAD_SIGNATURE or MALFORMED. Equal bytes under one key are looked at once."""
    opened: T = _opened(cls, name, signed, public_key)  # type: ignore[arg-type]  # mypy: no class is Hashable to it
    return opened


@lru_cache(maxsize=_REMEMBERED)
def _opened(cls: type[Any], name: str, signed: Signed, public_key: bytes) -> Any:
    verify(name, signed, public_key)
    return codec.decode(cls, signed.blob)


def open_claimed(cls: type[T], name: str, signed: Signed, field: str, keys: Mapping[str, bytes]) -> T:
    """As `open_signed`, with the key that `keys` has for the id which the blob claims in `field`.

    Only that one id is read before the signature verified. Raises UNKNOWN_MEMBER for an id not in
    `keys`, BAD_SIGNATURE, MALFORMED.
    """
    claimed = codec.peek_ident(cls, field, signed.blob)
    key = keys.get(claimed)
    if key is None:
        raise ServiceError(Reason.UNKNOWN_MEMBER, f"{name}: {claimed!r} has no key here; check the pinned charter")
    return open_signed(cls, name, signed, key)
