"""Writes the known-answer vectors beside this file: `python tests/vectors/make_vectors.py`.

Expected values come from plain Python (tests/support/integer_oracle.py) and hashlib, not from the code
under test; only the boxes are sealed by the library, which draws its own randomness: they are judged by
opening, with an independent opener as well, and change with every run.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey  # noqa: E402 - after the path is set
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # noqa: E402

from services.common.secagg import sealing  # noqa: E402
from tests.support import integer_oracle as oracle  # noqa: E402

FILE = Path(__file__).with_name("secagg.json")
CHUNK = 1_048_560
LABELS = (
    "proposal commit manifest endorse header receipt accept cohort lock release abandon highwater result mask com box "
    "vector close charter join core"
)


def derive(name: str) -> bytes:
    """32 bytes that stand for `name`."""
    return hashlib.sha256(b"wardround vectors / " + name.encode()).digest()


def keystreams() -> list[dict[str, Any]]:
    """Keys and stretches of their streams, across the chunk border too."""
    found = []
    for hospital, piece in (("alice", 0), ("a-hospital-with-a-long-name", 9), ("z", 63)):
        manifest, seed = derive("manifest"), derive(f"seed {hospital}")
        key = oracle.key(seed, manifest, hospital, piece)
        stream = oracle.stream(key, 2 * CHUNK + 96)
        found.append(
            {
                "manifest": manifest.hex(), "seed": seed.hex(), "hospital": hospital, "piece": piece,
                "key": key.hex(), "commitment": oracle.commitment(manifest, hospital, piece, seed).hex(),
                "bytes_0": stream[:48].hex(), "bytes_1048512": stream[CHUNK - 48 : CHUNK + 48].hex(),
                "bytes_2097120": stream[2 * CHUNK :].hex(),
            }
        )  # fmt: skip
    return found


def packings() -> list[dict[str, Any]]:
    """Values, their packed lanes, and the sum of three vectors."""
    values = [0, 1, -1, 127, -128, 255, 256, 32767, -32768, 65535, 65536, 2**23 - 1, -(2**23), 2**31 - 1, -(2**31)]
    found = []
    for bits in (16, 24, 32):
        packed = oracle.pack(values, bits)
        total = oracle.add([packed, packed, packed], bits, len(packed))
        lifted = [oracle.lift(value, bits) for value in oracle.unpack(packed, bits)]
        found.append(
            {"bits": bits, "values": values, "packed": packed.hex(), "lifted": lifted, "three_times": total.hex()}
        )
    return found


def digests() -> dict[str, Any]:
    """D(label, blob) of every label, vector digests, and the digest of a cohort written by hand."""
    blob = b"any bytes"
    labels = {
        name: hashlib.sha256(b"wardround/v1/" + name.encode() + b"\0" + blob).hexdigest() for name in LABELS.split()
    }
    vectors = [
        {"bytes": size, "fill": size % 251, "digest": oracle.vector_digest(bytes([size % 251]) * size).hex()}
        for size in (1, 48, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK)
    ]
    members = [("alice", derive("alice")), ("bob", derive("bob")), ("carol", derive("carol"))]
    cohort = derive("manifest") + len(members).to_bytes(4, "big")
    for name, header in members:
        cohort += len(name).to_bytes(4, "big") + name.encode() + header
    return {
        "blob": blob.hex(),
        "labels": labels,
        "vectors": vectors,
        "cohort": {
            "manifest": derive("manifest").hex(),
            "members": [[name, header.hex()] for name, header in members],
            "blob": cohort.hex(),
            "digest": hashlib.sha256(b"wardround/v1/cohort\0" + cohort).hexdigest(),
        },
    }


def boxes() -> list[dict[str, Any]]:
    """Boxes of both suites with everything that opens them."""
    found = []
    for suite, hospital, pod in ((1, "alice", 0), (1, "z", 15), (2, "alice", 3)):
        lattice_seed = derive("d") + derive("z") if suite == 1 else b""
        exchange = X25519PrivateKey.from_private_bytes(derive("x25519"))
        public = exchange.public_key().public_bytes_raw()
        if suite == 1:
            public = MLKEM768PrivateKey.from_seed_bytes(lattice_seed).public_key().public_bytes_raw() + public
        plaintext = derive("seed 0") + derive("seed 1") + derive("seed 2")
        name = hospital.encode()
        info = b"wardround/v1/box\0" + derive("manifest") + len(name).to_bytes(4, "big") + name + pod.to_bytes(2, "big")
        found.append(
            {
                "suite": suite, "lattice_seed": lattice_seed.hex(), "exchange_key": derive("x25519").hex(),
                "public": public.hex(), "manifest": derive("manifest").hex(), "hospital": hospital, "pod": pod,
                "info": info.hex(), "plaintext": plaintext.hex(),
                "box": sealing.seal(suite, public, plaintext, info).hex(),
            }
        )  # fmt: skip
    return found


def main() -> None:
    vectors = {"keystreams": keystreams(), "packings": packings(), "digests": digests(), "boxes": boxes()}
    FILE.write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
