"""An independent oracle in plain Python integers: no numpy, no code of services.common.secagg.

Packing, sums mod 2^b, the centred lift and AES-CTR streams are written again from protocol.md §6 and §10.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def pack(values: Iterable[int], bits: int) -> bytes:
    return b"".join((value % 2**bits).to_bytes(bits // 8, "little") for value in values)


def unpack(packed: bytes, bits: int) -> list[int]:
    step = bits // 8
    return [int.from_bytes(packed[at : at + step], "little") for at in range(0, len(packed), step)]


def lift(value: int, bits: int) -> int:
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def add(vectors: Sequence[bytes], bits: int, size: int, signs: Sequence[int] | None = None) -> bytes:
    """The signed sum of packed vectors of `size` bytes."""
    signs = signs or [1] * len(vectors)
    total = [0] * (size // (bits // 8))
    for sign, vector in zip(signs, vectors, strict=True):
        total = [a + sign * b for a, b in zip(total, unpack(vector, bits), strict=True)]
    return pack(total, bits)


def key(seed: bytes, manifest: bytes, hospital: str, piece: int) -> bytes:
    """HKDF-SHA256 by hand (RFC 5869), one block."""
    name = hospital.encode()
    info = b"wardround/v1/mask\0" + len(name).to_bytes(4, "big") + name + piece.to_bytes(2, "big")
    return hmac.digest(hmac.digest(manifest, seed, "sha256"), info + b"\x01", "sha256")


def stream(stream_key: bytes, size: int) -> bytes:
    """AES-256-CTR from counter 0 by single blocks of AES-ECB."""
    block = Cipher(algorithms.AES256(stream_key), modes.ECB()).encryptor()  # noqa: S305 - single blocks build CTR by hand
    counters = b"".join(i.to_bytes(16, "big") for i in range(-(-size // 16)))
    return block.update(counters)[:size]


def commitment(manifest: bytes, hospital: str, piece: int, seed: bytes) -> bytes:
    name = hospital.encode()
    parts = b"wardround/v1/com\0" + manifest + len(name).to_bytes(4, "big") + name + piece.to_bytes(2, "big")
    return hashlib.sha256(parts + seed).digest()


def vector_digest(whole: bytes) -> bytes:
    chunks = [whole[at : at + 1048560] for at in range(0, len(whole), 1048560)]
    digests = b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
    return hashlib.sha256(b"wardround/v1/vector\0" + len(whole).to_bytes(8, "big") + digests).digest()


def encode(value: int, bound: int, limbs: int) -> list[int]:
    """The limbs of one value, low first; the highest carries the sign."""
    width = bound.bit_length() - 1
    found = []
    for _ in range(limbs - 1):
        found.append(value % 2**width)
        value = (value - found[-1]) // 2**width
    return [*found, value]
