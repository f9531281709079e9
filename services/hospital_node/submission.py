"""From the packed vector x to what leaves: masks, boxes, commitments (protocol.md §4 step 5, §10).

Dangers: seeds are drawn here, once for each attempt, and live no longer than `mask`; masking two vectors with
one seed would open both. Nothing here depends on data but y (P-6).
"""

import hashlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from services.common.secagg import masking, sealing
from services.common.secagg.blob import encode
from services.common.secagg.certificate import CheckedManifest
from services.common.secagg.digests import chunk_digest, vector_digest
from services.common.secagg.messages import BoxDigest, Header, LedgerMark, Signed
from services.common.secagg.signing import Signer


@dataclass(frozen=True)
class Masked:
    """One vector masked for one attempt; `y` is the digest under which `keep` stored it."""

    y: bytes
    total_bytes: int
    vector: bytes
    chunk_digests: tuple[bytes, ...] = field(repr=False)
    commitments: tuple[bytes, ...] = field(repr=False)
    boxes: tuple[bytes, ...] = field(repr=False)
    pods: tuple[int, ...]


def mask(x: Any, checked: CheckedManifest, hospital: str, keep: Callable[[Iterator[bytes]], bytes]) -> Masked:
    """Mask `x` (packed lanes, a contiguous buffer) with fresh seeds and seal these to the manifest's pods.

    `keep` stores the chunks of y durably and returns the stored blob's digest.
    """
    committee, manifest = checked.roster.committee, checked.M
    seeds = tuple(secrets.token_bytes(sealing.SEED_BYTES) for _ in committee.pieces)
    keys = [masking.stream_key(seed, manifest, hospital, j) for j, seed in enumerate(seeds)]
    packed = memoryview(x).cast("B")
    total, digests = packed.nbytes, []

    def fill(start: int, out: memoryview) -> None:
        out[:] = packed[start : start + len(out)]

    def take(chunk: memoryview) -> tuple[bytes, bytes]:
        return bytes(chunk), chunk_digest(chunk)

    def chunks() -> Iterator[bytes]:
        for chunk, digest in masking.mask_vector(fill, total, checked.table.ring, keys, take):
            digests.append(digest)
            yield chunk

    stored = keep(chunks())
    boxes = tuple(
        sealing.seal(
            commitment.suite,
            commitment.sealing_key,
            sealing.pack_seeds(seeds[j] for j in committee.pieces_of(pod)),
            sealing.box_info(manifest, hospital, pod),
        )
        for pod, commitment in checked.commitments.items()
    )
    return Masked(
        y=stored,
        total_bytes=total,
        vector=vector_digest(total, digests),
        chunk_digests=tuple(digests),
        commitments=tuple(masking.commitment(manifest, hospital, j, seed) for j, seed in enumerate(seeds)),
        boxes=boxes,
        pods=tuple(checked.commitments),
    )


def sign_header(masked: Masked, checked: CheckedManifest, hospital: str, mark: LedgerMark, signer: Signer) -> Signed:
    """The header over the masked vector and the ledger AFTER its debit (privacy.md L-4)."""
    return signer.sign(
        "header",
        encode(
            Header(
                manifest=checked.M,
                hospital=hospital,
                lanes=checked.table.total_lanes,
                commitments=masked.commitments,
                boxes=tuple(
                    BoxDigest(pod, hashlib.sha256(box).digest())
                    for pod, box in zip(masked.pods, masked.boxes, strict=True)
                ),
                vector=masked.vector,
                ledger=mark,
            )
        ),
    )
